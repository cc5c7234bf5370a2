"""Mean average precision of full rankings: GPR1200's step form, and the trapezoids of revisitop.

The places of relevant rows in a full ranking come from `pymcip.ops.ranks`: no ranking is ever whole
in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pymcip.errors import DataError
from pymcip.metrics.inputs import (
    Array,
    Float64,
    Int64,
    as_labels,
    as_ranks,
    check_rows,
    unit_pair,
    unit_rows,
)
from pymcip.ops import ranks as ranks_of

REVISITED = {  # what counts as relevant and what is junk (Radenović et al., section 4)
    "easy": (("easy",), ("junk", "hard")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("junk", "easy")),
}
RANKS_AT_ONCE = 1 << 20  # relevant rows whose places are asked for in one call


def full_ranking_map(embeddings: Array, labels: Array, *, queries: Array | None = None) -> float:
    """Measure image-to-image mAP over the full ranking, as GPR1200 defines it.

    The mean of `full_ranking_ap`, which says how, what is taken and what is raised. Not comparable
    with mAP variants that leave the query out or that stop at rank k.

    Returns:
        Mean AP over the N queries, percent.
    """
    return float(full_ranking_ap(embeddings, labels, queries=queries).mean())


def full_ranking_ap(embeddings: Array, labels: Array, *, queries: Array | None = None) -> Float64:
    """Measure each image's average precision over the full ranking, as GPR1200 defines it.

    Every image is a query and ranks all N images. The query itself is in the ranking and counts as
    relevant. AP = (1 / n_rel) * sum over hits of (hit number / 1-based rank), the step form.

    Args:
        embeddings: float [N, D], N >= 1.
        labels: int [N]; images with equal labels are relevant for each other.
        queries: float [N, D], the vectors that the same images search with; default: `embeddings`.

    Returns:
        float64 [N], percent. Means of slices are the means of GPR1200's parts.

    Raises:
        DataError: wrong shapes, values that are not finite, or negative labels.

    Source: Schall et al., GPR1200 (MMM 2022).
    """
    if queries is None:
        asked = vectors = unit_rows(embeddings, "embeddings")
    else:
        asked, vectors = unit_pair(queries, "queries", embeddings, "embeddings")
        check_rows(asked, "queries", vectors, "embeddings")
    classes = as_labels(labels, "labels", vectors, "embeddings")
    return 100 * step_precisions(asked, classes, vectors, classes)


def trapezoidal_map(
    ranks: npt.ArrayLike,
    positives: Sequence[npt.ArrayLike],
    junk: Sequence[npt.ArrayLike] | None = None,
) -> float:
    """Measure mAP of given rankings by the trapezoidal rule, as Oxford5k, revisitop and INSTRE do.

    Junk is taken out of the ranking, so that what follows moves up. For positive j (0-based) at
    0-based rank r the precision before it is p0 = j / r (1 where r = 0) and with it
    p1 = (j + 1) / (r + 1); AP is the sum of (p0 + p1) / 2 over the positives that are ranked, divided
    by the number of all distinct positives, ranked or not. Queries without positives are left out.

    Args:
        ranks: int [database, queries]: column q holds database rows, best first, as in revisitop.
            It may be cut short; places that hold -1 are empty.
        positives: of each query the relevant database rows, 0-based, in any order.
        junk: of each query the rows to take out; None: no junk. A row that is both stays, and moves
            up what follows (revisitop).

    Returns:
        Mean AP over the queries with positives, percent.

    Raises:
        DataError: wrong shapes or lists, a row ranked twice, or no query has positives.

    Source: Radenović et al., Revisiting Oxford and Paris (CVPR 2018), their evaluate.py; for INSTRE
    the split of Iscen et al. (CVPR 2017).
    """
    columns = _ranking(ranks, len(positives))
    wanted = _row_lists(positives, "positives", len(positives))
    ignored = _row_lists(junk, "junk", len(positives))
    needed = _together([wanted, ignored])
    places = [_listed(column, rows) for column, rows in zip(columns.T, needed, strict=True)]
    return _mean(_trapezoids(places, wanted, ignored)[0], "positives")


def trapezoidal_retrieval(
    queries: Array,
    database: Array,
    positives: Sequence[npt.ArrayLike],
    junk: Sequence[npt.ArrayLike] | None = None,
) -> float:
    """Measure `trapezoidal_map` of the full rankings of a database's embeddings.

    Args:
        queries: float [N, D].
        database: float [M, D].
        positives: of each query the relevant rows of `database`, 0-based, in any order.
        junk: of each query the rows to take out of the ranking; None: no junk.

    Returns:
        Mean AP over the queries with positives, percent.

    Raises:
        DataError: wrong shapes or lists, values that are not finite, or no query has positives.
    """
    asked, known = unit_pair(queries, "queries", database, "database")
    wanted = _row_lists(positives, "positives", len(asked), len(known))
    ignored = _row_lists(junk, "junk", len(asked), len(known))
    needed = [
        np.union1d(*lists) if len(lists[0]) else lists[0]
        for lists in zip(wanted, ignored, strict=True)
    ]
    places = _placed(asked, known, needed)
    return _mean(_trapezoids(places, wanted, ignored)[0], "positives")


def revisited_map(
    ranks: npt.ArrayLike,
    gnd: Sequence[Mapping[str, Any]],
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """Measure revisitop's figures (ROxford, RParis) of given rankings.

    Easy: relevant are the easy rows, junk and hard ones are taken out of the ranking. Medium: easy
    and hard ones are relevant, junk is taken out. Hard: hard ones are relevant, junk and easy ones are
    taken out. AP as in `trapezoidal_map`. Precision at k is the share of relevant rows among the
    first min(k, 1-based rank of the last relevant one); 0 if none is ranked. Queries without
    relevant rows are left out of a difficulty's means.

    Args:
        ranks: int [database, queries], as `trapezoidal_map` takes it.
        gnd: of each query the rows "easy", "hard" and "junk" (0-based; junk may be missing), as in
            gnd_roxford5k.pkl's "gnd". Other keys are ignored.
        ks: the k wanted of mP@k.

    Returns:
        {"easy_map", "medium_map", "hard_map", "easy_mp1", …, "hard_mp10"}, percent.

    Raises:
        ConfigError: a k below 1.
        DataError: wrong shapes or lists, a row ranked twice, or a difficulty for which no query
            has relevant rows: there is no mean of nothing.

    Source: Radenović et al., Revisiting Oxford and Paris (CVPR 2018), their evaluate.py.
    """
    columns = _ranking(ranks, len(gnd))
    lists = _truth(gnd, len(gnd), None)
    needed = _together(lists.values())
    places = [_listed(column, rows) for column, rows in zip(columns.T, needed, strict=True)]
    return _revisited(places, lists, ks)


def revisited_retrieval(
    queries: Array,
    database: Array,
    gnd: Sequence[Mapping[str, Any]],
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """Measure `revisited_map` of the full rankings of a database's embeddings.

    Args:
        queries: float [N, D].
        database: float [M, D].
        gnd: of each query the rows of `database` that are "easy", "hard" and "junk".
        ks: the k wanted of mP@k.

    Returns:
        As `revisited_map`, percent.

    Raises:
        ConfigError: a k below 1.
        DataError: wrong shapes or lists, values that are not finite, or a difficulty for which no
            query has relevant rows.
    """
    asked, known = unit_pair(queries, "queries", database, "database")
    lists = _truth(gnd, len(asked), len(known))
    return _revisited(_placed(asked, known, _together(lists.values())), lists, ks)


def step_precisions(queries: Tensor, wanted: Tensor, bank: Tensor, classes: Tensor) -> Float64:
    """Compute the step AP, float64 [N], of the full ranking of `bank` [M, D] for each query [N, D].

    Relevant are the rows whose class is the query's `wanted` one; every query has some.
    """
    members = classes.sort(stable=True).indices
    values, counts = torch.unique(classes, return_counts=True)
    own = torch.searchsorted(values, wanted)
    firsts = (counts.cumsum(0) - counts)[own]  # of each query's relevant rows, in `members`
    sizes = counts[own].cpu().numpy()
    precisions = np.empty(len(queries))
    for rows in _shares(sizes, RANKS_AT_ONCE):
        indptr = np.concatenate([[0], np.cumsum(sizes[rows])])
        owners = np.repeat(np.arange(len(indptr) - 1), sizes[rows])
        numbers = np.arange(indptr[-1]) - indptr[owners]  # of a query's relevant rows
        places = firsts[rows][torch.from_numpy(owners).to(bank.device)]
        places += torch.from_numpy(numbers).to(bank.device)
        found = ranks_of(queries[rows], bank, indptr, members[places]).cpu().numpy()
        # In the order of their ranks within each query.
        found = np.sort(owners * len(bank) + found) - owners * len(bank)
        precisions[rows] = np.add.reduceat((numbers + 1) / (found + 1), indptr[:-1]) / sizes[rows]
    return precisions


def _placed(queries: Tensor, bank: Tensor, needed: Sequence[Int64]) -> list[tuple[Int64, Int64]]:
    """Find the ranks of each query's needed rows of `bank`: these rows and ranks, per query."""
    sizes = np.array([len(rows) for rows in needed], dtype=np.int64)
    places: list[tuple[Int64, Int64]] = []
    for part in _shares(sizes, RANKS_AT_ONCE):
        indptr = np.concatenate([[0], np.cumsum(sizes[part])])
        rows = needed[part]
        found = ranks_of(queries[part], bank, indptr, np.concatenate(rows)).cpu().numpy()
        places += zip(rows, np.split(found, indptr[1:-1]), strict=True)
    return places


def _listed(column: Int64, needed: Int64) -> tuple[Int64, Int64]:
    """Find which of the needed rows a ranking lists, and at which ranks."""
    ranks = np.flatnonzero(np.isin(column, needed))
    rows = column[ranks]
    values, counts = np.unique(rows, return_counts=True)
    if len(values) < len(rows):
        raise DataError(
            f"a ranking lists row {int(values[counts.argmax()])} {int(counts.max())} times; list each "
            "database row once"
        )
    return rows, ranks


def _trapezoids(
    places: Sequence[tuple[Int64, Int64]], positives: Sequence[Int64], junk: Sequence[Int64]
) -> tuple[list[float], list[Int64]]:
    """Compute the trapezoidal AP of each query that has positives, and their ranks without junk."""
    precisions, kept = [], []
    for (rows, ranks), wanted, ignored in zip(places, positives, junk, strict=True):
        if not len(wanted):
            continue
        found = np.sort(ranks[np.isin(rows, wanted)])
        found = found - np.searchsorted(np.sort(ranks[np.isin(rows, ignored)]), found)
        hits = np.arange(len(found))
        before = np.where(found > 0, hits / np.maximum(found, 1), 1.0)
        precisions.append(float((before + (hits + 1) / (found + 1)).sum()) / (2 * len(wanted)))
        kept.append(found)
    return precisions, kept


def _revisited(
    places: Sequence[tuple[Int64, Int64]], lists: Mapping[str, list[Int64]], ks: Sequence[int]
) -> dict[str, float]:
    """Compute revisitop's figures from the ranks of each query's easy, hard and junk rows."""
    maps: dict[str, float] = {}
    shares: dict[str, float] = {}
    counts = as_ranks(ks)
    for difficulty, kinds in REVISITED.items():
        wanted, ignored = (_together(lists[kind] for kind in chosen) for chosen in kinds)
        precisions, kept = _trapezoids(places, wanted, ignored)
        maps[f"{difficulty}_map"] = _mean(precisions, " or ".join(kinds[0]) + " rows")
        for k in counts:
            reached = [min(k, int(found[-1]) + 1) if len(found) else 1 for found in kept]
            hits = [
                float((found < reach).sum()) / reach
                for found, reach in zip(kept, reached, strict=True)
            ]
            shares[f"{difficulty}_mp{k}"] = _mean(hits, "")
    return maps | shares


def _together(lists: Iterable[Sequence[Int64]]) -> list[Int64]:
    """Join several kinds of lists of rows: those of each query, sorted and distinct."""
    return [np.unique(np.concatenate(own)) for own in zip(*lists, strict=True)]


def _mean(shares: Sequence[float], what: str) -> float:
    """Average shares, in percent; raises DataError if there are none."""
    if not shares:
        raise DataError(
            f"no query has {what}, so that there is nothing to average; check the ground truth"
        )
    return 100 * math.fsum(shares) / len(shares)


def _shares(sizes: Int64, most: int) -> Iterator[slice]:
    """Yield consecutive slices whose sizes add up to `most` at most, or of a single query."""
    ends = np.cumsum(sizes)
    first = 0
    while first < len(sizes):
        before = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + most, side="right")))
        yield slice(first, last)
        first = last


def _ranking(ranks: Any, queries: int) -> Int64:
    """Check a ranking as revisitop writes it: int64 [database, queries]."""
    columns = np.asarray(ranks)
    if columns.ndim != 2 or columns.dtype.kind not in "iu" or columns.shape[1] != queries:
        raise DataError(
            f"ranks is {columns.dtype} {columns.shape}; needed: integers [database, queries], with "
            f"a column for each of the {queries} queries"
        )
    return columns.astype(np.int64, copy=False)


def _truth(
    gnd: Sequence[Mapping[str, Any]], queries: int, database: int | None
) -> dict[str, list[Int64]]:
    """Make each query's lists of rows by kind: "easy", "hard" and "junk"."""
    for number, truth in enumerate(gnd):
        missing = [kind for kind in ("easy", "hard") if kind not in truth]
        if missing:
            raise DataError(
                f"gnd[{number}] has {', '.join(map(str, truth)) or 'nothing'}, but no "
                f"{' and no '.join(missing)}; needed: lists of rows 'easy', 'hard' and, if any, 'junk'"
            )
    return {
        kind: _row_lists([truth.get(kind, ()) for truth in gnd], f"gnd {kind}", queries, database)
        for kind in ("easy", "hard", "junk")
    }


def _row_lists(
    lists: Sequence[Any] | None, name: str, queries: int, database: int | None = None
) -> list[Int64]:
    """Make each query's list of distinct rows, sorted; empty lists if `lists` is None."""
    if lists is None:
        return [np.empty(0, dtype=np.int64)] * queries
    if len(lists) != queries:
        raise DataError(f"{name} has {len(lists)} lists for {queries} queries; give one per query")
    found = []
    for number, values in enumerate(lists):
        rows = np.asarray(values)
        if rows.size == 0:
            rows = rows.astype(np.int64)  # NumPy makes floats of an empty list
        if rows.dtype.kind not in "iu":
            raise DataError(f"{name}[{number}] holds {rows.dtype}; needed: integers, rows from 0")
        rows = np.unique(rows).astype(np.int64)
        if len(rows) and (rows[0] < 0 or (database is not None and rows[-1] >= database)):
            allowed = "" if database is None else f", below {database}"
            raise DataError(
                f"{name}[{number}] goes from {rows[0]} to {rows[-1]}; needed: rows from 0{allowed} "
                "(MATLAB files count from 1)"
            )
        found.append(rows)
    return found
