// What every instruction set's translation unit of top-k compiles for itself; see topk_kernel.hpp.
// `Lanes` floats make a vector of that set; results don't depend on it.
#pragma once

#include "topk_kernel.hpp"

namespace pymcip {

// Bit 31 set where the rotation's first and second transform turn a column's sign.
struct RotationSigns {
    uint32_t bits[2][4096];
};
extern const RotationSigns kRotationSigns;

namespace {

#define PYMCIP_INLINE __attribute__((always_inline)) inline

constexpr float kSafety = 1.0f + 1.0f / 16384;      // 1 + 2^-14
constexpr float kRoundings = 1.0f / 131072;         // 2^-17
constexpr float kTiny = 1.0f / (1ull << 60);        // rows below it are not rounded, but bounded
constexpr float kTinyBfloat = 1.0f / (1 << 30);     // the same for bfloats
constexpr float kMostBfloats = 1.2676506e30f;       // 2^100: squared norm of rows of bfloats, at most
constexpr float kMagic = 12582912.0f;               // 1.5 * 2^23: adding it rounds to integers
constexpr float kMostScore = 1073741824.0f;         // 2^30: no integer score reaches it

template <int Lanes>
struct Vectors {
    typedef float Float __attribute__((vector_size(Lanes * 4), may_alias, aligned(4)));
    typedef int32_t Int __attribute__((vector_size(Lanes * 4), may_alias, aligned(4)));
    typedef uint32_t Bits __attribute__((vector_size(Lanes * 4), may_alias, aligned(4)));
    typedef int8_t Codes __attribute__((vector_size(Lanes), may_alias, aligned(1)));
    typedef float HalfFloat __attribute__((vector_size(Lanes * 2), may_alias, aligned(4)));
    typedef double Double __attribute__((vector_size(Lanes * 4), may_alias, aligned(8)));
};

template <int Lanes>
PYMCIP_INLINE typename Vectors<Lanes>::Float& at(float* data) {
    return *reinterpret_cast<typename Vectors<Lanes>::Float*>(data);
}

template <class Vector>
PYMCIP_INLINE Vector load(const void* data) {
    Vector vector;
    __builtin_memcpy(&vector, data, sizeof vector);
    return vector;
}

// Sums of 16 lanes are halved in this order everywhere.
template <class Number>
PYMCIP_INLINE Number halve(Number* lanes) {
    for (int width = 8; width > 0; width /= 2)
        for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
    return lanes[0];
}

// A stage of a Walsh-Hadamard transform within a vector: lane i meets lane i ^ half.
template <int Lanes>
struct Butterfly {
    typename Vectors<Lanes>::Int partner;
    typename Vectors<Lanes>::Float sign;

    explicit PYMCIP_INLINE Butterfly(int half) {
        for (int lane = 0; lane < Lanes; ++lane) {
            partner[lane] = lane ^ half;
            sign[lane] = (lane & half) != 0 ? -1.0f : 1.0f;
        }
    }
    PYMCIP_INLINE void operator()(typename Vectors<Lanes>::Float& x) const {
        x = __builtin_shuffle(x, partner) + sign * x;
    }
};

// A stage between vectors.
template <int Lanes>
PYMCIP_INLINE void stage(float* x, int64_t size, int64_t half) {
    using Float = typename Vectors<Lanes>::Float;
    for (int64_t block = 0; block < size; block += 2 * half)
        for (int64_t i = block; i < block + half; i += Lanes) {
            Float &a = at<Lanes>(x + i), &b = at<Lanes>(x + i + half);
            const Float sum = a + b;
            b = a - b;
            a = sum;
        }
}

// The orthonormal Walsh-Hadamard transform of x[0 .. size - 1], size a power of two of at least 64.
template <int Lanes>
PYMCIP_INLINE void hadamard(float* x, int64_t size) {
    using Float = typename Vectors<Lanes>::Float;
    const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(size));
    const Butterfly<Lanes> one(1), two(2), four(4), eight(8);
    for (int64_t i = 0; i < size; i += Lanes) {
        Float value = at<Lanes>(x + i) * scale;
        one(value);
        two(value);
        if constexpr (Lanes > 4) four(value);
        if constexpr (Lanes > 8) eight(value);
        at<Lanes>(x + i) = value;
    }
    // The stages are those within 16 lanes first, then the others, from the widest: whatever the
    // vectors' size, so that all kernels round alike.
    for (int64_t half = Lanes; half < 16; half *= 2) stage<Lanes>(x, size, half);
    int64_t half = size / 2;
    for (; half / 2 >= 16; half /= 4) {  // two stages at a time
        const int64_t quarter = half / 2;
        for (int64_t block = 0; block < size; block += 2 * half)
            for (int64_t i = block; i < block + quarter; i += Lanes) {
                Float &a = at<Lanes>(x + i), &b = at<Lanes>(x + i + quarter),
                      &c = at<Lanes>(x + i + half), &d = at<Lanes>(x + i + half + quarter);
                const Float ac = a + c, bd = b + d, a_c = a - c, b_d = b - d;
                a = ac + bd;
                b = ac - bd;
                c = a_c + b_d;
                d = a_c - b_d;
            }
    }
    if (half >= 16) stage<Lanes>(x, size, half);
}

template <int Lanes>
PYMCIP_INLINE void turn_signs(float* x, int64_t size, const uint32_t* signs) {
    using Bits = typename Vectors<Lanes>::Bits;
    for (int64_t i = 0; i < size; i += Lanes)
        *reinterpret_cast<Bits*>(x + i) ^= load<Bits>(signs + i);
}

// Two transforms over the greatest power of two, of the first and of the last columns.
template <int Lanes>
PYMCIP_INLINE void rotate(float* x, int64_t width) {
    int64_t size = 64;
    while (2 * size <= width) size *= 2;
    turn_signs<Lanes>(x, width, kRotationSigns.bits[0]);
    hadamard<Lanes>(x, size);
    if (size == width) return;
    turn_signs<Lanes>(x, width, kRotationSigns.bits[1]);
    hadamard<Lanes>(x + width - size, size);
}

template <int Lanes>
PYMCIP_INLINE int encode_rows(float* rows, int count, int64_t columns, int64_t steps, int8_t* codes,
                              int32_t* sums, float* facts, float* norms) {
    using Float = typename Vectors<Lanes>::Float;
    using Int = typename Vectors<Lanes>::Int;
    constexpr int parts = 16 / Lanes;
    const int64_t width = steps * kStep;
    const float infinity = __builtin_inff();
    float largest = 0;
    for (int row = 0; row < count; ++row) {
        float* x = rows + row * width;
        for (int64_t i = columns; i < width; ++i) x[i] = 0;
        rotate<Lanes>(x, width);
        Float squares[parts] = {}, most[parts] = {};
        for (int64_t i = 0; i < width; i += 16)
            for (int part = 0; part < parts; ++part) {
                const Float value = at<Lanes>(x + i + part * Lanes);
                const Float size = value < 0 ? -value : value;
                squares[part] += value * value;
                most[part] = size > most[part] ? size : most[part];
            }
        float* lanes = reinterpret_cast<float*>(squares);
        const float square = halve(lanes);
        if (!(square < infinity)) return row;
        float greatest = 0;
        for (int lane = 0; lane < 16; ++lane) {
            const float value = reinterpret_cast<const float*>(most)[lane];
            greatest = value > greatest ? value : greatest;
        }
        largest = greatest > largest ? greatest : largest;
        norms[row] = (greatest < kTiny ? greatest * __builtin_sqrtf(static_cast<float>(width))
                                       : __builtin_sqrtf(square)) *
                     kSafety;
    }
    const bool tiny = largest < kTiny;
    const float scale = tiny ? 1.0f : largest / 127.0f;
    const float inverse = 1.0f / scale;
    float reach = 0, doubt = 0;
    for (int row = 0; row < count; ++row) {
        const float* x = rows + row * width;
        int8_t* out = codes + row * width;
        Float lost[parts] = {}, squares[parts] = {};  // the latter exact: at most 256 * 127^2 a lane
        Int total[parts] = {};
        for (int64_t i = 0; i < width; i += 16)
            for (int part = 0; part < parts; ++part) {
                const int64_t place = i + part * Lanes;
                const Float value = load<Float>(x + place) * inverse;
                const Float whole = (value + kMagic) - kMagic;
                const Float rest = value - whole;
                lost[part] += rest * rest;
                const Int code = __builtin_convertvector(whole, Int);
                total[part] += code;
                squares[part] += whole * whole;
                *reinterpret_cast<typename Vectors<Lanes>::Codes*>(out + place) =
                    __builtin_convertvector(code, typename Vectors<Lanes>::Codes);
            }
        sums[row] = halve(reinterpret_cast<int32_t*>(total));
        const float square = halve(reinterpret_cast<float*>(squares));
        const float residual = scale * __builtin_sqrtf(halve(reinterpret_cast<float*>(lost)));
        const float own_reach = scale * __builtin_sqrtf(square) * kSafety;
        const float own_doubt = tiny ? norms[row] * kSafety
                                     : residual * kSafety + kRoundings * norms[row];
        reach = own_reach > reach ? own_reach : reach;
        doubt = own_doubt > doubt ? own_doubt : doubt;
    }
    facts[kScale] = scale;
    facts[kInverseScale] = inverse;
    facts[kReach] = reach;
    facts[kDoubt] = doubt;
    return -1;
}

template <int Lanes>
PYMCIP_INLINE float exact_score(const float* query, const float* row, int64_t columns) {
    using Double = typename Vectors<Lanes>::Double;       // Lanes / 2 doubles
    using HalfFloat = typename Vectors<Lanes>::HalfFloat;  // Lanes / 2 floats
    constexpr int width = Lanes / 2, parts = 16 / width;
    Double sum[parts] = {};
    const int64_t whole = columns / 16 * 16;
    for (int64_t d = 0; d < whole; d += 16)
        for (int part = 0; part < parts; ++part)
            sum[part] +=
                __builtin_convertvector(load<HalfFloat>(query + d + part * width), Double) *
                __builtin_convertvector(load<HalfFloat>(row + d + part * width), Double);
    double* lanes = reinterpret_cast<double*>(sum);
    for (int64_t d = whole; d < columns; ++d)
        lanes[d - whole] += static_cast<double>(query[d]) * static_cast<double>(row[d]);
    return static_cast<float>(halve(lanes)) + 0.0f;
}

// The integer score that a query's must reach in a group, as a float that is an integer.
PYMCIP_INLINE float group_cut(const Screen& screen, int64_t query, const float* facts) {
    const float least = screen.cuts[query] - screen.residuals[query] * facts[kReach] -
                        screen.norms[query] * facts[kDoubt];
    const float scaled = least * facts[kInverseScale];
    return scaled >= kMostScore ? kMostScore : scaled > -kMostScore ? scaled : -kMostScore;
}

// A bound from below of the best score of a group's rows, in units of the query's scale.
PYMCIP_INLINE float lowest_best(const Screen& screen, int64_t query, const float* facts,
                                int32_t best) {
    return (static_cast<float>(best) - 1.0f) * facts[kScale] -
           screen.residuals[query] * facts[kReach] - screen.norms[query] * facts[kDoubt];
}

// Plain epilogue: what to do with the scores [kGroup, kPanel] of a group and a panel.
PYMCIP_INLINE void settle(const Screen& screen, int64_t panel, int64_t group, int64_t visit,
                          const int32_t* scores) {
    const float* facts = screen.groups + group * kGroupFacts;
    int32_t best[kPanel];
    for (int q = 0; q < kPanel; ++q) best[q] = scores[q];
    for (int row = 1; row < kGroup; ++row)
        for (int q = 0; q < kPanel; ++q) {
            const int32_t score = scores[row * kPanel + q];
            best[q] = score > best[q] ? score : best[q];
        }
    const int64_t first = panel * kPanel;
    if (screen.lowest != nullptr) {
        float* lowest = screen.lowest + visit * screen.panel_count * kPanel + first;
        for (int q = 0; q < kPanel; ++q)
            lowest[q] = lowest_best(screen, first + q, facts, best[q]);
        return;
    }
    int32_t cuts[kPanel];
    for (int q = 0; q < kPanel; ++q)
        cuts[q] = static_cast<int32_t>(__builtin_floorf(group_cut(screen, first + q, facts))) - 1;
    int32_t any = 0;
    for (int q = 0; q < kPanel; ++q) any |= best[q] >= cuts[q];
    if (any == 0) return;
    uint32_t admitted[kGroup];
    for (int row = 0; row < kGroup; ++row) {
        uint32_t bits = 0;
        for (int q = 0; q < kPanel; ++q)
            bits |= static_cast<uint32_t>(scores[row * kPanel + q] >= cuts[q]) << q;
        admitted[row] = bits;
    }
    screen.offer(screen.context, panel, group, admitted, scores);
}

PYMCIP_INLINE bool stopped(const Screen& screen) {
    return __atomic_load_n(screen.stop, __ATOMIC_RELAXED);
}

// A group's codes [2, steps, 16, 64] as rows of 16-bit integers.
PYMCIP_INLINE void widen_codes(const int8_t* codes, int64_t steps, int16_t* out) {
    for (int row = 0; row < kGroup; ++row)
        for (int64_t step = 0; step < steps; ++step) {
            const int8_t* from = codes + ((row / 16 * steps + step) * 16 + row % 16) * kStep;
            int16_t* to = out + (row * steps + step) * kStep;
            for (int i = 0; i < kStep; ++i) to[i] = from[i];
        }
}

PYMCIP_INLINE void widen_bfloats(const uint16_t* from, int64_t count, float* to) {
    uint32_t* bits = reinterpret_cast<uint32_t*>(to);
    for (int64_t i = 0; i < count; ++i) bits[i] = static_cast<uint32_t>(from[i]) << 16;
}

PYMCIP_INLINE void widen_halves(const uint16_t* from, int64_t count, float* to) {
    // Rebias the exponent by 112. A subnormal half lacks the implicit one: give it one, and
    // subtract it as a float, which is exact. Infinity and NaN get the greatest exponent.
    uint32_t* bits = reinterpret_cast<uint32_t*>(to);
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t half = from[i];
        const uint32_t magnitude = (half & 0x7fffu) << 13;
        const union {
            uint32_t bits;
            float value;
        } one{113u << 23}, shifted{magnitude + (113u << 23)};
        union {
            float value;
            uint32_t bits;
        } subnormal{shifted.value - one.value};
        const uint32_t normal =
            magnitude + ((half & 0x7c00u) == 0x7c00u ? 224u << 23 : 112u << 23);
        bits[i] = (half & 0x8000u) << 16 | ((half & 0x7c00u) != 0 ? normal : subnormal.bits);
    }
}

}  // namespace
}  // namespace pymcip
