"""Metrics of full rankings against plain oracles: step AP, trapezoids, revisitop's figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pymcip import metrics
from pymcip.errors import ConfigError, DataError
from tests.metric_cases import (
    EXACT,
    Floats,
    Ints,
    chunked,  # noqa: F401
    exact_case,
    few_settings,
    oracle_ap,
    oracle_map,
    oracle_r1,
    oracle_revisited,
    oracle_trapezoid,
    random_case,
    ranking,
    unit,
)

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
