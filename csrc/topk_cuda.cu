// Exact top-k on a GPU, fused: a product of queries and bank rows never leaves the registers unless it
// may rank.
//
//   pack     the queries once, the bank chunk by chunk, or ahead of the search and all of it: bf16, or
//            rotated INT8, and what the rounding did to each row (topk_cuda_kernels.cuh has the
//            certificate). A bf16 bank whose rows are aligned is screened where it is.
//   screen   tiles of queries x bank rows on the tensor cores; products that can reach their query's
//            cut are appended to the query's candidates: wgmma + TMA on Hopper, mma.sync + cp.async
//            from sm_80 on.
//   refine   a block per query: the k-th largest of the candidates' lower bounds discards most, the rest
//            get canonical fp64 scores from the inputs as they are, join the query's best (kept in the
//            outputs themselves), and raise its cut.
//
// The first chunk is as large as a query's candidates, so that nothing is lost without a cut; each
// next one multiplies the rows seen by at most a factor that should fill a quarter of them. Where
// candidates are lost nevertheless, the query is screened again by halves of the chunk until
// none are: a range of `capacity` rows can't lose any. Refining recognises rows it has seen.
//
// The host stays one step ahead: step i + 1 is queued before it waits for step i and sees whether that
// has lost candidates. It also waits for the queries' packing, for every halved range, and at the end.
//
// Three streams: the caller's has queries, screens and refining; one packs chunks; one copies those of a
// bank in main memory (pageable rows through pinned pieces, by a thread of its own).
//   * The second and third get work once the host has waited for the queries' packing, and so for all
//     that the caller had queued: the bank's rows are there, and the workspace has no other user.
//   * A chunk is packed after it has been copied, and screened after it has been packed: events.
//   * A chunk's buffers are filled again once the host has waited for the last step that read them,
//     its halved ranges included. Only the next chunk's steps are queued then: the packing of the one
//     after that runs beside them.
//   * Packing needs no low priority: torch's streams have the lowest there is, and of two kernels the
//     one that was queued later gets what processors the other leaves.
//
// Device memory beyond inputs and outputs (defaults): packed queries up to 1 GiB, candidates 64 MiB,
// two packed chunks of 256 MiB (none for a bank screened in place or packed ahead), for a bank in main
// memory two raw chunks of 256 MiB, and 16 bytes per row of these; 32 MiB of pinned memory.
//
// The file is also compiled by a plain C++ compiler against tests/cuda_emulator.
#include "topk_cuda.hpp"

#include <algorithm>
#include <cstring>
#include <future>
#include <memory>
#include <stdexcept>
#include <tuple>
#include <utility>

#include "topk_cuda_kernels.cuh"

#if defined(__CUDACC__)
#include <cudaTypedefs.h>
#endif

namespace pymcip {
namespace cuda {

void check(cudaError_t status, const char* what) {
    if (status != cudaSuccess)
        throw std::runtime_error(std::string("topk on CUDA: ") + what + ": " +
                                 cudaGetErrorString(status));
}

#if defined(__CUDACC__)

// The driver's function, without linking the driver; null if it has none.
PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
    static const PFN_cuTensorMapEncodeTiled_v12000 function = [] {
        void* found = nullptr;
        cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
        const cudaError_t status = cudaGetDriverEntryPointByVersion(
            "cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
        const cudaError_t status = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found,
                                                           cudaEnableDefault, &result);
#endif
        const bool usable = status == cudaSuccess && result == cudaDriverEntryPointSuccess;
        return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(usable ? found : nullptr);
    }();
    return function;
}

bool has_tensor_maps() { return tensor_map_encoder() != nullptr; }

// Where code for sm_90a was left out of the build, the Hopper kernels are empty: a few registers.
bool has_hopper_code() {
    cudaFuncAttributes found{};
    if (cudaFuncGetAttributes(&found, screen_hopper<Screen::bf16>) == cudaSuccess)
        return found.numRegs >= 100;
    cudaGetLastError();
    return false;
}

// Boxes of kStepBytes x box_rows of a matrix of bytes, swizzled by 128 bytes.
TensorMap tensor_map(const void* data, std::int64_t row_bytes, std::int64_t rows,
                     std::int64_t stride, int box_rows) {
    TensorMap map;
    const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(row_bytes),
                                 static_cast<cuuint64_t>(rows)};
    const cuuint64_t strides[1] = {static_cast<cuuint64_t>(stride)};
    const cuuint32_t box[2] = {kStepBytes, static_cast<cuuint32_t>(box_rows)};
    const cuuint32_t element_strides[2] = {1, 1};
    const CUresult status = tensor_map_encoder()(
        &map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<void*>(data), sizes, strides, box,
        element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (status != CUDA_SUCCESS)
        throw std::runtime_error("topk on CUDA: cuTensorMapEncodeTiled failed with status " +
                                 std::to_string(static_cast<int>(status)));
    return map;
}

#endif

constexpr std::int64_t kRangeRows = 256;  // ranges of a chunk start at multiples of this
// Queries screened in one launch: their packed rows stay in the L2 cache beside the bank's.
constexpr std::int64_t kMostQueryBlock = 8192;
constexpr std::int64_t kMostQueryBlockBytes = 16 << 20;
constexpr int kSlots = 2;
constexpr int kLevels = 32;  // of halved ranges: more than a chunk has

std::int64_t round_up(std::int64_t value, std::int64_t unit) {
    return (value + unit - 1) / unit * unit;
}

Type type_of(const std::string& name) {
    if (name == "float32") return Type::float32;
    if (name == "float16") return Type::float16;
    if (name == "bfloat16") return Type::bfloat16;
    throw std::invalid_argument("dtype '" + name + "' is not one of float32, float16, bfloat16");
}

int bytes_of(Type type) { return type == Type::float32 ? 4 : 2; }

Source source_of(const CudaMatrix& matrix, std::int64_t first) {
    const Type type = type_of(matrix.type);
    return {static_cast<const char*>(matrix.data) + first * matrix.row_stride * bytes_of(type), type,
            matrix.row_stride, matrix.column_stride};
}

// Cuts memory into pieces; of none, it only adds their sizes up.
struct Cutter {
    char* memory = nullptr;
    std::int64_t bytes = 0;

    template <class T>
    void take(T*& pointer, std::int64_t count) {
        pointer = memory ? reinterpret_cast<T*>(memory + bytes) : nullptr;
        bytes += round_up(count * static_cast<std::int64_t>(sizeof(T)), 256);
    }
};

// Rows as a screen needs them.
struct Packed {
    char* data = nullptr;  // null: they are screened where they are
    Row* meta = nullptr;
    float* group_norm = nullptr;  // of kGroupRows rows each; null for queries
    float* group_residual = nullptr;
};

// How the rows of a bank, and its queries, are packed for a screen.
struct Form {
    Form(const CudaMatrix& bank, bool on_host, const std::string& name) {
        const std::int64_t D = bank.columns;
        if (name != "bf16" && name != "int8")
            throw std::invalid_argument("screen '" + name + "' is not one of bf16, int8");
        if (D < 1 || D > kMostD)
            throw std::invalid_argument("topk on CUDA takes 1 <= D <= 4096");
        columns = static_cast<int>(D);
        screen = name == "bf16" ? Screen::bf16 : Screen::int8;
        row_bytes = static_cast<int>(round_up(D * (screen == Screen::bf16 ? 2 : 1), kStepBytes));
        in_place = screen == Screen::bf16 && type_of(bank.type) == Type::bfloat16 &&
                   (on_host || (bank.column_stride == 1 && bank.row_stride >= D &&
                                bank.row_stride % 8 == 0 &&
                                reinterpret_cast<std::uintptr_t>(bank.data) % 16 == 0));
    }

    Screen screen;
    int columns;
    int row_bytes;  // packed
    bool in_place;

    static std::int64_t groups(std::int64_t rows) { return (rows + kGroupRows - 1) / kGroupRows; }

    Packed take(Cutter& cutter, std::int64_t rows) const {
        Packed packed;
        if (!in_place) cutter.take(packed.data, rows * row_bytes);
        cutter.take(packed.meta, rows);
        cutter.take(packed.group_norm, groups(rows));
        cutter.take(packed.group_residual, groups(rows));
        return packed;
    }

    // From a row on that begins a group.
    Packed part(const Packed& whole, std::int64_t row) const {
        return {whole.data ? whole.data + row * row_bytes : nullptr, whole.meta + row,
                whole.group_norm + row / kGroupRows, whole.group_residual + row / kGroupRows};
    }

    // Queues the packing of rows whose numbers start at `first`.
    void pack(const Source& source, std::int64_t first, int rows, const Packed& to,
              unsigned long long* unrankable, int processors, cudaStream_t stream) const;
};

// A bank that was packed ahead.
struct Ahead {
    Ahead(const Form& form, std::int64_t rows, void* memory) {
        Cutter cutter{static_cast<char*>(memory)};
        cutter.take(unrankable, 1);
        packed = form.take(cutter, rows);
        bytes = cutter.bytes;
    }

    unsigned long long* unrankable;
    Packed packed;
    std::int64_t bytes;
};

// A chunk's buffers, and the chunk they hold.
struct Slot {
    char* raw = nullptr;
    Packed packed;
    std::int64_t first = 0;
    int rows = 0;
    Source source{};                 // the rows as they are
    const char* screened = nullptr;  // the rows as they are screened
    std::int64_t screened_stride = 0;
    int screened_bytes = 0;
};

// All sizes, and where everything lies in the workspace.
struct Layout {
    explicit Layout(const CudaTopkProblem& problem, char* workspace = nullptr)
        : form(problem.bank, problem.bank_on_host, problem.screen) {
        const CudaTopkLimits& limits = problem.limits;
        const std::int64_t k = problem.k;
        if (k < 1 || k > kMostK || problem.queries.columns != problem.bank.columns)
            throw std::invalid_argument("topk on CUDA takes 1 <= k <= 2048 and rows of one length");
        bank_type = type_of(problem.bank.type);
        raw_stride = round_up(form.columns * bytes_of(bank_type), 16);

        capacity = static_cast<int>(limits.capacity ? limits.capacity
                                                    : std::max<std::int64_t>(1024, 2 * k));
        while (capacity & (capacity - 1)) capacity += capacity & -capacity;
        if (capacity < kRangeRows)
            throw std::invalid_argument("a query has room for at least 256 candidates");
        const std::int64_t N = std::max<std::int64_t>(problem.queries.rows, 1);
        const std::int64_t M = std::max<std::int64_t>(problem.bank.rows, 1);
        const auto tiles = [](std::int64_t wanted, std::int64_t most) {
            const std::int64_t whole = wanted / kTileQueries * kTileQueries;
            return std::max<std::int64_t>(
                std::min(whole, round_up(most, kTileQueries)), kTileQueries);
        };
        queries = tiles(std::min<std::int64_t>(limits.query_bytes / form.row_bytes, 1 << 24), N);
        query_block = static_cast<int>(
            tiles(std::min({limits.candidate_bytes / capacity / 8, kMostQueryBlock,
                            kMostQueryBlockBytes / form.row_bytes}),
                  queries));
        std::int64_t rows = 1 << 20;
        if (!form.in_place && !problem.packed)
            rows = std::min(rows, limits.packed_bytes / form.row_bytes);
        if (problem.bank_on_host) rows = std::min(rows, limits.raw_bytes / raw_stride);
        rows = std::max<std::int64_t>(rows / kRangeRows * kRangeRows, kRangeRows);
        chunk_rows = static_cast<int>(std::min(rows, round_up(M, kRangeRows)));

        Cutter cutter{workspace};
        cutter.take(packed_queries.data, queries * form.row_bytes);
        cutter.take(packed_queries.meta, queries);
        cutter.take(unrankable, 2);
        cutter.take(cuts, queries);
        cutter.take(filled, queries);
        cutter.take(counts, queries);
        cutter.take(candidates, std::int64_t{query_block} * capacity);
        for (Slot& slot : slots) {
            if (problem.bank_on_host) cutter.take(slot.raw, chunk_rows * raw_stride);
            if (!problem.packed) slot.packed = form.take(cutter, chunk_rows);
        }
        for (unsigned*& loss : losses)
            cutter.take(loss, 1 + query_block / static_cast<int>(sizeof(unsigned)));
        cutter.take(active_tiles, query_block / kTileQueries * kLevels);
        cutter.take(only, std::int64_t{query_block} * kLevels);
        bytes = cutter.bytes;
    }

    Form form;
    Type bank_type;
    std::int64_t raw_stride;
    int capacity;
    std::int64_t queries;  // packed at a time
    int query_block;       // screened at a time
    int chunk_rows;
    std::int64_t bytes;

    unsigned long long* unrankable;  // of the queries, of the bank
    Packed packed_queries;
    float* cuts;
    int* filled;
    unsigned* counts;
    Candidate* candidates;
    Slot slots[kSlots];
    unsigned* losses[kSlots + 1];  // see RefineProblem; the last is for halved ranges
    std::uint8_t* only;          // [kLevels, query_block]: queries to screen again
    std::uint8_t* active_tiles;  // [kLevels, query_block / kTileQueries]
};

struct Stopped {};

class Stream {
  public:
    Stream() { check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "new stream"); }
    ~Stream() {
        cudaStreamSynchronize(stream_);
        cudaStreamDestroy(stream_);
    }
    Stream(const Stream&) = delete;
    Stream& operator=(const Stream&) = delete;
    operator cudaStream_t() const { return stream_; }

  private:
    cudaStream_t stream_;
};

class Event {
  public:
    Event() { check(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), "new event"); }
    ~Event() { cudaEventDestroy(event_); }
    Event(const Event&) = delete;
    Event& operator=(const Event&) = delete;
    void record(cudaStream_t stream) { check(cudaEventRecord(event_, stream), "record"); }
    void wait() { check(cudaEventSynchronize(event_), "running the kernels"); }
    void hold(cudaStream_t stream) { check(cudaStreamWaitEvent(stream, event_, 0), "wait"); }

  private:
    cudaEvent_t event_;
};

// Makes a device current, and the one before again.
class OnDevice {
  public:
    explicit OnDevice(int device) {
        check(cudaGetDevice(&before_), "asking for the device");
        check(cudaSetDevice(device), "choosing the device");
    }
    ~OnDevice() { cudaSetDevice(before_); }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

  private:
    int before_ = 0;
};

int processors_of(int device) {
    int count = 0;
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
          "asking for the multiprocessors");
    return count;
}

void launched() { check(cudaGetLastError(), "launching a kernel"); }

// Blocks for kernels that stride over their items: enough to fill the device several times.
int blocks_for(std::int64_t items, std::int64_t per_block, int processors) {
    return static_cast<int>(
        std::min<std::int64_t>((items + per_block - 1) / per_block, std::int64_t{processors} * 32));
}

void clear(void* place, int byte, std::int64_t bytes, cudaStream_t stream) {
    check(cudaMemsetAsync(place, byte, static_cast<std::size_t>(bytes), stream), "clearing");
}

void copy(void* to, const void* from, std::int64_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
    check(cudaMemcpyAsync(to, from, static_cast<std::size_t>(bytes), kind, stream), "copying");
}

template <Screen screen>
auto pack_kernel(int columns) {
    return columns <= 8 * kPart ? cuda::pack<screen, 8> : cuda::pack<screen, kMostD / kPart>;
}

void Form::pack(const Source& source, std::int64_t first, int rows, const Packed& to,
                unsigned long long* unrankable, int processors, cudaStream_t stream) const {
    for (float* most : {to.group_norm, to.group_residual})
        if (most) clear(most, 0, groups(rows) * static_cast<std::int64_t>(sizeof(float)), stream);
    PackProblem p{};
    p.source = source;
    p.rows = rows;
    p.D = columns;
    p.row_bytes = row_bytes;
    p.packed = to.data;
    p.meta = to.meta;
    p.group_norm = to.group_norm;
    p.group_residual = to.group_residual;
    p.unrankable = unrankable;
    p.first = first;
    const auto kernel = screen == Screen::bf16 ? pack_kernel<Screen::bf16>(columns)
                                               : pack_kernel<Screen::int8>(columns);
    launch(kernel, blocks_for(rows, kPackThreads / 32, processors), kPackThreads, 0, stream, p);
    launched();
}

class Search {
  public:
    Search(const CudaTopkProblem& problem, const CudaProgress& progress)
        : problem_(problem),
          progress_(progress),
          layout_(problem, static_cast<char*>(problem.workspace)),
          ahead_(layout_.form, problem.bank.rows, problem.packed),
          stream_(reinterpret_cast<cudaStream_t>(problem.stream)),
          total_(problem.queries.rows * problem.bank.rows),
          processors_(processors_of(problem.device)) {
        const auto paths = topk_cuda_paths(problem.device);
        if (std::find(paths.begin(), paths.end(), problem.path) == paths.end())
            throw std::invalid_argument("this device has no top-k path called '" + problem.path +
                                        "'");
        // By what a tensor core's sums can be off; see topk_cuda_kernels.cuh.
        slack_ = form_.screen == Screen::int8
                     ? 1.0f / (1 << 18)
                     : static_cast<float>(form_.row_bytes / 2) / (1 << 22) + 1.0f / (1 << 19);
        allow_shared_memory();
        staging_ = static_cast<char*>(problem.pinned) + 256;
        host_losses_ = static_cast<unsigned*>(problem.pinned);
        cudaPointerAttributes attributes{};
        bank_pinned_ = problem.bank_on_host &&
                       cudaPointerGetAttributes(&attributes, problem.bank.data) == cudaSuccess &&
                       attributes.type == cudaMemoryTypeHost;
        cudaGetLastError();
    }

    // However the search ends, the device is done with its memory: what belongs to this object, the
    // thread and then the other streams, waits in destructors of its own.
    ~Search() { cudaStreamSynchronize(stream_); }

    Search(const Search&) = delete;
    Search& operator=(const Search&) = delete;

    CudaTopkOutcome run() {
        plan_chunks();
        clear(layout_.unrankable, 0xff, 2 * sizeof(unsigned long long), stream_);
        for (std::int64_t first = 0; first < problem_.queries.rows && good(); first += layout_.queries)
            search(first, std::min(layout_.queries, problem_.queries.rows - first));
        return outcome_;
    }

  private:
    // A block of queries and a chunk.
    struct Step {
        std::int64_t query;  // of the packed queries
        int queries;
        int slot;
        int ring;
    };

    void plan_chunks() {
        const double growth = std::min(
            8.0, std::max(1.25, 1 + layout_.capacity / 4.0 / static_cast<double>(problem_.k)));
        std::int64_t first = 0;
        while (first < problem_.bank.rows) {
            const std::int64_t wanted =
                first == 0 ? layout_.capacity
                           : round_up(static_cast<std::int64_t>(
                                          static_cast<double>(first) * (growth - 1)),
                                      kRangeRows);
            const std::int64_t rows = std::min<std::int64_t>(
                {wanted, layout_.chunk_rows, problem_.bank.rows - first});
            chunks_.emplace_back(first, static_cast<int>(rows));
            first += rows;
        }
    }

    void search(std::int64_t first_query, std::int64_t count) {
        first_query_ = first_query;
        const int k = static_cast<int>(problem_.k);
        launch(start_search, blocks_for(count * k, 256 * 4, processors_), 256, 0, stream_,
               static_cast<int>(count), k, problem_.threshold, layout_.cuts, layout_.filled,
               layout_.counts, problem_.ids + first_query * k, problem_.scores + first_query * k);
        launched();
        form_.pack(source_of(problem_.queries, first_query), first_query, static_cast<int>(count),
                   layout_.packed_queries, layout_.unrankable, processors_, stream_);
        fetch_unrankable();
        if (!good()) return;

        std::unique_ptr<Step> last;
        const auto finish_last = [&] {
            if (last) finish(*last);
            last.reset();
        };
        if (problem_.bank_on_host && !chunks_.empty()) start_staging(0);
        int steps = 0;
        for (std::size_t chunk = 0; chunk < chunks_.size(); ++chunk) {
            const int slot = static_cast<int>(chunk % kSlots);
            prepare(chunk, layout_.slots[slot]);
            bool staging = false;
            for (std::int64_t query = 0; query < count; query += layout_.query_block) {
                const Step step{query,
                                static_cast<int>(std::min<std::int64_t>(layout_.query_block,
                                                                        count - query)),
                                slot, steps++ % kSlots};
                enqueue(step);
                finish_last();  // the other slot is free now
                last = std::make_unique<Step>(step);
                if (problem_.bank_on_host && !staging && chunk + 1 < chunks_.size())
                    start_staging(chunk + 1);
                staging = true;
            }
        }
        finish_last();
        fetch_unrankable();
    }

    void fetch_unrankable() {
        unsigned long long found[2];
        copy(found, layout_.unrankable, sizeof found, cudaMemcpyDeviceToHost, stream_);
        check(cudaStreamSynchronize(stream_), "running the kernels");
        outcome_.bad_query = static_cast<std::int64_t>(found[0]);  // all ones: -1
        outcome_.bad_bank_row = static_cast<std::int64_t>(found[1]);
    }

    bool good() const { return outcome_.bad_query < 0 && outcome_.bad_bank_row < 0; }

    // ---- chunks

    // Copies a chunk of a bank in main memory to its slot, on a thread and a stream of its own.
    void start_staging(std::size_t chunk) {
        staged_ = std::async(std::launch::async, [this, chunk] {
            const OnDevice on_device(problem_.device);
            const auto [first, rows] = chunks_[chunk];
            copy_rows(first, rows, layout_.slots[chunk % kSlots].raw);
            copied_[chunk % kSlots].record(copies_);
        });
    }

    void copy_rows(std::int64_t first, std::int64_t rows, char* device) {
        const CudaMatrix& bank = problem_.bank;
        const int element = bytes_of(layout_.bank_type);
        const std::int64_t used = bank.columns * element, stride = layout_.raw_stride;
        const char* start = static_cast<const char*>(bank.data) + first * bank.row_stride * element;
        if (bank_pinned_ && bank.column_stride == 1 && bank.row_stride * element >= used) {
            check(cudaMemcpy2DAsync(device, static_cast<std::size_t>(stride), start,
                                    static_cast<std::size_t>(bank.row_stride * element),
                                    static_cast<std::size_t>(used),
                                    static_cast<std::size_t>(rows), cudaMemcpyHostToDevice,
                                    copies_),
                  "copying the bank");
            return;
        }
        const std::int64_t piece = std::max<std::int64_t>(problem_.limits.staging_bytes / stride, 1);
        for (std::int64_t row = 0; row < rows; row += piece) {
            const int half = pieces_++ % 2;
            char* staging = staging_ + half * staging_piece_bytes(problem_, layout_);
            const std::int64_t count = std::min(piece, rows - row);
            piece_copied_[half].wait();  // a fresh event counts as past
            gather(start + row * bank.row_stride * element, count, staging);
            copy(device + row * stride, staging, count * stride, cudaMemcpyHostToDevice, copies_);
            piece_copied_[half].record(copies_);
        }
    }

    // Rows of the bank, any strides, to contiguous rows of raw_stride bytes; by several threads,
    // since one does not keep up with the bus.
    void gather(const char* from, std::int64_t rows, char* to) const {
        const CudaMatrix& bank = problem_.bank;
        const int element = bytes_of(layout_.bank_type);
        const std::int64_t used = bank.columns * element;
        const auto work = [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t row = begin; row < end; ++row) {
                const char* line = from + row * bank.row_stride * element;
                char* out = to + row * layout_.raw_stride;
                if (bank.column_stride == 1) {
                    std::memcpy(out, line, static_cast<std::size_t>(used));
                } else {
                    for (std::int64_t d = 0; d < bank.columns; ++d)
                        std::memcpy(out + d * element, line + d * bank.column_stride * element,
                                    static_cast<std::size_t>(element));
                }
                std::memset(out + used, 0, static_cast<std::size_t>(layout_.raw_stride - used));
            }
        };
        const std::int64_t helpers = std::min<std::int64_t>(
            std::max(problem_.threads, 1), rows * layout_.raw_stride / (1 << 20));
        std::vector<std::future<void>> team;  // their destructors wait
        for (std::int64_t i = 1; i < helpers; ++i)
            team.push_back(std::async(std::launch::async, work, rows * i / helpers,
                                      rows * (i + 1) / helpers));
        work(0, helpers > 1 ? rows / helpers : rows);
    }

    void prepare(std::size_t chunk, Slot& slot) {
        std::tie(slot.first, slot.rows) = chunks_[chunk];
        if (problem_.bank_on_host) {
            staged_.get();
            copied_[chunk % kSlots].hold(packing_);
            slot.source = {slot.raw, layout_.bank_type,
                           layout_.raw_stride / bytes_of(layout_.bank_type), 1};
        } else {
            slot.source = source_of(problem_.bank, slot.first);
        }
        if (problem_.packed) {
            slot.packed = form_.part(ahead_.packed, slot.first);
        } else {
            form_.pack(slot.source, slot.first, slot.rows, slot.packed, layout_.unrankable + 1,
                       processors_, packing_);
            packed_.record(packing_);
            packed_.hold(stream_);
        }
        if (form_.in_place) {
            slot.screened = static_cast<const char*>(slot.source.data);
            slot.screened_stride = slot.source.row_stride * 2;
            slot.screened_bytes = form_.columns * 2;
        } else {
            slot.screened = slot.packed.data;
            slot.screened_stride = form_.row_bytes;
            slot.screened_bytes = form_.row_bytes;
        }
    }

    // ---- steps

    void enqueue(const Step& step) {
        const Slot& slot = layout_.slots[step.slot];
        clear_losses(step, step.ring);
        screen(step, 0, slot.rows, nullptr, nullptr);
        refine_step(step, step.ring);
        fetch_losses(step.ring);
        finished_[step.ring].record(stream_);
    }

    // Waits for a step, and screens again what lost candidates.
    void finish(const Step& step) {
        finished_[step.ring].wait();
        if (host_losses_[step.ring] != 0) {
            std::uint8_t* only = layout_.only;
            keep_losers(step, step.ring, only);
            screen_halves(step, 0, layout_.slots[step.slot].rows, 0);
        }
        done_ += std::int64_t{step.queries} * layout_.slots[step.slot].rows;
        poll();
    }

    // Screens rows [begin, end) of a chunk again, in halves, for the queries marked at this level.
    // A half of at most `capacity` rows loses nothing, so this ends.
    void screen_halves(const Step& step, int begin, int end, int level) {
        std::uint8_t* only = layout_.only + std::int64_t{level} * layout_.query_block;
        std::uint8_t* tiles =
            layout_.active_tiles + level * (layout_.query_block / kTileQueries);
        const int tile_count = (step.queries + kTileQueries - 1) / kTileQueries;
        launch(mark_tiles, (tile_count + 63) / 64, 64, 0, stream_, step.queries, only, tiles);
        launched();
        const int middle =
            begin + static_cast<int>(round_up((end - begin + 1) / 2, kRangeRows));
        for (const auto& [from, to] : {std::pair(begin, std::min(middle, end)),
                                       std::pair(middle, end)}) {
            if (from >= to) continue;
            clear_losses(step, kSlots);
            screen(step, from, to, only, tiles);
            refine_step(step, kSlots);
            fetch_losses(kSlots);
            check(cudaStreamSynchronize(stream_), "running the kernels");
            poll();
            if (host_losses_[kSlots] != 0) {
                keep_losers(step, kSlots, only + layout_.query_block);
                screen_halves(step, from, to, level + 1);
            }
        }
    }

    void clear_losses(const Step& step, int ring) {
        clear(layout_.losses[ring], 0,
              static_cast<std::int64_t>(sizeof(unsigned)) + step.queries, stream_);
    }

    void fetch_losses(int ring) {
        copy(host_losses_ + ring, layout_.losses[ring], sizeof(unsigned), cudaMemcpyDeviceToHost,
             stream_);
    }

    void keep_losers(const Step& step, int ring, std::uint8_t* only) {
        copy(only, layout_.losses[ring] + 1, step.queries, cudaMemcpyDeviceToDevice, stream_);
    }

    void screen(const Step& step, int begin, int end, const std::uint8_t* only,
                const std::uint8_t* active_tiles) {
        const Slot& slot = layout_.slots[step.slot];
        ScreenProblem p{};
        p.queries = step.queries;
        p.bank_rows = end - begin;
        p.steps = form_.row_bytes / kStepBytes;
        p.query_data = layout_.packed_queries.data + step.query * form_.row_bytes;
        p.query_stride = form_.row_bytes;
        p.bank_data = slot.screened + begin * slot.screened_stride;
        p.bank_stride = slot.screened_stride;
        p.row_bytes = slot.screened_bytes;
        p.query_meta = layout_.packed_queries.meta + step.query;
        const Packed rows = form_.part(slot.packed, begin);
        p.bank_meta = rows.meta;
        p.group_norm = rows.group_norm;
        p.group_residual = rows.group_residual;
        p.cuts = layout_.cuts + step.query;
        p.only = only;
        p.active_tiles = active_tiles;
        p.counts = layout_.counts + step.query;
        p.candidates = layout_.candidates;
        p.capacity = layout_.capacity;
        p.first_row = begin;
        p.certified = problem_.exact;
        p.slack = slack_;
        const int query_tiles = (p.queries + kTileQueries - 1) / kTileQueries;
        if (problem_.path == "hopper") {
            const TensorMap queries = tensor_map(p.query_data, form_.row_bytes, p.queries,
                                                 p.query_stride, kTileQueries);
            const TensorMap bank = tensor_map(p.bank_data, p.row_bytes, p.bank_rows, p.bank_stride,
                                              HopperShape::tile_rows);
            const int tiles = query_tiles * tiles_of(p.bank_rows, HopperShape::tile_rows);
            const auto kernel = form_.screen == Screen::bf16 ? screen_hopper<Screen::bf16>
                                                             : screen_hopper<Screen::int8>;
            launch(kernel, std::min(tiles, processors_), HopperShape::threads,
                   HopperShape::shared_bytes, stream_, queries, bank, p);
        } else if (problem_.path == "mma") {
            launch(mma_kernel<256>(), query_tiles * tiles_of(p.bank_rows, 256),
                   MmaShape<256>::threads, MmaShape<256>::shared_bytes, stream_, p);
        } else {
            launch(mma_kernel<128>(), query_tiles * tiles_of(p.bank_rows, 128),
                   MmaShape<128>::threads, MmaShape<128>::shared_bytes, stream_, p);
        }
        launched();
    }

    void refine_step(const Step& step, int ring) {
        const Slot& slot = layout_.slots[step.slot];
        const std::int64_t k = problem_.k, query = first_query_ + step.query;
        RefineProblem p{};
        p.queries = source_of(problem_.queries, query);
        p.bank = slot.source;
        p.D = static_cast<int>(problem_.bank.columns);
        p.k = static_cast<int>(k);
        p.capacity = layout_.capacity;
        p.certified = problem_.exact;
        p.slack = slack_;
        p.query_meta = layout_.packed_queries.meta + step.query;
        p.bank_meta = slot.packed.meta;
        p.counts = layout_.counts + step.query;
        p.candidates = layout_.candidates;
        p.cuts = layout_.cuts + step.query;
        p.filled = layout_.filled + step.query;
        p.ids = problem_.ids + query * k;
        p.scores = problem_.scores + query * k;
        p.first_id = slot.first;
        p.losses = layout_.losses[ring];
        launch(refine, step.queries, kRefineThreads,
               static_cast<std::size_t>(refine_shared_bytes(p.capacity, p.k, p.D)), stream_, p);
        launched();
    }

    // ---- launches

    using MmaKernel = void (*)(const ScreenProblem);

    template <int tile_rows>
    MmaKernel mma_kernel() const {
        return form_.screen == Screen::bf16 ? screen_mma<Screen::bf16, tile_rows>
                                            : screen_mma<Screen::int8, tile_rows>;
    }

    static int tiles_of(int rows, int tile_rows) { return (rows + tile_rows - 1) / tile_rows; }

    void allow_shared_memory() const {
        const auto allow = [](auto kernel, int bytes) {
            check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
                  "asking for shared memory");
        };
        if (problem_.path == "hopper") {
            allow(screen_hopper<Screen::bf16>, HopperShape::shared_bytes);
            allow(screen_hopper<Screen::int8>, HopperShape::shared_bytes);
        } else if (problem_.path == "mma") {
            allow(mma_kernel<256>(), MmaShape<256>::shared_bytes);
        } else {
            allow(mma_kernel<128>(), MmaShape<128>::shared_bytes);
        }
        allow(refine, refine_shared_bytes(layout_.capacity, static_cast<int>(problem_.k),
                                          static_cast<int>(problem_.bank.columns)));
    }

    void poll() const {
        if (!progress_(done_, total_)) throw Stopped{};
    }

  public:
    static std::int64_t staging_piece_bytes(const CudaTopkProblem& problem, const Layout& layout) {
        return round_up(std::max(problem.limits.staging_bytes, layout.raw_stride), 256);
    }

  private:
    const CudaTopkProblem& problem_;
    const CudaProgress& progress_;
    Layout layout_;
    const Form& form_ = layout_.form;
    const Ahead ahead_;
    cudaStream_t stream_;
    const std::int64_t total_;
    const int processors_;
    std::int64_t done_ = 0;
    std::int64_t first_query_ = 0;
    float slack_ = 0;
    bool bank_pinned_ = false;
    char* staging_ = nullptr;
    unsigned* host_losses_ = nullptr;  // pinned, [kSlots + 1]
    int pieces_ = 0;
    std::vector<std::pair<std::int64_t, int>> chunks_;  // first row and rows
    Event finished_[kSlots];
    Event copied_[kSlots];
    Event piece_copied_[2];
    Event packed_;
    Stream copies_;
    Stream packing_;
    std::future<void> staged_;
    CudaTopkOutcome outcome_;
};

}  // namespace cuda

std::vector<std::string> topk_cuda_paths(int device) {
    const cuda::OnDevice on_device(device);
    int major = 0, minor = 0, shared = 0;
    cuda::check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
                "asking for the compute capability");
    cuda::check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device),
                "asking for the compute capability");
    cuda::check(
        cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "asking for the shared memory");
    std::vector<std::string> paths;
    if (major < 8) return paths;
    if (major == 9 && minor == 0 && cuda::has_tensor_maps() && cuda::has_hopper_code())
        paths.emplace_back("hopper");
    if (shared >= cuda::MmaShape<256>::shared_bytes) paths.emplace_back("mma");
    if (shared >= cuda::MmaShape<128>::shared_bytes) paths.emplace_back("mma128");
    return paths;
}

CudaTopkMemory topk_cuda_memory(const CudaTopkProblem& problem) {
    const cuda::Layout layout(problem);
    const std::int64_t staging =
        problem.bank_on_host ? 2 * cuda::Search::staging_piece_bytes(problem, layout) : 0;
    return {layout.bytes, 256 + staging};
}

std::int64_t topk_cuda_packed_bytes(const CudaMatrix& bank, const std::string& screen) {
    return cuda::Ahead(cuda::Form(bank, false, screen), bank.rows, nullptr).bytes;
}

std::int64_t topk_cuda_pack(const CudaMatrix& bank, const std::string& screen, int device,
                            std::uintptr_t given_stream, void* packed) {
    constexpr std::int64_t most = 1 << 30;  // rows of a launch
    const cuda::OnDevice on_device(device);
    const auto stream = reinterpret_cast<cudaStream_t>(given_stream);
    const cuda::Form form(bank, false, screen);
    const cuda::Ahead ahead(form, bank.rows, packed);
    unsigned long long unrankable;
    cuda::clear(ahead.unrankable, 0xff, sizeof unrankable, stream);
    for (std::int64_t first = 0; first < bank.rows; first += most)
        form.pack(cuda::source_of(bank, first), first,
                  static_cast<int>(std::min(most, bank.rows - first)),
                  form.part(ahead.packed, first), ahead.unrankable, cuda::processors_of(device),
                  stream);
    cuda::copy(&unrankable, ahead.unrankable, sizeof unrankable, cudaMemcpyDeviceToHost, stream);
    cuda::check(cudaStreamSynchronize(stream), "packing");
    return static_cast<std::int64_t>(unrankable);  // all ones: -1
}

CudaTopkOutcome topk_cuda(const CudaTopkProblem& problem, const CudaProgress& progress) {
    CudaTopkOutcome stopped;
    stopped.finished = false;
    if (problem.queries.rows == 0) return {};
    const cuda::OnDevice on_device(problem.device);
    cuda::Search search(problem, progress);
    try {
        return search.run();
    } catch (const cuda::Stopped&) {
        return stopped;
    }
}

}  // namespace pymcip
