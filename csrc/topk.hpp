// Exact top-k of inner products, with a threshold, on the CPU.
//
// For a query row q and the bank rows c_0 .. c_{M-1}, all of length D, widened to fp32:
//
//   lane l of 16 = sum of q[d] * c_j[d] over d = l, l + 16, l + 32, ..., in this order, in fp64
//   lane l += lane l + w  for l < w,  for w = 8, 4, 2, 1
//   s(q, j) = lane 0, rounded to fp32, + 0.0f                    (-0 becomes +0)
//
// A product of two fp32 numbers is exact in fp64, so a fused multiply-add changes nothing: s(q, j)
// is the same to the bit on every machine. It is the inner product, rounded once, but for errors of
// 2^-53 |q| |c| D. The result is the first k of the pairs (s(q, j), j) with s(q, j) >= threshold,
// ordered by s descending, then by j ascending. Places that stay empty hold id -1 and score
// -infinity. It depends on neither kernel nor threads nor blocks.
//
// With `exact` false the scores are those of the screen (below) instead, in the same order.
//
// Shapes: ids int64 [N, k] and scores float [N, k], both contiguous; any N, M >= 0, D in
// 1 .. kMostColumns, k >= 1; rows and columns of the inputs may have any strides.
//
// How: bank and queries are rotated and rounded to 8 bits (topk_kernel.hpp). Integer products of
// these screen the bank; a bound on their error, from the norms of what the rounding took away,
// decides which rows could be among the best; only those are scored as above.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace pymcip {

constexpr std::int64_t kMostColumns = 4096;  // 127 * 127 * 4096 < 2^31

enum class Scalar { float32, float16, bfloat16 };

struct Matrix {
    const void* data;
    Scalar scalar;
    std::int64_t rows;
    std::int64_t columns;
    std::int64_t row_stride;  // in elements, like column_stride
    std::int64_t column_stride;
};

// The rounded form of a matrix, for G = ceil(rows / 32) groups of 32 rows and K = ceil(columns / 64)
// steps (twice as many for the kernel of bfloats); rows and columns beyond the matrix are zeros.
struct Packed {
    std::int8_t* codes;   // [G, 2, K, 16, 64]: row 32 g + 16 h + r, bytes 64 k .. 64 k + 63 of it
    float* groups;        // [G, 4]: scale, 1 / scale, reach, doubt; see topk_kernel.hpp
    std::int32_t* sums;   // [G, 32]: sum of a row's codes
};

// Rows of a bank, numbered on from part to part. `packed.codes` is null if they are to be packed
// when they are needed.
struct Part {
    Matrix rows;
    Packed packed;
};

// Called about ten times a second, from the thread that called, with the work done and to do (the
// unit is scores for topk_cpu, rows for topk_cpu_pack); returning false stops. It must not throw.
using Progress = std::function<bool(std::int64_t done, std::int64_t total)>;

struct Outcome {
    enum class Kind { complete, stopped, bad_query, bad_bank_row } kind;
    std::int64_t row;  // whose squared norm is not a finite float
};

// Kernels that this machine can run, of "amx", "avx512_vnni", "avx2", "portable", fastest first, and
// "amx_bf16", which rounds to bfloat16 instead of 8 bits: half as fast, with bounds six times tighter.
std::vector<std::string> topk_cpu_kernels();

// Unless the outcome is `complete`, the outputs are unspecified. `kernel` is one of
// topk_cpu_kernels().
Outcome topk_cpu(const Matrix& queries, const std::vector<Part>& bank, std::int64_t k,
                 float threshold, bool exact, int threads, const std::string& kernel,
                 std::int64_t* ids, float* scores, const Progress& progress);

// So many queries at least are served by one pass over the bank: more take several, each of which packs
// anew what is not packed.
std::int64_t topk_cpu_pass(std::int64_t columns, std::int64_t k);

Outcome topk_cpu_pack(const Matrix& rows, const Packed& packed, int threads,
                      const std::string& kernel, const Progress& progress);

// The exact s(q, j) for each id in ids [N, K]; -infinity where it is negative.
void topk_cpu_scores(const Matrix& queries, const Matrix& bank, const std::int64_t* ids,
                     std::int64_t count, float* scores);

}  // namespace pymcip
