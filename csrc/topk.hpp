// Exact top-k of inner products, with a threshold.
//
// For a query row q and the bank rows c_0 .. c_{M-1}, all of length D:
//
//   s(q, j) = sum over d = 0 .. D-1, in this order, of q[d] * c_j[d]        in fp32
//
// The result is the first k of the pairs (s(q, j), j) with s(q, j) >= threshold, ordered by score
// descending, then by j ascending. Places that stay empty (fewer than k admitted) hold id -1 and
// score -infinity.
//
// Shapes: ids int64 [N, k] and scores float [N, k], both contiguous; any N, M >= 0 and D, k >= 1;
// rows and columns of the inputs may have any strides. Inputs are fp32, fp16 or bf16; the latter
// two are widened to fp32 exactly, so nothing is rounded before the first product.
//
// Every score is one chain over d with a single accumulator, whatever the number of threads, the
// position of a row in its block or the size of a block. Hence equal rows have equal scores bit for
// bit, and the result depends on neither threads nor blocks. It can differ in the last bits between
// kernels (with or without fused multiply-add): |s - exact| <= gamma_D |q| |c|, where
// gamma_D = D u / (1 - D u) and u = 2^-24.
//
// The caller guarantees that every row's norm is finite (so, by Cauchy-Schwarz, is every score) and
// that the threshold is not NaN.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace pymcip {

enum class Scalar { float32, float16, bfloat16 };

struct Matrix {
    const void* data;
    Scalar scalar;
    std::int64_t rows;
    std::int64_t columns;
    std::int64_t row_stride;  // in elements, like column_stride
    std::int64_t column_stride;
};

// Called about ten times a second, from the thread that called topk_cpu, with the number of scores
// computed and to compute; returning false stops the search. It must not throw.
using Progress = std::function<bool(std::int64_t done, std::int64_t total)>;

// Kernels that this machine can run, fastest first: "avx512f", "avx2", "baseline".
std::vector<std::string> topk_cpu_kernels();

// Returns false if `progress` stopped it; the outputs are then unspecified. `kernel` is one of
// topk_cpu_kernels().
bool topk_cpu(const Matrix& queries, const Matrix& bank, std::int64_t k, float threshold,
              int threads, const std::string& kernel, std::int64_t* ids, float* scores,
              const Progress& progress);

}  // namespace pymcip
