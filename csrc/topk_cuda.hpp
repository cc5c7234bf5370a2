// Exact top-k on a GPU: the host's side. See topk_cuda.cu for how it works, pymcip/ops/topk.py for the
// contract. The caller has checked that shapes agree and the threshold is no NaN,
// 1 <= k <= kMostK, 1 <= D <= kMostD; queries, ids, scores and workspace are on `device`.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace pymcip {

struct CudaMatrix {
    const void* data = nullptr;
    std::string type;  // float32, float16, bfloat16
    std::int64_t rows = 0;
    std::int64_t columns = 0;
    std::int64_t row_stride = 0;  // in elements, like column_stride
    std::int64_t column_stride = 0;
};

// What bounds the memory. The defaults are what users get; tests take less to reach the seams.
struct CudaTopkLimits {
    std::int64_t packed_bytes = 256 << 20;     // a chunk of the bank, packed; there are two
    std::int64_t raw_bytes = 256 << 20;        // a chunk of a bank in main memory; there are two
    std::int64_t query_bytes = 1024 << 20;     // packed queries; more are taken in turns
    std::int64_t candidate_bytes = 64 << 20;   // of the queries screened in one launch
    std::int64_t staging_bytes = 16 << 20;     // pinned; there are two
    std::int64_t capacity = 0;  // candidates per query, a power of two from 256 on; 0: by k
};

struct CudaTopkProblem {
    CudaMatrix queries;
    CudaMatrix bank;
    bool bank_on_host = false;
    void* packed = nullptr;  // the bank, as topk_cuda_pack has left it for `screen`; null: packed here
    std::int64_t k = 0;
    float threshold = 0;
    bool exact = true;
    std::string screen;       // bf16, int8
    std::string path;         // one of topk_cuda_paths(device)
    int device = 0;
    std::uintptr_t stream = 0;
    int threads = 1;          // that copy rows of a bank in main memory to pinned memory
    std::int64_t* ids = nullptr;  // [queries.rows, k], contiguous, like scores
    float* scores = nullptr;
    void* workspace = nullptr;        // device memory of the size wanted below, 256-byte aligned
    void* pinned = nullptr;           // pinned main memory, likewise
    CudaTopkLimits limits;
};

struct CudaTopkMemory {
    std::int64_t workspace_bytes;
    std::int64_t pinned_bytes;
};

constexpr std::int64_t kMostK = 2048;
constexpr std::int64_t kMostD = 4096;

// Ways to screen that the device can run, fastest first: "hopper" (wgmma, sm_90a), "mma", "mma128"
// (mma.sync; the second needs less shared memory).
std::vector<std::string> topk_cuda_paths(int device);

CudaTopkMemory topk_cuda_memory(const CudaTopkProblem& problem);

// The packed form of a bank on the device, in memory of its own: 16 bytes per row and 8 per 128 rows,
// and D bytes per row for INT8 or 2D for bf16, rounded up to a multiple of 128, unless the rows can be
// screened where they are (bf16 rows for bf16, without gaps, at multiples of 16 bytes).
std::int64_t topk_cuda_packed_bytes(const CudaMatrix& bank, const std::string& screen);

// Packs into memory of that size, 256-byte aligned, after what `stream` has queued. Returns when that is
// done: the lowest number of a row that can't be ranked, or -1.
std::int64_t topk_cuda_pack(const CudaMatrix& bank, const std::string& screen, int device,
                            std::uintptr_t stream, void* packed);

// Called after every piece of work, from the calling thread, with the scores computed and to compute;
// returning false stops the search. It must not throw.
using CudaProgress = std::function<bool(std::int64_t done, std::int64_t total)>;

struct CudaTopkOutcome {
    bool finished = true;  // false: `progress` stopped it
    // The lowest number of a row that can't be ranked, since its squared norm is not finite in fp32; -1:
    // none was found. Queries that are searched together are looked at before, the bank meanwhile.
    std::int64_t bad_query = -1;
    std::int64_t bad_bank_row = -1;
};

// The outputs are unspecified unless the search has finished and found no bad row. When it returns, the
// device is done with the workspace.
CudaTopkOutcome topk_cuda(const CudaTopkProblem& problem, const CudaProgress& progress);

}  // namespace pymcip
