// Top-k's kernel for AMX: tiles of 8-bit integers.
//
// The bank's tiles are operand A as they lie in memory, the queries' are operand B: their lanes are
// queries, so cuts sit in vectors. Two by two tiles of sums, 32 rows times 32 queries, take every
// step four tiles and four products. The rows of a group stay in L1 while the panels of the block
// stream past from L2 (loaded as streams, so that they leave the rows where they are), and the next
// group is fetched into L2 meanwhile. A panel's scores are compared with the cuts during the
// products of the next panel.

#include "topk_kernel.hpp"

#if defined(__AMX_INT8__) && defined(__AVX512F__)

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "topk_avx512.hpp"

namespace pymcip {
namespace {

int encode(float* rows, int count, int64_t columns, int64_t steps, int8_t* codes, int32_t* sums,
           float* facts, float* norms) {
    return encode_rows<16>(rows, count, columns, steps, codes, sums, facts, norms);
}

// [steps, 2, 16, 16, 4]: per step and half of the panel a tile whose row is 4 columns of 16 queries.
void arrange(const int8_t* codes, int64_t steps, uint8_t* panel) {
    const int64_t width = steps * kStep;
    for (int64_t step = 0; step < steps; ++step)
        for (int query = 0; query < kPanel; ++query)
            for (int quad = 0; quad < kStep / 4; ++quad)
                __builtin_memcpy(
                    panel + ((step * 2 + query / 16) * 16 + quad) * 64 + query % 16 * 4,
                    codes + query * width + step * kStep + quad * 4, 4);
}

struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Scores that were stored but not yet looked at.
struct Pending {
    const int32_t* scores;
    int64_t panel, group, visit;
    int row;
    __m512i even_low, even_high, odd_low, odd_high;

    PYMCIP_INLINE void begin(const int32_t* stored, int64_t of_panel, int64_t of_group,
                             int64_t of_visit) {
        scores = stored;
        panel = of_panel;
        group = of_group;
        visit = of_visit;
        row = 0;
        even_low = even_high = odd_low = odd_high = _mm512_set1_epi32(INT32_MIN);
    }
    PYMCIP_INLINE void look(int rows) {
        for (const int end = row + rows; row < end; row += 2) {
            const int32_t* line = scores + row * kPanel;
            even_low = _mm512_max_epi32(even_low, _mm512_load_si512(line));
            even_high = _mm512_max_epi32(even_high, _mm512_load_si512(line + 16));
            odd_low = _mm512_max_epi32(odd_low, _mm512_load_si512(line + 32));
            odd_high = _mm512_max_epi32(odd_high, _mm512_load_si512(line + 48));
        }
    }
    PYMCIP_INLINE void settle(const Screen& screen) {
        settle_best(screen, panel, group, visit, scores, _mm512_max_epi32(even_low, odd_low),
                    _mm512_max_epi32(even_high, odd_high));
    }
};

void screen(const Screen& screen) {
    const TileShapes shapes;
    _tile_loadconfig(&shapes);
    alignas(64) int32_t scores[kGroup * kPanel];  // looked at before the next are stored
    const int64_t steps = screen.steps, half_group = steps * 16 * kStep;
    const int64_t panel_bytes = steps * 2 * 1024;
    // Rows of pending scores to look at, and lines of the next group to fetch, per step.
    int looks = 2;
    while (looks * steps < kGroup) looks *= 2;
    const int64_t lines = (kGroup + screen.panel_count - 1) / screen.panel_count;
    Pending pending;
    pending.scores = nullptr;
    int64_t visit = 0;
    for (int64_t group = screen.first; group < screen.last && !stopped(screen);
         group += screen.stride, ++visit) {
        const int8_t* top = screen.codes + group * 2 * half_group;
        const int8_t* bottom = top + half_group;
        const int8_t* next = top + screen.stride * 2 * half_group;
        for (int64_t panel = 0; panel < screen.panel_count; ++panel) {
            const uint8_t* query = screen.panels + panel * panel_bytes;
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (int64_t step = 0; step < steps; ++step, query += 2048) {
                _tile_loadd(4, top + step * 1024, 64);
                _tile_stream_loadd(6, query, 64);
                _tile_dpbssd(0, 4, 6);
                _tile_stream_loadd(7, query + 1024, 64);
                _tile_dpbssd(1, 4, 7);
                _tile_loadd(5, bottom + step * 1024, 64);
                _tile_dpbssd(2, 5, 6);
                _tile_dpbssd(3, 5, 7);
                for (int64_t line = 0; line < lines; ++line, next += 64)
                    _mm_prefetch(reinterpret_cast<const char*>(next), _MM_HINT_T1);
                if (pending.scores != nullptr && pending.row < kGroup) {
                    pending.look(looks);
                    if (pending.row >= kGroup) pending.settle(screen);
                }
            }
            _tile_stored(0, scores, 128);
            _tile_stored(1, scores + 16, 128);
            _tile_stored(2, scores + 512, 128);
            _tile_stored(3, scores + 528, 128);
            pending.begin(scores, panel, group, visit);
        }
    }
    if (pending.scores != nullptr) {
        pending.look(kGroup);
        pending.settle(screen);
    }
    _tile_release();
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

bool usable() {
    unsigned eax, ebx, ecx, edx;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
    constexpr unsigned tile = 1u << 24, int8 = 1u << 25;
    if ((edx & tile) == 0 || (edx & int8) == 0) return false;
    if (!__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512dq") ||
        !__builtin_cpu_supports("avx512vl"))
        return false;
    // Linux grants the tile registers to a process that asks, for good: ARCH_REQ_XCOMP_PERM for
    // XTILEDATA. It refuses where the kernel is too old, a sandbox forbids the call, or a thread has
    // an alternative signal stack that could not hold the tiles.
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}

constexpr Kernel kKernel = {"amx", 2048, encode, arrange, screen, score, widen_half, widen_bfloat};

}  // namespace

const Kernel* kernel_amx() {
    static const bool can = usable();
    return can ? &kKernel : nullptr;
}

}  // namespace pymcip

#else

namespace pymcip {
const Kernel* kernel_amx() { return nullptr; }
}  // namespace pymcip

#endif
