"""`order_bank`: an order of a frozen bank in which rows that are near stand together.

`margin_softmax` with `delta` > 0 leaves out of its gradients the cells of 256 consecutive columns
that hold next to none of a row block's softmax mass. In a bank in random order every cell holds
some of everything; in this order the mass of a row gathers in few cells.

How it is done. K = ceil(C / cluster_size) centroids are found on a sample of 32 rows each by
spherical k-means (Lloyd's steps; in the first of them, centroids whose rows have another centroid
about as near move into clusters that are wide). Every row goes to its nearest centroid, in one
pass over the bank. The centroids are lined up by recursive bisection along their principal
direction, each half that is nearer to what stands before it first; then come the rows by place of
their centroid, and by row id within a cluster.

With more than 8192 centroids (65,536 on a GPU: 16 million rows), a row is only compared with those
in the 16 nearest of sqrt(K) groups of centroids. Where the clusters form no larger clusters, this
misses the nearest one fairly often, which costs order and never correctness: any permutation gives
the same losses.

Sums over rows are taken in fixed point, so that they don't depend on the order of additions.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pymcip.errors import ConfigError
from pymcip.ops.arrays import Array, ChosenRows, MatrixParts, Progress, raise_unrankable
from pymcip.ops.margin_contract import CELL_COLUMNS

_SAMPLE = 32  # rows of the sample for a centroid
CHUNK_ROWS = 32_768  # rows at a time
SCORES = 1 << 26  # cosines at a time
FLAT = {"cpu": 8192, "cuda": 65_536}  # centroids that every row is compared with
_PROBES = 16  # groups of centroids that a row tries where there are more
_GROUP_ITERATIONS = 4
_MOVED = 0.25  # share of the centroids that move at most in the first step
_POWER_ITERATIONS = 16  # for a direction to cut along; it need not be exact
_FIXED_POINT = 2.0**30  # with up to 2^31 rows, sums of numbers <= 2 stay below 2^63


def order_bank(
    bank: Array,
    *,
    cluster_size: int = CELL_COLUMNS,
    iterations: int = 12,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> Array:
    """A permutation of the bank's rows that puts near rows together: int64 [C], old ids by place.

    To be done once for a frozen bank, before training with `margin_softmax(..., delta=1e-3)`. Row
    `order[place]` moves to `place`, so column ids change from `id` to `places[id]`:

        >>> order = order_bank(bank)
        >>> bank, places = bank[order], order.argsort()
        >>> indices = places[indices]

    (`order` itself leads back: column `place` of the new bank is row `order[place]` of the old.)

    Args:
        bank: [C, D] floating point, D >= 1, a NumPy array, memory map, tensor, or rows that are read when
            they are asked for (`pymcip.ops.arrays`), any norms. Rows of zeros have no direction and come last.
        cluster_size: rows of a cluster, on average. The filter's cells have 256 columns.
        iterations: steps of k-means on the sample; 0 leaves the centroids at random rows.
        seed: the same bank, seed, device and number of threads give the same order.
        device: where to compute, for instance "cuda"; by default the bank's device, the CPU for
            NumPy arrays. A bank that is elsewhere is streamed there by chunks.
        progress: called with the rows done and to do; the sample's rows count once a step.

    Memory, beside the bank: the sample in fp16 (at cluster_size=256 an eighth of the rows), about
    40 D bytes a centroid, 40 bytes a row, and below 1 GiB for a chunk of 32,768 rows at D = 768.
    12 million rows of 768 take 2.4 + 1.5 + 0.5 + 1 GB. Time: C K D multiply-adds for the pass over
    the bank (C 17 sqrt(K) D where groups are tried), and an eighth of that for each of the
    `iterations`. A smaller `cluster_size` finds smaller clusters for more time.

    Returns:
        An int64 tensor on the bank's device; a NumPy array if the bank is no tensor.

    Raises:
        ConfigError: an argument has the wrong type, shape or range.
        DataError: a row holds NaN or infinity; the message has its index.
    """
    _check_bank(bank)
    least = {"cluster_size": 1, "iterations": 0, "seed": 0}
    given = dict(zip(least, (cluster_size, iterations, seed), strict=True))
    problems = [
        f"order_bank: {name}={value!r} is not allowed; allowed: an integer of at least {least[name]}"
        for name, value in given.items()
        if not hasattr(value, "__index__") or operator.index(value) < least[name]
    ]
    if problems:
        raise ConfigError(problems)
    cluster_size, iterations, seed = map(operator.index, (cluster_size, iterations, seed))
    own = bank.device if isinstance(bank, Tensor) else torch.device("cpu")
    count = bank.shape[0]
    place = own if device is None else torch.device(device)
    clusters = -(-count // cluster_size)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad(), torch.autocast(place.type, enabled=False):
        sample = _sample(bank, _SAMPLE * clusters if clusters > 1 else 0, generator, place)
        clusters = min(clusters, len(sample))
        done, total = 0, count + (iterations * len(sample) if clusters > 1 else 0)

        def advance(rows: int) -> None:
            nonlocal done
            done += rows
            if progress is not None:
                progress(done, total)

        if clusters > 1:
            centroids = _k_means(sample, clusters, iterations, generator, advance)
            search = _search(centroids, generator)
            places = torch.empty(clusters, dtype=torch.int64)
            places[_line_up(centroids.cpu().float())] = torch.arange(clusters)
            places = places.to(place)
        del sample
        keys = torch.zeros(count, dtype=torch.int64, device=place)
        for start in range(0, count, CHUNK_ROWS):
            rows = _unit_rows(bank, slice(start, start + CHUNK_ROWS), place)
            part = keys[start : start + CHUNK_ROWS]
            if clusters > 1:
                part[:] = places[_nearest(rows, search).ids]
            part[(rows == 0).all(1)] = count
            advance(len(rows))
        order = keys.argsort(stable=True)
    return order.to(own) if isinstance(bank, Tensor) else order.cpu().numpy()


def _check_bank(bank: Array) -> None:
    allowed = "allowed: a NumPy array or tensor [C, D] of floating point numbers, D >= 1"
    if isinstance(bank, Tensor):
        floating = bank.is_floating_point() and bank.layout == torch.strided and not bank.is_meta
    else:
        known = isinstance(bank, (np.ndarray, MatrixParts, ChosenRows))
        floating = known and bank.dtype.kind == "f"
    if not floating:
        kind = getattr(bank, "dtype", type(bank).__name__)
        raise ConfigError(f"order_bank: bank is {kind}; {allowed}")
    if len(bank.shape) != 2 or bank.shape[1] == 0:
        raise ConfigError(f"order_bank: bank has shape {tuple(bank.shape)}; {allowed}")


def _unit_rows(bank: Array, rows: slice | Tensor, device: torch.device) -> Tensor:
    """Rows of the bank as unit rows in fp32, zeros as they are. Raises DataError: NaN, infinity."""
    if isinstance(bank, Tensor):
        chosen = rows if isinstance(rows, slice) else rows.to(bank.device)
        values = bank[chosen].to(device)
        values = values if values.dtype == torch.float64 else values.float()
    else:
        # A copy: torch warns about read-only arrays, such as memory maps, that it would share.
        wide = np.float64 if bank.dtype.itemsize >= 8 else np.float32
        part = bank[rows] if isinstance(rows, slice) else bank[rows.numpy()]
        values = torch.from_numpy(np.array(part, dtype=wide)).to(device)
    largest = values.abs().amax(1, keepdim=True)
    bad = largest[:, 0].isfinite().logical_not_().nonzero()
    if len(bad):
        first = int(bad[0])
        row = rows.start + first if isinstance(rows, slice) else int(rows[first])
        raise_unrankable("order_bank", "the bank", row, values[first])
    # The largest entry becomes 1 first: squares of huge or tiny ones would over- or underflow.
    values = (values / torch.where(largest > 0, largest, 1)).float()
    return torch.nn.functional.normalize(values, dim=1)


def _sample(bank: Array, size: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """At most `size` distinct rows by rising row id, fp16 unit rows; rows of zeros are left out."""
    chosen = torch.randperm(bank.shape[0], generator=generator)[:size].sort().values
    sample = torch.empty(len(chosen), bank.shape[1], dtype=torch.float16, device=device)
    filled = 0
    for ids in chosen.split(CHUNK_ROWS):
        rows = _unit_rows(bank, ids, device)
        rows = rows[(rows != 0).any(1)]
        sample[filled : filled + len(rows)] = rows
        filled += len(rows)
    return sample[:filled]


# --- spherical k-means --------------------------------------------------------------------------


class _Search(NamedTuple):
    """Centroids [K, D], products' dtype; and, if there are many, unit rows that lead to groups."""

    centroids: Tensor
    groups: Tensor | None = None  # [G, D]
    members: tuple[Tensor, ...] = ()  # G times int64, ids of centroids


class _Nearest(NamedTuple):
    ids: Tensor  # int64 [n], the nearest centroid's
    best: Tensor  # fp32 [n], its cosine
    second: Tensor  # fp32 [n], the next one's


def _search(centroids: Tensor, generator: torch.Generator) -> _Search:
    """`centroids`: fp32 unit rows. Beyond `FLAT` of them sqrt(K) groups are formed."""
    # fp16 products are fast on GPUs only.
    operands = centroids.half() if centroids.device.type == "cuda" else centroids
    count = centroids.shape[0]
    if count <= FLAT.get(centroids.device.type, FLAT["cpu"]):
        return _Search(operands)
    groups = _k_means(
        centroids, math.isqrt(count - 1) + 1, _GROUP_ITERATIONS, generator, lambda rows: None
    )
    grouped = _Search(groups.to(operands.dtype))
    ids = torch.cat([_nearest(part, grouped).ids for part in centroids.split(CHUNK_ROWS)])
    sizes = torch.bincount(ids, minlength=groups.shape[0]).tolist()
    filled = [group for group, size in enumerate(sizes) if size]
    members = ids.argsort(stable=True).split([sizes[group] for group in filled])
    return _Search(operands, grouped.centroids[filled], members)


def _nearest(rows: Tensor, search: _Search) -> _Nearest:
    rows = rows.to(search.centroids.dtype)
    if search.groups is None:
        width = search.centroids.shape[0]
        found = [_two_best(part @ search.centroids.T) for part in rows.split(-(-SCORES // width))]
        values, ids = (torch.cat(parts) for parts in zip(*found, strict=True))
    else:
        count, probes = rows.shape[0], min(_PROBES, search.groups.shape[0])
        tried = (rows @ search.groups.T).topk(probes, dim=1).indices.flatten()
        slots = tried.argsort(stable=True)
        sizes = torch.bincount(tried, minlength=search.groups.shape[0]).tolist()
        values = torch.empty(count * probes, 2, device=rows.device)
        ids = torch.empty(count * probes, 2, dtype=torch.int64, device=rows.device)
        for members, some in zip(search.members, slots.split(sizes), strict=True):
            if len(some):
                products = rows[some // probes] @ search.centroids[members].T
                values[some], local = _two_best(products)
                ids[some] = members[local]
        values, ids = values.view(count, -1), ids.view(count, -1)
        values, local = _two_best(values)
        ids = ids.gather(1, local)
    return _Nearest(ids[:, 0], values[:, 0], values[:, 1])


def _two_best(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The two largest of each row and their columns; a single column counts as cosine -1 beside."""
    if scores.shape[1] == 1:
        scores = torch.cat([scores, torch.full_like(scores, -1)], dim=1)
        values, columns = scores.float(), torch.zeros_like(scores, dtype=torch.int64)
        return values, columns
    values, columns = scores.topk(2, dim=1)
    return values.float(), columns


def _k_means(
    sample: Tensor,
    clusters: int,
    iterations: int,
    generator: torch.Generator,
    advance: Callable[[int], None],
) -> Tensor:
    """Unit rows fp32 [clusters, D] from a sample [S, D] of unit rows, S >= clusters."""
    device, (count, dim) = sample.device, sample.shape
    shuffled = torch.randperm(count, generator=generator).to(device)
    centroids = sample[shuffled[:clusters]].float()
    rank = torch.empty_like(shuffled)
    for step in range(iterations):
        search = _search(centroids, generator)
        ids = torch.empty(count, dtype=torch.int64, device=device)
        sums = torch.zeros(clusters, dim, dtype=torch.int64, device=device)
        spread, needed = (torch.zeros_like(sums[:, 0]) for _ in range(2))
        for start in range(0, count, CHUNK_ROWS):
            rows = sample[start : start + CHUNK_ROWS].float()
            found = _nearest(rows, search)
            ids[start : start + CHUNK_ROWS] = found.ids
            for target, values in (
                (sums, rows),
                (spread, 1 - found.best),
                (needed, found.best - found.second),
            ):
                fixed = (values * _FIXED_POINT).round_().to(torch.int64)
                target.index_add_(0, found.ids, fixed)
            advance(len(rows))
        means = torch.nn.functional.normalize(sums.double(), dim=1).float()
        centroids = torch.where((sums != 0).any(1, keepdim=True), means, centroids)
        # Towards the end centroids only settle.
        moved = int(_MOVED * clusters * max(0.0, 1 - 1.5 * (step + 1) / iterations))
        if moved:
            # The loss of cosine without a centroid, against what a second one may gain.
            idle = needed.argsort(stable=True)[:moved]
            wide = spread.argsort(stable=True, descending=True)[:moved]
            useful = spread[wide] > 2 * needed[idle]
            idle, wide = idle[useful], wide[useful]
            # They move to a random row of the wide cluster.
            shuffled = torch.randperm(count, generator=generator).to(device)
            rank[shuffled] = torch.arange(count, device=device)
            first = torch.full_like(needed, count).scatter_reduce_(0, ids, rank, "amin")
            centroids[idle] = sample[shuffled[first[wide]]].float()
    return centroids


# --- the order of the centroids -------------------------------------------------------------------


def _line_up(centroids: Tensor) -> Tensor:
    """int64 [K], an order of the rows in which neighbours are near to each other.

    Halves are cut at the median along the principal direction, until single rows are left.
    """
    order: list[int] = []
    pending = [torch.arange(centroids.shape[0])]
    while pending:
        ids = pending.pop()
        if len(ids) == 1:
            order.append(int(ids))
            continue
        points = centroids[ids]
        centred = points - points.mean(0)
        direction = centred[centred.square().sum(1).argmax()]
        for _ in range(_POWER_ITERATIONS):
            direction = torch.nn.functional.normalize(centred.T @ (centred @ direction), dim=0)
        along = centred @ direction
        halves = ids[along.argsort(stable=True)].tensor_split(2)
        if order:
            last = centroids[order[-1]]
            near = [float(last @ centroids[half].mean(0)) for half in halves]
            halves = halves if near[0] >= near[1] else halves[::-1]
        pending += [halves[1], halves[0]]
    return torch.tensor(order, dtype=torch.int64)
