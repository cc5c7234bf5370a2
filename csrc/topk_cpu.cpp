// Driver of top-k on the CPU; the contract is in topk.hpp, the kernels' in topk_kernel.hpp.
//
// Queries are taken in sets that fit into a budget, the bank in stretches: all rows of a packed part
// up to a million, or as many raw rows as fit into a buffer, which are packed there. Threads take
// blocks of queries that stay in the L2 cache while a stretch streams past; if there are fewer blocks
// than threads, they share the stretch instead. Every query has a short list of candidates and a cut
// (topk_candidates.hpp): the threshold, or a bound from below of its k-th best score.

#include <algorithm>
#include <limits>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "topk.hpp"
#include "topk_candidates.hpp"
#include "topk_kernel_common.hpp"
#include "topk_rows.hpp"
#include "topk_team.hpp"

namespace pymcip {

namespace {
constexpr RotationSigns make_signs() {
    RotationSigns signs{};
    std::uint32_t state = 0x9e3779b9u;  // xorshift32
    for (auto& half : signs.bits)
        for (std::uint32_t& bits : half) {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            bits = (state >> 16 & 1u) << 31;
        }
    return signs;
}
}  // namespace

extern constexpr RotationSigns kRotationSigns = make_signs();

namespace {

constexpr std::int64_t kBlockBytes = 768 << 10;     // codes of a block: stays in an L2 of 1 MiB and up
constexpr std::int64_t kSetBytes = 40 << 20;        // codes and candidates of the queries in flight
constexpr std::int64_t kStretchBytes = 16 << 20;    // codes of raw rows, packed when needed
constexpr std::int64_t kStretchRows = 1 << 20;      // of packed parts: their rows stay in memory
constexpr std::int64_t kSliceGroups = 64;           // what a thread takes when a stretch is shared
constexpr std::int64_t kVisits = 256;               // groups that a first cut is taken from
constexpr std::int64_t kDirectQueries = 8;          // so few are scored sooner than a bank is packed
constexpr std::int64_t kDirectRows = 1024;          // that a thread scores at a time
constexpr std::int64_t kInlineProducts = 1 << 22;   // below this a thread costs more than it saves

std::vector<const Kernel*> kernels() {
    std::vector<const Kernel*> found;
    for (const Kernel* kernel :
         {kernel_amx(), kernel_avx512_vnni(), kernel_avx2(), kernel_portable(), kernel_amx_bf16()})
        if (kernel != nullptr) found.push_back(kernel);
    return found;
}

const Kernel& kernel_named(const std::string& name) {
    for (const Kernel* kernel : kernels())
        if (name == kernel->name) return *kernel;
    throw std::invalid_argument("this machine has no top-k kernel called '" + name + "'");
}

// Long lists save scores, but short ones stay in the caches.
std::int64_t capacity_for(std::int64_t k) {
    return std::max<std::int64_t>(128, 4 * k + 8 * std::min<std::int64_t>(k, 128));
}

std::int64_t whole_panels(std::int64_t queries) {
    return std::max<std::int64_t>(queries / kPanel, 1) * kPanel;
}

// Queries whose codes (`width` bytes each) and candidates fit the budget, and whose codes fit L2.
std::int64_t set_queries(std::int64_t width, std::int64_t list_bytes) {
    return whole_panels(kSetBytes / (width + list_bytes));
}
std::int64_t cached_queries(std::int64_t width) { return whole_panels(kBlockBytes / width); }

struct Stretch {
    Packed packed;
    std::int64_t first_group;  // of `packed`
    std::int64_t rows, id;     // how many, and the id of the first

    std::int64_t groups() const { return divide_up(rows, kGroup); }
};

class Search {
  public:
    Search(const Job& job, Team& team) : job_(job), team_(team) {
        const std::int64_t list_bytes = job.capacity * static_cast<std::int64_t>(sizeof(Candidate));
        const std::int64_t rows = job.queries.rows, threads = team.threads();
        const std::int64_t most = set_queries(job.width(), list_bytes);
        const std::int64_t cached = cached_queries(job.width());
        // Few blocks are made as many as threads, unless they get too small for it: then the threads
        // share each block, and each has candidates of its own.
        const std::int64_t blocks =
            divide_up(divide_up(rows, std::min(cached, most)), threads) * threads;
        shared_ = rows < threads * kSmallBlock;
        if (shared_) {
            block_ = std::min(cached, set_queries(job.width(), threads * list_bytes));
            set_ = block_;
        } else {
            block_ = std::min(std::min(cached, whole_panels(most / threads)),
                              whole_panels(divide_up(rows, blocks) + kPanel - 1));
            // Sets of one size: each packs rows that are not packed anew.
            const std::int64_t largest = std::max(most / block_, threads) * block_;
            set_ = divide_up(divide_up(rows, divide_up(rows, largest)), block_) * block_;
        }
    }

    // Returns a row of the queries or of the bank that can't be ranked in *outcome.
    void run(std::int64_t* ids, float* scores, std::int64_t places, Outcome* outcome) {
        for (int worker = 0; worker < team_.threads(); ++worker)
            scorers_.push_back(std::make_unique<Scorer>(job_));
        hits_.resize(static_cast<std::size_t>(team_.threads()));
        for (std::vector<Hit>& hits : hits_) hits.reserve(256 + kGroup * kPanel);
        scratch_bytes_ = scratch_bytes(job_.steps, block_ / kPanel);
        scratch_ = allocate<std::uint8_t>(team_.threads() * scratch_bytes_);
        for (std::int64_t first = 0; first < job_.queries.rows && !team_.stopped(); first += set_) {
            const std::int64_t count = std::min(set_, job_.queries.rows - first);
            pack_queries(first, count, outcome);
            if (team_.stopped()) return;
            fresh_ = true;
            search_set(outcome);
            if (team_.stopped()) return;
            finish(first, count, ids, scores, places);
        }
    }

  private:
    static constexpr std::int64_t kSmallBlock = 256;

    void pack_queries(std::int64_t first, std::int64_t count, Outcome* outcome) {
        const std::int64_t blocks = divide_up(count, block_);
        const std::int64_t copies = shared_ ? team_.threads() : 1;
        const std::int64_t panel_bytes = job_.kernel.panel_bytes * job_.steps;
        blocks_.clear();
        for (std::int64_t block = 0; block < blocks; ++block)
            for (std::int64_t copy = 0; copy < copies; ++copy)
                blocks_.push_back(std::make_unique<Block>(
                    job_, first + block * block_, std::min(block_, count - block * block_)));
        const std::int64_t panels = divide_up(count, kPanel);
        panels_ = allocate<std::uint8_t>(panels * panel_bytes);
        std::mutex mutex;
        team_.each(panels, [&](int, std::int64_t panel) {
            PackSpace space(job_.width());
            std::int32_t sums[kPanel];
            const std::int64_t start = panel * kPanel;
            Block& block = *blocks_[static_cast<std::size_t>(start / block_ * copies)];
            for (std::int64_t i = 0; i < kPanel; ++i) {
                std::int8_t* codes = space.codes.get() + i * job_.width();
                if (start + i >= count) {
                    std::memset(codes, 0, static_cast<std::size_t>(job_.width()));
                    continue;
                }
                float facts[kGroupFacts], norm;
                copy_row(job_.kernel, job_.queries, first + start + i, space.rows.get());
                if (job_.kernel.encode(space.rows.get(), 1, job_.queries.columns, job_.steps, codes,
                                       sums, facts, &norm) >= 0) {
                    const std::lock_guard<std::mutex> lock(mutex);
                    bad(outcome, Outcome::Kind::bad_query, first + start + i);
                    return;
                }
                block.set_query(start % block_ + i, facts[kScale], facts[kDoubt], norm);
            }
            job_.kernel.arrange(space.codes.get(), job_.steps, panels_.get() + panel * panel_bytes);
        });
        for (std::size_t block = 0; block < blocks_.size(); ++block)
            if (block % static_cast<std::size_t>(copies) != 0)
                blocks_[block]->share(*blocks_[block / static_cast<std::size_t>(copies) *
                                               static_cast<std::size_t>(copies)]);
    }

    void search_set(Outcome* outcome) {
        for (std::size_t part = 0; part < job_.bank.size(); ++part) {
            const Part& own = job_.bank[part];
            const bool packed = own.packed.codes != nullptr;
            if (!packed && job_.exact && shared_ && job_.queries.rows <= kDirectQueries) {
                score_directly(own.rows, job_.firsts[part], outcome);
                continue;
            }
            const std::int64_t rows =
                packed ? kStretchRows
                       : std::max<std::int64_t>(kStretchBytes / job_.width() / kGroup, 1) * kGroup;
            for (std::int64_t row = 0; row < own.rows.rows && !team_.stopped(); row += rows) {
                Stretch stretch{own.packed, row / kGroup, std::min(rows, own.rows.rows - row),
                                job_.firsts[part] + row};
                if (!packed) {
                    stretch.packed = pack_stretch(own.rows, row, stretch.rows, rows, part, outcome);
                    stretch.first_group = 0;
                }
                if (team_.stopped()) return;
                search_stretch(stretch);
            }
        }
    }

    // All rows of a part that is not packed, for a few queries.
    void score_directly(const Matrix& rows, std::int64_t id, Outcome* outcome) {
        std::mutex mutex;
        team_.each(divide_up(rows.rows, kDirectRows), [&](int worker, std::int64_t item) {
            Block& block = *blocks_[static_cast<std::size_t>(worker)];
            const std::int64_t columns = rows.columns;
            const Buffer<float> space = allocate<float>((block.count() + 1) * columns);
            for (std::int64_t query = 0; query < block.count(); ++query)
                copy_row(job_.kernel, job_.queries, query, space.get() + query * columns);
            const std::int64_t end = std::min((item + 1) * kDirectRows, rows.rows);
            for (std::int64_t row = item * kDirectRows; row < end; ++row) {
                const float* right =
                    row_floats(job_.kernel, rows, row, space.get() + block.count() * columns);
                if (!(job_.kernel.score(right, right, columns) < kInfinity)) {
                    const std::lock_guard<std::mutex> lock(mutex);
                    bad(outcome, Outcome::Kind::bad_bank_row, id + row);
                    return;
                }
                for (std::int64_t query = 0; query < block.count(); ++query) {
                    const float* left = space.get() + query * columns;
                    const float score = job_.kernel.score(left, right, columns);
                    block.push(scorer(worker), query, {score, score, id + row});
                }
            }
            team_.advance((end - item * kDirectRows) * block.count());
        });
    }

    Packed pack_stretch(const Matrix& matrix, std::int64_t first, std::int64_t count,
                        std::int64_t room, std::size_t part, Outcome* outcome) {
        const std::int64_t groups = room / kGroup;
        if (codes_ == nullptr) {
            codes_ = allocate<std::int8_t>(room * job_.width());
            groups_ = allocate<float>(groups * kGroupFacts);
            sums_ = allocate<std::int32_t>(room);
        }
        const Packed packed{codes_.get(), groups_.get(), sums_.get()};
        constexpr std::int64_t batch = 16;
        const std::int64_t due = divide_up(count, kGroup);
        std::mutex mutex;
        team_.each(divide_up(due, batch), [&](int, std::int64_t item) {
            PackSpace space(job_.width());
            for (std::int64_t group = item * batch; group < std::min((item + 1) * batch, due);
                 ++group) {
                const std::int64_t row =
                    pack_group(job_.kernel, matrix, first + group * kGroup, group, packed, space);
                if (row < 0) continue;
                const std::lock_guard<std::mutex> lock(mutex);
                bad(outcome, Outcome::Kind::bad_bank_row, job_.firsts[part] + row);
                return;
            }
        });
        return packed;
    }

    void search_stretch(const Stretch& stretch) {
        const std::int64_t groups = stretch.groups();
        const bool warm = fresh_;
        fresh_ = false;
        if (!shared_) {
            team_.each(static_cast<std::int64_t>(blocks_.size()), [&](int worker, std::int64_t b) {
                if (warm) warm_up(worker, b, stretch);
                scan(worker, b, stretch, 0, groups);
                if (job_.exact && !team_.stopped())
                    blocks_[static_cast<std::size_t>(b)]->resolve_all(scorer(worker), stretch.id,
                                                                      stretch.rows);
            });
            return;
        }
        if (warm) {
            team_.each(1, [&](int worker, std::int64_t) { warm_up(worker, 0, stretch); });
            for (std::size_t copy = 1; copy < blocks_.size(); ++copy) blocks_[copy]->share(*blocks_[0]);
        }
        team_.each(divide_up(groups, kSliceGroups), [&](int worker, std::int64_t slice) {
            scan(worker, worker, stretch, slice * kSliceGroups,
                 std::min((slice + 1) * kSliceGroups, groups));
        });
        if (job_.exact) {
            constexpr std::int64_t batch = 4;
            const std::int64_t count = blocks_[0]->count();
            team_.each(divide_up(count, batch), [&](int worker, std::int64_t item) {
                for (std::int64_t query = item * batch;
                     query < std::min((item + 1) * batch, count); ++query)
                    gather(worker, query);
            });
        }
    }

    // What the threads found for a query, resolved in the first one's block; its cut for all.
    void gather(int worker, std::int64_t query) {
        Block& block = *blocks_[0];
        for (std::size_t copy = 1; copy < blocks_.size(); ++copy)
            block.absorb(scorer(worker), query, *blocks_[copy]);
        block.resolve(scorer(worker), query);
        for (std::size_t copy = 1; copy < blocks_.size(); ++copy)
            blocks_[copy]->raise(query, block.cut(query));
    }

    Screen screen(int worker, std::int64_t block, const Stretch& stretch) {
        const std::int64_t panel = shared_ ? 0 : block * block_ / kPanel;
        Screen screen = blocks_[static_cast<std::size_t>(block)]->screen(
            panels_.get() + panel * job_.kernel.panel_bytes * job_.steps);
        screen.codes = stretch.packed.codes;
        screen.groups = stretch.packed.groups;
        screen.sums = stretch.packed.sums;
        screen.scratch = scratch_.get() + worker * scratch_bytes_;
        screen.stop = team_.stop_flag();
        return screen;
    }

    // The k-th highest of the groups' best scores bounds the k-th best score from below, as long as
    // the groups have no missing rows. A few groups give a cut before the first candidate.
    void warm_up(int worker, std::int64_t block, const Stretch& stretch) {
        const std::int64_t whole = stretch.rows / kGroup;
        const std::int64_t visits = std::min(std::max(kVisits, 2 * job_.k), whole / 16);
        if (visits < job_.k) return;
        Block& own = *blocks_[static_cast<std::size_t>(block)];
        // A threshold may be the better cut: then an eighth of the groups have less than k / 8 rows
        // above it.
        constexpr std::int64_t part = 8;
        if (job_.threshold > -kInfinity && visits >= 2 * part) {
            const Buffer<float> few = lowest_of(worker, block, stretch, visits / part);
            if (team_.stopped() || part * own.above_cut(few.get(), visits / part) <
                                       own.count() * job_.k)
                return;
        }
        const Buffer<float> lowest = lowest_of(worker, block, stretch, visits);
        if (!team_.stopped()) own.raise_from(lowest.get(), visits);
    }

    // Bounds of the best scores of groups spread over the stretch.
    Buffer<float> lowest_of(int worker, std::int64_t block, const Stretch& stretch,
                            std::int64_t visits) {
        Screen screen = this->screen(worker, block, stretch);
        screen.stride = stretch.rows / kGroup / visits;
        screen.first = stretch.first_group;
        screen.last = stretch.first_group + visits * screen.stride;
        Buffer<float> lowest = allocate<float>(visits * screen.panel_count * kPanel);
        screen.lowest = lowest.get();
        job_.kernel.screen(screen);
        return lowest;
    }

    struct Offered {
        Block& block;
        Scorer& scorer;
        const Stretch& stretch;
        std::vector<Hit>& hits;

        void take_all() {
            block.take(scorer, hits, stretch.id,
                       stretch.packed.groups + stretch.first_group * kGroupFacts);
            hits.clear();
        }

        static void offer(void* context, std::int64_t panel, std::int64_t group,
                          const std::uint32_t* admitted, const std::int32_t* scores) {
            constexpr std::size_t enough = 256;
            Offered& to = *static_cast<Offered*>(context);
            const std::int64_t first = (group - to.stretch.first_group) * kGroup;
            const std::int64_t rows = std::min<std::int64_t>(kGroup, to.stretch.rows - first);
            // Missing queries of the last panel are admitted by facts of a damaged file alone.
            const std::int64_t queries = to.block.count() - panel * kPanel;
            const std::uint32_t present = queries < kPanel ? (1u << queries) - 1 : ~0u;
            for (std::int64_t row = 0; row < rows; ++row)
                for (std::uint32_t left = admitted[row] & present; left != 0; left &= left - 1) {
                    const int lane = __builtin_ctz(left);
                    to.hits.push_back({static_cast<std::uint32_t>(panel * kPanel + lane),
                                       static_cast<std::uint32_t>(first + row),
                                       scores[row * kPanel + lane]});
                }
            if (to.hits.size() >= enough) to.take_all();
        }
    };

    void scan(int worker, std::int64_t block, const Stretch& stretch, std::int64_t first,
              std::int64_t last) {
        Offered offered{*blocks_[static_cast<std::size_t>(block)], scorer(worker), stretch,
                        hits_[static_cast<std::size_t>(worker)]};
        Screen screen = this->screen(worker, block, stretch);
        screen.stride = 1;
        screen.context = &offered;
        screen.offer = Offered::offer;
        constexpr std::int64_t report = 256;  // groups between two reports of progress
        // Exact cuts after a 16th and a quarter of the stretch keep lists short; between them bounds do.
        std::int64_t sharp = stretch.groups() / 16;
        for (std::int64_t group = first; group < last && !team_.stopped(); group += report) {
            const std::int64_t end = std::min(group + report, last);
            if (job_.exact && !shared_ && sharp > 0 && group >= sharp) {
                offered.block.sharpen(scorer(worker), stretch.id, stretch.rows);
                sharp = group < stretch.groups() / 4 ? stretch.groups() / 4 : last;
            }
            screen.first = stretch.first_group + group;
            screen.last = stretch.first_group + end;
            job_.kernel.screen(screen);
            offered.take_all();
            team_.advance((std::min(end * kGroup, stretch.rows) - group * kGroup) *
                          offered.block.count());
        }
    }

    void finish(std::int64_t first, std::int64_t count, std::int64_t* ids, float* scores,
                std::int64_t places) {
        constexpr std::int64_t batch = 64;
        team_.each(divide_up(count, batch), [&](int worker, std::int64_t item) {
            for (std::int64_t query = item * batch; query < std::min((item + 1) * batch, count);
                 ++query) {
                Block& block = *blocks_[static_cast<std::size_t>(shared_ ? 0 : query / block_)];
                const std::int64_t own = query % block_;
                if (shared_) gather(worker, own);
                else block.resolve(scorer(worker), own);
                write(block.list(own), block.found(own), ids + (first + query) * places,
                      scores + (first + query) * places, places);
            }
        });
    }

    void write(Candidate* found, std::int64_t count, std::int64_t* ids, float* scores,
               std::int64_t places) const {
        std::sort(found, found + count, better);
        for (std::int64_t place = 0; place < places; ++place) {
            const bool filled = place < count;
            ids[place] = filled ? found[place].id : -1;
            scores[place] = filled ? found[place].lower : -kInfinity;
        }
    }

    void bad(Outcome* outcome, Outcome::Kind kind, std::int64_t row) {
        // The lowest of those found; threads that are on their way may find another.
        if (outcome->kind != kind || row < outcome->row) *outcome = {kind, row};
        team_.stop();
    }

    Scorer& scorer(int worker) { return *scorers_[static_cast<std::size_t>(worker)]; }

    const Job& job_;
    Team& team_;
    std::int64_t block_, set_;  // queries
    bool shared_;               // threads share the bank, not the queries
    bool fresh_ = true;         // no candidates yet
    std::vector<std::unique_ptr<Block>> blocks_;  // one per block, or one per thread for one block
    std::vector<std::unique_ptr<Scorer>> scorers_;
    std::vector<std::vector<Hit>> hits_;  // per thread, not yet taken
    Buffer<std::uint8_t> panels_;
    Buffer<std::uint8_t> scratch_;  // per thread
    std::int64_t scratch_bytes_ = 0;
    Buffer<std::int8_t> codes_;
    Buffer<float> groups_;
    Buffer<std::int32_t> sums_;
};

}  // namespace

std::vector<std::string> topk_cpu_kernels() {
    std::vector<std::string> names;
    for (const Kernel* kernel : kernels()) names.emplace_back(kernel->name);
    return names;
}

Outcome topk_cpu(const Matrix& queries, const std::vector<Part>& bank, std::int64_t k,
                 float threshold, bool exact, int threads, const std::string& kernel,
                 std::int64_t* ids, float* scores, const Progress& progress) {
    std::vector<std::int64_t> firsts{0};
    for (const Part& part : bank) firsts.push_back(firsts.back() + part.rows.rows);
    const std::int64_t rows = firsts.back();
    Outcome outcome{Outcome::Kind::complete, 0};
    if (queries.rows == 0) return outcome;
    const std::int64_t kept = std::min(k, rows);
    const Job job{kernel_named(kernel), queries, bank, firsts, kept,
                  std::min(capacity_for(kept), rows + 1), threshold, exact,
                  steps_of(kernel_named(kernel), queries.columns)};
    const bool small = queries.rows * rows < kInlineProducts / queries.columns;
    Team team(threads, small, progress, queries.rows * rows);
    Search(job, team).run(ids, scores, k, &outcome);
    if (outcome.kind == Outcome::Kind::complete && team.stopped())
        outcome.kind = Outcome::Kind::stopped;
    return outcome;
}

std::int64_t topk_cpu_pass(std::int64_t columns, std::int64_t k) {
    const std::int64_t width = divide_up(columns, 64) * 64;
    const std::int64_t most =
        set_queries(width, capacity_for(k) * static_cast<std::int64_t>(sizeof(Candidate)));
    // A set is of whole blocks, so that it may fall short of `most` by less than one.
    const std::int64_t cached = cached_queries(width);
    return most > 2 * cached ? most - cached : most;
}

Outcome topk_cpu_pack(const Matrix& rows, const Packed& packed, int threads,
                      const std::string& kernel, const Progress& progress) {
    const Kernel& chosen = kernel_named(kernel);
    Outcome outcome{Outcome::Kind::complete, 0};
    constexpr std::int64_t batch = 64;
    const std::int64_t groups = divide_up(rows.rows, kGroup);
    Team team(threads, false, progress, rows.rows);
    std::mutex mutex;
    team.each(divide_up(groups, batch), [&](int, std::int64_t item) {
        PackSpace space(steps_of(chosen, rows.columns) * kStep);
        for (std::int64_t group = item * batch; group < std::min((item + 1) * batch, groups);
             ++group) {
            const std::int64_t row =
                pack_group(chosen, rows, group * kGroup, group, packed, space);
            if (row >= 0) {
                const std::lock_guard<std::mutex> lock(mutex);
                if (outcome.kind == Outcome::Kind::complete || row < outcome.row)
                    outcome = {Outcome::Kind::bad_bank_row, row};
                team.stop();
                return;
            }
            team.advance(std::min<std::int64_t>(kGroup, rows.rows - group * kGroup));
        }
    });
    if (outcome.kind == Outcome::Kind::complete && team.stopped())
        outcome.kind = Outcome::Kind::stopped;
    return outcome;
}

void topk_cpu_scores(const Matrix& queries, const Matrix& bank, const std::int64_t* ids,
                     std::int64_t count, float* scores) {
    const Kernel& kernel = *kernels().front();
    const Buffer<float> query = allocate<float>(queries.columns);
    const Buffer<float> row = allocate<float>(queries.columns);
    for (std::int64_t i = 0; i < queries.rows; ++i) {
        const float* left = row_floats(kernel, queries, i, query.get());
        for (std::int64_t j = 0; j < count; ++j) {
            const std::int64_t id = ids[i * count + j];
            if (id >= bank.rows) throw std::out_of_range("an id is not below the bank's rows");
            if (id >= 0 && j + 1 < count && ids[i * count + j + 1] >= 0)
                prefetch_row(bank, ids[i * count + j + 1]);
            scores[i * count + j] =
                id < 0 ? -kInfinity
                       : kernel.score(left, row_floats(kernel, bank, id, row.get()), queries.columns);
        }
    }
}

}  // namespace pymcip
