"""topk's back end "faiss" against NumPy in fp64; what it leaves of faiss's settings."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pymcip.errors import BackendError, MissingDependencyError
from pymcip.ops import explain, topk
from pymcip.ops.faiss_import import import_faiss, probe_faiss
from pymcip.ops.topk_faiss import limits_faiss

pytestmark = pytest.mark.skipif(probe_faiss() is not None, reason="faiss is not installed")
ON_GPU = pytest.mark.skipif(
    not torch.cuda.is_available() or probe_faiss() is not None or limits_faiss("cuda") is not None,
    reason="torch or faiss sees no CUDA device",
)


def search(queries: Any, bank: Any, k: int, threshold: float | None = None, **options: Any) -> Any:
    return topk(queries, bank, k, threshold, backend="faiss", **options)


def to_float64(matrix: Any) -> np.ndarray:
    if isinstance(matrix, torch.Tensor):
        return matrix.detach().double().cpu().numpy()
    return np.array(matrix, dtype=np.float64)


def check(result: Any, queries: Any, bank: Any, k: int, threshold: float | None = None) -> None:
    """The best rows, as far as sums in fp32 tell them apart."""
    ids, scores = (to_float64(x) if isinstance(x, torch.Tensor) else x for x in result)
    ids = ids.astype(np.int64)
    queries, bank = to_float64(queries), to_float64(bank)
    products = queries @ bank.T
    norms = np.outer(np.linalg.norm(queries, axis=1), np.linalg.norm(bank, axis=1).max(initial=0))
    bounds = (bank.shape[1] + 2) * 2.0**-24 * norms[:, 0] if len(bank) else np.zeros(len(queries))
    assert ids.shape == scores.shape == (len(queries), k)
    for row, exact, bound, own, values in zip(ids, products, bounds, ids, scores, strict=True):
        found = row >= 0
        count = int(found.sum())
        assert found[:count].all()  # the places that stay empty come last
        assert np.isneginf(values[count:]).all()
        assert len(set(own[:count])) == count
        assert (np.abs(values[:count] - exact[own[:count]]) <= bound).all()
        pairs = list(zip((-values[:count]).tolist(), own[:count].tolist(), strict=True))
        assert pairs == sorted(pairs)  # by score, then by id
        floor = -np.inf if threshold is None else float(np.float32(threshold))
        assert (values[:count] >= floor).all()
        admitted = np.sort(exact[exact >= floor + bound])[::-1]
        assert count >= min(k, len(admitted))
        assert count <= min(k, int((exact >= floor - bound).sum()))
        if 0 < count == k:  # no row that is clearly better than the last one was left out
            left_out = np.delete(exact, own)
            assert left_out.max(initial=-np.inf) <= values[k - 1] + 2 * bound


def gaussian(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@pytest.mark.parametrize("columns", [1, 17, 300])
@pytest.mark.parametrize("threshold", [None, 0.5, -1e30, 1e30])
def test_gaussian_rows(columns: int, threshold: float | None) -> None:
    queries, bank = gaussian(1, 33, columns), gaussian(2, 1500, columns)
    check(search(queries, bank, 10, threshold), queries, bank, 10, threshold)


def test_several_blocks_of_queries_and_of_the_bank() -> None:
    queries, bank = gaussian(3, 300, 4096), gaussian(4, 2500, 4096)
    check(search(queries, bank, 2000), queries, bank, 2000)


def test_ties_within_a_list_are_in_order_of_ids() -> None:
    bank = np.tile(np.eye(4, dtype=np.float32), (25, 1))
    ids, scores = search(np.eye(4, dtype=np.float32), bank, 25, 0.5)
    np.testing.assert_array_equal(ids, np.arange(0, 100, 4) + np.arange(4)[:, None])
    assert (scores == 1).all()


def test_a_bank_in_parts_and_more_places_than_rows() -> None:
    queries, bank = gaussian(5, 9, 30), gaussian(6, 700, 30)
    parts = [bank[:100], bank[:0], torch.from_numpy(bank[100:])]
    check(search(queries, parts, 13, 1.0), queries, bank, 13, 1.0)
    check(search(queries, parts, 800), queries, bank, 800)


def test_kinds_of_input(tmp_path: Path) -> None:
    queries, bank = gaussian(11, 23, 30), gaussian(12, 700, 30)
    stored = np.lib.format.open_memmap(tmp_path / "a.npy", "w+", np.float16, bank.shape)
    stored[:] = bank
    stored.flush()
    tensor = torch.from_numpy(bank)
    for other in (
        bank[::-1],
        np.asfortranarray(bank),
        np.load(tmp_path / "a.npy", mmap_mode="r"),
        tensor.bfloat16(),
        tensor.half().T.contiguous().T,
        tensor.clone().requires_grad_(),
    ):
        for asked in (queries, queries[::2], torch.from_numpy(queries).bfloat16()):
            check(search(asked, other, 6, 1.0), asked, other, 6, 1.0)


def test_empty() -> None:
    for rows, bank_rows in ((0, 5), (5, 0), (0, 0)):
        queries, bank = np.ones((rows, 3), np.float32), np.ones((bank_rows, 3), np.float32)
        check(search(queries, bank, 4), queries, bank, 4)


def test_explain_says_that_it_is_not_certified() -> None:
    own = explain("topk", backend="faiss")
    assert own.chosen == "faiss"
    assert dict(own.verdicts)["faiss"] == "chosen (faiss's own fp32 ranking, not certified)"
    assert dict(explain("topk").verdicts)["faiss"].endswith("not certified)")


def test_threads_are_put_back() -> None:
    faiss = import_faiss()
    before = faiss.omp_get_max_threads()
    seen = []
    rows = gaussian(15, 50, 8)
    search(rows, rows, 3, threads=3, progress=lambda *_: seen.append(faiss.omp_get_max_threads()))
    assert set(seen) == {3}
    assert faiss.omp_get_max_threads() == before


def test_progress() -> None:
    queries, bank = gaussian(16, 40, 4096), gaussian(17, 2500, 4096).astype(np.float16)
    reports: list[tuple[int, int]] = []
    search(queries, bank, 3, progress=lambda *report: reports.append(report))
    done = [value for value, _ in reports]
    assert done == sorted(done)
    assert reports[-1] == (100_000, 100_000)
    assert len(set(done)) == 3

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
    with pytest.raises(BackendError, match="faiss can't be imported"):
        search(gaussian(18, 2, 3), gaussian(19, 2, 3), 1)


def test_a_faiss_without_gpus_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_faiss(), "get_num_gpus", lambda: 0)
    assert "pip uninstall faiss-cpu" in str(limits_faiss("cuda", dim=3))
    assert limits_faiss("cpu", dim=3, k=4000) is None
    monkeypatch.setattr(import_faiss(), "get_num_gpus", lambda: 1)
    monkeypatch.setattr(import_faiss(), "StandardGpuResources", object, raising=False)
    assert limits_faiss("cuda", dim=3, k=2048) is None
    assert "takes k <= 2048 on a GPU, not 2049" in str(limits_faiss("cuda", dim=3, k=2049))


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
