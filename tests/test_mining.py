"""Mining: compared with a brute-force oracle; thresholds, resuming, files, bad input."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pymcip
from pymcip.data import Captions, load_captions, load_images
from pymcip.embedding import EmbeddingFolder, embed_captions, embed_images
from pymcip.errors import (
    ConfigError,
    DataError,
    MissingDependencyError,
    OutputExistsError,
    StaleEmbeddingsError,
)
from pymcip.mining import (
    CaptionTable,
    auto_threshold,
    blocks,
    images_per_block,
    mine,
    mine_table,
    search,
)
from pymcip.model import ClipModel, load
from tests.conftest import CAPTIONS

SHARED = Path(__file__).resolve().parents[2] / "shared"


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def clustered(seed: int, images: int, captions: int, dim: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Unit rows in which some captions lie near each image, and a few captions are equal."""
    generator = np.random.default_rng(seed)
    centres = generator.standard_normal((5, dim))
    rows = centres[generator.integers(0, 5, images + captions)]
    rows = unit(rows + 0.4 * generator.standard_normal(rows.shape))
    bank = rows[images:]
    bank[captions // 2] = bank[0]
    return rows[:images], bank


def oracle(
    images: np.ndarray, captions: np.ndarray, k: int, threshold: float
) -> list[tuple[list[int], np.ndarray]]:
    """Sort everything in fp64; equal rows have equal cosines, and lower ids come first."""
    cosines = images.astype(np.float64) @ captions.astype(np.float64).T
    result = []
    for row in cosines:
        order = np.lexsort((np.arange(len(row)), -row.round(6)))[:k]
        kept = [int(i) for i in order if row[i] >= threshold]
        result.append((kept, row[kept]))
    return result


def split(rows: np.ndarray, sizes: list[int]) -> list[np.ndarray]:
    return np.split(rows, np.cumsum(sizes))


def check_against_oracle(
    table: CaptionTable, images: np.ndarray, captions: np.ndarray, k: int, threshold: float
) -> None:
    assert table.indptr.dtype == table.ids.dtype == np.int64
    assert table.cosines.dtype == np.float32
    assert table.num_captions == len(captions)
    assert len(table) == len(images)
    for image, (ids, cosines) in enumerate(oracle(images, captions, k, threshold)):
        assert table[image][0].tolist() == ids
        np.testing.assert_allclose(table[image][1], cosines, atol=1e-5)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("k", [1, 4, 64])
def test_equals_the_oracle(k: int, backend: str) -> None:
    images, captions = clustered(0, 23, 41)
    table, _ = mine_table(
        split(images, [10, 0]), split(captions, [7, 20, 0]), k=k, threshold=0.9, backend=backend
    )
    check_against_oracle(table, images, captions, k, 0.9)
    assert 0 < len(table.ids) < 23 * min(k, 41)


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10_000),
    images=st.integers(1, 9),
    captions=st.integers(2, 25),
    cuts=st.lists(st.integers(0, 10), max_size=4),
    k=st.integers(1, 8),
    threshold=st.sampled_from([-1.0, 0.0, 0.4]),
)
def test_parts_and_blocks_do_not_matter(
    seed: int, images: int, captions: int, cuts: list[int], k: int, threshold: float
) -> None:
    rows, bank = clustered(seed, images, captions)
    if not any(ids for ids, _ in oracle(rows, bank, k, threshold)):
        return
    whole, report = mine_table([rows], [bank], k=k, threshold=threshold)
    parts, same_report = mine_table(
        split(rows, cuts[:1]), split(bank, cuts), k=k, threshold=threshold, block_rows=3
    )
    assert np.array_equal(whole.indptr, parts.indptr)
    assert np.array_equal(whole.ids, parts.ids)
    assert np.array_equal(whole.cosines, parts.cosines)
    assert report == same_report


def test_equal_captions_are_ordered_by_id_across_parts() -> None:
    images = unit(np.eye(1, 8))
    captions = unit(np.repeat(np.eye(1, 8), 7, axis=0))
    table, _ = mine_table([images], split(captions, [2, 3]), k=5, threshold=0.27)
    assert table.ids.tolist() == [0, 1, 2, 3, 4]
    assert table.cosines.tolist() == [1.0] * 5


def test_threshold_is_inclusive() -> None:
    images = unit(np.eye(1, 8))
    captions = np.zeros((3, 8), np.float16)
    captions[:, 0] = [0.25, 0.5, np.nextafter(np.float16(0.25), np.float16(0))]
    table, _ = mine_table([images], [captions], k=3, threshold=0.25)
    assert table.ids.tolist() == [1, 0]


def test_images_without_captions() -> None:
    images = unit(np.stack([np.eye(8)[0], np.eye(8)[1], np.eye(8)[0]]))
    captions = unit(np.stack([np.eye(8)[0], np.eye(8)[0] + 0.1, np.eye(8)[5]]))
    table, report = mine_table([images], [captions], k=2, threshold=0.9)
    assert table.counts().tolist() == [2, 0, 2]
    assert report["images_by_captions"] == [1, 0, 2]
    assert len(table[1][0]) == 0
    assert table[-1][0].tolist() == [0, 1]
    with pytest.raises(IndexError, match="image 3 is not in a table of 3 images"):
        table[3]


def test_report() -> None:
    images, captions = clustered(1, 30, 40)
    table, report = mine_table([images], [captions], k=3, threshold=0.6)
    assert (report["images"], report["captions"], report["k"]) == (30, 40, 3)
    assert (report["threshold"], report["threshold_from"]) == (0.6, "given")
    assert report["pairs"] == len(table.ids) == table.indptr[-1]
    assert report["captions_used"] == len(set(table.ids.tolist()))
    assert sum(report["images_by_captions"]) == 30
    assert sum(n * count for n, count in enumerate(report["images_by_captions"])) == report["pairs"]
    cosines = report["cosines"]
    assert cosines["lowest"] == table.cosines.min() >= 0.6
    assert sum(part["count"] for part in cosines["histogram"]) == report["pairs"]
    for part in cosines["histogram"]:
        inside = (table.cosines >= part["from"]) & (table.cosines < part["to"])
        assert part["count"] == inside.sum()
    json.dumps(report)


# Thresholds


def test_auto_threshold_of_known_distribution() -> None:
    """Random unit vectors that share a direction: cosines are near normal around a known mean."""
    generator = np.random.default_rng(0)
    dim, shared = 256, np.sqrt(0.15)
    common = generator.standard_normal(dim)
    common /= np.linalg.norm(common)

    def rows(count: int) -> np.ndarray:
        noise = generator.standard_normal((count, dim))
        noise -= noise @ common[:, None] * common
        noise /= np.linalg.norm(noise, axis=1, keepdims=True)
        return (shared * common + np.sqrt(1 - shared**2) * noise).astype(np.float16)

    images, captions = rows(2000), rows(3000)
    captions[:100] = images[:100]  # a few that match must not move it
    auto = auto_threshold(split(images, [500]), split(captions, [100, 2000]), seed=1)
    spread = 0.85 / np.sqrt(dim)
    assert auto.pairs == 1024 * 1024
    assert auto.median == pytest.approx(0.15, abs=0.003)
    assert auto.spread == pytest.approx(spread, rel=0.03)
    assert auto.value == pytest.approx(0.15 + 3.5 * spread, abs=0.01)
    assert auto.above < 1e-3
    assert auto == auto_threshold(split(images, [500]), split(captions, [100, 2000]), seed=1)
    assert auto != auto_threshold([images], [captions], seed=2)


def test_auto_threshold_is_used() -> None:
    generator = np.random.default_rng(3)
    images = unit(generator.standard_normal((50, 64)))
    captions = unit(generator.standard_normal((200, 64)))
    captions[:25] = unit(images[:25] + 0.05 * generator.standard_normal((25, 64)))
    table, report = mine_table([images], [captions], k=4, threshold="auto")
    assert report["threshold_from"] == "auto"
    assert report["threshold"] == report["random_pairs"]["value"]
    assert all(table[i][0][0] == i for i in range(25))
    assert table.counts()[25:].mean() < 0.2


def test_zero_captions_over_the_threshold() -> None:
    images, captions = clustered(0, 5, 6, dim=64)
    best = (images.astype(np.float64) @ captions.T.astype(np.float64)).max()
    with pytest.raises(DataError) as caught:
        mine_table([images], [captions], k=3, threshold=0.9999)
    message = str(caught.value)
    assert "no caption of any image has a cosine of 1.000 or more" in message
    assert f"the best among 5 images is {best:.3f}" in message
    assert "threshold='auto'" in message


def test_low_threshold_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    images, captions = clustered(0, 5, 6)
    with caplog.at_level(logging.WARNING):
        mine_table([images], [captions], k=3, threshold=-1.0)
    assert "not above the median cosine of random pairs" in caplog.text


# Tables on disk


def test_save_and_load(tmp_path: Path) -> None:
    images, captions = clustered(0, 12, 20)
    table, _ = mine_table([images], [captions], k=3, threshold=0.6)
    table.save(tmp_path)
    for path in (tmp_path, tmp_path / "caption_table.npz"):
        again = CaptionTable.load(path)
        assert np.array_equal(again.indptr, table.indptr)
        assert np.array_equal(again.ids, table.ids)
        assert np.array_equal(again.cosines, table.cosines)
        assert again.num_captions == 20
    rows = pyarrow.parquet.read_table(tmp_path / "caption_table.parquet").to_pylist()
    assert len(rows) == len(table.ids)
    for image in range(12):
        expected = [
            {"image": image, "caption": int(i), "cosine": float(c)}
            for i, c in zip(*table[image], strict=True)
        ]
        assert [row for row in rows if row["image"] == image] == expected


def test_broken_table(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"caption_table\.npz can't be read .*Mine it again"):
        CaptionTable.load(tmp_path)
    (tmp_path / "caption_table.npz").write_bytes(b"PK no")
    with pytest.raises(DataError, match="can't be read as a caption table"):
        CaptionTable.load(tmp_path)
    np.savez(tmp_path / "x.npz", indptr=[0, 5], ids=[1], cosines=[0.5], num_captions=9)
    with pytest.raises(DataError, match="don't fit together"):
        CaptionTable.load(tmp_path / "x.npz")


# The stage


@pytest.fixture
def embedded(
    tiny_clip: ClipModel, shards: Callable[..., list[Path]], tmp_path: Path
) -> EmbeddingFolder:
    """Embed twelve images and eight captions with the tiny model into one folder."""
    data = load_images(shards()[0].parent)
    embed_images(tiny_clip, data, tmp_path / "embedded", part_size=5)
    return embed_captions(tiny_clip, Captions(CAPTIONS), tmp_path / "embedded", part_size=3)


def options(embedded: EmbeddingFolder, tmp_path: Path, **changes: Any) -> dict[str, Any]:
    return {"images": embedded.path, "out": tmp_path / "out", "k": 3, "threshold": -1.0, **changes}


def test_stage(embedded: EmbeddingFolder, tmp_path: Path) -> None:
    result = pymcip.mine_captions(**options(embedded, tmp_path))
    images, captions = embedded.vectors("img"), embedded.vectors("text")
    check_against_oracle(result.table, images, captions, 3, -1.0)
    assert sorted(path.name for path in result.out.iterdir()) == [
        "caption_table.npz",
        "caption_table.parquet",
        "mine.json",
        "report.json",
        "sample.tsv",
    ]
    assert json.loads((result.out / "report.json").read_text()) == result.report
    lines = [line.split("\t") for line in (result.out / "sample.tsv").read_text().splitlines()]
    assert lines[0] == ["image", "label", "cosine", "caption"]
    assert len(lines) == 1 + 12 * 3
    ids, cosines = result.table[0]
    path = embedded.metadata("img")["image_path"][0].as_py()
    assert lines[1] == [path, "0", f"{cosines[0]:.4f}", CAPTIONS[ids[0]]]


def test_images_without_captions_are_in_the_sample(
    embedded: EmbeddingFolder, tmp_path: Path
) -> None:
    cosines = embedded.vectors("img").astype(np.float32) @ embedded.vectors("text").T
    threshold = float(np.median(cosines.max(axis=1)))
    result = pymcip.mine_captions(**options(embedded, tmp_path, threshold=threshold))
    assert 0 < result.report["images_by_captions"][0] < 12
    lines = [line.split("\t") for line in (result.out / "sample.tsv").read_text().splitlines()]
    assert sum(line[2:] == ["", ""] for line in lines) == result.report["images_by_captions"][0]


def test_captions_in_another_folder(
    tiny_clip: ClipModel, embedded: EmbeddingFolder, tmp_path: Path
) -> None:
    other = embed_captions(tiny_clip, Captions(CAPTIONS[:4]), tmp_path / "captions")
    result = pymcip.mine_captions(**options(embedded, tmp_path, captions=other.path))
    assert result.table.num_captions == 4


def stopping_topk(monkeypatch: pytest.MonkeyPatch, at: int) -> list[int]:
    """Interrupt the op in its call `at`; the list tells the images of each call."""
    calls: list[int] = []
    original = search.topk

    def stopping(queries: Any, *arguments: Any, **named: Any) -> Any:
        calls.append(len(queries))
        if len(calls) == at:
            raise KeyboardInterrupt
        return original(queries, *arguments, **named)

    monkeypatch.setattr(search, "topk", stopping)
    return calls


def test_interrupted_mining_goes_on(
    embedded: EmbeddingFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pymcip.mine_captions(**options(embedded, tmp_path, out=tmp_path / "whole"))
    monkeypatch.setattr(mine, "images_per_block", lambda *_: 2)
    calls = stopping_topk(monkeypatch, at=3)  # in the third block of images
    with pytest.raises(KeyboardInterrupt):
        pymcip.mine_captions(**options(embedded, tmp_path))
    assert len(list((tmp_path / "out" / "blocks").iterdir())) == 2
    assert not (tmp_path / "out" / "report.json").exists()
    monkeypatch.setattr(
        mine, "images_per_block", lambda *_: 5
    )  # of another machine: the run's rule
    result = pymcip.mine_captions(**options(embedded, tmp_path))
    assert calls[3:] == [2] * 4  # four images were done
    assert np.array_equal(result.table.ids, whole.table.ids)
    assert np.array_equal(result.table.cosines, whole.table.cosines)
    assert result.report == whole.report
    assert not (tmp_path / "out" / "blocks").exists()
    calls.clear()
    (tmp_path / "out" / "blocks").mkdir()  # as a kill after the report leaves it
    again = pymcip.mine_captions(**options(embedded, tmp_path))
    assert not calls
    assert not (tmp_path / "out" / "blocks").exists()
    assert again.report == result.report
    assert np.array_equal(again.table.ids, whole.table.ids)


def test_blocks_do_not_follow_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block reads all captions, so there are no more than needed, and all of one size."""
    images, captions = clustered(0, 23, 41)
    calls = stopping_topk(monkeypatch, at=0)
    mine_table(split(images, [1, 1, 0, 6, 7]), [captions], k=2, threshold=0.5, block_rows=10)
    assert calls == [7, 8, 8]
    calls.clear()
    mine_table(split(images, [1, 1]), split(captions, [5, 5]), k=2, threshold=0.5)
    assert calls == [23]


def test_blocks_are_one_pass_of_the_op() -> None:
    """Codes and candidates of a block stay below what the op takes at a time (40 MiB)."""
    cpu = torch.device("cpu")
    assert images_per_block(10, 512, cpu) == 14_848
    for k, columns in [(1, 1), (10, 512), (16, 768), (64, 1152), (2048, 4096)]:
        rows = images_per_block(k, columns, cpu)
        assert rows >= 32
        assert rows * (columns + 16 * max(128, 4 * k)) <= 40 << 20
    assert images_per_block(10, 512, torch.device("cuda")) == 131_072


def test_older_blocks_are_not_mixed_in(
    embedded: EmbeddingFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of version 0.1 had other names, another size, and cosines with other last bits."""
    whole = pymcip.mine_captions(**options(embedded, tmp_path, out=tmp_path / "whole"))
    monkeypatch.setattr(mine, "images_per_block", lambda *_: 5)
    stopping_topk(monkeypatch, at=2)
    with pytest.raises(KeyboardInterrupt):
        pymcip.mine_captions(**options(embedded, tmp_path))
    out = tmp_path / "out"
    stored = json.loads((out / "mine.json").read_text())
    assert stored.pop("block_rows") == 5
    assert stored.pop("recall") == 1
    (out / "mine.json").write_text(json.dumps(stored))
    wrong = {"ids": np.zeros((5, 3), np.int64), "cosines": np.ones((5, 3), np.float32)}
    np.savez(out / "blocks" / "block_000000.npz", **wrong)
    monkeypatch.setattr(mine, "images_per_block", lambda *_: 7)
    result = pymcip.mine_captions(**options(embedded, tmp_path))
    assert np.array_equal(result.table.ids, whole.table.ids)
    assert np.array_equal(result.table.cosines, whole.table.cosines)
    assert not (out / "blocks").exists()


def test_damaged_block(
    embedded: EmbeddingFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mine, "images_per_block", lambda *_: 6)
    stopping_topk(monkeypatch, at=2)
    with pytest.raises(KeyboardInterrupt):
        pymcip.mine_captions(**options(embedded, tmp_path))
    file = tmp_path / "out" / "blocks" / "images_0_6.npz"
    np.savez(file, ids=np.zeros((6, 2), np.int64), cosines=np.zeros((6, 2), np.float32))
    with pytest.raises(DataError, match=r"images_0_6\.npz is damaged: it holds \(6, 2\), not"):
        pymcip.mine_captions(**options(embedded, tmp_path))
    file.write_bytes(b"PK no")
    with pytest.raises(DataError, match=r"images_0_6\.npz is damaged.*mine again"):
        pymcip.mine_captions(**options(embedded, tmp_path))


class Bar:
    """Stands for tqdm's."""

    def __init__(self, **named: Any) -> None:
        self.named = named
        self.total, self.n = named["total"], named.get("initial", 0)
        self.places: list[float] = [self.n]

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, count: float) -> None:
        self.n += count
        self.places.append(self.n)


def test_bar_moves_within_blocks_and_goes_on(
    embedded: EmbeddingFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars: list[Bar] = []

    def new_bar(**named: Any) -> Bar:
        bars.append(Bar(**named))
        return bars[-1]

    original = search.topk

    def telling_topk(*arguments: Any, progress: Any, **named: Any) -> Any:
        progress(1, 4)
        progress(3, 4)
        if len(bars) == 1 and bars[0].n > 12 * 8 / 2:
            raise KeyboardInterrupt
        return original(*arguments, **named)

    monkeypatch.setattr(blocks, "progress", new_bar)
    monkeypatch.setattr(search, "topk", telling_topk)
    monkeypatch.setattr(mine, "images_per_block", lambda *_: 6)
    with pytest.raises(KeyboardInterrupt):
        pymcip.mine_captions(**options(embedded, tmp_path))
    pymcip.mine_captions(**options(embedded, tmp_path))
    first, second = bars
    assert (first.total, first.places) == (96, [0, 12, 36, 48, 60, 84])
    assert (second.total, second.places) == (96, [48, 60, 84, 96])


# Approximate search


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600 images and 10,500 captions in 300 clusters: the least that an index can be trained on."""
    pytest.importorskip("faiss")
    generator = np.random.default_rng(5)
    centres = generator.standard_normal((300, 16))
    folder = tmp_path_factory.mktemp("large")
    for kind, parts, count in (("img", 1, 600), ("text", 3, 3500)):
        (folder / f"{kind}_emb").mkdir()
        for part in range(parts):
            rows = centres[generator.integers(0, 300, count)]
            rows = unit(rows + 0.5 * generator.standard_normal(rows.shape))
            np.save(folder / f"{kind}_emb" / f"{kind}_emb_{part}.npy", rows)
    return folder


def found_share(table: CaptionTable, exact: CaptionTable) -> float:
    pairs = [
        {(image, int(caption)) for image in range(len(each)) for caption in each[image][0]}
        for each in (table, exact)
    ]
    return len(pairs[0] & pairs[1]) / len(pairs[1])


def test_approximate_search(
    large: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = pymcip.mine_captions(images=large, out=tmp_path / "exact", threshold=0.8, k=5)
    assert (exact.report["recall"], exact.report["approximate"]) == (1.0, None)
    named: dict[str, Any] = {
        "images": large, "threshold": 0.8, "k": 5, "recall": 0.9, "index": tmp_path / "index",
    }  # fmt: skip
    with caplog.at_level(logging.INFO):
        result = pymcip.mine_captions(**named, out=tmp_path / "out")
    report = result.report["approximate"]
    assert report["asked"] == 0.9
    assert 1 <= report["nprobe"] < report["lists"]
    assert result.report["recall"] == report["recall"] > 0.8
    low, high = report["recall_interval"]
    assert low < report["recall"] < high
    assert f"recall {report['recall']:.3f} (95 % interval" in caplog.text
    # 256 of 600 images were measured: five standard errors of a sample.
    share = found_share(result.table, exact.table)
    assert 0.5 < share < 1
    assert share == pytest.approx(report["recall"], abs=5 * report["recall_error"])
    exact_cosines = {
        (image, int(i)): c for image in range(600) for i, c in zip(*exact.table[image], strict=True)
    }
    for image in range(600):
        for caption, cosine in zip(*result.table[image], strict=True):
            assert exact_cosines.get((image, int(caption)), cosine) == cosine
    assert not (tmp_path / "out" / "blocks").exists()

    def no_build(*_: Any, **__: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(search.ApproximateIndex, "build", no_build)  # the folder is used again
    again = pymcip.mine_captions(**named, out=tmp_path / "again")
    assert np.array_equal(again.table.ids, result.table.ids)
    other = "another recall \\(0\\.9, now 1\\.0\\), index \\(.*index, now None\\); mine into"
    with pytest.raises(StaleEmbeddingsError, match=other):
        pymcip.mine_captions(images=large, out=tmp_path / "again", threshold=0.8, k=5)


def test_interrupted_approximate_search_goes_on(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named: dict[str, Any] = {"images": large, "threshold": 0.8, "k": 5, "recall": 0.9}
    whole = pymcip.mine_captions(**named, out=tmp_path / "whole")
    monkeypatch.setattr(mine, "images_per_block", lambda *_: 200)
    original = search.ApproximateIndex.search
    counts: list[int] = []

    def stopping(self: Any, queries: Any, *arguments: Any, **options: Any) -> Any:
        counts.append(len(queries))
        if len(counts) == 3:  # the sample is the first
            raise KeyboardInterrupt
        return original(self, queries, *arguments, **options)

    monkeypatch.setattr(search.ApproximateIndex, "search", stopping)
    with pytest.raises(KeyboardInterrupt):
        pymcip.mine_captions(**named, out=tmp_path / "out")
    result = pymcip.mine_captions(**named, out=tmp_path / "out")
    assert counts == [512, 200, 200, 200, 200]
    assert np.array_equal(result.table.ids, whole.table.ids)
    assert result.report == whole.report


def test_approximate_search_of_few_images(large: Path) -> None:
    folder = EmbeddingFolder(large)
    images = folder.vectors("img")[:3]
    table, report = mine_table([images], folder.parts("text"), k=5, threshold=0.8, recall=0.99)
    assert len(table) == 3
    assert report["approximate"]["recall_images"] == 1  # the others choose nprobe


def test_recall_without_anything_to_measure(large: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One image of 600 has captions, and is not in the sample of the recall."""
    folder = EmbeddingFolder(large)
    captions = folder.parts("text")
    images = np.zeros((2000, 16), np.float16)
    images[0] = captions[0][0]
    with caplog.at_level(logging.WARNING):
        table, report = mine_table([images], captions, k=1, threshold=0.99, recall=0.9, seed=3)
    assert table.ids.tolist() == [0]
    assert report["recall"] is None
    assert report["approximate"]["recall_interval"] == [0.0, 1.0]
    assert "recall can't be measured" in caplog.text


def test_approximate_search_refuses(
    large: Path, embedded: EmbeddingFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"recall=1\.5 is not a share; allowed: above 0"):
        pymcip.mine_captions(images=large, out=tmp_path / "out", recall=1.5)
    with pytest.raises(ConfigError, match=r"give recall too, such as 0\.95"):
        pymcip.mine_captions(images=large, out=tmp_path / "out", index=tmp_path / "index")
    with pytest.raises(DataError, match="8 rows is too small to train an approximate index"):
        pymcip.mine_captions(**options(embedded, tmp_path, recall=0.9))
    index = tmp_path / "index"
    named: dict[str, Any] = {"images": large, "threshold": 0.8, "recall": 0.9, "index": index}
    pymcip.mine_captions(**named, out=tmp_path / "whole")
    with pytest.raises(DataError, match="the index was built from another bank"):
        mine_table(
            [np.eye(3, 16, dtype=np.float16)],
            EmbeddingFolder(large).parts("text")[::-1],
            k=1,
            threshold=0.0,
            recall=0.9,
            index=index,
        )
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingDependencyError, match=r"faiss can't be imported.*pip install"):
        pymcip.mine_captions(**named, out=tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_stale_result_is_refused(
    tiny_clip: ClipModel, embedded: EmbeddingFolder, tmp_path: Path
) -> None:
    pymcip.mine_captions(**options(embedded, tmp_path))
    with pytest.raises(StaleEmbeddingsError, match=r"another k \(3, now 2\).*overwrite=True"):
        pymcip.mine_captions(**options(embedded, tmp_path, k=2))
    other = embed_captions(tiny_clip, Captions(CAPTIONS[:4]), tmp_path / "captions")
    with pytest.raises(StaleEmbeddingsError, match="another captions; mine into another folder"):
        pymcip.mine_captions(**options(embedded, tmp_path, captions=other.path))
    result = pymcip.mine_captions(**options(embedded, tmp_path, k=2, overwrite=True))
    assert result.report["k"] == 2


def test_foreign_folder_is_refused(embedded: EmbeddingFolder, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    with pytest.raises(OutputExistsError, match="not empty"):
        pymcip.mine_captions(**options(embedded, tmp_path))


def test_embeddings_without_metadata(tmp_path: Path) -> None:
    images, captions = clustered(0, 5, 6)
    for kind, rows in (("img", images), ("text", captions)):
        (tmp_path / "e" / f"{kind}_emb").mkdir(parents=True)
        np.save(tmp_path / "e" / f"{kind}_emb" / f"{kind}_emb_0.npy", rows)
    result = pymcip.mine_captions(images=tmp_path / "e", out=tmp_path / "out", threshold=0.5)
    check_against_oracle(result.table, images, captions, 10, 0.5)
    assert (result.out / "sample.tsv").read_text().splitlines()[1].startswith("0\t")


def test_bad_input(embedded: EmbeddingFolder, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"threshold=2\.0 is not a cosine"):
        pymcip.mine_captions(**options(embedded, tmp_path, threshold=2.0))
    with pytest.raises(DataError, match="no embedding folder"):
        pymcip.mine_captions(**options(embedded, tmp_path, images=tmp_path / "absent"))
    with pytest.raises(DataError, match=r"8 and 16 wide; .* with one model"):
        mine_table(embedded.parts("img"), [clustered(0, 1, 3)[1]], k=1, threshold=0.0)
    with pytest.raises(DataError, match="no embedded captions to mine"):
        mine_table(embedded.parts("img"), [np.empty((0, 16), np.float16)], k=1, threshold=0.0)
    with pytest.raises(DataError, match="no caption of any image"):
        pymcip.mine_captions(**options(embedded, tmp_path, threshold=1.0))


def test_incomplete_embeddings_are_refused(embedded: EmbeddingFolder, tmp_path: Path) -> None:
    (embedded.path / "text_metadata" / "metadata_2.parquet").unlink()
    with pytest.raises(DataError, match="holds 2 of 3 parts of captions"):
        pymcip.mine_captions(**options(embedded, tmp_path))


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real model and data at {SHARED}")
def test_real_photographs_get_fitting_captions(tmp_path: Path) -> None:
    """With a real model, apples and pears find captions about fruit rather than about dogs."""
    clip = load(f"local-dir:{SHARED / 'models' / 'lite0'}", device="cpu", precision="fp32")
    data = load_images(SHARED / "data" / "grocery" / "grocery-val-000000.tar")
    chosen = np.flatnonzero(np.isin(data.labels, [0, 1]))[:4]
    captions = load_captions(SHARED / "data" / "captions" / "wordnet-nouns.txt.gz")
    about = ["fruit", "apple", "dog", "church", "disease"]
    texts = [next(text for text in captions if text.startswith(f"{word}:")) for word in about]
    embed_images(clip, data.select(chosen), tmp_path)
    folder = embed_captions(clip, Captions(texts), tmp_path)
    table, _ = mine_table(folder.parts("img"), folder.parts("text"), k=2, threshold=-1.0)
    first_two = {about[caption] for image in range(len(table)) for caption in table[image][0]}
    assert first_two == {"fruit", "apple"}
