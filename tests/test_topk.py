"""topk against its definition, back end by back end: equal ids, and scores of equal bits.

The oracle is NumPy in fp64 and shares nothing with the package.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pymcip import _core
from pymcip.errors import BackendError, ConfigError, DataError, OutputExistsError, PymcipError
from pymcip.ops import PackedBank, backends, topk

USABLE = [row.name for row in backends("topk") if row.obstacle("cpu", "float32") is None]
BACKENDS = [name for name in USABLE if name != "faiss"]  # it is not exact: test_topk_faiss.py
KERNELS = _core.topk_kernels()
INT8 = [name for name in KERNELS if name != "amx_bf16"]
FASTEST = KERNELS[0]
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS)
EVERY_KERNEL = pytest.mark.parametrize("backend", KERNELS)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def examples(count: int) -> int:
    """Fewer where each takes longer: see 'make sanitize'."""
    return max(1, round(count * float(os.environ.get("PYMCIP_EXAMPLES", "1"))))


# --------------------------------------------------------------------------------------------------
# The oracle


def widened(rows: Any) -> np.ndarray:
    """fp32 [M, D] of anything that topk takes for a bank."""
    if isinstance(rows, (list, tuple)):
        return np.concatenate([widened(part) for part in rows])
    if isinstance(rows, PackedBank):
        rows = rows.rows
    if isinstance(rows, torch.Tensor):
        return rows.detach().float().cpu().numpy()
    return np.asarray(rows).astype(np.float32)


def scores_of(query: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The score as csrc/topk.hpp defines it: 16 lanes, halved, rounded once."""
    padding = ((0, 0), (0, -rows.shape[1] % 16))
    products = np.pad(rows, padding).astype(np.float64) * np.pad(query[None], padding)
    lanes = np.zeros((len(rows), 16))
    for start in range(0, products.shape[1], 16):
        lanes += products[:, start : start + 16]
    for width in (8, 4, 2, 1):
        lanes = lanes[:, :width] + lanes[:, width : 2 * width]
    with np.errstate(under="ignore"):
        return lanes[:, 0].astype(np.float32) + np.float32(0)


def ranking(
    queries: Any, bank: Any, k: int, threshold: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The contract, literally, but for a shortlist by inner products in fp64."""
    queries, bank = widened(queries), widened(bank)
    wide, norms = bank.astype(np.float64), np.linalg.norm(bank.astype(np.float64), axis=1)
    ids = np.full((len(queries), k), -1, dtype=np.int64)
    scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
    floor = np.float32(-np.inf if threshold is None else threshold)
    for row, query in enumerate(queries):
        products = wide @ query.astype(np.float64)
        # A score is the product, rounded to fp32, but for some 2^-50 of the norms.
        slack = 2.0**-23 * norms * np.linalg.norm(query.astype(np.float64)) + 2.0**-148
        cut = np.float64(floor)
        if k < len(bank):
            cut = max(cut, np.partition(products - slack, len(bank) - k)[len(bank) - k])
        found = np.flatnonzero(products + slack >= cut)
        values = scores_of(query, bank[found])
        best = np.lexsort((found, -values))[:k]
        best = best[values[best] >= floor]
        ids[row, : len(best)], scores[row, : len(best)] = found[best], values[best]
    return ids, scores


def assert_same(found: tuple[Any, Any], wanted: tuple[Any, Any]) -> None:
    (ids, scores), (wanted_ids, wanted_scores) = (map(np.asarray, pair) for pair in (found, wanted))
    assert (ids.dtype, scores.dtype) == (np.int64, np.float32)
    np.testing.assert_array_equal(ids, wanted_ids)
    np.testing.assert_array_equal(scores.view(np.int32), wanted_scores.view(np.int32))


def packed(bank: Any, backend: str) -> Any:
    """A bank, or parts of one, all packed."""
    if isinstance(bank, (list, tuple)):
        return [packed(part, backend) for part in bank]
    return bank if isinstance(bank, PackedBank) else PackedBank.pack(bank, backend=backend)


def check(
    backend: str,
    queries: Any,
    bank: Any,
    k: int,
    threshold: float | None = None,
    wanted: Any = None,
    threads: int = 2,
) -> None:
    """Kernels get the bank packed as well: for few queries they don't screen rows that are not."""
    wanted = ranking(queries, bank, k, threshold) if wanted is None else wanted
    for form in (bank, packed(bank, backend)) if backend in KERNELS else (bank,):
        assert_same(topk(queries, form, k, threshold, backend=backend, threads=threads), wanted)


def gaussian(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


class Problem(NamedTuple):
    queries: Any
    bank: Any
    k: int
    threshold: float | None = None


# --------------------------------------------------------------------------------------------------
# Sizes, dtypes, strides


@given(
    rows=st.integers(0, 40),
    bank_rows=st.integers(0, 90),
    columns=st.integers(1, 80),
    k=st.integers(1, 100),
    threshold=st.none() | st.integers(-6, 6) | st.sampled_from([-np.inf, np.inf]),
    levels=st.sampled_from([0, 1, 2, 1000]),
    seed=st.integers(0, 2**16),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    ends=st.lists(st.integers(0, 90), max_size=3),
    in_codes=st.booleans(),
    backend=st.sampled_from(BACKENDS),
)
@settings(max_examples=examples(250), deadline=None)
def test_small_problems(
    rows: int,
    bank_rows: int,
    columns: int,
    k: int,
    threshold: float | None,
    levels: int,
    seed: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    ends: list[int],
    in_codes: bool,
    backend: str,
) -> None:
    """Whole numbers of a few levels make many ties."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randint(-levels, levels + 1, (rows, columns), generator=generator).to(dtypes[0])
    bank = torch.randint(-levels, levels + 1, (bank_rows, columns), generator=generator)
    bank = bank.to(dtypes[1])
    cuts = [0, *sorted(min(end, bank_rows) for end in ends), bank_rows]
    parts: list[Any] = [bank[first:last] for first, last in pairwise(cuts)]
    if in_codes:
        parts[::2] = [PackedBank.pack(part, threads=1) for part in parts[::2]]
    found = topk(queries, parts, k, threshold, backend=backend, threads=2)
    assert_same(found, ranking(queries, bank, k, threshold))


@cache
def shaped(rows: int, bank_rows: int, columns: int, k: int) -> tuple[Problem, Any]:
    problem = Problem(gaussian(1, rows, columns), gaussian(2, bank_rows, columns), k)
    return problem, ranking(*problem)


@EVERY_BACKEND
@pytest.mark.parametrize(
    ("rows", "bank_rows", "columns", "k"),
    [
        (1, 1, 1, 1),
        (1, 6000, 512, 10),  # a first cut from few groups
        (31, 33, 63, 40),
        (32, 32, 64, 32),
        (33, 1000, 65, 64),
        (255, 31, 1, 7),
        (256, 700, 15, 5),
        (257, 500, 100, 3),
        (1030, 300, 192, 4),
        (600, 4200, 17, 1),
        (3, 2500, 768, 2048),
        (5, 90, 4095, 11),
        (2, 200, 4096, 3),
    ],
)
def test_sizes(backend: str, rows: int, bank_rows: int, columns: int, k: int) -> None:
    problem, wanted = shaped(rows, bank_rows, columns, k)
    check(backend, *problem, wanted=wanted)


@pytest.mark.parametrize("columns", [*range(1, 20), *range(60, 70), 127, 128, 129, 511, 1152, 2049])
def test_kernels_in_every_width(columns: int) -> None:
    queries, bank = gaussian(3, 3, columns), gaussian(4, 70, columns)
    wanted = ranking(queries, bank, 4)
    for kernel in KERNELS:
        check(kernel, queries, bank, 4, wanted=wanted)


@EVERY_BACKEND
def test_nothing_to_search(backend: str) -> None:
    rows = np.ones((3, 5), np.float32)
    ids, scores = topk(rows, rows[:0], 4, backend=backend)
    assert (ids == -1).all()
    assert np.isneginf(scores).all()
    assert ids.shape == scores.shape == (3, 4)
    ids, scores = topk(rows[:0], rows, 4, backend=backend)
    assert ids.shape == scores.shape == (0, 4)
    assert topk(rows, [rows[:0], rows, rows[:0]], 2, backend=backend)[0].tolist() == [[0, 1]] * 3


@EVERY_BACKEND
@pytest.mark.parametrize("quantile", [0.0, 0.5, 0.99, 1.0])
def test_threshold_admits_its_share(backend: str, quantile: float) -> None:
    queries, bank = gaussian(5, 20, 48), gaussian(6, 700, 48)
    threshold = float(np.quantile(queries @ bank.T, quantile)) + (1.0 if quantile == 1 else 0.0)
    check(backend, queries, bank, 50, threshold)


@EVERY_BACKEND
def test_threshold_is_inclusive_in_fp32(backend: str) -> None:
    queries = np.float32([[1.0]])
    bank = np.float32([[0.7], [0.5], [np.nextafter(np.float32(0.7), np.float32(0))]])
    ids, _ = topk(queries, bank, 3, 0.7, backend=backend)  # 0.7 in fp32 is below 0.7 in fp64
    assert ids.tolist() == [[0, -1, -1]]
    queries, bank = gaussian(7, 4, 300), gaussian(8, 900, 300)
    for place in (0, 9):  # exactly a score's bits, and the next above
        score = ranking(queries, bank, 10)[1][2, place]
        check(backend, queries, bank, 20, float(score))
        check(backend, queries, bank, 20, float(np.nextafter(score, np.float32(np.inf))))


@EVERY_BACKEND
def test_extreme_thresholds(backend: str) -> None:
    queries, bank = gaussian(9, 3, 8), gaussian(10, 20, 8)
    for threshold in (-np.inf, np.inf, 3e38, -3e38, 1e-45, 1e300, -1e300, 0.0, -0.0):
        with np.errstate(over="ignore"):
            check(backend, queries, bank, 4, threshold)


@EVERY_BACKEND
def test_every_half_is_widened_exactly(backend: str) -> None:
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)]
    _, scores = topk(np.float32([[1.0]]), halves[:, None], len(halves), backend=backend)
    np.testing.assert_array_equal(scores[0], np.sort(halves.astype(np.float32))[::-1])


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_not_rounded_again(backend: str, dtype: torch.dtype) -> None:
    queries = torch.from_numpy(gaussian(11, 30, 200))
    bank = torch.from_numpy(gaussian(12, 900, 200)).to(dtype)
    check(backend, queries.to(dtype), bank, 8, 1.0)
    check(backend, queries, bank, 8)


@EVERY_BACKEND
def test_strides_of_any_kind(backend: str) -> None:
    queries, bank = gaussian(13, 24, 160), gaussian(14, 500, 160)
    check(backend, queries[::2, ::-3], bank[::-2, ::-3], 6)
    check(backend, queries, np.asfortranarray(bank), 6)
    check(backend, queries, np.asfortranarray(bank.astype(np.float16)), 6)
    check(backend, queries, torch.from_numpy(np.ascontiguousarray(bank.T)).T, 6)
    check(backend, queries[:, 1:], torch.from_numpy(bank).bfloat16()[::3, 1:], 6)
    check(backend, torch.ones(2, 60), torch.ones(1, 60).expand(70, 60), 3)
    check(backend, np.broadcast_to(np.float32(2), (2, 9)), np.ones((4, 9), np.float16), 3)
    records = np.zeros(500, dtype=[("tag", "u1"), ("row", "f4", (160,))])  # rows 641 bytes apart
    records["row"] = bank
    check(backend, queries, records["row"], 6)


@EVERY_BACKEND
def test_memory_maps(backend: str, tmp_path: Path) -> None:
    queries, bank = gaussian(15, 5, 32), gaussian(16, 20_000, 32).astype(np.float16)
    np.save(tmp_path / "bank.npy", bank)
    mapped = np.load(tmp_path / "bank.npy", mmap_mode="r")
    check(backend, queries, mapped, 12, 2.0)
    check(backend, mapped[:3], mapped, 12)


@EVERY_BACKEND
def test_results_are_of_the_kind_of_the_queries(backend: str) -> None:
    queries, bank = gaussian(17, 4, 16), gaussian(18, 30, 16)
    ids, scores = topk(queries, torch.from_numpy(bank), 2, backend=backend)
    assert type(ids) is type(scores) is np.ndarray
    tensor = torch.from_numpy(queries).requires_grad_()
    ids, scores = topk(tensor, torch.from_numpy(bank).requires_grad_(), 2, backend=backend)
    assert isinstance(ids, torch.Tensor)
    assert (ids.dtype, scores.dtype) == (torch.int64, torch.float32)
    assert not scores.requires_grad


@EVERY_BACKEND
def test_arguments_are_left_as_they_are(backend: str) -> None:
    queries, bank = gaussian(19, 70, 65), gaussian(20, 300, 65)
    copies = queries.copy(), bank.copy()
    queries.flags.writeable = bank.flags.writeable = False
    topk(queries, bank, 3, backend=backend)
    np.testing.assert_array_equal(queries, copies[0])
    np.testing.assert_array_equal(bank, copies[1])


def test_torch_ignores_the_callers_precision() -> None:
    queries, bank = gaussian(21, 40, 768), gaussian(22, 400, 768)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            check("torch", queries, bank, 5)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_default_dtype_changes_nothing() -> None:
    queries, bank = gaussian(23, 4, 30), gaussian(24, 90, 30)
    threshold = float(np.nextafter(ranking(queries, bank, 3)[1][0, 2], np.float32(0))) + 1e-12
    wanted = ranking(queries, bank, 5, threshold)
    torch.set_default_dtype(torch.float64)
    try:
        for backend in BACKENDS:
            assert_same(topk(queries, bank, 5, threshold, backend=backend), wanted)
    finally:
        torch.set_default_dtype(torch.float32)


def test_wide_rows_are_left_to_torch() -> None:
    queries, bank = gaussian(25, 2, 4097), gaussian(26, 50, 4097)
    assert_same(topk(queries, bank, 3), ranking(queries, bank, 3))
    for kernel in KERNELS:
        with pytest.raises(BackendError, match="takes D <= 4096, not 4097"):
            topk(queries, bank, 3, backend=kernel)
    with pytest.raises(BackendError, match="does not take D=4097"):
        PackedBank.pack(bank)


# --------------------------------------------------------------------------------------------------
# Blocks, sets, stretches, parts, threads


@EVERY_BACKEND
@pytest.mark.parametrize("exact", [True, False])
def test_ties_across_blocks_of_the_bank(backend: str, exact: bool) -> None:
    queries, bank = np.ones((2, 3), np.float32), np.ones((40_000, 3), np.float32)
    bank[35_000] = 2
    ids, scores = topk(queries, bank, 5, exact=exact, backend=backend)
    if exact:
        assert ids.tolist() == [[35_000, 0, 1, 2, 3]] * 2
        assert scores.tolist() == [[6, 3, 3, 3, 3]] * 2
    else:
        assert ids[:, 0].tolist() == [35_000] * 2


@cache
def many_sets() -> tuple[Problem, Any]:
    """Candidates of 700 queries at k = 2048 take thrice kSetBytes (csrc/topk_cpu.cpp)."""
    problem = Problem(gaussian(27, 700, 3), gaussian(28, 8300, 3), 2048)
    return problem, ranking(*problem)


@EVERY_KERNEL
@pytest.mark.parametrize("threads", [1, 3])  # which take blocks of queries, or share them
def test_several_sets_of_queries(backend: str, threads: int) -> None:
    problem, wanted = many_sets()
    assert_same(topk(*problem, backend=backend, threads=threads), wanted)


@cache
def many_stretches() -> tuple[Problem, Any]:
    """Codes of 8300 rows of 4090 columns take twice kStretchBytes (csrc/topk_cpu.cpp), and some."""
    generator = np.random.default_rng(29)
    bank = generator.integers(-8, 9, (8300, 4090), dtype=np.int8).astype(np.float16)
    queries = generator.integers(-8, 9, (2, 4090)).astype(np.float32)
    scores = queries @ bank.astype(np.float32).T  # exact: whole numbers below 2^24
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :9]
    return Problem(queries, bank, 9), (ids, np.take_along_axis(scores, ids, 1))


@EVERY_KERNEL
@pytest.mark.parametrize("threads", [1, 2])
def test_several_stretches_of_the_bank(backend: str, threads: int) -> None:
    problem, wanted = many_stretches()
    check(backend, *problem, wanted=wanted, threads=threads)


def test_several_stretches_of_a_packed_bank() -> None:
    """A stretch of packed rows is of 2^20 (kStretchRows)."""
    bank = np.arange(2**20 + 40, dtype=np.float32)[:, None] % 1_048_000
    packed = PackedBank.pack(bank, threads=2)
    queries = np.float32([[1], [-1], [0]])
    for threads in (1, 2):
        ids, _ = topk(queries, packed, 3, threads=threads, backend=FASTEST)
        high, low = [1_047_999, 1_047_998, 1_047_997], [0, 1_048_000, 1]
        assert ids.tolist() == [high, low, [0, 1, 2]]


@EVERY_BACKEND
@pytest.mark.parametrize("exact", [True, False])
def test_threads_change_nothing(backend: str, exact: bool) -> None:
    problem = Problem(gaussian(30, 600, 20), gaussian(31, 5000, 20), 70)
    wanted = topk(*problem, exact=exact, backend=backend, threads=1)
    for threads in (2, 3, 64) if backend in KERNELS else (2,):
        found = topk(*problem, exact=exact, backend=backend, threads=threads)
        assert_same(found, wanted)
    few = problem._replace(queries=problem.queries[:70])  # which threads share
    for threads in (1, 2, 5, 10**9):
        if backend in KERNELS:
            found = topk(*few, exact=exact, backend=backend, threads=threads)
            assert_same(found, (wanted[0][:70], wanted[1][:70]))


@EVERY_BACKEND
def test_position_in_a_block_changes_nothing(backend: str) -> None:
    queries, bank = gaussian(32, 300, 130), gaussian(33, 3000, 130)
    ids, scores = topk(queries, bank, 9, backend=backend)
    for row in range(0, 300, 37):
        alone = topk(queries[row : row + 1], bank, 9, backend=backend)
        assert_same(alone, (ids[row : row + 1], scores[row : row + 1]))


@EVERY_KERNEL
def test_wide_scores_without_rescoring_depend_on_nothing(backend: str) -> None:
    """Integer scores above 2^24, which floats round: no cut may lose the better of two."""
    generator = np.random.default_rng(34)
    bank = np.ones((4000, 4096), np.float16)
    bank[:, :64] += generator.integers(0, 3, (4000, 64)).astype(np.float16) / 64
    queries = np.ones((3, 4096), np.float32)
    wanted = topk(queries, bank, 40, exact=False, backend=backend, threads=1)
    assert (wanted[0] >= 0).all()
    for parts in (bank, [bank[:32], bank[32:]], [bank[:1984], bank[1984:]]):  # of whole groups
        for threads in (1, 2, 7):
            found = topk(queries, parts, 40, exact=False, backend=backend, threads=threads)
            assert_same(found, wanted)


@EVERY_BACKEND
def test_a_bank_in_parts(backend: str, tmp_path: Path) -> None:
    rows = gaussian(35, 2200, 70)
    rows[1800:] = rows[:400]  # ties between parts: the lower id first
    np.save(tmp_path / "part.npy", rows[100:700].astype(np.float16))
    parts = [
        rows[:100],
        np.load(tmp_path / "part.npy", mmap_mode="r"),
        torch.from_numpy(rows[700:1233]).bfloat16(),
        rows[:0],
        PackedBank.pack(rows[1233:1800]),
        PackedBank.pack(torch.from_numpy(rows[1800:1900]).bfloat16()),
        np.asfortranarray(rows[1900:]),
    ]
    for queries in (gaussian(36, 9, 70), rows[:40]):
        check(backend, queries, parts, 13)
    check(backend, rows[:20], parts, 2300, -1.0)
    check(backend, rows[:20], (rows,), 3)


@EVERY_BACKEND
def test_progress_over_parts(backend: str) -> None:
    queries, bank = gaussian(37, 400, 256), gaussian(38, 12_000, 256)
    reports: list[tuple[int, int]] = []
    parts = [bank[:5000], bank[5000:5000], bank[5000:]]
    topk(
        queries,
        parts,
        3,
        backend=backend,
        threads=1,
        progress=lambda *report: reports.append(report),
    )
    done = [done for done, _ in reports]
    assert {total for _, total in reports} <= {400 * 12_000}
    assert done == sorted(done)
    assert all(0 <= value <= 400 * 12_000 for value in done)
    if backend == "torch":  # the fast kernels may end before the first report is due
        assert done[-1] == 400 * 12_000


# --------------------------------------------------------------------------------------------------
# Data made to break it


def adversarial() -> dict[str, Callable[[], Problem]]:
    generator = np.random.default_rng(39)

    def normal(*shape: int) -> np.ndarray:
        return generator.standard_normal(shape, dtype=np.float32)

    def near_the_kth() -> Problem:
        queries, bank = normal(5, 128), normal(3000, 128)
        bank[300:2800] = queries[0] * (1 + 1e-7 * generator.standard_normal((2500, 1)))
        return Problem(queries, bank.astype(np.float32), 40)

    def one_ulp_apart() -> Problem:
        bank = np.full((4000, 33), 0.1, np.float32)
        steps = generator.integers(-3, 4, 4000, dtype=np.int32)
        bank[:, 5] = (np.full(4000, 0.1, np.float32).view(np.int32) + steps).view(np.float32)
        return Problem(np.full((33, 33), 0.3, np.float32), bank, 64)

    def one_cluster() -> Problem:
        centre = normal(1, 96)
        return Problem(centre + 1e-3 * normal(40, 96), centre + 1e-3 * normal(3000, 96), 10)

    def outlier_columns() -> Problem:
        queries, bank = normal(20, 200), normal(1500, 200)
        queries[:, [3, 77]] *= 1e4
        bank[:, [3, 150]] *= 3e4
        return Problem(queries, bank, 12)

    def one_column_only() -> Problem:
        bank = np.zeros((500, 300), np.float32)
        bank[np.arange(500), generator.integers(0, 300, 500)] = normal(500)
        return Problem(normal(20, 300), bank, 12)

    def wild_norms() -> Problem:
        bank = normal(900, 80) * 10.0 ** generator.uniform(-30, 8, (900, 1))
        queries = normal(40, 80) * 10.0 ** generator.uniform(-30, 8, (40, 1))
        return Problem(queries.astype(np.float32), bank.astype(np.float32), 500)

    def wild_columns() -> Problem:
        bank = normal(600, 80) * 10.0 ** generator.uniform(-30, 8, (600, 80))
        queries = normal(20, 80) * 10.0 ** generator.uniform(-30, 8, (20, 80))
        return Problem(queries.astype(np.float32), bank.astype(np.float32), 100)

    def largest_norms() -> Problem:
        bank = normal(300, 40)
        bank *= np.float32(1.8446e19) / np.linalg.norm(bank, axis=1, keepdims=True)
        bank[150:] = bank[0]
        bank[100:120] = -bank[0]
        return Problem(np.concatenate([bank[:3], normal(3, 40)]), bank, 60)

    def tiny_norms() -> Problem:
        return Problem(normal(5, 70) * np.float32(1e-17), normal(400, 70) * np.float32(1e-19), 30)

    def denormals() -> Problem:
        bank = generator.integers(0, 50, (300, 20)).astype(np.uint32).view(np.float32)
        return Problem(np.concatenate([bank[:9], normal(3, 20) * np.float32(1e9)]), bank, 20)

    def zeros() -> Problem:
        queries, bank = normal(6, 66), normal(500, 66)
        queries[::2], bank[::3] = 0, 0
        bank[::6] = -0.0
        return Problem(queries, bank, 300)

    def negative_scores() -> Problem:
        return Problem(abs(normal(9, 90)), -abs(normal(1200, 90)), 30)

    def equal_copies() -> Problem:
        queries, bank = normal(50, 77), normal(4000, 77)
        bank[13::331] = 3 * queries[0]
        return Problem(queries, bank, 20)

    def rising() -> Problem:
        """Every row is better than all before it."""
        line = np.linspace(0.1, 2, 4000, dtype=np.float32)[:, None]
        return Problem(abs(normal(3, 50)), line * np.ones((1, 50), np.float32), 30)

    def threshold_in_the_crowd() -> Problem:
        queries = normal(3, 128)
        bank = (queries[0] * (1 + 1e-6 * generator.standard_normal((3000, 1)))).astype(np.float32)
        middle = np.sort(scores_of(queries[0], bank))[1500]
        return Problem(queries, bank, 2000, float(middle))

    return {
        "near the k-th": near_the_kth,
        "one ulp apart": one_ulp_apart,
        "all equal": lambda: Problem(normal(40, 65), np.repeat(normal(1, 65), 3000, 0), 90),
        "one cluster": one_cluster,
        "outlier columns": outlier_columns,
        "one column only": one_column_only,
        "wild norms": wild_norms,
        "wild columns": wild_columns,
        "largest norms": largest_norms,
        "tiny norms": tiny_norms,
        "denormals": denormals,
        "zeros": zeros,
        "negative scores": negative_scores,
        "equal copies": equal_copies,
        "rising": rising,
        "threshold in the crowd": threshold_in_the_crowd,
    }


@cache
def adverse(name: str) -> tuple[Problem, Any]:
    problem = adversarial()[name]()
    return problem, ranking(*problem)


@EVERY_BACKEND
@pytest.mark.parametrize("name", adversarial())
def test_adversarial_data(backend: str, name: str) -> None:
    problem, wanted = adverse(name)
    check(backend, *problem, wanted=wanted)


@given(
    st.integers(1, 130),
    st.integers(1, 200),
    st.integers(-44, 18),
    st.integers(-44, 18),
    st.sampled_from([0.0, 1e-8, 1e-3, 1.0]),
    st.integers(0, 2**16),
    st.sampled_from(BACKENDS),
)
@settings(max_examples=examples(150), deadline=None)
@example(64, 100, 18, 18, 1.0, 0, "torch")
def test_any_scale_and_spread(
    columns: int, bank_rows: int, left: int, right: int, spread: float, seed: int, backend: str
) -> None:
    generator = np.random.default_rng(seed)
    with np.errstate(under="ignore"):
        centre = generator.standard_normal((1, columns))
        bank = centre + spread * generator.standard_normal((bank_rows, columns))
        bank = (bank * 10.0 ** (right - 1)).astype(np.float32)
        queries = (generator.standard_normal((4, columns)) * 10.0 ** (left - 1)).astype(np.float32)
    check(backend, queries, bank, 7)


# --------------------------------------------------------------------------------------------------
# The certificate


@cache
def signs() -> np.ndarray:
    """Of csrc/topk_cpu.cpp: xorshift32, [2, 4096]."""
    state, found = 0x9E3779B9, []
    for _ in range(2 * 4096):
        state ^= state << 13 & 0xFFFFFFFF
        state ^= state >> 17
        state ^= state << 5 & 0xFFFFFFFF
        found.append(-1.0 if state >> 16 & 1 else 1.0)
    return np.array(found).reshape(2, 4096)


def hadamard(rows: np.ndarray) -> np.ndarray:
    """The orthonormal transform, its own inverse, of the last axis."""
    size = rows.shape[-1]
    for half in 2 ** np.arange(size.bit_length() - 1):
        pairs = rows.reshape(-1, size // (2 * half), 2, half)
        rows = np.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], 2)
    return rows.reshape(-1, size) / np.sqrt(size)


def rotated(rows: np.ndarray, back: bool = False) -> np.ndarray:
    """R x of rows [., W], W a multiple of 64: what codes approximate. Or R^-1 x."""
    rows = rows.copy()
    width = rows.shape[1]
    size = 1 << (width.bit_length() - 1)
    turns = [(signs()[0], slice(0, size)), (signs()[1], slice(width - size, width))]
    for turn, part in turns[:1] if size == width else turns[:: -1 if back else 1]:
        if not back:
            rows *= turn[:width]
        rows[:, part] = hadamard(rows[:, part])
        if back:
            rows *= turn[:width]
    return rows


def padded(rows: np.ndarray) -> np.ndarray:
    return np.pad(rows.astype(np.float64), ((0, 0), (0, -rows.shape[1] % 64)))


class Codes(NamedTuple):
    """What a packed bank says of its rows, in fp64; each [M, ...]."""

    codes: np.ndarray
    scale: np.ndarray
    reach: np.ndarray
    doubt: np.ndarray
    residual: np.ndarray  # |R x - scale codes|, computed here


def codes_of(rows: np.ndarray, backend: str = FASTEST) -> Codes:
    bank = PackedBank.pack(rows, backend=backend)
    groups, steps = bank.arrays["codes"].shape[0], bank.arrays["codes"].shape[2]
    codes = bank.arrays["codes"].transpose(0, 1, 3, 2, 4).reshape(groups * 32, steps * 64)
    np.testing.assert_array_equal(codes.sum(1), bank.arrays["sums"].ravel())
    assert not codes[len(rows) :].any()
    facts = bank.arrays["groups"].astype(np.float64).repeat(32, axis=0)[: len(rows)]
    codes = codes[: len(rows)].astype(np.int64)
    scale, inverse, reach, doubt = facts.T
    np.testing.assert_allclose(scale * inverse, 1, rtol=2**-22)
    residual = rotated(padded(rows)) - scale[:, None] * codes
    return Codes(codes, scale, reach, doubt, np.linalg.norm(residual, axis=1))


def families(columns: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(columns)
    plain = generator.standard_normal((96, columns))
    return {
        "gaussian": plain,
        "cluster": plain[:1] + 1e-3 * plain,
        "heavy tails": generator.standard_t(1, (96, columns)).clip(-1e12, 1e12),
        "one column": np.eye(96, columns),
        "wild norms": plain * 10.0 ** generator.uniform(-30, 8, (96, 1)),
        "tiny": plain * 1e-20,
        "huge": plain * (1e18 / np.sqrt(columns)),
        "zeros": plain * (generator.random((96, 1)) < 0.5),
    }


@pytest.mark.parametrize("columns", [1, 63, 65, 192, 512, 1000, 4096])
def test_the_certificate_bounds_what_rounding_took(columns: int) -> None:
    for name, rows in families(columns).items():
        rows = rows.astype(np.float32)
        bank, queries = codes_of(rows), [codes_of(row[None]) for row in rows[::12]]
        norms = np.linalg.norm(rows.astype(np.float64), axis=1)
        lengths = np.linalg.norm(bank.codes, axis=1) * bank.scale
        tiny = (bank.codes == 0).all(1) & (bank.scale == 1)
        assert (bank.residual * (1 + 2**-16) <= bank.doubt).all(), name
        assert (lengths <= bank.reach).all(), name
        # Not loose: the worst rows of a group decide, and rounding takes at most half a unit.
        for first in range(0, len(rows), 32):
            group = slice(first, first + 32)
            worst = bank.residual[group].max()
            assert bank.doubt[first] <= worst * (1 + 2**-12) + norms[group].max() * (
                np.sqrt(columns) if tiny[group].all() else 2**-16
            )
            assert bank.reach[first] <= lengths[group].max() * (1 + 2**-12), name
        most = bank.scale * np.sqrt(bank.codes.shape[1]) / 2
        assert (tiny | (bank.residual <= most * 1.001 + 2**-16 * norms)).all(), name
        if name == "gaussian" and columns >= 192:
            assert (bank.doubt <= 0.02 * norms).all()

        exact = rows[::12].astype(np.float64) @ rows.astype(np.float64).T
        for query, norm, line in zip(queries, norms[::12], exact, strict=True):
            unit = query.scale[0] * bank.scale
            products = bank.codes @ query.codes[0]
            assert (np.abs(products) < 2**30).all()
            bound = query.doubt[0] * bank.reach + norm * bank.doubt + unit
            assert (np.abs(line - products * unit) <= bound).all(), name


def understated(columns: int, seed: int) -> tuple[np.ndarray, np.ndarray, float]:
    """`columns`: a multiple of 64. A row x, and a row y whose codes hold all of it and point where rounding moved x away from.

    <x, y> is higher than the product of their codes by nearly |x - x'| |y|, the whole bound.
    """
    x = gaussian(seed, 1, columns)
    codes = codes_of(x)
    lost = rotated(padded(x)) - codes.scale[0] * codes.codes
    whole = np.rint(lost * (127 / np.abs(lost).max()))
    y = rotated(whole, back=True).astype(np.float32)
    taken = float(codes.residual[0] * np.linalg.norm(y))
    return x, y, taken


@pytest.mark.parametrize("columns", [64, 192, 512])
@pytest.mark.parametrize("backend", INT8)
@pytest.mark.parametrize("seed", [40, 41, 42])
def test_rows_that_rounding_understates_are_found(backend: str, columns: int, seed: int) -> None:
    """By nearly the bound of the bank's rows, and by nearly that of the query's."""
    x, y, taken = understated(columns, seed)
    for query, row in ((y, x), (x, y)):
        exact = float(query[0].astype(np.float64) @ row[0].astype(np.float64))
        left, right = codes_of(query), codes_of(row)
        product = float(left.codes[0] @ right.codes[0]) * left.scale[0] * right.scale[0]
        assert exact - product > 0.98 * taken
        # Others have scores just below it, known before its turn comes.
        direction = query / np.float32((query.astype(np.float64) ** 2).sum())
        below = [np.float32(exact - taken * share) * direction for share in (1e-3, 2e-3, 3e-3)]
        for parts in ([np.concatenate(below), row], [row, np.concatenate(below)]):
            check(backend, query, parts, 1)
            check(backend, query, parts, 2)
        check(backend, query, row, 3, exact - 1e-3 * taken)


@pytest.mark.parametrize("columns", [1, 64, 100, 512, 4096])
def test_kernels_round_to_the_same_codes(columns: int) -> None:
    for rows in families(columns).values():
        rows = rows.astype(np.float32)
        banks = [PackedBank.pack(rows, backend=kernel, threads=1) for kernel in INT8]
        for bank in banks[1:]:
            for name, array in bank.arrays.items():
                np.testing.assert_array_equal(array.view("u1"), banks[0].arrays[name].view("u1"))


@pytest.mark.parametrize("columns", [30, 512])
def test_screens_alone_are_off_by_no_more_than_the_certificate(columns: int) -> None:
    queries, bank = gaussian(43, 40, columns), gaussian(44, 3000, columns)
    wanted = topk(queries, bank, 25, 0.5, exact=False, backend=INT8[0])
    for kernel in INT8[1:]:
        assert_same(topk(queries, bank, 25, 0.5, exact=False, backend=kernel), wanted)
    packed = PackedBank.pack(bank)
    assert_same(topk(queries, packed, 25, 0.5, exact=False, backend=INT8[0]), wanted)
    ids, scores = wanted
    rows = codes_of(bank)
    norms = np.linalg.norm(queries.astype(np.float64), axis=1)
    for query in range(len(queries)):
        own = codes_of(queries[query : query + 1])
        unit = own.scale[0] * rows.scale
        screened = (rows.codes @ own.codes[0] * unit).astype(np.float32)
        bound = own.doubt[0] * rows.reach + norms[query] * rows.doubt + unit
        found = ids[query][ids[query] >= 0]
        np.testing.assert_allclose(scores[query, : len(found)], screened[found], rtol=2**-22)
        error = np.abs(scores[query, : len(found)] - scores_of(queries[query], bank[found]))
        assert (error <= bound[found]).all()
        left = np.setdiff1d(np.arange(len(bank)), found)
        floor = scores[query, len(found) - 1] if len(found) == 25 else 0.5
        assert (screened[left] <= floor * (1 + 2**-20)).all()


# --------------------------------------------------------------------------------------------------
# Packed banks


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    return gaussian(45, 1111, 90)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_packed_bank_gives_the_same_answers(
    kernel: str, dtype: torch.dtype, rows: np.ndarray, tmp_path: Path
) -> None:
    bank = torch.from_numpy(rows).to(dtype)
    packed = PackedBank.pack(bank, backend=kernel)
    assert packed.rows is bank
    assert (packed.shape, len(packed), packed.dtype) == ((1111, 90), 1111, dtype)
    assert packed.nbytes < 2.2 * 1120 * 128
    assert "1111 x 90" in repr(packed)
    packed.save(tmp_path / "bank")
    loaded = PackedBank.load(tmp_path / "bank")
    assert loaded.precision == packed.precision
    for name, array in loaded.arrays.items():
        assert isinstance(array, np.memmap)
        np.testing.assert_array_equal(array, packed.arrays[name])
    wanted = ranking(rows[:40], bank, 12)
    for backend in ("auto", *BACKENDS):
        for one in (packed, loaded):
            assert_same(topk(rows[:40], one, 12, backend=backend), wanted)


def test_banks_of_numpy_memory_maps_and_strides_are_packed(
    rows: np.ndarray, tmp_path: Path
) -> None:
    np.save(tmp_path / "rows.npy", rows)
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    for number, bank in enumerate((mapped, rows[::-3, ::2], rows.T[:900], rows[:0], rows[:1])):
        packed = PackedBank.pack(bank, threads=1)
        wanted = ranking(rows[:5, : bank.shape[1]], bank, 6) if bank.shape[1] <= 90 else None
        again = PackedBank.load(packed.save(tmp_path / str(number)))
        np.testing.assert_array_equal(again.rows, bank)
        if wanted is not None:
            assert_same(topk(rows[:5, : bank.shape[1]], packed, 6), wanted)
            assert_same(topk(rows[:5, : bank.shape[1]], again, 6), wanted)


def test_saving_replaces_only_what_it_is_told_to(rows: np.ndarray, tmp_path: Path) -> None:
    folder = PackedBank.pack(rows).save(tmp_path / "deep" / "bank")
    with pytest.raises(OutputExistsError, match="exists; give overwrite=True"):
        PackedBank.pack(rows[:7]).save(folder)
    assert len(PackedBank.load(folder)) == 1111
    loaded = PackedBank.load(folder)
    PackedBank.pack(rows[:7]).save(folder, overwrite=True)
    assert len(PackedBank.load(folder)) == 7
    assert_same(topk(rows[:2], loaded, 3), ranking(rows[:2], rows, 3))  # its maps stay
    loaded.save(folder, overwrite=True)
    assert len(PackedBank.load(folder)) == 1111
    assert [path.name for path in folder.parent.iterdir()] == ["bank"]


def test_folders_that_hold_no_packed_bank(rows: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no complete packed bank"):
        PackedBank.load(tmp_path / "absent")

    def damaged(name: str, damage: Callable[[Path], Any]) -> Path:
        folder = PackedBank.pack(rows).save(tmp_path / name)
        damage(folder)
        return folder

    def format_of(number: int) -> Callable[[Path], Any]:
        text = f'{{"format": {number}, "dtype": "float32", "precision": "int8"}}'
        return lambda folder: (folder / "packed_bank.json").write_text(text)

    def store(name: str, array: np.ndarray) -> Callable[[Path], Any]:
        return lambda folder: np.save(folder / f"{name}.npy", array)

    for name, message, damage in (
        ("json", "no complete", lambda folder: (folder / "packed_bank.json").write_text("{")),
        ("list", "no complete", lambda folder: (folder / "packed_bank.json").write_text("[]")),
        (
            "bare",
            "no complete",
            lambda folder: (folder / "packed_bank.json").write_text('{"format": 1}'),
        ),
        ("codes", "no complete", lambda folder: (folder / "codes.npy").unlink()),
        ("cut", "no complete", lambda folder: (folder / "codes.npy").write_bytes(b"\x93NUMPY")),
        ("later", "packed in format 99; this version reads 1", format_of(99)),
        ("sums", r"packed bank's sums are int32 \(1, 32\)", store("sums", np.zeros((1, 32), "i4"))),
        ("groups", "groups are float64", store("groups", np.zeros((35, 4)))),
        ("fewer", "packed bank's codes are", store("rows", rows[:90])),
        ("flat", "rows", store("rows", rows.ravel())),
        ("wide", "rows", store("rows", rows.astype(np.float64))),
        ("half", "rows", store("rows", rows.astype(np.float16))),
    ):
        with pytest.raises(DataError, match=message):
            PackedBank.load(damaged(name, damage))


@pytest.fixture(scope="module")
def saved_banks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("banks")
    bank = np.random.default_rng(5).standard_normal((3000, 20), dtype=np.float32)
    return {
        kernel: PackedBank.pack(bank, backend=kernel).save(folder / kernel) for kernel in KERNELS
    }


@given(
    name=st.sampled_from(["codes", "groups", "groups", "sums", "rows"]),
    start=st.floats(0, 1, exclude_max=True),
    count=st.sampled_from([1, 4, 100, 10**6]),
    value=st.sampled_from([None, 0, 0x7F, 0x80, 0xFF]),
    header=st.sampled_from([False, False, False, True]),
    queries=st.sampled_from([1, 9, 300]),
    k=st.sampled_from([1, 3, 40, 5000]),
    threshold=st.none() | st.just(2.0),
    exact=st.booleans(),
    kernel=st.sampled_from(KERNELS),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=examples(80), deadline=None)
def test_any_bytes_of_a_packed_bank_are_survived(
    saved_banks: dict[str, Path],
    name: str,
    start: float,
    count: int,
    value: int | None,
    header: bool,
    queries: int,
    k: int,
    threshold: float | None,
    exact: bool,
    kernel: str,
    seed: int,
) -> None:
    """An error or other answers; its checksums are made to fit. `make sanitize` runs this as well.

    0x7f bytes are NaN in float32 and large codes, 0xff are NaN and -1, 0x80 are tiny, negative
    floats and the lowest codes; None: random bytes.
    """
    folder = saved_banks[kernel]
    path = folder / f"{name}.npy"
    facts = json.loads((folder / "packed_bank.json").read_text())
    whole = path.read_bytes()
    content = np.frombuffer(whole, np.uint8).copy()
    first, last = (0, 128) if header else (128, len(content))
    place = first + int(start * (last - first))
    random = np.random.default_rng(seed)
    end = min(place + count, last)
    content[place:end] = random.integers(0, 256, end - place) if value is None else value
    path.write_bytes(content.tobytes())
    fitting = {**facts["sha256"], name: hashlib.sha256(content.tobytes()).hexdigest()}
    (folder / "packed_bank.json").write_text(json.dumps({**facts, "sha256": fitting}))
    try:
        found, scores = topk(
            random.standard_normal((queries, 20), dtype=np.float32),
            PackedBank.load(folder), k, threshold, exact, kernel, threads=1 + seed % 2,
        )  # fmt: skip
    except PymcipError:
        return
    finally:
        path.write_bytes(whole)
        (folder / "packed_bank.json").write_text(json.dumps(facts))
    assert -1 <= found.min() <= found.max() < 3000
    assert not np.isnan(scores).any()
    assert (scores[:, :-1] >= scores[:, 1:]).all()


def test_what_cannot_be_packed(rows: np.ndarray) -> None:
    for bank, message in (
        (rows[0], r"shape \(90,\)"),
        (rows.astype(np.float64), "float64"),
        (rows.tolist(), "list"),
        (torch.from_numpy(rows).to("meta"), "bank"),
    ):
        with pytest.raises(ConfigError, match=message):
            PackedBank.pack(bank)
    for backend in ("torch", "faiss"):
        if backend in USABLE:
            with pytest.raises(BackendError, match="does not search packed banks"):
                PackedBank.pack(rows, backend=backend)
    for threads in (0, -1, 1.5, "2"):
        with pytest.raises(ConfigError, match="threads="):
            PackedBank.pack(rows, threads=threads)
    with pytest.raises(BackendError, match="cuda runs on cuda, not on cpu"):
        PackedBank.pack(rows, backend="cuda")
    with pytest.raises(
        ConfigError, match="precision='fp8' is not allowed; allowed: int8, bfloat16"
    ):
        PackedBank.pack(rows, precision="fp8")
    for backend, wrong in (("portable", "bfloat16"), ("amx_bf16", "int8")):
        if backend in KERNELS:
            with pytest.raises(ConfigError, match=rf"packs in .*, not in {wrong}; allowed: "):
                PackedBank.pack(rows, backend=backend, precision=wrong)


def test_a_packed_bank_is_moved(rows: np.ndarray) -> None:
    bank = rows[::-2]
    packed = PackedBank.pack(bank)
    assert packed.to("cpu") is packed
    again = packed.to("cpu", backend="portable", precision="int8")
    assert again is not packed
    assert (again.device.type, again.nbytes) == ("cpu", packed.nbytes)
    assert_same(topk(rows[:5], again, 4), ranking(rows[:5], bank, 4))
    for device in ("nowhere", 1.5, *(() if torch.cuda.is_available() else ("cuda",))):
        with pytest.raises(ConfigError, match=r"can't be used here .* allowed: cpu, or cuda"):
            packed.to(device)
    with pytest.raises(ConfigError, match="bank is Tensor"):
        packed.to("meta")


def test_packing_reports_progress_and_stops(rows: np.ndarray) -> None:
    bank = torch.ones(1, 64).expand(2_000_000, 64)
    reports: list[tuple[int, int]] = []

    def report(done: int, total: int) -> None:
        reports.append((done, total))
        raise StopSearchError

    with pytest.raises(StopSearchError):
        PackedBank.pack(bank, threads=1, progress=report)
    assert len(reports) == 1
    assert reports[0][1] == 2_000_000


# --------------------------------------------------------------------------------------------------
# What is refused


BAD = [(np.nan, "holds NaN"), (np.inf, "holds infinity"), (-np.inf, "holds infinity")]


@EVERY_BACKEND
@pytest.mark.parametrize(("value", "problem"), [*BAD, (3e38, "norm that overflows float32")])
def test_rows_that_cannot_be_ranked_are_named(backend: str, value: float, problem: str) -> None:
    good, bad = gaussian(46, 20_000, 6), gaussian(47, 20_000, 6)
    bad[17_001] = value
    with pytest.raises(DataError, match=rf"row 17001 of bank .*{problem}"):
        topk(good[:3], bad, 2, backend=backend)
    with pytest.raises(DataError, match=rf"row 17001 of queries .*{problem}"):
        topk(torch.from_numpy(bad), good[:3], 2, backend=backend)
    parts = [good[:17_000], PackedBank.pack(good[:0]), good[:3000], bad[17_000:]]
    with pytest.raises(DataError, match=rf"row 20001 of bank .*{problem}"):
        topk(good[:3], parts, 2, backend=backend)
    with pytest.raises(DataError, match=rf"row 1 of queries .*{problem}"):
        topk(bad[17_000:17_003], good[:0], 2, backend=backend)
    with pytest.raises(DataError, match=rf"row 17001 of bank .*{problem}"):
        PackedBank.pack(bad, backend=backend if backend in KERNELS else "auto")


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("value", "problem"), BAD)
def test_halves_that_cannot_be_ranked_are_named(
    backend: str, dtype: torch.dtype, value: float, problem: str
) -> None:
    bank = torch.zeros(100, 70, dtype=dtype)
    bank[64, 69] = value
    with pytest.raises(DataError, match=rf"row 64 of bank {problem}"):
        topk(torch.zeros(1, 70), bank, 2, backend=backend)


THREE = np.zeros((2, 3), np.float32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((THREE, np.zeros((2, 4), np.float32), 1), "3 columns .* 4"),
        ((THREE, [THREE, np.zeros((2, 4), np.float32)], 1), "3 columns .* 4"),
        ((np.zeros((2, 3)), THREE, 1), "holds float64; allowed"),
        ((THREE, np.zeros((2, 3), np.int8), 1), "holds int8; allowed"),
        ((THREE, torch.zeros(2, 3, dtype=torch.complex64), 1), "holds complex64; allowed"),
        ((np.zeros(3, np.float32), THREE, 1), r"shape \(3,\)"),
        ((np.zeros((2, 0), np.float32), np.zeros((2, 0), np.float32), 1), "D >= 1"),
        (([[1.0]], np.zeros((2, 1), np.float32), 1), "queries is list"),
        ((THREE, None, 1), "bank is NoneType"),
        ((THREE, [], 1), "empty list"),
        ((THREE, [[THREE]], 1), "bank is list"),
        ((np.zeros((2, 3), ">f4"), THREE, 1), "native byte order"),
        ((torch.zeros(2, 3).to_sparse(), THREE, 1), "dense"),
        ((THREE, torch.zeros(2, 3, device="meta"), 1), "dense"),
        ((THREE, THREE, 0), "k=0"),
        ((THREE, THREE, -3), "k=-3"),
        ((THREE, THREE, 1.5), "k=1.5"),
        ((THREE, THREE, None), "k=None"),
        ((THREE, THREE, 2**80), "k=1208925819614629174706176"),
        ((THREE, THREE, 1, np.nan), "threshold=nan"),
        ((THREE, THREE, 1, "high"), "threshold='high'"),
    ],
)
def test_wrong_arguments_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        topk(*arguments)


@pytest.mark.parametrize("threads", [0, -1, 1.5, "2", 2**70])
def test_wrong_numbers_of_threads_are_refused(threads: Any) -> None:
    with pytest.raises(ConfigError, match="threads="):
        topk(THREE, THREE, 1, threads=threads)


def test_wrong_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="backend='tpu' is not known; allowed: auto, "):
        topk(THREE, THREE, 1, backend="tpu")
    with pytest.raises(ConfigError, match="progress=3 is not allowed"):
        topk(THREE, THREE, 1, progress=3)


odd = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 300),
    st.integers(),
    st.floats(),
    st.text(max_size=3),
    st.just([]),
    st.just(THREE),
    st.just(THREE[:0]),
    st.just(torch.zeros(4, 3, dtype=torch.bfloat16)),
    st.just(THREE.astype(np.float64)),
    st.just(np.zeros((3, 0), np.float32)),
    st.just(PackedBank.pack(THREE)),
    st.lists(st.just(THREE[:, ::-1]), max_size=3),
)


@given(
    queries=st.just(THREE) | odd,
    bank=st.just(THREE) | odd,
    k=st.integers(1, 9) | st.none() | st.floats() | st.integers(-(2**70), 0) | st.text(max_size=2),
    threshold=st.none() | st.floats() | odd,
    exact=st.booleans(),
    backend=st.sampled_from(["auto", *USABLE, "", "cuda", "triton", "no"]),
    threads=st.none() | odd,
)
@settings(max_examples=examples(400), deadline=None)
def test_any_arguments_are_searched_or_refused(
    queries: Any, bank: Any, k: Any, threshold: Any, exact: bool, backend: str, threads: Any
) -> None:
    try:
        ids, scores = topk(queries, bank, k, threshold, exact, backend, threads=threads)
    except PymcipError:
        return
    assert ids.shape == scores.shape == (len(queries), k)


def matrix(rows: np.ndarray) -> tuple[int, str, int, int, int, int]:
    return (rows.ctypes.data, "float32", *rows.shape, rows.shape[1], 1)


def call(**changes: Any) -> Any:
    """_core.topk with its arguments as they should be, but for some."""
    ids, scores = np.empty((2, 2), np.int64), np.empty((2, 2), np.float32)
    arguments: dict[str, Any] = {
        "queries": matrix(THREE),
        "bank": [(matrix(THREE), None)],
        "k": 2,
        "threshold": 0.0,
        "exact": True,
        "threads": 1,
        "kernel": FASTEST,
        "ids": ids.ctypes.data,
        "scores": scores.ctypes.data,
        "progress": None,
    }
    arguments.update(changes)
    return _core.topk(**arguments), ids, scores


REFUSALS = (TypeError, ValueError, OverflowError)
NUMBERS = st.integers(-(2**80), -1) | st.integers(2**64, 2**80)


@given(
    place=st.integers(0, 5),
    value=NUMBERS | st.none() | st.text(max_size=5) | st.floats() | st.binary(max_size=3),
    which=st.sampled_from(["queries", "bank"]),
)
@settings(max_examples=examples(300), deadline=None)
@example(place=1, value="float64", which="queries")
@example(place=1, value="", which="bank")
@example(place=2, value=-1, which="queries")
@example(place=3, value=0, which="queries")
@example(place=3, value=4097, which="bank")
@example(place=3, value=4, which="bank")
@example(place=0, value=0, which="bank")
def test_the_binding_refuses_wrong_matrices(place: int, value: Any, which: str) -> None:
    if place in (4, 5) and isinstance(value, int) and -(2**63) <= value < 2**63:
        return  # any stride is a stride
    whole = list(matrix(THREE))
    whole[place] = value
    with pytest.raises(REFUSALS):
        call(**{which: tuple(whole) if which == "queries" else [(tuple(whole), None)]})


@pytest.mark.parametrize(
    "changes",
    [
        {"k": 0},
        {"k": -1},
        {"k": 2**63},
        {"k": "2"},
        {"k": 1.5},
        {"threshold": np.nan},
        {"threshold": "0"},
        {"threads": 2**40},
        {"threads": None},
        {"kernel": "sse9"},
        {"kernel": ""},
        {"kernel": None},
        {"ids": 0},
        {"scores": 0},
        {"ids": -1},
        {"ids": None},
        {"queries": ()},
        {"queries": matrix(THREE)[:5]},
        {"queries": (*matrix(THREE), 1)},
        {"queries": None},
        {"bank": None},
        {"bank": matrix(THREE)},
        {"bank": [matrix(THREE)]},
        {"bank": [(matrix(THREE), (1, 2))]},
        {"bank": [(matrix(THREE), (0, 0, 0))]},
        {"bank": [(matrix(THREE), ())]},
        {"bank": [(matrix(THREE), (None, None, None))]},
    ],
    ids=str,
)
def test_the_binding_refuses_wrong_arguments(changes: dict[str, Any]) -> None:
    with pytest.raises(REFUSALS):
        call(**changes)


def test_the_binding_takes_what_is_odd_but_right() -> None:
    for changes in ({"threads": -3}, {"threads": 2**31 - 1}, {"threshold": -np.inf}):
        unrankable, ids, _ = call(**changes)
        assert unrankable is None
        assert ids.tolist() == [[0, 1], [0, 1]]
    assert call(bank=[])[1].tolist() == [[-1, -1]] * 2
    assert call(queries=(0, "float32", 0, 3, 3, 1), ids=0, scores=0)[0] is None
    with pytest.raises(REFUSALS):
        _core.topk_pack((0, "float32", -1, 3, 3, 1), 0, 0, 0, 1, FASTEST)
    with pytest.raises(REFUSALS):
        _core.topk_pack(matrix(THREE), 0, 0, 0, 1, FASTEST)
    scores = np.zeros((2, 1), np.float32)
    for bad in (2, 2**40):
        ids = np.full((2, 1), bad)
        with pytest.raises(IndexError):
            _core.topk_scores(matrix(THREE), matrix(THREE), ids.ctypes.data, 1, scores.ctypes.data)


# --------------------------------------------------------------------------------------------------
# Progress, signals, the interpreter


class StopSearchError(Exception):
    pass


LONG = Problem(torch.ones(1, 256).expand(4096, 256), torch.ones(1, 256).expand(4_000_000, 256), 3)
SLOW = [name for name in ("portable", "torch", "faiss", FASTEST) if name in USABLE]


@pytest.mark.parametrize("backend", SLOW)
def test_progress_can_stop_the_search(backend: str) -> None:
    calls = []

    def stop(done: int, total: int) -> None:
        calls.append((done, total))
        raise StopSearchError

    queries, bank, k = LONG[:3]
    if backend not in KERNELS:  # rows that are all alike would have them score each
        queries, bank = gaussian(50, 1000, 256), gaussian(51, 20_000, 256)
    with pytest.raises(StopSearchError):
        topk(queries, bank, k, backend=backend, threads=1, progress=stop)
    assert len(calls) == 1
    assert 0 <= calls[0][0] <= calls[0][1] == len(queries) * len(bank)


@pytest.fixture
def alarm() -> Iterator[list[float]]:
    """Raises StopSearchError in 0.1 s, and notes when."""
    when: list[float] = []

    def handle(number: int, frame: object) -> None:
        when.append(time.monotonic())
        raise StopSearchError

    before = signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    yield when
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("threads", [1, 2])
@EVERY_KERNEL
def test_signals_interrupt_the_search(backend: str, threads: int, alarm: list[float]) -> None:
    start = time.monotonic()
    with pytest.raises(StopSearchError):
        topk(*LONG, backend=backend, threads=threads)
    assert time.monotonic() - start < 1.1
    assert len(alarm) == 1


def test_ctrl_c_interrupts_the_search(request: pytest.FixtureRequest) -> None:
    # A shell has its background jobs ignore SIGINT, and Python leaves it at that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    start = time.monotonic()
    timer = threading.Timer(0.1, signal.raise_signal, [signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        topk(*LONG, threads=2)
    assert time.monotonic() - start < 1.1
    timer.join()


def test_signals_interrupt_packing(alarm: list[float]) -> None:
    start = time.monotonic()
    with pytest.raises(StopSearchError):
        PackedBank.pack(torch.ones(1, 64).expand(4_000_000, 64), threads=1)
    assert time.monotonic() - start < 2


@EVERY_KERNEL
def test_other_threads_run_during_a_search(backend: str) -> None:
    ticks, calls = [], []
    over = threading.Event()

    def tick() -> None:
        while not over.wait(0.01):
            ticks.append(time.monotonic())

    def progress(done: int, total: int) -> None:
        calls.append(len(ticks))
        if len(calls) == 4:
            raise StopSearchError

    other = threading.Thread(target=tick)
    other.start()
    try:
        with pytest.raises(StopSearchError):
            topk(*LONG, backend=backend, threads=1, progress=progress)
    finally:
        over.set()
        other.join()
    assert (
        calls[-1] - calls[0] >= 8
    )  # three times a tenth of a second; one tick would do with the GIL


def test_searches_from_many_threads_at_once() -> None:
    queries, bank = gaussian(48, 60, 64), gaussian(49, 3000, 64)
    wanted = ranking(queries, bank, 5)
    found: list[Any] = []
    team = [
        threading.Thread(
            target=lambda kernel=kernel: found.append(topk(queries, bank, 5, backend=kernel))
        )
        for kernel in 2 * KERNELS
    ]
    for thread in team:
        thread.start()
    for thread in team:
        thread.join()
    assert len(found) == len(team)
    for one in found:
        assert_same(one, wanted)


# --------------------------------------------------------------------------------------------------
# On a GPU


@pytest.mark.gpu
@ON_GPU
@pytest.mark.parametrize(
    "backend", [row.name for row in backends("topk") if row.devices != ("cpu",)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_ranking_is_the_same(backend: str, dtype: torch.dtype) -> None:
    queries = torch.from_numpy(gaussian(52, 130, 768)).to("cuda", dtype)
    bank = torch.from_numpy(gaussian(53, 20_000, 768)).to(dtype)
    wanted = ranking(queries, bank, 10, 20.0)
    for where in (bank, bank.cuda(), [bank[:7000], bank[7000:].cuda()]):
        ids, scores = topk(queries, where, 10, 20.0, backend=backend)
        assert ids.is_cuda
        assert_same((ids.cpu(), scores.cpu()), wanted)
    ones = torch.ones(40_000, 3, device="cuda", dtype=dtype)
    assert topk(ones[:2], ones, 4, backend=backend)[0].tolist() == [[0, 1, 2, 3]] * 2


@pytest.mark.gpu
@ON_GPU
def test_cpu_back_ends_refuse_gpu_tensors() -> None:
    rows = torch.ones(2, 3, device="cuda")
    with pytest.raises(BackendError, match="runs on cpu, not on cuda"):
        topk(rows, rows, 1, backend=FASTEST)
    with pytest.raises(ConfigError, match="the bank is on cuda:0 and the queries are on cpu"):
        topk(rows.cpu(), rows, 1)
    with pytest.raises(BackendError, match="runs on cpu, not on cuda"):
        PackedBank.pack(rows, backend=FASTEST)
