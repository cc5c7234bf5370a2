"""The reference implementation of `margin_softmax`: plain torch, one chunk of columns at a time, on any device."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from pymcip.ops.margin_contract import (
    CELL_COLUMNS,
    CELL_ROWS,
    MIN_NORM,
    Coefficients,
    Problem,
    Sums,
    add_positives,
    finite,
    positive_cosines,
    through_norm,
)


def kept(
    problem: Problem, need_x: bool, need_w: bool, need_shares: bool
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of what `sums` keeps for `gradients`: nothing."""
    return []


def sums(problem: Problem, need_x: bool, need_w: bool, need_shares: bool) -> Sums:
    """log Z, the positives' cosines, and the cells' shares of Z."""
    x = problem.x
    log_z = x.new_full((x.shape[0],), -math.inf)
    cells = []
    for start, columns in _unit_chunks(problem):
        logits = _logits(problem, start, columns)
        log_z = torch.logaddexp(log_z, logits.logsumexp(1))
        if need_shares:
            cells += [part.logsumexp(1) for part in logits.split(CELL_COLUMNS, dim=1)]
    shares = x.new_empty(x.shape[0], 0)
    if need_shares:
        shares = (torch.stack(cells, 1) - finite(log_z)[:, None]).exp_()
    return Sums(log_z, positive_cosines(problem), shares, [])


def gradients(
    problem: Problem, coefficients: Coefficients, kept: list[Tensor], need_x: bool, need_w: bool
) -> tuple[Tensor, Tensor]:
    """Gradients with respect to the unit rows and to W; the logits are computed anew."""
    x, w = problem.x, problem.w
    log_z, active = finite(coefficients.log_z)[:, None], coefficients.active
    grad_x = torch.zeros_like(x) if need_x else x.new_empty(0)
    grad_w = torch.zeros(w.shape if need_w else 0, dtype=x.dtype, device=x.device)
    for start, columns in _unit_chunks(problem):
        grad = (_logits(problem, start, columns) - log_z).exp_()
        grad.mul_(coefficients.negative[:, None])
        if active is not None:
            first = start // CELL_COLUMNS
            keep = active[:, first : first + -(-columns.shape[0] // CELL_COLUMNS)]
            keep = keep.repeat_interleave(CELL_ROWS, 0)[: x.shape[0]]
            grad.mul_(keep.repeat_interleave(CELL_COLUMNS, 1)[:, : columns.shape[0]])
        grad = grad.to(problem.dtype)
        if need_x:
            grad_x += grad @ columns.to(problem.dtype)
        if need_w:
            grad_w[start : start + columns.shape[0]] = grad.T @ x.to(problem.dtype)
    add_positives(problem, coefficients.positive, grad_x, grad_w)
    if need_w:
        for start in range(0, w.shape[0], problem.chunk):
            part = slice(start, start + problem.chunk)
            values = w[part].to(x.dtype)
            lengths = values.norm(dim=1, keepdim=True).clamp_min(MIN_NORM)
            grad_w[part] = through_norm(grad_w[part], values / lengths, lengths)
    return grad_x, grad_w.to(w.dtype)


def farthest(problem: Problem) -> Tensor:
    """The column int64 [B] of each row's lowest cosine among its negatives; -1 where it has none."""
    lowest = problem.x.new_full((problem.x.shape[0],), math.inf)
    column = torch.full_like(problem.indptr[1:], -1)
    for start, columns in _unit_chunks(problem):
        logits = _logits(problem, start, columns)
        value, place = logits.masked_fill_(logits == -math.inf, math.inf).min(1)
        column = torch.where(value < lowest, place + start, column)
        lowest = torch.minimum(value, lowest)
    return column


def _unit_chunks(problem: Problem) -> Iterator[tuple[int, Tensor]]:
    """Unit rows of W in the rows' dtype, a chunk at a time, each with its first column's index."""
    w, norms, chunk = problem.w, problem.w_norms, problem.chunk
    for start in range(0, w.shape[0], chunk):
        part = w[start : start + chunk].to(problem.x.dtype)
        lengths = part.norm(dim=1) if norms is None else norms[start : start + chunk]
        yield start, part / lengths.to(part.dtype).clamp_min(MIN_NORM)[:, None]


def _logits(problem: Problem, start: int, columns: Tensor) -> Tensor:
    """s cos of all rows and of unit columns from `start`, -inf at the positives."""
    x, rows, indices = problem.x, problem.rows, problem.indices
    product = x.to(problem.dtype) @ columns.to(problem.dtype).T
    logits = product.to(x.dtype).mul_(problem.scale)
    here = (indices >= start) & (indices < start + logits.shape[1])
    logits[rows[here], indices[here] - start] = -math.inf
    return logits
