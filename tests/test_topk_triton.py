"""topk in Triton against the canonical ranking: equal ids, and scores of equal bits.

Without a GPU the kernels run in Triton's interpreter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pymcip.ops import topk_triton as module
from pymcip.ops.canonical import canonical_matrix, canonical_topk
from pymcip.ops.topk_triton import probe_triton_topk, topk_triton

MISSING = probe_triton_topk()
ON_GPU = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=f"Triton: {MISSING}")


def to_numpy(matrix: Any) -> np.ndarray:
    return matrix.cpu().numpy() if isinstance(matrix, torch.Tensor) else matrix


def search(
    queries: Any, bank: Any, k: int, threshold: float = -np.inf, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    if ON_GPU:  # the bank stays where it is
        queries = torch.as_tensor(np.array(queries)) if isinstance(queries, np.ndarray) else queries
        queries = queries.cuda()
    options = {"exact": True, "threads": 1, "progress": None, **options}
    ids, scores = topk_triton(queries, bank, k, threshold, **options)
    assert type(ids) is type(scores) is type(queries)
    ids, scores = to_numpy(ids), to_numpy(scores)
    assert ids.dtype == np.int64
    assert scores.dtype == np.float32
    return ids, scores


def check(queries: Any, bank: Any, k: int, threshold: float = -np.inf) -> None:
    ids, scores = search(queries, bank, k, threshold)
    wanted_ids, wanted_scores = canonical_topk(queries, bank, k, threshold)
    np.testing.assert_array_equal(ids, wanted_ids)
    np.testing.assert_array_equal(scores.view(np.int32), wanted_scores.view(np.int32))


def gaussian(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@pytest.fixture
def again(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lists of 24 pairs, that overflow; how many rows were screened again, part by part."""
    monkeypatch.setattr(module, "list_length", lambda k: 24)
    parts: list[int] = []
    take = module.Search.take

    def counting(self: Any, rows: Any, first: int, last: int, offset: int, active: Any) -> None:
        if (first, last) != (0, len(rows.raw)):
            parts.append(last - first)
        take(self, rows, first, last, offset, active)

    monkeypatch.setattr(module.Search, "take", counting)
    return parts


@pytest.mark.parametrize(
    ("rows", "bank_rows", "columns", "k"),
    [
        (1, 1, 1, 1),
        (1, 700, 100, 10),
        (5, 300, 16, 3),
        (67, 300, 3, 2),  # two tiles of queries
        (3, 1100, 33, 5),  # several chunks
        (4, 50, 17, 64),  # more places than rows
        (2, 900, 8, 300),
    ],
)
def test_ranking_is_canonical(rows: int, bank_rows: int, columns: int, k: int) -> None:
    check(gaussian(1, rows, columns), gaussian(2, bank_rows, columns), k)


def test_wide_rows() -> None:
    check(gaussian(3, 2, 4096), gaussian(4, 60, 4096), 5)


@pytest.mark.parametrize(("rows", "bank_rows"), [(0, 5), (3, 0), (0, 0)])
def test_no_rows(rows: int, bank_rows: int) -> None:
    check(gaussian(5, rows, 7), gaussian(6, bank_rows, 7), 4)


def test_thresholds() -> None:
    queries, bank = gaussian(7, 5, 20), gaussian(8, 600, 20)
    for threshold in (-1e9, 0.0, 6.0, 1e9, np.inf):
        check(queries, bank, 30, threshold)
    best = canonical_topk(queries, bank, 4)[1][0, 3]  # inclusive, to the last bit
    check(queries, bank, 9, float(best))
    check(queries, bank, 9, float(np.nextafter(best, np.float32(100))))


def test_small_integers_tie() -> None:
    generator = np.random.default_rng(9)
    queries = generator.integers(-1, 2, (9, 5)).astype(np.float32)
    bank = generator.integers(-1, 2, (700, 5)).astype(np.float32)
    check(queries, bank, 40)
    check(queries, bank, 40, 1.0)


def test_equal_rows_are_screened_down_to_what_fits(again: list[int]) -> None:
    queries, bank = gaussian(10, 3, 20), np.tile(gaussian(11, 1, 20), (150, 1))
    check(queries, bank, 8)
    assert min(again) <= 24
    assert search(queries, bank, 3)[0].tolist() == [[0, 1, 2]] * 3


def test_rows_closer_than_the_bound(again: list[int]) -> None:
    queries, bank = gaussian(12, 3, 64), np.tile(gaussian(13, 1, 64), (150, 1))
    bank += np.float32(1e-4) * gaussian(14, 150, 64)
    check(queries, bank, 10)
    assert again


def test_rising_scores_overflow(again: list[int]) -> None:
    queries = np.abs(gaussian(15, 2, 12))
    bank = np.linspace(0.1, 1, 150, dtype=np.float32)[:, None] * np.ones(12, np.float32)
    check(queries, bank, 5)
    assert again


def test_overflow_of_one_query_leaves_the_others(again: list[int]) -> None:
    bank = gaussian(16, 600, 16)
    bank[40:240] = 5 * bank[40]  # a cluster that only the first query is near to
    queries = np.stack([bank[40], *gaussian(17, 4, 16)])
    check(queries, bank, 6)
    assert again


def test_clusters_in_order() -> None:
    centres = 3 * gaussian(18, 6, 24)
    bank = np.repeat(centres, 120, axis=0) + gaussian(19, 720, 24)
    check(centres + gaussian(20, 6, 24), bank, 10)


def test_lengths_of_all_orders() -> None:
    scales = np.float32(10.0) ** np.arange(-30, 18, 3).astype(np.float32)
    bank = gaussian(21, 320, 6) * np.repeat(scales, 20)[:, None]
    queries = gaussian(22, len(scales), 6) * scales[:, None]
    check(queries, bank, 12)
    check(queries[:5], bank[:100], 12)  # products that underflow
    longest = np.float32([[1e19, 1e19], [1e19, -1e19], [-1e19, 1e19]])
    check(longest, np.tile(longest, (9, 1)), 12)


def test_dtypes_strides_and_memory_maps(tmp_path: Path) -> None:
    queries, bank = gaussian(23, 6, 21), gaussian(24, 300, 21)
    np.save(tmp_path / "bank.npy", bank.astype(np.float16))
    mapped = np.load(tmp_path / "bank.npy", mmap_mode="r")
    check(queries, mapped, 9)
    check(queries.astype(np.float16), mapped, 9)
    check(queries[::-2, ::-3], bank[::-2, ::-3], 9)
    wide = torch.from_numpy(queries)
    check(wide.bfloat16(), bank, 9)
    check(wide.half().T.contiguous().T, torch.from_numpy(bank).bfloat16(), 9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_that_stay_where_they_are(dtype: torch.dtype) -> None:
    queries = torch.from_numpy(gaussian(25, 5, 24)).to(dtype)
    bank = torch.from_numpy(gaussian(26, 400, 24)).to(dtype)
    check(queries, bank.cuda() if ON_GPU else bank, 9)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, bank = gaussian(27, 10, 9), np.round(gaussian(28, 400, 9))
    monkeypatch.setattr(module, "QUERIES", 4)
    monkeypatch.setattr(module, "CHUNK", 130)
    calls: list[tuple[int, int]] = []
    ids, _ = search(queries, bank, 7, progress=lambda *call: calls.append(call))
    wanted = canonical_topk(queries, bank, 7)[0]
    np.testing.assert_array_equal(ids, wanted)
    assert calls[-1] == (4000, 4000)
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})
    monkeypatch.setattr(module, "SEGMENT", 150)  # as a bank of more than 2^31 rows is searched
    check(queries, bank, 7)
    check(queries, bank, 7, 5.0)


def test_progress_may_stop_the_search() -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(gaussian(29, 2, 8), gaussian(30, 600, 8), 3, progress=stop)


def test_plain_answer_ranks_the_rounded_rows() -> None:
    queries, bank = gaussian(31, 4, 30), gaussian(32, 500, 30)
    ids, scores = search(queries, bank, 10, 1.0, exact=False)
    rounded = [torch.from_numpy(rows).bfloat16() for rows in (queries, bank)]
    wanted_ids, wanted_scores = canonical_topk(*rounded, 10, 1.0)
    np.testing.assert_array_equal(ids, wanted_ids)
    np.testing.assert_array_equal(scores, wanted_scores)
    assert (canonical_topk(queries, bank, 10, 1.0)[0] != wanted_ids).any()


# --- on a GPU -----------------------------------------------------------------------------------


def check_large(queries: torch.Tensor, bank: torch.Tensor, k: int, thresholds: list[float]) -> None:
    """As `check`, but sorting on the GPU, with the bank there and in main memory."""
    scores, ids = canonical_matrix(queries, bank).sort(dim=1, descending=True, stable=True)
    scores, ids = scores[:, :k], ids[:, :k]
    for threshold in thresholds:
        below = scores < threshold
        for place in (bank, bank.cpu()):
            found_ids, found = topk_triton(
                queries, place, k, threshold, exact=True, threads=1, progress=None
            )
            assert torch.equal(found_ids, ids.masked_fill(below, -1))
            assert torch.equal(found, scores.masked_fill(below, -torch.inf))


def test_the_check_itself() -> None:
    if not ON_GPU:
        queries, bank = torch.from_numpy(gaussian(33, 3, 8)), torch.from_numpy(gaussian(34, 70, 8))
        check_large(queries, bank, 5, [-torch.inf, 2.0])


DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Queries, rows of the bank, columns, k. Few widths, since each is compiled anew.
LARGE = (
    (1, 50_000, 768, 10),
    (300, 60_001, 100, 64),
    (2049, 40_000, 100, 1),
    (33, 30_000, 768, 2048),
)
HARD = ((70, 30_000, 100, 10), (70, 20_000, 100, 5), (70, 50_000, 100, 10))


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="torch sees no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "bank_rows", "columns", "k"), LARGE)
def test_larger_problems_on_gpu(
    rows: int, bank_rows: int, columns: int, k: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator("cuda").manual_seed(rows)
    queries = torch.randn(rows, columns, generator=generator, device="cuda").to(dtype)
    bank = torch.randn(bank_rows, columns, generator=generator, device="cuda").to(dtype)
    check_large(queries, bank, k, [-torch.inf, 3.0 * columns**0.5])


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="torch sees no CUDA device")
@pytest.mark.parametrize("kind", ["close", "equal", "rising"])
def test_hard_data_on_gpu(kind: str) -> None:
    rows, bank_rows, columns, k = HARD[["close", "equal", "rising"].index(kind)]
    generator = torch.Generator("cuda").manual_seed(0)
    queries = torch.randn(rows, columns, generator=generator, device="cuda")
    bank = torch.randn(1, columns, generator=generator, device="cuda").repeat(bank_rows, 1)
    if kind == "close":
        bank += 1e-4 * torch.randn(bank_rows, columns, generator=generator, device="cuda")
    elif kind == "rising":
        bank *= torch.linspace(0.1, 1, bank_rows, device="cuda")[:, None]
    check_large(queries, bank, k, [-torch.inf])
