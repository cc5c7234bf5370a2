"""topk's back end "faiss" against a NumPy fp64 ranking; what it leaves of faiss's settings."""

from __future__ import annotations

import ctypes
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pymcip.errors import MissingDependencyError
from pymcip.ops import topk_faiss as module
from pymcip.ops.topk_faiss import import_faiss, limits_faiss, probe_faiss, topk_faiss

pytestmark = pytest.mark.skipif(probe_faiss() is not None, reason="faiss is not installed")
ON_GPU = pytest.mark.skipif(
    not torch.cuda.is_available() or probe_faiss() is not None or limits_faiss("cuda") is not None,
    reason="torch or faiss sees no CUDA device",
)


def search(queries: Any, bank: Any, k: int, threshold: float | None = None, **options: Any) -> Any:
    floor = -np.inf if threshold is None else float(np.float32(threshold))
    options = {"exact": True, "threads": 1, "progress": None, **options}
    return topk_faiss(queries, bank, k, floor, **options)


def to_float64(matrix: Any) -> np.ndarray:
    if isinstance(matrix, torch.Tensor):
        return matrix.double().cpu().numpy()
    return np.array(matrix, dtype=np.float64)


def canonical(queries: Any, bank: Any) -> np.ndarray:
    """The contract's score of every pair: 16 lanes in fp64, halves added up, rounded to fp32."""
    queries, bank = to_float64(queries), to_float64(bank)
    padding = ((0, 0), (0, -queries.shape[1] % 16))
    products = np.pad(queries, padding)[:, None] * np.pad(bank, padding)[None]
    lanes = np.zeros((len(queries), len(bank), 16))
    for start in range(0, products.shape[2], 16):
        lanes += products[:, :, start : start + 16]
    for width in (8, 4, 2, 1):
        lanes = lanes[..., :width] + lanes[..., width : 2 * width]
    return lanes[..., 0].astype(np.float32) + np.float32(0)


def check(result: Any, queries: Any, bank: Any, k: int, threshold: float | None = None) -> None:
    ids, scores = result
    assert ids.dtype == np.int64
    assert scores.dtype == np.float32
    wanted_ids = np.full((len(queries), k), -1)
    wanted = np.full((len(queries), k), -np.inf, dtype=np.float32)
    exact = canonical(queries, bank)
    for row, line in enumerate(exact):
        order = np.lexsort((np.arange(len(line)), -line))[:k]
        if threshold is not None:
            order = order[line[order] >= np.float32(threshold)]
        wanted_ids[row, : len(order)], wanted[row, : len(order)] = order, line[order]
    np.testing.assert_array_equal(ids, wanted_ids)
    np.testing.assert_array_equal(scores.view(np.int32), wanted.view(np.int32))


def gaussian(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@given(
    rows=st.integers(0, 30),
    bank_rows=st.integers(0, 90),
    columns=st.integers(1, 40),
    k=st.integers(1, 100),
    threshold=st.none() | st.integers(-6, 6),
    spread=st.integers(0, 2),
    blocks=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=100, deadline=None)
def test_ties(
    rows: int,
    bank_rows: int,
    columns: int,
    k: int,
    threshold: int | None,
    spread: int,
    blocks: bool,
    seed: int,
) -> None:
    generator = np.random.default_rng(seed)  # integers up to 2: many ties
    queries = generator.integers(-spread, spread + 1, (rows, columns)).astype(np.float32)
    bank = generator.integers(-spread, spread + 1, (bank_rows, columns)).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        if blocks:
            patch.setattr(module, "_QUERIES", 7)
            patch.setattr(module, "_FLOP", 2.0 * 7 * columns * 13)
            patch.setattr(module._Cpu, "bank_bytes", lambda *_: 4 * columns * 13)
            patch.setattr(module, "_AGAIN_ROWS", 11)
            patch.setattr(module, "_AGAIN_LIST", 5)
            patch.setattr(module, "_AGAIN_QUERIES", 3)
        check(search(queries, bank, k, threshold), queries, bank, k, threshold)


@pytest.mark.parametrize("columns", [1, 17, 300])
@pytest.mark.parametrize("threshold", [None, 0.5, -1e30, 1e30])
def test_gaussian_rows(columns: int, threshold: float | None) -> None:
    queries, bank = gaussian(1, 33, columns), gaussian(2, 1500, columns)
    check(search(queries, bank, 10, threshold), queries, bank, 10, threshold)


def test_rows_that_fp32_cannot_tell_apart() -> None:
    """Ranks are decided below the rounding of fp32 sums, so faiss's own order is wrong."""
    columns = 256
    base = gaussian(3, 1, columns)
    bank = base + 1e-7 * gaussian(4, 3000, columns) * np.abs(base)
    queries = np.concatenate([base, gaussian(5, 21, columns)])
    check(search(queries, bank, 10), queries, bank, 10)
    own = search(queries, bank, 10, exact=False)
    assert (np.diff(own[1], axis=1) <= 0).all()
    assert (own[0] != search(queries, bank, 10)[0]).any()


@pytest.mark.parametrize("value", [1.0, 0.1, 0.0, 1e-22, 1e18])
def test_all_rows_equal(value: float) -> None:
    queries = np.full((3, 40), value, np.float32)
    bank = np.full((5000, 40), value, np.float32)
    ids, scores = search(queries, bank, 7)
    assert (ids == np.arange(7)).all()
    assert (scores == canonical(queries[:1], bank[:1])).all()


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e-3, 1e16])
def test_sizes_of_values(size: float) -> None:
    queries, bank = gaussian(6, 22, 64), (size * gaussian(7, 800, 64)).astype(np.float32)
    bank[::3] *= 30
    check(search(queries, bank, 5), queries, bank, 5)
    check(search(bank[:9], bank, 5), bank[:9], bank, 5)


def test_norms_at_the_end_of_fp32() -> None:
    """The largest norms that are let in: partial sums may overflow in fp32."""
    rows = np.sign(gaussian(8, 300, 16)) * np.float32(4.6e18)
    check(search(rows[:25], rows, 5), rows[:25], rows, 5)


def test_wide_lists() -> None:
    queries, bank = gaussian(9, 5, 8), gaussian(10, 3000, 8)
    for k in (2048, 4000):
        check(search(queries, bank, k), queries, bank, k)


def test_kinds_of_input(tmp_path: Path) -> None:
    queries, bank = gaussian(11, 23, 30), gaussian(12, 700, 30)
    wide = np.zeros((1400, 60), np.float32)
    wide[::2, ::2] = bank
    unaligned = np.frombuffer(b"\0" + bank.tobytes(), np.uint8)[1:].view(np.float32).reshape(-1, 30)
    stored = np.lib.format.open_memmap(tmp_path / "a.npy", "w+", np.float16, bank.shape)
    stored[:] = bank
    stored.flush()
    read_only = np.load(tmp_path / "a.npy", mmap_mode="r")
    tensor = torch.from_numpy(bank)
    for other in (
        wide[::2, ::2],
        unaligned,
        bank[::-1],
        np.asfortranarray(bank),
        read_only,
        tensor,
        tensor.bfloat16(),
        tensor.half().T.contiguous().T,
        tensor.clone().requires_grad_(),
    ):
        for asked in (queries, queries[::2], torch.from_numpy(queries).bfloat16()):
            plain = other.detach() if isinstance(other, torch.Tensor) else other
            with torch.no_grad():
                check(search(asked, other, 6, 1.0), asked, plain, 6, 1.0)


def test_empty() -> None:
    for rows, bank_rows in ((0, 5), (5, 0), (0, 0)):
        for exact in (True, False):
            ids, scores = search(
                np.ones((rows, 3), np.float32), np.ones((bank_rows, 3), np.float32), 4, exact=exact
            )
            assert (ids == -1).all()
            assert np.isneginf(scores).all()
            assert ids.shape == scores.shape == (rows, 4)


def test_own_answer() -> None:
    """exact=False: scores as close as fp32 sums are, and k and the threshold together."""
    queries, bank = gaussian(13, 40, 100), gaussian(14, 900, 100)
    ids, scores = search(queries, bank, 12, 20.0, exact=False)
    exact = canonical(queries, bank)
    bound = 101 * 2.0**-24 * np.outer(np.linalg.norm(queries, axis=1), np.linalg.norm(bank, axis=1))
    found = ids >= 0
    assert found.any()
    assert not found.all()
    assert (scores[found] >= 20).all()
    assert np.isneginf(scores[~found]).all()
    rows = np.nonzero(found)[0]
    error = np.abs(scores[found] - exact[rows, ids[found]])
    assert (error <= bound[rows, ids[found]]).all()
    counts = np.minimum((exact >= 20).sum(axis=1), 12)
    sure = np.abs(exact - 20).min(axis=1) > bound.max()
    np.testing.assert_array_equal(found.sum(axis=1)[sure], counts[sure])


def test_threads_are_put_back() -> None:
    faiss = import_faiss()
    before = faiss.omp_get_max_threads()
    seen = []
    rows = gaussian(15, 50, 8)
    search(rows, rows, 3, threads=3, progress=lambda *_: seen.append(faiss.omp_get_max_threads()))
    assert set(seen) == {3}
    assert faiss.omp_get_max_threads() == before
    results = [search(rows, rows, 3, threads=threads) for threads in (1, 2)]
    np.testing.assert_array_equal(results[0][0], results[1][0])


def test_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module._Cpu, "bank_bytes", lambda *_: 4 * 8 * 100)
    monkeypatch.setattr(module, "_QUERIES", 16)
    queries, bank = gaussian(16, 40, 8), gaussian(17, 1000, 8).astype(np.float16)
    reports: list[tuple[int, int]] = []
    search(queries, bank, 3, progress=lambda *report: reports.append(report))
    done = [value for value, _ in reports]
    assert done == sorted(done)
    assert reports[-1] == (40_000, 40_000)
    assert len(set(done)) == 30

    class StopSearchError(Exception):
        pass

    faiss = import_faiss()
    before = faiss.omp_get_max_threads()
    calls = []

    def stop(*report: int) -> None:
        calls.append(report)
        raise StopSearchError

    with pytest.raises(StopSearchError):
        search(queries, bank, 3, threads=5, progress=stop)
    assert len(calls) == 1
    assert faiss.omp_get_max_threads() == before


def test_without_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert 'pip install "pymcip[faiss]"' in str(probe_faiss())
    with pytest.raises(MissingDependencyError, match=r"pymcip\[faiss-gpu\]"):
        import_faiss()


def test_a_faiss_without_gpus_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_faiss(), "get_num_gpus", lambda: 0)
    assert "pip uninstall faiss-cpu" in str(limits_faiss("cuda", dim=3))
    assert limits_faiss("cpu", dim=3) is None


class FaissOnPretendedGpu:
    """What `_Gpu` uses of a faiss with GPU support, computed by NumPy at the addresses given."""

    METRIC_INNER_PRODUCT, DistanceDataType_F32, IndicesDataType_I64 = 0, 1, 2
    GpuDistanceParams = types.SimpleNamespace

    @staticmethod
    def cast_integer_to_float_ptr(address: int) -> Any:
        return ctypes.cast(address, ctypes.POINTER(ctypes.c_float))

    @staticmethod
    def cast_integer_to_idx_t_ptr(address: int) -> Any:
        return ctypes.cast(address, ctypes.POINTER(ctypes.c_int64))

    @staticmethod
    def bfKnn(_resources: Any, task: Any) -> None:  # noqa: N802
        as_array = np.ctypeslib.as_array
        assert (task.metric, task.outIndicesType) == (0, 2)
        assert task.vectorType == task.queryType == 1
        assert task.vectorsRowMajor
        assert task.queriesRowMajor
        rows = as_array(task.queries, (task.numQueries, task.dims))
        bank = as_array(task.vectors, (task.numVectors, task.dims))
        scores = rows @ bank.T
        ids = np.argsort(-scores, axis=1)[:, : task.k]
        as_array(task.outIndices, ids.shape)[:] = ids
        as_array(task.outDistances, ids.shape)[:] = np.take_along_axis(scores, ids, axis=1)


@pytest.mark.parametrize("k", [5, 2048])
def test_the_way_over_a_gpu(monkeypatch: pytest.MonkeyPatch, k: int) -> None:
    """Its tensors, addresses and lists of at most 2048, with the GPU's work done by NumPy."""
    search_gpu = object.__new__(module._Gpu)
    search_gpu._faiss = FaissOnPretendedGpu
    search_gpu._device, search_gpu._resources = torch.device("cpu"), None
    monkeypatch.setattr(module, "_Cpu", lambda: search_gpu)
    queries, bank = gaussian(20, 21, 33), gaussian(21, 5000, 33)
    bank[100:400] = bank[7]
    for other in (bank, torch.from_numpy(bank).T.contiguous().T, torch.from_numpy(bank).bfloat16()):
        check(search(queries, other, k), queries, other, k)
        check(search(torch.from_numpy(queries), other, k, 3.0), queries, other, k, 3.0)


@pytest.mark.gpu
@ON_GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    queries = torch.from_numpy(gaussian(18, 130, 200)).to("cuda", dtype)
    bank = torch.from_numpy(gaussian(19, 4000, 200)).to(dtype)
    for where in (bank, bank.cuda(), bank.cuda().T.contiguous().T):
        check(search(queries, where, 10), queries, bank, 10)
        check(search(queries, where, 10, 20.0), queries, bank, 10, 20.0)
    with torch.cuda.stream(torch.cuda.Stream()):
        check(search(queries * 2, bank.cuda(), 2048), queries * 2, bank, 2048)
    ones = torch.ones(40_000, 3, device="cuda", dtype=dtype)
    assert search(ones[:2], ones, 4)[0].tolist() == [[0, 1, 2, 3]] * 2
