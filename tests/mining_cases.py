"""Embeddings to mine, the options of a small run, and a brute-force oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pymcip.embedding import EmbeddingFolder
from pymcip.mining import (
    CaptionTable,
)


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


def options(embedded: EmbeddingFolder, tmp_path: Path, **changes: Any) -> dict[str, Any]:
    return {"images": embedded.path, "out": tmp_path / "out", "k": 3, "threshold": -1.0, **changes}
