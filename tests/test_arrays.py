"""What the ops share about matrices: rows in several parts, and checks."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from pymcip.errors import ConfigError, DataError
from pymcip.ops.arrays import (
    ChosenRows,
    MatrixParts,
    as_numpy,
    check_count,
    check_finite,
    check_matrix,
    device_of,
    dtype_name,
    to_fp32,
)

SIZES = (3, 0, 5, 1, 0)


def parts_and_whole(dtype: type = np.float16) -> tuple[list[np.ndarray], np.ndarray]:
    whole = np.random.default_rng(3).standard_normal((sum(SIZES), 4)).astype(dtype)
    return np.split(whole, np.cumsum(SIZES)[:-1]), whole


def test_parts_read_like_one_matrix() -> None:
    parts, whole = parts_and_whole()
    rows = MatrixParts(parts)
    assert len(rows) == 9
    assert rows.shape == whole.shape
    assert rows.dtype == whole.dtype
    assert rows.starts == [0, 3, 3, 8, 9, 9]
    for first in range(10):
        for last in range(first, 11):
            np.testing.assert_array_equal(rows[first:last], whole[first:last])
    np.testing.assert_array_equal(rows[-4:-1], whole[-4:-1])
    ids = np.array([8, 0, 3, 3, 2, 7])
    np.testing.assert_array_equal(rows[ids], whole[ids])
    assert rows[ids].dtype == whole.dtype
    assert rows[ids[:0]].shape == (0, 4)


def test_a_slice_of_one_part_is_a_view_and_rows_by_number_are_a_copy() -> None:
    parts, _ = parts_and_whole()
    rows = MatrixParts(parts)
    assert np.shares_memory(rows[4:7], parts[2])
    assert not np.shares_memory(rows[2:7], parts[2])
    assert not np.shares_memory(rows[np.array([4, 5])], parts[2])
    assert np.shares_memory(MatrixParts(parts[0])[:], parts[0])


def test_chosen_rows_read_those_alone_and_files_from_front_to_back() -> None:
    parts, whole = parts_and_whole()
    asked: list[tuple[int, list[int]]] = []

    class Counted(np.ndarray):
        def __getitem__(self, rows):  # type: ignore[no-untyped-def]
            if isinstance(rows, np.ndarray):
                asked.append((len(self), rows.tolist()))
            return np.asarray(self)[rows]

    matrix = MatrixParts([part.view(Counted) for part in parts])
    chosen = ChosenRows(ChosenRows(matrix, np.array([7, 1, 8, 2, 0, 4])), np.array([3, 0, 2, 1, 5]))
    assert asked == []
    assert (chosen.shape, chosen.dtype, len(chosen)) == ((5, 4), whole.dtype, 5)
    np.testing.assert_array_equal(chosen[1:4], whole[[7, 8, 1]])
    assert asked == [(3, [1]), (5, [4]), (1, [0])]
    np.testing.assert_array_equal(chosen[np.array([4, 0])], whole[[4, 2]])
    np.testing.assert_array_equal(ChosenRows(whole, np.array([7, 1]))[:], whole[[7, 1]])


def test_blocks_are_in_order_and_of_one_part_each() -> None:
    parts, whole = parts_and_whole()
    blocks = list(MatrixParts(parts).blocks(2))
    assert [(first, len(block)) for first, block in blocks] == [
        (0, 2), (2, 1), (3, 2), (5, 2), (7, 1), (8, 1),
    ]  # fmt: skip
    np.testing.assert_array_equal(np.concatenate([block for _, block in blocks]), whole)


def test_parts_may_be_memory_maps_and_tensors(tmp_path: Path) -> None:
    parts, whole = parts_and_whole()
    np.save(tmp_path / "part.npy", parts[2])
    mapped = np.load(tmp_path / "part.npy", mmap_mode="r")
    rows = MatrixParts([torch.from_numpy(parts[0]), parts[1], mapped, *parts[3:]])
    assert rows.dtype == np.float16
    ids = np.arange(8, -1, -1)
    np.testing.assert_array_equal(rows[ids], whole[ids])
    np.testing.assert_array_equal(rows[1:9], whole[1:9])


def test_parts_of_several_dtypes_are_read_as_float32() -> None:
    parts, whole = parts_and_whole()
    rows = MatrixParts([parts[0], parts[2].astype(np.float32), torch.from_numpy(parts[3])])
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows[np.arange(9)], whole.astype(np.float32))
    assert rows[0:2].dtype == rows[2:9].dtype == np.float32
    half = torch.from_numpy(parts[2]).bfloat16()
    assert MatrixParts(half).dtype == np.float32
    np.testing.assert_array_equal(MatrixParts(half)[:], half.float().numpy())


def test_what_is_no_row_is_refused() -> None:
    parts, _ = parts_and_whole()
    rows = MatrixParts(parts)
    with pytest.raises(IndexError, match="rows 0 to 9 are asked for, of 9"):
        rows[np.array([0, 9])]
    with pytest.raises(IndexError, match="-1"):
        rows[np.array([-1])]
    with pytest.raises(IndexError, match="a step of 1"):
        rows[::2]
    with pytest.raises(ConfigError, match=r"2 parts that are \[4, 5\] columns wide"):
        MatrixParts([parts[0], np.zeros((1, 5), np.float16)])
    with pytest.raises(ConfigError, match="0 parts"):
        MatrixParts([])


def test_kinds_of_arrays() -> None:
    tensor = torch.zeros(2, 3, dtype=torch.bfloat16)
    assert dtype_name(tensor) == "bfloat16"
    assert dtype_name(np.zeros((1, 1), np.float16)) == "float16"
    assert device_of(tensor) == device_of(np.zeros(1)) == torch.device("cpu")
    assert as_numpy(tensor).dtype == np.float32
    array = np.zeros((2, 3), np.float16)
    array.flags.writeable = False
    assert as_numpy(array) is array
    assert to_fp32(array, torch.device("cpu")).dtype == torch.float32


@pytest.mark.parametrize("count", [0, -1, 1 << 31, 2.0, "3", None])
def test_counts_are_refused(count: object) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"topk: k={count!r} is not allowed")):
        check_count("topk", "k", count)


def test_counts_are_taken() -> None:
    assert check_count("topk", "k", np.int64(7)) == 7


@pytest.mark.parametrize(
    ("matrix", "problem"),
    [
        ([[1.0]], "bank is list"),
        (np.zeros(3, np.float32), "has shape"),
        (np.zeros((3, 0), np.float32), "D >= 1"),
        (np.zeros((3, 2)), "holds float64"),
        (np.zeros((3, 2), ">f4"), "native byte order"),
        (torch.zeros(3, 2, device="meta"), "dense"),
    ],
)
def test_matrices_are_refused(matrix: object, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        check_matrix("ranks", "bank", matrix)


@pytest.mark.parametrize("tensor", [False, True])
def test_rows_that_cannot_be_ranked_are_named(tensor: bool) -> None:
    rows = np.ones((4, 4), np.float32)
    rows[1] = 2
    assert check_finite("topk", "bank", torch.from_numpy(rows) if tensor else rows) == 4
    assert check_finite("topk", "bank", rows[:0]) == 0
    for value, problem in ((np.nan, "NaN"), (np.inf, "infinity"), (1e30, "overflows")):
        rows[2, 3] = value
        with pytest.raises(DataError, match=f"topk: row 102 of bank .*{problem}"):
            check_finite("topk", "bank", torch.from_numpy(rows) if tensor else rows, 100)
