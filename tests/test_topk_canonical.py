"""The canonical score against its definition, in plain Python."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pymcip.ops import canonical


def defined(query: np.ndarray, row: np.ndarray) -> np.float32:
    lanes = [0.0] * 16
    for place, (left, right) in enumerate(zip(query, row, strict=True)):
        lanes[place % 16] += float(left) * float(right)
    for width in (8, 4, 2, 1):
        for lane in range(width):
            lanes[lane] += lanes[lane + width]
    return np.float32(lanes[0]) + np.float32(0)


def same_bits(found: Any, wanted: np.ndarray) -> bool:
    found = found.numpy() if isinstance(found, torch.Tensor) else found
    return found.dtype == np.float32 and np.array_equal(found.view("i4"), wanted.view("i4"))


@pytest.mark.parametrize("columns", [1, 3, 15, 16, 17, 100])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("block", [1 << 25, 3000])  # bytes
def test_scores_have_the_bits_of_the_definition(
    columns: int, dtype: Any, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(canonical, "_BYTES", block)
    generator = np.random.default_rng(columns)
    queries = generator.standard_normal((5, columns)).astype(dtype)
    bank = generator.standard_normal((9, columns)).astype(dtype)
    bank[3] = 0
    ids = generator.integers(-1, 9, (5, 7))
    matrix = np.array([[defined(query, row) for row in bank] for query in queries])
    wanted = np.take_along_axis(matrix, np.maximum(ids, 0), 1)
    wanted[ids < 0] = -np.inf
    for left in (queries, torch.from_numpy(queries)):
        for right in (bank, np.asfortranarray(bank), torch.from_numpy(bank)):
            assert same_bits(canonical.canonical_matrix(left, right), matrix)
            for places in (ids, torch.from_numpy(ids)):
                scores = canonical.canonical_scores(left, right, places)
                assert type(scores) is type(left)
                assert same_bits(scores, wanted)


def test_bfloat16_is_widened() -> None:
    queries = torch.linspace(-1, 1, 40).view(2, 20).bfloat16()
    wide = queries.float().numpy()
    assert same_bits(
        canonical.canonical_matrix(queries, queries), canonical.canonical_matrix(wide, wide)
    )


def test_no_rows() -> None:
    queries = np.ones((2, 3), np.float32)
    none = np.full((2, 4), -1)
    for left in (queries, torch.from_numpy(queries)):
        assert canonical.canonical_scores(left, queries[:0], none).tolist() == [[-np.inf] * 4] * 2
        assert canonical.canonical_scores(left[:0], queries, none[:0]).shape == (0, 4)
        assert canonical.canonical_matrix(left, queries[:0]).shape == (2, 0)
