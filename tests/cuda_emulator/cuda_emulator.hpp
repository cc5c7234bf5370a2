// Enough of CUDA, on one CPU core, to run csrc/topk_cuda.cu and its kernels as they are: blocks one
// after the other, the threads of a block as fibers that change over wherever CUDA threads would
// wait for one another. Instructions without a C++ name are the functions of csrc/topk_cuda_ptx.cuh,
// implemented here as the PTX ISA describes them (section names in quotes). Whatever is asynchronous is
// done as late as the instructions allow: a copy lands, and a wgmma reads its operands, only when
// somebody has waited for it. Warps get on at changing speeds. A block whose threads all wait for ever is reported and aborts.
//
// A tensor core adds a handful of products and the accumulator as fixed-point numbers aligned to the
// largest, with 23 bits below its leading one and no more, and cuts off what doesn't fit.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static
#define PYMCIP_HOPPER_CODE 1

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

// --------------------------------------------------------------------------------------------------
// Fibers

namespace emulator {

[[noreturn]] inline void fail(const char* what) {
    std::fprintf(stderr, "CUDA emulator: %s\n", what);
    std::abort();
}

struct WarpExchange {  // operations of all 32 lanes
    // By turns, so that fast lanes may begin the next operation; none can begin the next but one.
    unsigned char data[2][32][64];
    int arrived = 0;
    std::uint64_t generation = 0;
};

struct Barrier {
    int arrived = 0;
    std::uint64_t generation = 0;
};

struct Copy {  // to shared memory, on its way
    std::function<void()> run;
};

struct MBarrier {
    int expected = 0;
    int pending = 0;
    std::int64_t bytes = 0;
    unsigned phase = 0;
    bool used = false;
};

struct WgmmaGroup {
    std::vector<std::function<void()>> products;
};

struct Warpgroup {
    int arrived = 0;
    std::uint64_t generation = 0;
    void* sums[128];
    WgmmaGroup open;
    std::deque<WgmmaGroup> committed;
    std::uint64_t commits = 0;
    std::uint64_t retired = 0;
};

struct Thread {
    ucontext_t start;
    jmp_buf point;
    bool started = false, over = false;
    dim3 index;
    std::vector<char> stack;
    std::vector<std::vector<Copy>> groups;  // cp.async, committed
    std::vector<Copy> open;
    int commits = 0;  // wgmma groups committed by this thread
};

struct Block {
    std::vector<WarpExchange> warps;
    std::vector<Warpgroup> groups;
    Barrier barriers[16];
    std::map<std::uint32_t, MBarrier> mbarriers;
    std::deque<std::pair<int, std::function<void()>>> copies;  // by TMA: rounds to go, what to do
    int alive = 0;
};

inline std::vector<std::unique_ptr<Thread>> pool;
inline Block* block = nullptr;
inline Thread* thread = nullptr;
inline jmp_buf scheduler;
inline std::uint64_t chance = 1;
inline std::uint64_t progress = 0;  // anything that may end somebody's wait
inline std::function<void()> body;
inline dim3 grid_dim, block_dim, block_index;
alignas(1024) inline char shared_memory[256 * 1024];
inline std::size_t shared_bytes = 0;

inline void yield() {
    if (_setjmp(thread->point) == 0) _longjmp(scheduler, 1);
}

template <class Condition>
void wait_until(const Condition& condition) {
    while (!condition()) yield();
}

inline void enter() {
    body();
    thread->over = true;
    --block->alive;
    ++progress;
    _longjmp(scheduler, 1);
}

// Runs a thread until it waits or ends.
inline void resume(Thread& fiber) {
    thread = &fiber;
    if (_setjmp(scheduler) != 0) return;
    if (fiber.started) _longjmp(fiber.point, 1);
    fiber.started = true;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.data();
    fiber.start.uc_stack.ss_size = fiber.stack.size();
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, enter, 0);
    setcontext(&fiber.start);
}

inline void run_block(unsigned threads) {
    Block current;
    block = &current;
    current.alive = static_cast<int>(threads);
    current.warps.resize((threads + 31) / 32);
    current.groups.resize((threads + 127) / 128);
    while (pool.size() < threads) {
        pool.push_back(std::make_unique<Thread>());
        pool.back()->stack.resize(96 * 1024);
    }
    // What a block finds in shared memory is nobody's business; make it visible.
    std::memset(shared_memory, 0x7f, shared_bytes);
    for (unsigned i = 0; i < threads; ++i) {
        Thread& fiber = *pool[i];
        fiber.started = fiber.over = false;
        fiber.index = {i, 0, 0};
        fiber.groups.clear();
        fiber.open.clear();
        fiber.commits = 0;
    }
    int idle = 0;
    while (current.alive > 0) {
        // Warps get on at different speeds, in no order.
        const std::uint64_t before = progress;
        chance = chance * 6364136223846793005u + 1442695040888963407u;
        const std::uint32_t held_up = idle == 0 ? chance >> 32 & chance >> 40 : 0;
        const unsigned warps = (threads + 31) / 32, start = (chance >> 50) % warps;
        for (unsigned turn = 0; turn < warps; ++turn) {
            const unsigned warp = (start + turn) % warps;
            if (held_up >> warp & 1u) continue;
            for (unsigned i = 32 * warp; i < std::min(threads, 32 * warp + 32); ++i)
                if (!pool[i]->over) resume(*pool[i]);
        }
        for (std::size_t i = 0; i < current.copies.size();) {
            if (--current.copies[i].first > 0) {
                ++i;
                continue;
            }
            current.copies[i].second();
            current.copies.erase(current.copies.begin() + static_cast<std::ptrdiff_t>(i));
            ++progress;
        }
        idle = progress == before && current.copies.empty() ? idle + 1 : 0;
        if (idle > 3) fail("all threads of a block wait for one another");
    }
    if (!current.copies.empty()) fail("a block ended before its copies");
    for (const Warpgroup& group : current.groups)
        if (!group.committed.empty() || !group.open.products.empty())
            fail("a block ended before its products");
    block = nullptr;
}

inline WarpExchange& warp() { return block->warps[thread->index.x / 32]; }
inline int lane() { return static_cast<int>(thread->index.x % 32); }

// All lanes bring a value; then `use` sees them all.
template <class T, class Use>
void exchange(const T& mine, const Use& use) {
    static_assert(sizeof(T) <= 64);
    WarpExchange& all = warp();
    const std::uint64_t generation = all.generation;
    auto& data = all.data[generation % 2];
    std::memcpy(data[lane()], &mine, sizeof(T));
    if (++all.arrived == 32) {
        all.arrived = 0;
        ++all.generation;
        ++progress;
    } else {
        wait_until([&] { return all.generation != generation; });
    }
    use(data);
}

using Lanes = unsigned char (&)[32][64];

template <class T>
T value_of(Lanes lanes, int from) {
    T value;
    std::memcpy(&value, lanes[from], sizeof(T));
    return value;
}

inline void meet(Barrier& barrier, int count) {
    const std::uint64_t generation = barrier.generation;
    if (++barrier.arrived == count) {
        barrier.arrived = 0;
        ++barrier.generation;
        ++progress;
    } else {
        wait_until([&] { return barrier.generation != generation; });
    }
}

}  // namespace emulator

#define threadIdx (emulator::thread->index)
#define blockIdx (emulator::block_index)
#define blockDim (emulator::block_dim)
#define gridDim (emulator::grid_dim)

// --------------------------------------------------------------------------------------------------
// CUDA's own functions

template <class T>
T min(T a, T b) {
    return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
    return a < b ? b : a;
}

inline std::uint32_t __float_as_uint(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
inline float __uint_as_float(std::uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline int __float_as_int(float x) { return static_cast<int>(__float_as_uint(x)); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return __builtin_clz(static_cast<unsigned>(x)); }

inline void __syncthreads() {
    emulator::meet(emulator::block->barriers[0], static_cast<int>(emulator::block_dim.x));
}
inline void __syncwarp() {
    emulator::exchange(0, [](emulator::Lanes) {});
}

template <class T>
T __shfl_sync(unsigned, T x, int from) {
    T result{};
    emulator::exchange(x, [&](emulator::Lanes all) { result = emulator::value_of<T>(all, from); });
    return result;
}
template <class T>
T __shfl_xor_sync(unsigned, T x, int mask) {
    return __shfl_sync(0, x, emulator::lane() ^ mask);
}
template <class T>
T __shfl_down_sync(unsigned, T x, int by, int width) {
    const int lane = emulator::lane();
    return __shfl_sync(0, x, lane % width + by < width ? lane + by : lane);
}
inline unsigned __ballot_sync(unsigned, bool x) {
    unsigned result = 0;
    emulator::exchange(x, [&](emulator::Lanes all) {
        for (int i = 0; i < 32; ++i) result |= unsigned{emulator::value_of<bool>(all, i)} << i;
    });
    return result;
}
inline bool __any_sync(unsigned mask, bool x) { return __ballot_sync(mask, x) != 0; }
inline unsigned __match_any_sync(unsigned, int x) {
    unsigned result = 0;
    emulator::exchange(x, [&](emulator::Lanes all) {
        for (int i = 0; i < 32; ++i)
            result |= unsigned{emulator::value_of<int>(all, i) == x} << i;
    });
    return result;
}

template <class T>
T atomicAdd(T* place, T x) {
    const T before = *place;
    *place += x;
    return before;
}
inline unsigned long long atomicMin(unsigned long long* place, unsigned long long x) {
    const unsigned long long before = *place;
    *place = std::min(before, x);
    return before;
}
inline int atomicMax(int* place, int x) {
    const int before = *place;
    *place = std::max(before, x);
    return before;
}

// --------------------------------------------------------------------------------------------------
// The runtime. There is one device. The work of a stream is done in order and as late as that allows:
// when somebody waits for it; or, `eager`, work of streams that the program made is done at once, after
// what it has to wait for. So where an event is missing, either the stream that should have waited for it
// comes too early, or the one that should have been waited for too late.

namespace emulator {

inline std::recursive_mutex device;  // one thread of the host at a time
inline bool eager = false;

struct Stream {
    std::deque<std::function<void()>> work;
    std::uint64_t queued = 0, begun = 0;
    bool made = true;

    void finish(std::uint64_t count) {
        const std::lock_guard lock(device);
        while (begun < count) {
            const std::function<void()> next = std::move(work.front());
            work.pop_front();
            ++begun;
            next();
        }
    }
};

struct Event {
    Stream* stream = nullptr;  // null: never recorded, which counts as past
    std::uint64_t count = 0;

    void wait() const {
        if (stream) stream->finish(count);
    }
};

inline Stream default_stream{{}, 0, 0, false};

inline Stream& stream_of(Stream* stream) { return stream ? *stream : default_stream; }

inline int enqueue(Stream* given, std::function<void()> work) {
    const std::lock_guard lock(device);
    Stream& stream = stream_of(given);
    stream.work.push_back(std::move(work));
    ++stream.queued;
    if (stream.made && eager) stream.finish(stream.queued);
    return 0;
}

}  // namespace emulator

using cudaError_t = int;
using cudaStream_t = emulator::Stream*;
using cudaEvent_t = emulator::Event*;
enum { cudaSuccess = 0, cudaStreamNonBlocking, cudaEventDisableTiming };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount,
    cudaDevAttrComputeCapabilityMajor,
    cudaDevAttrComputeCapabilityMinor,
    cudaDevAttrMaxSharedMemoryPerBlockOptin
};
enum { cudaMemoryTypeHost = 1 };
enum { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaPointerAttributes {
    int type = 0;
};

inline const char* cudaGetErrorString(cudaError_t) { return "emulated error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    switch (attribute) {
        case cudaDevAttrMultiProcessorCount:
            *value = 3;  // so that persistent blocks get several tiles each
            break;
        case cudaDevAttrComputeCapabilityMajor:
            *value = 9;
            break;
        case cudaDevAttrComputeCapabilityMinor:
            *value = 0;
            break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin:
            *value = 227 * 1024;
            break;
    }
    return cudaSuccess;
}
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, int) {
    *stream = new emulator::Stream;
    return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    const std::lock_guard lock(emulator::device);
    emulator::stream_of(stream).finish(emulator::stream_of(stream).queued);
    return cudaSuccess;
}
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    if (!stream->work.empty()) emulator::fail("a stream was destroyed before its work was done");
    delete stream;
    return cudaSuccess;
}
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, int) {
    *event = new emulator::Event;
    return cudaSuccess;
}
inline cudaError_t cudaEventDestroy(cudaEvent_t event) {
    delete event;
    return cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    const std::lock_guard lock(emulator::device);
    *event = {&emulator::stream_of(stream), emulator::stream_of(stream).queued};
    return cudaSuccess;
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    event->wait();
    return cudaSuccess;
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, int) {
    return emulator::enqueue(stream, [event = *event] { event.wait(); });
}
inline cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* found, const void*) {
    const char* pinned = std::getenv("PYMCIP_EMULATE_PINNED");
    found->type = pinned ? cudaMemoryTypeHost : 0;
    return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, int, int bytes) {
    return bytes > 227 * 1024;
}
inline cudaError_t cudaMemsetAsync(void* place, int value, std::size_t bytes,
                                   cudaStream_t stream) {
    return emulator::enqueue(stream, [=] { std::memset(place, value, bytes); });
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind,
                                   cudaStream_t stream) {
    return emulator::enqueue(stream, [=] { std::memcpy(to, from, bytes); });
}
inline cudaError_t cudaMemcpy2DAsync(void* to, std::size_t to_stride, const void* from,
                                     std::size_t from_stride, std::size_t bytes, std::size_t rows,
                                     cudaMemcpyKind, cudaStream_t stream) {
    return emulator::enqueue(stream, [=] {
        for (std::size_t row = 0; row < rows; ++row)
            std::memcpy(static_cast<char*>(to) + row * to_stride,
                        static_cast<const char*>(from) + row * from_stride, bytes);
    });
}

// --------------------------------------------------------------------------------------------------
// csrc/topk_cuda_ptx.cuh

namespace pymcip::cuda {

struct TensorMap {
    const unsigned char* data;
    std::int64_t row_bytes, rows, stride;
    int box_rows;
};

inline bool has_tensor_maps() { return true; }
inline bool has_hopper_code() { return true; }

inline TensorMap tensor_map(const void* data, std::int64_t row_bytes, std::int64_t rows,
                            std::int64_t stride, int box_rows) {
    // Restrictions of cuTensorMapEncodeTiled.
    if (reinterpret_cast<std::uintptr_t>(data) % 16 || stride % 16 || box_rows > 256 || rows < 1)
        emulator::fail("a tensor map the driver would refuse");
    return {static_cast<const unsigned char*>(data), row_bytes, rows, stride, box_rows};
}

template <class Kernel, class... Arguments>
void launch(Kernel kernel, int blocks, int threads, std::size_t shared_bytes, cudaStream_t stream,
            const Arguments&... arguments) {
    if (shared_bytes > sizeof emulator::shared_memory || blocks < 1) emulator::fail("bad launch");
    emulator::enqueue(stream, [=] {
        emulator::shared_bytes = shared_bytes;
        emulator::grid_dim = {static_cast<unsigned>(blocks), 1, 1};
        emulator::block_dim = {static_cast<unsigned>(threads), 1, 1};
        emulator::body = [&] { kernel(arguments...); };
        for (unsigned index = 0; index < static_cast<unsigned>(blocks); ++index) {
            // Any order of blocks must do; this one is not the usual.
            emulator::block_index = {static_cast<unsigned>(blocks) - 1 - index, 0, 0};
            emulator::run_block(static_cast<unsigned>(threads));
        }
    });
}

// Exact, subnormals, infinities and NaNs included.
inline float half_to_float(std::uint16_t half) {
    const std::uint32_t sign = (half & 0x8000u) << 16, magnitude = half & 0x7fffu;
    if (magnitude >= 0x7c00u) return __uint_as_float(sign | 0x7f800000u | (magnitude << 13));
    if (magnitude >= 0x0400u) return __uint_as_float(sign | ((magnitude << 13) + (112u << 23)));
    const float value = static_cast<float>(magnitude) * (1.0f / (1 << 24));
    return sign ? -value : value;
}

inline char* dynamic_shared() { return emulator::shared_memory; }

inline std::uint32_t shared_address(const void* pointer) {
    return static_cast<std::uint32_t>(static_cast<const char*>(pointer) - emulator::shared_memory);
}

inline char* shared_place(std::uint32_t address, int alignment) {
    if (address % static_cast<unsigned>(alignment) || address >= emulator::shared_bytes)
        emulator::fail("a bad address of shared memory");
    return emulator::shared_memory + address;
}

inline void cp_async_16(std::uint32_t shared, const void* global, int bytes) {
    if (reinterpret_cast<std::uintptr_t>(global) % 16 || bytes < 0 || bytes > 16)
        emulator::fail("cp.async of unaligned data");
    char* place = shared_place(shared, 16);
    emulator::thread->open.push_back({[=] {
        std::memset(place, 0, 16);
        std::memcpy(place, global, static_cast<std::size_t>(bytes));
    }});
}

inline void cp_async_commit() {
    emulator::thread->groups.push_back(std::move(emulator::thread->open));
    emulator::thread->open.clear();
}

template <int pending>
void cp_async_wait() {
    auto& groups = emulator::thread->groups;
    while (groups.size() > pending) {
        for (const auto& copy : groups.front()) copy.run();
        groups.erase(groups.begin());
    }
}

inline void ldmatrix_x4(std::uint32_t (&r)[4], std::uint32_t shared) {
    shared_place(shared, 16);
    emulator::exchange(shared, [&](emulator::Lanes all) {
        const int lane = emulator::lane();
        for (int matrix = 0; matrix < 4; ++matrix) {
            const auto row = emulator::value_of<std::uint32_t>(all, 8 * matrix + lane / 4);
            std::memcpy(&r[matrix], emulator::shared_memory + row + lane % 4 * 4, 4);
        }
    });
}

// --- what a tensor core adds up

inline void accumulate(int& sum, const unsigned char* a, const unsigned char* b) {
    for (int k = 0; k < 32; ++k)
        sum += static_cast<signed char>(a[k]) * static_cast<signed char>(b[k]);
}

inline float bf16_at(const unsigned char* place) {
    std::uint16_t bits;
    std::memcpy(&bits, place, 2);
    return __uint_as_float(static_cast<std::uint32_t>(bits) << 16);
}

inline void accumulate(float& sum, const unsigned char* a, const unsigned char* b) {
    for (int start = 0; start < 16; start += 4) {  // the narrowest tensor core: four at a time
        float terms[5] = {sum};
        float most = std::fabs(sum);
        for (int k = 0; k < 4; ++k) {
            terms[k + 1] = bf16_at(a + 2 * (start + k)) * bf16_at(b + 2 * (start + k));
            most = std::fmax(most, std::fabs(terms[k + 1]));
        }
        if (most == 0.0f || !std::isfinite(most)) {
            for (int k = 1; k < 5; ++k) sum += terms[k];
            continue;
        }
        const std::uint32_t exponent = __float_as_uint(most) >> 23;
        if (exponent < 24) {  // nothing is cut off from numbers as small as that
            for (int k = 1; k < 5; ++k) sum += terms[k];
            continue;
        }
        // The largest has 24 bits: units of 2^(exponent - 127 - 23).
        const double unit = std::ldexp(1.0, static_cast<int>(exponent) - 150);
        double total = 0;
        for (const float term : terms) total += std::trunc(term / unit);
        double result = total * unit;
        float rounded = static_cast<float>(result);
        if (std::isfinite(rounded) && std::fabs(double{rounded}) > std::fabs(result))
            rounded = std::nextafter(rounded, 0.0f);
        sum = rounded;
    }
}

struct MmaOperands {
    std::uint32_t a[4], b[2];
};

template <class Sum>
void mma_any(Sum* c, const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
    emulator::exchange(MmaOperands{{a[0], a[1], a[2], a[3]}, {b0, b1}}, [&](emulator::Lanes all) {
        const int g = emulator::lane() / 4, t = emulator::lane() % 4;
        unsigned char row[32], column[32];
        for (int half = 0; half < 2; ++half)
            for (int e = 0; e < 2; ++e) {
                for (int lane = 0; lane < 4; ++lane) {
                    const auto of_row = emulator::value_of<MmaOperands>(all, 4 * g + lane);
                    std::memcpy(row + 4 * lane, &of_row.a[half], 4);
                    std::memcpy(row + 16 + 4 * lane, &of_row.a[half + 2], 4);
                    const auto of_column =
                        emulator::value_of<MmaOperands>(all, 4 * (2 * t + e) + lane);
                    std::memcpy(column + 4 * lane, &of_column.b[0], 4);
                    std::memcpy(column + 16 + 4 * lane, &of_column.b[1], 4);
                }
                accumulate(c[2 * half + e], row, column);
            }
    });
}
inline void mma(float* c, const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
    mma_any(c, a, b0, b1);
}
inline void mma(int* c, const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
    mma_any(c, a, b0, b1);
}

// --- "mbarrier": a phase completes when the expected threads have arrived and all bytes announced
// have been copied.

inline emulator::MBarrier& mbarrier(std::uint32_t address) {
    shared_place(address, 8);
    emulator::MBarrier& found = emulator::block->mbarriers[address];
    if (!found.used) emulator::fail("an mbarrier that nobody initialised");
    return found;
}
inline void mbarrier_advance(emulator::MBarrier& barrier) {
    if (barrier.pending == 0 && barrier.bytes == 0) {
        barrier.pending = barrier.expected;
        ++barrier.phase;
        ++emulator::progress;
    }
}
inline void mbarrier_init(std::uint32_t address, int arrivals) {
    shared_place(address, 8);
    emulator::block->mbarriers[address] = {arrivals, arrivals, 0, 0, true};
}
inline void mbarrier_init_done() {}
inline void mbarrier_arrive(std::uint32_t address) {
    emulator::MBarrier& barrier = mbarrier(address);
    if (--barrier.pending < 0) emulator::fail("too many arrivals at an mbarrier");
    ++emulator::progress;
    mbarrier_advance(barrier);
}
inline void mbarrier_arrive_expect(std::uint32_t address, int bytes) {
    mbarrier(address).bytes += bytes;
    mbarrier_arrive(address);
}
inline void mbarrier_wait(std::uint32_t address, std::uint32_t parity) {
    emulator::MBarrier& barrier = mbarrier(address);
    emulator::wait_until([&] { return barrier.phase % 2 != parity; });
}

// Swizzle<3, 4, 3>: bits 4 to 6 of an address are exchanged by its bits 7 to 9.
inline std::uint32_t swizzled(std::uint32_t address) {
    return address ^ (address >> 7 & 7u) << 4;
}

inline void tma_load(std::uint32_t shared, const TensorMap* map, std::uint32_t barrier, int column,
                     int row) {
    shared_place(shared, 1024);
    static int delay = 0;
    delay = delay % 3 + 1;
    emulator::block->copies.emplace_back(delay, [=, source = *map] {
        for (int line = 0; line < source.box_rows; ++line)
            for (int byte = 0; byte < 128; ++byte) {
                const bool inside =
                    row + line < source.rows && column + byte < source.row_bytes;
                emulator::shared_memory[swizzled(
                    shared + static_cast<std::uint32_t>(128 * line + byte))] =
                    inside ? static_cast<char>(source.data[(row + line) * source.stride + column + byte])
                           : char{0};
            }
        emulator::MBarrier& done = mbarrier(barrier);
        done.bytes -= 128 * source.box_rows;
        mbarrier_advance(done);
    });
}
inline void tma_prefetch_map(const TensorMap*) {}

inline void named_barrier(int barrier, int threads) {
    emulator::meet(emulator::block->barriers[barrier], threads);
}
template <int>
void raise_registers() {}
template <int>
void lower_registers() {}

// --- wgmma

inline emulator::Warpgroup& warpgroup() {
    return emulator::block->groups[emulator::thread->index.x / 128];
}

// Waits for the 128 threads; the last one does `last`.
template <class Last>
void meet_warpgroup(const Last& last) {
    emulator::Warpgroup& group = warpgroup();
    const std::uint64_t generation = group.generation;
    if (++group.arrived == 128) {
        group.arrived = 0;
        last(group);
        ++group.generation;
        ++emulator::progress;
    } else {
        emulator::wait_until([&] { return group.generation != generation; });
    }
}

inline void wgmma_begin() {}
template <class Sum, int count>
void hold(Sum (&)[count]) {}

inline void wgmma_commit() {
    ++emulator::thread->commits;
    meet_warpgroup([](emulator::Warpgroup& group) {
        group.committed.push_back(std::move(group.open));
        group.open.products.clear();
        ++group.commits;
    });
}

template <int pending>
void wgmma_wait() {
    emulator::Warpgroup& group = warpgroup();
    while (group.retired + pending < static_cast<std::uint64_t>(emulator::thread->commits)) {
        for (const auto& product : group.committed.front().products) product();
        group.committed.pop_front();
        ++group.retired;
    }
}

// "Matrix Descriptor Format" and "Strides" of K-major operands with the 128-byte swizzle: byte k of
// row r is at start + r / 8 * SBO + r % 8 * 128 + k, exchanged by the swizzle.
inline void operand_row(std::uint64_t descriptor, int row, unsigned char (&bytes)[32]) {
    if (descriptor >> 62 != 1 || (descriptor >> 49 & 7)) emulator::fail("a descriptor's swizzle");
    const std::uint32_t start = (descriptor & 0x3fff) << 4;
    const std::uint32_t stride = (descriptor >> 32 & 0x3fff) << 4;
    const std::uint32_t first =
        start + static_cast<std::uint32_t>(row / 8) * stride + static_cast<std::uint32_t>(row % 8 * 128);
    for (std::uint32_t k = 0; k < 32; ++k)
        bytes[k] = static_cast<unsigned char>(*shared_place(swizzled(first + k), 1));
}

template <class Sum>
void wgmma(Sum (&d)[128], std::uint64_t a, std::uint64_t b, bool add) {
    warpgroup().sums[emulator::thread->index.x % 128] = d;
    meet_warpgroup([=](emulator::Warpgroup& group) {
        std::vector<Sum*> sums;
        for (void* thread_sums : group.sums) sums.push_back(static_cast<Sum*>(thread_sums));
        group.open.products.push_back([=] {
            static unsigned char rows[64][32], columns[256][32];
            for (int row = 0; row < 64; ++row) operand_row(a, row, rows[row]);
            for (int column = 0; column < 256; ++column) operand_row(b, column, columns[column]);
            for (int thread = 0; thread < 128; ++thread) {
                const int row = thread / 32 * 16 + thread % 32 / 4, t = thread % 4;
                for (int i = 0; i < 128; ++i) {
                    Sum& sum = sums[static_cast<std::size_t>(thread)][i];
                    if (!add) sum = 0;
                    accumulate(sum, rows[row + i / 2 % 2 * 8],
                               columns[i / 4 * 8 + 2 * t + i % 2]);
                }
            }
        });
    });
}

}  // namespace pymcip::cuda
