"""topk against fp64, back end by back end and kernel by kernel."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pymcip import _core
from pymcip.errors import BackendError, ConfigError, DataError
from pymcip.ops import backends, topk
from pymcip.ops.topk import topk_cpp

Run = Callable[..., tuple[Any, Any]]
UNIT_ROUNDOFF = 2.0**-24
BACKENDS = [row.name for row in backends("topk") if row.obstacle("cpu", "float32") is None]
KERNELS = [f"cpp:{kernel}" for kernel in _core.topk_kernels()]
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


def runner(name: str) -> Run:
    """topk with a back end, or the C++ back end with a kernel, forced by name."""
    backend, _, kernel = name.partition(":")

    def run(queries: Any, bank: Any, k: int, threshold: float | None = None, **options: Any) -> Any:
        if not kernel:
            return topk(queries, bank, k, threshold, backend=backend, **options)
        floor = -np.inf if threshold is None else float(np.float32(threshold))
        options = {"threads": 2, "progress": None, **options}
        return topk_cpp(queries, bank, k, floor, kernel=kernel, **options)

    return run


@pytest.fixture(params=[*BACKENDS, *KERNELS])
def run(request: pytest.FixtureRequest) -> Run:
    return runner(request.param)


def to_float64(matrix: Any) -> np.ndarray:
    tensor = matrix if isinstance(matrix, torch.Tensor) else torch.tensor(np.array(matrix))
    return tensor.detach().double().cpu().numpy()


def check(
    result: tuple[Any, Any], queries: Any, bank: Any, k: int, threshold: float | None
) -> None:
    """The result is the fp64 ranking, except where scores are closer than fp32 can tell.

    Whatever the order of summation, and with fused multiply-adds or not, an fp32 inner product is
    off by at most gamma_D |q| |c|, gamma_D = D u / (1 - D u).
    """
    ids, scores = (np.asarray(part.cpu() if hasattr(part, "cpu") else part) for part in result)
    queries, bank = to_float64(queries), to_float64(bank)
    assert ids.shape == scores.shape == (len(queries), k)
    assert ids.dtype == np.int64
    assert scores.dtype == np.float32
    exact = queries @ bank.T
    products = queries.shape[1] * UNIT_ROUNDOFF
    bounds = (products / (1 - products)) * np.outer(
        np.linalg.norm(queries, axis=1), np.linalg.norm(bank, axis=1)
    ) + 1e-300
    floor = -np.inf if threshold is None else np.float32(threshold)
    for row in range(len(queries)):
        count = int((ids[row] >= 0).sum())
        found, values = ids[row, :count], scores[row, :count]
        assert (ids[row, count:] == -1).all()
        assert np.isneginf(scores[row, count:]).all()
        assert len(set(found.tolist())) == count
        assert (values >= floor).all()
        pairs = list(zip((-values).tolist(), found.tolist(), strict=True))
        assert pairs == sorted(pairs), "not by score descending, then id ascending"
        assert (np.abs(values - exact[row, found]) <= bounds[row, found]).all()
        others = np.setdiff1d(np.arange(len(bank)), found)
        if count == k:  # nothing left out is better than the last one taken
            limit = exact[row, found].min() if k else np.inf
            slack = bounds[row, found].max()
            assert (exact[row, others] <= limit + slack + bounds[row, others]).all()
        else:  # nothing left out reaches the threshold
            assert (exact[row, others] < floor + bounds[row, others]).all()


def exact_ranking(
    queries: np.ndarray, bank: np.ndarray, k: int, threshold: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """For values whose inner products are exact in fp32: the contract, literally."""
    ids = np.full((len(queries), k), -1)
    scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
    exact = queries.astype(np.float64) @ bank.astype(np.float64).T
    for row, line in enumerate(exact):
        order = np.lexsort((np.arange(len(bank)), -line))[:k]
        if threshold is not None:
            order = order[line[order] >= threshold]
        ids[row, : len(order)], scores[row, : len(order)] = order, line[order]
    return ids, scores


def gaussian(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@given(
    rows=st.integers(0, 40),
    bank_rows=st.integers(0, 90),
    columns=st.integers(1, 40),
    k=st.integers(1, 100),
    threshold=st.none() | st.integers(-6, 6),
    spread=st.integers(0, 2),
    seed=st.integers(0, 2**16),
    name=st.sampled_from([*BACKENDS, *KERNELS]),
    dtype=st.sampled_from([np.float32, np.float16]),
)
@settings(max_examples=300, deadline=None)
def test_small_integers_are_ranked_exactly(
    rows: int,
    bank_rows: int,
    columns: int,
    k: int,
    threshold: int | None,
    spread: int,
    seed: int,
    name: str,
    dtype: Any,
) -> None:
    generator = np.random.default_rng(seed)  # integers up to 2: many ties, no rounding
    queries = generator.integers(-spread, spread + 1, (rows, columns)).astype(dtype)
    bank = generator.integers(-spread, spread + 1, (bank_rows, columns)).astype(dtype)
    ids, scores = runner(name)(queries, bank, k, threshold)
    wanted_ids, wanted_scores = exact_ranking(queries, bank, k, threshold)
    np.testing.assert_array_equal(ids, wanted_ids)
    np.testing.assert_array_equal(scores, wanted_scores)


@pytest.mark.parametrize(
    ("rows", "bank_rows", "columns", "k"),
    [(1, 1, 1, 1), (1, 3000, 512, 10), (37, 1000, 65, 64), (130, 20_000, 33, 5), (3, 50, 768, 80)],
)
def test_ranking_is_fp64s(run: Run, rows: int, bank_rows: int, columns: int, k: int) -> None:
    queries, bank = gaussian(1, rows, columns), gaussian(2, bank_rows, columns)
    check(run(queries, bank, k), queries, bank, k, None)


@pytest.mark.parametrize("quantile", [0.0, 0.5, 0.99, 1.0])
def test_threshold_admits_its_share(run: Run, quantile: float) -> None:
    queries, bank = gaussian(3, 20, 48), gaussian(4, 700, 48)
    threshold = float(np.quantile(queries @ bank.T, quantile)) + (1.0 if quantile == 1 else 0.0)
    result = run(queries, bank, 50, threshold)
    check(result, queries, bank, 50, threshold)
    if quantile == 1:
        assert (result[0] == -1).all()


def test_threshold_is_inclusive(run: Run) -> None:
    queries = np.float32([[1.0]])
    bank = np.float32([[0.7], [0.5], [np.nextafter(np.float32(0.7), np.float32(0))]])
    ids, _ = run(queries, bank, 3, 0.7)  # 0.7 in fp32 is below 0.7 in fp64
    assert ids.tolist() == [[0, -1, -1]]


def test_extreme_thresholds(run: Run) -> None:
    queries, bank = gaussian(5, 3, 8), gaussian(6, 20, 8)
    np.testing.assert_array_equal(run(queries, bank, 4, -np.inf)[0], run(queries, bank, 4)[0])
    assert (run(queries, bank, 4, np.inf)[0] == -1).all()


@pytest.mark.parametrize("name", KERNELS)
def test_equal_rows_tie_wherever_they_are(name: str) -> None:
    queries, bank = gaussian(7, 50, 77), gaussian(8, 4000, 77)
    copies = np.arange(13, 4000, 331)
    bank[copies] = 3 * queries[0]
    ids, scores = runner(name)(queries, bank, 20)
    assert ids[0, : len(copies)].tolist() == copies.tolist()
    assert len(set(scores[0, : len(copies)].tolist())) == 1
    check((ids, scores), queries, bank, 20, None)


def test_ties_across_blocks_of_the_bank(run: Run) -> None:
    queries, bank = np.ones((2, 3), np.float32), np.ones((40_000, 3), np.float32)
    bank[35_000] = 2
    ids, scores = run(queries, bank, 5)
    assert ids.tolist() == [[35_000, 0, 1, 2, 3]] * 2
    assert scores.tolist() == [[6, 3, 3, 3, 3]] * 2


@pytest.mark.parametrize("k", [7, 2048])  # few blocks of queries, and many
@pytest.mark.parametrize("name", KERNELS)
def test_threads_change_nothing(name: str, k: int) -> None:
    queries, bank = gaussian(9, 2000, 16), gaussian(10, 2500, 16)
    first_ids, first_scores = runner(name)(queries, bank, k, threads=1)
    for threads in (2, 3):
        ids, scores = runner(name)(queries, bank, k, threads=threads)
        np.testing.assert_array_equal(ids, first_ids)
        np.testing.assert_array_equal(scores.view(np.int32), first_scores.view(np.int32))
    check((first_ids[:40], first_scores[:40]), queries[:40], bank, k, None)


def test_position_in_a_block_changes_nothing() -> None:
    queries, bank = gaussian(11, 300, 130), gaussian(12, 3000, 130)
    ids, scores = topk(queries, bank, 9, backend="cpp")
    alone = [topk(queries[row : row + 1], bank, 9, backend="cpp") for row in range(0, 300, 37)]
    np.testing.assert_array_equal(np.concatenate([part[0] for part in alone]), ids[::37])
    np.testing.assert_array_equal(np.concatenate([part[1] for part in alone]), scores[::37])


def test_every_half_is_widened_exactly(run: Run) -> None:
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)]
    _, scores = run(np.float32([[1.0]]), halves[:, None], len(halves))
    np.testing.assert_array_equal(scores[0], np.sort(halves.astype(np.float32))[::-1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_not_rounded_again(run: Run, dtype: torch.dtype) -> None:
    queries = torch.from_numpy(gaussian(13, 30, 200)).to(dtype)
    bank = torch.from_numpy(gaussian(14, 900, 200)).to(dtype)
    check(run(queries, bank, 8, 1.0), queries, bank, 8, 1.0)
    mixed = torch.from_numpy(gaussian(13, 30, 200))
    check(run(mixed, bank, 8), mixed, bank, 8, None)


def test_strides_of_any_kind(run: Run) -> None:
    queries, bank = gaussian(15, 24, 60), gaussian(16, 500, 60)
    wanted, _ = run(queries[::2, ::-3].copy(), bank[::-2, ::-3].copy(), 6)
    np.testing.assert_array_equal(run(queries[::2, ::-3], bank[::-2, ::-3], 6)[0], wanted)
    fortran = np.asfortranarray(bank)
    np.testing.assert_array_equal(run(queries, fortran, 6)[0], run(queries, bank, 6)[0])
    transposed = torch.from_numpy(np.ascontiguousarray(bank.T)).T
    np.testing.assert_array_equal(run(queries, transposed, 6)[0], run(queries, bank, 6)[0])
    expanded = torch.ones(1, 60).expand(30, 60)
    ids, _ = run(torch.ones(2, 60), expanded, 3)
    assert np.asarray(ids).tolist() == [[0, 1, 2]] * 2
    packed = np.zeros(500, dtype=[("tag", "u1"), ("row", "f4", (60,))])  # rows 241 bytes apart
    packed["row"] = bank
    np.testing.assert_array_equal(run(queries, packed["row"], 6)[0], run(queries, bank, 6)[0])


def test_memory_maps(run: Run, tmp_path: Path) -> None:
    queries, bank = gaussian(17, 5, 32), gaussian(18, 20_000, 32).astype(np.float16)
    np.save(tmp_path / "bank.npy", bank)
    mapped = np.load(tmp_path / "bank.npy", mmap_mode="r")
    check(run(queries, mapped, 12, 2.0), queries, bank, 12, 2.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_are_of_the_kind_of_the_queries(backend: str) -> None:
    queries, bank = gaussian(19, 4, 16), gaussian(20, 30, 16)
    ids, scores = topk(queries, torch.from_numpy(bank), 2, backend=backend)
    assert isinstance(ids, np.ndarray)
    assert isinstance(scores, np.ndarray)
    tensor = torch.from_numpy(queries).requires_grad_()
    ids, scores = topk(tensor, bank, 2, backend=backend)
    assert isinstance(ids, torch.Tensor)
    assert (ids.dtype, scores.dtype) == (torch.int64, torch.float32)
    assert not scores.requires_grad


def test_torch_ignores_the_callers_precision() -> None:
    queries, bank = gaussian(21, 40, 768), gaussian(22, 400, 768)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            check(topk(queries, bank, 5, backend="torch"), queries, bank, 5, None)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("value", "problem"),
    [(np.nan, "holds NaN"), (np.inf, "holds infinity"), (3e38, "overflows float32")],
)
def test_rows_that_cannot_be_ranked_are_named(backend: str, value: float, problem: str) -> None:
    good, bad = gaussian(23, 20_000, 6), gaussian(24, 20_000, 6)
    bad[17_001] = value
    with pytest.raises(DataError, match=rf"row 17001 of bank .*{problem}"):
        topk(good[:3], bad, 2, backend=backend)
    with pytest.raises(DataError, match=rf"row 17001 of queries .*{problem}"):
        topk(torch.from_numpy(bad), good[:3], 2, backend=backend)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((2, 3), np.float32), np.zeros((2, 4), np.float32), 1), "3 columns .* 4"),
        ((np.zeros((2, 3)), np.zeros((2, 3), np.float32), 1), "holds float64; allowed"),
        ((np.zeros(3, np.float32), np.zeros((2, 3), np.float32), 1), r"shape \(3,\)"),
        ((np.zeros((2, 0), np.float32), np.zeros((2, 0), np.float32), 1), "D >= 1"),
        (([[1.0]], np.zeros((2, 1), np.float32), 1), "queries is list"),
        ((np.zeros((2, 3), ">f4"), np.zeros((2, 3), np.float32), 1), "native byte order"),
        ((np.zeros((2, 3), np.float32), np.zeros((2, 3), np.float32), 0), "k=0"),
        ((np.zeros((2, 3), np.float32), np.zeros((2, 3), np.float32), 1.5), "k=1.5"),
        ((np.zeros((2, 3), np.float32), np.zeros((2, 3), np.float32), 1, np.nan), "NaN"),
    ],
)
def test_wrong_arguments_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        topk(*arguments)


def test_wrong_options_are_refused() -> None:
    rows = np.zeros((2, 3), np.float32)
    with pytest.raises(ConfigError, match="threads=0"):
        topk(rows, rows, 1, threads=0)
    with pytest.raises(ConfigError, match="backend='tpu' is not known; allowed: auto, "):
        topk(rows, rows, 1, backend="tpu")


@pytest.mark.parametrize("name", [*BACKENDS, "cpp:baseline"])
def test_progress_reaches_the_total(name: str) -> None:
    queries, bank = gaussian(25, 1000, 256), gaussian(26, 20_000, 256)
    reports: list[tuple[int, int]] = []
    runner(name)(queries, bank, 3, threads=1, progress=lambda *report: reports.append(report))
    totals = {total for _, total in reports}
    assert totals <= {1000 * 20_000}
    done = [done for done, _ in reports]
    assert done == sorted(done)
    assert all(0 <= value <= 1000 * 20_000 for value in done)
    if name in ("torch", "cpp:baseline"):  # the fast kernels may end before the first report is due
        assert reports


class StopSearchError(Exception):
    pass


@pytest.mark.parametrize("name", ["torch", "cpp:baseline"])
def test_progress_can_stop_the_search(name: str) -> None:
    queries, bank = gaussian(27, 2000, 256), gaussian(28, 20_000, 256)
    calls = []

    def stop(done: int, total: int) -> None:
        calls.append((done, total))
        raise StopSearchError

    with pytest.raises(StopSearchError):
        runner(name)(queries, bank, 3, threads=1, progress=stop)
    assert len(calls) == 1


def test_signals_interrupt_the_search() -> None:
    queries, bank = gaussian(29, 2000, 256), gaussian(30, 20_000, 256)

    def handle(number: int, frame: object) -> None:
        raise StopSearchError

    before = signal.signal(signal.SIGALRM, handle)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(StopSearchError):
            runner("cpp:baseline")(queries, bank, 3, threads=1)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_unknown_kernels_are_refused() -> None:
    with pytest.raises(ValueError, match="no top-k kernel called 'sse9'"):
        runner("cpp:sse9")(gaussian(31, 2, 3), gaussian(32, 2, 3), 1)


@pytest.mark.gpu
@ON_GPU
@pytest.mark.parametrize(
    "backend", [row.name for row in backends("topk") if row.devices != ("cpu",)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gpu_ranking_is_fp64s(backend: str, dtype: torch.dtype) -> None:
    queries = torch.from_numpy(gaussian(33, 130, 768)).to("cuda", dtype)
    bank = torch.from_numpy(gaussian(34, 20_000, 768)).to(dtype)
    for where in (bank, bank.cuda()):
        ids, scores = topk(queries, where, 10, 20.0, backend=backend)
        assert ids.is_cuda
        check((ids, scores), queries, bank, 10, 20.0)
    ones = torch.ones(40_000, 3, device="cuda", dtype=dtype)
    assert topk(ones[:2], ones, 4, backend=backend)[0].tolist() == [[0, 1, 2, 3]] * 2


@pytest.mark.gpu
@ON_GPU
def test_cpu_back_ends_refuse_gpu_tensors() -> None:
    rows = torch.ones(2, 3, device="cuda")
    with pytest.raises(BackendError, match="runs on cpu, not on cuda"):
        topk(rows, rows, 1, backend="cpp")
    with pytest.raises(ConfigError, match="the bank is on cuda:0 and the queries are on cpu"):
        topk(rows.cpu(), rows, 1)
