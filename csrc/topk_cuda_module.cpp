// The Python side of topk_cuda.hpp. Values are validated by pymcip/ops/topk.py and topk_cuda.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <cstdint>
#include <exception>
#include <map>
#include <stdexcept>
#include <string>
#include <tuple>

#include "topk_cuda.hpp"

namespace py = pybind11;

namespace {

// address, dtype, rows, columns, row stride, column stride (strides in elements)
using MatrixTuple =
    std::tuple<std::uintptr_t, std::string, std::int64_t, std::int64_t, std::int64_t, std::int64_t>;

pymcip::CudaMatrix to_matrix(const MatrixTuple& tuple) {
    const auto& [address, type, rows, columns, row_stride, column_stride] = tuple;
    if (rows < 0 || columns < 1 || (rows > 0 && address == 0))
        throw std::invalid_argument("a matrix needs rows >= 0, columns >= 1 and an address");
    return {reinterpret_cast<const void*>(address), type, rows, columns, row_stride, column_stride};
}

pymcip::CudaTopkLimits to_limits(const std::map<std::string, std::int64_t>& given) {
    pymcip::CudaTopkLimits limits;
    const std::map<std::string, std::int64_t*> known = {
        {"packed_bytes", &limits.packed_bytes},       {"raw_bytes", &limits.raw_bytes},
        {"query_bytes", &limits.query_bytes},         {"candidate_bytes", &limits.candidate_bytes},
        {"staging_bytes", &limits.staging_bytes},     {"capacity", &limits.capacity},
    };
    for (const auto& [name, value] : given) {
        const auto found = known.find(name);
        if (found == known.end() || value < 0)
            throw std::invalid_argument("limit '" + name + "' is unknown or negative");
        *found->second = value;
    }
    return limits;
}

pymcip::CudaTopkProblem to_problem(const MatrixTuple& queries, const MatrixTuple& bank,
                                   bool bank_on_host, std::uintptr_t packed, std::int64_t k,
                                   float threshold, bool exact, const std::string& screen,
                                   const std::string& path, int device,
                                   const std::map<std::string, std::int64_t>& limits) {
    pymcip::CudaTopkProblem problem;
    problem.queries = to_matrix(queries);
    problem.bank = to_matrix(bank);
    problem.bank_on_host = bank_on_host;
    problem.packed = reinterpret_cast<void*>(packed);
    problem.k = k;
    problem.threshold = threshold;
    problem.exact = exact;
    problem.screen = screen;
    problem.path = path;
    problem.device = device;
    problem.limits = to_limits(limits);
    return problem;
}

py::tuple memory(const MatrixTuple& queries, const MatrixTuple& bank, bool bank_on_host,
                 std::uintptr_t packed, std::int64_t k, bool exact, const std::string& screen,
                 const std::map<std::string, std::int64_t>& limits) {
    const pymcip::CudaTopkMemory found = pymcip::topk_cuda_memory(
        to_problem(queries, bank, bank_on_host, packed, k, 0, exact, screen, "", 0, limits));
    return py::make_tuple(found.workspace_bytes, found.pinned_bytes);
}

std::int64_t packed_bytes(const MatrixTuple& bank, const std::string& screen) {
    return pymcip::topk_cuda_packed_bytes(to_matrix(bank), screen);
}

// Returns the number of a row that can't be ranked, or -1.
std::int64_t pack(const MatrixTuple& bank, const std::string& screen, int device,
                  std::uintptr_t stream, std::uintptr_t packed) {
    const pymcip::CudaMatrix matrix = to_matrix(bank);
    const py::gil_scoped_release release;
    return pymcip::topk_cuda_pack(matrix, screen, device, stream, reinterpret_cast<void*>(packed));
}

// Returns the numbers of a query and of a row of the bank that can't be ranked, or -1.
py::tuple topk(const MatrixTuple& queries, const MatrixTuple& bank, bool bank_on_host,
               std::uintptr_t packed, std::int64_t k, float threshold, bool exact,
               const std::string& screen, const std::string& path, int device,
               std::uintptr_t stream, int threads, std::uintptr_t ids, std::uintptr_t scores,
               std::uintptr_t workspace, std::uintptr_t pinned,
               const std::map<std::string, std::int64_t>& limits, const py::object& progress) {
    pymcip::CudaTopkProblem problem = to_problem(queries, bank, bank_on_host, packed, k, threshold,
                                                 exact, screen, path, device, limits);
    problem.stream = stream;
    problem.threads = threads;
    problem.ids = reinterpret_cast<std::int64_t*>(ids);
    problem.scores = reinterpret_cast<float*>(scores);
    problem.workspace = reinterpret_cast<void*>(workspace);
    problem.pinned = reinterpret_cast<void*>(pinned);

    // Signals (Ctrl-C) and the caller's progress function are served between pieces of work; what they
    // raise stops the search first and is then passed on.
    std::exception_ptr raised;
    auto last = std::chrono::steady_clock::now();
    const pymcip::CudaProgress watch = [&](std::int64_t done, std::int64_t total) {
        const auto now = std::chrono::steady_clock::now();
        if (now - last < std::chrono::milliseconds(100)) return true;
        last = now;
        const py::gil_scoped_acquire gil;
        try {
            if (PyErr_CheckSignals() != 0) throw py::error_already_set();
            if (!progress.is_none()) progress(done, total);
            return true;
        } catch (...) {
            raised = std::current_exception();
            return false;
        }
    };
    pymcip::CudaTopkOutcome outcome;
    {
        const py::gil_scoped_release release;
        outcome = pymcip::topk_cuda(problem, watch);
    }
    if (raised) std::rethrow_exception(raised);
    return py::make_tuple(outcome.bad_query, outcome.bad_bank_row);
}

}  // namespace

void bind_topk_cuda(py::module_& module) {
    module.def("topk_cuda_paths", &pymcip::topk_cuda_paths, py::arg("device"));
    module.def("topk_cuda_memory", &memory, py::arg("queries"), py::arg("bank"),
               py::arg("bank_on_host"), py::arg("packed"), py::arg("k"), py::arg("exact"),
               py::arg("screen"), py::arg("limits"));
    module.def("topk_cuda_packed_bytes", &packed_bytes, py::arg("bank"), py::arg("screen"));
    module.def("topk_cuda_pack", &pack, py::arg("bank"), py::arg("screen"), py::arg("device"),
               py::arg("stream"), py::arg("packed"));
    module.def("topk_cuda", &topk, py::arg("queries"), py::arg("bank"), py::arg("bank_on_host"),
               py::arg("packed"), py::arg("k"), py::arg("threshold"), py::arg("exact"),
               py::arg("screen"), py::arg("path"), py::arg("device"), py::arg("stream"),
               py::arg("threads"), py::arg("ids"), py::arg("scores"), py::arg("workspace"),
               py::arg("pinned"), py::arg("limits"), py::arg("progress"));
}
