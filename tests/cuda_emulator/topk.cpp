// csrc/topk_cuda.cu on the emulator, for ctypes.
#include "topk_cuda.cu"

#include <exception>

extern "C" {

struct EmulatedProblem {
    const void* queries;
    const char* query_type;
    std::int64_t query_rows, columns, query_row_stride, query_column_stride;
    const void* bank;
    const char* bank_type;
    std::int64_t bank_rows, bank_row_stride, bank_column_stride;
    std::int32_t bank_on_host, packed_ahead, eager;
    std::int32_t exact;
    std::int64_t k;
    float threshold;
    std::int32_t threads;
    const char* screen;
    const char* path;
    std::int64_t packed_bytes, raw_bytes, query_bytes, candidate_bytes, staging_bytes, capacity;
    std::int64_t* ids;
    float* scores;
};

static char message[512];

static const char* unrankable(const char* matrix, std::int64_t row) {
    std::snprintf(message, sizeof message, "row %lld of %s", static_cast<long long>(row), matrix);
    return message;
}

// Returns null, or what went wrong; stop_after: reports of progress after which to stop, or -1.
const char* emulate_topk(const EmulatedProblem* given, std::int64_t stop_after,
                         std::int64_t* done_at_last) {
    try {
        emulator::eager = given->eager;
        pymcip::CudaTopkProblem problem;
        problem.queries = {given->queries,     given->query_type,       given->query_rows,
                           given->columns,     given->query_row_stride, given->query_column_stride};
        problem.bank = {given->bank,    given->bank_type,       given->bank_rows,
                        given->columns, given->bank_row_stride, given->bank_column_stride};
        problem.bank_on_host = given->bank_on_host;
        problem.exact = given->exact;
        problem.k = given->k;
        problem.threshold = given->threshold;
        problem.threads = given->threads;
        problem.screen = given->screen;
        problem.path = given->path;
        problem.limits = {given->packed_bytes,    given->raw_bytes,     given->query_bytes,
                          given->candidate_bytes, given->staging_bytes, given->capacity};
        problem.ids = given->ids;
        problem.scores = given->scores;
        // Exactly what was asked for, between bytes that must stay as they are.
        constexpr std::size_t guard = 4096;
        const auto allocate = [&](std::int64_t bytes) {
            const std::size_t size = static_cast<std::size_t>(bytes);
            std::unique_ptr<char, decltype(&std::free)> place(
                static_cast<char*>(std::aligned_alloc(4096, (size + 2 * guard + 4095) / 4096 * 4096)),
                &std::free);
            std::memset(place.get(), 0x5a, size + 2 * guard);
            return place;
        };
        const auto intact = [&](const char* place, std::int64_t bytes) {
            for (std::size_t i = 0; i < guard; ++i)
                if (place[i] != 0x5a || place[guard + static_cast<std::size_t>(bytes) + i] != 0x5a)
                    return false;
            return true;
        };
        const std::int64_t packed_bytes =
            given->packed_ahead ? pymcip::topk_cuda_packed_bytes(problem.bank, problem.screen) : 0;
        const auto packed = allocate(packed_bytes);
        if (given->packed_ahead) {
            problem.packed = packed.get() + guard;
            const std::int64_t bad_row =
                pymcip::topk_cuda_pack(problem.bank, problem.screen, 0, 0, problem.packed);
            if (bad_row >= 0) return unrankable("bank", bad_row);
        }
        const pymcip::CudaTopkMemory memory = pymcip::topk_cuda_memory(problem);
        const auto workspace = allocate(memory.workspace_bytes);
        const auto pinned = allocate(memory.pinned_bytes);
        problem.workspace = workspace.get() + guard;
        problem.pinned = pinned.get() + guard;
        std::int64_t reports = 0;
        const pymcip::CudaTopkOutcome outcome =
            pymcip::topk_cuda(problem, [&](std::int64_t done, std::int64_t total) {
                *done_at_last = done;
                if (done > total) std::abort();
                return ++reports != stop_after;
            });
        if (!intact(workspace.get(), memory.workspace_bytes) ||
            !intact(pinned.get(), memory.pinned_bytes) || !intact(packed.get(), packed_bytes))
            return "wrote outside of its memory";
        if (outcome.bad_query >= 0) return unrankable("queries", outcome.bad_query);
        if (outcome.bad_bank_row >= 0) return unrankable("bank", outcome.bad_bank_row);
        return outcome.finished ? nullptr : "stopped";
    } catch (const std::exception& error) {
        std::snprintf(message, sizeof message, "%s", error.what());
        return message;
    }
}
}
