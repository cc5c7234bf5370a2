"""`margin_softmax`: softmax losses with an additive angular margin over very many columns.

Contract. With unit rows x_i = X_i/|X_i| and w_j = W_j/|W_j|, cos_ij = <x_i, w_j>, the positives P_i
of row i (column indices, given in CSR form), scale s, margin m (radians) and weights a_ip >= 0:

    Z_i = sum over j not in P_i of exp(s cos_ij)
    L_i = sum over p in P_i of a_ip softplus(log Z_i - s psi(cos_ip)),    psi(cos t) = cos(t + m)

A row's positives never act as negatives for each other. Weights default to 1/|P_i|; a row without
positives has loss 0 and gradient 0; Z_i = 0 (every column is a positive) gives loss 0.
With one positive per row this is ArcMargin (ArcFace, arXiv 1801.07698); with several it is
MCArcMargin (arXiv 2409.01936), in the form of `positives="apart"`, which is this project's. The form
of the paper's authors is `positives="compete"`: a softmax in whose denominator a row's own positives
stay, each with its margin, so that they compete with each other:

    L_i = sum over p in P_i of a_ip (log D_i - s psi(cos_ip)),
          D_i = Z_i + sum over q in P_i of exp(s psi(cos_iq))

With one positive per row both are the same. To it `repel` = r adds, for a row with positives and
negatives, r times the largest -log of the softmax's share of a negative, that of the lowest cosine:

    r (log D_i - s min over j not in P_i of cos_ij)

which pushes away what has most of the softmax, and draws the farthest column nearer.

Where t + m > pi, cos(t + m) would rise again; `continuation` says what stands there instead:
"linear": cos t - m sin m; "none": cos(t + m) all the same; "easy": margin only where cos t > 0.
The gradient is the exact one, psi'(cos t) = cos m + cos t sin m / sin t, with sin^2 t >= 1e-6.

The certified filter. The softmax mass of row i in a cell of 256 columns is its share of Z_i. With
`delta` > 0, every block of 128 rows leaves out of its gradients the lightest cells, as long as no
row loses more than `delta` of its mass: |error of dL_i/dx_i| <= s * delta * (sum_p a_ip + repel) for
unit x_i. Losses stay exact, and so do the terms of the positives and of the farthest column.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pymcip.ops.dispatch import select
from pymcip.ops.margin_contract import (
    CELL_COLUMNS,
    CELL_ROWS,
    MIN_NORM,
    choose_cells,
    log_denominator,
    lowest_over_shards,
    margin_logit,
    mass_outside,
    negative_log_softmax,
    over_shards,
    row_sums,
    softplus,
    through_norm,
)
from pymcip.ops.margin_operators import FARTHEST, GRADIENTS, SUMS

CONTINUATIONS = ("linear", "none", "easy")
POSITIVES = ("apart", "compete")
COMPUTE = ("auto", "float64", "float32", "bfloat16", "float16")
LEAST_SCRATCH, MOST_SCRATCH = 1 << 28, 1 << 31  # bytes, by default


@dataclass(frozen=True)
class MarginOptions:
    """Options of the loss, the same for all back ends.

    Attributes:
        scale: s > 0.
        margin: m, radians, 0 <= m < pi.
        continuation: "linear", "none" or "easy".
        positives: "apart", or "compete": a row's positives are in each other's denominator.
        repel: r >= 0, of a row's farthest negative; for positives="compete". It costs one more product of
            all rows and columns, in the rows' precision.
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
    positives: str = "apart"
    repel: float = 0.0
    compute: str = "auto"
    chunk: int = 8192
    scratch: int | None = None
    delta: float = 0.0

    def __post_init__(self) -> None:
        if not self.scale > 0 or not 0 <= self.margin < math.pi:
            raise ValueError(
                f"scale={self.scale}, margin={self.margin}: need scale > 0 and 0 <= margin < pi"
            )
        for name, allowed in (
            ("continuation", CONTINUATIONS), ("positives", POSITIVES), ("compute", COMPUTE)
        ):  # fmt: skip
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name}={value!r}; allowed: {', '.join(allowed)}")
        if not (self.repel == 0 or (self.repel > 0 and self.positives == "compete")):
            raise ValueError(
                f"repel={self.repel}, positives={self.positives!r}: need repel >= 0, and 0 unless "
                "positives='compete'"
            )
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
    """This process's part of the columns: `w` holds rows first .. first + C of the whole matrix, maybe none.

    Column indices stay those of the whole matrix. All processes of `group` (None: the default
    group) call the op with the same x, indptr and indices; three small all-reduces in the forward
    pass (two more with `repel`) give each of them the whole loss, one in the backward pass the whole dX.
    dW is the shard's.
    """

    first: int
    group: Any = None


class Skipped(NamedTuple):
    """What the certified filter left out of the gradients."""

    mass: Tensor  # [B] fp32, the share of each row's softmax mass that was dropped
    cells: Tensor  # int64 scalar, cells (128 rows x 256 columns) dropped by this process
    of: int  # cells in all


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
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    if x.shape[0] == 0:
        loss = x.to(exact).sum(1)
        return loss, Skipped(torch.zeros_like(loss), torch.zeros_like(indptr[0]), 0)
    chosen = _select(backend, x.device.type, str(dtype), x.shape[1])
    x = x.contiguous()  # so that its norms are summed in one order
    counts = indptr.diff()
    rows = torch.repeat_interleave(counts, output_size=indices.shape[0])
    if weights is None:
        weights = (1 / counts.clamp_min(1).to(exact))[rows]
    norms = x.detach().to(exact).norm(dim=1).clamp_min(MIN_NORM)
    loss, mass, cells = _MarginSoftmax.apply(  # type: ignore[no-untyped-call]
        x, w, w_norms, norms, indptr, indices, rows, weights.detach().to(exact), shard,
        chosen, dtype, checked,
    )  # fmt: skip
    blocks = -(-x.shape[0] // CELL_ROWS)
    return loss, Skipped(mass, cells, blocks * -(-w.shape[0] // CELL_COLUMNS))


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
    if (w.shape[0] == 0 and shard is None) or w.shape[1] == 0:
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


# --- loss and gradients from what a back end gives -----------------------------------------------


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
        local_rows, local, local_ptr = rows, indices, indptr
        if shard is not None:  # from here on, only the positives among this process's columns
            own = (indices >= shard.first) & (indices < shard.first + w.shape[0])
            local_rows, local = rows[own], indices[own] - shard.first
            starts = torch.arange(x.shape[0] + 1, device=x.device)
            local_ptr = torch.searchsorted(local_rows, starts)
        unit = _unit(x, norms)
        problem = (unit, w, w_norms, local_ptr, local, local_rows, options.scale)
        buffers = options.step, options.scratch_bytes(x.device)
        filters = options.delta > 0 and (need_x or need_w)
        if w.shape[0]:
            log_z, cosine, shares, kept = SUMS(
                *problem, dtype, *buffers, backend, need_x, need_w, filters
            )
        else:  # a shard without columns adds nothing to Z
            log_z, cosine = torch.full_like(norms, -math.inf), norms[:0]
            shares, kept = norms.new_empty(len(norms), 0), []
        processes = 1
        if shard is not None:
            local_log_z = log_z
            log_z, cosine, processes = over_shards(log_z, cosine, own, shard.group)
            if filters:
                shares = shares * (local_log_z - log_z).exp().nan_to_num(0.0)[:, None]
        value, slope = margin_logit(cosine, options.margin, options.continuation)
        of_positives = negative_log_softmax if options.positives == "compete" else softplus
        logits = options.scale * value
        losses, pull = of_positives(log_z, logits, weights, indptr, rows)
        loss, repel, farthest = row_sums(losses, indptr), None, None
        if options.repel > 0:
            farthest = FARTHEST(*problem, norms.dtype, *buffers)
            lowest = (unit * _columns(w, farthest, norms.dtype)[0]).sum(1)
            if shard is not None:
                lowest, farthest = lowest_over_shards(lowest, farthest, shard.first, shard.group)
            log_d = log_denominator(log_z, logits, indptr, rows)
            both = (indptr.diff() > 0) & (log_z > -math.inf)  # positives and negatives
            repel = options.repel * both.to(log_z.dtype)
            loss = loss + repel * (log_d - options.scale * lowest.where(both, 0.0))
            pull = pull - repel[rows] * (logits - log_d[rows]).exp()
        if filters:
            shares = shares * (indptr.diff() > 0)[:, None]
            active, mass = choose_cells(shares, options.delta / processes)
            if need_w:  # dW takes the positives' terms from their cells
                active[local_rows // CELL_ROWS, local // CELL_COLUMNS] = True
                mass = mass_outside(shares, active)
            skipped = active.numel() - active.sum()
        else:
            active = None
            mass, skipped = torch.zeros_like(log_z), torch.zeros_like(indptr[0])
        ctx.save_for_backward(
            x, w, w_norms, norms, indptr, local_ptr, local, local_rows, rows, log_z, pull, slope, own,
            active, repel, farthest, *kept,
        )  # fmt: skip
        ctx.shard, ctx.backend, ctx.dtype, ctx.options = shard, backend, dtype, options
        ctx.mark_non_differentiable(mass, skipped)
        return loss, mass, skipped

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (
            x, w, w_norms, norms, indptr, local_ptr, local, local_rows, rows, log_z, pull, slope,
            own, active, repel, farthest, *kept,
        ) = ctx.saved_tensors  # fmt: skip
        options = ctx.options
        need_x, need_w = ctx.needs_input_grad[:2]
        unit = _unit(x, norms)
        grad = grad_outputs[0].to(pull.dtype)
        pull = pull * grad[rows]
        negative = options.scale * row_sums(pull, indptr)
        if repel is not None:
            repel = options.scale * repel * grad
            negative = negative + repel
        positive = -options.scale * slope * pull
        if w.shape[0]:
            grad_unit, grad_w = GRADIENTS(
                unit, w, w_norms, local_ptr, local, local_rows, options.scale, ctx.dtype,
                options.step, options.scratch_bytes(x.device), ctx.backend, log_z, negative,
                positive if own is None else positive[own], active, kept, need_x, need_w,
            )  # fmt: skip
        else:
            grad_unit, grad_w = torch.zeros_like(unit), torch.zeros_like(w)
        if repel is not None:
            here = -repel * (farthest >= 0)
            other, lengths = _columns(w, farthest, unit.dtype)
            if need_x:
                grad_unit += here[:, None] * other
            if need_w and w.shape[0]:
                own_grad = through_norm(here[:, None] * unit, other, lengths).to(w.dtype)
                grad_w.index_put_((farthest.clamp_min(0),), own_grad, accumulate=True)
        grad_x = None
        if need_x:
            if ctx.shard is not None:
                torch.distributed.all_reduce(grad_unit, group=ctx.shard.group)
            grad_x = through_norm(grad_unit, unit, norms[:, None]).to(x.dtype)
        return grad_x, grad_w if need_w else None, *[None] * 10


def _unit(x: Tensor, norms: Tensor) -> Tensor:
    return x.to(norms.dtype) / norms[:, None]


def _columns(w: Tensor, columns: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Unit rows [B, D] of W and their lengths [B, 1]; any numbers where `columns` int64 [B] has -1."""
    if not w.shape[0]:
        w = w.new_ones(1, w.shape[1])
    part = w[columns.clamp_min(0)].to(dtype)
    lengths = part.norm(dim=1, keepdim=True).clamp_min(MIN_NORM)
    return part / lengths, lengths


def probe_triton() -> str | None:
    """Why the Triton kernels can't run on this machine; None if they can."""
    try:
        from pymcip.triton_kernels.tuning import probe
    except ImportError as error:
        return f"Triton is missing or too old ({error}); pip install 'triton>=3.4'"
    return probe()
