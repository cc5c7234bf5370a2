// Where given rows of a bank stand in the ranking of all its rows for a query, without ranking them.
//
// Rows are ordered by (score descending, row ascending), the score being topk.hpp's. What comes in
// are products of a block of queries and a block of bank rows in fp32, and for each query the rows
// asked for in this order: a product above `above[p]` is known to belong to a row that comes before
// row p, one below `below[p]` to a row that comes after it; any other row is scored exactly. Both fall
// (or stay) from p to p + 1 within a query. NaN is neither above nor below.
#pragma once

#include <cstdint>

#include "topk.hpp"

namespace pymcip {

struct Asked {
    const std::int64_t* starts;  // [queries + 1] into the arrays that follow
    const std::int64_t* ids;     // numbers of bank rows
    const float* scores;         // exact
    const float* above;
    const float* below;
    // counts[p] rises by the number of the block's rows that come before row p, but not before the
    // row asked for just before it: sums over a query's rows are ranks.
    std::int64_t* counts;
};

// products [queries.rows, bank.rows], rows `stride` floats apart; `first` is the number of the
// block's first row in the bank.
void ranks_count(const float* products, std::int64_t stride, const Matrix& queries,
                 const Matrix& bank, std::int64_t first, const Asked& asked, int threads);

}  // namespace pymcip
