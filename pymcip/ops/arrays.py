"""Matrices as the ops take them: what is accepted, what is refused, and rows in several parts.

A matrix is a NumPy array, a memory map or a torch tensor [rows, columns] of float32, float16 or
bfloat16, with any strides. Nothing here depends on an op.
"""

from __future__ import annotations

import contextlib
import hashlib
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from pymcip.errors import ConfigError, DataError
from pymcip.files import read_system_file

Array: TypeAlias = Any  # np.ndarray (memory maps too) or torch.Tensor
Progress: TypeAlias = Callable[[int, int], object]  # called with the work done and the work to do

_CHECKED_ROWS = 16384  # at a time


class MatrixParts:
    """One matrix [M, D] whose rows lie in several arrays, such as the files of an embedding folder.

    The rows of the first part are numbered 0, 1, …, those of the second follow. Rows are read as
    NumPy arrays of `dtype`, whatever the parts are; only what is asked for is read.

    Attributes:
        parts: the arrays as given, [m, D] each; some may be empty.
        starts: the number of each part's first row, and M: one entry more than parts.

    Raises:
        ConfigError: there is no part, or parts differ in width.
    """

    def __init__(self, parts: Array | Sequence[Array]) -> None:
        self.parts: list[Array] = list(parts) if isinstance(parts, (list, tuple)) else [parts]
        widths = list(dict.fromkeys(int(part.shape[1]) for part in self.parts))
        if len(widths) != 1:
            raise ConfigError(
                f"a matrix is given as {len(self.parts)} parts that are {widths} columns "
                "wide; allowed: at least one part, all of one width"
            )
        self.starts: list[int] = np.cumsum([0, *map(len, self.parts)]).tolist()
        self._columns = widths[0]

    @property
    def shape(self) -> tuple[int, int]:
        """M and D."""
        return self.starts[-1], self._columns

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype in which rows are read.

        It is that of the parts; float32 if they differ, or are tensors of bfloat16.
        """
        kinds = {as_numpy(part[:0]).dtype for part in self.parts}
        return kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """Read a slice of rows (of step 1), or rows by their numbers.

        Args:
            rows: a slice, of which a view is returned where one NumPy part holds it; or integers
                [n] in any order, possibly repeated, of which a copy is returned in that order.

        Raises:
            IndexError: a number is not that of a row.
        """
        if isinstance(rows, slice):
            first, last, step = rows.indices(len(self))
            if step != 1:
                message = f"rows {rows} are asked for; allowed: a step of 1, or an array of numbers"
                raise IndexError(message)
            pieces = self.pieces(first, last)
            if len(pieces) == 1:
                return as_numpy(pieces[0]).astype(self.dtype, copy=False)
            return np.concatenate([as_numpy(piece).astype(self.dtype) for piece in pieces])
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self):
            message = f"rows {rows.min()} to {rows.max()} are asked for, of {len(self)}"
            raise IndexError(message)
        taken = np.empty((len(rows), self._columns), dtype=self.dtype)
        order = np.argsort(rows, kind="stable")  # so that files are read from front to back
        bounds = np.searchsorted(rows, self.starts, sorter=order)
        for part, start, places in zip(
            self.parts, self.starts, np.split(order, bounds[1:-1]), strict=False
        ):
            if len(places):
                taken[places] = as_numpy(part[rows[places] - start])
        return taken

    def pieces(self, first: int, last: int) -> list[Array]:
        """Return rows `first` to `last` - 1 as views of the parts that hold them; one at least."""
        return [
            part[max(0, first - start) : last - start]
            for start, part in zip(self.starts, self.parts, strict=False)
            if start < last and start + len(part) > first
        ] or [self.parts[0][:0]]

    def blocks(self, rows: int) -> Iterator[tuple[int, np.ndarray]]:
        """Read all rows in order, at most `rows` at a time; each block comes with its first row.

        No block holds rows of two parts, so that none is copied together.
        """
        for start, part in zip(self.starts, self.parts, strict=False):
            for first in range(0, len(part), rows):
                yield start + first, as_numpy(part[first : first + rows])

    def fingerprint(self) -> str:
        """SHA-256 of 64 of the rows, by which the matrix is recognised."""
        ids = np.linspace(0, len(self) - 1, min(len(self), 64)).astype(np.int64)
        return hashlib.sha256(dense_fp32(self[ids]).tobytes()).hexdigest()


class ChosenRows:
    """Some rows of a matrix in some order, [n, D]; none is read before it is asked for.

    matrix: [M, D]. numbers: int64 [n], of its rows.
    """

    def __init__(
        self, matrix: np.ndarray | MatrixParts | ChosenRows, numbers: npt.NDArray[np.int64]
    ) -> None:
        self._matrix, self._numbers = matrix, numbers
        self.shape: tuple[int, int] = (len(numbers), matrix.shape[1])
        self.dtype: np.dtype[Any] = matrix.dtype

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """Read rows, as `MatrixParts` does; the result is a copy."""
        return self._matrix[self._numbers[rows]]


# --- kinds of arrays -----------------------------------------------------------------------------


def dtype_name(matrix: Array) -> str:
    """The name of a matrix's dtype, the same for NumPy and torch, such as "float32"."""
    return str(matrix.dtype).removeprefix("torch.")


def device_of(matrix: Any) -> torch.device:
    """The device that an array, a tensor or a packed bank is on."""
    return torch.device("cpu") if isinstance(matrix, np.ndarray) else matrix.device


def as_numpy(rows: Array) -> np.ndarray:
    """The rows in main memory as NumPy, without a copy where they are there already.

    NumPy has no bfloat16; tensors of it are widened to float32, which is exact.
    """
    if not isinstance(rows, torch.Tensor):
        return rows
    rows = rows.detach().cpu()
    return rows.float().numpy() if rows.dtype == torch.bfloat16 else rows.numpy()


def to_fp32(rows: Array, device: torch.device) -> torch.Tensor:
    """The rows as a tensor of float32 on a device; exact for all dtypes that ops take."""
    if isinstance(rows, torch.Tensor):
        return rows.to(device=device, dtype=torch.float32)
    # A copy: torch warns about read-only arrays, such as memory maps, that it would share.
    return torch.from_numpy(np.array(rows, dtype=np.float32, order="C")).to(device)


def dense_fp32(rows: Array) -> np.ndarray:
    """The rows in main memory as float32, row-major; a copy only where they are not so already."""
    return np.require(as_numpy(rows), np.float32, ["C", "A"])


def matrix_pointer(matrix: Array) -> tuple[tuple[int, str, int, int, int, int], Array]:
    """What the compiled extension takes for a matrix, and the array that must outlive the call.

    The matrix is copied if strides or address are no multiples of an element's size.
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


# --- checks --------------------------------------------------------------------------------------


def check_count(op: str, name: str, value: Any) -> int:
    """Return `value` as an int from 1 to 2^31 - 1.

    Raises:
        ConfigError: it is no such integer.
    """
    try:
        count = operator.index(value)
    except TypeError:
        count = 0
    if not 1 <= count < 1 << 31:
        raise ConfigError(
            f"{op}: {name}={value!r} is not allowed; allowed: an integer of at least 1 (below 2^31)"
        )
    return count


def check_device(prefix: str, name: str | torch.device) -> torch.device:
    """The device of this name, with its number; `prefix`: of the message, such as "PackedBank: ".

    Raises:
        ConfigError: torch can't use it here.
    """
    try:
        return torch.empty(0, device=name).device
    except (AssertionError, RuntimeError, TypeError) as error:
        raise ConfigError(
            f"{prefix}device={name!r} can't be used here ({str(error).splitlines()[0]}); "
            "allowed: cpu, or cuda[:n] where torch sees a GPU"
        ) from error


@contextlib.contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Have torch use so many CPU threads in the block."""
    before = torch.get_num_threads()
    if threads != before:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        if threads != before:
            torch.set_num_threads(before)


def check_threads(op: str, threads: Any) -> int:
    """How many CPU threads to use: as many as torch does, where `threads` is None.

    Raises:
        ConfigError: see `check_count`.
    """
    return torch.get_num_threads() if threads is None else check_count(op, "threads", threads)


def check_room(op: str, device: torch.device, size: int, what: str) -> None:
    """Refuse a result of `size` bytes that a device's free memory can't hold; `what` makes it so large.

    Raises:
        ConfigError: see above.
    """
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        found = re.search(r"MemAvailable:\s*(\d+) kB", read_system_file("/proc/meminfo"))
        if found is None:
            return  # no Linux
        free = int(found[1]) << 10
    if size > free:
        raise ConfigError(
            f"{op}: {what} makes a result of {size / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB of "
            "memory are free; lower it, or take fewer rows at a time"
        )


def check_pair(op: str, queries: Array, bank: Any) -> None:
    """Refuse a bank (or part of one) that queries can't be compared with.

    Raises:
        ConfigError: it has another width, or is neither on their device nor on the CPU.
    """
    if queries.shape[1] != bank.shape[1]:
        raise ConfigError(
            f"{op}: queries have {queries.shape[1]} columns and the bank has {bank.shape[1]}; "
            "both must come from one model"
        )
    device, place = device_of(queries), device_of(bank)
    if place not in (device, torch.device("cpu")):
        raise ConfigError(
            f"{op}: the bank is on {place} and the queries are on {device}; move the queries to "
            "the bank's device, or the bank to the queries' device or to the CPU"
        )


def check_matrix(op: str, name: str, matrix: Array) -> None:
    """Refuse what is no matrix that ops take; `name`: of the op's argument.

    Raises:
        ConfigError: it has another type, layout, shape or dtype.
    """
    allowed = "allowed: a 2-D NumPy array or torch tensor of float32, float16 or bfloat16"
    if isinstance(matrix, torch.Tensor):
        plain = matrix.layout == torch.strided and not matrix.is_meta
    else:
        plain = isinstance(matrix, np.ndarray) and matrix.dtype.isnative
    if not plain:
        what = matrix.dtype if isinstance(matrix, np.ndarray) else type(matrix).__name__
        raise ConfigError(f"{op}: {name} is {what}; {allowed}, dense and in native byte order")
    if matrix.ndim != 2 or matrix.shape[1] == 0:
        raise ConfigError(f"{op}: {name} has shape {tuple(matrix.shape)}; {allowed}, D >= 1")
    if dtype_name(matrix) not in ("float32", "float16", "bfloat16"):
        raise ConfigError(
            f"{op}: {name} holds {dtype_name(matrix)}; {allowed}. Convert with .astype('float32') "
            "or .float()"
        )


def check_finite(op: str, name: str, matrix: Array, first: int = 0) -> float:
    """Return the largest fp32 norm of a row, 0 if there are none.

    By Cauchy-Schwarz all inner products of such rows are finite. `first`: number of the first row
    in messages.

    Raises:
        DataError: a row holds NaN or infinity, or its squared norm overflows float32.
    """
    largest = 0.0
    for start in range(0, len(matrix), _CHECKED_ROWS):
        block = matrix[start : start + _CHECKED_ROWS]
        if isinstance(block, torch.Tensor):
            norms = torch.linalg.vector_norm(block, dim=1, dtype=torch.float32)
            top = float(norms.max())
        else:
            values = block.astype(np.float32, copy=False)
            with np.errstate(over="ignore", invalid="ignore"):
                norms = np.sqrt(np.einsum("ij,ij->i", values, values))
            top = float(norms.max())
        if not np.isfinite(top):
            row = int(torch.as_tensor(norms).isfinite().logical_not().nonzero()[0])
            raise_unrankable(op, name, first + start + row, block[row])
        largest = max(largest, top)
    return largest


def raise_unrankable(op: str, name: str, number: int, row: Array) -> NoReturn:
    """Raise the DataError for `row` [D], row `number` of the argument `name`: it can't be ranked."""
    values = as_numpy(row).astype(np.float32)
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
