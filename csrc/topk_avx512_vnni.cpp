// Top-k's kernel for AVX-512 with VNNI: products of 4 unsigned and 4 signed bytes per lane.
//
// The queries' codes are stored with 128 added, the lanes are queries, a row's 4 bytes are broadcast;
// sums start at -128 times the row's sum of codes.

#include "topk_kernel.hpp"

#if defined(__AVX512VNNI__)

#include "topk_avx512.hpp"

namespace pymcip {
namespace {

int encode(float* rows, int count, int64_t columns, int64_t steps, int8_t* codes, int32_t* sums,
           float* facts, float* norms) {
    return encode_rows<16>(rows, count, columns, steps, codes, sums, facts, norms);
}

// [16 steps, 32, 4]: 4 columns of 32 queries.
void arrange(const int8_t* codes, int64_t steps, uint8_t* panel) {
    const int64_t width = steps * kStep;
    for (int64_t quad = 0; quad < width / 4; ++quad)
        for (int query = 0; query < kPanel; ++query)
            for (int i = 0; i < 4; ++i)
                panel[(quad * kPanel + query) * 4 + i] =
                    static_cast<uint8_t>(codes[query * width + quad * 4 + i] ^ 0x80);
}

constexpr int kRows = 8;  // times two vectors of queries: 16 sums, which hide the latency

PYMCIP_INLINE void multiply(const int8_t* rows, const int32_t* sums, const uint8_t* panel,
                            int64_t steps, int32_t* scores) {
    __m512i low[kRows], high[kRows];
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row)
        low[row] = high[row] = _mm512_set1_epi32(  // unsigned: sums of a damaged file may wrap
            static_cast<int32_t>(-128u * static_cast<uint32_t>(sums[row])));
    for (int64_t step = 0; step < steps; ++step, rows += 16 * kStep)
        for (int quad = 0; quad < kStep; quad += 4, panel += 4 * kPanel) {
            const __m512i first = _mm512_load_si512(panel), second = _mm512_load_si512(panel + 64);
#pragma GCC unroll 8
            for (int row = 0; row < kRows; ++row) {
                int32_t bytes;
                __builtin_memcpy(&bytes, rows + row * kStep + quad, 4);
                const __m512i all = _mm512_set1_epi32(bytes);
                low[row] = _mm512_dpbusd_epi32(low[row], first, all);
                high[row] = _mm512_dpbusd_epi32(high[row], second, all);
            }
        }
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
        _mm512_store_si512(scores + row * kPanel, low[row]);
        _mm512_store_si512(scores + row * kPanel + 16, high[row]);
    }
}

void screen(const Screen& screen) {
    alignas(64) int32_t scores[kGroup * kPanel];
    const int64_t steps = screen.steps;
    const int64_t lines = (kGroup * steps + screen.panel_count - 1) / screen.panel_count;
    int64_t visit = 0;
    for (int64_t group = screen.first; group < screen.last && !stopped(screen);
         group += screen.stride, ++visit) {
        const int8_t* rows = screen.codes + group * kGroup * steps * kStep;
        const int8_t* next = rows + screen.stride * kGroup * steps * kStep;
        for (int64_t panel = 0; panel < screen.panel_count; ++panel) {
            for (int64_t line = 0; line < lines; ++line, next += 64)
                _mm_prefetch(reinterpret_cast<const char*>(next), _MM_HINT_T1);
            for (int row = 0; row < kGroup; row += kRows)
                multiply(rows + (row / 16 * steps * 16 + row % 16) * kStep,
                         screen.sums + group * kGroup + row,
                         screen.panels + panel * steps * 2048, steps, scores + row * kPanel);
            __m512i low = _mm512_load_si512(scores), high = _mm512_load_si512(scores + 16);
            for (int row = 1; row < kGroup; ++row) {
                low = _mm512_max_epi32(low, _mm512_load_si512(scores + row * kPanel));
                high = _mm512_max_epi32(high, _mm512_load_si512(scores + row * kPanel + 16));
            }
            settle_best<false>(screen, panel, group, visit, scores, low, high);
        }
    }
}

float score(const float* query, const float* row, int64_t columns) {
    return exact_score_avx512(query, row, columns);
}
void widen_half(const uint16_t* from, int64_t count, float* to) {
    widen_halves_f16c(from, count, to);
}
void widen_bfloat(const uint16_t* from, int64_t count, float* to) {
    widen_bfloats(from, count, to);
}

constexpr Kernel kKernel = {"avx512_vnni", 1,     2048,       encode,      arrange,
                            screen,        score, widen_half, widen_bfloat};

}  // namespace

const Kernel* kernel_avx512_vnni() {
    static const bool can =
        __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return can ? &kKernel : nullptr;
}

}  // namespace pymcip

#else

namespace pymcip {
const Kernel* kernel_avx512_vnni() { return nullptr; }
}  // namespace pymcip

#endif
