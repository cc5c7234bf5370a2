"""topk in plain torch against the canonical ranking: equal ids, and scores of equal bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pymcip.ops import topk_torch as module
from pymcip.ops.canonical import canonical_topk
from pymcip.ops.topk_torch import topk_torch


def search(
    queries: Any, bank: Any, k: int, threshold: float = -np.inf, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    options = {"exact": True, "threads": 1, "progress": None, **options}
    ids, scores = topk_torch(queries, bank, k, threshold, **options)
    assert type(ids) is type(scores) is type(queries)
    return np.asarray(ids), np.asarray(scores)


def check(queries: Any, bank: Any, k: int, threshold: float = -np.inf) -> None:
    ids, scores = search(queries, bank, k, threshold)
    wanted_ids, wanted_scores = canonical_topk(queries, bank, k, threshold)
    np.testing.assert_array_equal(ids, wanted_ids)
    np.testing.assert_array_equal(scores.view(np.int32), wanted_scores.view(np.int32))


def gaussian(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUERIES", 7)
    monkeypatch.setattr(module, "ROWS", 50)
    monkeypatch.setattr(module, "MERGED", 100)


@given(
    rows=st.integers(0, 12),
    bank_rows=st.integers(0, 160),
    columns=st.integers(1, 40),
    k=st.integers(1, 60),
    threshold=st.sampled_from([-np.inf, 0.0, 0.5, np.inf]),
    levels=st.sampled_from([0, 1, 2, 1000]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=150, deadline=None)
def test_small_problems(
    rows: int, bank_rows: int, columns: int, k: int, threshold: float, levels: int, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    queries = generator.integers(-levels, levels + 1, (rows, columns)).astype(np.float32) / 7
    bank = generator.integers(-levels, levels + 1, (bank_rows, columns)).astype(np.float32) / 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "QUERIES", 7)
        patch.setattr(module, "ROWS", 50)
        patch.setattr(module, "MERGED", 100)
        check(queries, bank, k, threshold)


@pytest.mark.parametrize("k", [1, 10, 300])
def test_ranking_is_canonical(k: int) -> None:
    check(gaussian(1, 37, 65), gaussian(2, 9000, 65), k)


def test_thresholds() -> None:
    queries, bank = gaussian(3, 9, 48), gaussian(4, 6000, 48)
    for threshold in (0.0, 10.0, 1e9):
        check(queries, bank, 50, threshold)


@pytest.mark.parametrize("columns", [3, 64])
def test_rows_closer_than_the_bound(columns: int, small_blocks: None) -> None:
    queries, bank = gaussian(5, 8, columns), np.tile(gaussian(6, 1, columns), (700, 1))
    bank += np.float32(1e-7) * gaussian(7, 700, columns)
    check(queries, bank, 20)
    bank[:] = bank[0]
    check(queries, bank, 20)
    assert search(queries, bank, 3)[0].tolist() == [[0, 1, 2]] * 8


def test_lengths_of_all_orders(small_blocks: None) -> None:
    scales = np.float32(10.0) ** np.arange(-30, 18).astype(np.float32)
    bank = gaussian(8, 480, 20) * np.repeat(scales, 10)[:, None]
    queries = gaussian(9, 480, 20)[::10] * scales[:, None]
    check(queries, bank, 30)
    check(queries[:20], bank[:250], 30)  # products that underflow


def test_dtypes_strides_and_memory_maps(tmp_path: Path, small_blocks: None) -> None:
    queries, bank = gaussian(10, 20, 31), gaussian(11, 300, 31)
    np.save(tmp_path / "bank.npy", bank.astype(np.float16))
    check(queries, np.load(tmp_path / "bank.npy", mmap_mode="r"), 9)
    check(queries[::-2, ::-3], bank[::-2, ::-3], 9)
    check(torch.from_numpy(queries).bfloat16(), bank, 9)
    check(torch.from_numpy(queries).half().T.contiguous().T, torch.from_numpy(bank).bfloat16(), 9)


def test_plain_answer_is_near(small_blocks: None) -> None:
    queries, bank = gaussian(12, 20, 100), gaussian(13, 500, 100)
    _, scores = search(queries, bank, 10, 0.5, exact=False)
    _, wanted = canonical_topk(queries, bank, 10, 0.5)
    bound = 116 * 2.0**-24 * 200
    np.testing.assert_allclose(scores, wanted, rtol=0, atol=bound)
    assert (np.diff(scores) <= 0).all()
    ones = np.ones((200, 5), np.float32)
    assert search(ones[:2], ones, 3, exact=False)[0].tolist() == [[0, 1, 2]] * 2


def test_progress_and_precision_settings(small_blocks: None) -> None:
    calls: list[tuple[int, int]] = []
    before = torch.get_float32_matmul_precision()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        queries, bank = gaussian(14, 10, 8), gaussian(15, 120, 8)
        ids, _ = search(queries, bank, 4, progress=lambda *call: calls.append(call))
    np.testing.assert_array_equal(ids, canonical_topk(queries, bank, 4)[0])
    assert calls[-1] == (1200, 1200)
    assert len(calls) == 6
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gpu_has_the_bits_of_the_cpu(dtype: torch.dtype) -> None:
    queries = torch.from_numpy(gaussian(16, 60, 300)).to(dtype)
    bank = torch.from_numpy(gaussian(17, 9000, 300)).to(dtype)
    bank[5000:5100] = bank[:1]
    wanted_ids, wanted_scores = canonical_topk(queries, bank, 20, 5.0)
    for place in (bank, bank.cuda()):
        ids, scores = topk_torch(
            queries.cuda(), place, 20, 5.0, exact=True, threads=1, progress=None
        )
        np.testing.assert_array_equal(ids.cpu().numpy(), wanted_ids)
        np.testing.assert_array_equal(
            scores.cpu().numpy().view(np.int32), wanted_scores.view(np.int32)
        )
