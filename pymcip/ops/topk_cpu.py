"""Exact top-k on the CPU: back ends in C++, one per instruction set, with the same results to the bit.

The contract is in csrc/topk.hpp. They take banks in parts, packed or not, and check the rows
themselves, while they pack them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pymcip.errors import ConfigError
from pymcip.ops.arrays import Array, Progress, matrix_pointer, raise_unrankable
from pymcip.ops.packed_bank import PackedBank, code_shapes, plain_parts, plain_rows

UNPACKED_PASS = 8192  # queries of a pass of other back ends, which pack nothing
MOST_COLUMNS = 4096  # kMostColumns of csrc/topk.hpp
_ALIGNMENT = 64
# What each needs. All screen in 8 bits but amx_bf16: bfloat16 takes it twice the time, and bounds six
# times tighter save it scores where many rows of a bank are nearly alike.
KERNELS = {
    "amx": "an x86-64 processor with AMX, and a Linux that grants its tiles",
    "avx512_vnni": "an x86-64 processor with AVX-512 VNNI",
    "avx2": "an x86-64 processor with AVX2, FMA and F16C",
    "portable": "any processor",
    "amx_bf16": "an x86-64 processor with AMX, and a Linux that grants its tiles",
}


def own_precision(kernel: str) -> str:
    """The precision of the codes that a kernel screens: "int8" or "bfloat16"."""
    return "bfloat16" if kernel == "amx_bf16" else "int8"


def topk_cpu(
    kernel: str,
    queries: Array,
    bank: Sequence[Array | PackedBank],
    k: int,
    threshold: float,
    *,
    exact: bool,
    threads: int,
    progress: Progress | None,
) -> tuple[Array, Array]:
    """Search all parts of a bank: ids int64 and scores float32 [N, k], NumPy.

    Beside a packed bank it takes at most 64 MiB: 40 MiB of codes and candidates of queries, 16 MiB
    of codes of rows that are not packed, and small buffers per thread.
    """
    from pymcip import _core

    parts = []
    held = []  # what the pointers point into
    for part in bank:
        usable = isinstance(part, PackedBank) and part.precision == own_precision(kernel)
        packed = part.addresses if usable else None
        pointer, owner = matrix_pointer(plain_rows(part))
        held.append(owner)
        parts.append((pointer, packed))
    pointer, owner = matrix_pointer(queries)
    held.append(owner)
    ids = np.empty((len(queries), k), dtype=np.int64)
    scores = np.empty((len(queries), k), dtype=np.float32)
    unrankable = _core.topk(
        pointer, parts, k, threshold, exact, threads, kernel,
        ids.ctypes.data, scores.ctypes.data, progress,
    )  # fmt: skip
    if unrankable is not None:
        name, row = unrankable
        rows = queries if name == "queries" else plain_parts("topk", bank)
        raise_unrankable("topk", name, row, rows[row : row + 1][0])
    return ids, scores


def pack_cpu(
    rows: Array, precision: str | None, *, threads: int, progress: Progress | None, backend: str
) -> tuple[dict[str, np.ndarray], str]:
    """The codes of rows, and the precision they are in; for `PackedBank.pack`.

    Raises:
        ConfigError: the back end packs in another precision.
        DataError: a row can't be ranked.
    """
    from pymcip import _core

    own = own_precision(backend)
    if precision not in (None, own):
        raise ConfigError(
            f"PackedBank: backend={backend!r} packs in {own}, not in {precision}; allowed: "
            f"precision={own!r} or None, or another back end"
        )
    arrays = {
        name: _aligned(shape, dtype)
        for name, (shape, dtype) in code_shapes(rows.shape, own).items()
    }
    pointer, owner = matrix_pointer(rows)
    codes, groups, sums = (array.ctypes.data for array in arrays.values())
    unrankable = _core.topk_pack(pointer, codes, groups, sums, threads, backend, progress)
    del owner  # what the pointer points into
    if unrankable is not None:
        raise_unrankable("PackedBank", "bank", unrankable[1], rows[unrankable[1]])
    return arrays, own


def _aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """An array whose tiles don't straddle cache lines."""
    size = int(np.prod(shape)) * dtype.itemsize
    space = np.empty(size + _ALIGNMENT, dtype=np.uint8)
    start = -space.ctypes.data % _ALIGNMENT
    return space[start : start + size].view(dtype).reshape(shape)


def pass_queries(columns: int, k: int) -> int:
    """How many queries, at least, are served by one pass over a bank, which packs its rows anew."""
    if probe("portable") is not None:
        return UNPACKED_PASS
    from pymcip import _core

    return _core.topk_pass(columns, k)


def probe(kernel: str) -> str | None:
    """Why this kernel can't run on this machine; None if it can."""
    try:
        from pymcip import _core
    except ImportError as error:
        return f"the compiled core can't be imported ({error}); reinstall pymcip"
    if kernel in _core.topk_kernels():
        return None
    return f"needs {KERNELS[kernel]}, and a compiler that knew it when pymcip was built"


def limits(device: str, **facts: Any) -> str | None:
    """Why a problem of this size can't be taken; None if it can."""
    columns = facts.get("dim", 1)
    return None if columns <= MOST_COLUMNS else f"takes D <= {MOST_COLUMNS}, not {columns}"
