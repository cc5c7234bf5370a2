// Epilogue of the kernels with 512-bit vectors; included by their translation units alone.
#pragma once

#include <immintrin.h>

#include "topk_kernel_common.hpp"

namespace pymcip {
namespace {

// Scores of 16 queries against a row: integers, or floats of the kernels of bfloats.
template <bool Float>
struct Scores;

template <>
struct Scores<false> {
    using Vector = __m512i;
    static PYMCIP_INLINE Vector load(const int32_t* scores) { return _mm512_load_si512(scores); }
    static PYMCIP_INLINE Vector lowest() { return _mm512_set1_epi32(INT32_MIN); }
    static PYMCIP_INLINE Vector max(Vector a, Vector b) { return _mm512_max_epi32(a, b); }
    static PYMCIP_INLINE __mmask16 reach(Vector a, Vector b) {
        return _mm512_cmpge_epi32_mask(a, b);
    }
    // See group_cut.
    static PYMCIP_INLINE Vector cut(__m512 least, const float* facts) {
        least = _mm512_mul_ps(least, _mm512_set1_ps(facts[kInverseScale]));
        least = _mm512_max_ps(_mm512_min_ps(least, _mm512_set1_ps(kMostScore)),
                              _mm512_set1_ps(-kMostScore));
        return _mm512_sub_epi32(
            _mm512_cvt_roundps_epi32(least, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC),
            _mm512_set1_epi32(1));
    }
    // In units of the queries' scales; one less for what underflowed.
    static PYMCIP_INLINE __m512 value(Vector score, const float* facts) {
        return _mm512_mul_ps(_mm512_sub_ps(_mm512_cvtepi32_ps(score), _mm512_set1_ps(1)),
                             _mm512_set1_ps(facts[kScale]));
    }
};

template <>
struct Scores<true> {
    using Vector = __m512;
    static PYMCIP_INLINE Vector load(const int32_t* scores) { return _mm512_load_ps(scores); }
    static PYMCIP_INLINE Vector lowest() { return _mm512_set1_ps(-__builtin_inff()); }
    static PYMCIP_INLINE Vector max(Vector a, Vector b) { return _mm512_max_ps(a, b); }
    static PYMCIP_INLINE __mmask16 reach(Vector a, Vector b) {
        return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ);
    }
    static PYMCIP_INLINE Vector cut(__m512 least, const float*) { return least; }
    static PYMCIP_INLINE __m512 value(Vector score, const float*) { return score; }
};

// What rounding may have taken from the scores of 16 queries in a group, taken from `value`.
PYMCIP_INLINE __m512 doubted(const Screen& screen, int64_t query, const float* facts,
                             __m512 value) {
    value = _mm512_fnmadd_ps(_mm512_load_ps(screen.residuals + query),
                             _mm512_set1_ps(facts[kReach]), value);
    return _mm512_fnmadd_ps(_mm512_load_ps(screen.norms + query), _mm512_set1_ps(facts[kDoubt]),
                            value);
}

// The scores of a group and a panel, once the best of each query is known.
template <bool Float>
PYMCIP_INLINE void settle_best(const Screen& screen, int64_t panel, int64_t group, int64_t visit,
                               const int32_t* scores, typename Scores<Float>::Vector best_low,
                               typename Scores<Float>::Vector best_high) {
    using S = Scores<Float>;
    const float* facts = screen.groups + group * kGroupFacts;
    const int64_t query = panel * kPanel;
    if (__builtin_expect(screen.lowest != nullptr, 0)) {
        float* lowest = screen.lowest + visit * screen.panel_count * kPanel + query;
        _mm512_storeu_ps(lowest, doubted(screen, query, facts, S::value(best_low, facts)));
        _mm512_storeu_ps(lowest + 16,
                         doubted(screen, query + 16, facts, S::value(best_high, facts)));
        return;
    }
    const auto low =
        S::cut(doubted(screen, query, facts, _mm512_load_ps(screen.cuts + query)), facts);
    const auto high =
        S::cut(doubted(screen, query + 16, facts, _mm512_load_ps(screen.cuts + query + 16)), facts);
    if (__builtin_expect(_mm512_kortestz(S::reach(best_low, low), S::reach(best_high, high)), 1))
        return;
    alignas(64) uint32_t admitted[kGroup];
    for (int row = 0; row < kGroup; ++row) {
        const int32_t* line = scores + row * kPanel;
        admitted[row] = S::reach(S::load(line), low) |
                        static_cast<uint32_t>(S::reach(S::load(line + 16), high)) << 16;
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
