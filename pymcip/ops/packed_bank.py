"""A bank of rows, rounded to 8 bits (or to bfloat16) once, to be searched many times.

The form is that of csrc/topk.hpp: rows rotated (so that no column stands out) and rounded, 32 to a
scale, with bounds of what the rounding took away. A search screens it and scores the few rows that
matter from the rows themselves, which therefore stay with it.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import numpy as np
import torch

from pymcip.errors import BackendError, ConfigError, DataError, OutputExistsError
from pymcip.files import atomic_path, read_json, write_json

Array: TypeAlias = Any  # np.ndarray (memory maps too) or torch.Tensor
Progress: TypeAlias = Callable[[int, int], object]

FORMAT = 1  # of the saved folder and of the codes
GROUP, STEP, FACTS = 32, 64, 4  # kGroup, kStep, kGroupFacts of csrc/topk_kernel.hpp
PRECISIONS = {"int8": 1, "bfloat16": 2}  # bytes of a code
_ALIGNMENT = 64
_SAVE_ROWS = 1 << 16


class PackedBank:
    """Rows [M, D] and their rounded form, for `pymcip.ops.topk` on the CPU.

    Takes D bytes per row (rounded up to a multiple of 64) beside the rows, twice that in bfloat16.

    Attributes:
        rows: as given.
        precision: "int8" or "bfloat16".
    """

    def __init__(
        self,
        rows: Array,
        codes: np.ndarray,
        groups: np.ndarray,
        sums: np.ndarray,
        precision: str,
    ) -> None:
        """Use `PackedBank.pack` or `PackedBank.load`."""
        self.rows = rows
        self.precision = precision
        self._arrays = {"codes": codes, "groups": groups, "sums": sums}
        wanted = _shapes(rows.shape, precision)
        for name, array in self._arrays.items():
            shape, dtype = wanted[name]
            if array.shape != shape or array.dtype != dtype or not array.flags.c_contiguous:
                raise DataError(
                    f"the packed bank's {name} are {array.dtype} {array.shape}; its rows "
                    f"{tuple(rows.shape)} need {dtype} {shape}. Pack the bank again"
                )

    @classmethod
    def pack(
        cls,
        rows: Array,
        *,
        backend: str = "auto",
        threads: int | None = None,
        progress: Progress | None = None,
    ) -> PackedBank:
        """Pack a bank.

        rows: [M, D], NumPy (memory maps too) or torch on the CPU, float32, float16 or bfloat16, any
            strides; kept, not copied.
        backend: whose instruction set to use; see `pymcip.ops.explain("topk")`. The codes are the
            same whichever it is, 8 bits, but for "amx_bf16", which packs and searches bfloat16.
        threads: CPU threads; by default torch's number.
        progress: called with the rows packed and to pack, about ten times a second.

        Raises:
            ConfigError: shape, dtype or device are not allowed.
            DataError: a row holds NaN or infinity, or its squared norm overflows float32.
            BackendError: the back end can't run here, or doesn't take packed banks.
        """
        from pymcip import _core
        from pymcip.ops.dispatch import select
        from pymcip.ops.topk import check_count, check_matrix
        from pymcip.ops.topk_cpu import KERNELS, precision

        check_matrix("bank", rows)
        if isinstance(rows, torch.Tensor) and rows.device.type != "cpu":
            raise ConfigError(
                f"PackedBank: the bank is on {rows.device}; packed banks are searched by the CPU: "
                "move it with .cpu(), or give it to topk as it is"
            )
        if threads is not None:
            threads = check_count("PackedBank", "threads", threads)
        row = select("topk", backend, device="cpu", dtype=dtype_name(rows), dim=rows.shape[1])
        if row.name not in KERNELS:
            raise BackendError(
                f"PackedBank: backend={row.name!r} does not search packed banks, or does not take "
                f"D={rows.shape[1]}; allowed: auto, {', '.join(_core.topk_kernels())}, for D <= 4096"
            )
        arrays = {
            name: _aligned(shape, dtype)
            for name, (shape, dtype) in _shapes(rows.shape, precision(row.name)).items()
        }
        pointer, owner = matrix_pointer(rows)
        unrankable = _core.topk_pack(
            pointer,
            arrays["codes"].ctypes.data,
            arrays["groups"].ctypes.data,
            arrays["sums"].ctypes.data,
            threads or torch.get_num_threads(),
            row.name,
            progress,
        )
        del owner
        if unrankable is not None:
            raise_unrankable("bank", unrankable[1], rows[unrankable[1] : unrankable[1] + 1])
        return cls(rows, **arrays, precision=precision(row.name))

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write rows and codes into a folder (complete or absent), to be memory-mapped by `load`.

        Raises:
            OutputExistsError: the folder exists and `overwrite` is False.
        """
        folder = Path(folder)
        if folder.exists() and not overwrite:
            raise OutputExistsError(f"{folder} exists; give overwrite=True, or another folder")
        dtype = dtype_name(self.rows)
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            for name, array in self._arrays.items():
                np.save(temporary / f"{name}.npy", array)
            rows = np.lib.format.open_memmap(
                temporary / "rows.npy", mode="w+", dtype=_stored(dtype), shape=self.shape
            )
            for first in range(0, len(self), _SAVE_ROWS):
                rows[first : first + _SAVE_ROWS] = _bits(self.rows[first : first + _SAVE_ROWS])
            rows.flush()
            del rows
            facts = {"format": FORMAT, "dtype": dtype, "precision": self.precision}
            write_json(temporary / "packed_bank.json", facts)
        return folder

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> PackedBank:
        """Open a saved bank; its arrays are memory-mapped.

        Raises:
            DataError: the folder holds no packed bank, or one of another format.
        """
        folder = Path(folder)
        try:
            facts = read_json(folder / "packed_bank.json")
            if facts["format"] != FORMAT:
                raise DataError(
                    f"{folder} was packed in format {facts['format']}; this version reads {FORMAT}. "
                    "Pack the bank again"
                )
            arrays = {
                name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
                for name in ("rows", "codes", "groups", "sums")
            }
            rows: Array = arrays.pop("rows")
            dtype, precision = facts["dtype"], facts["precision"]
            if rows.ndim != 2 or rows.dtype != _stored(dtype) or precision not in PRECISIONS:
                raise ValueError(
                    f"its rows are {rows.dtype} {rows.shape}, not {dtype} in {precision}"
                )
        except DataError:
            raise
        except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
            raise DataError(
                f"{folder} holds no complete packed bank ({error}); write one with PackedBank.save"
            ) from error
        if dtype == "bfloat16":
            rows = _as_bfloat16(rows)
        return cls(rows, **arrays, precision=precision)

    @property
    def addresses(self) -> tuple[int, int, int]:
        """Of codes, groups and sums, for the extension; valid while this object lives."""
        codes, groups, sums = (array.ctypes.data for array in self._arrays.values())
        return codes, groups, sums

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.rows.shape
        return rows, columns

    @property
    def dtype(self) -> Any:
        """Of the rows."""
        return self.rows.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the packed form, without the rows."""
        return sum(array.nbytes for array in self._arrays.values())

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"PackedBank({len(self)} x {self.shape[1]}, {dtype_name(self.rows)} in {self.precision})"


def matrix_pointer(matrix: Array) -> tuple[tuple[int, str, int, int, int, int], Array]:
    """What the extension takes for a matrix, and the array that must outlive the call.

    Copied if strides or address are no multiples of an element's size.
    """
    rows, columns = matrix.shape
    if isinstance(matrix, torch.Tensor):
        address, strides = matrix.data_ptr(), matrix.stride()
    else:
        whole = all(stride % matrix.itemsize == 0 for stride in matrix.strides)
        if not (whole and matrix.flags.aligned):
            matrix = matrix.copy()
        address = matrix.ctypes.data
        strides = tuple(stride // matrix.itemsize for stride in matrix.strides)
    return (address, dtype_name(matrix), rows, columns, strides[0], strides[1]), matrix


def raise_unrankable(name: str, number: int, row: Array, op: str = "topk") -> NoReturn:
    """`row`: [1, D], the row `number` of the argument called `name`, or all of the argument."""
    values = row[0 if len(row) == 1 else number]
    if isinstance(values, torch.Tensor):
        values = values.float().cpu().numpy()
    if np.isnan(values).any():
        problem = "holds NaN"
    elif np.isinf(values).any():
        problem = "holds infinity"
    else:
        problem = "has a norm that overflows float32"
    raise DataError(
        f"{op}: row {number} of {name} {problem}; only finite rows can be ranked. Embed that item "
        "again, or drop the row"
    )


def _shapes(
    shape: tuple[int, int], precision: str
) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    rows, columns = shape
    groups, steps = -(-rows // GROUP), -(-columns // STEP) * PRECISIONS[precision]
    return {
        "codes": ((groups, 2, steps, GROUP // 2, STEP), np.dtype(np.int8)),
        "groups": ((groups, FACTS), np.dtype(np.float32)),
        "sums": ((groups, GROUP), np.dtype(np.int32)),
    }


def _aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """An array whose tiles don't straddle cache lines."""
    size = int(np.prod(shape)) * dtype.itemsize
    space = np.empty(size + _ALIGNMENT, dtype=np.uint8)
    start = -space.ctypes.data % _ALIGNMENT
    return space[start : start + size].view(dtype).reshape(shape)


def _stored(dtype: str) -> np.dtype[Any]:
    """What rows are in a file."""
    return np.dtype(np.uint16 if dtype == "bfloat16" else dtype)


def _bits(rows: Array) -> np.ndarray:
    """Rows as NumPy can store them: bfloat16 as uint16."""
    if isinstance(rows, torch.Tensor):
        rows = rows.detach()
        return rows.view(torch.uint16).numpy() if rows.dtype == torch.bfloat16 else rows.numpy()
    return rows.view(np.uint16) if dtype_name(rows) == "bfloat16" else rows


def _as_bfloat16(bits: np.ndarray) -> torch.Tensor:
    with warnings.catch_warnings():
        # torch warns about arrays that can't be written to; nothing here writes.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(bits).view(torch.bfloat16)


def dtype_name(matrix: Array) -> str:
    return str(matrix.dtype).removeprefix("torch.")
