"""Mining with an approximate index: recall as asked for and as measured."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pymcip
from pymcip.embedding import EmbeddingFolder
from pymcip.errors import (
    ConfigError,
    DataError,
    MissingDependencyError,
    StaleEmbeddingsError,
)
from pymcip.mining import (
    CaptionTable,
    mine,
    mine_table,
    search,
)
from pymcip.ops import ApproximateIndex
from tests.mining_cases import options, unit

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


@pytest.fixture(scope="module")
def built(large: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an index over these captions."""
    folder = tmp_path_factory.mktemp("built") / "index"
    ApproximateIndex.build(EmbeddingFolder(large).parts("text")).save(folder)
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
    large: Path, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named: dict[str, Any] = {"images": large, "threshold": 0.8, "k": 5, "recall": 0.9}
    whole = pymcip.mine_captions(**named, index=built, out=tmp_path / "whole")
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


def test_approximate_search_of_few_images(large: Path, built: Path) -> None:
    folder = EmbeddingFolder(large)
    images = folder.vectors("img")[:3]
    table, report = mine_table(
        [images], folder.parts("text"), k=5, threshold=0.8, recall=0.99, index=built
    )
    assert len(table) == 3
    assert report["approximate"]["recall_images"] == 1  # the others choose nprobe


def test_recall_without_anything_to_measure(
    large: Path, built: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One image of 600 has captions, and is not in the sample of the recall."""
    folder = EmbeddingFolder(large)
    captions = folder.parts("text")
    images = np.zeros((2000, 16), np.float16)
    images[0] = captions[0][0]
    with caplog.at_level(logging.WARNING):
        table, report = mine_table(
            [images], captions, k=1, threshold=0.99, recall=0.9, index=built, seed=3
        )
    assert table.ids.tolist() == [0]
    assert report["recall"] is None
    assert report["approximate"]["recall_interval"] == [0.0, 1.0]
    assert "recall can't be measured" in caplog.text


def test_approximate_search_refuses(
    large: Path,
    built: Path,
    embedded: EmbeddingFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ConfigError, match=r"recall=1\.5 is not allowed; it must be <= 1"):
        pymcip.mine_captions(images=large, out=tmp_path / "out", recall=1.5)
    with pytest.raises(ConfigError, match=r"give recall too, such as 0\.95"):
        pymcip.mine_captions(images=large, out=tmp_path / "out", index=tmp_path / "index")
    with pytest.raises(DataError, match="8 rows is too small to train an approximate index"):
        pymcip.mine_captions(**options(embedded, tmp_path, recall=0.9))
    named: dict[str, Any] = {"images": large, "threshold": 0.8, "recall": 0.9, "index": built}
    with pytest.raises(DataError, match="the index was built from another bank"):
        mine_table(
            [np.eye(3, 16, dtype=np.float16)],
            EmbeddingFolder(large).parts("text")[::-1],
            k=1,
            threshold=0.0,
            recall=0.9,
            index=built,
        )
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingDependencyError, match=r"faiss can't be imported.*pip install"):
        pymcip.mine_captions(**named, out=tmp_path / "other")
    assert not (tmp_path / "other").exists()
