"""Triton kernels of `topk` (contract and certificate: `pymcip.ops.topk_triton`).

Bottom-up: the kernels, then their launchers.

    prepare_kernel   rows in 16 bits, their lengths and how far they are from what they stand for
    screen_kernel    a product in 16 bits that stays in registers: places whose upper bound reaches
                     the cut are appended to their query's list, nothing else is written
    refine_kernel    canonical scores of the lists, as keys that sort by score and then by id

A list is in no particular order, as programs append to it through a counter; keys are distinct, so
that sorting them leaves nothing of that order.

What bounds them, on an H100 or H200, by arithmetic (rates as in `margin_softmax`):

    screen_kernel    the tensor cores, 12,288 cycles per tile of 128 x 256 at D = 768, beside 48 bytes a
        cycle from L2. Then, while no product runs, a maximum per row and a compare: two
        instructions per element, 512 cycles of the fp32 lanes, and two barriers.
    prepare_kernel   HBM: 6 D bytes per row in fp32, 2 D of a row in 16 bits that stays where it is
    refine_kernel    fp64, D products per pair admitted (1.3 k per query of a bf16 bank), and the
        latency of rows fetched from anywhere
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pymcip.triton_kernels.margin_softmax import candidates, load_tile
from pymcip.triton_kernels.tuning import INTERPRETED, Config, capability, launch, probe, tiles

# Above the relative error (D + 2) 2^-24 of a length in fp32; and above what underflows in its
# squares, sqrt(D) 2^-63.
INFLATE = tl.constexpr(1.001)
UNDERFLOW = tl.constexpr(2.0**-50)
# A key without a pair: score -inf, the highest id.
MISSING = tl.constexpr((0x7F800001 << 32) + 0xFFFFFFFF)
LANES = tl.constexpr(16)  # of the canonical score
WORD = tl.constexpr(16)  # columns whose hits are packed together
PAIRS = 256 if INTERPRETED else 32  # of one program of refine_kernel
TUNED = 1 << 16  # fewer rows of a bank are not worth timing tile sizes

# --- kernels ----------------------------------------------------------------------------------


# Numbers and addresses of vectors that vary from chunk to chunk are no reason to compile again.
@triton.jit(do_not_specialize=["rounded_ptr", "length_ptr", "residual_ptr", "rows"])
def prepare_kernel(
    in_ptr,  # [rows, D] with any strides
    out_ptr,  # [rows, WIDTH] 16 bits, if STORE
    rounded_ptr,  # [rows] upper bounds of |x'|, of |x| and of |x - x'|, where x' is x in 16 bits
    length_ptr,
    residual_ptr,
    rows,
    row_stride,
    column_stride,
    slack,  # times |x|, is added to the residual
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    DIMS: tl.constexpr,
    ROWS: tl.constexpr,
    STORE: tl.constexpr,
):
    ids = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, DIMS)
    inside = (ids < rows)[:, None] & (dims < D)[None, :]
    place = ids.to(tl.int64)[:, None] * row_stride + dims.to(tl.int64)[None, :] * column_stride
    x = tl.load(in_ptr + place, mask=inside, other=0.0).to(tl.float32)
    half = x.to(out_ptr.dtype.element_ty)
    if STORE:
        place = ids.to(tl.int64)[:, None] * WIDTH + dims[None, :]
        tl.store(out_ptr + place, half, mask=(ids < rows)[:, None] & (dims < WIDTH)[None, :])
    rounded = half.to(tl.float32)
    lost = x - rounded
    length = tl.sqrt(tl.sum(x * x, 1)) * INFLATE + UNDERFLOW
    residual = tl.sqrt(tl.sum(lost * lost, 1)) * INFLATE + UNDERFLOW
    tl.store(length_ptr + ids, length, mask=ids < rows)
    tl.store(residual_ptr + ids, residual + slack * length, mask=ids < rows)
    tl.store(
        rounded_ptr + ids,
        tl.sqrt(tl.sum(rounded * rounded, 1)) * INFLATE + UNDERFLOW,
        mask=ids < rows,
    )


@triton.jit
def score_of(key):
    """The score of a key; MISSING has -inf."""
    ordered = (-(key >> 32)).to(tl.int32)
    bits = tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    return bits.to(tl.float32, bitcast=True)


@triton.jit(
    do_not_specialize=[
        "q_length_ptr", "q_residual_ptr", "c_rounded_ptr", "c_residual_ptr", "best_ptr",
        "rows", "first", "last", "row_tiles", "tiles_each", "key_stride",
    ]
)  # fmt: skip
def screen_kernel(
    q_tiles,  # [N, WIDTH] 16 bits; this and the next: tensor descriptors if TMA, else pointers
    c_tiles,  # [M, WIDTH]
    q_length_ptr,  # [N] upper bounds, see prepare_kernel
    q_residual_ptr,
    c_rounded_ptr,  # [M]
    c_residual_ptr,
    best_ptr,  # [N] i64, stride key_stride: keys of the k-th best, a score below is of no use
    active_ptr,  # [N] bool, which queries take part
    count_ptr,  # [N] i32, how many places were admitted, more than CAPACITY if not all fit
    list_ptr,  # [N, CAPACITY] i32, places of rows
    threshold,
    rows,  # N
    first,  # the rows of the bank from `first` to before `last`
    last,
    row_tiles,
    tiles_each,  # of the bank, for one program
    key_stride,
    CAPACITY,
    WIDTH: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TMA: tl.constexpr,
    FP32_DOT: tl.constexpr,
):
    pid = tl.program_id(0)  # row tiles fastest: programs that run together share the bank's rows
    row = pid % row_tiles * BM
    begin = first + pid // row_tiles * (tiles_each * BN)
    end = tl.minimum(begin + tiles_each * BN, last)
    row_ids = row + tl.arange(0, BM)
    best = best_ptr + row_ids.to(tl.int64) * key_stride
    best = tl.load(best, mask=row_ids < rows, other=MISSING)
    cut = tl.maximum(score_of(best), threshold)
    active = tl.load(active_ptr + row_ids, mask=row_ids < rows, other=0) != 0
    q_length = tl.load(q_length_ptr + row_ids, mask=row_ids < rows, other=0.0)
    q_residual = tl.load(q_residual_ptr + row_ids, mask=row_ids < rows, other=0.0)
    if tl.max(active.to(tl.int32), 0) == 0:
        end = begin
    bits = (1 << (tl.arange(0, BN) % WORD)).to(tl.int32)
    words = tl.arange(0, BN // WORD)
    for column in tl.range(begin, end, BN):
        product = tl.zeros((BM, BN), tl.float32)
        for k in tl.range(0, WIDTH, BK):
            q = load_tile(q_tiles, row, k, rows, WIDTH, WIDTH, BM, BK, TMA, FP32_DOT)
            c = load_tile(c_tiles, column, k, last, WIDTH, WIDTH, BN, BK, TMA, FP32_DOT)
            product = tl.dot(q, c.T, product)
        column_ids = column + tl.arange(0, BN)
        inside = column_ids < last
        # One bound for the tile, of its longest row and its largest residual.
        c_rounded = tl.max(tl.load(c_rounded_ptr + column_ids, mask=inside, other=0.0), 0)
        c_residual = tl.max(tl.load(c_residual_ptr + column_ids, mask=inside, other=0.0), 0)
        least = cut - (q_residual * c_rounded + q_length * c_residual)
        # A sum of products that long may overflow on the way, to anything.
        least = tl.where(q_length * c_rounded > 1e37, float("-inf"), least)
        least = tl.where(active, least, float("inf"))
        # Not below, rather than at least: so that NaN is admitted.
        hit_rows = active & ~(tl.max(product, 1) < least)
        if tl.max(hit_rows.to(tl.int32), 0) > 0:  # rare once the cuts have risen
            packed = tl.where(product < least[:, None], 0, bits[None, :])
            word = tl.sum(tl.reshape(packed, (BM, BN // WORD, WORD)), 2)
            valid = tl.minimum(tl.maximum(last - column - words * WORD, 0), WORD)
            word = tl.where(active[:, None], word & ((1 << valid) - 1)[None, :], 0)
            count = word - ((word >> 1) & 0x5555)
            count = (count & 0x3333) + ((count >> 2) & 0x3333)
            count = (count + (count >> 4)) & 0x0F0F
            count = (count + (count >> 8)) & 0x1F
            counters = count_ptr + row_ids[:, None] + tl.zeros((1, BN // WORD), tl.int32)
            place = tl.atomic_add(counters, count, mask=word > 0, sem="relaxed")
            lists = list_ptr + row_ids.to(tl.int64)[:, None] * CAPACITY
            left = tl.max(tl.max(word, 1), 0)
            while left > 0:
                lowest = word & -word
                exponent = lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23
                its_column = column + words[None, :] * WORD + exponent - 127
                tl.store(lists + place, its_column, mask=(word > 0) & (place < CAPACITY))
                place += 1
                word = word & (word - 1)
                left = tl.max(tl.max(word, 1), 0)


@triton.jit(do_not_specialize=["first_id", "key_stride", "K"])
def refine_kernel(
    q_ptr,  # [N, D] and [M, D] as they came, with any strides
    c_ptr,
    list_ptr,  # see screen_kernel
    count_ptr,
    key_ptr,  # [N, key_stride] i64: K of the best so far, in order, and one for each place of the
    # list, MISSING where there is none
    threshold,
    first_id,  # of the bank's row 0
    q_row_stride,
    q_column_stride,
    c_row_stride,
    c_column_stride,
    key_stride,
    K,
    CAPACITY,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
):
    row = tl.program_id(0)
    places = tl.program_id(1) * PAIRS + tl.arange(0, PAIRS)
    count = tl.load(count_ptr + row)
    if count > CAPACITY:  # some are lost: the caller has them screened again
        count = 0
    key = tl.full((PAIRS,), MISSING, tl.int64)
    keys = key_ptr + row.to(tl.int64) * key_stride
    if tl.program_id(1) * PAIRS < count:
        here = places < count
        ids = tl.load(list_ptr + row.to(tl.int64) * CAPACITY + places, mask=here, other=0)
        ids = ids.to(tl.int64)
        lanes = tl.arange(0, LANES)
        q_start = q_ptr + row.to(tl.int64) * q_row_stride
        c_start = c_ptr + ids * c_row_stride
        total = tl.zeros((PAIRS, LANES), tl.float64)
        for start in tl.range(0, D, LANES, loop_unroll_factor=4):  # loads ahead of the sums
            dims = (start + lanes).to(tl.int64)
            q = tl.load(q_start + dims * q_column_stride, mask=dims < D, other=0.0)
            inside = here[:, None] & (dims < D)[None, :]
            c = tl.load(c_start[:, None] + dims[None, :] * c_column_stride, mask=inside, other=0.0)
            q = q.to(tl.float32).to(tl.float64)
            total += q[None, :] * c.to(tl.float32).to(tl.float64)  # products are exact
        half = tl.sum(tl.reshape(total, (PAIRS, 2, 8)), 1)
        half = tl.sum(tl.reshape(half, (PAIRS, 2, 4)), 1)
        half = tl.sum(tl.reshape(half, (PAIRS, 2, 2)), 1)
        score = tl.sum(half, 1).to(tl.float32) + 0.0
        bits = score.to(tl.int32, bitcast=True)
        ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
        cut = tl.maximum(score_of(tl.load(keys + (K - 1))), threshold)
        wanted = here & (score >= cut)
        key = tl.where(wanted, ((-ordered) << 32) | (ids + first_id), MISSING)
    tl.store(keys + K + places, key, mask=places < CAPACITY)


# --- launchers --------------------------------------------------------------------------------


class Rows(NamedTuple):
    """Rows as they came, and what the screen needs of them."""

    raw: Tensor  # [rows, D]
    half: Tensor  # [rows, WIDTH] 16 bits, the columns beyond D are 0
    rounded: Tensor  # [rows] fp32, see prepare_kernel
    length: Tensor
    residual: Tensor


def width(columns: int) -> int:
    """Columns in 16 bits, so that rows start at multiples of 16 bytes."""
    return -(-columns // 8) * 8


def in_place(raw: Tensor, dtype: torch.dtype) -> bool:
    """Whether the screen can read these rows where they are."""
    aligned = raw.data_ptr() % 16 == 0 and raw.stride(0) % 8 == 0
    return raw.dtype == dtype and raw.is_contiguous() and aligned


def prepare(raw: Tensor, dtype: torch.dtype, slack: float) -> Rows:
    """Rows in 16 bits, copied only where they aren't, and their bounds."""
    rows, columns = raw.shape
    stays = in_place(raw, dtype)
    half = raw if stays else raw.new_empty(rows, width(columns), dtype=dtype)
    rounded, length, residual = raw.new_empty(3, rows, dtype=torch.float32)
    dims = triton.next_power_of_2(width(columns))
    per_program = max(1, 4096 // dims)
    prepare_kernel[(triton.cdiv(rows, per_program),)](
        raw, half, rounded, length, residual, rows, raw.stride(0), raw.stride(1), slack,
        D=columns, WIDTH=width(columns), DIMS=dims, ROWS=per_program, STORE=not stays,
    )  # fmt: skip
    return Rows(raw, half, rounded, length, residual)


class State(NamedTuple):
    """What a block of queries has found so far, and room for more."""

    k: int
    threshold: float
    keys: Tensor  # [N, k + capacity] int64: the k best, in order, and those of the lists
    lists: Tensor  # [N, capacity] int32
    counts: Tensor  # [N] int32


def new_state(count: int, k: int, threshold: float, capacity: int, device: torch.device) -> State:
    """Nothing found yet."""
    return State(
        k,
        threshold,
        torch.full((count, k + capacity), MISSING.value, dtype=torch.int64, device=device),
        torch.empty(count, capacity, dtype=torch.int32, device=device),
        torch.zeros(count, dtype=torch.int32, device=device),
    )


def screen(queries: Rows, bank: Rows, first: int, last: int, state: State, active: Tensor) -> None:
    """Fill the lists of the active queries with places from `first` to before `last`."""
    rows, wide = queries.half.shape
    device = queries.half.device
    major = capability(device)
    tma = major >= 9
    processors = 1
    if not INTERPRETED:
        processors = torch.cuda.get_device_properties(device).multi_processor_count

    def run(config: Config) -> None:
        state.counts.zero_()
        row_tiles = triton.cdiv(rows, config.bm)
        bank_tiles = triton.cdiv(last - first, config.bn)
        # Enough programs that the last ones to end cost little.
        each = max(1, min(8, row_tiles * bank_tiles // (16 * processors)))

        screen_kernel[(row_tiles * triton.cdiv(bank_tiles, each),)](
            tiles(queries.half, [config.bm, config.bk], tma),
            tiles(bank.half, [config.bn, config.bk], tma),
            queries.length, queries.residual, bank.rounded, bank.residual,
            state.keys[:, state.k - 1], active, state.counts, state.lists, state.threshold,
            rows, first, last, row_tiles, each, state.keys.stride(0), state.lists.shape[1],
            WIDTH=wide, BM=config.bm, BN=config.bn, BK=config.bk, TMA=tma, FP32_DOT=INTERPRETED,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    shape_class = (queries.half.dtype, triton.next_power_of_2(rows), wide)
    timed = last - first >= TUNED
    launch("topk_screen", shape_class, candidates(major, rows), run, timed=timed)


def obstacle() -> str | None:
    """Why the kernels can't run on this machine; None if they can."""
    version = tuple(map(int, triton.__version__.split(".")[:2]))
    reason = probe()
    if reason is None and capability() == 10 and version < (3, 8):  # its compiler fails
        reason = f"needs Triton 3.8 or later on this GPU, not {triton.__version__}"
    return reason


def refine(queries: Tensor, bank: Tensor, first_id: int, state: State) -> None:
    """Canonical scores of the lists, but for those that did not fit, merged into the k best."""
    rows, capacity = state.lists.shape
    refine_kernel[(rows, triton.cdiv(capacity, PAIRS))](
        queries, bank, state.lists, state.counts, state.keys, state.threshold, first_id,
        queries.stride(0), queries.stride(1), bank.stride(0), bank.stride(1),
        state.keys.stride(0), state.k, capacity, D=queries.shape[1], PAIRS=PAIRS, num_warps=4,
    )  # fmt: skip
    state.keys[:, : state.k] = state.keys.sort(dim=1).values[:, : state.k]


def decode(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and scores of keys; -1 and -inf where there is no pair."""
    ordered = -(keys >> 32)
    bits = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).int()
    scores = bits.view(torch.float32)
    ids = torch.where(scores == -torch.inf, -1, keys & 0xFFFFFFFF)
    return ids, scores
