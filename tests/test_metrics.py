"""What is common to all metrics: their inputs, back ends, memory and devices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pymcip import metrics
from pymcip.errors import DataError
from pymcip.metrics import rankings
from pymcip.metrics.inputs import unit_rows
from tests.metric_cases import (
    EXACT,
    oracle_map,
    oracle_r1,
    random_case,
    unit,
)

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
    got = unit_rows(x, "x").double().numpy()
    assert (np.abs(got - wanted) <= 2**-24 * np.abs(wanted) * (1 + 1e-6)).all()


def test_back_ends_agree_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    x, labels = random_case(11, rows=200, dim=40)
    x[100:150] = x[:50]
    gnd = [{"easy": [3, 60], "hard": [120], "junk": [7, 150]}] * 20
    wanted = metrics.full_ranking_ap(x, labels), metrics.revisited_retrieval(x[:20], x, gnd)
    plain = rankings.ranks_of
    monkeypatch.setattr(rankings, "ranks_of", lambda *args: plain(*args, backend="torch"))
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
    plain = rankings.ranks_of

    def watch(queries: Any, bank: Any, indptr: Any, indices: Any) -> Any:
        shapes.append((len(queries), len(indices)))
        return plain(queries, bank, indptr, indices)

    monkeypatch.setattr(rankings, "ranks_of", watch)
    monkeypatch.setattr(rankings, "RANKS_AT_ONCE", 100)
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
