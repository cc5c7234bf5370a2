"""Ranks in plain torch, on any device it has, and what its back ends share (`pymcip.ops.ranks`).

The rows asked for are scored and put into the ranking's order, for each query. Of every other row it
remains to find between which two of these it stands; the rank of the p-th is the number of rows that
stand before it. Blocks of fp32 matrix products decide, where they are certain.

The certificate. By the bound that `pymcip.ops.topk_torch` derives, with u = 2^-24 and L the longest
row of the bank, a product s'_j and the score s_j differ by less than
eps = 1.01 (D + 16) u / (1 - 3 (D + 16) u) |q| L, of which 2 u |q| L are left for the rounding of
s_p + eps and s_p - eps to fp32, as |s_p| <= (1 + 2u) |q| L. Hence s'_j > fl(s_p + eps) implies
s_j > s_p, and s'_j < fl(s_p - eps) implies s_j < s_p. Between them row j is scored, and s_j = s_p is
decided by the lower number.

Where many rows are asked for, or alike, this leaves too many rows to be scored one by one. A sample
shows it; products are in fp64 then and rounded to fp32. Such a product and the score are roundings of
sums that differ by less than D 2^-52 |q| L: with the rounding of the limits
eps = 1.01 (4 + D 2^-27) u / (1 - 3 (D + 16) u) |q| L. Where |q| L > 2^126, products might overflow on their way, and all rows
are scored.

Rows are scored once for a query, however many rows asked for they are near to: the worst case, all
rows alike, takes N M scores in fp64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from pymcip.ops.arrays import Array, to_fp32
from pymcip.ops.canonical import canonical_pairs, canonical_scores
from pymcip.ops.topk_torch import falling_order, fp32_products, product_error, row_lengths

QUERIES = 1024
ROWS = 4096
SIDE = 2048  # of both, where the bank is the queries
_ELEMENTS = 1 << 23  # of a block of bank rows, and of one of queries
_MOST_LENGTH = 2.0**126
_SAMPLE = (32, 256)  # queries and bank rows
WIDE = 0.08  # share of rows to be scored from which on fp64 products are cheaper
_PADDED = 1 << 20


@dataclass(frozen=True)
class Asked:
    """The rows asked for, in the ranking's order for each query; all on the queries' device."""

    starts: Tensor  # int64 [N + 1] into the others
    ids: Tensor  # int64 [P]
    scores: Tensor  # fp32 [P], exact
    above: Tensor  # fp32 [P]: a product above it is known to belong to an earlier row
    below: Tensor  # fp32 [P]: the same for later ones
    counts: Tensor  # int64 [P]: rows before it, and not before the one asked for before it


# Adds to the counts of queries first, first + 1, …: products [n, m] of queries [n, D] and bank rows
# [m, D], both fp32, the first of which is row `start`.
Count: TypeAlias = Callable[[Tensor, Tensor, Tensor, int, int, Asked], None]


def ranks_torch(
    queries: Array,
    bank: Array,
    starts: Tensor,
    ids: Tensor,
    longest: float,
    *,
    threads: int,  # torch's own setting holds
) -> Tensor:
    """Ranks int64 [P], on the queries' device.

    Args:
        queries, bank: [N, D] and [M, D], checked.
        starts, ids: int64 [N + 1] and [P], the rows asked for, on the queries' device.
        longest: the largest norm of a bank row.
        threads: unused.
    """
    return over_blocks(queries, bank, starts, ids, longest, _count)


def over_blocks(
    queries: Array, bank: Array, starts: Tensor, ids: Tensor, longest: float, count: Count
) -> Tensor:
    """Ranks int64 [P], by `count` over blocks of products."""
    device = starts.device
    sizes = starts.diff()
    widest = int(sizes.max()) if len(ids) else 0
    if widest == 0:
        return torch.zeros_like(ids)
    mirrored = _same(queries, bank)
    columns = queries.shape[1]
    rows_step = max(1, min(SIDE if mirrored else ROWS, _ELEMENTS // columns))
    step = max(1, min(SIDE if mirrored else QUERIES, _ELEMENTS // max(columns, widest)))
    if mirrored:
        step = rows_step = min(step, rows_step)
    bounds = starts.tolist()
    space = torch.empty(min(step, len(queries)) * min(rows_step, len(bank)), device=device)
    turned = torch.empty_like(space) if mirrored else space[:0]
    with fp32_products(device):
        asked, order, wide = _ordered(queries, bank, starts, ids, longest)
        spacious = torch.empty_like(space, dtype=torch.float64) if wide else space
        for start in range(0, len(bank), rows_step):
            rows = to_fp32(bank[start : start + rows_step], device)
            for first in range(start if mirrored else 0, len(queries), step):
                last = min(first + step, len(queries))
                wanted = bounds[first] < bounds[last]
                mirror = mirrored and first > start and bounds[start] < bounds[start + len(rows)]
                if not wanted and not mirror:
                    continue
                block = to_fp32(queries[first:last], device)
                shape = len(block), len(rows)
                products = space[: len(block) * len(rows)].view(shape)
                if wide:
                    exact = spacious[: len(block) * len(rows)].view(shape)
                    torch.mm(block.double(), rows.double().T, out=exact)
                    products.copy_(exact)
                else:
                    torch.mm(block, rows.T, out=products)
                if mirror:  # the same products for the rows as queries
                    other = turned[: products.numel()].view(len(rows), len(block))
                    count(other.copy_(products.T), rows, block, first, start, asked)
                if wanted:
                    count(products, block, rows, start, first, asked)
    # Within a query: so many rows stand before each that was asked for.
    before = torch.cat([asked.counts.new_zeros(1), asked.counts.cumsum(0)])
    first_of_query = torch.repeat_interleave(starts[:-1], sizes)
    return torch.empty_like(ids).scatter_(0, order, before[1:] - before[first_of_query])


def _same(queries: Array, bank: Array) -> bool:
    """Whether the bank is the queries themselves, so that half of the products suffice."""
    if isinstance(queries, Tensor) and isinstance(bank, Tensor):
        facts = [(x.data_ptr(), x.dtype, x.shape, x.stride(), x.device) for x in (queries, bank)]
        return facts[0] == facts[1]
    return queries is bank


def _ordered(
    queries: Array, bank: Array, starts: Tensor, ids: Tensor, longest: float
) -> tuple[Asked, Tensor, bool]:
    """The rows asked for in the ranking's order; where each was given; whether fp64 is cheaper."""
    device = starts.device
    scores = torch.empty(len(ids), dtype=torch.float32, device=device)
    lengths = torch.empty(len(queries), dtype=torch.float32, device=device)
    sizes = starts.diff()
    bounds = starts.tolist()
    step = max(1, min(QUERIES, _PADDED // int(sizes.max())))
    for first in range(0, len(queries), step):
        block = to_fp32(queries[first : first + step], device)
        last = first + len(block)
        lengths[first:last] = row_lengths(block)
        part = slice(bounds[first], bounds[last])
        scores[part] = _scores(block, bank, sizes[first:last], ids[part])
    owners = torch.repeat_interleave(torch.arange(len(queries), device=device), sizes)
    order = ids.sort(stable=True).indices
    order = order[falling_order(owners[order], scores[order])]
    ids, scores = ids[order], scores[order]
    counts = torch.zeros_like(ids)

    # In fp64: the product of two norms may overflow fp32.
    huge = lengths.cpu().double().mul(longest).gt(_MOST_LENGTH).to(device)

    def limited(share: float) -> Asked:
        margins = lengths * share * (longest + 2.0**-50)
        margins[huge] = torch.inf
        own = margins[owners]
        return Asked(starts, ids, scores, scores + own, scores - own, counts)

    asked = limited(product_error(queries.shape[1]))
    wide = device.type in ("cpu", "cuda") and _unclear(queries, bank, asked) > WIDE
    return limited(_wide_error(queries.shape[1])) if wide else asked, order, wide


def _wide_error(columns: int) -> float:
    """The bound that `product_error` gives, for fp64 products that are rounded to fp32."""
    return 1.01 * (4 + columns * 2.0**-27) * 2.0**-24 / (1 - 3 * (columns + 16) * 2.0**-24)


def _scores(queries: Tensor, bank: Array, sizes: Tensor, ids: Tensor) -> Tensor:
    """The exact scores fp32 [P] of rows `ids`, of which `sizes[n]` belong to query n."""
    widest = int(sizes.max())
    if len(queries) * widest <= 2 * len(ids):  # filled up: no query is gathered for each row
        taken = torch.arange(widest, device=ids.device) < sizes[:, None]
        places = torch.full(taken.shape, -1, dtype=torch.int64, device=ids.device)
        found: Tensor = canonical_scores(queries, bank, places.masked_scatter_(taken, ids))
        return found[taken]
    owners = torch.repeat_interleave(torch.arange(len(queries), device=ids.device), sizes)
    return canonical_pairs(queries, bank, owners, ids)


def _unclear(queries: Array, bank: Array, asked: Asked) -> float:
    """The share of the rows of a sample that fp32 products leave to be scored."""
    device = asked.starts.device
    rows = to_fp32(bank[:: -(-len(bank) // _SAMPLE[1])], device)
    found, sampled = 0, 0
    for query in range(0, len(queries), -(-len(queries) // _SAMPLE[0])):
        first, last = asked.starts[query : query + 2].tolist()
        products = rows @ to_fp32(queries[query : query + 1], device)[0]
        places = torch.searchsorted(-asked.above[first:last], -products, right=True)
        if first < last:
            lowest = asked.below[first:last][(places - 1).clamp_min_(0)]
            found += int(((places > 0) & (products >= lowest)).sum())
        sampled += len(rows)
    return found / sampled


def _count(
    products: Tensor, queries: Tensor, rows: Tensor, start: int, first: int, asked: Asked
) -> None:
    starts = asked.starts[first : first + len(queries) + 1]
    sizes = starts.diff()[:, None]
    # [n, widest], filled up with what is never reached; rising, as searchsorted wants it.
    slots = torch.arange(int(sizes.max()), device=products.device)
    taken = slots < sizes
    sources = (starts[:-1, None] + slots).masked_fill_(~taken, 0)
    falling = asked.above[sources].neg_().masked_fill_(~taken, torch.inf)
    products.nan_to_num_(0.0)  # of what might overflow: any value is unclear
    places = torch.searchsorted(falling, products.neg(), right=True)
    places.clamp_(max=sizes)
    lowest = asked.below[sources].gather(1, (places - 1).clamp_min_(0))
    unclear = (places > 0) & (products >= lowest)
    counted = (starts[:-1, None] + places)[~unclear & (places < sizes)]
    query, row = unclear.nonzero(as_tuple=True)
    del products, places, lowest, unclear
    scores = canonical_pairs(queries, rows, query, row)
    place = _place(scores, row + start, starts[query], starts[query + 1], asked)
    counted = torch.cat([counted, place[place < starts[query + 1]]])
    asked.counts.add_(torch.bincount(counted, minlength=len(asked.counts)))


def _place(scores: Tensor, ids: Tensor, low: Tensor, high: Tensor, asked: Asked) -> Tensor:
    """The first of the rows low, …, high - 1 asked for that such a row comes before, or high."""
    widest = int((high - low).max()) if len(ids) else 0
    for _ in range(widest.bit_length()):
        middle = (low + high) // 2
        probe = middle.clamp_max(len(asked.ids) - 1)  # where there is nothing left to halve
        other = asked.scores[probe]
        before = (scores > other) | ((scores == other) & (ids < asked.ids[probe]))
        open_ = low < high
        high = torch.where(open_ & before, middle, high)
        low = torch.where(open_ & ~before, middle + 1, low)
    return low
