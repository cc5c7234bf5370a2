"""Checks of embeddings that another program wrote: are their rows what cosines can be made of?"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pymcip.errors import DataError

NEARLY_UNIT = 0.01  # how far a norm may be from 1: float16 of a thousand columns is within 0.001
_ROWS = 16384  # at a time

_log = logging.getLogger("pymcip.embedding")


def check_rows(files: Sequence[Path], parts: Sequence[npt.NDArray[Any]]) -> bool:
    """Read all rows, and say whether they have to be normalised.

    Args:
        files: of the parts, for messages.
        parts: float16 or float32 [n, D] each.

    Returns:
        Whether a row's norm is not 1. A warning says so.

    Raises:
        DataError: a row holds NaN or infinity, or is zero.
    """
    lowest, highest = np.inf, 0.0
    for file, part in zip(files, parts, strict=True):
        for start in range(0, len(part), _ROWS):
            # A sum of squares of float16 or float32 never overflows float64.
            block = part[start : start + _ROWS].astype(np.float64)
            norms: npt.NDArray[np.float64] = np.linalg.norm(block, axis=1)
            wrong = ~np.isfinite(norms) | (norms == 0)
            if wrong.any():
                row = start + int(wrong.argmax())
                what = "is zero" if norms[row - start] == 0 else "holds NaN or infinity"
                raise DataError(
                    f"{file}: row {row} {what}, so that it has no cosine with anything. Embed that "
                    "item again, or leave it out"
                )
            lowest, highest = min(lowest, norms.min()), max(highest, norms.max())
    if max(1 - lowest, highest - 1) <= NEARLY_UNIT or not sum(map(len, parts)):
        return False
    _log.warning(
        "%s: the norms of the rows are %.3g to %.3g and not 1; they are normalised in memory",
        files[0].parent, lowest, highest,
    )  # fmt: skip
    return True


def normalised(files: Sequence[Path], parts: Sequence[npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
    """Return unit rows of the same dtype, in memory.

    Raises:
        DataError: they take more than half of the memory.
    """
    wanted = sum(part.nbytes for part in parts)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if wanted > memory / 2:
        raise DataError(
            f"{files[0].parent}: the rows are not unit, and normalised ones take "
            f"{wanted / 2**30:.1f} GiB, more than half of the memory. Write them normalised: divide "
            "each row by its norm"
        )
    made = []
    for part in parts:
        unit = np.empty(part.shape, part.dtype)
        for start in range(0, len(part), _ROWS):
            block = part[start : start + _ROWS].astype(np.float64)
            unit[start : start + _ROWS] = block / np.linalg.norm(block, axis=1, keepdims=True)
        made.append(unit)
    return made
