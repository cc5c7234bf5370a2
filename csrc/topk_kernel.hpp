// What an instruction set provides to top-k. Each set has a translation unit of its own, compiled
// with its own flags; these units use nothing of the standard library, whose inline functions, once
// compiled for a newer instruction set, could be the copies that the linker keeps. All kernels give
// the same bits.
//
// Rounding. A row x, padded with zeros to a multiple of 64, is rotated (signs and Walsh-Hadamard
// transforms, which spread outliers over all columns; inner products stay) and rounded to
// x' = scale * codes, |codes| <= 127, with one scale for the 32 rows of a group of the bank, and one
// for each query. The codes' products are exact integers, and
//
//   |<q, c> - <q', c'>| <= |q - q'| |c'| + |q| |c - c'|
//
// Let u = 2^-24. The rotation is computed with an error of at most (2 log2(4096) + 4) u |x| = 28 u |x|
// (one u per stage of butterflies, two per scaling, two transforms); what rounding takes away is
// computed componentwise with an error of 2 u |x|; norms are sums of at most 256 squares per lane,
// good to 130 u (relative), and their square root. Turning a score into a float, dividing a cut by
// the query's scale and computing the cut of a group cost less than 12 u |q| |c|, for cuts up to
// |q| |c|: higher ones admit nothing, whatever their rounding. The exact score's own rounding costs
// u |q| |c|. Hence, with the norms as computed,
//
//   reach = max |c'| (1 + 2^-14)                         of the group's rows
//   doubt = max |c - c'| (1 + 2^-14) + 2^-17 |c|         2^-17 = 128 u > 28 + 2 + 12 + 1
//   residual of a query = |q - q'| (1 + 2^-14) + 2^-17 |q|
//
// a row whose exact score reaches a cut has an integer score of at least
//
//   (cut - residual * reach - |q| (1 + 2^-14) * doubt) / (query scale * group scale) - 1
//
// The 1 covers what underflows: scales are at least 2^-67 (rows below that keep codes of zero, scale
// one, and their largest entry times the root of D as their norm).
//
// A kernel of bfloat16 codes needs no rotation and no scales: x' = x rounded to bfloat16, and the
// scores are floats, sums in an order of the processor's choice. For them
//
//   doubt = max |c - c'| (1 + 2^-14) + (2^-17 + (columns + 8) 2^-23) |c|
//
// since a sum of n products in fp32 is off by at most n u / (1 - n u) |q'| |c'|, and |q'| |c'| is at
// most (1 + 2^-8)^2 |q| |c|. The processor takes subnormal numbers for zeros, which is less than
// 2^-17 |q| |c| if |q| and |c| are 2^-30 and more; rows below that keep codes of zero. So do rows of
// norms above 2^50: the sums of two such could overflow on their way.
#pragma once

#include <stdint.h>

namespace pymcip {

constexpr int kGroup = 32;    // rows of the bank that share a scale
constexpr int kPanel = 32;    // queries that are scored at once
constexpr int kStep = 64;     // bytes of a row: columns of 8-bit codes, twice the columns of bfloats
constexpr int kGroupFacts = 4;
enum { kScale, kInverseScale, kReach, kDoubt };

// A block of queries against groups first, first + stride, ... below last.
struct Screen {
    const int8_t* codes;  // of the bank, see topk.hpp
    const float* groups;
    const int32_t* sums;
    int64_t first, last, stride;
    int64_t steps;
    const uint8_t* panels;  // the queries, as `arrange` left them
    int64_t panel_count;
    // Per query (kPanel * panel_count of them), in units of its scale: what its score must reach,
    // its residual and its norm. They may change while `offer` runs.
    const float* cuts;
    const float* residuals;
    const float* norms;
    void* scratch;  // scratch_bytes(steps, panel_count) bytes, aligned to 64
    // Called for a group and a panel if some score may reach its query's cut. Bit q of admitted[r]:
    // query q and row r; scores[r][q], floats if the kernel's are.
    void* context;
    void (*offer)(void* context, int64_t panel, int64_t group, const uint32_t* admitted,
                  const int32_t* scores);
    // If not null, nothing is offered. Instead lowest[i][q] is a lower bound of the best score of
    // the i-th visited group for query q, in units of its scale.
    float* lowest;
    const bool* stop;  // looked at once per group
};

constexpr int64_t scratch_bytes(int64_t steps, int64_t panel_count) {
    const int64_t widened = kGroup * kStep * steps * 2, partial = panel_count * kGroup * kPanel * 4;
    return widened > partial ? widened : partial;
}

struct Kernel {
    const char* name;
    int64_t code_bytes;   // of a column: 1, or 2 for bfloats, whose scores are floats
    int64_t panel_bytes;  // per step
    // Rotates and rounds `count` <= kGroup rows of `columns` floats, which follow each other in `rows`
    // at a distance of kStep * steps floats and are overwritten. Writes row-major codes of
    // kStep * steps bytes each, sums [count] (8-bit codes), facts [kGroupFacts] (both scales 1
    // for bfloats), and norms [count] (1 + 2^-14 included). Returns the first row whose
    // squared norm is not finite, or -1.
    int (*encode)(float* rows, int count, int64_t columns, int64_t steps, int8_t* codes,
                  int32_t* sums, float* facts, float* norms);
    // Row-major codes of kPanel queries to the layout that `screen` reads.
    void (*arrange)(const int8_t* codes, int64_t steps, uint8_t* panel);
    void (*screen)(const Screen& screen);
    // The exact score; see topk.hpp.
    float (*score)(const float* query, const float* row, int64_t columns);
    // `count` contiguous halves or bfloats to floats.
    void (*widen_half)(const uint16_t* halves, int64_t count, float* out);
    void (*widen_bfloat)(const uint16_t* bfloats, int64_t count, float* out);
};

// Null where the compiler or the processor doesn't have it.
const Kernel* kernel_amx();
const Kernel* kernel_amx_bf16();
const Kernel* kernel_avx512_vnni();
const Kernel* kernel_avx2();
const Kernel* kernel_portable();

}  // namespace pymcip
