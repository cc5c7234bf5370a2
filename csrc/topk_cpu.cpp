// Portable back end of top-k on the CPU; the contract is in topk.hpp.
//
// A register tile is a few queries times a few vectors of bank rows. Both are packed with d
// outermost, so that one step over d loads consecutive floats of the bank and broadcasts
// consecutive queries. Queries are taken in blocks that stay in the L2 cache while the bank streams
// past once per block. Scores never reach memory as a matrix: each tile is compared with its
// queries' cuts (the threshold, or the k-th best so far) and thrown away.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstring>
#include <exception>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <system_error>
#include <thread>

#include "topk.hpp"

namespace pymcip {
namespace {

constexpr std::int64_t kQueryBlockBytes = 1 << 20;  // packed queries of a block: half of a 2 MiB L2
constexpr std::int64_t kChunkBytes = 512 << 10;     // packed bank rows between two looks at `stop`
constexpr std::int64_t kBlockHits = 1 << 18;        // k times the queries of a block
constexpr std::int64_t kInlineProducts = 1 << 21;   // below this a thread costs more than it saves
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// ------------------------------------------------------------------------------------------------
// Kernels. Each is one function with its own instruction set; the rest of this file is baseline
// code. They use the vector extension of GCC and Clang and nothing of the standard library, whose
// inline functions, once compiled for a newer instruction set, could be the copies that the linker
// keeps.

// out[query][row] = sum over d of queries[d][query] * rows[d][row]
using ScoreTile = void (*)(const float* queries, const float* rows, std::int64_t depth, float* out);

template <int Queries, int Vectors, int Lanes>
__attribute__((always_inline)) inline void score_tile(const float* __restrict queries,
                                                      const float* __restrict rows,
                                                      std::int64_t depth, float* __restrict out) {
    typedef float Vector __attribute__((vector_size(Lanes * sizeof(float)), may_alias));
    Vector sum[Queries][Vectors];
#pragma GCC unroll 16
    for (int query = 0; query < Queries; ++query)
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) sum[query][v] = Vector{};
    for (std::int64_t d = 0; d < depth; ++d) {
        const Vector* row = reinterpret_cast<const Vector*>(rows + d * Vectors * Lanes);
#pragma GCC unroll 16
        for (int query = 0; query < Queries; ++query) {
            const float value = queries[d * Queries + query];
#pragma GCC unroll 4
            for (int v = 0; v < Vectors; ++v) sum[query][v] += value * row[v];
        }
    }
#pragma GCC unroll 16
    for (int query = 0; query < Queries; ++query)
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v)
            reinterpret_cast<Vector*>(out)[query * Vectors + v] = sum[query][v];
}

struct Kernel {
    const char* name;
    int queries;  // of a tile
    int rows;
    ScoreTile score;
};

constexpr int kMostTileScores = 12 * 32;

#if defined(__x86_64__)
__attribute__((target("avx512f"))) void score_avx512f(const float* queries, const float* rows,
                                                      std::int64_t depth, float* out) {
    score_tile<12, 2, 16>(queries, rows, depth, out);
}
__attribute__((target("avx2,fma"))) void score_avx2(const float* queries, const float* rows,
                                                    std::int64_t depth, float* out) {
    score_tile<6, 2, 8>(queries, rows, depth, out);
}
#endif

// 16 registers of 4 floats on x86-64's baseline; 32 on AArch64, where 6 x 4 would fit as well.
void score_baseline(const float* queries, const float* rows, std::int64_t depth, float* out) {
    score_tile<6, 2, 4>(queries, rows, depth, out);
}

std::vector<Kernel> kernels() {
    std::vector<Kernel> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f")) found.push_back({"avx512f", 12, 32, score_avx512f});
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        found.push_back({"avx2", 6, 16, score_avx2});
#endif
    found.push_back({"baseline", 6, 8, score_baseline});
    return found;
}

// ------------------------------------------------------------------------------------------------
// Packing

struct AlignedDelete {
    void operator()(float* data) const { ::operator delete[](data, std::align_val_t(64)); }
};
using Floats = std::unique_ptr<float[], AlignedDelete>;

Floats allocate(std::int64_t count) {
    const auto bytes = static_cast<std::size_t>(count) * sizeof(float);
    return Floats(static_cast<float*>(::operator new[](bytes, std::align_val_t(64))));
}

float from_bits(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

template <Scalar scalar>
float widen(const void* data, std::int64_t index) {
    if constexpr (scalar == Scalar::float32) return static_cast<const float*>(data)[index];
    const std::uint32_t half = static_cast<const std::uint16_t*>(data)[index];
    if constexpr (scalar == Scalar::bfloat16) return from_bits(half << 16);
    const std::uint32_t sign = (half & 0x8000u) << 16;
    const std::uint32_t magnitude = (half & 0x7fffu) << 13;
    // Rebias the exponent by 112. A subnormal half lacks the implicit one: give it one, and
    // subtract it as a float, which is exact.
    const std::uint32_t normal = magnitude + (112u << 23);
    const float subnormal = from_bits(magnitude + (113u << 23)) - from_bits(113u << 23);
    std::uint32_t subnormal_bits;
    std::memcpy(&subnormal_bits, &subnormal, sizeof subnormal_bits);
    return from_bits(sign | ((half & 0x7c00u) != 0 ? normal : subnormal_bits));
}

// Rows first .. first + count - 1 as panels of `width` rows, d outermost; zeros fill the last
// panel.
template <Scalar scalar>
void pack_as(const Matrix& matrix, std::int64_t first, std::int64_t count, int width, float* out) {
    constexpr std::int64_t step = 16;  // a cache line of floats at a time from each row
    const std::int64_t depth = matrix.columns;
    for (std::int64_t panel = 0; panel < count; panel += width, out += depth * width) {
        const std::int64_t filled = std::min<std::int64_t>(width, count - panel);
        for (std::int64_t start = 0; start < depth; start += step) {
            const std::int64_t end = std::min(start + step, depth);
            for (std::int64_t row = 0; row < filled; ++row) {
                const std::int64_t origin = (first + panel + row) * matrix.row_stride;
                for (std::int64_t d = start; d < end; ++d)
                    out[d * width + row] =
                        widen<scalar>(matrix.data, origin + d * matrix.column_stride);
            }
            for (std::int64_t row = filled; row < width; ++row)
                for (std::int64_t d = start; d < end; ++d) out[d * width + row] = 0;
        }
    }
}

void pack(const Matrix& matrix, std::int64_t first, std::int64_t count, int width, float* out) {
    switch (matrix.scalar) {
        case Scalar::float32: return pack_as<Scalar::float32>(matrix, first, count, width, out);
        case Scalar::float16: return pack_as<Scalar::float16>(matrix, first, count, width, out);
        case Scalar::bfloat16: return pack_as<Scalar::bfloat16>(matrix, first, count, width, out);
    }
}

// ------------------------------------------------------------------------------------------------
// Selection

struct Hit {
    float score;
    std::int64_t id;
};

bool better(const Hit& a, const Hit& b) {
    return a.score > b.score || (a.score == b.score && a.id < b.id);
}

// The best hits of a block of queries among the bank rows seen so far: per query a heap whose root
// is the worst of the k. `cuts` screens: a score below a query's cut can't enter. The insertion
// decides.
class Best {
  public:
    Best(std::int64_t queries, std::int64_t k, float threshold)
        : k_(k),
          threshold_(threshold),
          hits_(new Hit[static_cast<std::size_t>(queries * k)]),
          counts_(static_cast<std::size_t>(queries)),
          cuts_(static_cast<std::size_t>(queries)) {
        clear();
    }

    void clear() {
        std::fill(counts_.begin(), counts_.end(), 0);
        std::fill(cuts_.begin(), cuts_.end(), threshold_);
    }

    const float* cuts() const { return cuts_.data(); }
    const Hit* hits(std::int64_t query) const { return hits_.get() + query * k_; }
    std::int64_t count(std::int64_t query) const {
        return counts_[static_cast<std::size_t>(query)];
    }

    void insert(std::int64_t query, const Hit& hit) {
        const auto index = static_cast<std::size_t>(query);
        Hit* heap = hits_.get() + query * k_;
        if (counts_[index] < k_) {
            heap[counts_[index]++] = hit;
            std::push_heap(heap, heap + counts_[index], better);
        } else if (better(hit, heap[0])) {
            replace_root(heap, hit);
        }
        if (counts_[index] == k_)  // a later row with an equal score has a higher id: it loses
            cuts_[index] = std::max(threshold_, std::nextafter(heap[0].score, kInfinity));
    }

  private:
    void replace_root(Hit* heap, const Hit& hit) const {
        std::int64_t hole = 0;
        for (std::int64_t child = 1; child < k_; child = 2 * hole + 1) {
            if (child + 1 < k_ && better(heap[child], heap[child + 1])) ++child;
            if (better(heap[child], hit)) break;
            heap[hole] = heap[child];
            hole = child;
        }
        heap[hole] = hit;
    }

    std::int64_t k_;
    float threshold_;
    std::unique_ptr<Hit[]> hits_;
    std::vector<std::int64_t> counts_;
    std::vector<float> cuts_;
};

// ------------------------------------------------------------------------------------------------
// The search

class Search {
  public:
    Search(const Matrix& queries, const Matrix& bank, std::int64_t k, float threshold, int threads,
           const Kernel& kernel, std::int64_t* ids, float* scores, const Progress& progress)
        : queries_(queries),
          bank_(bank),
          k_(k),
          kept_(std::min(k, bank.rows)),
          threshold_(threshold),
          kernel_(kernel),
          ids_(ids),
          scores_(scores),
          progress_(progress),
          total_(queries.rows * bank.rows) {
        const std::int64_t row_bytes = bank.columns * static_cast<std::int64_t>(sizeof(float));
        const auto whole_tiles = [](std::int64_t count, int tile) {
            return std::max<std::int64_t>(count / tile, 1) * tile;
        };
        block_ =
            whole_tiles(std::min(kQueryBlockBytes / row_bytes, kBlockHits / kept_), kernel.queries);
        chunk_ = whole_tiles(kChunkBytes / row_bytes, kernel.rows);
        const bool small = total_ < kInlineProducts / bank.columns;
        threads_ = small ? 1 : std::max(threads, 1);
        inline_ = small;
    }

    bool run() {
        const std::int64_t blocks = (queries_.rows + block_ - 1) / block_;
        if (blocks >= 8 * threads_) {
            blocks_to_threads(blocks);
        } else {
            for (std::int64_t block = 0; block < blocks && !stop_; ++block)
                chunks_to_threads(block * block_);
        }
        return !stop_;
    }

  private:
    // Many queries: each thread takes whole blocks of them past the whole bank.
    void blocks_to_threads(std::int64_t blocks) {
        std::atomic<std::int64_t> next_block{0};
        in_parallel(threads_, [&] {
            Floats packed = allocate(block_ * bank_.columns);
            Floats rows = allocate(chunk_ * bank_.columns);
            Best best(block_, kept_, threshold_);
            std::vector<Hit> merged;
            for (std::int64_t block; (block = next_block++) < blocks && !stop_;) {
                const std::int64_t first = block * block_;
                const std::int64_t count = std::min(block_, queries_.rows - first);
                pack(queries_, first, count, kernel_.queries, packed.get());
                best.clear();
                for (std::int64_t row = 0; row < bank_.rows && !stop_; row += chunk_)
                    scan(packed.get(), count, row, rows.get(), best);
                for (std::int64_t query = 0; query < count; ++query) {
                    merged.assign(best.hits(query), best.hits(query) + best.count(query));
                    write(first + query, merged);
                }
            }
        });
    }

    // Few queries: the threads share the bank, a chunk at a time, and their bests are merged.
    void chunks_to_threads(std::int64_t first) {
        const std::int64_t count = std::min(block_, queries_.rows - first);
        const std::int64_t tiles = (count + kernel_.queries - 1) / kernel_.queries;
        Floats packed = allocate(tiles * kernel_.queries * bank_.columns);
        pack(queries_, first, count, kernel_.queries, packed.get());

        const std::int64_t chunks = (bank_.rows + chunk_ - 1) / chunk_;
        const int workers = static_cast<int>(std::min<std::int64_t>(threads_, chunks));
        std::atomic<std::int64_t> next_chunk{0};
        std::vector<std::unique_ptr<Best>> bests;
        std::mutex bests_mutex;
        in_parallel(workers, [&] {
            Floats rows = allocate(chunk_ * bank_.columns);
            auto best = std::make_unique<Best>(count, kept_, threshold_);
            for (std::int64_t chunk; (chunk = next_chunk++) < chunks && !stop_;)
                scan(packed.get(), count, chunk * chunk_, rows.get(), *best);
            const std::lock_guard<std::mutex> lock(bests_mutex);
            bests.push_back(std::move(best));
        });
        if (stop_) return;

        constexpr std::int64_t batch = 16;
        std::atomic<std::int64_t> next_query{0};
        in_parallel(static_cast<int>(std::min<std::int64_t>(workers, (count + batch - 1) / batch)),
                    [&] {
                        std::vector<Hit> merged;
                        for (std::int64_t start; (start = next_query.fetch_add(batch)) < count;)
                            for (std::int64_t query = start; query < std::min(start + batch, count);
                                 ++query) {
                                merged.clear();
                                for (const auto& best : bests)
                                    merged.insert(merged.end(), best->hits(query),
                                                  best->hits(query) + best->count(query));
                                write(first + query, merged);
                            }
                    });
    }

    // Offers a chunk of the bank to a block of packed queries.
    void scan(const float* packed, std::int64_t count, std::int64_t first_row, float* rows,
              Best& best) {
        const std::int64_t depth = bank_.columns;
        const std::int64_t row_count = std::min(chunk_, bank_.rows - first_row);
        pack(bank_, first_row, row_count, kernel_.rows, rows);
        alignas(64) float tile[kMostTileScores];
        for (std::int64_t query = 0; query < count; query += kernel_.queries) {
            const std::int64_t tile_queries =
                std::min<std::int64_t>(kernel_.queries, count - query);
            for (std::int64_t row = 0; row < row_count; row += kernel_.rows) {
                kernel_.score(packed + query * depth, rows + row * depth, depth, tile);
                const std::int64_t tile_rows =
                    std::min<std::int64_t>(kernel_.rows, row_count - row);
                for (std::int64_t i = 0; i < tile_queries; ++i) {
                    const float* line = tile + i * kernel_.rows;
                    const float cut = best.cuts()[query + i];
                    int admitted = 0;
                    for (std::int64_t j = 0; j < tile_rows; ++j) admitted |= line[j] >= cut;
                    if (admitted == 0) continue;
                    for (std::int64_t j = 0; j < tile_rows; ++j)
                        if (line[j] >= best.cuts()[query + i])
                            best.insert(query + i, {line[j], first_row + row + j});
                }
            }
        }
        done_ += count * row_count;
    }

    void write(std::int64_t query, std::vector<Hit>& hits) const {
        const std::int64_t count =
            std::min<std::int64_t>(kept_, static_cast<std::int64_t>(hits.size()));
        std::partial_sort(hits.begin(), hits.begin() + count, hits.end(), better);
        std::int64_t* ids = ids_ + query * k_;
        float* scores = scores_ + query * k_;
        for (std::int64_t place = 0; place < k_; ++place) {
            ids[place] = place < count ? hits[static_cast<std::size_t>(place)].id : -1;
            scores[place] =
                place < count ? hits[static_cast<std::size_t>(place)].score : -kInfinity;
        }
    }

    // Runs `work` on `count` threads while this one reports progress; rethrows what one of them
    // threw.
    template <class Work>
    void in_parallel(int count, const Work& work) {
        if (inline_) return work();
        std::mutex mutex;
        std::condition_variable finished;
        int running = 0;
        std::exception_ptr failure;
        const auto body = [&] {
            std::exception_ptr thrown;
            try {
                work();
            } catch (...) {
                thrown = std::current_exception();
                stop_ = true;
            }
            const std::lock_guard<std::mutex> lock(mutex);
            if (thrown) failure = thrown;
            --running;
            finished.notify_one();
        };
        std::vector<std::thread> team;
        team.reserve(static_cast<std::size_t>(count));
        for (int i = 0; i < count; ++i) {
            {
                const std::lock_guard<std::mutex> lock(mutex);
                ++running;
            }
            try {
                team.emplace_back(body);
            } catch (const std::system_error&) {  // no more threads to be had: go on with these
                const std::lock_guard<std::mutex> lock(mutex);
                --running;
                break;
            }
        }
        if (team.empty()) return work();
        {
            std::unique_lock<std::mutex> lock(mutex);
            while (!finished.wait_for(lock, std::chrono::milliseconds(100),
                                      [&] { return running == 0; })) {
                lock.unlock();
                if (!stop_ && !progress_(done_, total_)) stop_ = true;
                lock.lock();
            }
        }
        for (std::thread& member : team) member.join();
        if (failure) std::rethrow_exception(failure);
    }

    const Matrix queries_;
    const Matrix bank_;
    const std::int64_t k_;
    const std::int64_t kept_;  // places that can be filled at all
    const float threshold_;
    const Kernel kernel_;
    std::int64_t* const ids_;
    float* const scores_;
    const Progress& progress_;
    const std::int64_t total_;
    std::int64_t block_;  // queries
    std::int64_t chunk_;  // bank rows
    int threads_;
    bool inline_;
    std::atomic<bool> stop_{false};
    std::atomic<std::int64_t> done_{0};
};

}  // namespace

std::vector<std::string> topk_cpu_kernels() {
    std::vector<std::string> names;
    for (const Kernel& kernel : kernels()) names.emplace_back(kernel.name);
    return names;
}

bool topk_cpu(const Matrix& queries, const Matrix& bank, std::int64_t k, float threshold,
              int threads, const std::string& kernel, std::int64_t* ids, float* scores,
              const Progress& progress) {
    if (queries.rows == 0 || bank.rows == 0) {
        std::fill(ids, ids + queries.rows * k, std::int64_t{-1});
        std::fill(scores, scores + queries.rows * k, -kInfinity);
        return true;
    }
    for (const Kernel& candidate : kernels())
        if (kernel == candidate.name)
            return Search(queries, bank, k, threshold, threads, candidate, ids, scores, progress)
                .run();
    throw std::invalid_argument("this machine has no top-k kernel called '" + kernel + "'");
}

}  // namespace pymcip
