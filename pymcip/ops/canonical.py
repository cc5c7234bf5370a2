"""The canonical score of two rows: their inner product, with the same bits on every device.

    products q[d] c[d] of the inputs widened to fp32, in fp64: exact (24 + 24 bits), FMA or not
    16 lanes: lane l adds up, in order of d, the products with d % 16 == l, starting from +0
    then halves: for w in (8, 4, 2, 1): lane[l] += lane[l + w] for l < w
    score = float32(lane[0]) + 0        (rounded to nearest even; -0 becomes +0)

It differs from the exact inner product by the fp64 sum, at most (D / 16 + 4) 2^-53 |q| |c| and a
bit, and by its rounding to fp32. The top-k op ranks by it. Columns that D lacks to a multiple of 16
may be added as zeros: a lane never is -0, so that adding +-0 leaves it as it is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pymcip.ops.arrays import Array, device_of, matrix_pointer, to_fp32

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
        left, left_owner = matrix_pointer(queries)
        right, right_owner = matrix_pointer(bank)
        core.topk_scores(left, right, ids.ctypes.data, ids.shape[1], scores.ctypes.data)
        del left_owner, right_owner  # what the addresses point into
        return torch.from_numpy(scores) if isinstance(queries, torch.Tensor) else scores
    if isinstance(queries, np.ndarray) and isinstance(bank, np.ndarray):
        ids = ids.cpu().numpy() if isinstance(ids, torch.Tensor) else np.asarray(ids)
        scores = np.empty(ids.shape, dtype=np.float32)
        for rows, places in _blocks(ids.shape, queries):
            wanted = ids[rows, places]
            found = bank[np.maximum(wanted, 0)] if len(bank) else _zeros(wanted, queries)
            block = _sum_numpy(queries[rows, None], found)
            scores[rows, places] = np.where(wanted < 0, np.float32(-np.inf), block)
        return scores

    device = device_of(queries)
    compute = _fp64_device(device)
    ids = ids if isinstance(ids, torch.Tensor) else torch.from_numpy(np.array(ids, dtype=np.int64))
    out = torch.empty(ids.shape, dtype=torch.float32, device=compute)
    for rows, places in _blocks(ids.shape, queries):
        wanted = ids[rows, places]
        safe = wanted.clamp_min(0)
        if len(bank):
            found = _gather(bank, safe, compute)
        else:
            found = torch.zeros(*safe.shape, queries.shape[1], device=compute)
        out[rows, places] = _sum_torch(to_fp32(queries[rows], compute)[:, None], found)
        out[rows, places].masked_fill_(wanted.to(compute) < 0, -torch.inf)
    return out.to(device) if isinstance(queries, torch.Tensor) else out.numpy()


def canonical_pairs(
    queries: torch.Tensor, bank: Array, rows: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    """Scores fp32 [P] of queries[rows[p]] with bank[ids[p]].

    rows and ids are on the queries' device; the bank is there, too, or on the CPU.
    """
    compute = _fp64_device(queries.device)
    core = extension(queries, bank) is not None
    out = torch.empty(len(rows), dtype=torch.float32, device=compute)
    step = _pairs(2 * queries.shape[1])
    for first in range(0, len(rows), step):
        part = slice(first, first + step)
        left = queries[rows[part]]
        if core:
            out[part] = canonical_scores(left, bank, ids[part, None])[:, 0]
            continue
        right = _gather(bank, ids[part], compute)
        out[part] = _sum_torch(left.to(compute)[:, None], right[:, None])[:, 0]
    return out.to(queries.device)


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
        lanes = torch.zeros(len(block), LANES, dtype=torch.float64, device=compute)
        for start in range(0, rows.shape[1], LANES):
            part = block[:, start : start + LANES]
            lanes[:, : part.shape[1]].addcmul_(part, part)
        norms = _halved(lanes)[:, None].sqrt_()
        norms[norms == 0] = 1
        out[first : first + step] = block.div_(norms)
    return out


def canonical_matrix(queries: Array, bank: Array) -> Array:
    """All scores fp32 [N, M], for few queries or a block of the bank; see `canonical_scores`."""
    if isinstance(queries, np.ndarray) and isinstance(bank, np.ndarray):
        scores = np.empty((len(queries), len(bank)), dtype=np.float32)
        for rows, columns in _blocks(scores.shape, queries):
            scores[rows, columns] = _sum_numpy(queries[rows, None], bank[None, columns])
        return scores

    device = device_of(queries)
    compute = _fp64_device(device)
    out = torch.empty(len(queries), len(bank), dtype=torch.float32, device=compute)
    for rows, columns in _blocks((len(queries), len(bank)), queries):
        left, right = to_fp32(queries[rows], compute), to_fp32(bank[columns], compute)
        out[rows, columns] = _sum_torch(left[:, None], right[None])
    return out.to(device) if isinstance(queries, torch.Tensor) else out.numpy()


def canonical_topk(
    queries: Array, bank: Array, k: int, threshold: float = -np.inf
) -> tuple[np.ndarray, np.ndarray]:
    """What `topk` has to return, literally: the oracle that back ends are compared with."""
    matrix = canonical_matrix(queries, bank)
    matrix = matrix.cpu().numpy() if isinstance(matrix, torch.Tensor) else matrix
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


def _blocks(shape: Any, queries: Array) -> list[tuple[slice, slice]]:
    """Blocks of a matrix of pairs whose rows and lanes fit BLOCK_BYTES."""
    pairs = _pairs(queries.shape[1])
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


def _zeros(ids: np.ndarray, queries: np.ndarray) -> np.ndarray:
    return np.zeros((*ids.shape, queries.shape[1]), dtype=np.float32)


def _sum_numpy(queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """fp32 [n, k] of queries [n, 1, D] and rows [n or 1, k, D]."""
    columns = queries.shape[-1]
    lanes = np.zeros((len(queries), rows.shape[1], LANES))
    for start in range(0, columns, LANES):
        part = slice(start, start + LANES)
        # By way of fp32: NumPy's bfloat16 has no other way.
        left = queries[..., part].astype(np.float32).astype(np.float64)
        right = rows[..., part].astype(np.float32).astype(np.float64)
        lanes[..., : columns - start] += left * right
    for width in (8, 4, 2, 1):
        lanes = lanes[..., :width] + lanes[..., width : 2 * width]
    with np.errstate(over="ignore", under="ignore"):
        return lanes[..., 0].astype(np.float32) + np.float32(0)


def _sum_torch(queries: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Scores fp32 [n, k] of tensors, as `_sum_numpy` computes them."""
    columns = queries.shape[-1]
    lanes = torch.zeros(len(queries), rows.shape[1], LANES, dtype=torch.float64, device=rows.device)
    for start in range(0, columns, LANES):
        part = slice(start, start + LANES)
        left, right = queries[..., part].double(), rows[..., part].double()
        lanes[..., : columns - start].addcmul_(left, right)
    return _halved(lanes).float() + 0.0


def _halved(lanes: torch.Tensor) -> torch.Tensor:
    """Sums [...] of lanes [..., 16]."""
    for width in (8, 4, 2, 1):
        lanes = lanes[..., :width] + lanes[..., width : 2 * width]
    return lanes[..., 0]


def extension(queries: Array, bank: Array) -> Any:
    """The compiled extension, if it is there and takes these matrices; None otherwise.

    Its scores have the same bits.
    """
    for matrix in (queries, bank):
        if isinstance(matrix, torch.Tensor) and matrix.device.type != "cpu":
            return None
    if queries.shape[1] > _CORE_COLUMNS:
        return None
    try:
        from pymcip import _core
    except ImportError:
        return None
    return _core


def _gather(bank: Array, ids: torch.Tensor, device: torch.device) -> torch.Tensor:
    own = ids.to(bank.device) if isinstance(bank, torch.Tensor) else ids.cpu().numpy()
    return to_fp32(bank[own], device)
