"""What the back ends of `margin_softmax` are given and give, and what is the same for all of them.

What a back end does. Everything that is O(B + nnz) is done once for all back ends. The loss
needs two things of size B x C from them, both without a B x C matrix:

    sums       log Z_i [B] over the negatives, and cos_ip [nnz] of the positives
    gradients  from n_i (B numbers) and q_ip (nnz numbers) with
                   dL/dcos_ij = n_i exp(s cos_ij - log Z_i)  for negatives,   q_ip  for positives:
               the gradients with respect to the unit rows x_i and to W_j

They are called through two opaque operators of torch, see `pymcip.ops.margin_operators`.

Memory layout. Inputs may have any strides. The two operators, and nobody else, make every tensor
dense and row-major before a back end sees it, by a copy where it isn't; so a transposed or sliced W
costs a copy in each pass. A back end may rely on dense rows, but not on the address: where it needs
rows at multiples of 16 bytes, it looks, and copies.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

MIN_SIN_SQUARED = 1e-6
MIN_NORM = 1e-12
CELL_ROWS, CELL_COLUMNS = 128, 256  # the filter's granularity
HIGHEST_EXPONENT = 88.0  # exp(88) is finite in fp32 and bfloat16
# Positives are gathered in blocks of this many: [block, D] is the largest copy of bank rows.
POSITIVE_BLOCK = 65_536


@dataclass(frozen=True)
class Problem:
    """What a back end is given: unit rows, and the positives within the columns it holds.

    All tensors are dense and row-major, at any address; so are a `Coefficients`'.
    x: [B, D] unit rows, fp32 or fp64. w: [C, D] any norm, with `w_norms` [C] if they are known.
    rows, indices: int64 [nnz], the positives, ordered by row; indptr: int64 [B + 1].
    """

    x: Tensor
    w: Tensor
    w_norms: Tensor | None
    indptr: Tensor
    indices: Tensor
    rows: Tensor
    scale: float
    dtype: torch.dtype  # of the products' operands
    chunk: int
    scratch: int

    @property
    def cells(self) -> int:
        return -(-self.w.shape[0] // CELL_COLUMNS)


@dataclass(frozen=True)
class Coefficients:
    """dL/dcos_ij = negative_i exp(s cos_ij - log_z_i) of negatives, `positive` [nnz] of positives.

    `active`: bool [row blocks, cells], the cells that the filter keeps; None keeps all.
    """

    log_z: Tensor
    negative: Tensor
    positive: Tensor
    active: Tensor | None


class Sums(NamedTuple):
    """What `sums` returns; tensors that were not asked for or not kept are empty.

    log_z: [B]. cosine: [nnz]. shares: [B, cells], each cell's share of Z, in [0, 1].
    kept: what the back end hands to its own `gradients`.
    """

    log_z: Tensor
    cosine: Tensor
    shares: Tensor
    kept: list[Tensor]


# --- what is O(B + nnz) ---------------------------------------------------------------------------


def margin_logit(cosine: Tensor, margin: float, continuation: str) -> tuple[Tensor, Tensor]:
    """psi(cos t) = cos(t + m) and its derivative with respect to cos t, elementwise."""
    sin_squared = 1 - cosine * cosine
    sine = sin_squared.clamp_min(0).sqrt()
    value = cosine * math.cos(margin) - sine * math.sin(margin)
    clamped = sin_squared.clamp_min(MIN_SIN_SQUARED).sqrt()
    slope = math.cos(margin) + cosine * math.sin(margin) / clamped
    if continuation == "none":
        return value, slope
    if continuation == "linear":  # t + m <= pi
        inside, other = cosine >= -math.cos(margin), cosine - margin * math.sin(margin)
    else:
        inside, other = cosine > 0, cosine
    return torch.where(inside, value, other), torch.where(inside, slope, torch.ones_like(slope))


def row_sums(values: Tensor, indptr: Tensor) -> Tensor:
    """Add up the values [nnz] of each row: [B], in a fixed order (index_add on a GPU has none)."""
    return torch.segment_reduce(values, "sum", offsets=indptr, initial=0, unsafe=True)


def softplus(
    log_z: Tensor, logits: Tensor, weights: Tensor, indptr: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """The positives' losses [nnz] where they are apart, and their pulls [nnz], -dL/dlogits.

    A row's pulls add up to dL/dlog_z, in this form and in the other (without `repel`).
    """
    gap = log_z[rows] - logits
    return weights * torch.logaddexp(gap, torch.zeros_like(gap)), weights * torch.sigmoid(gap)


def negative_log_softmax(
    log_z: Tensor, logits: Tensor, weights: Tensor, indptr: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """The same where a row's positives compete: the denominator holds them too."""
    below = log_denominator(log_z, logits, indptr, rows)[rows] - logits  # -log p
    of_row = row_sums(weights, indptr)[rows]
    return weights * below, weights - of_row * (-below).exp()


def log_denominator(log_z: Tensor, logits: Tensor, indptr: Tensor, rows: Tensor) -> Tensor:
    """log D [B] of the rows where their positives compete: Z, and what the positives add to it."""
    highest = torch.segment_reduce(logits, "max", offsets=indptr, initial=-math.inf, unsafe=True)
    highest = finite(torch.maximum(log_z, highest))
    total = (log_z - highest).exp() + row_sums((logits - highest[rows]).exp(), indptr)
    return highest + total.log()


def through_norm(grad: Tensor, unit: Tensor, norms: Tensor) -> Tensor:
    """Gradient with respect to v of a function of v/|v|: project out v's direction, divide by |v|."""
    return (grad - (grad * unit).sum(1, keepdim=True) * unit) / norms


def finite(log_z: Tensor) -> Tensor:
    """Replace log Z = -inf by the lowest finite number.

    It is -inf for a row whose columns are all positives, which has no negatives.
    """
    return log_z.clamp_min(torch.finfo(log_z.dtype).min)


def positive_cosines(problem: Problem) -> Tensor:
    """The cosines cos_ip [nnz] of the positives, in the rows' dtype."""
    cosine = torch.empty(problem.indices.shape, dtype=problem.x.dtype, device=problem.x.device)
    for block, bank_rows in _positive_blocks(problem):
        cosine[block] = (problem.x[problem.rows[block]] * bank_rows).sum(1)
    return cosine


def add_positives(problem: Problem, positive: Tensor, grad_x: Tensor, grad_w: Tensor) -> None:
    """Add the positives' terms to both gradients, those that are not empty."""
    for block, bank_rows in _positive_blocks(problem):
        rows, pull = problem.rows[block], positive[block, None]
        if grad_x.numel():
            grad_x.index_add_(0, rows, pull * bank_rows)
        if grad_w.numel():
            grad_w.index_add_(0, problem.indices[block], pull * problem.x[rows])


def _positive_blocks(problem: Problem) -> Iterator[tuple[slice, Tensor]]:
    for start in range(0, problem.indices.numel(), POSITIVE_BLOCK):
        block = slice(start, start + POSITIVE_BLOCK)
        part = problem.w[problem.indices[block]].to(problem.x.dtype)
        yield block, part / part.norm(dim=1, keepdim=True).clamp_min(MIN_NORM)


# --- shards and the filter ------------------------------------------------------------------------


def over_shards(
    log_z: Tensor, found: Tensor, own: Tensor | None, group: Any
) -> tuple[Tensor, Tensor, int]:
    """log Z over all shards, the cosines of all positives, and how many processes there are."""
    from torch import distributed

    assert own is not None
    highest = log_z.clone()
    distributed.all_reduce(highest, distributed.ReduceOp.MAX, group=group)
    highest = finite(highest)
    total = (log_z - highest).exp()
    distributed.all_reduce(total, group=group)
    cosine = torch.zeros(own.shape, dtype=found.dtype, device=found.device)
    cosine[own] = found
    distributed.all_reduce(cosine, group=group)
    return total.log() + highest, cosine, distributed.get_world_size(group)


def lowest_over_shards(
    lowest: Tensor, column: Tensor, first: int, group: Any
) -> tuple[Tensor, Tensor]:
    """The lowest cosines [B] of all shards, and their columns in this one, -1 where another has them.

    Of equal ones the first column of the whole matrix is taken. column: int64 [B], -1 for none.
    """
    from torch import distributed

    last = torch.iinfo(column.dtype).max
    own = lowest.masked_fill(column < 0, math.inf)
    lowest = own.clone()
    distributed.all_reduce(lowest, distributed.ReduceOp.MIN, group=group)
    place = torch.where((own == lowest) & (column >= 0), column + first, last)
    best = place.clone()
    distributed.all_reduce(best, distributed.ReduceOp.MIN, group=group)
    return lowest, column.where(place == best, -1)


def choose_cells(shares: Tensor, delta: float) -> tuple[Tensor, Tensor]:
    """Choose the cells to keep, bool [row blocks, cells], and the mass [B] that goes with the others.

    A cell weighs what the row that needs it most has there, so the sum of the weights of the cells
    left out bounds what any row of the block loses.
    """
    count, cells = shares.shape
    blocks = -(-count // CELL_ROWS)
    padded = torch.nn.functional.pad(shares, (0, 0, 0, blocks * CELL_ROWS - count))
    weight = padded.view(blocks, CELL_ROWS, cells).amax(1)
    ordered, order = weight.sort(dim=1, stable=True)
    # cumsum's own rounding: at most (cells) u of the sum
    fits = ordered.cumsum(1) * (1 + cells * 2.0**-24) <= delta
    active = torch.zeros_like(fits).scatter_(1, order, ~fits)
    return active, mass_outside(shares, active)


def mass_outside(shares: Tensor, active: Tensor) -> Tensor:
    """The share of each row's softmax mass [B] that lies in cells that are not kept."""
    dropped = (~active).repeat_interleave(CELL_ROWS, dim=0)[: shares.shape[0]]
    return (shares * dropped).sum(1)
