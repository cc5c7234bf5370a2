"""`margin_softmax` on the CPU: matrix products of chunks in reused buffers, exp in place.

With compute="bfloat16" the products run on AMX or AVX-512 units where the CPU has them. As on the
GPU (see `pymcip.triton_kernels.margin_softmax`), E = exp(s cos) needs no running maximum while
s + ln C < 88, so that, with a frozen bank, the gradient of the rows is ready with Z, after two
products; with a trainable W, E is kept for the backward pass if it fits the scratch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pymcip.ops.margin_contract import (
    CELL_COLUMNS,
    CELL_ROWS,
    HIGHEST_EXPONENT,
    MIN_NORM,
    Coefficients,
    Problem,
    Sums,
    add_positives,
    finite,
    positive_cosines,
)


def _way(problem: Problem, need_x: bool, need_w: bool, need_shares: bool) -> str:
    """ "sums" (nothing kept), "one pass" (E W, for a frozen bank) or "kept" (E)."""
    rows, columns = problem.x.shape[0], problem.w.shape[0]
    if need_shares or problem.scale + math.log(max(columns, 1)) >= HIGHEST_EXPONENT:
        return "sums"
    if need_w:
        fits = problem.dtype.itemsize * rows * columns <= problem.scratch
        return "kept" if fits else "sums"
    return "one pass" if need_x else "sums"


def kept(
    problem: Problem, need_x: bool, need_w: bool, need_shares: bool
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of what `sums` keeps for `gradients`: E W, and E."""
    way = _way(problem, need_x, need_w, need_shares)
    (rows, dim), columns = problem.x.shape, problem.w.shape[0]
    return [
        ((rows, dim) if way == "one pass" else (0,), torch.float32),
        ((rows * columns,) if way == "kept" else (0,), problem.dtype),
    ]


def sums(problem: Problem, need_x: bool, need_w: bool, need_shares: bool) -> Sums:
    """log Z, the positives' cosines, the cells' shares of Z, and what `gradients` will use."""
    x, way = problem.x, _way(problem, need_x, need_w, need_shares)
    rows = len(x)
    products, exponentials = (
        torch.zeros(shape, dtype=dtype)
        for shape, dtype in kept(problem, need_x, need_w, need_shares)
    )
    work = _Work(problem)
    rounded = x.to(problem.dtype)
    total = torch.zeros(rows)
    log_z = torch.full((rows,), -math.inf)
    cells = []
    for block in _chunks(problem):
        unit = work.unit_rows(block.columns)
        logits = work.logits(rounded, unit, block)
        if way == "sums":
            log_z = torch.logaddexp(log_z, logits.logsumexp(1))
            if need_shares:
                cells += [part.logsumexp(1) for part in logits.split(CELL_COLUMNS, dim=1)]
            continue
        total += logits.exp_().sum(1)
        if way == "one pass":
            products += work.product("product", work.rounded(logits), unit)
        else:
            exponentials[rows * block.start : rows * block.end].view(rows, -1).copy_(logits)
    if way != "sums":
        log_z = total.log()
    shares = torch.empty(rows, 0)
    if need_shares:
        shares = (torch.stack(cells, 1) - finite(log_z)[:, None]).exp_()
    return Sums(log_z, positive_cosines(problem), shares, [products, exponentials])


def gradients(
    problem: Problem, coefficients: Coefficients, kept: list[Tensor], need_x: bool, need_w: bool
) -> tuple[Tensor, Tensor]:
    """Gradients with respect to the unit rows and to W, from what was kept or computed again."""
    products, exponentials = kept
    x, w, rows = problem.x, problem.w, len(problem.x)
    log_z, negative = coefficients.log_z, coefficients.negative
    # What turns a row of E = exp(s cos) into the derivatives with respect to the cosines.
    row_scale = torch.where(log_z.isinf(), 0.0, negative * (-log_z).exp())
    grad_x = torch.zeros_like(x) if need_x else torch.empty(0)
    make = torch.empty if coefficients.active is None else torch.zeros
    grad_w = make(w.shape if need_w else 0, dtype=torch.float32)
    if products.numel():
        grad_x += row_scale[:, None] * products
        add_positives(problem, coefficients.positive, grad_x, grad_w)
        return grad_x, grad_w

    work = _Work(problem)
    anew = not exponentials.numel()
    if anew:
        rounded, row_scale = x.to(problem.dtype), negative
    weighted = (row_scale[:, None] * x).to(problem.dtype)
    blocks = _chunks(problem) if coefficients.active is None else _cells(problem, coefficients)
    for block in blocks:
        here = block.rows
        unit = work.unit_rows(block.columns)
        if anew:
            logits = work.logits(rounded[here], unit, block)
            e = work.rounded(logits.sub_(finite(log_z[here])[:, None]).exp_())
        else:
            e = exponentials[rows * block.start : rows * block.end].view(rows, -1)
        if need_x:
            grad_x[here] += row_scale[here, None] * work.product("product", e, unit)
        if need_w:
            product = work.product("columns", e.T, weighted[here])
            if coefficients.active is None:  # this chunk's columns are done, and still in the cache
                grad = grad_w[block.columns].copy_(product)
                positive = coefficients.positive[block.entries, None]
                grad.index_add_(0, block.positive_columns, positive * x[block.positive_rows])
                _through_norm(grad, work.unit, work.lengths)
            else:
                grad_w[block.columns] += product
    if coefficients.active is None:
        add_positives(problem, coefficients.positive, grad_x, torch.empty(0))
        return grad_x, grad_w.to(w.dtype)
    add_positives(problem, coefficients.positive, grad_x, grad_w)
    if need_w:
        for block in _chunks(problem):
            work.unit_rows(block.columns)
            _through_norm(grad_w[block.columns], work.unit, work.lengths)
    return grad_x, grad_w.to(w.dtype)


def _through_norm(grad: Tensor, unit: Tensor, lengths: Tensor) -> None:
    """As `through_norm` of the contract's module, in place; `unit` is fp32 [n, D], lengths [n]."""
    along = torch.linalg.vecdot(grad, unit)
    grad.addcmul_(unit, along[:, None], value=-1).div_(lengths[:, None])


# --- blocks of the matrix, and the buffers they are worked on in --------------------------------


@dataclass(frozen=True)
class _Block:
    """Some rows, some columns, and the places of the positives among them."""

    rows: slice
    columns: slice | Tensor
    positive_rows: Tensor
    positive_columns: Tensor
    entries: Tensor  # which of all positives these are
    start: int = 0
    end: int = 0


def _chunks(problem: Problem) -> Iterator[_Block]:
    """All rows, a chunk of columns at a time."""
    for start in range(0, problem.w.shape[0], problem.chunk):
        end = min(start + problem.chunk, problem.w.shape[0])
        here = (problem.indices >= start) & (problem.indices < end)
        yield _Block(
            slice(0, problem.x.shape[0]),
            slice(start, end),
            problem.rows[here],
            problem.indices[here] - start,
            here.nonzero().flatten(),
            start,
            end,
        )


def _cells(problem: Problem, coefficients: Coefficients) -> Iterator[_Block]:
    """For each block of rows the columns of its active cells, a chunk at a time."""
    assert coefficients.active is not None
    columns = problem.w.shape[0]
    at_once = max(1, problem.chunk // CELL_COLUMNS)
    for number, mask in enumerate(coefficients.active):
        rows = slice(number * CELL_ROWS, min((number + 1) * CELL_ROWS, problem.x.shape[0]))
        first, last = int(problem.indptr[rows.start]), int(problem.indptr[rows.stop])
        own_rows = problem.rows[first:last] - rows.start
        own = problem.indices[first:last]
        for cells in mask.nonzero().flatten().split(at_once):
            ids = (cells[:, None] * CELL_COLUMNS + torch.arange(CELL_COLUMNS)).flatten()
            ids = ids[ids < columns]
            place = torch.full((problem.cells,), -1)
            place[cells] = torch.arange(len(cells))
            where = place[own // CELL_COLUMNS]
            here = where >= 0
            local = where[here] * CELL_COLUMNS + own[here] % CELL_COLUMNS
            entries = first + here.nonzero().flatten()
            yield _Block(rows, ids, own_rows[here], local, entries)


class _Work:
    """Buffers that every block of a call uses again."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.unit = self.lengths = torch.empty(0)  # of the rows that unit_rows gave last, in fp32
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """The buffer of that name."""
        size = shape[0] * shape[1]
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[name] = torch.empty(size, dtype=dtype)
        return buffer[:size].view(shape)

    def product(self, name: str, left: Tensor, right: Tensor) -> Tensor:
        """Left times right, in the buffer of that name."""
        shape = left.shape[0], right.shape[1]
        return torch.mm(left, right, out=self.take(name, shape, left.dtype))

    def unit_rows(self, columns: slice | Tensor) -> Tensor:
        """Rows of W, normalised in fp32, in the products' dtype; valid until the next call."""
        problem = self.problem
        part = problem.w[columns]
        shape = part.shape[0], part.shape[1]
        self.unit = self.take("unit", shape, torch.float32).copy_(part)
        if problem.w_norms is None:
            norms = torch.linalg.vector_norm(self.unit, dim=1)
        else:
            norms = problem.w_norms[columns].float()
        self.lengths = norms.clamp_min(MIN_NORM)
        self.unit.div_(self.lengths[:, None])
        if problem.dtype == torch.float32:
            return self.unit
        return self.take("rounded unit", shape, problem.dtype).copy_(self.unit)

    def logits(self, rounded: Tensor, unit: Tensor, block: _Block) -> Tensor:
        """s cos of a block in fp32, -inf at its positives; valid until the next call."""
        if unit.dtype == torch.float32:
            result = self.product("logits", rounded, unit.T)
        else:
            cosines = self.product("cosines", rounded, unit.T)
            shape = cosines.shape[0], cosines.shape[1]
            result = self.take("logits", shape, torch.float32).copy_(cosines)
        result.mul_(self.problem.scale)
        result[block.positive_rows, block.positive_columns] = -math.inf
        return result

    def rounded(self, values: Tensor) -> Tensor:
        """The values in the products' dtype."""
        if values.dtype == self.problem.dtype:
            return values
        shape = values.shape[0], values.shape[1]
        return self.take("cosines", shape, self.problem.dtype).copy_(values)
