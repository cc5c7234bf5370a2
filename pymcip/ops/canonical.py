"""The canonical score of two rows: their inner product, with the same bits on every device.

    products q[d] c[d] of the inputs widened to fp32, in fp64: exact (24 + 24 bits), FMA or not
    16 lanes: lane l adds up, in order of d, the products with d % 16 == l, starting from +0
    then halves: for w in (8, 4, 2, 1): lane[l] += lane[l + w] for l < w
    score = float32(lane[0]) + 0        (rounded to nearest even; -0 becomes +0)

It differs from the exact inner product by the error of the fp64 sum, at most about (D / 16 + 4) 2^-53
|q| |c|, and by its rounding to fp32. The top-k op ranks by it. Columns that D lacks to a multiple of 16
may be added as zeros: a lane never is -0, so that adding +-0 leaves it as it is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pymcip.ops.arrays import Array, as_numpy, device_of, matrix_pointer, to_fp32

LANES = 16
_CORE_COLUMNS = 4096  # kMostColumns of csrc/topk.hpp
BLOCK_BYTES = 1 << 24  # of the rows gathered and of what is computed from them, at a time


def canonical_scores(queries: Array, bank: Array, ids: Array) -> Array:
    """Scores fp32 [N, K] of query n with the bank rows ids[n]; a negative id's score is -inf.

    queries [N, D], bank [M, D]: NumPy arrays, memory maps or torch tensors of float32, float16 or
        bfloat16 with finite values, any strides; the bank on the queries' device or on the CPU.
    ids: integers [N, K], NumPy or torch on any device, below M.
    The scores are of the kind of `queries` and on its device; a device without fp64 has the CPU
    compute them. Extra memory: about 16 MiB.
    """
    core = extension(queries, bank)
    if core is not None:
        ids = ids.cpu().numpy() if isinstance(ids, torch.Tensor) else ids
        ids = np.ascontiguousarray(ids, dtype=np.int64)
        scores = np.empty(ids.shape, dtype=np.float32)
        pointers, owners = zip(matrix_pointer(queries), matrix_pointer(bank), strict=True)
        core.topk_scores(*pointers, ids.ctypes.data, ids.shape[1], scores.ctypes.data)
        del owners  # what the addresses point into
        return torch.from_numpy(scores) if isinstance(queries, torch.Tensor) else scores
    compute = _fp64_device(device_of(queries))
    ids = ids if isinstance(ids, torch.Tensor) else torch.from_numpy(np.array(ids, dtype=np.int64))
    out = torch.full(ids.shape, -torch.inf, dtype=torch.float32, device=compute)
    for rows, places in _blocks(ids.shape, queries.shape[1]) if len(bank) else ():
        wanted = ids[rows, places]
        safe: Any = wanted.clamp_min(0)
        safe = safe.to(bank.device) if isinstance(bank, torch.Tensor) else safe.cpu().numpy()
        left, right = to_fp32(queries[rows], compute), to_fp32(bank[safe], compute)
        block = _scores(left[:, None], right)
        out[rows, places] = block.masked_fill_(wanted.to(compute) < 0, -torch.inf)
    return out.to(queries.device) if isinstance(queries, torch.Tensor) else out.numpy()


def canonical_pairs(
    queries: torch.Tensor, bank: Array, rows: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    """Scores fp32 [P] of queries[rows[p]] with bank[ids[p]].

    rows and ids are on the queries' device; the bank is there, too, or on the CPU.
    """
    out = torch.empty(len(rows), dtype=torch.float32, device=queries.device)
    step = _pairs(2 * queries.shape[1])
    for first in range(0, len(rows), step):
        part = slice(first, first + step)
        out[part] = canonical_scores(queries[rows[part]], bank, ids[part, None])[:, 0]
    return out


def canonical_unit(rows: torch.Tensor) -> torch.Tensor:
    """Rows fp32 [N, D] divided by their norms; a row of zeros stays one.

    Norms are fp64 roots of sums in the score's order, and the quotients are rounded once, so that
    the bits are the same on every device. One without fp64 has the CPU compute them.
    """
    compute = _fp64_device(rows.device)
    out = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
    step = _pairs(2 * rows.shape[1])
    for first in range(0, len(rows), step):
        block = rows[first : first + step].to(compute).double()
        norms = _sums(block, block)[:, None].sqrt_()
        norms[norms == 0] = 1
        out[first : first + step] = block.div_(norms)
    return out


def canonical_matrix(queries: Array, bank: Array) -> Array:
    """All scores fp32 [N, M], for few queries or a block of the bank; see `canonical_scores`."""
    compute = _fp64_device(device_of(queries))
    out = torch.empty(len(queries), len(bank), dtype=torch.float32, device=compute)
    for rows, columns in _blocks(out.shape, queries.shape[1]):
        left, right = to_fp32(queries[rows], compute), to_fp32(bank[columns], compute)
        out[rows, columns] = _scores(left[:, None], right[None])
    return out.to(queries.device) if isinstance(queries, torch.Tensor) else out.numpy()


def canonical_topk(
    queries: Array, bank: Array, k: int, threshold: float = -np.inf
) -> tuple[np.ndarray, np.ndarray]:
    """What `topk` has to return, literally: the oracle that back ends are compared with."""
    matrix = as_numpy(canonical_matrix(queries, bank))
    ids = np.broadcast_to(np.arange(matrix.shape[1]), matrix.shape)
    return first_k(ids, matrix, k, float(np.float32(threshold)))


def first_k(
    ids: np.ndarray, scores: np.ndarray, k: int, threshold: float = -np.inf
) -> tuple[np.ndarray, np.ndarray]:
    """Rank what was found for each query: by score descending, then by id ascending.

    Args:
        ids: int64 [N, K], each at most once for a query; -1 where there is none.
        scores: float32 [N, K].
        k: places per query.
        threshold: lowest score admitted.

    Returns:
        The first k ids and scores [N, k]; -1 and -inf in places that stay empty.
    """
    reached = (ids >= 0) & (scores >= threshold)
    ids = np.where(reached, ids, -1)
    scores = np.where(reached, scores, np.float32(-np.inf))
    order = np.lexsort((ids, -scores), axis=-1)[:, :k]
    missing = ((0, 0), (0, k - order.shape[1]))
    return (
        np.pad(np.take_along_axis(ids, order, axis=1), missing, constant_values=-1),
        np.pad(np.take_along_axis(scores, order, axis=1), missing, constant_values=-np.inf),
    )


def _blocks(shape: Any, dim: int) -> list[tuple[slice, slice]]:
    """Blocks of a matrix of pairs whose rows and lanes fit BLOCK_BYTES."""
    pairs = _pairs(dim)
    width = max(1, min(shape[1], pairs))
    height = max(1, pairs // width)
    return [
        (slice(first, first + height), slice(start, start + width))
        for first in range(0, shape[0], height)
        for start in range(0, shape[1], width)
    ]


def _pairs(columns: int) -> int:
    """How many pairs fit BLOCK_BYTES, if for each of them so many elements are gathered."""
    # A row as it is and widened to fp32; its lanes, their addends and the halves in fp64.
    return max(1, BLOCK_BYTES // (8 * columns + 4 * 8 * LANES))


def _fp64_device(device: torch.device) -> torch.device:
    """The device, or the CPU instead of one that may lack fp64 (MPS, some of Intel's)."""
    return device if device.type in ("cpu", "cuda") else torch.device("cpu")


def _scores(queries: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Scores fp32 [...] of tensors [..., D] that broadcast."""
    return _sums(queries, rows).float() + 0.0


def _sums(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The sums before they are rounded, fp64 [...]."""
    shape = torch.broadcast_shapes(left.shape[:-1], right.shape[:-1])
    lanes = torch.zeros(*shape, LANES, dtype=torch.float64, device=left.device)
    for start in range(0, left.shape[-1], LANES):
        first, second = (x[..., start : start + LANES].double() for x in (left, right))
        lanes[..., : first.shape[-1]].addcmul_(first, second)
    for width in (8, 4, 2, 1):
        lanes = lanes[..., :width] + lanes[..., width : 2 * width]
    return lanes[..., 0]


def extension(queries: Array, bank: Array) -> Any:
    """The compiled extension, if it takes these matrices, with the same bits; None otherwise."""
    on_cpu = device_of(queries).type == device_of(bank).type == "cpu"
    if not on_cpu or queries.shape[1] > _CORE_COLUMNS:
        return None
    try:
        from pymcip import _core
    except ImportError:
        return None
    return _core


def joined_best(
    ids: torch.Tensor, scores: torch.Tensor, more_ids: torch.Tensor, more_scores: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best of two rankings [N, k], of which the second has the higher ids."""
    # A stable sort keeps ties in the order of their ids.
    found, order = torch.cat([scores, more_scores], 1).sort(dim=1, descending=True, stable=True)
    k = ids.shape[1]
    return torch.cat([ids, more_ids], 1).gather(1, order[:, :k]), found[:, :k]
