// Candidates of queries, with bounds of their scores until these are known; for topk_cpu.cpp.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "topk.hpp"
#include "topk_kernel.hpp"
#include "topk_rows.hpp"

namespace pymcip {

constexpr float kCutRoundings = 0x1p-21f;           // relative: a dozen roundings and more
constexpr float kMostFloat = std::numeric_limits<float>::max();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// A packed part may come from a damaged file, so that any number in it may be anything: results are
// wrong then, but lists must keep their order and their bounds. Whatever the numbers are, no score is
// NaN, a bound from below is at most the bound from above, and only queries that exist get candidates.
inline float number_or_lowest(float score) { return std::isnan(score) ? -kInfinity : score; }

// Bounds of a score; equal once it is known. Screened scores of an inexact search count as known.
struct Candidate {
    float lower, upper;
    std::int64_t id;
};

inline bool known(const Candidate& candidate) { return candidate.lower == candidate.upper; }

inline bool better(const Candidate& a, const Candidate& b) {
    return a.lower > b.lower || (a.lower == b.lower && a.id < b.id);
}

struct Job {
    const Kernel& kernel;
    const Matrix& queries;
    const std::vector<Part>& bank;
    std::vector<std::int64_t> firsts;  // id of each part's first row, and the number of rows
    std::int64_t k;                    // places that can be filled at all
    std::int64_t capacity;             // candidates of a query: 4 k to 12 k, or all rows and one
    float threshold;
    bool exact;
    std::int64_t steps;                // of a packed row

    // Bytes of a packed row.
    std::int64_t width() const { return steps * kStep; }
    const Part& part_of(std::int64_t id, std::int64_t* row) const {
        const auto after = std::upper_bound(firsts.begin(), firsts.end() - 1, id);
        const auto part = static_cast<std::size_t>(after - firsts.begin()) - 1;
        *row = id - firsts[part];
        return bank[part];
    }
};

// Scores candidates exactly. One per thread.
class Scorer {
  public:
    explicit Scorer(const Job& job)
        : job_(job),
          query_(allocate<float>(job.queries.columns)),
          row_(allocate<float>(job.queries.columns)) {}

    // Scores those of candidates[0 .. count - 1] that are not known.
    void score(std::int64_t query, Candidate* candidates, std::int64_t count) {
        const float* left = nullptr;
        for (std::int64_t i = 0; i < count; ++i) {
            if (known(candidates[i])) continue;
            if (left == nullptr) {
                prefetch(candidates[i]);
                left = query_floats(query);
            }
            for (std::int64_t next = i + 1; next < std::min(i + 3, count); ++next)
                if (next > reached_ && !known(candidates[next])) {
                    prefetch(candidates[next]);
                    reached_ = next;
                }
            score_one(left, candidates[i]);
        }
        reached_ = 0;
    }

    // Scores one candidate, its query at hand.
    void score_one(const float* query, Candidate& candidate) {
        std::int64_t row;
        const Part& part = job_.part_of(candidate.id, &row);
        const float score = job_.kernel.score(
            query, row_floats(job_.kernel, part.rows, row, row_.get()), job_.queries.columns);
        candidate.lower = candidate.upper = number_or_lowest(score);
    }

    const float* query_floats(std::int64_t query) {
        return row_floats(job_.kernel, job_.queries, query, query_.get());
    }

    void prefetch(const Candidate& candidate) const {
        std::int64_t row;
        const Part& part = job_.part_of(candidate.id, &row);
        prefetch_row(part.rows, row);
    }

  private:
    const Job& job_;
    Buffer<float> query_, row_;
    std::int64_t reached_ = 0;
};

// A row that a screen admitted. Noting them and looking at many at once hides the time that their
// queries' lists take to arrive from the caches.
struct Hit {
    std::uint32_t query;  // of the block
    std::uint32_t row;    // of the stretch
    std::int32_t score;
};

// A block of queries, packed, with the candidates that one thread found among the rows it has seen.
class Block {
  public:
    Block(const Job& job, std::int64_t first, std::int64_t count)
        : job_(job),
          integers_(job.kernel.code_bytes == 1),
          first_(first),
          count_(count),
          padded_(divide_up(count, kPanel) * kPanel),
          screened_(allocate<float>(3 * padded_)),
          queries_(allocate<Query>(count)),
          candidates_(allocate<Candidate>(count * job.capacity)) {
        std::fill(residuals(), residuals() + 2 * padded_, 0.0f);
        std::fill(cuts(), cuts() + padded_, kInfinity);  // of the missing queries of the last panel
    }

    std::int64_t count() const { return count_; }

    void set_query(std::int64_t query, float unit, float residual, float norm) {
        if (!job_.exact) residual = norm = 0;  // the screen is taken at its word
        residuals()[query] = residual / unit;
        norms()[query] = norm / unit;
        queries_[static_cast<std::size_t>(query)] = {unit, residual, norm, 0, 0};
        raise(query, job_.threshold);
    }

    // Takes over the queries of a block and their cuts, but no candidates.
    void share(const Block& other) {
        std::copy(other.screened_.get(), other.screened_.get() + 3 * padded_, screened_.get());
        for (std::int64_t query = 0; query < count_; ++query) {
            at(query) = other.queries_[static_cast<std::size_t>(query)];
            at(query).count = 0;
        }
    }

    // Takes over the candidates that another block of the same queries has for one of them.
    void absorb(Scorer& scorer, std::int64_t query, Block& other) {
        for (std::int64_t i = 0; i < other.at(query).count; ++i)
            push(scorer, query, other.list(query)[i]);
        other.at(query).count = 0;
    }

    void raise(std::int64_t query, float cut) {
        at(query).cut = cut;
        // Without residuals nothing else covers the rounding of this cut and of a group's.
        const bool covered = job_.exact || std::isinf(cut);
        const float least = covered ? cut : cut - std::fabs(cut) * kCutRoundings;
        cuts()[query] = least / at(query).unit;
    }
    float cut(std::int64_t query) const { return queries_[static_cast<std::size_t>(query)].cut; }

    // How many of these bounds reach their query's cut.
    std::int64_t above_cut(const float* lowest, std::int64_t visits) const {
        std::int64_t above = 0;
        for (std::int64_t visit = 0; visit < visits; ++visit)
            for (std::int64_t query = 0; query < count_; ++query)
                above += lowest[visit * padded_ + query] >= cuts()[query];
        return above;
    }

    // A first cut from bounds of the best scores of `visits` groups: [visits, padded].
    void raise_from(const float* lowest, std::int64_t visits) {
        std::vector<float> column(static_cast<std::size_t>(visits));
        for (std::int64_t query = 0; query < count_; ++query) {
            for (std::int64_t visit = 0; visit < visits; ++visit)
                column[static_cast<std::size_t>(visit)] =
                    number_or_lowest(lowest[visit * padded_ + query]);
            const auto kth = column.begin() + (job_.k - 1);
            std::nth_element(column.begin(), kth, column.end(), std::greater<float>());
            const float bound = *kth * at(query).unit;
            const float lower = bound - std::fabs(bound) * kCutRoundings;
            if (lower > cut(query)) raise(query, lower);
        }
    }

    Screen screen(const std::uint8_t* panels) const {
        Screen screen{};
        screen.panels = panels;
        screen.panel_count = padded_ / kPanel;
        screen.steps = job_.steps;
        screen.residuals = residuals();
        screen.norms = norms();
        screen.cuts = cuts();
        return screen;
    }

    // Candidates among the rows of a stretch whose first row has the id `id` and whose groups have
    // these facts.
    void take(Scorer& scorer, const std::vector<Hit>& hits, std::int64_t id, const float* groups) {
        constexpr std::size_t ahead = 12;
        for (std::size_t i = 0; i < hits.size(); ++i) {
            if (i + 2 * ahead < hits.size())
                __builtin_prefetch(&queries_[hits[i + 2 * ahead].query], 1);
            if (i + ahead < hits.size()) {
                const std::uint32_t next = hits[i + ahead].query;
                __builtin_prefetch(list(next) + queries_[next].count, 1);
            }
            const Hit& hit = hits[i];
            const Query& query = queries_[hit.query];
            const float* facts = groups + hit.row / kGroup * kGroupFacts;
            const float scale = query.unit * facts[kScale];
            // What it approximates is finite. NaN becomes the lowest: the order of arguments matters.
            const float score =
                std::min(std::max(-kMostFloat, value(hit.score, scale)), kMostFloat) + 0.0f;
            if (!job_.exact) {
                push(scorer, hit.query, {score, score, id + hit.row});
                continue;
            }
            float doubt = query.residual * facts[kReach] + query.norm * facts[kDoubt] +
                          (integers_ ? scale : 0.0f);
            if (!(doubt >= 0)) doubt = kInfinity;
            push(scorer, hit.query, {score - doubt, score + doubt, id + hit.row});
        }
    }

    void push(Scorer& scorer, std::int64_t index, const Candidate& candidate) {
        Query& query = at(index);
        if (candidate.upper < query.cut) return;
        list(index)[query.count++] = candidate;
        if (query.count < job_.capacity) return;
        // Ever more work for ever more room: bounds alone; scores of the k best; all scores.
        raise_to_kth_bound(index);
        if (query.count <= job_.capacity * 5 / 8) return;
        cut_at_kth(scorer, index);
        if (query.count <= job_.capacity * 3 / 4) return;
        scorer.score(first_ + index, list(index), query.count);
        keep_best(index);
    }

    // Scores all candidates that still matter; leaves at most k, all of them known.
    void resolve(Scorer& scorer, std::int64_t query) {
        if (at(query).count > job_.k) cut_at_kth(scorer, query);
        scorer.score(first_ + query, list(query), at(query).count);
        keep_best(query);
    }

    // Scores the k best candidates of all queries, for higher cuts. Rows as for resolve_all.
    void sharpen(Scorer& scorer, std::int64_t id, std::int64_t rows) {
        std::vector<Unknown> unknown, sorted;
        for (std::int64_t first = 0, next; first < count_; first = next) {
            for (next = first; next < count_ && unknown.size() < kUnknown; ++next) {
                if (at(next).count < job_.k) continue;
                raise_to_kth_bound(next);
                list_unknown(next, job_.k, unknown);
            }
            score_sorted(scorer, id, rows, unknown, sorted);
            for (std::int64_t query = first; query < next; ++query) {
                if (at(query).count < job_.k) continue;
                raise_to_lowest(query, job_.k);
                drop(query);
            }
        }
    }

    // The same for all queries, with candidates that are rows id .. id + rows - 1. They are scored
    // in the order of their rows, roughly: that is how memory gives them fastest, and a row that
    // many queries want is read once.
    void resolve_all(Scorer& scorer, std::int64_t id, std::int64_t rows) {
        std::vector<Unknown> unknown, sorted;
        for (std::int64_t first = 0, next; first < count_; first = next) {
            for (next = first; next < count_ && unknown.size() < kUnknown; ++next) {
                if (at(next).count > job_.k) raise_to_kth_bound(next);
                list_unknown(next, std::min(at(next).count, job_.k), unknown);
            }
            score_sorted(scorer, id, rows, unknown, sorted);
            for (std::int64_t query = first; query < next; ++query) {
                if (at(query).count <= job_.k) continue;
                raise_to_lowest(query, job_.k);
                drop(query);
                list_unknown(query, at(query).count, unknown);
                if (unknown.size() >= kUnknown) score_sorted(scorer, id, rows, unknown, sorted);
            }
            score_sorted(scorer, id, rows, unknown, sorted);
            for (std::int64_t query = first; query < next; ++query) keep_best(query);
        }
    }

    Candidate* list(std::int64_t query) { return candidates_.get() + query * job_.capacity; }
    std::int64_t found(std::int64_t query) { return at(query).count; }

  private:
    struct Query {
        float unit, residual, norm, cut;
        std::int64_t count;  // of candidates
    };

    // Of a score as the kernel gave it.
    float value(std::int32_t score, float scale) const {
        if (integers_) return static_cast<float>(score) * scale;
        float bits;
        std::memcpy(&bits, &score, sizeof bits);
        return bits;
    }

    // A candidate whose score is not known.
    struct Unknown {
        std::uint32_t query, place;
    };
    static constexpr std::size_t kUnknown = 1 << 17;

    void list_unknown(std::int64_t query, std::int64_t count, std::vector<Unknown>& unknown) {
        for (std::int64_t place = 0; place < count; ++place)
            if (!known(list(query)[place]))
                unknown.push_back({static_cast<std::uint32_t>(query),
                                   static_cast<std::uint32_t>(place)});
    }

    void score_sorted(Scorer& scorer, std::int64_t id, std::int64_t rows,
                      std::vector<Unknown>& unknown, std::vector<Unknown>& sorted) {
        constexpr std::size_t buckets = 1024;
        const std::int64_t bucket_rows = divide_up(rows, buckets);
        std::size_t starts[buckets + 1] = {};
        const auto bucket = [&](const Unknown& one) {
            return static_cast<std::size_t>((list(one.query)[one.place].id - id) / bucket_rows);
        };
        for (const Unknown& one : unknown) ++starts[bucket(one) + 1];
        for (std::size_t i = 0; i < buckets; ++i) starts[i + 1] += starts[i];
        sorted.resize(unknown.size());
        for (const Unknown& one : unknown) sorted[starts[bucket(one)]++] = one;
        constexpr std::size_t ahead = 4;
        for (std::size_t i = 0; i < sorted.size(); ++i) {
            if (i + ahead < sorted.size()) {
                const Unknown& next = sorted[i + ahead];
                scorer.prefetch(list(next.query)[next.place]);
            }
            const Unknown& one = sorted[i];
            scorer.score_one(scorer.query_floats(first_ + one.query), list(one.query)[one.place]);
        }
        unknown.clear();
    }

    Query& at(std::int64_t query) { return queries_[static_cast<std::size_t>(query)]; }
    float* residuals() const { return screened_.get(); }
    float* norms() const { return screened_.get() + padded_; }
    float* cuts() const { return screened_.get() + 2 * padded_; }

    // The k-th highest bound from below is one of the k-th best score, too.
    void raise_to_kth_bound(std::int64_t query) {
        Candidate* all = list(query);
        std::nth_element(all, all + (job_.k - 1), all + at(query).count, better);
        raise_to_lowest(query, job_.k);
        drop(query);
    }

    // Scores the k candidates with the highest bounds; the lowest of these scores is the new cut.
    void cut_at_kth(Scorer& scorer, std::int64_t query) {
        Candidate* all = list(query);
        std::nth_element(all, all + (job_.k - 1), all + at(query).count, better);
        scorer.score(first_ + query, all, job_.k);
        raise_to_lowest(query, job_.k);
        drop(query);
    }

    // Of candidates that are all known.
    void keep_best(std::int64_t query) {
        drop(query);
        if (at(query).count <= job_.k) return;
        Candidate* all = list(query);
        std::nth_element(all, all + (job_.k - 1), all + at(query).count, better);
        at(query).count = job_.k;
        raise_to_lowest(query, job_.k);
    }

    void raise_to_lowest(std::int64_t query, std::int64_t count) {
        const Candidate* all = list(query);
        float lowest = all[0].lower;
        for (std::int64_t i = 1; i < count; ++i) lowest = std::min(lowest, all[i].lower);
        if (lowest > cut(query)) raise(query, lowest);
    }

    void drop(std::int64_t query) {
        Candidate* all = list(query);
        const float least = cut(query);
        at(query).count = std::remove_if(all, all + at(query).count,
                                         [least](const Candidate& one) {
                                             return one.upper < least;
                                         }) -
                          all;
    }

    const Job& job_;
    const bool integers_;  // the screen's scores; else floats
    const std::int64_t first_, count_, padded_;
    Buffer<float> screened_;  // [3, padded]: residuals, norms and cuts, in units of the query's scale
    Buffer<Query> queries_;
    Buffer<Candidate> candidates_;
};

}  // namespace pymcip
