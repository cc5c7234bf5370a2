// Top-k's kernels for AMX: tiles of 8-bit integers, and of bfloats.
//
// The bank's tiles are operand A as they lie in memory, the queries' are operand B: their lanes are
// queries, so cuts sit in vectors. Two by two tiles of sums, 32 rows times 32 queries, take every
// step four tiles and four products. The rows of a group stay in L1 while the panels of the block
// stream past from L2 (loaded as streams, so that they leave the rows where they are), and the next
// group is fetched into L2 meanwhile. A panel's scores are compared with the cuts during the
// products of the next panel. Where a group's rows are too many bytes for L1, the steps are split, and
// sums wait in memory.

#include "topk_kernel.hpp"

#if defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(__AVX512F__)

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

// [steps, 2, 16, 16, 4]: per step and half of the panel a tile whose row is 4 bytes of 16 queries.
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
template <bool Float>
struct Pending {
    using S = Scores<Float>;
    const int32_t* scores = nullptr;
    int64_t panel = 0, group = 0, visit = 0;
    int row = kGroup;
    typename S::Vector even_low, even_high, odd_low, odd_high;

    PYMCIP_INLINE void begin(const int32_t* stored, int64_t of_panel, int64_t of_group,
                             int64_t of_visit) {
        scores = stored;
        panel = of_panel;
        group = of_group;
        visit = of_visit;
        row = 0;
        even_low = even_high = odd_low = odd_high = S::lowest();
    }
    // Looks at some rows; after the last of them settles the scores.
    PYMCIP_INLINE void look(const Screen& screen, int rows) {
        if (row >= kGroup) return;
        for (const int end = row + rows; row < end; row += 2) {
            const int32_t* line = scores + row * kPanel;
            even_low = S::max(even_low, S::load(line));
            even_high = S::max(even_high, S::load(line + 16));
            odd_low = S::max(odd_low, S::load(line + 32));
            odd_high = S::max(odd_high, S::load(line + 48));
        }
        if (row >= kGroup)
            settle_best<Float>(screen, panel, group, visit, scores, S::max(even_low, odd_low),
                               S::max(even_high, odd_high));
    }
};

// Rows of a group that lie in L1 at a time, beside what streams past: the steps are split for more.
constexpr int64_t kSplitBytes = 36 << 10;

PYMCIP_INLINE void store_sums(int32_t* sums) {
    _tile_stored(0, sums, 128);
    _tile_stored(1, sums + 16, 128);
    _tile_stored(2, sums + 512, 128);
    _tile_stored(3, sums + 528, 128);
}

template <bool Float>
PYMCIP_INLINE void screen_tiles(const Screen& screen) {
    const TileShapes shapes;
    _tile_loadconfig(&shapes);
    alignas(64) int32_t scores[kGroup * kPanel];  // looked at before the next are stored
    const int64_t steps = screen.steps, half_group = steps * 16 * kStep;
    const int64_t splits = (2 * half_group + kSplitBytes - 1) / kSplitBytes;
    int32_t* const partial = static_cast<int32_t*>(screen.scratch);  // [panels, kGroup, kPanel]
    // Rows of pending scores to look at, and lines of the next group to fetch, per step.
    int looks = 2;
    while (looks * (steps / splits) < kGroup) looks *= 2;
    const int64_t lines = (kGroup + screen.panel_count - 1) / screen.panel_count;
    Pending<Float> pending;
    int64_t visit = 0;
    for (int64_t group = screen.first; group < screen.last && !stopped(screen);
         group += screen.stride, ++visit) {
        const int8_t* top = screen.codes + group * 2 * half_group;
        const int8_t* bottom = top + half_group;
        const int8_t* next = top + screen.stride * 2 * half_group;
        for (int64_t split = 0; split < splits; ++split) {
            const int64_t first = steps * split / splits, end = steps * (split + 1) / splits;
            for (int64_t panel = 0; panel < screen.panel_count; ++panel) {
                const uint8_t* query = screen.panels + (panel * steps + first) * 2048;
                int32_t* sums = partial + panel * kGroup * kPanel;
                if (split == 0) {
                    _tile_zero(0);
                    _tile_zero(1);
                    _tile_zero(2);
                    _tile_zero(3);
                } else {
                    _tile_loadd(0, sums, 128);
                    _tile_loadd(1, sums + 16, 128);
                    _tile_loadd(2, sums + 512, 128);
                    _tile_loadd(3, sums + 528, 128);
                }
                for (int64_t step = first; step < end; ++step, query += 2048) {
                    _tile_loadd(4, top + step * 1024, 64);
                    _tile_stream_loadd(6, query, 64);
                    if constexpr (Float) _tile_dpbf16ps(0, 4, 6);
                    else _tile_dpbssd(0, 4, 6);
                    _tile_stream_loadd(7, query + 1024, 64);
                    if constexpr (Float) _tile_dpbf16ps(1, 4, 7);
                    else _tile_dpbssd(1, 4, 7);
                    _tile_loadd(5, bottom + step * 1024, 64);
                    if constexpr (Float) {
                        _tile_dpbf16ps(2, 5, 6);
                        _tile_dpbf16ps(3, 5, 7);
                    } else {
                        _tile_dpbssd(2, 5, 6);
                        _tile_dpbssd(3, 5, 7);
                    }
                    for (int64_t line = 0; line < lines; ++line, next += 64)
                        _mm_prefetch(reinterpret_cast<const char*>(next), _MM_HINT_T1);
                    pending.look(screen, looks);
                }
                if (split + 1 < splits) {
                    store_sums(sums);
                } else {
                    store_sums(scores);
                    pending.begin(scores, panel, group, visit);
                }
            }
        }
    }
    pending.look(screen, kGroup);
    _tile_release();
}

void screen_int8(const Screen& screen) { screen_tiles<false>(screen); }
void screen_bf16(const Screen& screen) { screen_tiles<true>(screen); }

int encode_bf16(float* rows, int count, int64_t columns, int64_t steps, int8_t* codes,
                int32_t* sums, float* facts, float* norms) {
    const int64_t width = steps * kStep;  // bytes of a row of codes, and floats from row to row
    float reach = 0, doubt = 0;
    const float share = kRoundings + static_cast<float>(columns + 8) / 8388608.0f;
    typedef uint16_t Bfloats __attribute__((vector_size(32)));
    using Float = Vectors<16>::Float;
    using Bits = Vectors<16>::Bits;
    for (int row = 0; row < count; ++row) {
        float* x = rows + row * width;
        int8_t* out = codes + row * width;
        for (int64_t i = columns; i < width / 2; ++i) x[i] = 0;
        Float most = {}, square_sum = {};
        for (int64_t i = 0; i < width / 2; i += 16) {
            const Float value = at<16>(x + i), size = value < 0 ? -value : value;
            most = size > most ? size : most;
            square_sum += value * value;
        }
        float greatest = 0;
        for (int lane = 0; lane < 16; ++lane) greatest = most[lane] > greatest ? most[lane] : greatest;
        alignas(64) float squares[16], rounded[16], lost[16];
        at<16>(squares) = square_sum;
        const float square = halve(squares);
        if (!(square < __builtin_inff())) return row;
        const bool tiny = greatest < kTinyBfloat, coded = !tiny && square < kMostBfloats;
        const uint32_t mask = coded ? 0xffff0000u : 0;
        Float rounded_sum = {}, lost_sum = {};
        for (int64_t i = 0; i < width / 2; i += 16) {
            const Float value = at<16>(x + i);
            Bits bits = load<Bits>(x + i);
            bits = (bits + 0x7fff + (bits >> 16 & 1)) & mask;  // to nearest, ties to even
            const Float code = load<Float>(&bits), rest = value - code;
            const Bfloats halves = __builtin_convertvector(bits >> 16, Bfloats);
            __builtin_memcpy(out + 2 * i, &halves, sizeof halves);
            rounded_sum += code * code;
            lost_sum += rest * rest;
        }
        at<16>(rounded) = rounded_sum;
        at<16>(lost) = lost_sum;
        norms[row] = (tiny ? greatest * __builtin_sqrtf(static_cast<float>(columns))
                           : __builtin_sqrtf(square)) *
                     kSafety;
        const float own_reach = __builtin_sqrtf(halve(rounded)) * kSafety;
        const float own_doubt = coded
                                    ? __builtin_sqrtf(halve(lost)) * kSafety + share * norms[row]
                                    : norms[row] * kSafety;
        reach = own_reach > reach ? own_reach : reach;
        doubt = own_doubt > doubt ? own_doubt : doubt;
        sums[row] = 0;
    }
    facts[kScale] = 1;
    facts[kInverseScale] = 1;
    facts[kReach] = reach;
    facts[kDoubt] = doubt;
    return -1;
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

enum class Numbers { int8, bf16 };

bool usable(Numbers numbers) {
    unsigned eax, ebx, ecx, edx;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
    constexpr unsigned tile = 1u << 24, int8 = 1u << 25, bf16 = 1u << 22;
    if ((edx & tile) == 0 || (edx & (numbers == Numbers::int8 ? int8 : bf16)) == 0) return false;
    if (!__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512dq") ||
        !__builtin_cpu_supports("avx512vl"))
        return false;
    // Linux grants the tile registers to a process that asks, for good: ARCH_REQ_XCOMP_PERM for
    // XTILEDATA. It refuses where the kernel is too old, a sandbox forbids the call, or a thread has
    // an alternative signal stack that could not hold the tiles.
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}

constexpr Kernel kInt8 = {"amx",       1,     2048,       encode,      arrange,
                          screen_int8, score, widen_half, widen_bfloat};
constexpr Kernel kBf16 = {"amx_bf16",  2,     2048,       encode_bf16, arrange,
                          screen_bf16, score, widen_half, widen_bfloat};

}  // namespace

const Kernel* kernel_amx() {
    static const bool can = usable(Numbers::int8);
    return can ? &kInt8 : nullptr;
}

const Kernel* kernel_amx_bf16() {
    static const bool can = usable(Numbers::bf16);
    return can ? &kBf16 : nullptr;
}

}  // namespace pymcip

#else

namespace pymcip {
const Kernel* kernel_amx() { return nullptr; }
const Kernel* kernel_amx_bf16() { return nullptr; }
}  // namespace pymcip

#endif
