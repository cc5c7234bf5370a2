"""R@k and k-NN against plain oracles, with ties and duplicates."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pymcip import metrics
from pymcip.errors import ConfigError, DataError
from tests.metric_cases import (
    Floats,
    Ints,
    chunked,  # noqa: F401
    exact_case,
    few_settings,
    oracle_knn,
    oracle_recall_at,
    random_case,
)

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


def test_knn_of_queries_that_the_bank_holds() -> None:
    bank = np.array([[1.0, 0], [0.9, 0.1], [0, 1], [0.6, 0.8]])
    labels, queries = np.array([5, 6, 7, 6]), np.array([[1.0, 0], [0, 1], [0, 1]])
    asked = {"k": 1, "own_rows": np.array([0, -1, 2])}
    assert metrics.knn_classify(bank, labels, queries, **asked).tolist() == [6, 7, 6]
    none = metrics.knn_classify(bank, labels, queries, 4, own_rows=np.full(3, -1))
    assert none.tolist() == metrics.knn_classify(bank, labels, queries, 4).tolist()
    every = metrics.knn_classify(bank, labels, bank, 3, own_rows=np.arange(4))
    assert (
        every.tolist() == metrics.knn_classify(bank, labels, bank, 3, leave_one_out=True).tolist()
    )
    for wrong in ([0, 1], [0, 1, 4], [0, 1, -2], [0.0, 1.0, 2.0]):
        with pytest.raises(DataError, match="own_rows"):
            metrics.knn_classify(bank, labels, queries, 1, own_rows=np.array(wrong))
