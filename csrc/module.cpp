// The Python module pymcip._core: pointers, shapes and strides in, so that it links neither
// libtorch nor NumPy. Values are validated by the Python functions that call it (pymcip/ops).

#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <cstdint>
#include <exception>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "ranks.hpp"
#include "topk.hpp"
#ifdef PYMCIP_WITH_CUDA
#include "cuda_info.hpp"

void bind_topk_cuda(pybind11::module_& module);  // topk_cuda_module.cpp
#endif

namespace py = pybind11;

#define PYMCIP_STRING_OF(x) #x
#define PYMCIP_STRING(x) PYMCIP_STRING_OF(x)

namespace {

// address, dtype, rows, columns, row stride, column stride (strides in elements)
using MatrixTuple =
    std::tuple<std::uintptr_t, std::string, std::int64_t, std::int64_t, std::int64_t, std::int64_t>;

pymcip::Matrix to_matrix(const MatrixTuple& tuple) {
    const auto& [address, dtype, rows, columns, row_stride, column_stride] = tuple;
    pymcip::Scalar scalar;
    if (dtype == "float32") {
        scalar = pymcip::Scalar::float32;
    } else if (dtype == "float16") {
        scalar = pymcip::Scalar::float16;
    } else if (dtype == "bfloat16") {
        scalar = pymcip::Scalar::bfloat16;
    } else {
        throw std::invalid_argument("dtype '" + dtype +
                                    "' is not one of float32, float16, bfloat16");
    }
    if (rows < 0 || columns < 1 || columns > pymcip::kMostColumns || (rows > 0 && address == 0))
        throw std::invalid_argument("a matrix needs rows >= 0, 1 to 4096 columns and an address");
    return {
        reinterpret_cast<const void*>(address), scalar, rows, columns, row_stride, column_stride};
}

// A matrix, and its packed form (addresses of codes, groups and sums) or None.
using PartTuple = std::pair<
    MatrixTuple,
    std::optional<std::tuple<std::uintptr_t, std::uintptr_t, std::uintptr_t>>>;

pymcip::Packed to_packed(std::uintptr_t codes, std::uintptr_t groups, std::uintptr_t sums) {
    if (codes == 0 || groups == 0 || sums == 0)
        throw std::invalid_argument("a packed matrix needs addresses of codes, groups and sums");
    return {reinterpret_cast<std::int8_t*>(codes), reinterpret_cast<float*>(groups),
            reinterpret_cast<std::int32_t*>(sums)};
}

// Runs `work` without the GIL. Signals (Ctrl-C) and the caller's progress function are served ten
// times a second; what they raise stops the work first and is then passed on. Returns nothing, or
// what can't be ranked: "queries" or "bank", and the row.
template <class Work>
std::optional<std::pair<std::string, std::int64_t>> watched(const py::object& progress,
                                                            const Work& work) {
    std::exception_ptr raised;
    const pymcip::Progress watch = [&](std::int64_t done, std::int64_t total) {
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
    pymcip::Outcome outcome;
    {
        const py::gil_scoped_release release;
        outcome = work(watch);
    }
    if (raised) std::rethrow_exception(raised);
    using Kind = pymcip::Outcome::Kind;
    if (outcome.kind == Kind::bad_query) return {{"queries", outcome.row}};
    if (outcome.kind == Kind::bad_bank_row) return {{"bank", outcome.row}};
    return {};
}

std::optional<std::pair<std::string, std::int64_t>> topk(
    const MatrixTuple& queries_tuple, const std::vector<PartTuple>& bank_tuples, std::int64_t k,
    float threshold, bool exact, int threads, const std::string& kernel, std::uintptr_t ids,
    std::uintptr_t scores, const py::object& progress) {
    const pymcip::Matrix queries = to_matrix(queries_tuple);
    if (k < 1) throw std::invalid_argument("k must be at least 1");
    if (std::isnan(threshold)) throw std::invalid_argument("threshold is NaN");
    if (queries.rows > 0 && (ids == 0 || scores == 0))
        throw std::invalid_argument("ids and scores need an address");
    std::vector<pymcip::Part> bank;
    for (const auto& [matrix, packed] : bank_tuples) {
        bank.push_back({to_matrix(matrix), {nullptr, nullptr, nullptr}});
        if (packed) bank.back().packed = std::apply(to_packed, *packed);
        if (bank.back().rows.columns != queries.columns)
            throw std::invalid_argument("queries and bank differ in their number of columns");
    }
    return watched(progress, [&](const pymcip::Progress& watch) {
        return pymcip::topk_cpu(queries, bank, k, threshold, exact, threads, kernel,
                                reinterpret_cast<std::int64_t*>(ids),
                                reinterpret_cast<float*>(scores), watch);
    });
}

std::optional<std::pair<std::string, std::int64_t>> topk_pack(
    const MatrixTuple& rows_tuple, std::uintptr_t codes, std::uintptr_t groups, std::uintptr_t sums,
    int threads, const std::string& kernel, const py::object& progress) {
    const pymcip::Matrix rows = to_matrix(rows_tuple);
    return watched(progress, [&](const pymcip::Progress& watch) {
        return pymcip::topk_cpu_pack(rows, to_packed(codes, groups, sums), threads, kernel, watch);
    });
}

void topk_scores(const MatrixTuple& queries_tuple, const MatrixTuple& bank_tuple,
                 std::uintptr_t ids, std::int64_t count, std::uintptr_t scores) {
    const pymcip::Matrix queries = to_matrix(queries_tuple);
    const pymcip::Matrix bank = to_matrix(bank_tuple);
    if (queries.columns != bank.columns)
        throw std::invalid_argument("queries and bank differ in their number of columns");
    const py::gil_scoped_release release;
    pymcip::topk_cpu_scores(queries, bank, reinterpret_cast<const std::int64_t*>(ids), count,
                            reinterpret_cast<float*>(scores));
}

// Addresses: products, with their stride; starts, ids, scores, above, below and counts of `Asked`.
void ranks_count(std::uintptr_t products, std::int64_t stride, const MatrixTuple& queries_tuple,
                 const MatrixTuple& bank_tuple, std::int64_t first, std::uintptr_t starts,
                 std::uintptr_t ids, std::uintptr_t scores, std::uintptr_t above,
                 std::uintptr_t below, std::uintptr_t counts, int threads) {
    const pymcip::Matrix queries = to_matrix(queries_tuple);
    const pymcip::Matrix bank = to_matrix(bank_tuple);
    if (queries.columns != bank.columns)
        throw std::invalid_argument("queries and bank differ in their number of columns");
    const pymcip::Asked asked = {
        reinterpret_cast<const std::int64_t*>(starts), reinterpret_cast<const std::int64_t*>(ids),
        reinterpret_cast<const float*>(scores),        reinterpret_cast<const float*>(above),
        reinterpret_cast<const float*>(below),         reinterpret_cast<std::int64_t*>(counts)};
    const py::gil_scoped_release release;
    pymcip::ranks_count(reinterpret_cast<const float*>(products), stride, queries, bank, first,
                        asked, threads);
}

py::dict build_info() {
    py::dict info;
#if defined(__clang__)
    info["compiler"] = std::string("Clang ") + __clang_version__;
#elif defined(__GNUC__)
    info["compiler"] = std::string("GCC ") + __VERSION__;
#endif
    info["pybind11"] = PYMCIP_STRING(PYBIND11_VERSION_MAJOR) "." PYMCIP_STRING(
        PYBIND11_VERSION_MINOR) "." PYMCIP_STRING(PYBIND11_VERSION_PATCH);
#ifdef PYMCIP_WITH_CUDA
    info["cuda"] = PYMCIP_WITH_CUDA;
#else
    info["cuda"] = py::none();
#endif
    return info;
}

#ifdef PYMCIP_WITH_CUDA
py::dict cuda_info() {
    const pymcip::CudaInfo found = pymcip::cuda_info();
    const auto version = [](int number) {
        return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
    };
    py::list devices;
    for (const pymcip::CudaDevice& device : found.devices) {
        py::dict row;
        row["name"] = device.name;
        row["capability"] =
            std::to_string(device.capability_major) + "." + std::to_string(device.capability_minor);
        row["multiprocessors"] = device.multiprocessors;
        row["memory_bytes"] = device.memory_bytes;
        row["l2_bytes"] = device.l2_bytes;
        devices.append(row);
    }
    py::dict info;
    info["runtime"] = version(found.runtime_version);
    info["driver"] = found.driver_version ? py::object(py::str(version(found.driver_version)))
                                          : py::object(py::none());
    info["error"] = found.error.empty() ? py::object(py::none()) : py::object(py::str(found.error));
    info["devices"] = devices;
    return info;
}
#endif

}  // namespace

PYBIND11_MODULE(_core, m) {
    m.doc() = "Compiled core of pymcip. Call pymcip.ops instead: nothing is validated here.";
    m.def("topk", &topk, py::arg("queries"), py::arg("bank"), py::arg("k"), py::arg("threshold"),
          py::arg("exact"), py::arg("threads"), py::arg("kernel"), py::arg("ids"),
          py::arg("scores"), py::arg("progress") = py::none());
    m.def("topk_pack", &topk_pack, py::arg("rows"), py::arg("codes"), py::arg("groups"),
          py::arg("sums"), py::arg("threads"), py::arg("kernel"), py::arg("progress") = py::none());
    m.def("topk_scores", &topk_scores, py::arg("queries"), py::arg("bank"), py::arg("ids"),
          py::arg("count"), py::arg("scores"));
    m.def("ranks_count", &ranks_count, py::arg("products"), py::arg("stride"), py::arg("queries"),
          py::arg("bank"), py::arg("first"), py::arg("starts"), py::arg("ids"), py::arg("scores"),
          py::arg("above"), py::arg("below"), py::arg("counts"), py::arg("threads"));
    m.def("topk_pass", &pymcip::topk_cpu_pass, py::arg("columns"), py::arg("k"));
    m.def("topk_kernels", &pymcip::topk_cpu_kernels);
    m.def("build_info", &build_info);
#ifdef PYMCIP_WITH_CUDA
    m.def("cuda_info", &cuda_info);
    bind_topk_cuda(m);
#else
    m.def("cuda_info", [] { return py::none(); });
#endif
}
