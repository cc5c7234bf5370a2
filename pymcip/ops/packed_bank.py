"""`PackedBank`: a bank of rows, rounded to 8 bits (or to bfloat16) once and searched many times.

The form is that of csrc/topk.hpp, or on a GPU of csrc/topk_cuda_kernels.cuh: rows rotated (so that no
column stands out) and rounded, with bounds of the rounding error. A search screens it and
scores the few rows that matter from the rows themselves, which therefore are kept with it.
"""

from __future__ import annotations

import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from pymcip.contents import file_digest
from pymcip.errors import BackendError, ConfigError, DataError, OutputExistsError, reason_of
from pymcip.files import atomic_path, read_json, write_json
from pymcip.ops.arrays import (
    Array,
    MatrixParts,
    Progress,
    check_device,
    check_matrix,
    check_threads,
    device_of,
    dtype_name,
)
from pymcip.ops.dispatch import FLOATS, backends, select

FORMAT = 1  # of the saved folder and of the codes
GROUP, STEP, FACTS = 32, 64, 4  # kGroup, kStep, kGroupFacts of csrc/topk_kernel.hpp
ARRAYS = ("rows", "codes", "groups", "sums")  # of a saved folder
PRECISIONS = {"int8": 1, "bfloat16": 2}  # bytes of a code


class PackedBank:
    """Rows [M, D] and their rounded form, for `pymcip.ops.topk` where the rows are.

    Beside the rows it takes, per row, D bytes on the CPU (D rounded up to a multiple of 64), twice
    that in bfloat16. On a GPU it is D bytes, 2 D in bfloat16 (rounded up to a multiple of 128), and
    16; only these 16 where rows that are bfloat16 themselves can be screened where they are, which
    takes contiguous rows at multiples of 16 bytes.

    Attributes:
        rows: as given.
        precision: "int8" or "bfloat16".
        arrays: the rounded form; on the CPU see `code_shapes`, on a GPU one tensor of bytes.
    """

    def __init__(self, rows: Array, arrays: dict[str, Any], precision: str) -> None:
        """Use `PackedBank.pack` or `PackedBank.load`."""
        self.rows = rows
        self.precision = precision
        self.arrays = arrays

    @classmethod
    def pack(
        cls,
        rows: Array,
        *,
        backend: str = "auto",
        precision: str | None = None,
        threads: int | None = None,
        progress: Progress | None = None,
    ) -> PackedBank:
        """Pack a bank, where it is: on the CPU or on a CUDA device.

        rows: [M, D], NumPy (memory maps too) or torch, float32, float16 or bfloat16, any strides;
            kept, not copied.
        backend: whose instruction set to use; see `pymcip.ops.explain("topk")`. The codes are the
            same whichever the CPU's is, 8 bits, but for "amx_bf16", which packs and searches
            bfloat16. On a GPU only "cuda" packs.
        precision: "int8" or "bfloat16"; None is the back end's own, int8 for "cuda".
        threads: CPU threads; by default torch's number.
        progress: called with the rows packed and to pack, about ten times a second; not by "cuda",
            which takes milliseconds.

        Raises:
            ConfigError: shape, dtype, device or precision are not allowed.
            DataError: a row holds NaN or infinity, or its squared norm overflows float32.
            BackendError: the back end can't run here, or doesn't take packed banks.
        """
        check_matrix("PackedBank", "bank", rows)
        threads = check_threads("PackedBank", threads)
        if precision not in (None, *PRECISIONS):
            raise ConfigError(
                f"PackedBank: precision={precision!r} is not allowed; allowed: "
                f"{', '.join(PRECISIONS)}, or None for the back end's own"
            )
        device = device_of(rows).type
        if backend == "auto" and device == "cuda":
            backend = "cuda"
        elif backend == "auto" and precision == "bfloat16":
            backend = "amx_bf16"
        row = select("topk", backend, device=device, dtype=dtype_name(rows), dim=rows.shape[1])
        pack = row.load_pack()
        if pack is None:
            able = [row.name for row in backends("topk") if row.pack and row.unavailable() is None]
            raise BackendError(
                f"PackedBank: backend={row.name!r} does not search packed banks, or does not take "
                f"D={rows.shape[1]}; allowed: {', '.join(['auto', *able])}, for D <= 4096"
            )
        arrays, precision = pack(
            rows, precision, backend=row.name, threads=threads, progress=progress
        )
        return cls(rows, arrays, precision)

    def to(self, device: str | torch.device, **options: Any) -> PackedBank:
        """The bank on the CPU or on a CUDA device: its rows are copied there and packed anew.

        device: "cpu", "cuda", "cuda:1"; where the bank is already, it is returned as it is if
            there are no options.
        options: what `pack` takes.

        Raises:
            ConfigError: there is no such device.
            DataError, BackendError: as by `pack`.
        """
        place = check_device("PackedBank: ", device)
        if place == self.device and not options:
            return self
        return PackedBank.pack(_tensor(self.rows).to(place), **options)

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write rows and codes into a folder (complete or absent), to be memory-mapped by `load`.

        A bank on a GPU is packed for the CPU first, with `to("cpu")`.

        Raises:
            OutputExistsError: the folder exists and `overwrite` is False.
        """
        folder = Path(folder)
        if folder.exists() and not overwrite:
            raise OutputExistsError(f"{folder} exists; give overwrite=True, or another folder")
        if self.device.type != "cpu":
            return self.to("cpu").save(folder, overwrite=overwrite)
        dtype = dtype_name(self.rows)
        with atomic_path(folder, owned=()) as temporary:
            temporary.mkdir()
            for name, array in self.arrays.items():
                np.save(temporary / f"{name}.npy", array)
            rows = np.lib.format.open_memmap(
                temporary / "rows.npy", mode="w+", dtype=_stored(dtype), shape=self.shape
            )
            rows[:] = _bits(self.rows)
            rows.flush()
            del rows
            facts = {"format": FORMAT, "dtype": dtype, "precision": self.precision}
            facts["sha256"] = {name: digest.hex() for name, digest in _digests(temporary)}
            write_json(temporary / "packed_bank.json", facts)
        return folder

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> PackedBank:
        """Open a saved bank; its arrays are read once for their checksums, and memory-mapped.

        Raises:
            DataError: the folder holds no packed bank, a damaged one, or one of another format.
        """
        folder = Path(folder)
        try:
            facts = read_json(folder / "packed_bank.json", {"format": int})
            if facts["format"] != FORMAT:
                raise ValueError(f"packed in format {facts['format']}; this version reads {FORMAT}")
            arrays = {
                name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
                for name in ARRAYS
            }
            rows: Array = arrays.pop("rows")
            dtype, precision = facts["dtype"], facts["precision"]
            if dtype not in FLOATS or precision not in PRECISIONS:
                raise ValueError(f"it holds rows of {dtype!r} in {precision!r}")
            if rows.ndim != 2 or rows.dtype != _stored(dtype) or not rows.shape[1]:
                raise ValueError(f"its rows are {rows.dtype} {rows.shape}, not {dtype}")
            # The extension takes addresses: what it reads there must lie within the files.
            for name, (shape, stored) in code_shapes(rows.shape, precision).items():
                array = arrays[name]
                if array.shape != shape or array.dtype != stored:
                    raise ValueError(
                        f"the packed bank's {name} are {array.dtype} {array.shape}; its rows "
                        f"{rows.shape} need {stored} {shape}"
                    )
                if not (array.flags.c_contiguous and array.flags.aligned):
                    raise ValueError(
                        f"the packed bank's {name} have another layout than when written"
                    )
            for name, digest in _digests(folder):
                if facts["sha256"][name] != digest.hex():
                    raise ValueError(f"{name}.npy has another checksum than when it was written")
        except Exception as error:  # what a damaged file raises is not bounded by a list
            raise DataError(
                f"{folder} holds no complete packed bank ({reason_of(error)}); write one with "
                "PackedBank.save"
            ) from error
        if dtype == "bfloat16":
            rows = _tensor(rows).view(torch.bfloat16)
        return cls(rows, arrays, precision)

    @property
    def addresses(self) -> tuple[int, ...]:
        """Addresses of the packed arrays, for the extension: codes, groups and sums, or a GPU's one.

        They are valid while this object lives.
        """
        return tuple(
            array.data_ptr() if isinstance(array, torch.Tensor) else array.ctypes.data
            for array in self.arrays.values()
        )

    @property
    def device(self) -> torch.device:
        """The device that the rows are on."""
        return device_of(self.rows)

    @property
    def shape(self) -> tuple[int, int]:
        """M and D."""
        rows, columns = self.rows.shape
        return rows, columns

    @property
    def dtype(self) -> Any:
        """The dtype of the rows."""
        return self.rows.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the packed form, without the rows."""
        return sum(array.nbytes for array in self.arrays.values())

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        what = f"{dtype_name(self.rows)} in {self.precision} on {self.device}"
        return f"PackedBank({len(self)} x {self.shape[1]}, {what})"


Bank: TypeAlias = Any  # an Array or a PackedBank, or a list of such: the parts of one bank


def plain_rows(part: Array | PackedBank) -> Array:
    """The rows of an array or a packed bank."""
    return part.rows if isinstance(part, PackedBank) else part


def plain_parts(op: str, bank: Bank) -> MatrixParts:
    """The rows of all parts of a bank, checked.

    Raises:
        ConfigError: there is no part, one is no matrix that ops take, or they differ in width.
    """
    whole = bank if isinstance(bank, (list, tuple)) else [bank]
    parts = [plain_rows(part) for part in whole]
    for part in parts:
        check_matrix(op, "bank", part)
    return MatrixParts(parts)


def code_shapes(
    shape: tuple[int, int], precision: str
) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Shapes and dtypes of the arrays that the CPU's back ends pack a bank of this shape into.

    codes: int8 [groups of 32 rows, halves of a group, steps of 64 bytes, rows of a half, bytes].
    groups: float32 [groups, 4], bounds for all rows of a group. sums: int32 [groups, 32], of a row's
    codes. See csrc/topk_kernel.hpp.
    """
    rows, columns = shape
    groups, steps = -(-rows // GROUP), -(-columns // STEP) * PRECISIONS[precision]
    return {
        "codes": ((groups, 2, steps, GROUP // 2, STEP), np.dtype(np.int8)),
        "groups": ((groups, FACTS), np.dtype(np.float32)),
        "sums": ((groups, GROUP), np.dtype(np.int32)),
    }


def _digests(folder: Path) -> list[tuple[str, bytes]]:
    """SHA-256 of the arrays' files in a folder, by the arrays' names."""
    with ThreadPoolExecutor(len(ARRAYS)) as pool:
        digests = pool.map(file_digest, [folder / f"{name}.npy" for name in ARRAYS])
        return list(zip(ARRAYS, digests, strict=True))


def _stored(dtype: str) -> np.dtype[Any]:
    """The dtype in which rows of `dtype` are stored in a file."""
    return np.dtype(np.uint16 if dtype == "bfloat16" else dtype)


def _bits(rows: Array) -> np.ndarray:
    """Rows as NumPy can store them: bfloat16 as uint16."""
    if isinstance(rows, torch.Tensor):
        rows = rows.detach()
        return rows.view(torch.uint16).numpy() if rows.dtype == torch.bfloat16 else rows.numpy()
    return rows.view(np.uint16) if dtype_name(rows) == "bfloat16" else rows


def _tensor(rows: Array) -> torch.Tensor:
    """The rows as a tensor, sharing their memory unless torch can't take it."""
    if isinstance(rows, torch.Tensor):
        return rows
    with warnings.catch_warnings():
        # torch warns about arrays that can't be written to; nothing here writes.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensor = torch.from_numpy(np.require(_bits(rows), requirements=("C", "A")))
    return tensor.view(torch.bfloat16) if dtype_name(rows) == "bfloat16" else tensor
