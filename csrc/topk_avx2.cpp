// Top-k's kernel for AVX2: codes widened to 16 bits, products of pairs summed to 32.

#include "topk_kernel.hpp"

#if defined(__AVX2__)

#include <immintrin.h>

#include "topk_kernel_common.hpp"

namespace pymcip {
namespace {

int encode(float* rows, int count, int64_t columns, int64_t steps, int8_t* codes, int32_t* sums,
           float* facts, float* norms) {
    return encode_rows<8>(rows, count, columns, steps, codes, sums, facts, norms);
}

// 16-bit codes [32 steps, 32, 2]: 2 columns of 32 queries.
void arrange(const int8_t* codes, int64_t steps, uint8_t* panel) {
    int16_t* out = reinterpret_cast<int16_t*>(panel);
    const int64_t width = steps * kStep;
    for (int64_t pair = 0; pair < width / 2; ++pair)
        for (int query = 0; query < kPanel; ++query)
            for (int i = 0; i < 2; ++i)
                out[(pair * kPanel + query) * 2 + i] = codes[query * width + pair * 2 + i];
}

// Two rows times four vectors of queries.
PYMCIP_INLINE void multiply(const int16_t* first, const int16_t* second, const uint8_t* panel,
                            int64_t width, int32_t* scores) {
    __m256i sums[2][4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) sums[0][v] = sums[1][v] = _mm256_setzero_si256();
    for (int64_t column = 0; column < width; column += 2, panel += 4 * kPanel) {
        int32_t pairs[2];
        __builtin_memcpy(&pairs[0], first + column, 4);
        __builtin_memcpy(&pairs[1], second + column, 4);
        const __m256i one = _mm256_set1_epi32(pairs[0]), other = _mm256_set1_epi32(pairs[1]);
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) {
            const __m256i queries =
                _mm256_load_si256(reinterpret_cast<const __m256i*>(panel + v * 32));
            sums[0][v] = _mm256_add_epi32(sums[0][v], _mm256_madd_epi16(queries, one));
            sums[1][v] = _mm256_add_epi32(sums[1][v], _mm256_madd_epi16(queries, other));
        }
    }
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
        _mm256_store_si256(reinterpret_cast<__m256i*>(scores + v * 8), sums[0][v]);
        _mm256_store_si256(reinterpret_cast<__m256i*>(scores + kPanel + v * 8), sums[1][v]);
    }
}

void screen(const Screen& screen) {
    alignas(64) int32_t scores[kGroup * kPanel];
    int16_t* rows = static_cast<int16_t*>(screen.scratch);
    const int64_t width = screen.steps * kStep;
    int64_t visit = 0;
    for (int64_t group = screen.first; group < screen.last && !stopped(screen);
         group += screen.stride, ++visit) {
        widen_codes(screen.codes + group * kGroup * width, screen.steps, rows);
        for (int64_t panel = 0; panel < screen.panel_count; ++panel) {
            for (int row = 0; row < kGroup; row += 2)
                multiply(rows + row * width, rows + (row + 1) * width,
                         screen.panels + panel * screen.steps * 4096, width, scores + row * kPanel);
            settle(screen, panel, group, visit, scores);
        }
    }
}

float score(const float* query, const float* row, int64_t columns) {
    return exact_score<8>(query, row, columns);
}
void widen_half(const uint16_t* from, int64_t count, float* to) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8)
        _mm256_storeu_ps(
            to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
    widen_halves(from + i, count - i, to + i);
}
void widen_bfloat(const uint16_t* from, int64_t count, float* to) {
    widen_bfloats(from, count, to);
}

constexpr Kernel kKernel = {"avx2", 1,     4096,       encode,      arrange,
                            screen, score, widen_half, widen_bfloat};

}  // namespace

const Kernel* kernel_avx2() {
    static const bool can = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                            __builtin_cpu_supports("f16c");
    return can ? &kKernel : nullptr;
}

}  // namespace pymcip

#else

namespace pymcip {
const Kernel* kernel_avx2() { return nullptr; }
}  // namespace pymcip

#endif
