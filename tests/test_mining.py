"""Mining in memory: compared with a brute-force oracle; thresholds, tables on disk."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pymcip.errors import (
    DataError,
)
from pymcip.mining import (
    CaptionTable,
    auto_threshold,
    mine_table,
)
from tests.mining_cases import check_against_oracle, clustered, oracle, split, unit


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
    with pytest.raises(DataError, match=r"caption_table\.npz can't be read: .*Mine it again"):
        CaptionTable.load(tmp_path)
    (tmp_path / "caption_table.npz").write_bytes(b"PK no")
    with pytest.raises(DataError, match=r"caption_table\.npz is damaged: .*Mine it again"):
        CaptionTable.load(tmp_path)
    np.savez(
        tmp_path / "x.npz",
        indptr=[0, 5],
        ids=[1],
        cosines=np.array([0.5], np.float32),
        num_captions=9,
    )
    with pytest.raises(DataError, match="don't fit together"):
        CaptionTable.load(tmp_path / "x.npz")
