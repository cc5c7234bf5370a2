"""`margin_softmax`: softmax losses with an additive angular margin over very many columns.

Contract. With unit rows x_i = X_i/|X_i| and w_j = W_j/|W_j|, cos_ij = <x_i, w_j>, the positives P_i
of row i (column indices, given in CSR form), scale s, margin m (radians) and weights a_ip >= 0:

    Z_i = sum over j not in P_i of exp(s cos_ij)
    L_i = sum over p in P_i of a_ip softplus(log Z_i - s psi(cos_ip)),    psi(cos t) = cos(t + m)

A row's positives never act as negatives for each other. Weights default to 1/|P_i|; a row without
positives has loss 0 and gradient 0; Z_i = 0 (every column is a positive) gives loss 0.
With one positive per row this is ArcMargin (ArcFace, arXiv 1801.07698); with several it is
MCArcMargin (arXiv 2409.01936; the closed form is this project's, see `pymcip.losses`).

Where t + m > pi, cos(t + m) would rise again; `continuation` says what stands there instead:
"linear": cos t - m sin m; "none": cos(t + m) all the same; "easy": margin only where cos t > 0.
The gradient is the exact one, psi'(cos t) = cos m + cos t sin m / sin t, with sin^2 t >= 1e-6.

What a back end does. Everything that is O(B + nnz) is done here, once for all back ends. The loss
needs two things of size B x C from them, both without a B x C matrix:

    sums       log Z_i [B] over the negatives, and cos_ip [nnz] of the positives
    gradients  from n_i (B numbers) and q_ip (nnz numbers) with
                   dL/dcos_ij = n_i exp(s cos_ij - log Z_i)  for negatives,   q_ip  for positives:
               the gradients with respect to the unit rows x_i and to W_j

They are two opaque operators of torch (`pymcip::margin_softmax_sums`, `…_gradients`), so that
torch.compile keeps them whole.

Memory layout. Inputs may have any strides. The two operators, and nobody else, make every tensor
dense and row-major before a back end sees it, by a copy where it isn't; so a transposed or sliced W
costs a copy in each pass. A back end may rely on dense rows, but not on the address: where it needs
rows at multiples of 16 bytes, it looks, and copies.

The certified filter. The softmax mass of row i in a cell of 256 columns is its share of Z_i. With
`delta` > 0, every block of 128 rows leaves out of its gradients the lightest cells, as long as no
row loses more than `delta` of its mass: |error of dL_i/dx_i| <= s * delta * sum_p a_ip for unit
x_i. Losses stay exact, and so do the positives' own terms.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pymcip.ops.dispatch import backends, select

MIN_SIN_SQUARED = 1e-6
MIN_NORM = 1e-12
CONTINUATIONS = ("linear", "none", "easy")
COMPUTE = ("auto", "float64", "float32", "bfloat16", "float16")
CELL_ROWS, CELL_COLUMNS = 128, 256  # the filter's granularity
LEAST_SCRATCH, MOST_SCRATCH = 1 << 28, 1 << 31  # bytes, by default
HIGHEST_EXPONENT = 88.0  # exp(88) is finite in fp32 and bfloat16


@dataclass(frozen=True)
class MarginOptions:
    """What all back ends share.

    Attributes:
        scale: s > 0.
        margin: m, radians, 0 <= m < pi.
        continuation: "linear", "none" or "easy".
        compute: dtype of the operands of the matrix products; they are summed in fp32 (fp64 for
            float64). "auto": float64 for fp64 rows; on a GPU float16 for a float16 bank and
            bfloat16 otherwise; elsewhere float32.
        chunk: columns at a time, where a back end works by chunks.
        scratch: bytes that a back end may use for parts of the B x C matrix, at least one chunk of
            256 columns. With 2 B C <= scratch the Triton back end keeps exp(s cos) for the backward
            pass (three products for loss, dX and dW instead of four). None: 256 MiB, on a GPU 1/64 of
            its memory, from 256 MiB to 2 GiB.
        delta: the certified filter's bound; 0 is exact.
    """

    scale: float = 30.0
    margin: float = 0.0
    continuation: str = "linear"
    compute: str = "auto"
    chunk: int = 8192
    scratch: int | None = None
    delta: float = 0.0

    def __post_init__(self) -> None:
        if not self.scale > 0 or not 0 <= self.margin < math.pi:
            raise ValueError(
                f"scale={self.scale}, margin={self.margin}: need scale > 0 and 0 <= margin < pi"
            )
        if self.continuation not in CONTINUATIONS:
            raise ValueError(
                f"continuation={self.continuation!r}; allowed: {', '.join(CONTINUATIONS)}"
            )
        if self.compute not in COMPUTE:
            raise ValueError(f"compute={self.compute!r}; allowed: {', '.join(COMPUTE)}")
        if self.chunk < 1 or (self.scratch is not None and self.scratch < 1):
            raise ValueError(f"chunk={self.chunk}, scratch={self.scratch}; need at least 1")
        if not 0 <= self.delta < 1:
            raise ValueError(f"delta={self.delta}; need 0 <= delta < 1")

    @property
    def step(self) -> int:
        """Columns at a time in whole cells; less than a cell only where no filter asks for cells."""
        if self.chunk < CELL_COLUMNS:
            return CELL_COLUMNS if self.delta > 0 else self.chunk
        return self.chunk - self.chunk % CELL_COLUMNS

    def scratch_bytes(self, device: torch.device) -> int:
        """`scratch`, or what it is by default on this device."""
        if self.scratch is not None:
            return self.scratch
        if device.type != "cuda":
            return LEAST_SCRATCH
        memory = torch.cuda.get_device_properties(device).total_memory
        return min(max(memory // 64, LEAST_SCRATCH), MOST_SCRATCH)

    def compute_dtype(self, x: Tensor, w: Tensor) -> torch.dtype:
        """The dtype that `compute` means for these operands."""
        if self.compute != "auto":
            dtype: torch.dtype = getattr(torch, self.compute)
            return dtype
        if x.dtype == torch.float64:
            return torch.float64
        if x.device.type != "cuda":
            return torch.float32
        return torch.float16 if w.dtype == torch.float16 else torch.bfloat16


@dataclass(frozen=True)
class Shard:
    """This process's part of the columns: `w` holds rows first .. first + C of the whole matrix.

    Column indices stay those of the whole matrix. All processes of `group` (None: the default
    group) call the op with the same x, indptr and indices; three small all-reduces in the forward
    pass give each of them the whole loss, one in the backward pass the whole dX. dW is the shard's.
    """

    first: int
    group: Any = None


class Skipped(NamedTuple):
    """What the certified filter left out of the gradients."""

    mass: Tensor  # [B] fp32, the share of each row's softmax mass that was dropped
    cells: Tensor  # int64 scalar, cells (128 rows x 256 columns) dropped by this process
    of: int  # cells in all


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


def margin_softmax(
    x: Tensor,
    w: Tensor,
    indptr: Tensor,
    indices: Tensor,
    *,
    weights: Tensor | None = None,
    w_norms: Tensor | None = None,
    shard: Shard | None = None,
    backend: str = "auto",
    **options: Any,
) -> Tensor:
    """Per-row loss L [B] (see the module's contract), differentiable in `x` and `w`.

    Args:
        x: [B, D] floating point, any norm (rows are normalised inside).
        w: [C, D] floating point on the same device, any norm; fp16/bf16 banks are converted chunk
            by chunk. Its gradient is only computed if `w.requires_grad`.
        indptr: int64 [B + 1], starts of the rows' positives in `indices`; indptr[0] = 0.
        indices: int64 [nnz], columns of the positives, distinct within a row.
        weights: [nnz] weights of the positives, >= 0; default 1/|P_i|.
        w_norms: [C] norms of the rows of a frozen `w`, to save the pass that finds them.
        shard: which part of the columns `w` is, if not all of them.
        backend: a name from `pymcip.ops.backends("margin_softmax")`, or "auto".
        **options: fields of `MarginOptions`.

    Returns:
        Losses [B], fp32 (fp64 with compute="float64"), under autocast too.

    Raises:
        ValueError: shapes, dtypes, indices or options don't fit.
        BackendError: the back end asked for can't run here.
    """
    loss, _ = margin_softmax_filtered(
        x, w, indptr, indices, weights=weights, w_norms=w_norms, shard=shard, backend=backend,
        **options,
    )  # fmt: skip
    return loss


def margin_softmax_filtered(
    x: Tensor,
    w: Tensor,
    indptr: Tensor,
    indices: Tensor,
    *,
    weights: Tensor | None = None,
    w_norms: Tensor | None = None,
    shard: Shard | None = None,
    backend: str = "auto",
    **options: Any,
) -> tuple[Tensor, Skipped]:
    """`margin_softmax`, and what the certified filter (`delta` > 0) leaves out of its gradients."""
    checked = MarginOptions(**options)
    _check(x, w, indptr, indices, weights, w_norms, shard)
    dtype = checked.compute_dtype(x, w)
    if x.shape[0] == 0:
        loss = x.to(torch.float64 if dtype == torch.float64 else torch.float32).sum(1)
        return loss, Skipped(torch.zeros_like(loss), torch.zeros_like(indptr[0]), 0)
    chosen = _select(backend, x.device.type, str(dtype), x.shape[1])
    return _margin_softmax(x, w, indptr, indices, weights, w_norms, shard, chosen, dtype, checked)


@torch.compiler.assume_constant_result
def _select(backend: str, device: str, dtype: str, dim: int) -> str:
    return select("margin_softmax", backend, device=device, dtype=dtype, dim=dim).name


def _check(
    x: Tensor,
    w: Tensor,
    indptr: Tensor,
    indices: Tensor,
    weights: Tensor | None,
    w_norms: Tensor | None,
    shard: Shard | None,
) -> None:
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[1]:
        raise ValueError(f"x {tuple(x.shape)} and w {tuple(w.shape)}: need [B, D] and [C, D]")
    if w.shape[0] == 0 or w.shape[1] == 0:
        raise ValueError(f"w is {tuple(w.shape)}: need at least one column and one dimension")
    if not x.is_floating_point() or not w.is_floating_point():
        raise ValueError(f"x is {x.dtype} and w is {w.dtype}: both must be floating point")
    if indptr.dtype != torch.int64 or indices.dtype != torch.int64:
        raise ValueError(f"indptr is {indptr.dtype}, indices is {indices.dtype}: need torch.int64")
    if indptr.shape != (x.shape[0] + 1,) or indices.ndim != 1:
        raise ValueError(
            f"indptr {tuple(indptr.shape)}, indices {tuple(indices.shape)} for {x.shape[0]} rows: "
            f"need [{x.shape[0] + 1}] and [nnz]"
        )
    given = [tensor for tensor in (x, w, indptr, indices, weights, w_norms) if tensor is not None]
    devices = {tensor.device for tensor in given}
    if len(devices) > 1:
        raise ValueError(f"tensors are on {sorted(map(str, devices))}: need one device")
    if weights is not None and weights.shape != indices.shape:
        raise ValueError(f"weights {tuple(weights.shape)} for indices {tuple(indices.shape)}")
    if w_norms is not None and (w_norms.shape != w.shape[:1] or w.requires_grad):
        raise ValueError(
            f"w_norms {tuple(w_norms.shape)} for w {tuple(w.shape)}, requires_grad={w.requires_grad}"
            ": need [C], and a frozen w"
        )
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return  # elsewhere the checks below would cost a synchronisation
    n = indices.numel()
    if int(indptr[0]) != 0 or int(indptr[-1]) != n or bool((indptr.diff() < 0).any()):
        raise ValueError(f"indptr must rise from 0 to {n}; got {indptr[:8].tolist()}…")
    if n and (int(indices.min()) < 0 or (shard is None and int(indices.max()) >= w.shape[0])):
        raise ValueError(
            f"indices span {int(indices.min())}..{int(indices.max())}; "
            f"w has the rows 0..{w.shape[0] - 1}"
        )


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


# --- the part that all back ends share -------------------------------------------------------


def _margin_softmax(
    x: Tensor,
    w: Tensor,
    indptr: Tensor,
    indices: Tensor,
    weights: Tensor | None,
    w_norms: Tensor | None,
    shard: Shard | None,
    backend: str,
    dtype: torch.dtype,
    options: MarginOptions,
) -> tuple[Tensor, Skipped]:
    x = x.contiguous()  # so that its norms are summed in one order
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    counts = indptr.diff()
    rows = torch.repeat_interleave(counts, output_size=indices.shape[0])
    if weights is None:
        weights = (1 / counts.clamp_min(1).to(exact))[rows]
    norms = x.detach().to(exact).norm(dim=1).clamp_min(MIN_NORM)
    loss, mass, cells = _MarginSoftmax.apply(  # type: ignore[no-untyped-call]
        x, w, w_norms, norms, indptr, indices, rows, weights.detach().to(exact), shard, backend,
        dtype, options,
    )  # fmt: skip
    blocks = -(-x.shape[0] // CELL_ROWS)
    return loss, Skipped(mass, cells, blocks * -(-w.shape[0] // CELL_COLUMNS))


class _MarginSoftmax(torch.autograd.Function):
    """Saves O(B + nnz) beside its inputs and what the back end keeps."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        w: Tensor,
        w_norms: Tensor | None,
        norms: Tensor,
        indptr: Tensor,
        indices: Tensor,
        rows: Tensor,
        weights: Tensor,
        shard: Shard | None,
        backend: str,
        dtype: torch.dtype,
        options: MarginOptions,
    ) -> tuple[Tensor, Tensor, Tensor]:
        need_x, need_w = ctx.needs_input_grad[:2]
        own: Tensor | None = None
        if shard is not None:  # from here on, only the positives among this process's columns
            own = (indices >= shard.first) & (indices < shard.first + w.shape[0])
            local_rows, local = rows[own], indices[own] - shard.first
            local_ptr = torch.searchsorted(
                local_rows, torch.arange(x.shape[0] + 1, device=x.device)
            )
        else:
            local_rows, local, local_ptr = rows, indices, indptr
        problem = (
            _unit(x, norms), w, w_norms, local_ptr, local, local_rows, options.scale, dtype,
            options.step, options.scratch_bytes(x.device), backend,
        )  # fmt: skip
        filters = options.delta > 0 and (need_x or need_w)
        log_z, found, shares, kept = torch.ops.pymcip.margin_softmax_sums(
            *problem, need_x, need_w, filters
        )
        cosine = found
        processes = 1
        if shard is not None:
            local_log_z = log_z
            log_z, cosine, processes = _over_shards(log_z, found, own, shard.group)
            if filters:
                shares = shares * (local_log_z - log_z).exp().nan_to_num(0.0)[:, None]
        value, slope = margin_logit(cosine, options.margin, options.continuation)
        gap = log_z[rows] - options.scale * value
        softplus = torch.logaddexp(gap, torch.zeros_like(gap))
        loss = _row_sums(weights * softplus, indptr)
        pull = weights * torch.sigmoid(gap)
        if filters:
            shares = shares * (indptr.diff() > 0)[:, None]
            active, mass = _choose_cells(shares, options.delta / processes)
            if need_w:  # dW takes the positives' terms from their cells
                active[local_rows // CELL_ROWS, local // CELL_COLUMNS] = True
                mass = _mass_outside(shares, active)
            skipped = active.numel() - active.sum()
        else:
            active = None
            mass, skipped = torch.zeros_like(log_z), torch.zeros_like(indptr[0])
        ctx.save_for_backward(
            x, w, w_norms, norms, indptr, local_ptr, local, local_rows, rows, log_z, pull, slope, own,
            active, *kept,
        )  # fmt: skip
        ctx.shard, ctx.backend, ctx.dtype, ctx.options = shard, backend, dtype, options
        ctx.mark_non_differentiable(mass, skipped)
        return loss, mass, skipped

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (
            x, w, w_norms, norms, indptr, local_ptr, local, local_rows, rows, log_z, pull, slope,
            own, active, *kept,
        ) = ctx.saved_tensors  # fmt: skip
        options = ctx.options
        need_x, need_w = ctx.needs_input_grad[:2]
        unit = _unit(x, norms)
        pull = pull * grad_outputs[0].to(pull.dtype)[rows]
        negative = options.scale * _row_sums(pull, indptr)
        positive = -options.scale * slope * pull
        grad_unit, grad_w = torch.ops.pymcip.margin_softmax_gradients(
            unit, w, w_norms, local_ptr, local, local_rows, options.scale, ctx.dtype,
            options.step, options.scratch_bytes(x.device), ctx.backend, log_z, negative,
            positive if own is None else positive[own], active, kept, need_x, need_w,
        )  # fmt: skip
        grad_x = None
        if need_x:
            if ctx.shard is not None:
                torch.distributed.all_reduce(grad_unit, group=ctx.shard.group)
            grad_x = through_norm(grad_unit, unit, norms[:, None]).to(x.dtype)
        return grad_x, grad_w if need_w else None, *[None] * 10


def _row_sums(values: Tensor, indptr: Tensor) -> Tensor:
    """[B], sums of the rows' values [nnz], in a fixed order: on a GPU index_add has none."""
    return torch.segment_reduce(values, "sum", offsets=indptr, initial=0, unsafe=True)


def _unit(x: Tensor, norms: Tensor) -> Tensor:
    return x.to(norms.dtype) / norms[:, None]


def through_norm(grad: Tensor, unit: Tensor, norms: Tensor) -> Tensor:
    """Gradient with respect to v of a function of v/|v|: project out v's direction, divide by |v|."""
    return (grad - (grad * unit).sum(1, keepdim=True) * unit) / norms


def finite(log_z: Tensor) -> Tensor:
    """A row whose columns are all positives has log Z = -inf, and no negatives."""
    return log_z.clamp_min(torch.finfo(log_z.dtype).min)


def _over_shards(
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


def _choose_cells(shares: Tensor, delta: float) -> tuple[Tensor, Tensor]:
    """Which cells to keep, bool [row blocks, cells], and the mass [B] that goes with the others.

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
    return active, _mass_outside(shares, active)


def _mass_outside(shares: Tensor, active: Tensor) -> Tensor:
    dropped = (~active).repeat_interleave(CELL_ROWS, dim=0)[: shares.shape[0]]
    return (shares * dropped).sum(1)


def probe_triton() -> str | None:
    """Why the Triton kernels can't run on this machine; None if they can."""
    try:
        from pymcip.triton_kernels.tuning import probe
    except ImportError as error:
        return f"Triton is missing or too old ({error}); pip install 'triton>=3.4'"
    return probe()


# --- the two operators ------------------------------------------------------------------------

_PROBLEM = (
    "Tensor x, Tensor w, Tensor? w_norms, Tensor indptr, Tensor indices, Tensor rows, "
    "float scale, ScalarType dtype, int chunk, int scratch"
)
_FIELDS = 10  # the arguments above are Problem's fields, in order


def _dense(value: Any) -> Any:
    """A tensor that is dense and row-major, with the strides that go with it; else as it is."""
    if not isinstance(value, Tensor):
        return value
    # The view: `contiguous` leaves the stride of a dimension of length 1 as it was.
    return value.contiguous().view(-1).view(value.shape)


def _load(backend: str) -> Any:
    (row,) = (row for row in backends("margin_softmax") if row.name == backend)
    return row.load()


@contextmanager
def _alone_on(device: torch.device) -> Iterator[None]:
    """Without autocast, and with launches going to the tensors' GPU."""
    with torch.autocast(device.type, enabled=False), ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        yield


@torch.library.custom_op(
    "pymcip::margin_softmax_sums",
    mutates_args=(),
    schema=f"({_PROBLEM}, str backend, bool need_x, bool need_w, bool need_shares)"
    " -> (Tensor, Tensor, Tensor, Tensor[])",
)
def _sums(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    problem = Problem(*map(_dense, arguments[:_FIELDS]))
    backend, *needs = arguments[_FIELDS:]
    with _alone_on(problem.x.device):
        result = _load(backend).sums(problem, *needs)
    return result.log_z, result.cosine, result.shares, result.kept


@_sums.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    problem, (backend, *needs) = Problem(*arguments[:_FIELDS]), arguments[_FIELDS:]
    x, (count, _) = problem.x, problem.x.shape
    kept = _load(backend).kept(problem, *needs)
    return (
        x.new_empty(count),
        x.new_empty(problem.indices.shape),
        x.new_empty(count, problem.cells if needs[-1] else 0),
        [x.new_empty(shape, dtype=dtype) for shape, dtype in kept],
    )


@torch.library.custom_op(
    "pymcip::margin_softmax_gradients",
    mutates_args=(),
    schema=f"({_PROBLEM}, str backend, Tensor log_z, Tensor negative, Tensor positive,"
    " Tensor? active, Tensor[] kept, bool need_x, bool need_w) -> (Tensor, Tensor)",
)
def _gradients(*arguments: Any) -> tuple[Tensor, Tensor]:
    problem = Problem(*map(_dense, arguments[:_FIELDS]))
    backend, *coefficients, kept, need_x, need_w = arguments[_FIELDS:]
    with _alone_on(problem.x.device):
        grad_x, grad_w = _load(backend).gradients(
            problem, Coefficients(*map(_dense, coefficients)), kept, need_x, need_w
        )
    return grad_x, grad_w


@_gradients.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    x, w, (need_x, need_w) = *arguments[:2], arguments[-2:]
    return (
        x.new_empty(x.shape if need_x else 0),
        w.new_empty(w.shape if need_w else 0),
    )
