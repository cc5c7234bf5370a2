"""What metrics take: arrays and tensors are checked and made unit rows, labels and lists of k."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pymcip.errors import ConfigError, DataError
from pymcip.ops.canonical import canonical_unit

Array: TypeAlias = npt.ArrayLike | Tensor
Int64: TypeAlias = npt.NDArray[np.int64]
Float64: TypeAlias = npt.NDArray[np.float64]


def as_tensor(values: Any) -> Tensor:
    """Make a tensor, without a copy where torch can take the memory as it is."""
    if isinstance(values, Tensor):
        return values.detach()
    array = np.asarray(values)
    low = array.dtype == np.float16 or array.dtype.name == "bfloat16"  # which torch doesn't know
    if low or not array.flags.writeable or not array.flags.c_contiguous:
        array = np.array(array, dtype=np.float32 if low else None, order="C")
    return torch.from_numpy(array)


def unit_rows(values: Any, name: str) -> Tensor:
    """Make rows of norm 1, float32 [N, D], where `values` are; a row of zeros stays zero.

    Raises:
        DataError: no matrix of finite real numbers; `name` is what the message calls it.
    """
    tensor = as_tensor(values)
    if tensor.ndim != 2 or 0 in tensor.shape:
        raise DataError(
            f"{name} has shape {tuple(tensor.shape)}; needed: [rows, dimensions], neither is 0"
        )
    if tensor.dtype.is_complex or tensor.dtype == torch.bool:
        raise DataError(f"{name} has dtype {tensor.dtype}; needed: real numbers")
    rows = tensor.float()
    # The sum of what is not finite isn't; that of finite values is but for overflow.
    if not math.isfinite(float(rows.sum())) and not bool(torch.isfinite(rows).all()):
        bad = int((~torch.isfinite(rows)).any(dim=1).sum())
        raise DataError(
            f"{name} has NaN or infinite values in {bad} of {len(rows)} rows; embed them again"
        )
    return canonical_unit(rows)


def unit_pair(first: Any, name: str, second: Any, other_name: str) -> tuple[Tensor, Tensor]:
    """Make unit rows of both, on the second's device; raises DataError as `unit_rows`."""
    known = unit_rows(second, other_name)
    asked = unit_rows(first, name).to(known.device)
    if asked.shape[1] != known.shape[1]:
        raise DataError(
            f"{name} has {asked.shape[1]} dimensions, {other_name} has {known.shape[1]}; "
            "both must come from the same model"
        )
    return asked, known


def as_labels(
    values: Any, name: str, rows: Tensor, rows_name: str, of: tuple[Tensor, str] | None = None
) -> Tensor:
    """Make labels int64 [N], one for each of `rows` [N, D] and on their device.

    Raises:
        DataError: no integers >= 0, another number of them, or one that is no row of the matrix `of`.
    """
    tensor = as_tensor(values)
    if tensor.ndim != 1 or tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        raise DataError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}; needed: integers [rows]")
    tensor = tensor.to(device=rows.device, dtype=torch.int64)
    if len(tensor) and int(tensor.min()) < 0:
        raise DataError(
            f"{name} has negative values (unlabelled rows?); leave those rows out first"
        )
    check_rows(rows, rows_name, tensor, name)
    if of is not None and int(tensor.max()) >= len(of[0]):
        raise DataError(
            f"{name} has values up to {int(tensor.max())}, but {of[1]} has {len(of[0])} rows; give "
            "row numbers from 0"
        )
    return tensor


def check_rows(vectors: Tensor, name: str, others: Tensor, other_name: str) -> None:
    """Raise DataError unless both have the same number of rows."""
    if len(vectors) != len(others):
        raise DataError(
            f"{name} has {len(vectors)} rows, {other_name} has {len(others)}; give one per row"
        )


def as_ranks(ks: Sequence[int]) -> list[int]:
    """Check the k of R@k or mP@k; raises ConfigError unless there are some, each >= 1."""
    counts = [operator.index(k) for k in ks]
    if not counts or min(counts) < 1:
        raise ConfigError(f"ks={list(ks)} is not allowed; give at least one k, each >= 1")
    return counts
