"""Metrics of the nearest images: R@k, and the accuracy of k-nearest-neighbour votes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from pymcip.errors import ConfigError, DataError
from pymcip.metrics.inputs import (
    Array,
    Int64,
    as_labels,
    as_ranks,
    as_tensor,
    check_rows,
    unit_pair,
    unit_rows,
)
from pymcip.ops import topk

KNN_TEMPERATURE = 0.07  # of the weighted vote, as in DINO (arXiv 2104.14294)
SCORES_AT_ONCE = 1 << 22  # scores or ballots that are in memory at a time


def recall_at_k(
    embeddings: Array,
    labels: Array,
    ks: Sequence[int] = (1, 2, 4, 8),
    *,
    queries: Array | None = None,
    query_labels: Array | None = None,
    leave_one_out: bool = False,
) -> dict[int, float]:
    """Measure R@k: how often one of the k nearest images has the query's label.

    Without `queries` it is all against all, each image against the *others*: the diagonal is masked,
    so an exact duplicate of the query may be its nearest neighbour. An image whose class has no
    other image can't be hit and counts as a miss.

    Args:
        embeddings: float [N, D]; N >= 2 without `queries`.
        labels: int [N].
        ks: the k wanted; where fewer images are ranked, all of them count.
        queries: float [Q, D], which rank all N.
        query_labels: int [Q].
        leave_one_out: the queries are those of the N images themselves, in order, and each ranks the
            others; without `query_labels`.

    Returns:
        {k: percent of the queries}.

    Raises:
        ConfigError: a k below 1, or only one of queries and query_labels.
        DataError: wrong shapes, fewer than two images, values that are not finite.

    Source: Musgrave et al., A Metric Learning Reality Check (arXiv 2003.08505), section 2; for
    CUB-200, Cars-196 and SOP all against all.
    """
    counts = as_ranks(ks)
    others = leave_one_out or queries is None  # each image ranks the others
    if others != (query_labels is None):
        raise ConfigError("queries and query_labels belong together; give both, or neither")
    if queries is None:
        asked = known = unit_rows(embeddings, "embeddings")
    else:
        asked, known = unit_pair(queries, "queries", embeddings, "embeddings")
    classes = targets = as_labels(labels, "labels", known, "embeddings")
    if others and len(known) < 2:
        raise DataError(
            "R@k needs at least 2 images (each ranks the others), got 1; give more images"
        )
    if query_labels is not None:
        targets = as_labels(query_labels, "query_labels", asked, "queries")
    check_rows(asked, "queries", targets, "labels")
    most = min(max(counts), len(known) - others)
    hits = dict.fromkeys(counts, 0)
    for rows in _chunks(len(asked), most):
        if others:
            own = torch.arange(rows.start, rows.stop, device=known.device)
            found, _ = _nearest_others(asked[rows], known, most, own)
        else:
            found, _ = topk(asked[rows], known, most)
        hit = classes[found] == targets[rows, None]
        for k in counts:
            hits[k] += int(hit[:, :k].any(dim=1).sum())
    return {k: 100 * count / len(asked) for k, count in hits.items()}


def nearest_other_recall(embeddings: Array, labels: Array) -> float:
    """Measure R@1, all against all: how often the nearest *other* image has the query's label.

    Args:
        embeddings: float [N, D], N >= 2.
        labels: int [N].

    Returns:
        Percent of the N images: `recall_at_k` for k = 1, which says more.

    Raises:
        DataError: wrong shapes, fewer than two images, values that are not finite.
    """
    return recall_at_k(embeddings, labels, (1,))[1]


def knn_classify(
    bank: Array,
    bank_labels: Array,
    queries: Array,
    k: int = 21,
    vote: Literal["weighted", "majority"] = "weighted",
    *,
    temperature: float = KNN_TEMPERATURE,
    leave_one_out: bool = False,
    own_rows: Array | None = None,
) -> Int64:
    """Label each query by the vote of its k nearest bank rows.

    Args:
        bank: float [M, D].
        bank_labels: int [M], any values >= 0.
        queries: float [N, D].
        k: neighbours that vote; all of them where the bank has fewer.
        vote: `"weighted"` sums exp(cos / temperature) by class in fp32 (DINO), ties go to the lower
            label; `"majority"` counts, ties go to the larger summed cosine, then the lower label.
        temperature: of the weighted vote.
        leave_one_out: the queries are those of the bank's own images, in order, and no image votes
            for itself.
        own_rows: int [N], the bank row of each query's own image, which doesn't vote for it; -1: the
            bank doesn't hold it. `leave_one_out` says the same of a bank that is the queries.

    Returns:
        int64 [N], values of `bank_labels`.

    Raises:
        ConfigError: k < 1, a temperature <= 0, or an unknown vote.
        DataError: wrong shapes, an empty bank, values that are not finite.
    """
    if vote not in ("weighted", "majority"):
        raise ConfigError(f"vote={vote!r} is not allowed; allowed: 'weighted', 'majority'")
    if k < 1:
        raise ConfigError(f"k={k} is not allowed; it must be >= 1")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ConfigError(
            f"temperature={temperature} is not allowed; it must be finite and above 0"
        )
    asked, known = unit_pair(queries, "queries", bank, "bank")
    classes = as_labels(bank_labels, "bank_labels", known, "bank")
    if leave_one_out and len(asked) != len(known):
        raise DataError(
            f"leave_one_out needs the bank's own rows as queries, got {len(asked)} queries for "
            f"{len(known)} bank rows; give the same embeddings, or leave_one_out=False"
        )
    if leave_one_out and len(known) < 2:
        raise DataError("leave_one_out with one image leaves nobody to vote; give more images")
    own = _own_rows(own_rows, len(known), asked) if own_rows is not None else None
    if leave_one_out:
        own = torch.arange(len(known), device=known.device)
    if own is not None and len(known) < 2:
        raise DataError("the bank holds one image, a query's own; give more images to vote")
    count = min(k, len(known) - (own is not None))
    values, compact = torch.unique(classes, return_inverse=True)
    if own is not None:
        neighbours, cosines = _nearest_others(asked, known, count, own)
    else:
        neighbours, cosines = topk(asked, known, count)
    answers = torch.empty(len(asked), dtype=torch.int64, device=known.device)
    for rows in _chunks(len(asked), len(values)):
        voters = compact[neighbours[rows]]
        ballots = torch.zeros(len(voters), len(values), device=known.device)
        if vote == "weighted":
            # Where exp would overflow less the best cosine, which changes no vote.
            best = cosines[rows, :1] if temperature < 0.0125 else 0.0
            ballots.scatter_add_(1, voters, torch.exp((cosines[rows] - best) / temperature))
            winners = ballots.argmax(dim=1)
        else:
            ballots.scatter_add_(1, voters, torch.ones_like(cosines[rows]))
            similarity = torch.zeros_like(ballots).scatter_add_(1, voters, cosines[rows])
            leading = ballots == ballots.max(dim=1, keepdim=True).values
            winners = similarity.masked_fill(~leading, -torch.inf).argmax(dim=1)
        answers[rows] = values[winners]
    return answers.cpu().numpy()


def _own_rows(values: Array, rows: int, queries: Tensor) -> Tensor | None:
    """Check the rows of the queries' own images; None if there are none."""
    own = as_tensor(values)
    if own.shape != queries.shape[:1] or own.is_floating_point() or own.is_complex():
        raise DataError(
            f"own_rows is {own.dtype} {list(own.shape)}; needed: integers, one per query, -1 for none"
        )
    own = own.to(queries.device, torch.int64)
    if len(own) and not -1 <= int(own.min()) <= int(own.max()) < rows:
        raise DataError(f"own_rows names rows beyond the bank's {rows}; needed: -1 to {rows - 1}")
    return own if bool((own >= 0).any()) else None


def _nearest_others(queries: Tensor, vectors: Tensor, k: int, own: Tensor) -> tuple[Tensor, Tensor]:
    """Find the k nearest rows [Q, D] of each query [Q, D] but its own (-1: none), and scores.

    1 <= k < the number of rows.
    """
    found, scores = topk(queries, vectors, k + 1)
    itself = found == own[:, None]
    itself[:, k] |= ~itself.any(dim=1)  # k + 1 rows that are its equals may all come before it
    return found[~itself].view(-1, k), scores[~itself].view(-1, k)


def _chunks(queries: int, columns: int) -> Iterator[slice]:
    """Yield consecutive slices of the queries, of SCORES_AT_ONCE scores at most each."""
    step = max(1, SCORES_AT_ONCE // max(1, columns))
    for start in range(0, queries, step):
        yield slice(start, min(start + step, queries))
