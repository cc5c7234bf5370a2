// The kernels of the exact top-k on a GPU. topk_cuda.cu drives them and tells how they fit together.
//
// The certificate. Let q', c' be what a screen multiplies instead of q, c (of an orthogonal transform
// of them). Then
//     |<q,c> - <q',c'>| = |<q-q', c'> + <q, c-c'>| <= |q-q'| |c'| + |q| |c-c'|.
// Packing stores per row `norm`, at least |x| and |x'|, and `residual`, at least |x-x'|. The screen
// finds s with |s - <q',c'>| <= slack |q'| |c'|, and the canonical score differs from <q,c> by its
// rounding to fp32; so with u = 2^-24 a row can only rank if s + bound(q, c) reaches the cut, where
//     bound = q.residual c.norm + q.norm (c.residual + slack c.norm) + kTiny.
//
// slack, relative to |q| |c|, for products K elements deep:
//   * bf16: the products are exact in fp32. A tensor core adds n of them and the accumulator as
//     fixed-point numbers aligned to the largest, each cut off below 2^-23 of it (V100, the coarsest
//     known, has no extra bits), and cuts the sum off to 24 bits. With n >= 4 and P = sum |q'_d c'_d|
//     <= |q'| |c'| bounding every term and partial sum, a step loses at most (n + 3) 2^-23 P, the K/n
//     steps at most 7/4 K 2^-23 P < K 2^-22 P.
//   * INT8: the sums are exact (D <= 4096: 127^2 4096 < 2^31). Their conversion and the two scales
//     round three times: 3u. The rotation: a butterfly stage's outputs are off by u each, so L stages
//     by ((1+u)^L - 1) |x|, the scaling by two roundings more; L <= 12: less than 15u |x| per side.
//   * both: the canonical score's rounding u; fp64 sums less than 2^-40; the sums of squares under
//     norm and residual, which are raised by 2^-10 (their relative error is below (K + 8) u); and
//     the arithmetic of bound and cut themselves, below 16u.
//   So slack = K 2^-22 + 2^-19 for bf16, and 2^-18 = 64u for INT8.
// Underflow: squares below 2^-126 vanish. A row whose summed squares reach 2^-60 loses at most
// 2^-57 <= 2^-27 norm by that, which slack covers; below, norm = residual = amax sqrt(K) bounds both.
// Subnormals that a tensor core may flush cost at most 2^-126 sqrt(K) |other row|: kFlushed is added
// to each residual. kTiny covers underflow of the products themselves.
// Overflow: norms are finite, but where |q| |c| nears FLT_MAX a screen's sums may be infinite or NaN:
// the bound is then infinite, and comparisons are written so that NaN admits.
//
// What bounds each kernel, by arithmetic (nothing is measured): D = 768, an H100 or H200 (132
// processors, 1.755 GHz, 4096 bf16 FLOP per processor and cycle, twice that for INT8).
//   screen   Per tile of 128 queries x 256 rows, in cycles of one processor:
//                                                  bf16    INT8
//              tensor cores, 2 x 128 x 256 x 768  12,288   6,144
//              steps of 48 KB from L2               12       6     48 bytes per cycle in both
//              looking through the sums               350     900   issue slots of each scheduler
//            The tensor cores bound it as long as L2 feeds them: 132 x 48 bytes are 11 TB/s at the full
//            rate, and if that is more than it gives, a cluster of two blocks that shares the bank's
//            part (32 bytes per cycle) is what to try first. The sums of one warpgroup are looked
//            through while the other multiplies; INT8 leaves 5,200 cycles for 900 slots, so it hides.
//            Device memory: a row is read once per block of up to 8192 queries; 256 rows take 192 KB
//            (INT8) or 384 KB (bf16), over query tiles x 6,144 or 12,288 / 132 cycles. From 4 query
//            tiles (512 queries) on that is less than 2 TB/s; for fewer, device memory bounds it.
//   pack     A warp per row. INT8: 1,220 instructions (sm_90a, bf16 rows; 24 values per lane: loading 140,
//            rotating 590, 120 of them shuffles, rounding 240, maxima and sums 100), so 305 cycles of
//            4 schedulers, 1.3 ns per row on 132 processors; its bytes (2,304 from bf16, 3,840 from
//            fp32) take 0.8 or 1.3 ns at 3 TB/s. bf16: 460 instructions, 0.5 ns; norms of bf16 rows
//            in place read 1,536 bytes, 0.5 ns. Fewer instructions help INT8, nothing else.
//   refine   A block per query: latency of a few thousand cycles, 16 blocks per processor. An fp64
//            score is 768 multiply-adds by 16 lanes; about k + 50 rows of a chunk get one.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#if defined(PYMCIP_CUDA_EMULATOR)
#include "cuda_emulator.hpp"
#else
#include "topk_cuda_ptx.cuh"
#endif

namespace pymcip::cuda {

enum class Screen { bf16, int8 };
enum class Type { float32, float16, bfloat16 };

constexpr int kTileQueries = 128;   // of one block's tile; the bank's side has 128 or 256 rows
constexpr int kGroupRows = 128;     // bank rows that share the maxima of their norms and residuals
constexpr int kStepBytes = 128;     // of a row, per stage of the pipelines: the width of the swizzle
constexpr int kPackThreads = 128;
constexpr int kRefineThreads = 128;
constexpr unsigned kAllLanes = 0xffffffffu;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kTiny = 1e-30f;
constexpr float kRounding = 1.0f / (1 << 20);
constexpr float kRaise = 1.0f + 1.0f / 1024;                  // of norms and residuals
constexpr float kFlushed = 1.0f / (1ull << 59) / (1ull << 59);  // 2^-118
constexpr float kSmallSquares = 1.0f / (1ull << 60);          // 2^-60
constexpr float kNearOverflow = 1e37f;
constexpr float kShift = 3 << 22;  // floats from here on are integers

// What packing leaves of a row besides its elements.
struct alignas(16) Row {
    float norm;
    float residual;
    float scale;  // x' = scale * integers (INT8); 1 otherwise
    float unused;
};

// The inputs as they are. Strides in elements.
struct Source {
    const void* data;
    Type type;
    std::int64_t row_stride;
    std::int64_t column_stride;
};

struct Candidate {
    float score;       // the screen's
    std::uint32_t row;  // of the chunk
};

// --------------------------------------------------------------------------------------------------
// Elements

__device__ __forceinline__ float bits_to_float(std::uint32_t bits) {
    return __uint_as_float(bits);
}

template <Type type>
struct Element;
template <>
struct Element<Type::float32> {
    using Stored = float;
    static __device__ __forceinline__ float widen(float x) { return x; }
};
template <>
struct Element<Type::float16> {
    using Stored = std::uint16_t;
    static __device__ __forceinline__ float widen(std::uint16_t x) { return half_to_float(x); }
};
template <>
struct Element<Type::bfloat16> {
    using Stored = std::uint16_t;
    static __device__ __forceinline__ float widen(std::uint16_t x) {
        return bits_to_float(static_cast<std::uint32_t>(x) << 16);
    }
};

template <class T>
struct alignas(4 * sizeof(T)) Four {
    T x[4];
};

constexpr int kPart = 128;  // places of a row of which each lane of a warp has four neighbours

// A warp's row: places kPart j + 4 lane + i in x[j][i], zeros from D on.
template <Type type, int most>
__device__ __forceinline__ void load_row(const Source& source, std::int64_t row, int D,
                                         float (&x)[most][4]) {
    using Stored = typename Element<type>::Stored;
    const Stored* start = static_cast<const Stored*>(source.data) + row * source.row_stride;
    const int first = 4 * (threadIdx.x % 32);
    const bool in_fours = source.column_stride == 1 && source.row_stride % 4 == 0 && D % 4 == 0 &&
                          reinterpret_cast<std::uintptr_t>(source.data) % sizeof(Four<Stored>) == 0;
    if (in_fours) {
        Four<Stored> fours[most];
#pragma unroll
        for (int j = 0; j < most; ++j) {  // all on their way before the first is used
            fours[j] = {};
            if (const int d = kPart * j + first; d < D)
                fours[j] = *reinterpret_cast<const Four<Stored>*>(start + d);
        }
#pragma unroll
        for (int j = 0; j < most; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) x[j][i] = Element<type>::widen(fours[j].x[i]);
    } else {
        const Stored* place = start + first * source.column_stride;
#pragma unroll
        for (int j = 0; j < most; ++j) {
#pragma unroll
            for (int i = 0; i < 4; ++i)
                x[j][i] = kPart * j + first + i < D
                              ? Element<type>::widen(place[i * source.column_stride])
                              : 0.0f;
            place += kPart * source.column_stride;
        }
    }
}

template <int most>
__device__ __forceinline__ void load_row(const Source& source, std::int64_t row, int D,
                                         float (&x)[most][4]) {
    switch (source.type) {
        case Type::float32:
            return load_row<Type::float32>(source, row, D, x);
        case Type::float16:
            return load_row<Type::float16>(source, row, D, x);
        default:
            return load_row<Type::bfloat16>(source, row, D, x);
    }
}

// Round to nearest even; x is finite and far from overflow.
__device__ __forceinline__ std::uint16_t to_bf16(float x) {
    const std::uint32_t bits = __float_as_uint(x);
    return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int w = 16; w > 0; w /= 2) x += __shfl_xor_sync(kAllLanes, x, w);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int w = 16; w > 0; w /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, w));
    return x;
}

// --------------------------------------------------------------------------------------------------
// Packing: rows of `row_bytes` (a multiple of kStepBytes), zero from element D on.

struct PackProblem {
    Source source;
    int rows;
    int D;
    int row_bytes;
    void* packed;  // null: only the norms are wanted, the source itself is screened
    Row* meta;
    float* group_norm;  // start as zeros, or are null
    float* group_residual;
    unsigned long long* unrankable;  // the lowest number of a row whose squared norm isn't finite
    std::int64_t first;              // number of row 0
};

// *most = max(*most, x); neither is negative, so that they compare as integers. A look before saves
// nearly all of the atomics; what it sees may be old, but never too large.
__device__ __forceinline__ void raise_to(float* most, float x) {
    if (!(x <= *most)) atomicMax(reinterpret_cast<int*>(most), __float_as_int(x));
}

__device__ __forceinline__ void store_row(const PackProblem& p, int row, int depth, float squares,
                                          float amax, float residual_squares, float scale) {
    if (!(squares < kInfinity))
        atomicMin(p.unrankable, static_cast<unsigned long long>(p.first + row));
    float norm, residual;
    if (squares >= kSmallSquares) {
        residual = sqrtf(residual_squares) * kRaise;
        norm = (sqrtf(squares) + residual) * kRaise;  // |x'| <= |x| + |x - x'|
    } else {
        norm = residual = amax * sqrtf(static_cast<float>(depth)) * (2.0f * kRaise);
    }
    residual += kFlushed;
    p.meta[row] = {norm, residual, scale, 0.0f};
    if (p.group_norm) {
        raise_to(p.group_norm + row / kGroupRows, norm);
        raise_to(p.group_residual + row / kGroupRows, residual);
    }
}

// The random signs of the rotation for places 8 unit to 8 unit + 7, a bit each: a fixed hash.
__device__ __forceinline__ std::uint32_t random_signs(int unit) {
    std::uint32_t x = static_cast<std::uint32_t>(unit) * 0x9e3779b9u + 0x7f4a7c15u;
    x = (x ^ (x >> 16)) * 0x85ebca6bu;
    x = (x ^ (x >> 13)) * 0xc2b2ae35u;
    return x >> 16;
}

// 2^(-exponent / 2), rounded once.
__device__ __forceinline__ float inverse_root(int exponent) {
    const float power = bits_to_float(static_cast<std::uint32_t>(127 - exponent / 2) << 23);
    return exponent % 2 ? power * 0.70710678118654752f : power;
}

__device__ __forceinline__ void butterfly(float& a, float& b) {
    const float sum = a + b;
    b = a - b;
    a = sum;
}

// Random signs, then Walsh-Hadamard transforms of blocks, the largest powers of two that fit one after
// the other: strides 1 and 2 are within a lane, 4 to 64 between lanes, and from kPart on within a lane
// again. All blocks of at least 2h parts together are the first parts / 2h * 2h parts.
template <int most>
__device__ __forceinline__ void rotate(float (&x)[most][4], int parts) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < most; ++j) {
        if (j >= parts) continue;
        const std::uint32_t signs = random_signs(kPart / 8 * j + lane / 2) >> lane % 2 * 4;
#pragma unroll
        for (int i = 0; i < 4; ++i)
            x[j][i] = bits_to_float(__float_as_uint(x[j][i]) ^ (signs << (31 - i) & 0x80000000u));
        butterfly(x[j][0], x[j][1]);
        butterfly(x[j][2], x[j][3]);
        butterfly(x[j][0], x[j][2]);
        butterfly(x[j][1], x[j][3]);
#pragma unroll
        for (int w = 1; w < 32; w *= 2) {
            const float sign = lane & w ? -1.0f : 1.0f;
#pragma unroll
            for (int i = 0; i < 4; ++i)
                x[j][i] = fmaf(sign, x[j][i], __shfl_xor_sync(kAllLanes, x[j][i], w));
        }
        hold(x[j]);  // one part after the other, which saves registers
    }
#pragma unroll
    for (int h = 1; h < most; h *= 2)
#pragma unroll
        for (int j = 0; j < most; ++j) {
            if ((j & h) != 0 || j >= parts / (2 * h) * (2 * h)) continue;
#pragma unroll
            for (int i = 0; i < 4; ++i) butterfly(x[j][i], x[j + h][i]);
        }
#pragma unroll
    for (int j = 0; j < most; ++j) {
        int exponent = 7;  // of the block's length
#pragma unroll
        for (int h = 1; h < most; h *= 2) exponent += j < parts / (2 * h) * (2 * h);
#pragma unroll
        for (int i = 0; i < 4; ++i) x[j][i] *= inverse_root(exponent);
    }
}

// A warp per row: bf16 as it is, or INT8 rotated, integers in -127 .. 127 of one scale.
template <Screen screen, int most>
__global__ __launch_bounds__(kPackThreads, most <= 8 ? 6 : 2) void pack(const PackProblem p) {
    const int lane = threadIdx.x % 32;
    const int warps = kPackThreads / 32;
    const int depth = screen == Screen::bf16 ? p.row_bytes / 2 : p.row_bytes;
    for (int row = blockIdx.x * warps + threadIdx.x / 32; row < p.rows; row += gridDim.x * warps) {
        float x[most][4];
        load_row(p.source, row, p.D, x);
        float squares = 0.0f, amax = 0.0f;
#pragma unroll
        for (int j = 0; j < most; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) squares += x[j][i] * x[j][i];
        if constexpr (screen == Screen::int8) rotate(x, depth / kPart);
#pragma unroll
        for (int j = 0; j < most; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) amax = fmaxf(amax, fabsf(x[j][i]));
        squares = warp_sum(squares);
        amax = warp_max(amax);

        // Rows of (nearly) nothing become zeros in INT8; their residual is their norm.
        const bool some = screen == Screen::int8 && !(amax < 1e-30f);
        const float scale = some ? amax / 127.0f : 1.0f;
        const float inverse = some ? 127.0f / amax : 0.0f;
        float residual_squares = 0.0f;
        using Code = std::conditional_t<screen == Screen::bf16, std::uint16_t, std::int8_t>;
        Code* out = p.packed ? static_cast<Code*>(p.packed) + std::int64_t{row} * depth : nullptr;
#pragma unroll
        for (int j = 0; j < most; ++j) {
            const int d = kPart * j + 4 * lane;
            if (d >= depth) continue;
            Four<Code> four;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float rest;  // x - x': exact for bf16, rounded once for INT8
                if constexpr (screen == Screen::bf16) {
                    four.x[i] = to_bf16(x[j][i]);
                    rest = x[j][i] - Element<Type::bfloat16>::widen(four.x[i]);
                } else {
                    // Rounds to the nearest integer and leaves it in the low bits; |x| <= amax.
                    const float shifted = fmaf(x[j][i], inverse, kShift);
                    four.x[i] = static_cast<std::int8_t>(__float_as_uint(shifted));
                    rest = fmaf(-scale, shifted - kShift, x[j][i]);
                }
                residual_squares += rest * rest;
            }
            if (out) *reinterpret_cast<Four<Code>*>(out + d) = four;
        }
        residual_squares = warp_sum(residual_squares);
        if (lane == 0) store_row(p, row, depth, squares, amax, residual_squares, scale);
    }
}

// --------------------------------------------------------------------------------------------------
// The screen: products of a tile of queries with a tile of bank rows, of which only those that reach
// their query's cut leave the registers.

struct ScreenProblem {
    int queries;
    int bank_rows;
    int steps;  // of kStepBytes
    const char* query_data;  // packed rows (mma.sync; the Hopper kernel has tensor maps)
    const char* bank_data;
    std::int64_t query_stride;  // bytes
    std::int64_t bank_stride;
    int row_bytes;  // that hold elements; the rest of the last step counts as zeros
    const Row* query_meta;
    const Row* bank_meta;
    const float* group_norm;  // of bank_rows / kGroupRows groups, rounded up
    const float* group_residual;
    const float* cuts;
    const std::uint8_t* only;          // queries to screen; null: all
    const std::uint8_t* active_tiles;  // tiles of queries with one of these; null: all
    unsigned* counts;  // of admitted rows per query; may pass `capacity`, candidates may not
    Candidate* candidates;
    int capacity;
    int first_row;    // of bank_data in the chunk
    int certified;    // 0: the screen's scores are compared as they are
    float slack;
};

__device__ __forceinline__ float bound(const ScreenProblem& p, const Row& query, float norm,
                                       float residual) {
    if (!p.certified) return 0.0f;
    if (!(query.norm * norm < kNearOverflow)) return kInfinity;
    return query.residual * norm + query.norm * (residual + p.slack * norm) + kTiny;
}

__device__ __forceinline__ float cut_of(const ScreenProblem& p, int query) {
    if (query >= p.queries || (p.only && !p.only[query])) return kInfinity;
    return p.cuts[query];
}

// What a product must reach, in the unit of the sums, whichever row of a group it belongs to. Made in
// two parts, so that what is loaded arrives during the products.
struct Level {
    float cut;
    Row row;

    __device__ __forceinline__ Level(const ScreenProblem& p, int query) {
        const int inside = min(query, p.queries - 1);
        const float stored = p.cuts[inside];
        row = p.query_meta[inside];
        cut = stored;
        if (query != inside || (p.only && !p.only[inside])) cut = kInfinity;
    }

    __device__ __forceinline__ float of(const ScreenProblem& p, float norm, float residual) const {
        if (cut == kInfinity) return kInfinity;
        // Uncertified scores are compared exactly when hits are flushed; here, rounding must not drop any.
        const float off = p.certified ? bound(p, row, norm, residual) : fabsf(cut) * kRounding;
        return (cut - off) / row.scale;
    }
};

// A warp's admitted products on their way from registers to the candidates of their queries: one
// round of atomics for many.
constexpr int kHitsPerGroup = 32 * 8;
constexpr int kHits = 320;
struct Hit {
    float product;
    std::uint32_t place;  // query of the tile << 16 | row of the tile
};

__device__ __forceinline__ void flush(const ScreenProblem& p, int tile_query, int tile_row,
                                      const Hit* hits, int count) {
    const int lane = threadIdx.x % 32;
    __syncwarp();
    for (int start = 0; start < count; start += 32) {
        bool keep = start + lane < count;
        const Hit hit = hits[keep ? start + lane : start];
        const int query = tile_query + static_cast<int>(hit.place >> 16);
        const int row = tile_row + static_cast<int>(hit.place & 0xffffu);
        float score = 0.0f;
        keep = keep && row < p.bank_rows;
        if (keep) {
            const float cut = cut_of(p, query);
            keep = cut != kInfinity;
            if (keep) {
                const Row query_row = p.query_meta[query], bank_row = p.bank_meta[row];
                score = hit.product * query_row.scale;
                keep = !(score < cut - bound(p, query_row, bank_row.norm, bank_row.residual));
            }
        }
        const unsigned same = __match_any_sync(kAllLanes, keep ? query : -1);
        const int leader = __ffs(static_cast<int>(same)) - 1;
        const int rank = __popc(same & ((1u << lane) - 1u));
        unsigned base = 0;
        if (keep && rank == 0)
            base = atomicAdd(p.counts + query, static_cast<unsigned>(__popc(same)));
        base = __shfl_sync(kAllLanes, base, leader);
        if (keep && base + rank < static_cast<unsigned>(p.capacity))
            p.candidates[static_cast<std::int64_t>(query) * p.capacity + base + rank] = {
                score, static_cast<std::uint32_t>(p.first_row + row)};
    }
    __syncwarp();
}

// Fragments of 16 queries x 8 columns rows: sums[f][4i + 2h + e] belongs to query `query` + 16f + 8h +
// lane / 4 of the tile and row `row` + 8i + 2 (lane % 4) + e of the tile, and must reach levels[f][h].
// Where the hits run over, the rest waits until they have been flushed: there is one copy of that code.
template <Screen screen, int fragments, int columns, class Sum>
__device__ __forceinline__ void admit(const ScreenProblem& p,
                                      Sum (&sums)[fragments][4 * columns], int query, int row,
                                      const float* scales, const float (&levels)[fragments][2],
                                      int tile_query, int tile_row, Hit* hits) {
    constexpr int groups = fragments * columns / 2;
    const int lane = threadIdx.x % 32;
    const unsigned before = (1u << lane) - 1u;
    const float* own_scales = scales + row + 2 * (lane % 4);
    int place[1] = {(query + lane / 4) << 16 | (row + 2 * (lane % 4))};  // of the thread's first sum
    int next = 0;
    do {
        const int first = next;
        int count = 0;
        next = groups;
#pragma unroll
        for (int f = 0; f < fragments; ++f) hold(sums[f]);
        hold(place);
#pragma unroll
        for (int group = 0; group < groups; ++group) {
            const int f = group / (columns / 2), i = group % (columns / 2) * 2;
            float x[8];
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                x[j] = static_cast<float>(sums[f][4 * i + j]);
                if constexpr (screen == Screen::int8)
                    x[j] *= own_scales[8 * (i + j / 4) + j % 2];
            }
            // fmaxf drops a NaN beside a number, but where there can be NaNs levels are -inf (see
            // bound) and the number passes.
            const float most_0 = fmaxf(fmaxf(x[0], x[1]), fmaxf(x[4], x[5]));
            const float most_1 = fmaxf(fmaxf(x[2], x[3]), fmaxf(x[6], x[7]));
            if (!__any_sync(kAllLanes, !(most_0 < levels[f][0]) || !(most_1 < levels[f][1])))
                continue;
            if (group < first || group >= next) continue;
            if (count > kHits - kHitsPerGroup) {
                next = group;
                continue;
            }
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const bool hit = !(x[j] < levels[f][j / 2 % 2]);
                const unsigned all = __ballot_sync(kAllLanes, hit);
                if (hit) {
                    const int further = (16 * f + j / 2 % 2 * 8) << 16 | (8 * (i + j / 4) + j % 2);
                    hits[count + __popc(all & before)] = {
                        x[j], static_cast<std::uint32_t>(place[0] + further)};
                }
                count += __popc(all);
            }
        }
        flush(p, tile_query, tile_row, hits, count);
    } while (next < groups);
}

template <Screen screen>
struct SumOf {
    using type = float;
};
template <>
struct SumOf<Screen::int8> {
    using type = int;
};

// --------------------------------------------------------------------------------------------------
// ... with mma.sync, for sm_80 and up: 8 warps, each 64 queries x (tile_rows / 4) bank rows of a tile
// of 128 x tile_rows, `stages` stages of cp.async, rows of 128 bytes whose 16-byte chunks are
// exchanged by (row % 8), so that neither copies nor ldmatrix meet bank conflicts.

template <int tile_rows>
struct MmaShape {
    static constexpr int threads = 256;
    static constexpr int stages = 3;
    static constexpr int stage_bytes = (kTileQueries + tile_rows) * kStepBytes;
    // The hits reuse the stages.
    static constexpr int shared_bytes = stages * stage_bytes + tile_rows * 4;
    static_assert(stages * stage_bytes >= threads / 32 * kHits * static_cast<int>(sizeof(Hit)));
};
// What a block gets where it gets least: sm_86, sm_89, sm_120.
static_assert(MmaShape<128>::shared_bytes <= 99 * 1024);

template <Screen screen, int tile_rows>
__global__ __launch_bounds__(256) void screen_mma(const ScreenProblem p) {
    using Shape = MmaShape<tile_rows>;
    using Sum = typename SumOf<screen>::type;
    constexpr int warp_rows = tile_rows / 4;
    constexpr int column_count = warp_rows / 8;
    char* shared = dynamic_shared();
    const std::uint32_t base = shared_address(shared);
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int query_tiles = (p.queries + kTileQueries - 1) / kTileQueries;
    // Neighbouring blocks share the bank's rows: these are read from device memory once.
    const int query_tile = blockIdx.x % query_tiles, bank_tile = blockIdx.x / query_tiles;
    if (p.active_tiles && !p.active_tiles[query_tile]) return;
    const int tile_query = query_tile * kTileQueries, tile_row = bank_tile * tile_rows;

    const auto copy_stage = [&](int step) {
        if (step < p.steps) {
            const std::uint32_t stage = base + step % Shape::stages * Shape::stage_bytes;
            const int chunk = thread % 8;
            const int column = step * kStepBytes + chunk * 16;
            const int bytes = min(max(p.row_bytes - column, 0), 16);
#pragma unroll
            for (int part = 0; part < (kTileQueries + tile_rows) / 32; ++part) {
                const int line = part * 32 + thread / 8;
                const bool is_query = part < kTileQueries / 32;
                const int row = is_query ? tile_query + line : tile_row + line - kTileQueries;
                const bool inside = row < (is_query ? p.queries : p.bank_rows) && bytes > 0;
                const char* from = is_query ? p.query_data + row * p.query_stride
                                            : p.bank_data + row * p.bank_stride;
                cp_async_16(stage + line * kStepBytes + ((chunk ^ (line % 8)) * 16),
                            inside ? from + column : p.query_data, inside ? bytes : 0);
            }
        }
        cp_async_commit();  // empty groups keep the count
    };

    Sum sums[4][4 * column_count];
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
        for (int n = 0; n < 4 * column_count; ++n) sums[m][n] = 0;

    const int warp_query = warp / 4 * 64, warp_row = warp % 4 * warp_rows;
    for (int step = 0; step < Shape::stages - 1; ++step) copy_stage(step);
    for (int step = 0; step < p.steps; ++step) {
        cp_async_wait<Shape::stages - 2>();
        __syncthreads();
        copy_stage(step + Shape::stages - 1);  // into the stage all threads are done with
        const std::uint32_t stage = base + step % Shape::stages * Shape::stage_bytes;
#pragma unroll
        for (int k = 0; k < kStepBytes / 32; ++k) {
            std::uint32_t a[4][4];
#pragma unroll
            for (int m = 0; m < 4; ++m) {
                const int line = warp_query + 16 * m + lane % 16, chunk = 2 * k + lane / 16;
                ldmatrix_x4(a[m], stage + line * kStepBytes + ((chunk ^ (line % 8)) * 16));
            }
#pragma unroll
            for (int n = 0; n < column_count; n += 2) {
                const int line = kTileQueries + warp_row + 8 * n + lane / 16 * 8 + lane % 8;
                const int chunk = 2 * k + lane / 8 % 2;
                std::uint32_t b[4];
                ldmatrix_x4(b, stage + line * kStepBytes + ((chunk ^ (line % 8)) * 16));
#pragma unroll
                for (int m = 0; m < 4; ++m) {
                    mma(sums[m] + 4 * n, a[m], b[0], b[1]);
                    mma(sums[m] + 4 * n + 4, a[m], b[2], b[3]);
                }
            }
        }
    }
    cp_async_wait<0>();

    float* scales = reinterpret_cast<float*>(shared + Shape::stages * Shape::stage_bytes);
    if constexpr (screen == Screen::int8)
        if (thread < tile_rows)
            scales[thread] =
                tile_row + thread < p.bank_rows ? p.bank_meta[tile_row + thread].scale : 0.0f;
    __syncthreads();
    float norm = 0.0f, residual = 0.0f;
#pragma unroll
    for (int group = 0; group < tile_rows / kGroupRows; ++group) {
        const int index = tile_row / kGroupRows + group;
        if (index * kGroupRows < p.bank_rows) {
            norm = fmaxf(norm, p.group_norm[index]);
            residual = fmaxf(residual, p.group_residual[index]);
        }
    }
    float levels[4][2];
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half)
            levels[m][half] = Level(p, tile_query + warp_query + 16 * m + 8 * half + lane / 4)
                                  .of(p, norm, residual);
    admit<screen, 4, column_count>(p, sums, warp_query, warp_row, scales, levels, tile_query,
                                   tile_row, reinterpret_cast<Hit*>(shared) + warp * kHits);
}

// --------------------------------------------------------------------------------------------------
// ... on Hopper: persistent blocks of one warpgroup that copies (TMA) and two that multiply (wgmma),
// 64 queries x 256 bank rows each. The two share the stages but not their progress: the one that
// finishes a tile first looks through its sums while the other has the tensor cores, and keeps that
// lead, at most the depth of the pipeline, from then on.

struct HopperShape {
    static constexpr int threads = 384;
    static constexpr int tile_rows = 256;
    static constexpr int stages = 4;
    static constexpr int query_bytes = kTileQueries * kStepBytes;
    static constexpr int stage_bytes = query_bytes + tile_rows * kStepBytes;
    static constexpr int hits_offset = stages * stage_bytes;
    static constexpr int scales_offset = hits_offset + 8 * kHits * static_cast<int>(sizeof(Hit));
    static constexpr int barriers_offset = scales_offset + 2 * tile_rows * 4;
    static constexpr int shared_bytes = barriers_offset + 2 * stages * 8;
    static_assert(shared_bytes <= 227 * 1024);
};

// "Matrix Descriptor Format": K-major, 128-byte swizzle, 8 rows every 1024 bytes; the leading
// dimension's offset is not used by swizzled K-major layouts ("assumed to be 1"). The next 32 bytes
// of the rows are 2 further on in the descriptor's unit of 16: the swizzle is applied to addresses.
__device__ __forceinline__ std::uint64_t descriptor(std::uint32_t shared) {
    return std::uint64_t{(shared & 0x3ffffu) >> 4} | std::uint64_t{1} << 16 |
           std::uint64_t{1024 >> 4} << 32 | std::uint64_t{1} << 62;
}

template <Screen screen>
__global__ __launch_bounds__(HopperShape::threads, 1) void screen_hopper(
    const __grid_constant__ TensorMap query_map, const __grid_constant__ TensorMap bank_map,
    const __grid_constant__ ScreenProblem p) {
#if PYMCIP_HOPPER_CODE
    using Shape = HopperShape;
    using Sum = typename SumOf<screen>::type;
    char* shared = dynamic_shared();
    const std::uint32_t base = shared_address(shared);
    const std::uint32_t filled = base + Shape::barriers_offset;  // stage s: filled + 8 s
    const std::uint32_t emptied = filled + 8 * Shape::stages;
    const int group = threadIdx.x / 128;
    const int query_tiles = (p.queries + kTileQueries - 1) / kTileQueries;
    const int tiles =
        query_tiles * ((p.bank_rows + Shape::tile_rows - 1) / Shape::tile_rows);

    if (threadIdx.x == 0) {
        for (int stage = 0; stage < Shape::stages; ++stage) {
            mbarrier_init(filled + 8 * stage, 1);
            mbarrier_init(emptied + 8 * stage, 8);  // a thread of each multiplying warp
        }
        mbarrier_init_done();
        tma_prefetch_map(&query_map);
        tma_prefetch_map(&bank_map);
    }
    __syncthreads();

    unsigned step_count = 0;  // of all tiles so far: stage and parity follow from it
    if (group == 0) {
        lower_registers<40>();
        if (threadIdx.x == 0) {
            for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
                const int query_tile = tile % query_tiles, bank_tile = tile / query_tiles;
                if (p.active_tiles && !p.active_tiles[query_tile]) continue;
                for (int step = 0; step < p.steps; ++step, ++step_count) {
                    const unsigned stage = step_count % Shape::stages;
                    const std::uint32_t address = base + stage * Shape::stage_bytes;
                    mbarrier_wait(emptied + 8 * stage, step_count / Shape::stages % 2 ^ 1);
                    mbarrier_arrive_expect(filled + 8 * stage, Shape::stage_bytes);
                    tma_load(address, &query_map, filled + 8 * stage, step * kStepBytes,
                             query_tile * kTileQueries);
                    tma_load(address + Shape::query_bytes, &bank_map, filled + 8 * stage,
                             step * kStepBytes, bank_tile * Shape::tile_rows);
                }
            }
        }
    } else {
        raise_registers<232>();
        const int worker = group - 1;
        const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
        Hit* hits =
            reinterpret_cast<Hit*>(shared + Shape::hits_offset) + (4 * worker + warp) * kHits;
        float* scales =
            reinterpret_cast<float*>(shared + Shape::scales_offset) + worker * Shape::tile_rows;
        const int query = 64 * worker + 16 * warp;
        Sum sums[1][128];
        for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
            const int query_tile = tile % query_tiles, bank_tile = tile / query_tiles;
            if (p.active_tiles && !p.active_tiles[query_tile]) continue;
            const int tile_query = query_tile * kTileQueries;
            const int tile_row = bank_tile * Shape::tile_rows;

            // What the comparisons need is fetched before the products, which hide the latency.
            const Level low(p, tile_query + query + lane / 4);
            const Level high(p, tile_query + query + 8 + lane / 4);
            const int index = tile_row / kGroupRows;
            const int other = (index + 1) * kGroupRows < p.bank_rows ? index + 1 : index;
            const float norms[2] = {p.group_norm[index], p.group_norm[other]};
            const float residuals[2] = {p.group_residual[index], p.group_residual[other]};
            float own_scales[2] = {0.0f, 0.0f};
            if constexpr (screen == Screen::int8)
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    if (const int row = tile_row + 128 * half + threadIdx.x % 128;
                        row < p.bank_rows)
                        own_scales[half] = p.bank_meta[row].scale;

            for (int step = 0; step < p.steps; ++step, ++step_count) {
                const unsigned stage = step_count % Shape::stages;
                const std::uint32_t address = base + stage * Shape::stage_bytes;
                mbarrier_wait(filled + 8 * stage, step_count / Shape::stages % 2);
                const std::uint64_t a = descriptor(address + worker * 64 * kStepBytes);
                const std::uint64_t b = descriptor(address + Shape::query_bytes);
                hold(sums[0]);
                wgmma_begin();
#pragma unroll
                for (int k = 0; k < kStepBytes / 32; ++k)
                    wgmma(sums[0], a + 2 * k, b + 2 * k, step > 0 || k > 0);
                wgmma_commit();
                wgmma_wait<1>();  // the step before is done: its stage may be filled again
                hold(sums[0]);
                if (step > 0 && lane == 0)
                    mbarrier_arrive(emptied + 8 * ((step_count - 1) % Shape::stages));
            }
            wgmma_wait<0>();
            hold(sums[0]);
            if (lane == 0) mbarrier_arrive(emptied + 8 * ((step_count - 1) % Shape::stages));

            if constexpr (screen == Screen::int8) {
                named_barrier(1 + worker, 128);  // the scales of the last tile are done with
                scales[threadIdx.x % 128] = own_scales[0];
                scales[threadIdx.x % 128 + 128] = own_scales[1];
                named_barrier(1 + worker, 128);
            }
            const float norm = fmaxf(norms[0], norms[1]);
            const float residual = fmaxf(residuals[0], residuals[1]);
            const float levels[1][2] = {{low.of(p, norm, residual), high.of(p, norm, residual)}};
            admit<screen, 1, 32>(p, sums, query, 0, scales, levels, tile_query, tile_row, hits);
        }
    }
#endif
}

// --------------------------------------------------------------------------------------------------
// Refining: the admitted rows of a query get their canonical scores and join the query's best.

struct RefineProblem {
    Source queries;  // from the first query of the block on
    Source bank;     // from the first row of the chunk on
    int D;
    int k;
    int capacity;
    int certified;  // 0: the screen's scores are final
    float slack;
    const Row* query_meta;
    const Row* bank_meta;  // of the chunk
    unsigned* counts;      // back to zero afterwards
    const Candidate* candidates;
    float* cuts;
    int* filled;
    std::int64_t* ids;  // [queries, k], the best so far, sorted; the first `filled` of each row
    float* scores;
    std::int64_t first_id;      // of the chunk's first row
    unsigned* losses;          // how many queries lost candidates, and from losses + 1 on a byte for
                               // each query, which ones
};

constexpr int refine_shared_bytes(int capacity, int k, int D) {
    return capacity * 8 + k * 8 + k * 4 + capacity * 4 + D * 4;
}

// Greater floats have greater keys.
__device__ __forceinline__ std::uint32_t order_of(float x) {
    const std::uint32_t bits = __float_as_uint(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float from_order(std::uint32_t key) {
    return bits_to_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

__device__ __forceinline__ int block_sum(int x, int* scratch) {
#pragma unroll
    for (int w = 16; w > 0; w /= 2) x += __shfl_xor_sync(kAllLanes, x, w);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    int total = 0;
    for (int w = 0; w < kRefineThreads / 32; ++w) total += scratch[w];
    __syncthreads();
    return total;
}

// The score as topk's contract defines it, in lane 0 of each half of the warp: lane l of 16 adds up the
// (exact) products of the places d with d % 16 == l in order, then the upper halves join the lower.
template <Type type>
__device__ __forceinline__ float canonical_score(const float* query, const Source& bank,
                                                 std::int64_t row, int D) {
    using Stored = typename Element<type>::Stored;
    const Stored* start = static_cast<const Stored*>(bank.data) + row * bank.row_stride;
    const int lane = threadIdx.x % 16;
    double sum = 0.0;
#pragma unroll 8
    for (int d = lane; d < D; d += 16)
        sum += static_cast<double>(query[d]) *
               static_cast<double>(Element<type>::widen(start[d * bank.column_stride]));
#pragma unroll
    for (int w = 8; w > 0; w /= 2) sum += __shfl_down_sync(kAllLanes, sum, w, 16);
    return static_cast<float>(sum) + 0.0f;  // -0 becomes +0
}

__device__ __forceinline__ float canonical_score(Type type, const float* query, const Source& bank,
                                                 std::int64_t row, int D) {
    switch (type) {
        case Type::float32:
            return canonical_score<Type::float32>(query, bank, row, D);
        case Type::float16:
            return canonical_score<Type::float16>(query, bank, row, D);
        default:
            return canonical_score<Type::bfloat16>(query, bank, row, D);
    }
}

__device__ __forceinline__ float element(const Source& source, std::int64_t row, int d) {
    const std::int64_t place = row * source.row_stride + d * source.column_stride;
    switch (source.type) {
        case Type::float32:
            return static_cast<const float*>(source.data)[place];
        case Type::float16:
            return half_to_float(static_cast<const std::uint16_t*>(source.data)[place]);
        default:
            return Element<Type::bfloat16>::widen(
                static_cast<const std::uint16_t*>(source.data)[place]);
    }
}

// How many of the sorted best come before (score, id), and whether it is one of them itself.
__device__ __forceinline__ int best_before(const float* scores, const std::int64_t* ids, int count,
                                           float score, std::int64_t id, bool& found) {
    int low = 0, high = count;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (scores[middle] > score || (scores[middle] == score && ids[middle] < id))
            low = middle + 1;
        else
            high = middle;
    }
    found = low < count && scores[low] == score && ids[low] == id;
    return low;
}

// A block per query.
__global__ __launch_bounds__(kRefineThreads) void refine(const RefineProblem p) {
    const int query = blockIdx.x, thread = threadIdx.x;
    const unsigned admitted = p.counts[query];
    if (admitted == 0) return;
    const int count = static_cast<int>(min(admitted, static_cast<unsigned>(p.capacity)));
    const int filled = p.filled[query];
    const float cut = p.cuts[query];
    const Row query_row = p.query_meta[query];
    const Candidate* candidates =
        p.candidates + static_cast<std::int64_t>(query) * p.capacity;
    std::int64_t* ids = p.ids + static_cast<std::int64_t>(query) * p.k;
    float* scores = p.scores + static_cast<std::int64_t>(query) * p.k;

    // The survivors: score order << 32 | ~row, zero for one that was dropped; greatest first.
    std::uint64_t* keys = reinterpret_cast<std::uint64_t*>(dynamic_shared());
    std::int64_t* best_ids = reinterpret_cast<std::int64_t*>(keys + p.capacity);
    float* best_scores = reinterpret_cast<float*>(best_ids + p.k);
    float* lows = best_scores + p.k;  // certified: the lowest a candidate's score can be
    float* query_values = lows + p.capacity;
    __shared__ int scratch[kRefineThreads / 32];
    __shared__ int survivors;

    for (int i = thread; i < filled; i += kRefineThreads) {
        best_ids[i] = ids[i];
        best_scores[i] = scores[i];
    }
    for (int d = thread; d < p.D; d += kRefineThreads)
        query_values[d] = element(p.queries, query, d);
    const auto radius = [&](int i) {
        if (!p.certified) return 0.0f;
        const Row row = p.bank_meta[candidates[i].row];
        if (!(query_row.norm * row.norm < kNearOverflow)) return kInfinity;
        return query_row.residual * row.norm +
               query_row.norm * (row.residual + p.slack * row.norm) + kTiny;
    };
    for (int i = thread; i < count; i += kRefineThreads) {
        const float low = candidates[i].score - radius(i);
        lows[i] = low == low ? low : -kInfinity;
    }
    if (thread == 0) survivors = 0;
    __syncthreads();

    // k of the candidates score at least the k-th largest of their lower bounds. (The best so far
    // are left out of it: a row screened twice must not count twice.)
    float floor = cut;
    if (count > p.k && count > 32) {
        std::uint32_t key = 0;
        for (int bit = 31; bit >= 0; --bit) {
            const std::uint32_t trial = key | 1u << bit;
            int reached = 0;
            for (int i = thread; i < count; i += kRefineThreads)
                reached += order_of(lows[i]) >= trial;
            if (block_sum(reached, scratch) >= p.k) key = trial;
        }
        floor = fmaxf(floor, from_order(key));
    }
    for (int i = thread; i < count; i += kRefineThreads)
        if (!(candidates[i].score + radius(i) < floor))
            keys[atomicAdd(&survivors, 1)] = static_cast<std::uint64_t>(i);
    __syncthreads();
    const int kept = survivors;

    const int half = thread / 16;
    for (int start = 0; start < kept; start += kRefineThreads / 16) {
        const int place = min(start + half, kept - 1);
        const Candidate candidate = candidates[keys[place]];
        const float score =
            p.certified ? canonical_score(p.bank.type, query_values, p.bank, candidate.row, p.D)
                        : candidate.score + 0.0f;
        __syncthreads();  // all have read their keys
        if (thread % 16 == 0 && start + half < kept) {
            bool known;
            best_before(best_scores, best_ids, filled, score, p.first_id + candidate.row, known);
            keys[place] = score >= cut && !known
                              ? std::uint64_t{order_of(score)} << 32 | (0xffffffffu - candidate.row)
                              : 0;
        }
        __syncthreads();
    }
    int length = 1;  // bitonic sort wants a power of two; capacity is one
    while (length < kept) length *= 2;
    for (int i = kept + thread; i < length; i += kRefineThreads) keys[i] = 0;
    for (int run = 2; run <= length; run *= 2)
        for (int h = run / 2; h > 0; h /= 2) {
            __syncthreads();
            for (int i = thread; i < length / 2; i += kRefineThreads) {
                const int low = i / h * 2 * h + i % h, high = low + h;
                const bool descending = (low & run) == 0;
                const std::uint64_t a = keys[low], b = keys[high];
                if ((a < b) == descending) {
                    keys[low] = b;
                    keys[high] = a;
                }
            }
        }
    __syncthreads();
    int nonzero = 0;
    for (int i = thread; i < kept; i += kRefineThreads) nonzero += keys[i] != 0;
    const int fresh = block_sum(nonzero, scratch);

    if (fresh > 0) {
        // Each entry's new place: its own rank among its kind and how many of the other kind precede.
        for (int i = thread; i < min(fresh, p.k); i += kRefineThreads) {
            const float score = from_order(static_cast<std::uint32_t>(keys[i] >> 32));
            const std::int64_t id =
                p.first_id + (0xffffffffu - static_cast<std::uint32_t>(keys[i]));
            bool known;
            const int place = i + best_before(best_scores, best_ids, filled, score, id, known);
            if (place < p.k) {
                ids[place] = id;
                scores[place] = score;
            }
        }
        for (int i = thread; i < filled; i += kRefineThreads) {
            const float score = best_scores[i];
            const std::int64_t id = best_ids[i];
            int low = 0, high = fresh;
            while (low < high) {
                const int middle = (low + high) / 2;
                const float other = from_order(static_cast<std::uint32_t>(keys[middle] >> 32));
                const std::int64_t other_id =
                    p.first_id + (0xffffffffu - static_cast<std::uint32_t>(keys[middle]));
                if (other > score || (other == score && other_id < id))
                    low = middle + 1;
                else
                    high = middle;
            }
            if (i + low < p.k) {
                ids[i + low] = id;
                scores[i + low] = score;
            }
        }
    }
    __syncthreads();
    if (thread == 0) {
        const int now = min(p.k, filled + fresh);
        p.filled[query] = now;
        if (now == p.k) p.cuts[query] = fmaxf(cut, scores[p.k - 1]);
        p.counts[query] = 0;
        if (admitted > static_cast<unsigned>(p.capacity)) {
            reinterpret_cast<std::uint8_t*>(p.losses + 1)[query] = 1;
            atomicAdd(p.losses, 1u);
        }
    }
}

// --------------------------------------------------------------------------------------------------
// Small ones

__global__ void start_search(int queries, int k, float threshold, float* cuts, int* filled,
                             unsigned* counts, std::int64_t* ids, float* scores) {
    const std::int64_t stride = std::int64_t{gridDim.x} * blockDim.x;
    for (std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
         i < std::int64_t{queries} * k; i += stride) {
        ids[i] = -1;
        scores[i] = -kInfinity;
        if (i < queries) {
            cuts[i] = threshold;
            filled[i] = 0;
            counts[i] = 0;
        }
    }
}

// A thread per tile of queries.
__global__ void mark_tiles(int queries, const std::uint8_t* only, std::uint8_t* active_tiles) {
    const int first = (blockIdx.x * blockDim.x + threadIdx.x) * kTileQueries;
    if (first >= queries) return;
    std::uint8_t any = 0;
    for (int query = first; query < min(first + kTileQueries, queries); ++query)
        any |= only[query];
    active_tiles[first / kTileQueries] = any;
}

}  // namespace pymcip::cuda
