"""Triton kernels of `margin_softmax` (contract: `pymcip.ops.margin_softmax`).

Bottom-up: the kernels, their launchers, and `sums` and `gradients`, which the op calls.

    exponentials_kernel   one product: E = exp(s cos), row sums per group of columns, E if asked for
    rows_kernel           E W:   the gradients of the rows, split over columns, partials in fp32
    columns_kernel        E'X:   the gradients of the columns; a tile of columns has one owner
    prepare_kernel        X and W as unit rows in the products' dtype
    project_kernel        dW through the norms of W's rows
    insert_kernel         the positives' elements of E, for the product with X
    cosines_kernel, finish_kernel   what concerns positives, one by one, summed in fp32

There are no atomics, and every sum has a fixed order: two runs give the same bits.

Three ways, by what is asked for:

    one pass (frozen bank, gradient of x only): E is written by chunks of columns and consumed at
        once by `rows_kernel`, so the gradient is ready, but for a scale per row, when Z is. Two
        products. It needs E unnormalised, so s + ln C < 88 and bfloat16.
    kept (gradient of w too, and 2 B C bytes fit the scratch): E stays for the backward pass. Three.
    anew (everything else): the backward pass computes exp(s cos - log Z) again, by chunks. Four
        with dW, three without; under the filter only for active cells.

No running maximum is needed while s + ln C < 88, as |cos| <= 1; above that the sums keep one.

What bounds them, on an H100 or H200, by arithmetic. Per cycle a processor makes 4096 FLOP of bf16
products and 16 exponentials, and gets at most 64 bytes from L2; its share of HBM is 13 bytes (H200:
18). Per tile of 128 x 256, at D = 768 and B = 4096:

    exponentials_kernel   the tensor cores, 12,288 cycles, beside 576 KB from L2: 48 bytes a cycle
        (tiles of 128 x 128 need 64, all that there is). Then an epilogue that overlaps with no
        product, as a processor runs one program: 2,048 cycles of exp2 on the special units, and
        about as many of the fp32 lanes beside them. So 1.15 to 1.3 times a plain product.
    rows_kernel           the tensor cores, 1,024 cycles per 64 columns, beside 48 KB from L2. E comes
        from HBM once, as the D / 256 programs that read a part of it run together: 2 B C bytes,
        0.24 of the products' time on an H200. The sums cost 8 B D bytes per split and chunk.
    columns_kernel        the tensor cores, 65,536 cycles, and L2 as above; then it writes 128 KB, 7,300
        cycles of its share of HBM.
    prepare, project      HBM: 6 C D and 12 C D bytes, 0.13 and 0.27 of one product's time (H200).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pymcip.ops.margin_contract import (
    CELL_COLUMNS,
    CELL_ROWS,
    HIGHEST_EXPONENT,
    MIN_NORM,
    Coefficients,
    Problem,
    Sums,
    finite,
)
from pymcip.triton_kernels.tuning import INTERPRETED, Config, capability, launch, tiles

LOG2E = math.log2(math.e)
# Among the elements of E that is kept stand the positives' own, up to 1e3 Z (their slope's bound).
HIGHEST_KEPT = HIGHEST_EXPONENT - 8
HALF_OFFSET = {torch.bfloat16: 0.0, torch.float16: 6.0}  # P 2^6 keeps more of fp16's small values
GROUP = 2048  # columns of one program of exponentials_kernel, where no single cells are asked for
MAX_SPLITS = 16
# FLOP of products in the time that memory moves a byte: H100 260, H200 180, A100 160.
INTENSITY = 200
ENTRIES = 256  # of one program of insert_kernel
VECTOR = tl.constexpr(16)  # elements; Triton compiles wide loads for multiples of it

# --- kernels ----------------------------------------------------------------------------------


@triton.jit
def load_tile(
    source,  # a tensor descriptor if TMA, else a pointer
    row,
    column,
    rows,
    columns,
    stride,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    TMA: tl.constexpr,
    FP32: tl.constexpr,
):
    """Tile [HEIGHT, WIDTH] at (row, column), zero outside of [rows, columns]."""
    if TMA:
        tile = source.load([row, column])
    else:
        row_ids = tl.arange(0, HEIGHT)
        column_ids = tl.arange(0, WIDTH)
        corner = source + (row.to(tl.int64) * stride + column)  # 64 bits in scalars only
        inside = (row_ids < rows - row)[:, None] & (column_ids < columns - column)[None, :]
        tile = tl.load(
            corner + (row_ids[:, None] * stride + column_ids[None, :]), mask=inside, other=0.0
        )
    if FP32:  # Triton's interpreter gets 16-bit products wrong
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def half_of(tile, half: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left (0) or right (1) half of a tile, without moving data between threads.

    An epilogue takes one after the other: what it keeps per column is half as many registers.
    """
    left, right = tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
    return left if half == 0 else right


# Numbers that vary from call to call are no reason to compile again.
@triton.jit(
    do_not_specialize=["sums_ptr", "maxima_ptr", "rows", "first", "columns", "cells", "row_tiles"]
)
def exponentials_kernel(
    x_tiles,  # [B, D] unit rows; this and the next two: tensor descriptors if TMA, else pointers
    w_tiles,  # [C, D]
    e_tiles,  # [B, columns] E, if STORE
    factor_ptr,  # [B] s log2 e / |x_i|, of the rows as rounded
    inverse_ptr,  # [C] 1 / |w_j|, of the rows as rounded
    offset_ptr,  # [B] added to the exponent, if OFFSET
    sums_ptr,  # [groups, B], if SUMS
    maxima_ptr,  # [groups, B], if ONLINE
    cell_start_ptr,  # [row blocks x cells + 1] where a cell's positives start
    entry_row_ptr,  # [nnz] rows and columns of the positives, ordered by cell
    entry_column_ptr,
    active_ptr,  # [row blocks, cells], if FILTER
    rows,  # B
    first,  # the first column, a multiple of the cells' width
    columns,  # how many from there
    cells,  # of all C
    e_stride,
    row_tiles,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    WIDTH: tl.constexpr,  # columns of one program
    BLOCK_ROWS: tl.constexpr,
    CELL: tl.constexpr,
    SUMS: tl.constexpr,
    ONLINE: tl.constexpr,
    STORE: tl.constexpr,
    RAW: tl.constexpr,  # W is no rounded unit rows
    OFFSET: tl.constexpr,
    FILTER: tl.constexpr,
    TMA: tl.constexpr,
    FP32_DOT: tl.constexpr,
):
    WIDE: tl.constexpr = BN // 2
    first = tl.multiple_of(first, CELL)
    pid = tl.program_id(0)  # row tiles fastest: programs that run together share columns
    row_tile = pid % row_tiles
    group = pid // row_tiles
    row = row_tile * BM
    row_ids = row + tl.arange(0, BM)
    inside = row_ids < rows
    begin = group * WIDTH
    tiles = tl.minimum(WIDTH // BN, tl.cdiv(columns - begin, BN))
    factor = tl.load(factor_ptr + row_ids, mask=inside, other=0.0)
    row_sum = tl.zeros((BM,), tl.float32)
    row_max = tl.full((BM,), float("-inf"), tl.float32)
    if OFFSET:
        offset = tl.load(offset_ptr + row_ids, mask=inside, other=0.0)
    for tile in tl.range(0, tiles):
        column = begin + tile * BN
        cell = (row // BLOCK_ROWS).to(tl.int64) * cells + (first + column) // CELL
        wanted = True
        if FILTER:
            wanted = tl.load(active_ptr + cell) != 0
        if wanted:
            product = tl.zeros((BM, BN), tl.float32)
            for k in tl.range(0, D, BK):
                x = load_tile(x_tiles, row, k, rows, D, D, BM, BK, TMA, FP32_DOT)
                w = load_tile(
                    w_tiles, first + column, k, first + columns, D, D, BN, BK, TMA, FP32_DOT
                )
                product = tl.dot(x, w.T, product)
            start = tl.load(cell_start_ptr + cell)
            end = tl.load(cell_start_ptr + cell + 1)
            for half in tl.static_range(2):
                corner = column + half * WIDE
                column_ids = corner + tl.arange(0, WIDE)
                inverse = tl.load(
                    inverse_ptr + first + column_ids, mask=column_ids < columns, other=0.0
                )
                exponent = half_of(product, half, BM, BN) * inverse[None, :] * factor[:, None]
                if OFFSET:
                    exponent += offset[:, None]
                if corner + WIDE > columns:
                    exponent = tl.where((column_ids < columns)[None, :], exponent, float("-inf"))
                for entry in tl.range(start, end):
                    its_row = tl.load(entry_row_ptr + entry)
                    its_column = tl.load(entry_column_ptr + entry) - first
                    hit = (row_ids == its_row)[:, None] & (column_ids == its_column)[None, :]
                    exponent = tl.where(hit, float("-inf"), exponent)
                if ONLINE:
                    higher = tl.maximum(row_max, tl.max(exponent, 1))
                    safe = tl.where(higher == float("-inf"), 0.0, higher)
                    row_sum = row_sum * tl.exp2(row_max - safe)
                    row_sum += tl.sum(tl.exp2(exponent - safe[:, None]), 1)
                    row_max = higher
                else:
                    e = tl.exp2(exponent)
                    if SUMS:
                        row_sum += tl.sum(e, 1)
                    if STORE:
                        if RAW:  # so that E times these rows of W is E times unit rows
                            e = e * inverse[None, :]
                        if TMA:
                            e_tiles.store([row, corner], e.to(e_tiles.dtype))
                        else:  # with zeros up to the end of the tile, as far as rows of E reach
                            place = row_ids.to(tl.int64)[:, None] * e_stride + column_ids[None, :]
                            within = inside[:, None] & (column_ids < e_stride)[None, :]
                            e = e.to(e_tiles.dtype.element_ty)
                            tl.store(e_tiles + place, e, mask=within)
    if SUMS:
        place = group.to(tl.int64) * rows + row_ids
        tl.store(sums_ptr + place, row_sum, mask=inside)
        if ONLINE:
            tl.store(maxima_ptr + place, row_max, mask=inside)


@triton.jit(do_not_specialize=["rows", "first", "columns", "cells", "row_tiles", "splits", "held"])
def rows_kernel(
    e_tiles,  # [B, columns]
    w_tiles,  # [C, D]
    out_ptr,  # [splits, B, D] fp32
    list_ptr,  # [row blocks, cells of this chunk] the active cells first, if FILTER
    count_ptr,  # [row blocks] how many of them
    rows,
    first,
    columns,
    cells,  # of this chunk
    e_stride,
    row_tiles,
    splits,
    held,  # rows of `out` that hold sums of earlier chunks: all, or none
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    CELL: tl.constexpr,
    FILTER: tl.constexpr,
    TMA: tl.constexpr,
    FP32_DOT: tl.constexpr,
):
    pid = tl.program_id(0)  # dims fastest: programs that run together share E
    DIM_TILES: tl.constexpr = (D + BN - 1) // BN
    SUB: tl.constexpr = CELL // BK
    dim = (pid % DIM_TILES) * BN
    row = (pid // DIM_TILES) % row_tiles * BM
    split = pid // (DIM_TILES * row_tiles)
    row_ids = row + tl.arange(0, BM)
    vectors = tl.cdiv(columns, VECTOR) * VECTOR  # of E: zeros follow the last column up to there
    total = tl.zeros((BM, BN), tl.float32)
    block = row // BLOCK_ROWS
    if FILTER:
        steps = tl.load(count_ptr + block) * SUB
    else:
        steps = tl.cdiv(columns, BK)
    each = tl.cdiv(steps, splits)
    for step in tl.range(split * each, tl.minimum(steps, split * each + each)):
        if FILTER:
            cell = tl.load(list_ptr + block * cells + step // SUB)
            column = cell * CELL + step % SUB * BK
        else:
            column = step * BK
        e = load_tile(e_tiles, row, column, rows, vectors, e_stride, BM, BK, TMA, FP32_DOT)
        w = load_tile(w_tiles, first + column, dim, first + columns, D, D, BK, BN, TMA, FP32_DOT)
        total = tl.dot(e, w, total)
    for half in tl.static_range(2):
        dim_ids = dim + half * (BN // 2) + tl.arange(0, BN // 2)
        place = (split.to(tl.int64) * rows + row_ids)[:, None] * D + dim_ids[None, :]
        wanted = (dim_ids < D)[None, :]
        before = tl.load(out_ptr + place, mask=(row_ids < held)[:, None] & wanted, other=0.0)
        total_half = before + half_of(total, half, BM, BN)
        tl.store(out_ptr + place, total_half, mask=(row_ids < rows)[:, None] & wanted)


@triton.jit(do_not_specialize=["rows", "first", "columns", "row_blocks"])
def columns_kernel(
    e_tiles,  # [B, columns]
    x_tiles,  # [B, D] rows, each with its coefficient
    out_ptr,  # [C, D] fp32
    list_ptr,  # [cells of this chunk, row blocks] the active blocks first, if FILTER
    count_ptr,  # [cells of this chunk] how many of them
    rows,
    first,
    columns,
    e_stride,
    row_blocks,
    D: tl.constexpr,
    BM: tl.constexpr,  # columns of W
    BN: tl.constexpr,  # dims
    BK: tl.constexpr,  # rows of X
    BLOCK_ROWS: tl.constexpr,
    CELL: tl.constexpr,
    FILTER: tl.constexpr,
    TMA: tl.constexpr,
    FP32_DOT: tl.constexpr,
):
    pid = tl.program_id(0)
    DIM_TILES: tl.constexpr = (D + BN - 1) // BN
    SUB: tl.constexpr = BLOCK_ROWS // BK
    dim = (pid % DIM_TILES) * BN
    column = pid // DIM_TILES * BM
    vectors = tl.cdiv(columns, VECTOR) * VECTOR
    total = tl.zeros((BM, BN), tl.float32)
    if FILTER:
        steps = tl.load(count_ptr + column // CELL) * SUB
    else:
        steps = tl.cdiv(rows, BK)
    for step in tl.range(0, steps):
        if FILTER:
            block = tl.load(list_ptr + column // CELL * row_blocks + step // SUB)
            row = block * BLOCK_ROWS + step % SUB * BK
        else:
            row = step * BK
        e = load_tile(e_tiles, row, column, rows, vectors, e_stride, BK, BM, TMA, FP32_DOT)
        x = load_tile(x_tiles, row, dim, rows, D, D, BK, BN, TMA, FP32_DOT)
        total = tl.dot(e.T, x, total)
    column_ids = column + tl.arange(0, BM)
    dim_ids = dim + tl.arange(0, BN)
    corner = out_ptr + ((first + column).to(tl.int64) * D + dim)
    place = tl.arange(0, BM)[:, None] * D + tl.arange(0, BN)[None, :]
    inside = (column_ids < columns)[:, None] & (dim_ids < D)[None, :]
    tl.store(corner + place, total, mask=inside)


@triton.jit(do_not_specialize=["columns"])
def prepare_kernel(
    w_ptr,  # [C, D]
    out_ptr,  # [C, D] unit rows, rounded
    inverse_ptr,  # [C] 1 over their lengths after rounding
    columns,
    least,
    D: tl.constexpr,
    DIMS: tl.constexpr,
    ROWS: tl.constexpr,
):
    ids = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, DIMS)
    place = ids.to(tl.int64)[:, None] * D + dims[None, :]
    inside = (ids < columns)[:, None] & (dims < D)[None, :]
    w = tl.load(w_ptr + place, mask=inside, other=0.0).to(tl.float32)
    norm = tl.maximum(tl.sqrt(tl.sum(w * w, 1)), least)
    unit = (w / norm[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + place, unit, mask=inside)
    rounded = unit.to(tl.float32)
    length = tl.maximum(tl.sqrt(tl.sum(rounded * rounded, 1)), least)
    tl.store(inverse_ptr + ids, 1 / length, mask=ids < columns)


@triton.jit(do_not_specialize=["columns"])
def project_kernel(
    w_ptr,  # [C, D]
    grad_ptr,  # [C, D] fp32, the gradient with respect to the unit rows
    out_ptr,  # [C, D] the gradient with respect to the rows; may be grad_ptr
    columns,
    least,
    D: tl.constexpr,
    DIMS: tl.constexpr,
    ROWS: tl.constexpr,
):
    ids = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, DIMS)
    place = ids.to(tl.int64)[:, None] * D + dims[None, :]
    inside = (ids < columns)[:, None] & (dims < D)[None, :]
    w = tl.load(w_ptr + place, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + place, mask=inside, other=0.0)
    norm = tl.maximum(tl.sqrt(tl.sum(w * w, 1)), least)
    unit = w / norm[:, None]
    along = tl.sum(grad * unit, 1)
    result = (grad - along[:, None] * unit) / norm[:, None]
    tl.store(out_ptr + place, result.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def cosines_kernel(
    x_ptr,  # [B, D] and [C, D], as the products take them: a column that repeats a positive has
    w_ptr,  # the positive's cosine to the last bits
    row_ptr,  # [nnz]
    column_ptr,  # [nnz]
    out_ptr,  # [nnz] fp32
    least,
    D: tl.constexpr,
    DIMS: tl.constexpr,
):
    entry = tl.program_id(0)
    dims = tl.arange(0, DIMS)
    inside = dims < D
    row = tl.load(row_ptr + entry).to(tl.int64)
    column = tl.load(column_ptr + entry).to(tl.int64)
    x = tl.load(x_ptr + row * D + dims, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + column * D + dims, mask=inside, other=0.0).to(tl.float32)
    norms = tl.sqrt(tl.sum(x * x, 0)) * tl.sqrt(tl.sum(w * w, 0))
    tl.store(out_ptr + entry, tl.sum(x * w, 0) / tl.maximum(norms, least))


@triton.jit(do_not_specialize=["rows", "splits"])
def finish_kernel(
    partial_ptr,  # [splits, B, D] fp32
    scale_ptr,  # [B] fp32
    w_ptr,  # [C, D]
    start_ptr,  # [B + 1] int64
    column_ptr,  # [nnz] int64
    coefficient_ptr,  # [nnz] fp32
    out_ptr,  # [B, D] fp32
    rows,
    splits,
    least,
    D: tl.constexpr,
    DIMS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, DIMS)
    inside = dims < D
    total = tl.zeros((DIMS,), tl.float32)
    for split in tl.range(0, splits):
        place = (split * rows + row) * D + dims
        total += tl.load(partial_ptr + place, mask=inside, other=0.0)
    total *= tl.load(scale_ptr + row)
    start = tl.load(start_ptr + row)
    end = tl.load(start_ptr + row + 1)
    for entry in tl.range(start, end):
        column = tl.load(column_ptr + entry)
        w = tl.load(w_ptr + column * D + dims, mask=inside, other=0.0).to(tl.float32)
        norm = tl.maximum(tl.sqrt(tl.sum(w * w, 0)), least)
        total += tl.load(coefficient_ptr + entry) / norm * w
    tl.store(out_ptr + row * D + dims, total, mask=inside)


@triton.jit(do_not_specialize=["first", "columns", "count"])
def insert_kernel(
    e_ptr,  # [B, columns] of all C, from column `first` on
    row_ptr,  # [nnz] int64 rows and columns of the positives
    column_ptr,
    element_ptr,  # [nnz] what to write there
    first,
    columns,
    e_stride,
    count,  # nnz
    ENTRIES: tl.constexpr,
):
    entries = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    there = entries < count
    row = tl.load(row_ptr + entries, mask=there, other=0)
    column = tl.load(column_ptr + entries, mask=there, other=-1) - first
    there = there & (column >= 0) & (column < columns)
    element = tl.load(element_ptr + entries, mask=there, other=0.0)
    tl.store(e_ptr + row * e_stride + column, element, mask=there)


# --- tile sizes -------------------------------------------------------------------------------

# By major compute capability, in order of preference without timing: the first that fits the GPU
# runs. None has been measured yet: the order is by arithmetic per byte of shared memory, among
# those that compile without spills.
TILES = {
    8: (
        Config(128, 128, 32, 8, 4),
        Config(128, 128, 64, 8, 3),
        Config(64, 128, 64, 4, 3),
        Config(64, 64, 64, 4, 3),
    ),
    9: (  # and 10: as much shared memory, 227 KB; two programs of the last one fit a processor
        Config(128, 256, 64, 8, 3),
        Config(128, 256, 64, 8, 4),
        Config(128, 128, 64, 8, 4),
        Config(128, 128, 64, 4, 3),
    ),
    12: (  # 99 KB
        Config(128, 128, 32, 8, 4),
        Config(128, 128, 64, 8, 3),
        Config(64, 128, 64, 4, 3),
    ),
}
FEW = (  # for at most 64 rows
    Config(64, 128, 64, 8, 3),
    Config(64, 256, 64, 8, 3),
    Config(64, 64, 64, 4, 4),
    Config(64, 64, 32, 4, 4),
)


def candidates(capability: int, side: int) -> tuple[Config, ...]:
    """For a product whose shorter side is so long, by major compute capability."""
    if INTERPRETED:
        return (Config(64, 128, 64, 4, 1),)
    if side <= 64:
        return FEW
    return TILES[max(major for major in TILES if major <= capability)]


def stages(config: Config, listed: bool) -> int:
    """Of the pipeline's loads. Triton gives half of them to the load of a cell's number from a list,
    if the tiles are `listed`; so it takes twice as many to have as many tiles under way."""
    return 2 * config.stages - 1 if listed else config.stages


# --- launchers --------------------------------------------------------------------------------


class _Launch:
    """One problem on the device: operands in the products' dtype, and the three products."""

    def __init__(self, problem: Problem, w: Tensor, inverse: Tensor) -> None:
        self.problem, self.w, self.inverse = problem, w, inverse
        self.raw = w is problem.w  # as it came: no rounded unit rows
        self.rows, self.dim = problem.x.shape
        self.columns = problem.w.shape[0]
        self.x, inverse_lengths = _rounded(problem.x, problem.dtype)
        self.blocks = -(-self.rows // CELL_ROWS)
        # Rounding to 16 bits changes lengths; cosines are those of the rounded rows.
        self.factor = problem.scale * LOG2E * inverse_lengths
        self._positives: tuple[Tensor, Tensor, Tensor] | None = None
        self.none = torch.empty(1, device=self.x.device)
        self.capability = capability(self.x.device)
        self.tma = self.capability >= 9

    def tiles(self, tensor: Tensor, *block: int) -> Any:
        return tiles(tensor, list(block), self.tma)

    def candidates(self) -> tuple[Config, ...]:
        """For the products whose rows are those of X."""
        return candidates(self.capability, self.rows)

    @property
    def positives(self) -> tuple[Tensor, Tensor, Tensor]:
        """Where each cell's positives start, and rows and columns of all positives by cell."""
        if self._positives is None:
            rows, indices = self.problem.rows, self.problem.indices
            cells = self.problem.cells
            cell = rows // CELL_ROWS * cells + indices // CELL_COLUMNS
            cell, order = cell.sort(stable=True)
            edges = torch.arange(self.blocks * cells + 1, device=cell.device)
            starts = torch.searchsorted(cell, edges).int()
            self._positives = starts, rows[order].int(), indices[order].int()
        return self._positives

    def constants(self, config: Config, *, listed: bool = False) -> dict[str, Any]:
        """What all three products are compiled with; `listed`: for a list of cells."""
        return {
            "D": self.dim,
            "BM": config.bm,
            "BN": config.bn,
            "BK": config.bk,
            "BLOCK_ROWS": CELL_ROWS,
            "CELL": CELL_COLUMNS,
            "TMA": self.tma,
            "FP32_DOT": INTERPRETED,
            "num_warps": config.warps,
            "num_stages": stages(config, listed),
        }

    def exponentials(
        self,
        first: int,
        columns: int,
        *,
        sums: Tensor | None = None,
        maxima: Tensor | None = None,
        e: Tensor | None = None,
        offset: Tensor | None = None,
        active: Tensor | None = None,
        width: int = GROUP,
    ) -> None:
        """E of `columns` columns from `first` on: row sums [groups, B], E [B, columns], or both."""
        starts, entry_rows, entry_columns = self.positives

        def run(config: Config) -> None:
            row_tiles = triton.cdiv(self.rows, config.bm)
            out = self.x if e is None else e
            exponentials_kernel[(row_tiles * triton.cdiv(columns, width),)](
                self.tiles(self.x, config.bm, config.bk),
                self.tiles(self.w, config.bn, config.bk),
                self.tiles(out, config.bm, config.bn // 2),
                self.factor,
                self.inverse,
                self.none if offset is None else offset,
                self.none if sums is None else sums,
                self.none if maxima is None else maxima,
                starts,
                entry_rows,
                entry_columns,
                self.none if active is None else active,
                self.rows,
                first,
                columns,
                self.problem.cells,
                0 if e is None else e.stride(0),
                row_tiles,
                WIDTH=width,
                SUMS=sums is not None,
                ONLINE=maxima is not None,
                STORE=e is not None,
                RAW=self.raw and e is not None,
                OFFSET=offset is not None,
                FILTER=active is not None,
                **self.constants(config),
            )

        asked = [name is not None for name in (sums, maxima, e, offset, active)]
        launch("exponentials", self._class(columns, width, *asked), self.candidates(), run)

    def times_columns(
        self,
        e: Tensor,
        first: int,
        columns: int,
        out: Tensor,
        *,
        accumulate: bool,
        active: Tensor | None = None,
    ) -> None:
        """Partial sums [splits, B, D] of E W over the chunk's columns."""
        cells = triton.cdiv(columns, CELL_COLUMNS)
        order = counts = self.none
        if active is not None:
            order, counts = _list(_part(active, first, cells))

        def run(config: Config) -> None:
            row_tiles = triton.cdiv(self.rows, config.bm)
            rows_kernel[(triton.cdiv(self.dim, config.bn) * row_tiles * out.shape[0],)](
                self.tiles(e, config.bm, config.bk),
                self.tiles(self.w, config.bk, config.bn),
                out,
                order,
                counts,
                self.rows,
                first,
                columns,
                cells,
                e.stride(0),
                row_tiles,
                out.shape[0],
                self.rows if accumulate else 0,
                FILTER=active is not None,
                **self.constants(config, listed=active is not None),
            )

        # Without the number of columns: the first chunk, which does not accumulate, decides for all.
        key = self._class(0, out.shape[0], active is not None)
        launch("rows", key, self.candidates(), run)

    def times_rows(
        self,
        e: Tensor,
        x: Tensor,
        first: int,
        columns: int,
        out: Tensor,
        *,
        active: Tensor | None = None,
    ) -> None:
        """E'X into the rows first … first + columns of `out` [C, D], fp32."""
        cells = triton.cdiv(columns, CELL_COLUMNS)
        order = counts = self.none
        if active is not None:
            order, counts = _list(_part(active, first, cells).T.contiguous())

        def run(config: Config) -> None:
            tiles = triton.cdiv(columns, config.bm) * triton.cdiv(self.dim, config.bn)
            columns_kernel[(tiles,)](
                self.tiles(e, config.bk, config.bm),
                self.tiles(x, config.bk, config.bn),
                out,
                order,
                counts,
                self.rows,
                first,
                columns,
                e.stride(0),
                self.blocks,
                FILTER=active is not None,
                **self.constants(config, listed=active is not None),
            )

        key = self._class(columns, active is not None)
        launch("columns", key, candidates(self.capability, columns), run)

    def _class(self, columns: int, *more: object) -> tuple[object, ...]:
        sizes = triton.next_power_of_2(self.rows), triton.next_power_of_2(columns), self.dim
        return (self.problem.dtype, *sizes, self.raw, *more)


def _part(active: Tensor, first: int, cells: int) -> Tensor:
    start = first // CELL_COLUMNS
    return active[:, start : start + cells]


def _list(active: Tensor) -> tuple[Tensor, Tensor]:
    """Per row of a mask: the places that hold first, in order, and how many they are; int32."""
    order = active.int().argsort(dim=1, descending=True, stable=True)
    return order.int().contiguous(), active.sum(1, dtype=torch.int32)


def _splits(problem: Problem) -> int:
    """Into how many parts rows_kernel cuts a chunk's columns.

    More parts leave less of the last wave of programs empty, but each of them reads and writes sums
    [B, D] once per chunk.
    """
    if INTERPRETED:
        return 2
    (rows, dim), columns = problem.x.shape, problem.w.shape[0]
    processors = torch.cuda.get_device_properties(problem.x.device).multi_processor_count
    tiles = triton.cdiv(rows, 128) * triton.cdiv(dim, 256)

    def cost(splits: int) -> float:  # in FLOP per element of the sums
        waves = tiles * splits / processors
        product = 2 * min(_chunk(problem), columns) * math.ceil(waves) / waves
        return product + 2 * 4 * INTENSITY * splits

    return min(range(1, MAX_SPLITS + 1), key=cost)


def _empty(device: torch.device, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def _padded(columns: int) -> int:
    """Width of a buffer for E, in whole vectors."""
    return -(-columns // VECTOR.value) * VECTOR.value


def _e_buffer(problem: Problem, columns: int) -> Tensor:
    """For E of as many columns, in the products' dtype."""
    shape = problem.x.shape[0], _padded(columns)
    return _empty(problem.x.device, *shape, dtype=problem.dtype)


def _chunk(problem: Problem) -> int:
    """Columns whose E fits the scratch: whole cells, at least one."""
    fitting = problem.scratch // (2 * problem.x.shape[0]) // CELL_COLUMNS * CELL_COLUMNS
    return min(max(fitting, CELL_COLUMNS), problem.cells * CELL_COLUMNS)


def _prepared(problem: Problem, need_w: bool) -> tuple[Tensor, Tensor]:
    """W in the products' dtype, and 1 over the lengths of its rows.

    A frozen bank that is in that dtype and whose norms are known stays where it is.
    """
    w = problem.w
    usable = w.dtype == problem.dtype and w.data_ptr() % 16 == 0
    if not need_w and usable and problem.w_norms is not None:
        return w, problem.w_norms.float().clamp_min(MIN_NORM).reciprocal()
    return _rounded(w, problem.dtype)


def _rounded(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows as unit rows in 16 bits, and 1 over the lengths that they have after rounding."""
    out = _empty(values.device, *values.shape, dtype=dtype)
    inverse = _empty(values.device, values.shape[0])
    dims = triton.next_power_of_2(values.shape[1])
    per_program = max(1, 4096 // dims)
    prepare_kernel[(triton.cdiv(values.shape[0], per_program),)](
        values, out, inverse, values.shape[0], MIN_NORM,
        D=values.shape[1], DIMS=dims, ROWS=per_program,
    )  # fmt: skip
    return out, inverse


# --- what the op calls ------------------------------------------------------------------------


def limits(device: str, dim: int) -> str | None:
    """Why the kernels can't take this problem; None if they can."""
    if device != "cuda" and not INTERPRETED:
        return f"runs on cuda, not on {device}"
    if dim % 8 or not 16 <= dim <= 8192:
        return f"takes D = 16 … 8192 in multiples of 8, not {dim}"
    return None


def _way(problem: Problem, need_x: bool, need_w: bool, need_shares: bool) -> str:
    """ "sums" (nothing kept), "one pass" or "kept"; see the module's docstring."""
    rows, columns = problem.x.shape[0], problem.w.shape[0]
    highest = problem.scale + math.log(columns)
    if need_shares or highest >= HIGHEST_EXPONENT or problem.dtype != torch.bfloat16:
        return "sums"
    if need_w:
        fits = 2 * rows * columns <= problem.scratch
        return "kept" if fits and highest < HIGHEST_KEPT else "sums"
    return "one pass" if need_x else "sums"


def kept(
    problem: Problem, need_x: bool, need_w: bool, need_shares: bool
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of what `sums` keeps: E W, E, and W as unit rows with their inverse lengths."""
    way = _way(problem, need_x, need_w, need_shares)
    (rows, dim), columns = problem.x.shape, problem.w.shape[0]
    splits = _splits(problem) if way == "one pass" else 0
    return [
        ((splits, rows, dim) if way == "one pass" else (0,), torch.float32),
        ((rows, _padded(columns)) if way == "kept" else (0,), problem.dtype),
        ((columns, dim) if need_w else (0,), problem.dtype),
        ((columns,) if need_w else (0,), torch.float32),
    ]


def sums(problem: Problem, need_x: bool, need_w: bool, need_shares: bool) -> Sums:
    """log Z, the positives' cosines, the cells' shares of Z, and what `gradients` will use."""
    x, device = problem.x, problem.x.device
    rows, columns = x.shape[0], problem.w.shape[0]
    unit, inverse = _prepared(problem, need_w)
    launch = _Launch(problem, unit, inverse)
    way = _way(problem, need_x, need_w, need_shares)
    online = problem.scale + math.log(columns) >= HIGHEST_EXPONENT
    width = CELL_COLUMNS if need_shares else GROUP
    groups = triton.cdiv(columns, width)
    partial = _empty(device, groups, rows)
    maxima = _empty(device, groups, rows) if online else None
    products, exponentials = _empty(device, 0), _empty(device, 0, dtype=problem.dtype)
    if way == "one pass":
        products = _empty(device, _splits(problem), *x.shape)
        chunk = max(_chunk(problem) // GROUP, 1) * GROUP  # whole groups, for their sums
        buffer = _e_buffer(problem, min(chunk, columns))
        for first in range(0, columns, chunk):
            here = min(chunk, columns - first)
            launch.exponentials(first, here, sums=partial[first // GROUP :], e=buffer[:, :here])
            launch.times_columns(buffer[:, :here], first, here, products, accumulate=first > 0)
    elif way == "kept":
        exponentials = _e_buffer(problem, columns)
        launch.exponentials(0, columns, sums=partial, e=exponentials[:, :columns])
    else:
        launch.exponentials(0, columns, sums=partial, maxima=maxima, width=width)
    if maxima is None:
        log_z = partial.sum(0).log()
    else:
        log_z = torch.logsumexp(partial.log() + maxima * math.log(2), 0)
    shares = _empty(device, rows, 0)
    if need_shares:
        logs = partial.log() if maxima is None else partial.log() + maxima * math.log(2)
        shares = (logs - finite(log_z)).exp().T.contiguous()
    if not need_w:
        unit, inverse = _empty(device, 0, dtype=problem.dtype), _empty(device, 0)
    return Sums(log_z, _cosines(problem, launch), shares, [products, exponentials, unit, inverse])


def gradients(
    problem: Problem,
    coefficients: Coefficients,
    kept: list[Tensor],
    need_x: bool,
    need_w: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients with respect to the unit rows and to W, from what was kept or anew."""
    products, exponentials, unit, inverse = kept
    x, device = problem.x, problem.x.device
    columns = problem.w.shape[0]
    log_z, negative, active = coefficients.log_z, coefficients.negative, coefficients.active
    scale = torch.where(log_z.isinf(), 0.0, negative * (-log_z).exp())  # for E = exp(s cos)
    if products.numel():  # the gradient was made in the forward pass
        return _finish(problem, products, scale, coefficients.positive), _empty(device, 0)

    if not need_w:
        unit, inverse = _prepared(problem, need_w)
    launch = _Launch(problem, unit, inverse)
    offset, chunk = None, columns
    if not exponentials.numel():
        half = HALF_OFFSET[problem.dtype]
        chunk = _chunk(problem)
        exponentials = _e_buffer(problem, min(chunk, columns))
        offset = torch.where(log_z.isinf(), -1e30, half - log_z * LOG2E)
        scale = negative * 2.0**-half
    mask = None if active is None else active.to(torch.int8)
    grad_w = _empty(device, *problem.w.shape) if need_w else _empty(device, 0)
    partial = _empty(device, _splits(problem), *x.shape) if need_x else None
    weighted = (x * scale[:, None]).to(problem.dtype) if need_w else launch.x
    # Positives enter the product for dW as elements of E, which its rows' scale turns into theirs.
    element = coefficients.positive / scale[problem.rows]
    element = torch.where(element.isfinite(), element, 0.0).to(problem.dtype)
    for first in range(0, columns, chunk):
        here = min(chunk, columns - first)
        e = exponentials[:, :here]
        if offset is not None:
            launch.exponentials(first, here, e=e, offset=offset, active=mask)
        if partial is not None:
            launch.times_columns(e, first, here, partial, accumulate=first > 0, active=active)
        if need_w:
            _insert(problem, e, first, element)
            launch.times_rows(e, weighted, first, here, grad_w, active=active)
            if offset is None:  # E was handed over, and is handed back as it was
                _insert(problem, e, first, torch.zeros_like(element))
    grad_x = _empty(device, 0)
    if partial is not None:
        grad_x = _finish(problem, partial, scale, coefficients.positive)
    return grad_x, _project(problem, grad_w) if need_w else grad_w


def _cosines(problem: Problem, launch: _Launch) -> Tensor:
    out = _empty(problem.x.device, *problem.indices.shape)
    if out.numel():
        dim = problem.x.shape[1]
        cosines_kernel[(out.numel(),)](
            launch.x, launch.w, problem.rows, problem.indices, out, MIN_NORM,
            D=dim, DIMS=triton.next_power_of_2(dim),
        )  # fmt: skip
    return out


def _finish(problem: Problem, partial: Tensor, scale: Tensor, positive: Tensor) -> Tensor:
    """The rows' gradient: their scale times the partial sums, and the positives' terms."""
    out = torch.empty_like(problem.x)
    splits, rows, dim = partial.shape
    finish_kernel[(rows,)](
        partial, scale, problem.w, problem.indptr, problem.indices,
        positive, out, rows, splits, MIN_NORM, D=dim, DIMS=triton.next_power_of_2(dim),
    )  # fmt: skip
    return out


def _insert(problem: Problem, e: Tensor, first: int, element: Tensor) -> None:
    """Write the positives' elements into the chunk of E that starts at column `first`.

    By a kernel: a mask in torch would have the host wait once per chunk.
    """
    count = element.numel()
    if count:
        insert_kernel[(triton.cdiv(count, ENTRIES),)](
            e, problem.rows, problem.indices, element, first, e.shape[1], e.stride(0), count,
            ENTRIES=ENTRIES,
        )  # fmt: skip


def _project(problem: Problem, grad_w: Tensor) -> Tensor:
    """From the gradient of the unit rows of W to that of W, in W's dtype; in place if it is fp32."""
    w = problem.w
    out = grad_w if w.dtype == grad_w.dtype else torch.empty_like(w)
    dims = triton.next_power_of_2(w.shape[1])
    per_program = max(1, 2048 // dims)
    project_kernel[(triton.cdiv(w.shape[0], per_program),)](
        w, grad_w, out, w.shape[0], MIN_NORM, D=w.shape[1], DIMS=dims, ROWS=per_program
    )
    return out
