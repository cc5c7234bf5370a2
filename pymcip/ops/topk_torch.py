"""Exact top-k in plain torch, on any device it has (contract: `pymcip.ops.topk`).

Blocks of scores are fp32 matrix products. A pair is a candidate unless its certified upper bound
is below the cut of its query: the threshold, or a lower bound of the k-th best score. Candidates
get their canonical score at once and are merged into the best so far, which raises the cut. So
nothing is ever dropped that could belong to the result, whatever the data; where many rows are
within the bound of the k-th (all of them equal, say), all of those are scored in fp64.

The certificate. With u = 2^-24, an fp32 product of any order, fused or not, is off by at most
gamma_D |q| |c|, gamma_D = D u / (1 - D u). The canonical score's own fp64 sum and its rounding to
fp32 add (1 + 2^-20) u |q| |c|, the sum of score and bound 2 u |q| |c|, the product of the norms
and their rounding u each, and a norm in fp32 is off by at most gamma_D |q|: together less than

    eps = 1.01 (D + 16) u / (1 - 3 (D + 16) u) |q| |c|.

What underflows, flushed to 0 or not, adds sqrt(D) 2^-126 (|q| + |c|) + D 2^-126; norms that are
2^-50 longer than they are account for that, as D u 2^-50 (|q| + |c| + 2^-50) is more.

Extra memory: about 64 MiB, of which 16 hold scores and up to 16 bank rows in fp32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from pymcip.ops.arrays import Array, Progress, device_of, to_fp32
from pymcip.ops.canonical import canonical_pairs

QUERIES = 1024
ROWS = 4096
_ELEMENTS = 1 << 22  # of a block of bank rows, and twice those of a block of queries
MERGED = 1 << 17  # places and candidates merged at once
_UNDERFLOW = 2.0**-50


def topk_torch(
    queries: Array,
    bank: Array,
    k: int,
    threshold: float,
    *,
    exact: bool,
    threads: int,  # torch's own setting holds
    progress: Progress | None,
) -> tuple[Array, Array]:
    """See `pymcip.ops.topk`; exact=False ranks by the fp32 products as they come."""
    device = device_of(queries)
    count, columns = queries.shape
    ids = torch.full((count, k), -1, dtype=torch.int64, device=device)
    scores = torch.full((count, k), -torch.inf, dtype=torch.float32, device=device)
    step = max(1, min(QUERIES, _ELEMENTS // (2 * columns), MERGED // k))
    rows_step = max(1, min(ROWS, _ELEMENTS // columns))
    share = product_error(columns) if exact else 0.0
    done, total = 0, count * len(bank)
    with fp32_products(device):
        for start in range(0, len(bank) if count else 0, rows_step):
            rows = to_fp32(bank[start : start + rows_step], device)
            lengths = row_lengths(rows)
            for first in range(0, count, step):
                block = to_fp32(queries[first : first + step], device)
                # Adding +0 turns -0 into +0, which ranks the same.
                products = (block @ rows.T).add_(0.0)
                _merge_block(
                    block,
                    rows,
                    products,
                    row_lengths(block) * share,
                    lengths,
                    start,
                    threshold,
                    ids[first : first + step],
                    scores[first : first + step],
                    exact,
                )
                del products  # not two of them at a time
                done += len(block) * len(rows)
                if progress is not None:
                    progress(done, total)
    return (ids, scores) if isinstance(queries, torch.Tensor) else (ids.numpy(), scores.numpy())


def _merge_block(
    queries: torch.Tensor,  # [n, D]
    rows: torch.Tensor,  # [m, D]
    upper: torch.Tensor,  # [n, m], their products; overwritten with upper bounds
    share: torch.Tensor,  # [n], times the row's length: by how much a product may be off
    lengths: torch.Tensor,  # [m]
    start: int,  # the first row's id
    threshold: float,
    ids: torch.Tensor,  # [n, k] the best so far, of rows before `start`; replaced
    scores: torch.Tensor,
    exact: bool,
) -> None:
    k = ids.shape[1]
    if exact:
        upper.addcmul_(share[:, None], lengths[None])
    cut = scores[:, -1].clamp_min(threshold)
    # Not below, rather than at least: NaN, where a product overflowed on the way, is a candidate.
    wanted = (upper < cut[:, None]).logical_not_()
    counts = wanted.sum(1)
    if upper.shape[1] > k and int(counts.max()) > 2 * k:
        # The k largest of the block are known not to be lower than this, so that the k-th is not.
        best, places = upper.topk(k, dim=1)
        lower = best - 2 * share[:, None] * lengths[places]
        lower = torch.where(best.isfinite(), lower, -torch.inf).amin(1)
        # Rounded: the differences are within the 16 u that the bound has to spare.
        cut = torch.maximum(cut, lower)
        torch.lt(upper, cut[:, None], out=wanted).logical_not_()
        counts = wanted.sum(1)
    ends = counts.cpu().numpy().cumsum()
    first = 0
    while first < len(ends):
        before = int(ends[first - 1]) if first else 0
        if ends[-1] == before:
            return
        last = max(first + 1, int(np.searchsorted(ends, before + MERGED, side="right")))
        part = slice(first, last)
        query, place = wanted[part].nonzero(as_tuple=True)
        if exact:
            found = canonical_pairs(queries[part], rows, query, place)
        else:
            found = upper[part][query, place]
        keep = found >= threshold
        query, place, found = query[keep], place[keep], found[keep]
        ids[part], scores[part] = _merge(ids[part], scores[part], query, place + start, found)
        first = last


def _merge(
    ids: torch.Tensor,
    scores: torch.Tensor,
    query: torch.Tensor,
    new_ids: torch.Tensor,
    new_scores: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best [n, k], by score and then id, of these and of the new pairs.

    New pairs are in order of their ids for each query, and these are higher than the old ones.
    """
    n, k = ids.shape
    own = torch.arange(n, device=ids.device)
    owner = torch.cat([own.repeat_interleave(k), query])
    all_scores = torch.cat([scores.flatten(), new_scores])
    all_ids = torch.cat([ids.flatten(), new_ids])
    order = falling_order(owner, all_scores)
    # n (k of them, and the new ones) in order of their owners: the first k of each.
    sizes = k + torch.bincount(query, minlength=n)
    starts = sizes.cumsum(0) - sizes
    best = order[starts[:, None] + torch.arange(k, device=ids.device)]
    return all_ids[best], all_scores[best]


def falling_order(owners: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """The order int64 [n] by owner (int64), then by falling score (fp32); equals stay as they are."""
    bits = scores.view(torch.int32)  # monotone in the score but for the sign
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    return ((owners << 32) - bits).sort(stable=True).indices


def product_error(columns: int) -> float:
    """By how much |q| |c| an fp32 product may be off, with all that the certificate allows for."""
    share = (columns + 16) * 2.0**-24
    return share * 1.01 / (1 - 3 * share)


def row_lengths(rows: torch.Tensor) -> torch.Tensor:
    """Norms [n] of fp32 rows [n, D], and a little more, which accounts for underflow."""
    return torch.linalg.vector_norm(rows, dim=1) + _UNDERFLOW


@contextlib.contextmanager
def fp32_products(device: torch.device) -> Iterator[None]:
    """Matrix products in true fp32, whatever autocast or precision the caller has set."""
    with torch.autocast(device.type, enabled=False):
        if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # torch >= 2.9
            back_ends: list[Any] = [torch.backends.cuda, torch.backends.mkldnn]
            settings = [back_end.matmul for back_end in back_ends]
            before = [setting.fp32_precision for setting in settings]
            try:
                for setting in settings:
                    setting.fp32_precision = "ieee"
                yield
            finally:
                for setting, value in zip(settings, before, strict=True):
                    setting.fp32_precision = value
        else:
            precision = torch.get_float32_matmul_precision()
            try:
                torch.set_float32_matmul_precision("highest")
                yield
            finally:
                torch.set_float32_matmul_precision(precision)
