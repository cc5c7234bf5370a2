"""The approximate index: recall as reported against the test's own, exact scores, files, errors."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pymcip.errors import (
    BackendError,
    ConfigError,
    DataError,
    MissingDependencyError,
    OutputExistsError,
)
from pymcip.ops import PackedBank, approximate
from pymcip.ops.approximate import ApproximateIndex
from pymcip.ops.faiss_import import import_faiss, probe_faiss
from pymcip.ops.recall import ApproximateResult, estimate_recall, least_reaching, split_sample

pytestmark = pytest.mark.skipif(probe_faiss() is not None, reason="faiss is not installed")

K = 8


def canonical(queries: np.ndarray, bank: np.ndarray) -> np.ndarray:
    """The contract's score of every pair (D a multiple of 16): 16 lanes in fp64, halves added up."""
    products = queries.astype(np.float64)[:, None] * bank.astype(np.float64)[None]
    lanes = np.zeros((len(queries), len(bank), 16))
    for start in range(0, products.shape[2], 16):
        lanes += products[:, :, start : start + 16]
    for width in (8, 4, 2, 1):
        lanes = lanes[..., :width] + lanes[..., width : 2 * width]
    return lanes[..., 0].astype(np.float32) + np.float32(0)


def ranking(scores: np.ndarray, k: int, threshold: float = -np.inf) -> list[list[int]]:
    """Ids by score descending, then id ascending."""
    rows = [np.lexsort((np.arange(len(line)), -line))[:k] for line in scores]
    return [
        [int(i) for i in order if line[i] >= np.float32(threshold)]
        for order, line in zip(rows, scores, strict=True)
    ]


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class World:
    queries: np.ndarray
    bank: np.ndarray
    exact: np.ndarray
    index: ApproximateIndex


@pytest.fixture(scope="module")
def world() -> World:
    """12,000 clustered rows, some of them equal, as fp16; 40 queries, and every pair's score."""
    generator = np.random.default_rng(0)
    centres = generator.standard_normal((60, 16))
    chosen = generator.integers(0, 60, 12_040)
    rows = unit(centres[chosen] + 0.7 * generator.standard_normal((12_040, 16)))
    queries, bank = rows[:40], rows[40:].astype(np.float16)
    bank[5000:5100] = bank[17]
    index = ApproximateIndex.build(bank, lists=64, threads=1)
    return World(queries, bank, canonical(queries, bank), index)


def recall_of(result: ApproximateResult, exact: np.ndarray, threshold: float = -np.inf) -> float:
    due = ranking(exact, K, threshold)
    hits = [len(set(ids) & set(own)) for ids, own in zip(due, result.ids.tolist(), strict=True)]
    return sum(hits) / sum(map(len, due))


@pytest.mark.parametrize("threshold", [None, 0.8])
@pytest.mark.parametrize("nprobe", [1, 4, 64])
def test_recall_is_as_reported(world: World, nprobe: int, threshold: float | None) -> None:
    floor = -np.inf if threshold is None else threshold
    result = world.index.search(world.queries, world.bank, K, threshold, nprobe=nprobe, threads=1)
    assert result.recall == pytest.approx(recall_of(result, world.exact, floor), abs=1e-12)
    assert result.recall_interval == (result.recall, result.recall)  # all queries were sampled
    assert result.recall_queries == len(world.queries)
    assert (result.nprobe, result.candidates) == (nprobe, 30 * K)
    part = world.index.search(
        world.queries, world.bank, K, threshold, nprobe=nprobe, sample=20, threads=1
    )
    np.testing.assert_array_equal(part.ids, result.ids)
    low, high = part.recall_interval
    assert 0 <= low <= part.recall <= high <= 1
    assert low < high
    assert part.recall_queries == 20


def test_scores_are_canonical_and_ranked(world: World) -> None:
    result = world.index.search(world.queries, world.bank, K, 0.8, nprobe=2, threads=1)
    for ids, scores, exact in zip(result.ids, result.scores, world.exact, strict=True):
        count = int((ids >= 0).sum())
        np.testing.assert_array_equal(scores[:count], exact[ids[:count]])
        assert (scores[:count] >= np.float32(0.8)).all()
        assert (ids[count:] == -1).all()
        assert np.isneginf(scores[count:]).all()
        pairs = list(zip((-scores[:count]).tolist(), ids[:count].tolist(), strict=True))
        assert pairs == sorted(set(pairs))


def test_everything_is_found_where_everything_is_scored(world: World) -> None:
    """All lists, and as many candidates as rows: the exact answer, ties by lower id."""
    queries = np.concatenate([world.queries[:3], world.bank[17:18].astype(np.float32)])
    exact = canonical(queries, world.bank)
    result = world.index.search(queries, world.bank, K, nprobe=64, rerank=1500, threads=1)
    assert result.candidates == len(world.bank)
    assert result.ids.tolist() == ranking(exact, K)
    assert result.recall == 1
    assert result.ids[3].tolist() == [17, *range(5000, 5007)]


def test_nprobe_is_chosen_for_a_recall(world: World) -> None:
    results = [
        world.index.search(world.queries, world.bank, K, recall=target, threads=1)
        for target in (0.3, 0.97)
    ]
    assert results[0].nprobe < results[1].nprobe <= 64
    assert results[0].recall_queries == 20  # the other half served to choose
    assert recall_of(results[1], world.exact) > 0.9
    default = world.index.search(world.queries, world.bank, K, threads=1)
    assert results[0].nprobe < default.nprobe <= results[1].nprobe


def test_many_lists_are_found_by_a_graph(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(approximate, "GRAPH_LISTS", 64)
    ApproximateIndex.build(world.bank, lists=64, threads=1).save(tmp_path / "index")
    index = ApproximateIndex.load(tmp_path / "index")
    result = index.search(world.queries, world.bank, K, nprobe=16, threads=1)
    assert result.recall == pytest.approx(recall_of(result, world.exact), abs=1e-12)
    assert result.recall > 0.9


def test_a_recall_out_of_reach_is_told(world: World, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        result = world.index.search(world.queries, world.bank, 100, recall=1.0, rerank=1, threads=1)
    assert result.nprobe == 64
    assert result.recall < 1
    assert "a recall of 1.000 was asked for; the most that is found is" in caplog.text


def test_parts_and_kinds_of_banks(world: World, tmp_path: Path) -> None:
    """The same rows in whatever form: the same index, the same answer."""
    np.save(tmp_path / "part.npy", world.bank[7000:])
    mapped = np.load(tmp_path / "part.npy", mmap_mode="r")
    tensor = torch.from_numpy(world.bank[:7000])
    wide = np.zeros((7000, 32), np.float32)
    wide[:, ::2] = world.bank[:7000]
    forms: list[Any] = [
        [world.bank[:7000], mapped],
        [tensor, world.bank[:0], mapped],
        (wide[:, ::2], mapped),
        world.bank.astype(np.float32),
        torch.from_numpy(world.bank),
    ]
    with contextlib.suppress(BackendError):  # without the compiled core
        forms.append([PackedBank.pack(world.bank[:7000]), mapped])
    wanted = world.index.search(world.queries, world.bank, K, nprobe=3, threads=1)
    for bank in forms:
        found = world.index.search(world.queries, bank, K, nprobe=3, threads=1)
        np.testing.assert_array_equal(found.ids, wanted.ids)
        np.testing.assert_array_equal(found.scores, wanted.scores)
        assert found.recall == wanted.recall
    again = ApproximateIndex.build(forms[1], lists=64, threads=1)
    found = again.search(world.queries, world.bank, K, nprobe=3, threads=1)
    np.testing.assert_array_equal(found.ids, wanted.ids)


def test_kinds_of_queries(world: World) -> None:
    tensor = torch.from_numpy(world.queries).bfloat16()
    found = world.index.search(tensor[::2], world.bank, K, nprobe=64, threads=1)
    assert isinstance(found.ids, torch.Tensor)
    assert isinstance(found.scores, torch.Tensor)
    plain = tensor[::2].float().numpy()
    wanted = world.index.search(plain, world.bank, K, nprobe=64, threads=1)
    np.testing.assert_array_equal(found.ids.numpy(), wanted.ids)
    np.testing.assert_array_equal(found.scores.numpy(), wanted.scores)
    for recall in (None, 0.9):
        none = world.index.search(world.queries[:0], world.bank, K, recall=recall, threads=1)
        assert none.ids.shape == none.scores.shape == (0, K)
        assert math.isnan(none.recall)
    one = world.index.search(world.queries[:1], world.bank, K, recall=0.5, threads=1)
    assert one.recall >= 0.5


def test_a_threshold_that_admits_nothing(world: World) -> None:
    for options in ({"nprobe": 2}, {"recall": 0.9}):
        result = world.index.search(world.queries, world.bank, K, 1.5, threads=1, **options)
        assert (result.ids == -1).all()
        assert math.isnan(result.recall)
        assert result.recall_interval == (0, 1)


def test_saved_and_loaded(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "index"
    world.index.save(folder)
    world.index.save(folder)  # replaces an index
    wanted = world.index.search(world.queries, world.bank, K, nprobe=3, threads=1)
    loaded = ApproximateIndex.load(folder)
    assert (loaded.rows, loaded.columns, loaded.lists, loaded.code_bytes) == (12_000, 16, 64, 2)
    found = loaded.search(world.queries, world.bank, K, nprobe=3, threads=1)
    np.testing.assert_array_equal(found.ids, wanted.ids)
    np.testing.assert_array_equal(found.scores, wanted.scores)
    assert {path.name for path in tmp_path.iterdir()} == {"index"}
    assert {path.name for path in folder.iterdir()} == {"index.faiss", "index.json"}


def test_saving_replaces_nothing_else(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(OutputExistsError, match="give a new folder"):
        world.index.save(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "precious"

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(approximate, "write_json", full)
    with pytest.raises(OSError, match="no space"):
        world.index.save(tmp_path / "new")
    assert {path.name for path in tmp_path.iterdir()} == {"mine"}


def test_damaged_files_are_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Build it again"):
        ApproximateIndex.load(tmp_path / "absent")
    folder = tmp_path / "index"
    world.index.save(folder)
    content = (folder / "index.faiss").read_bytes()
    (folder / "index.faiss").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="can't be read as an approximate index"):
        ApproximateIndex.load(folder)
    (folder / "index.faiss").write_bytes(content)
    about = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(about | {"version": 99}))
    with pytest.raises(DataError, match="version is 99"):
        ApproximateIndex.load(folder)


def test_another_bank_is_refused(world: World) -> None:
    other = world.bank[::-1]
    for bank in (other, world.bank[1:], [world.bank, other]):
        with pytest.raises(DataError, match="another bank"):
            world.index.search(world.queries, bank, K)


def test_small_and_bad_banks_are_refused() -> None:
    rows = np.ones((9983, 4), np.float32)
    with pytest.raises(DataError, match=r"needs 9984 .* search it exactly"):
        ApproximateIndex.build(rows)
    generator = np.random.default_rng(1)
    rows = generator.standard_normal((10_000, 4), dtype=np.float32)
    rows[9876, 2] = np.nan
    with pytest.raises(DataError, match="row 9876 of the bank"):
        ApproximateIndex.build([rows[:7000], rows[7000:]], lists=4, threads=1)
    with pytest.raises(ConfigError, match="0 parts"):
        ApproximateIndex.build([])
    with pytest.raises(ConfigError, match="bank is str"):
        ApproximateIndex.build(["rows.npy"])
    with pytest.raises(ConfigError, match=r"\[4, 3\] columns wide"):
        ApproximateIndex.build([rows, rows[:, :3]])


def test_wrong_options_are_refused(world: World) -> None:
    with pytest.raises(ConfigError, match="lists=400 is not allowed; allowed: 1 to 307"):
        ApproximateIndex.build(world.bank, lists=400)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"recall": 0.9, "nprobe": 3}, "exclude each other"),
        ({"recall": 1.2}, "at most 1"),
        ({"nprobe": 65}, "1 to 64"),
        ({"rerank": 0}, "rerank=0 is not allowed; allowed: at least 1"),
        ({"sample": 0}, "sample=0 is not allowed; allowed: at least 1, or 0 with nprobe"),
        ({"sample": -1, "nprobe": 3}, "sample=-1 is not allowed; allowed: at least 0"),
        ({"population": 3}, "population=3 is not allowed; allowed: at least the"),
        ({"backend": "tpu"}, "backend='tpu'"),
    ]
    for options, message in wrong:
        with pytest.raises(ConfigError, match=message):
            world.index.search(world.queries, world.bank, K, **options)
    with pytest.raises(ConfigError, match="k=0"):
        world.index.search(world.queries, world.bank, 0)
    with pytest.raises(ConfigError, match="columns"):
        world.index.search(world.queries[:, :8], world.bank, K)


def test_recall_of_a_sample_of_more_queries(world: World) -> None:
    whole = world.index.search(world.queries, world.bank, K, nprobe=4, threads=1)
    part = world.index.search(world.queries, world.bank, K, nprobe=4, population=10**6, threads=1)
    np.testing.assert_array_equal(part.ids, whole.ids)
    assert part.recall == whole.recall
    assert (whole.recall_error, whole.recall_interval) == (0, (whole.recall,) * 2)
    assert part.recall_error > 0
    assert part.recall_interval[0] < part.recall < part.recall_interval[1]


def test_unmeasured_recall(world: World) -> None:
    whole = world.index.search(world.queries, world.bank, K, nprobe=4, threads=1)
    result = world.index.search(world.queries, world.bank, K, nprobe=4, sample=0, threads=1)
    np.testing.assert_array_equal(result.ids, whole.ids)
    np.testing.assert_array_equal(result.scores, whole.scores)
    assert np.isnan([result.recall, result.recall_error]).all()
    assert (result.recall_interval, result.recall_queries) == ((0.0, 1.0), 0)


def test_all_rows_equal() -> None:
    bank = np.ones((10_000, 16), np.float16)
    index = ApproximateIndex.build(bank, lists=8, threads=1)
    result = index.search(np.ones((2, 16), np.float32), bank, 3, nprobe=8, threads=1)
    assert (result.scores == 16).all()


def test_progress(world: World) -> None:
    faiss = import_faiss()
    before = faiss.omp_get_max_threads()
    reports: list[tuple[int, int]] = []
    threads = []

    def report(*values: int) -> None:
        reports.append(values)
        threads.append(faiss.omp_get_max_threads())

    ApproximateIndex.build(world.bank, lists=4, threads=1, progress=report)
    assert reports[0] == (0, 12_000)
    assert reports[-1] == (12_000, 12_000)
    assert faiss.omp_get_max_threads() == before
    for options in ({"nprobe": 3}, {"recall": 0.5}, {"nprobe": 3, "sample": 7}):
        reports.clear()
        threads.clear()
        world.index.search(world.queries, world.bank, K, threads=3, progress=report, **options)
        done = [done for done, _ in reports]
        assert done == sorted(done)
        assert len({total for _, total in reports}) == 1
        assert reports[-1][0] == reports[-1][1]
        assert set(threads) == {before}


def test_without_faiss(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world.index.save(tmp_path / "index")
    monkeypatch.setitem(sys.modules, "faiss", None)
    for call in (
        lambda: ApproximateIndex.build(world.bank),
        lambda: ApproximateIndex.load(tmp_path / "index"),
    ):
        with pytest.raises(MissingDependencyError, match=r'pip install "pymcip\[faiss\]"'):
            call()


def test_estimate_covers_the_truth() -> None:
    """Of many samples' 95 % intervals about 95 % hold the recall of all queries."""
    generator = np.random.default_rng(2)
    due = generator.integers(0, 11, 4000)
    hits = generator.binomial(due, generator.beta(8, 1, 4000))
    truth = hits.sum() / due.sum()
    inside = 0
    for _ in range(400):
        chosen = generator.choice(4000, 100, replace=False)
        share, error, (low, high) = estimate_recall(hits[chosen], due[chosen], 4000)
        inside += low <= truth <= high
        assert low <= share <= high
        assert 0 < error < 0.1
    assert 370 <= inside <= 395  # 380 expected, 4.4 its deviation
    share, error, (low, high) = estimate_recall(np.full(50, 3), np.full(50, 3), 4000)
    assert (share, error, high) == (1, 0, 1)
    assert 0.9 < low < 0.95  # all found of 50 queries: Wilson's interval of 50 trials


@pytest.mark.parametrize("needed", [1, 2, 3, 17, 64, 99, 100])
def test_the_least_effort_that_reaches_a_recall(needed: int) -> None:
    found, share = least_reaching(lambda effort: effort / 100, 100, needed / 100)
    assert needed <= found <= needed + max(1, needed // 8)
    assert share == found / 100
    assert least_reaching(lambda effort: 0.5, needed, 0.6) == (needed, 0.5)


def test_samples_are_apart() -> None:
    measured, tuned = split_sample(100, 30, True, 0)
    assert (len(measured), len(tuned)) == (30, 30)
    assert not set(measured) & set(tuned)
    assert [len(part) for part in split_sample(100, 30, False, 0)] == [30, 0]
    assert [len(part) for part in split_sample(41, 40, True, 0)] == [20, 21]
    assert [part.tolist() for part in split_sample(1, 40, True, 0)] == [[0], [0]]
