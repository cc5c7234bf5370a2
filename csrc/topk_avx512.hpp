// Epilogue of the kernels with 512-bit vectors; included by their translation units alone.
#pragma once

#include <immintrin.h>

#include "topk_kernel_common.hpp"

namespace pymcip {
namespace {

// Integer scores that 16 queries' must reach in a group; see group_cut.
PYMCIP_INLINE __m512i cuts_of(const Screen& screen, int64_t query, const float* facts) {
    __m512 cut = _mm512_load_ps(screen.cuts + query);
    cut = _mm512_fnmadd_ps(_mm512_load_ps(screen.residuals + query),
                           _mm512_set1_ps(facts[kReach]), cut);
    cut = _mm512_fnmadd_ps(_mm512_load_ps(screen.norms + query), _mm512_set1_ps(facts[kDoubt]), cut);
    cut = _mm512_mul_ps(cut, _mm512_set1_ps(facts[kInverseScale]));
    cut = _mm512_max_ps(_mm512_min_ps(cut, _mm512_set1_ps(kMostScore)), _mm512_set1_ps(-kMostScore));
    return _mm512_sub_epi32(
        _mm512_cvt_roundps_epi32(cut, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC),
        _mm512_set1_epi32(1));
}

PYMCIP_INLINE void store_lowest(const Screen& screen, int64_t query, const float* facts,
                                __m512i best, float* out) {
    __m512 score = _mm512_mul_ps(_mm512_sub_ps(_mm512_cvtepi32_ps(best), _mm512_set1_ps(1)),
                                 _mm512_set1_ps(facts[kScale]));
    score = _mm512_fnmadd_ps(_mm512_load_ps(screen.residuals + query),
                             _mm512_set1_ps(facts[kReach]), score);
    score = _mm512_fnmadd_ps(_mm512_load_ps(screen.norms + query), _mm512_set1_ps(facts[kDoubt]),
                             score);
    _mm512_storeu_ps(out, score);
}

// The scores of a group and a panel, once the best of each query is known.
PYMCIP_INLINE void settle_best(const Screen& screen, int64_t panel, int64_t group, int64_t visit,
                               const int32_t* scores, __m512i best_low, __m512i best_high) {
    const float* facts = screen.groups + group * kGroupFacts;
    const int64_t query = panel * kPanel;
    if (__builtin_expect(screen.lowest != nullptr, 0)) {
        float* lowest = screen.lowest + visit * screen.panel_count * kPanel + query;
        store_lowest(screen, query, facts, best_low, lowest);
        store_lowest(screen, query + 16, facts, best_high, lowest + 16);
        return;
    }
    const __m512i low = cuts_of(screen, query, facts), high = cuts_of(screen, query + 16, facts);
    const __mmask16 any_low = _mm512_cmpge_epi32_mask(best_low, low);
    const __mmask16 any_high = _mm512_cmpge_epi32_mask(best_high, high);
    if (__builtin_expect(_mm512_kortestz(any_low, any_high), 1)) return;
    alignas(64) uint32_t admitted[kGroup];
    for (int row = 0; row < kGroup; ++row) {
        const int32_t* line = scores + row * kPanel;
        admitted[row] =
            _mm512_cmpge_epi32_mask(_mm512_load_si512(line), low) |
            static_cast<uint32_t>(_mm512_cmpge_epi32_mask(_mm512_load_si512(line + 16), high)) << 16;
    }
    screen.offer(screen.context, panel, group, admitted, scores);
}

// exact_score, without the detour of GCC 12's conversion of vectors.
PYMCIP_INLINE float exact_score_avx512(const float* query, const float* row, int64_t columns) {
    __m512d low = _mm512_setzero_pd(), high = low;
    const int64_t whole = columns / 16 * 16;
    for (int64_t d = 0; d < whole; d += 16) {
        low = _mm512_fmadd_pd(_mm512_cvtps_pd(_mm256_loadu_ps(query + d)),
                              _mm512_cvtps_pd(_mm256_loadu_ps(row + d)), low);
        high = _mm512_fmadd_pd(_mm512_cvtps_pd(_mm256_loadu_ps(query + d + 8)),
                               _mm512_cvtps_pd(_mm256_loadu_ps(row + d + 8)), high);
    }
    alignas(64) double lanes[16];
    _mm512_store_pd(lanes, low);
    _mm512_store_pd(lanes + 8, high);
    for (int64_t d = whole; d < columns; ++d)
        lanes[d - whole] += static_cast<double>(query[d]) * static_cast<double>(row[d]);
    return static_cast<float>(halve(lanes)) + 0.0f;
}

PYMCIP_INLINE void widen_halves_f16c(const uint16_t* from, int64_t count, float* to) {
    int64_t i = 0;
    for (; i + 16 <= count; i += 16)
        _mm512_storeu_ps(
            to + i,
            _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i))));
    widen_halves(from + i, count - i, to + i);
}

}  // namespace
}  // namespace pymcip
