#include "ranks.hpp"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "topk_kernel.hpp"
#include "topk_rows.hpp"
#include "topk_team.hpp"

namespace pymcip {
namespace {

constexpr std::int64_t kStrip = 256;  // products at a time: they and their places stay in L1
constexpr std::int64_t kFew = 24;     // asked for by a query: counting them beats halving
constexpr int kCopies = 4;            // of the counts of few: one would wait for its last increment

const Kernel& scoring_kernel() {
    for (const Kernel* kernel : {kernel_avx512_vnni(), kernel_avx2()})
        if (kernel != nullptr) return *kernel;
    return *kernel_portable();
}

typedef float Floats __attribute__((vector_size(16)));
typedef std::int32_t Ints __attribute__((vector_size(16)));
constexpr int kVectors = 4;  // of products against each bound: their counts stay in registers

// places[j]: how many of `above` [count] the product j does not exceed. NaN exceeds none.
void place_few(const float* products, std::int64_t length, const float* above, std::int64_t count,
               std::int32_t* places) {
    const std::int32_t all = static_cast<std::int32_t>(count);
    std::int64_t j = 0;
    for (; j + 4 * kVectors <= length; j += 4 * kVectors) {
        Floats own[kVectors];
        Ints found[kVectors];
        std::memcpy(own, products + j, sizeof own);
        for (Ints& vector : found) vector = Ints{all, all, all, all};
        for (std::int64_t asked = 0; asked < count; ++asked) {
            const float bound = above[asked];
            const Floats bounds = {bound, bound, bound, bound};
            for (int i = 0; i < kVectors; ++i) found[i] += own[i] > bounds;  // -1 where it is
        }
        std::memcpy(places + j, found, sizeof found);
    }
    for (; j < length; ++j) {
        places[j] = all;
        for (std::int64_t asked = 0; asked < count; ++asked) places[j] -= products[j] > above[asked];
    }
}

void place_many(const float* products, std::int64_t length, const float* above, std::int64_t count,
                std::int32_t* places) {
    std::fill_n(places, length, 0);
    std::int64_t left = count;
    for (; left > 1; left -= left / 2) {
        const std::int32_t half = static_cast<std::int32_t>(left / 2);
        for (std::int64_t j = 0; j < length; ++j)
            places[j] += half * !(products[j] > above[places[j] + half - 1]);  // without a branch
    }
    for (std::int64_t j = 0; j < length; ++j) places[j] += !(products[j] > above[places[j]]);
}

struct Space {
    explicit Space(std::int64_t columns)
        : query(allocate<float>(columns)), row(allocate<float>(columns)) {}
    Buffer<float> query, row;
    std::vector<std::int32_t> unclear;
    std::int32_t places[kStrip];
};

// The first of the rows asked for, in order, that a row with this score and number comes before.
std::int64_t place_exactly(float score, std::int64_t id, const float* scores,
                           const std::int64_t* ids, std::int64_t first, std::int64_t last) {
    while (first < last) {
        const std::int64_t middle = first + (last - first) / 2;
        const bool before =
            score > scores[middle] || (score == scores[middle] && id < ids[middle]);
        if (before)
            last = middle;
        else
            first = middle + 1;
    }
    return first;
}

void count_query(const Kernel& kernel, const float* products, const Matrix& queries,
                 const Matrix& bank, std::int64_t query, std::int64_t first, const Asked& asked,
                 Space& space) {
    const std::int64_t start = asked.starts[query], count = asked.starts[query + 1] - start;
    if (count == 0) return;
    const float *above = asked.above + start, *below = asked.below + start;
    std::int64_t few[kCopies][kFew + 1] = {};
    space.unclear.clear();
    for (std::int64_t strip = 0; strip < bank.rows; strip += kStrip) {
        const std::int64_t length = std::min(kStrip, bank.rows - strip);
        const float* own = products + strip;
        std::int32_t* places = space.places;
        const auto unclear = [&](std::int64_t j) {
            return places[j] > 0 && !(own[j] < below[places[j] - 1]);
        };
        if (count <= kFew) {
            place_few(own, length, above, count, places);
            for (std::int64_t j = 0; j < length; ++j) {
                if (unclear(j))
                    space.unclear.push_back(static_cast<std::int32_t>(strip + j));
                else
                    ++few[j % kCopies][places[j]];
            }
        } else {
            place_many(own, length, above, count, places);
            for (std::int64_t j = 0; j < length; ++j) {
                if (unclear(j))
                    space.unclear.push_back(static_cast<std::int32_t>(strip + j));
                else if (places[j] < count)
                    ++asked.counts[start + places[j]];
            }
        }
    }
    if (count <= kFew)
        for (std::int64_t place = 0; place < count; ++place)
            for (const auto& copy : few) asked.counts[start + place] += copy[place];
    if (space.unclear.empty()) return;
    const float* left = row_floats(kernel, queries, query, space.query.get());
    for (std::size_t i = 0; i < space.unclear.size(); ++i) {
        const std::int64_t row = space.unclear[i];
        if (i + 1 < space.unclear.size()) prefetch_row(bank, space.unclear[i + 1]);
        const float score =
            kernel.score(left, row_floats(kernel, bank, row, space.row.get()), bank.columns);
        const std::int64_t place =
            place_exactly(score, first + row, asked.scores, asked.ids, start, start + count);
        if (place < start + count) ++asked.counts[place];
    }
}

}  // namespace

void ranks_count(const float* products, std::int64_t stride, const Matrix& queries,
                 const Matrix& bank, std::int64_t first, const Asked& asked, int threads) {
    constexpr std::int64_t kLeast = 1 << 18;  // products: fewer are not worth a thread
    const Kernel& kernel = scoring_kernel();
    const Progress unwatched = [](std::int64_t, std::int64_t) { return true; };
    const bool alone = threads == 1 || queries.rows * bank.rows < kLeast;
    Team team(threads, alone, unwatched, queries.rows);
    std::vector<Space> spaces;
    spaces.reserve(static_cast<std::size_t>(team.threads()));
    for (int worker = 0; worker < team.threads(); ++worker) spaces.emplace_back(bank.columns);
    team.each(queries.rows, [&](int worker, std::int64_t query) {
        count_query(kernel, products + query * stride, queries, bank, query, first, asked,
                    spaces[static_cast<std::size_t>(worker)]);
    });
}

}  // namespace pymcip
