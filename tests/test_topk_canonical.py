"""The canonical score against its definition, in plain Python."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pymcip import _core
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
@pytest.mark.parametrize("compiled", [True, False])
def test_scores_have_the_bits_of_the_definition(
    columns: int, dtype: Any, block: int, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(canonical, "BLOCK_BYTES", block)
    if compiled:
        assert canonical.extension(np.ones((1, columns)), torch.ones(1, columns)) is _core
    else:
        monkeypatch.setattr(canonical, "extension", lambda *_: None)
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
    rows, places = np.nonzero(ids >= 0)
    for right in (bank, np.asfortranarray(bank), torch.from_numpy(bank)):
        scores = canonical.canonical_pairs(
            torch.from_numpy(queries),
            right,
            torch.from_numpy(rows),
            torch.from_numpy(ids[rows, places]),
        )
        assert same_bits(scores, wanted[rows, places])


def test_more_columns_than_the_extension_takes() -> None:
    queries = np.random.default_rng(0).standard_normal((2, 4097)).astype(np.float32)
    assert canonical.extension(queries, queries) is None
    scores = canonical.canonical_scores(queries, queries, np.array([[1], [0]]))
    assert same_bits(scores, np.array([[defined(*queries)]] * 2))


def test_unit_rows_are_divided_by_norms_in_the_order_of_the_score(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = np.random.default_rng(1).standard_normal((7, 50)).astype(np.float32)
    rows[2] = 0
    wide = rows.astype(np.float64)
    wanted = rows.copy()
    for number in range(7):
        lanes = [0.0] * 16
        for place, value in enumerate(wide[number].tolist()):
            lanes[place % 16] += value * value
        for width in (8, 4, 2, 1):
            lanes = [lanes[lane] + lanes[lane + width] for lane in range(width)]
        if number != 2:
            wanted[number] = (wide[number] / np.sqrt(lanes[0])).astype(np.float32)
    for block in (1 << 24, 1000):
        monkeypatch.setattr(canonical, "BLOCK_BYTES", block)
        assert same_bits(canonical.canonical_unit(torch.from_numpy(rows)), wanted)


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
