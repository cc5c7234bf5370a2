"""Exact top-k of inner products with a threshold, for banks of any size.

For each row q of `queries` [N, D] and all rows c_j of `bank` [M, D] the pairs (<q, c_j>, j) with
<q, c_j> >= threshold, ordered by score descending, then by j ascending; the first k of them.
Scores are fp32 inner products of the inputs as they are (fp16 and bf16 are widened, not rounded),
so they differ from the exact ones by at most gamma_D |q| |c_j|, gamma_D = D u / (1 - D u),
u = 2^-24; unit rows make them cosines.

The `cpp` back end adds up in one fixed order: equal bank rows have equal scores, and its result
doesn't depend on the number of threads. `torch` leaves the order to the matrix product, so rows
that are equal can differ in the last bit there.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np
import torch

from pymcip.errors import ConfigError, DataError
from pymcip.ops.dispatch import select

Array: TypeAlias = Any  # np.ndarray (memory maps too) or torch.Tensor
Progress: TypeAlias = Callable[[int, int], object]

_QUERY_BLOCK = 1024
_BANK_BLOCK = 16384  # with _QUERY_BLOCK queries: 64 MiB of scores


def topk(
    queries: Array,
    bank: Array,
    k: int,
    threshold: float | None = None,
    *,
    backend: str = "auto",
    threads: int | None = None,
    progress: Progress | None = None,
) -> tuple[Array, Array]:
    """Ids (int64) and scores (float32), both [N, k], of the k best bank rows for each query.

    queries, bank: NumPy arrays, memory maps or torch tensors, float32, float16 or bfloat16, with
        finite values, any strides and possibly no rows. The results are of the kind of `queries`
        and on its device. A bank in main memory is streamed to queries on a GPU.
    k: places per query. Places that stay empty hold id -1 and score -inf.
    threshold: lowest score admitted (inclusive, compared in fp32); None admits all.
    backend: "auto" or a name from `pymcip.ops.backends("topk")`.
    threads: CPU threads; by default torch's number.
    progress: called with the scores computed and to compute, about ten times a second.
    """
    _check_matrix("queries", queries)
    _check_matrix("bank", bank)
    if queries.shape[1] != bank.shape[1]:
        raise ConfigError(
            f"topk: queries have {queries.shape[1]} columns and the bank has {bank.shape[1]}; both "
            "must come from one model"
        )
    if not hasattr(k, "__index__") or operator.index(k) < 1:
        raise ConfigError(f"topk: k={k!r} is not allowed; allowed: an integer of at least 1")
    k = operator.index(k)
    if threads is not None and threads < 1:
        raise ConfigError(f"topk: threads={threads!r} is not allowed; allowed: None or at least 1")
    floor = -float("inf") if threshold is None else float(torch.tensor(float(threshold)).item())
    if floor != floor:
        raise ConfigError("topk: threshold is NaN; allowed: a number or None")

    device = queries.device if isinstance(queries, torch.Tensor) else torch.device("cpu")
    if isinstance(bank, torch.Tensor) and bank.device not in (device, torch.device("cpu")):
        raise ConfigError(
            f"topk: the bank is on {bank.device} and the queries are on {device}; move the queries "
            "to the bank's device, or the bank to the queries' device or to the CPU"
        )
    row = select("topk", backend, device=device.type, dtype=_dtype_name(bank))
    with torch.no_grad():
        _check_finite("queries", queries)
        _check_finite("bank", bank)
        ids, scores = row.load()(
            queries,
            bank,
            k,
            floor,
            threads=threads or torch.get_num_threads(),
            progress=progress,
        )
    if isinstance(queries, torch.Tensor):
        return torch.as_tensor(ids, device=device), torch.as_tensor(scores, device=device)
    return np.asarray(ids), np.asarray(scores)


# --------------------------------------------------------------------------------------------------
# cpp


def probe_cpp() -> str | None:
    try:
        import pymcip._core  # noqa: F401
    except ImportError as error:
        return f"the compiled core can't be imported ({error}); reinstall pymcip"
    return None


def topk_cpp(
    queries: Array,
    bank: Array,
    k: int,
    threshold: float,
    *,
    threads: int,
    progress: Progress | None,
    kernel: str | None = None,
) -> tuple[Array, Array]:
    """csrc/topk_cpu.cpp; `kernel` forces one of its instruction sets."""
    from pymcip import _core

    queries, bank = _whole_strides(queries), _whole_strides(bank)
    ids = np.empty((len(queries), k), dtype=np.int64)
    scores = np.empty((len(queries), k), dtype=np.float32)
    _core.topk(
        _pointer(queries),
        _pointer(bank),
        k,
        threshold,
        threads,
        kernel or _core.topk_kernels()[0],
        ids.ctypes.data,
        scores.ctypes.data,
        progress,
    )
    return ids, scores


def _pointer(matrix: Array) -> tuple[int, str, int, int, int, int]:
    rows, columns = matrix.shape
    if isinstance(matrix, torch.Tensor):
        address, strides = matrix.data_ptr(), matrix.stride()
    else:
        address = matrix.ctypes.data
        strides = tuple(stride // matrix.itemsize for stride in matrix.strides)
    return address, _dtype_name(matrix), rows, columns, strides[0], strides[1]


def _whole_strides(matrix: Array) -> Array:
    """The matrix, copied if its strides or its address are no multiples of an element's size."""
    if isinstance(matrix, torch.Tensor):
        return matrix
    whole = all(stride % matrix.itemsize == 0 for stride in matrix.strides)
    return matrix if whole and matrix.flags.aligned else matrix.copy()


# --------------------------------------------------------------------------------------------------
# torch


def topk_torch(
    queries: Array,
    bank: Array,
    k: int,
    threshold: float,
    *,
    threads: int,  # torch's own setting holds
    progress: Progress | None,
) -> tuple[Array, Array]:
    """The plain version, on any device: matrix products by blocks, then torch's own top-k."""
    device = queries.device if isinstance(queries, torch.Tensor) else torch.device("cpu")
    count, bank_count = len(queries), len(bank)
    ids = torch.full((count, k), -1, dtype=torch.int64, device=device)
    scores = torch.full((count, k), -torch.inf, dtype=torch.float32, device=device)
    done, total = 0, count * bank_count
    with _fp32_products(device):
        for first in range(0, count, _QUERY_BLOCK):
            block = _to_fp32(queries[first : first + _QUERY_BLOCK], device)
            best_ids = ids[first : first + _QUERY_BLOCK, :0]
            best_scores = scores[first : first + _QUERY_BLOCK, :0]
            for start in range(0, bank_count, _BANK_BLOCK):
                rows = _to_fp32(bank[start : start + _BANK_BLOCK], device)
                # Adding +0 turns -0 into +0: CUDA's sort ranks them apart.
                block_scores, block_ids = _best_of(block @ rows.T + 0.0, k)
                # Ids seen before are lower, so a stable sort keeps ties in order of their ids.
                best_ids = torch.cat([best_ids, block_ids + start], dim=1)
                best_scores = torch.cat([best_scores, block_scores], dim=1)
                best_scores, order = best_scores.sort(dim=1, descending=True, stable=True)
                best_scores = best_scores[:, :k]
                best_ids = best_ids.gather(1, order[:, :k])
                done += len(block) * len(rows)
                if progress is not None:
                    progress(done, total)
            below = best_scores < threshold
            width = best_ids.shape[1]
            ids[first : first + _QUERY_BLOCK, :width] = best_ids.masked_fill(below, -1)
            scores[first : first + _QUERY_BLOCK, :width] = best_scores.masked_fill(
                below, -torch.inf
            )
    return (ids, scores) if isinstance(queries, torch.Tensor) else (ids.numpy(), scores.numpy())


def _best_of(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first k of each row by score descending, then column ascending."""
    values, columns = scores.topk(min(k + 1, scores.shape[1]), dim=1)
    if values.shape[1] > k:
        # Where the cut falls into a tie, torch took any of the tied columns: sort those rows fully.
        tied = (values[:, k - 1] == values[:, k]).nonzero().flatten()
        values, columns = values[:, :k].contiguous(), columns[:, :k].contiguous()
        if len(tied):
            order = scores[tied].sort(dim=1, descending=True, stable=True).indices[:, :k]
            values[tied], columns[tied] = scores[tied].gather(1, order), order
    columns, order = columns.sort(dim=1)
    values, by_score = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values, columns.gather(1, by_score)


def _to_fp32(block: Array, device: torch.device) -> torch.Tensor:
    if isinstance(block, torch.Tensor):
        return block.to(device=device, dtype=torch.float32)
    # A copy: torch warns about read-only arrays, such as memory maps, that it would share.
    return torch.from_numpy(np.array(block, dtype=np.float32)).to(device)


@contextlib.contextmanager
def _fp32_products(device: torch.device) -> Iterator[None]:
    """Matrix products in true fp32, whatever autocast or precision the caller has set."""
    with torch.autocast(device.type, enabled=False):
        if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # torch >= 2.9
            back_ends: list[Any] = [torch.backends.cuda, torch.backends.mkldnn]
            settings = [back_end.matmul for back_end in back_ends]
            before = [setting.fp32_precision for setting in settings]
            try:
                for setting in settings:
                    setting.fp32_precision = "ieee"
                yield
            finally:
                for setting, value in zip(settings, before, strict=True):
                    setting.fp32_precision = value
        else:
            precision = torch.get_float32_matmul_precision()
            try:
                torch.set_float32_matmul_precision("highest")
                yield
            finally:
                torch.set_float32_matmul_precision(precision)


# --------------------------------------------------------------------------------------------------
# Validation


def _check_matrix(name: str, matrix: Array) -> None:
    allowed = "allowed: a 2-D NumPy array or torch tensor of float32, float16 or bfloat16"
    if isinstance(matrix, torch.Tensor):
        plain = matrix.layout == torch.strided and not matrix.is_meta
    else:
        plain = isinstance(matrix, np.ndarray) and matrix.dtype.isnative
    if not plain:
        what = matrix.dtype if isinstance(matrix, np.ndarray) else type(matrix).__name__
        raise ConfigError(f"topk: {name} is {what}; {allowed}, dense and in native byte order")
    if matrix.ndim != 2 or matrix.shape[1] == 0:
        raise ConfigError(f"topk: {name} has shape {tuple(matrix.shape)}; {allowed}, D >= 1")
    if _dtype_name(matrix) not in ("float32", "float16", "bfloat16"):
        raise ConfigError(
            f"topk: {name} holds {_dtype_name(matrix)}; {allowed}. Convert with .astype('float32') "
            "or .float()"
        )


def _check_finite(name: str, matrix: Array) -> None:
    """Refuse rows whose fp32 norm is not finite; by Cauchy-Schwarz all scores are finite then."""
    for start in range(0, len(matrix), _BANK_BLOCK):
        block = matrix[start : start + _BANK_BLOCK]
        if isinstance(block, torch.Tensor):
            norms = torch.linalg.vector_norm(block, dim=1, dtype=torch.float32)
            bad = norms.isfinite().logical_not_().nonzero()
        else:
            values = block.astype(np.float32, copy=False)
            with np.errstate(over="ignore", invalid="ignore"):
                bad = np.flatnonzero(~np.isfinite(np.einsum("ij,ij->i", values, values)))
        if len(bad):
            row = start + int(bad[0])
            values = block[int(bad[0])]
            if isinstance(values, torch.Tensor):
                values = values.float().cpu().numpy()
            if np.isnan(values).any():
                problem = "holds NaN"
            elif np.isinf(values).any():
                problem = "holds infinity"
            else:
                problem = "has a norm that overflows float32"
            raise DataError(
                f"topk: row {row} of {name} {problem}; only finite rows can be ranked. Embed that "
                "item again, or drop the row"
            )


def _dtype_name(matrix: Array) -> str:
    return str(matrix.dtype).removeprefix("torch.")
