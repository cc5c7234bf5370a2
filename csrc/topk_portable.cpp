// Top-k's kernel in plain C++, for every processor (on AArch64 its loops become NEON).

#include "topk_kernel_common.hpp"

namespace pymcip {
namespace {

int encode(float* rows, int count, int64_t columns, int64_t steps, int8_t* codes, int32_t* sums,
           float* facts, float* norms) {
    return encode_rows<4>(rows, count, columns, steps, codes, sums, facts, norms);
}

// 16-bit codes, row-major: sums of products of 16-bit pairs are an instruction on most processors.
void arrange(const int8_t* codes, int64_t steps, uint8_t* panel) {
    int16_t* out = reinterpret_cast<int16_t*>(panel);
    for (int64_t i = 0; i < kPanel * steps * kStep; ++i) out[i] = codes[i];
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
            const int16_t* queries =
                reinterpret_cast<const int16_t*>(screen.panels + panel * screen.steps * 4096);
            for (int query = 0; query < kPanel; query += 2)
                for (int row = 0; row < kGroup; row += 2) {
                    const int16_t *a = rows + row * width, *b = a + width;
                    const int16_t *p = queries + query * width, *q = p + width;
                    int32_t ap = 0, aq = 0, bp = 0, bq = 0;
                    for (int64_t i = 0; i < width; ++i) {
                        ap += a[i] * p[i];
                        aq += a[i] * q[i];
                        bp += b[i] * p[i];
                        bq += b[i] * q[i];
                    }
                    int32_t* out = scores + row * kPanel + query;
                    out[0] = ap;
                    out[1] = aq;
                    out[kPanel] = bp;
                    out[kPanel + 1] = bq;
                }
            settle(screen, panel, group, visit, scores);
        }
    }
}

float score(const float* query, const float* row, int64_t columns) {
    return exact_score<4>(query, row, columns);
}
void widen_half(const uint16_t* from, int64_t count, float* to) { widen_halves(from, count, to); }
void widen_bfloat(const uint16_t* from, int64_t count, float* to) {
    widen_bfloats(from, count, to);
}

constexpr Kernel kKernel = {"portable", 1,     4096,       encode,      arrange,
                            screen,     score, widen_half, widen_bfloat};

}  // namespace

const Kernel* kernel_portable() { return &kKernel; }

}  // namespace pymcip
