"""Plain oracles of the metrics, and data to compare with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import settings
from hypothesis import strategies as st

from pymcip.metrics import neighbours, rankings

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.int64]

# Directions whose inner products are exact in fp32 and in fp64 (every row has norm 1 and
# entries 0, +-1/2, +-1), so that ties are real ties in both.
EXACT = np.array(
    [
        [1, 0, 0, 0],
        [0, 1, 0, 0],
        [0.5, 0.5, 0.5, 0.5],
        [0.5, -0.5, 0.5, 0.5],
        [0.5, 0.5, -0.5, -0.5],
        [-0.5, 0.5, 0.5, -0.5],
        [0, 0, 0, -1],
    ]
)
few_settings = settings(max_examples=40, deadline=None)


def unit(rows: Floats) -> Floats:
    rows = np.asarray(rows, dtype=np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def ranking(scores: Floats) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))


def oracle_ap(scores: Floats, relevant: Sequence[bool]) -> float:
    hits, total = 0, 0.0
    for rank, column in enumerate(ranking(scores), start=1):
        if relevant[column]:
            hits += 1
            total += hits / rank
    return total / sum(relevant)


def oracle_map(x: Floats, labels: Ints) -> float:
    x = unit(x)
    return 100 * float(np.mean([oracle_ap(x @ x[q], labels == labels[q]) for q in range(len(x))]))


def oracle_recall_at(x: Floats, labels: Ints, k: int) -> float:
    x = unit(x)
    hits = []
    for q in range(len(x)):
        others = [i for i in ranking(x @ x[q]) if i != q]
        hits.append(labels[q] in labels[others[:k]])
    return 100 * float(np.mean(hits))


def oracle_r1(x: Floats, labels: Ints) -> float:
    return oracle_recall_at(x, labels, 1)


def oracle_trapezoid(order: Sequence[int], relevant: Sequence[int], junk: Sequence[int]) -> float:
    kept = [row for row in order if row not in junk]
    hits, total = 0, 0.0
    for rank, row in enumerate(kept):
        if row in relevant:
            before = 1.0 if rank == 0 else hits / rank
            hits += 1
            total += (before + hits / (rank + 1)) / 2
    return total / len(set(relevant))


def oracle_precision(
    order: Sequence[int], relevant: Sequence[int], junk: Sequence[int], k: int
) -> float:
    kept = [row for row in order if row not in junk]
    places = [place for place, row in enumerate(kept, start=1) if row in relevant]
    reach = min(max(places), k)
    return sum(place <= reach for place in places) / reach


def oracle_revisited(orders: Any, truths: Any, ks: Sequence[int]) -> dict[str, float]:
    splits = {
        "easy": (("easy",), ("junk", "hard")),
        "medium": (("easy", "hard"), ("junk",)),
        "hard": (("hard",), ("junk", "easy")),
    }
    figures = {}
    for name, (good, bad) in splits.items():
        cases = []
        for order, truth in zip(orders, truths, strict=True):
            relevant = [row for kind in good for row in truth[kind]]
            junk = [row for kind in bad for row in truth[kind]]
            if relevant:
                cases.append((order, relevant, junk))
        figures[f"{name}_map"] = 100 * float(np.mean([oracle_trapezoid(*case) for case in cases]))
        for k in ks:
            shares = [oracle_precision(*case, k) for case in cases]
            figures[f"{name}_mp{k}"] = 100 * float(np.mean(shares))
    return figures


def oracle_knn(
    bank: Floats, labels: Ints, queries: Floats, k: int, vote: str, leave_out: bool
) -> list[int]:
    bank, queries = unit(bank), unit(queries)
    answers = []
    for q in range(len(queries)):
        scores = bank @ queries[q]
        voters = [i for i in ranking(scores) if not (leave_out and i == q)][:k]
        ballots = {}
        for label in sorted({int(labels[i]) for i in voters}):
            own = [float(scores[i]) for i in voters if labels[i] == label]
            weighted = sum(math.exp(score / 0.07) for score in own)
            ballots[label] = (weighted,) if vote == "weighted" else (len(own), sum(own))
        best = max(ballots.values())
        answers.append(min(label for label, ballot in ballots.items() if ballot == best))
    return answers


def oracle_recall(images: Floats, texts: Floats, owners: Ints, k: int) -> tuple[float, float]:
    images, texts = unit(images), unit(texts)
    t2i = [owners[t] in ranking(images @ texts[t])[:k] for t in range(len(texts))]
    i2t = [
        any(owners[t] == i for t in ranking(texts @ images[i])[:k])
        for i in range(len(images))
        if i in owners
    ]
    return 100 * float(np.mean(t2i)), 100 * float(np.mean(i2t))


def random_case(seed: int, rows: int = 60, classes: int = 7, dim: int = 12) -> tuple[Floats, Ints]:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, rows)
    centres = generator.normal(size=(classes, dim))
    x = centres[labels] + 1.5 * generator.normal(size=(rows, dim))
    return x.astype(np.float32), labels.astype(np.int64)


exact_case = st.lists(
    st.tuples(st.integers(0, len(EXACT) - 1), st.integers(0, 3)), min_size=2, max_size=24
).map(lambda rows: (EXACT[[r for r, _ in rows]], np.array([label for _, label in rows])))


@pytest.fixture(params=[7, 1 << 22])
def chunked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "SCORES_AT_ONCE", request.param)
    monkeypatch.setattr(rankings, "RANKS_AT_ONCE", request.param)
