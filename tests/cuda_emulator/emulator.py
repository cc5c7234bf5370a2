"""csrc/topk_cuda.cu, compiled by a plain C++ compiler and run on the CPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parent.parent / "csrc"
COMPILER = shutil.which("g++")


def build(folder: Path, *flags: str) -> ctypes.CDLL:
    assert COMPILER is not None
    library = folder / "topk_cuda_emulated.so"
    subprocess.run(
        [
            *(COMPILER, "-std=c++20", "-O1", "-fPIC", "-shared", "-pthread"),
            *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
            # Fibers leave and enter functions by longjmp; no compiler-made checks of that.
            *("-U_FORTIFY_SOURCE", "-DPYMCIP_CUDA_EMULATOR", f"-I{SOURCES}", f"-I{HERE}"),
            *(*flags, "-o", str(library), str(HERE / "topk.cpp")),
        ],
        check=True,
    )
    found = ctypes.CDLL(str(library))
    found.emulate_topk.restype = ctypes.c_char_p
    found.emulate_topk.argtypes = [
        ctypes.POINTER(_Problem),
        ctypes.c_int64,
        ctypes.POINTER(ctypes.c_int64),
    ]
    return found


class _Problem(ctypes.Structure):
    _fields_ = (
        ("queries", ctypes.c_void_p),
        ("query_type", ctypes.c_char_p),
        ("query_rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("query_row_stride", ctypes.c_int64),
        ("query_column_stride", ctypes.c_int64),
        ("bank", ctypes.c_void_p),
        ("bank_type", ctypes.c_char_p),
        ("bank_rows", ctypes.c_int64),
        ("bank_row_stride", ctypes.c_int64),
        ("bank_column_stride", ctypes.c_int64),
        ("bank_on_host", ctypes.c_int32),
        ("packed_ahead", ctypes.c_int32),
        ("eager", ctypes.c_int32),
        ("exact", ctypes.c_int32),
        ("k", ctypes.c_int64),
        ("threshold", ctypes.c_float),
        ("threads", ctypes.c_int32),
        ("screen", ctypes.c_char_p),
        ("path", ctypes.c_char_p),
        ("packed_bytes", ctypes.c_int64),
        ("raw_bytes", ctypes.c_int64),
        ("query_bytes", ctypes.c_int64),
        ("candidate_bytes", ctypes.c_int64),
        ("staging_bytes", ctypes.c_int64),
        ("capacity", ctypes.c_int64),
        ("ids", ctypes.c_void_p),
        ("scores", ctypes.c_void_p),
    )


class StoppedError(Exception):
    pass


def topk(
    library: ctypes.CDLL,
    queries: Any,
    bank: Any,
    k: int,
    threshold: float = -np.inf,
    *,
    screen: str,
    path: str,
    exact: bool = True,
    on_host: bool = False,
    packed_ahead: bool = False,
    eager: bool = False,
    stop_after: int = -1,
    **limits: int,
) -> tuple[np.ndarray, np.ndarray]:
    """queries, bank: NumPy arrays or torch tensors on the CPU. eager: see cuda_emulator.hpp."""
    ids = np.full((len(queries), k), 12345)
    scores = np.full((len(queries), k), 12345, dtype=np.float32)
    sizes = {
        "packed_bytes": 1 << 24,
        "raw_bytes": 1 << 24,
        "query_bytes": 1 << 24,
        "candidate_bytes": 1 << 24,
        "staging_bytes": 1 << 16,
        "capacity": 256,
        **limits,
    }
    problem = _Problem(
        *_matrix(queries),
        *(part for index, part in enumerate(_matrix(bank)) if index != 3),
        on_host,
        packed_ahead,
        eager,
        exact,
        k,
        threshold,
        3,
        screen.encode(),
        path.encode(),
        *(sizes[name] for name, _ in _Problem._fields_ if name in sizes),
        ids.ctypes.data,
        scores.ctypes.data,
    )
    done = ctypes.c_int64(0)
    error = library.emulate_topk(problem, stop_after, done)
    if error == b"stopped":
        raise StoppedError
    if error is not None:
        raise ValueError(error.decode())
    assert done.value == len(queries) * len(bank)
    return ids, scores


def _matrix(matrix: Any) -> list[Any]:
    if isinstance(matrix, torch.Tensor):
        address, strides = matrix.data_ptr(), matrix.stride()
    else:
        address = matrix.ctypes.data
        strides = tuple(stride // matrix.itemsize for stride in matrix.strides)
    name = str(matrix.dtype).removeprefix("torch.")
    return [address, name.encode(), *matrix.shape, *strides]
