"""Metrics against plain NumPy fp64 oracles (loops, no shared code) and cases computed by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pymcip import metrics
from pymcip.errors import ConfigError, DataError

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
    monkeypatch.setattr(metrics, "_SCORES_AT_ONCE", request.param)
    monkeypatch.setattr(metrics, "_RANKS_AT_ONCE", request.param)


# Full-ranking mAP


def test_map_by_hand() -> None:
    # Image 0 ranks 0, 1, 2 (cosines 1, 0.8, 0.6): its class {0, 2} gives (1/1 + 2/3) / 2 = 5/6.
    # Image 1 is alone in its class and first in its ranking: 1.
    # Image 2 ranks 2, 1 (0.96), 0 (0.6): 5/6.
    x = np.array([[1, 0], [0.8, 0.6], [0.6, 0.8]])
    assert metrics.full_ranking_map(x, np.array([0, 1, 0])) == pytest.approx(100 * (5 / 3 + 1) / 3)


def test_map_counts_the_query_and_breaks_ties_by_index() -> None:
    # Four equal vectors: every query ranks 0, 1, 2, 3. Class 0 = {0, 3}: (1/1 + 2/4) / 2 = 3/4;
    # class 1 = {1, 2}: (1/2 + 2/3) / 2 = 7/12.
    x = np.ones((4, 3))
    got = metrics.full_ranking_map(x, np.array([0, 1, 1, 0]))
    assert got == pytest.approx(100 * (3 / 4 + 7 / 12) / 2)


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("seed", range(3))
def test_map_and_r1_match_the_oracle(seed: int) -> None:
    x, labels = random_case(seed)
    assert metrics.full_ranking_map(x, labels) == pytest.approx(oracle_map(x, labels), abs=1e-9)
    assert metrics.nearest_other_recall(x, labels) == pytest.approx(oracle_r1(x, labels), abs=1e-9)


@given(exact_case)
@few_settings
def test_map_and_r1_with_ties_and_duplicates(case: tuple[Floats, Ints]) -> None:
    x, labels = case
    assert metrics.full_ranking_map(x, labels) == pytest.approx(oracle_map(x, labels), abs=1e-9)
    assert metrics.nearest_other_recall(x, labels) == pytest.approx(oracle_r1(x, labels), abs=1e-9)


def test_map_with_many_ties() -> None:
    # A sort that is not stable keeps short rows in order by chance.
    generator = np.random.default_rng(2)
    x, labels = EXACT[generator.integers(0, len(EXACT), 300)], generator.integers(0, 9, 300)
    assert metrics.full_ranking_map(x, labels) == pytest.approx(oracle_map(x, labels), abs=1e-9)


def test_map_of_separated_classes_is_perfect_and_of_one_class_too() -> None:
    labels = np.repeat(np.arange(4), 3)
    assert metrics.full_ranking_map(np.eye(4)[labels], labels) == 100
    assert metrics.full_ranking_map(np.ones((3, 2)), np.zeros(3, int)) == 100
    assert metrics.full_ranking_map(np.ones((1, 2)), np.zeros(1, int)) == 100


def test_average_precisions_by_hand() -> None:
    x = np.array([[1, 0], [0.8, 0.6], [0.6, 0.8]])
    got = metrics.full_ranking_ap(x, np.array([0, 1, 0]))  # as test_map_by_hand
    assert got.dtype == np.float64
    assert got.tolist() == pytest.approx([500 / 6, 100, 500 / 6])


@pytest.mark.usefixtures("chunked")
def test_average_precisions_match_the_oracle() -> None:
    x, labels = random_case(12)
    wanted = [oracle_ap(unit(x) @ unit(x)[q], labels == labels[q]) for q in range(len(x))]
    got = metrics.full_ranking_ap(x, labels)
    np.testing.assert_allclose(got, 100 * np.array(wanted), rtol=1e-12)
    assert metrics.full_ranking_map(x, labels) == got.mean()


# Trapezoidal mAP, and revisitop's figures


def test_trapezoidal_map_by_hand() -> None:
    # Query 0: positives at ranks 0 and 2: (1 + 1)/2 and (1/2 + 2/3)/2, over 2: 19/24.
    # Query 1 ranks 3, 2, 1, 0; 3 is junk, so that 2 is first; 0 is at rank 2: the same.
    # Query 2 has no positives.
    ranks = np.array([[0, 1, 2, 3], [3, 2, 1, 0], [0, 1, 2, 3]]).T
    got = metrics.trapezoidal_map(ranks, [[0, 2], [0, 2], []], [[], [3], [1]])
    assert got == pytest.approx(100 * 19 / 24)
    assert metrics.trapezoidal_map(ranks[:, :1], [[2, 0, 2]]) == pytest.approx(100 * 19 / 24)
    # With the positive alone at rank r > 0: (0 + 1/(r + 1)) / 2.
    assert metrics.trapezoidal_map(ranks[:, :1], [[3]]) == pytest.approx(100 / 8)
    assert metrics.trapezoidal_map(ranks[:, :1], [[0]]) == 100
    assert metrics.trapezoidal_map(ranks[:, :1], [[3]], [[0, 1, 2]]) == 100


def test_trapezoidal_map_of_rankings_cut_short() -> None:
    # 9 is not ranked, and still one of two positives; -1 marks an empty place.
    ranks = np.array([[4], [9], [5], [-1]])[[0, 2, 3]]
    assert metrics.trapezoidal_map(ranks, [[4, 9]]) == 50
    assert metrics.trapezoidal_map(ranks, [[9]]) == 0
    assert metrics.trapezoidal_map(ranks[:0], [[9]]) == 0


def test_a_row_that_is_relevant_and_junk_stays() -> None:
    # 0 stays at rank 0 and moves 2 up from 2 to 1: both ranked first, so that AP is 1.
    assert metrics.trapezoidal_map([[0], [1], [2]], [[0, 2]], [[0]]) == 100


def random_lists(
    generator: np.random.Generator, queries: int, rows: int, shares: Sequence[float]
) -> list[list[list[int]]]:
    """Disjoint lists of rows for each query, some of them empty."""
    found = []
    for _ in range(queries):
        kinds = generator.choice(len(shares) + 1, rows, p=[*shares, 1 - sum(shares)])
        lists = [np.flatnonzero(kinds == kind) for kind in range(len(shares))]
        empty = generator.random(len(shares)) < 0.2
        found.append([[] if no else own.tolist() for no, own in zip(empty, lists, strict=True)])
    return found


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("seed", range(4))
def test_trapezoidal_map_matches_the_oracle(seed: int) -> None:
    generator = np.random.default_rng(seed)
    database, queries = random_case(seed)[0], random_case(seed + 9, rows=13)[0]
    database[20:30] = database[:10]
    lists = random_lists(generator, 13, 60, (0.1, 0.3))
    positives, junk = ([own[kind] for own in lists] for kind in (0, 1))
    orders = [ranking(unit(database) @ query) for query in unit(queries)]
    wanted = [
        oracle_trapezoid(order, *own) for order, own in zip(orders, lists, strict=True) if own[0]
    ]
    plain = [
        oracle_trapezoid(order, own[0], [])
        for order, own in zip(orders, lists, strict=True)
        if own[0]
    ]
    ranks = np.array(orders).T
    for found in (
        metrics.trapezoidal_map(ranks, positives, junk),
        metrics.trapezoidal_retrieval(queries, database, positives, junk),
        metrics.trapezoidal_retrieval(torch.from_numpy(queries), database, positives, junk),
    ):
        assert found == pytest.approx(100 * np.mean(wanted), abs=1e-9)
    for found in (
        metrics.trapezoidal_map(ranks.astype(np.int32), positives),
        metrics.trapezoidal_retrieval(queries, database, positives),
    ):
        assert found == pytest.approx(100 * np.mean(plain), abs=1e-9)


@given(exact_case, exact_case, st.data())
@few_settings
def test_revisited_with_ties(
    first: tuple[Floats, Ints], second: tuple[Floats, Ints], data: st.DataObject
) -> None:
    queries, database = first[0], second[0]
    truths = []
    for _ in queries:
        kinds = data.draw(
            st.lists(st.integers(0, 3), min_size=len(database), max_size=len(database))
        )
        truths.append(
            {
                name: [row for row, own in enumerate(kinds) if own == kind]
                for kind, name in enumerate(("easy", "hard", "junk"))
            }
        )
    # So that each difficulty has a query.
    truths[0] = {"easy": [0], "hard": [1], "junk": truths[0]["junk"][2:]}
    orders = [ranking(unit(database) @ query) for query in unit(queries)]
    wanted = pytest.approx(oracle_revisited(orders, truths, (1, 4)), abs=1e-9)
    assert metrics.revisited_map(np.array(orders).T, truths, (1, 4)) == wanted
    assert metrics.revisited_retrieval(queries, database, truths, (1, 4)) == wanted


def test_revisited_by_hand() -> None:
    # The ranking is 0, 1, 2, 3, 4: easy, hard, junk, easy, none.
    gnd = [
        {"easy": [0, 3], "hard": [1], "junk": [2], "bbx": [0.0, 0.0, 9.0, 9.0]},
        {"easy": [0], "hard": np.array([]), "junk": torch.tensor([1])},
    ]
    ranks = np.array([[0, 1, 2, 3, 4]] * 2).T
    got = metrics.revisited_map(ranks, gnd, (1, 3))
    assert got == {
        # Query 0: 1 and 2 are out, so that 0 and 3 lead. Query 1: first.
        "easy_map": 100,
        "easy_mp1": 100,
        "easy_mp3": 100,
        # Query 0: 0, 1, 3 lead.
        "medium_map": 100,
        "medium_mp1": 100,
        "medium_mp3": 100,
        # Query 0: 0, 2 and 3 are out. Query 1 has no hard rows and is left out.
        "hard_map": 100,
        "hard_mp1": 100,
        "hard_mp3": 100,
    }
    # The other way round: 4, 3, 2, 1, 0. Query 0, easy: 3 and 0 at ranks 1 and 2 of 4, 3, 0:
    # (0 + 1/2)/2 and (1/2 + 2/3)/2, over 2: 5/12; query 1: 0 at rank 3 of 4, 3, 2, 0: 1/8.
    # Hard: 1 at rank 1 of 4, 1. Its precision at 3 looks at 2 places.
    got = metrics.revisited_map(ranks[::-1], [*gnd], (1, 3))
    assert got["easy_map"] == pytest.approx(100 * (5 / 12 + 1 / 8) / 2)
    assert got["hard_map"] == pytest.approx(25)
    assert (got["hard_mp1"], got["hard_mp3"]) == (0, 50)
    assert got["easy_mp3"] == pytest.approx(100 * (2 / 3 + 0) / 2)
    assert list(got)[:3] == ["easy_map", "medium_map", "hard_map"]


def test_precision_of_what_is_not_ranked_is_nothing() -> None:
    gnd = [{"easy": [7], "hard": [0]}]
    got = metrics.revisited_map(np.array([[0], [1]]), gnd, (1,))
    assert (got["easy_map"], got["easy_mp1"]) == (0, 0)
    assert (got["hard_map"], got["hard_mp1"]) == (100, 100)
    assert (got["medium_map"], got["medium_mp1"]) == (50, 100)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.trapezoidal_map([[0], [1]], [[]]), "no query has positives"),
        (lambda: metrics.trapezoidal_map([[0], [1]], [[]], [[0]]), "no query has positives"),
        (lambda: metrics.trapezoidal_map([[0, 1]], [[0]]), "a column for each of the 1 queries"),
        (lambda: metrics.trapezoidal_map([[0.0]], [[0]]), "needed: integers"),
        (lambda: metrics.trapezoidal_map([[0]], [[0]], []), "junk has 0 lists for 1 queries"),
        (lambda: metrics.trapezoidal_map([[0], [0]], [[0]]), "lists row 0 2 times"),
        (lambda: metrics.trapezoidal_map([[0]], [[0.0]]), "positives.0. holds float64"),
        (lambda: metrics.trapezoidal_map([[0]], [[-1, 0]]), "goes from -1 to 0"),
        (
            lambda: metrics.trapezoidal_retrieval(np.eye(2), np.eye(2), [[0], [2]]),
            r"positives\[1\] goes from 2 to 2; needed: rows from 0, below 2 .MATLAB",
        ),
        (lambda: metrics.trapezoidal_retrieval(np.eye(2), np.eye(3), [[0], [1]]), "same model"),
        (lambda: metrics.trapezoidal_retrieval(np.eye(2), np.eye(2), [[0]]), "1 lists for 2"),
        (lambda: metrics.revisited_map([[0]], [{"ok": [0]}]), "gnd.0. has ok, but no easy and no"),
        (
            lambda: metrics.revisited_map([[0]], [{"easy": [0], "hard": []}]),
            "no query has hard rows",
        ),
        (
            lambda: metrics.revisited_retrieval(np.eye(1), np.eye(1), [{"easy": [1], "hard": [0]}]),
            "gnd easy.0. goes from 1 to 1",
        ),
    ],
)
def test_ground_truth_that_is_refused(call: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        call()


def test_revisited_refuses_a_k_below_1() -> None:
    with pytest.raises(ConfigError, match=r"ks=\[0\]"):
        metrics.revisited_map([[0]], [{"easy": [0], "hard": [0]}], [0])


# R@1


def test_r1_masks_the_query_not_a_duplicate_of_it() -> None:
    # 0 and 1 are the same picture under two labels: each is the other's nearest, a miss. Taking
    # the second column of a top-2 would give image 1 itself.
    x = np.array([[1, 0], [1, 0], [0.6, 0.8], [0, 1]])
    assert metrics.nearest_other_recall(x, np.array([0, 1, 2, 2])) == 50


def test_r1_of_an_image_without_companions_is_a_miss() -> None:
    x = np.array([[1, 0], [0.9, 0.1], [0, 1]])
    assert metrics.nearest_other_recall(x, np.array([0, 0, 1])) == pytest.approx(200 / 3)


def test_r1_needs_two_images() -> None:
    with pytest.raises(DataError, match="at least 2 images"):
        metrics.nearest_other_recall(np.ones((1, 2)), np.zeros(1, int))


# R@k


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("seed", range(2))
def test_recall_at_k_matches_the_oracle(seed: int) -> None:
    x, labels = random_case(seed, rows=40, classes=15)
    got = metrics.recall_at_k(x, labels, (1, 2, 4, 39, 500))
    for k, found in got.items():
        assert found == pytest.approx(oracle_recall_at(x, labels, k), abs=1e-9)
    assert metrics.nearest_other_recall(x, labels) == got[1]


@given(exact_case)
@few_settings
def test_recall_at_k_with_ties_and_duplicates(case: tuple[Floats, Ints]) -> None:
    x, labels = case
    for k, found in metrics.recall_at_k(x, labels, (1, 3)).items():
        assert found == pytest.approx(oracle_recall_at(x, labels, k), abs=1e-9)


@pytest.mark.usefixtures("chunked")
def test_recall_at_k_of_queries_by_hand() -> None:
    # Query 0 ranks 0, 2, 1 (cosines 1, 0.6, 0); query 1 ranks 1, 2, 0; query 2's class is absent.
    bank, labels = np.array([[1.0, 0], [0, 1], [0.6, 0.8]]), np.array([5, 6, 6])
    queries = np.array([[2.0, 0], [0, 1], [0, 1]])
    got = metrics.recall_at_k(
        bank, labels, (1, 2, 9), queries=queries, query_labels=np.array([6, 6, 7])
    )
    assert got == {1: pytest.approx(100 / 3), 2: pytest.approx(200 / 3), 9: pytest.approx(200 / 3)}
    # One query and a bank of one: nothing is masked.
    alone = metrics.recall_at_k(bank[:1], [5], (1,), queries=queries[:1], query_labels=[5])
    assert alone == {1: 100}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ks": ()}, ConfigError, "at least one k"),
        ({"ks": (0, 1)}, ConfigError, "each >= 1"),
        ({"queries": np.eye(2)}, ConfigError, "belong together"),
        ({"query_labels": [0, 1]}, ConfigError, "belong together"),
        ({"queries": np.eye(3), "query_labels": [0, 1, 0]}, DataError, "same model"),
        ({"queries": np.eye(2), "query_labels": [0]}, DataError, "one per row"),
        ({"embeddings": np.ones((1, 2)), "labels": [0]}, DataError, "at least 2 images"),
    ],
)
def test_recall_at_k_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    options: dict[str, Any] = {"embeddings": np.eye(2), "labels": [0, 1], **change}
    with pytest.raises(error, match=message):
        metrics.recall_at_k(**options)


# k-NN


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("vote", ["weighted", "majority"])
@pytest.mark.parametrize("leave_out", [False, True])
@pytest.mark.parametrize("k", [1, 5, 21, 500])
def test_knn_matches_the_oracle(vote: Any, leave_out: bool, k: int) -> None:
    bank, labels = random_case(3)
    labels = labels * 10 + 5  # not contiguous
    queries = bank if leave_out else random_case(4, rows=9)[0]
    got = metrics.knn_classify(bank, labels, queries, k, vote, leave_one_out=leave_out)
    assert got.dtype == np.int64
    assert got.tolist() == oracle_knn(bank, labels, queries, k, vote, leave_out)


@given(exact_case, st.integers(1, 8), st.booleans())
@few_settings
def test_knn_majority_with_ties(case: tuple[Floats, Ints], k: int, leave_out: bool) -> None:
    bank, labels = case
    got = metrics.knn_classify(bank, labels, bank, k, "majority", leave_one_out=leave_out)
    assert got.tolist() == oracle_knn(bank, labels, bank, k, "majority", leave_out)


def test_knn_takes_the_first_of_equal_neighbours() -> None:
    # Four equal cosines, k = 1: the lowest index votes. k = 3: 1, 0, 0 vote.
    bank, labels = np.ones((4, 2)), np.array([1, 0, 0, 1])
    assert metrics.knn_classify(bank, labels, np.ones((1, 2)), 1).tolist() == [1]
    assert metrics.knn_classify(bank, labels, np.ones((1, 2)), 3).tolist() == [0]


def test_knn_votes_differ_as_defined() -> None:
    # One very near neighbour of class 1, two of class 0 further away.
    bank, labels = np.array([[1, 0], [0.6, 0.8], [0.6, -0.8]]), np.array([1, 0, 0])
    query = np.array([[1.0, 0.0]])
    assert metrics.knn_classify(bank, labels, query, 3, "majority").tolist() == [0]
    assert metrics.knn_classify(bank, labels, query, 3, "weighted").tolist() == [1]


def test_knn_majority_ties_go_to_the_larger_similarity_then_the_lower_label() -> None:
    bank = np.array([[1, 0, 0, 0], [0.5, 0.5, 0.5, 0.5], [0.5, 0.5, -0.5, -0.5], [0, 0, 0, 1]])
    query = np.array([[1.0, 0, 0, 0]])  # cosines 1, 1/2, 1/2, 0
    assert metrics.knn_classify(bank, [7, 2, 2, 7], query, 4, "majority").tolist() == [2]
    assert metrics.knn_classify(bank, [7, 2, 2, 7], query, 3, "majority").tolist() == [2]
    assert metrics.knn_classify(bank, [7, 2, 7, 2], query, 4, "majority").tolist() == [7]


def test_knn_temperature_weighs_the_nearest() -> None:
    # Cosines 1 (class 1) and twice 0.6 (class 0): exp(1/T) against 2 exp(0.6/T). Equal at
    # T = 0.4 / ln 2 = 0.577.
    bank, labels = np.array([[1, 0], [0.6, 0.8], [0.6, -0.8]]), np.array([1, 0, 0])
    query = np.array([[1.0, 0.0]])
    for temperature, answer in ((1e-4, 1), (0.01, 1), (0.07, 1), (0.57, 1), (0.59, 0), (9, 0)):
        got = metrics.knn_classify(bank, labels, query, 3, temperature=temperature)
        assert got.tolist() == [answer]
    assert metrics.knn_classify(bank, labels, query, 3, "majority", temperature=1e-4) == [0]


def test_knn_leave_one_out_drops_the_image_itself_not_its_duplicate() -> None:
    bank, labels = np.array([[1, 0], [1, 0], [0, 1]]), np.array([0, 1, 2])
    got = metrics.knn_classify(bank, labels, bank, 1, leave_one_out=True)
    assert got.tolist() == [1, 0, 0]


def test_knn_leave_one_out_of_many_duplicates() -> None:
    """All rows are equal, so that a row is not among the first of its own ranking."""
    bank, labels = np.ones((6, 2)), np.arange(6)
    got = metrics.knn_classify(bank, labels, bank, 2, "majority", leave_one_out=True)
    assert got.tolist() == [1, 0, 0, 0, 0, 0]
    assert metrics.nearest_other_recall(bank, [7, 7, 1, 1, 1, 7]) == 50


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": 0}, ConfigError, "k=0"),
        ({"vote": "loudest"}, ConfigError, "allowed: 'weighted', 'majority'"),
        ({"temperature": 0.0}, ConfigError, "temperature=0.0"),
        ({"temperature": math.nan}, ConfigError, "temperature=nan"),
        ({"temperature": math.inf}, ConfigError, "temperature=inf"),
        ({"queries": np.ones((3, 5))}, DataError, "same model"),
        ({"queries": np.ones((3, 2)), "leave_one_out": True}, DataError, "own rows as queries"),
        ({"bank_labels": np.array([0, -1])}, DataError, "negative"),
        ({"bank_labels": np.zeros(3, int)}, DataError, "one per row"),
        ({"bank": np.empty((0, 2)), "bank_labels": np.empty(0, int)}, DataError, "shape"),
    ],
)
def test_knn_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    options: dict[str, Any] = {"bank": np.eye(2), "bank_labels": [0, 1], "queries": np.eye(2)}
    with pytest.raises(error, match=message):
        metrics.knn_classify(**{**options, **change})


# Zero-shot


class WordModel:
    """Stands in for a ClipModel: each prompt's vector is looked up, of any norm."""

    def __init__(self, vectors: dict[str, list[float]]) -> None:
        self.vectors = vectors
        self.calls: list[int] = []

    def encode_texts(self, texts: Sequence[str], batch_size: int = 256) -> torch.Tensor:
        self.calls.append(len(texts))
        return torch.tensor([self.vectors[text] for text in texts])


@pytest.mark.parametrize("batch_size", [1, 256])
def test_zero_shot_classifier_normalises_before_and_after_the_mean(batch_size: int) -> None:
    # Class "a": (3, 0) and (0, 5) count alike: (1, 1) / sqrt 2. Without the first normalisation
    # the second prompt would win.
    model: Any = WordModel(
        {"a": [3.0, 0.0], "the a": [0.0, 5.0], "b": [-2.0, 0.0], "the b": [-1.0, 0.0]}
    )
    classifier = metrics.zero_shot_classifier(
        model, ["a", "b"], ["{}", "the {}"], batch_size=batch_size
    )
    half = math.sqrt(0.5)
    np.testing.assert_allclose(classifier, np.array([[half, half], [-1, 0]]), atol=1e-6)
    assert classifier.dtype == torch.float32


def test_zero_shot_classifier_fills_in_names_that_hold_braces() -> None:
    model: Any = WordModel({"x a {b} {}": [1.0, 0.0]})
    assert metrics.zero_shot_classifier(model, ["a {b} {}"], ["x {}"]).tolist() == [[1, 0]]


@pytest.mark.parametrize(("names", "templates"), [([], ["{}"]), (["a"], []), (["a"], ["a photo"])])
def test_zero_shot_classifier_refuses(names: list[str], templates: list[str]) -> None:
    model: Any = WordModel({})
    with pytest.raises(ConfigError):
        metrics.zero_shot_classifier(model, names, templates)


def test_zero_shot_accuracy_by_hand() -> None:
    classifier = np.array([[1.0, 0], [0.8, 0.6], [0, 1]])
    images = np.array([[1.0, 0], [1, 0], [1, 0], [0, 2]])  # rank 0, 1, 2 for [1, 0]; 2, 1, 0
    got = metrics.zero_shot_accuracy(images, classifier, np.array([0, 1, 2, 2]), top=(1, 2, 5))
    assert got == {1: 50, 2: 75, 5: 100}


def test_zero_shot_accuracy_gives_equal_scores_to_the_lower_label() -> None:
    got = metrics.zero_shot_accuracy(np.ones((2, 2)), np.ones((3, 2)), np.array([0, 1]), (1, 2))
    assert got == {1: 50, 2: 100}


def test_zero_shot_accuracy_matches_the_oracle() -> None:
    images, labels = random_case(5)
    classifier = np.random.default_rng(0).normal(size=(7, 12))
    scores = unit(images) @ unit(classifier).T
    for k, got in metrics.zero_shot_accuracy(images, classifier, labels, (1, 3)).items():
        hits = [label in ranking(row)[:k] for row, label in zip(scores, labels, strict=True)]
        assert got == pytest.approx(100 * np.mean(hits), abs=1e-9)


def test_zero_shot_accuracy_refuses_labels_without_a_class() -> None:
    with pytest.raises(DataError, match="classifier has 2 rows"):
        metrics.zero_shot_accuracy(np.eye(2), np.eye(2), np.array([0, 2]))


# Cross-modal recall


def test_recall_by_hand() -> None:
    # Image 2 has no caption. Texts 0 and 1 belong to image 0, text 2 to image 1.
    images = np.array([[1.0, 0], [0, 1], [0.6, 0.8]])
    texts = np.array([[1.0, 0], [0.5, 0.9], [0.6, 0.8]])
    got = metrics.cross_modal_recall(images, texts, np.array([0, 0, 1]), (1, 2, 3))
    # T2I: text 0 finds image 0 first; text 1 ranks 2, 1, 0; text 2 ranks 2, 1.
    # I2T: image 0 finds text 0 first; image 1 ranks texts 1, 2.
    assert got == {
        "t2i_r1": pytest.approx(100 / 3),
        "t2i_r2": pytest.approx(200 / 3),
        "t2i_r3": 100,
        "i2t_r1": 50,
        "i2t_r2": 100,
        "i2t_r3": 100,
    }


def test_recall_matches_the_oracle() -> None:
    generator = np.random.default_rng(6)
    images = generator.normal(size=(20, 8)).astype(np.float32)
    owners = generator.integers(0, 17, 50)
    texts = (images[owners] + 1.5 * generator.normal(size=(50, 8))).astype(np.float32)
    got = metrics.cross_modal_recall(images, texts, owners, (1, 5, 100))
    for k in (1, 5, 100):
        wanted = pytest.approx(oracle_recall(images, texts, owners, k), abs=1e-9)
        assert (got[f"t2i_r{k}"], got[f"i2t_r{k}"]) == wanted


@given(exact_case, st.data())
@few_settings
def test_recall_with_ties(case: tuple[Floats, Ints], data: st.DataObject) -> None:
    images, _ = case
    picks = data.draw(st.lists(st.integers(0, len(EXACT) - 1), min_size=1, max_size=20))
    owners = np.array([data.draw(st.integers(0, len(images) - 1)) for _ in picks])
    got = metrics.cross_modal_recall(images, EXACT[picks], owners, (1, 3))
    for k in (1, 3):
        wanted = pytest.approx(oracle_recall(images, EXACT[picks], owners, k), abs=1e-9)
        assert (got[f"t2i_r{k}"], got[f"i2t_r{k}"]) == wanted


def test_recall_refuses_captions_of_no_image() -> None:
    with pytest.raises(DataError, match="image row 2"):
        metrics.cross_modal_recall(np.eye(2), np.eye(2), np.array([0, 2]))


# Class descriptions


def test_class_text_map_by_hand() -> None:
    # Text 0 ranks images 0, 1, 2; its class is {0, 2}: (1 + 2/3) / 2. Text 1 ranks 2, 1, 0; its
    # class is {1}: 1/2. Class 2 has no image and is left out.
    images = np.array([[1.0, 0], [0.8, 0.6], [0, 1]])
    texts = np.array([[1.0, 0], [0, 1], [1, 1]])
    got = metrics.class_text_map(images, np.array([0, 1, 0]), texts)
    assert got == pytest.approx(100 * (5 / 6 + 1 / 2) / 2)


@pytest.mark.usefixtures("chunked")
def test_class_text_map_matches_the_oracle() -> None:
    images, labels = random_case(8)
    texts = np.random.default_rng(1).normal(size=(9, 12))
    scores = unit(texts) @ unit(images).T
    wanted = np.mean([oracle_ap(scores[c], labels == c) for c in range(9) if c in labels])
    assert metrics.class_text_map(images, labels, texts) == pytest.approx(100 * wanted, abs=1e-9)


# What is common to all


def test_inputs_of_any_kind_give_the_same() -> None:
    x, labels = random_case(9)
    wanted = metrics.full_ranking_map(x, labels)
    half = x.astype(np.float16)
    half.flags.writeable = False
    assert metrics.full_ranking_map(torch.from_numpy(x), torch.from_numpy(labels)) == wanted
    assert metrics.full_ranking_map(np.asfortranarray(x), labels.astype(np.int32)) == wanted
    assert metrics.full_ranking_map(x * 7.5, labels.tolist()) == pytest.approx(wanted, abs=1e-6)
    assert metrics.full_ranking_map(half, labels) == pytest.approx(wanted, abs=0.2)
    assert metrics.full_ranking_map([[3, 0], [0, 1]], [0, 1]) == 100
    graph = torch.from_numpy(x).requires_grad_()
    assert metrics.full_ranking_map(graph, labels) == wanted


def test_low_precision_is_ranked_as_it_is_widened() -> None:
    x, labels = random_case(10)
    for dtype in (torch.float16, torch.bfloat16):
        low = torch.from_numpy(x).to(dtype)
        wide = metrics.full_ranking_ap(low.float(), labels)
        assert (metrics.full_ranking_ap(low, labels) == wide).all()
        assert metrics.recall_at_k(low, labels) == metrics.recall_at_k(low.float(), labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unit_rows_are_the_nearest_to_exact_ones(dtype: torch.dtype) -> None:
    generator = np.random.default_rng(0)
    lengths = np.array([1, 1e-30, 1e25, 3, 1e-3])[:, None]
    x = torch.from_numpy(generator.normal(size=(5, 100)) * lengths).to(dtype)
    x[3] = 0
    wanted = x.double().numpy()
    wanted[3, 0] = 1
    wanted = unit(wanted)
    wanted[3] = 0
    # As fp64 has it up to its own last place, rounded once.
    got = metrics._unit(x, "x").double().numpy()
    assert (np.abs(got - wanted) <= 2**-24 * np.abs(wanted) * (1 + 1e-6)).all()


def test_back_ends_agree_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    x, labels = random_case(11, rows=200, dim=40)
    x[100:150] = x[:50]
    gnd = [{"easy": [3, 60], "hard": [120], "junk": [7, 150]}] * 20
    wanted = metrics.full_ranking_ap(x, labels), metrics.revisited_retrieval(x[:20], x, gnd)
    plain = metrics.ranks_of
    monkeypatch.setattr(metrics, "ranks_of", lambda *args: plain(*args, backend="torch"))
    assert (metrics.full_ranking_ap(x, labels) == wanted[0]).all()
    assert metrics.revisited_retrieval(x[:20], x, gnd) == wanted[1]


def test_ranking_stays_in_fp32_whatever_the_caller_has_set() -> None:
    # Cosines 1 - 2e-5 and 1 - 8e-5 are one value in bf16; image 0's nearest is 2, not 1.
    x = np.array([[1, 0], [1, 0.0127], [1, 0.0063], [0, 1]])
    labels = np.array([0, 1, 0, 1])
    wanted = oracle_r1(x, labels)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert metrics.nearest_other_recall(x, labels) == wanted
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_memory_is_bounded_by_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    plain = metrics.ranks_of

    def watch(queries: Any, bank: Any, indptr: Any, indices: Any) -> Any:
        shapes.append((len(queries), len(indices)))
        return plain(queries, bank, indptr, indices)

    monkeypatch.setattr(metrics, "ranks_of", watch)
    monkeypatch.setattr(metrics, "_RANKS_AT_ONCE", 100)
    labels = np.repeat(np.arange(7), 9)
    x, _ = random_case(1, rows=63)
    assert metrics.full_ranking_map(x, labels) == pytest.approx(oracle_map(x, labels), abs=1e-9)
    assert shapes == [(11, 99)] * 5 + [(8, 72)]
    shapes.clear()
    metrics.full_ranking_map(x, np.zeros(63, int))  # one query's relevant rows are the least
    assert shapes == [(1, 63)] * 63
    shapes.clear()
    metrics.trapezoidal_retrieval(x[:5], x, [range(40)] * 5, [range(40, 63)] * 5)
    assert shapes == [(1, 63)] * 5


@pytest.mark.parametrize(
    ("x", "labels", "message"),
    [
        (np.ones((3, 2)), [0, 1], "one per row"),
        (np.ones(3), [0, 1, 2], "needed: .rows, dimensions"),
        (np.ones((3, 0)), [0, 1, 2], "needed: .rows, dimensions"),
        (np.ones((2, 2), dtype=complex), [0, 1], "real numbers"),
        (np.array([[1.0, np.nan], [1, 1]]), [0, 1], "NaN or infinite values in 1 of 2"),
        (np.ones((2, 2)), [0, -1], "negative"),
        (np.ones((2, 2)), [0.0, 1.0], "integers"),
        (np.ones((2, 2)), [[0], [1]], "integers"),
    ],
)
def test_wrong_arrays_are_refused(x: Any, labels: Any, message: str) -> None:
    for metric in (metrics.full_ranking_map, metrics.nearest_other_recall, metrics.recall_at_k):
        with pytest.raises(DataError, match=message):
            metric(x, np.array(labels))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_metrics_on_a_gpu_are_those_on_the_cpu() -> None:
    generator = np.random.default_rng(3)
    x, labels = EXACT[generator.integers(0, len(EXACT), 300)], generator.integers(0, 9, 300)
    texts = EXACT[generator.integers(0, len(EXACT), 400)]
    owners = generator.integers(0, 300, 400)
    images = torch.from_numpy(x).cuda()
    for metric in (metrics.full_ranking_map, metrics.nearest_other_recall):
        assert metric(images, labels) == pytest.approx(metric(x, labels), abs=1e-9)
    for vote in ("weighted", "majority"):
        got = metrics.knn_classify(images, labels, images, 5, vote, leave_one_out=True)  # type: ignore[arg-type]
        wanted = metrics.knn_classify(x, labels, x, 5, vote, leave_one_out=True)  # type: ignore[arg-type]
        np.testing.assert_array_equal(got, wanted)
    assert metrics.cross_modal_recall(images, texts, owners) == pytest.approx(
        metrics.cross_modal_recall(x, texts, owners), abs=1e-9
    )
    assert metrics.zero_shot_accuracy(images, texts[:9], labels) == pytest.approx(
        metrics.zero_shot_accuracy(x, texts[:9], labels), abs=1e-9
    )
    assert metrics.class_text_map(images, labels, texts[:9]) == pytest.approx(
        metrics.class_text_map(x, labels, texts[:9]), abs=1e-9
    )
    assert metrics.recall_at_k(images, labels) == metrics.recall_at_k(x, labels)
    x, labels = random_case(4, rows=500, dim=96)
    images = torch.from_numpy(x).cuda()
    assert (metrics.full_ranking_ap(images, labels) == metrics.full_ranking_ap(x, labels)).all()
