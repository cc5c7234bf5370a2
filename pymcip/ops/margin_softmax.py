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
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pymcip.ops.dispatch import select

MIN_SIN_SQUARED = 1e-6
MIN_NORM = 1e-12
CONTINUATIONS = ("linear", "none", "easy")
# Positives are gathered in blocks of this many rows: [block, D] is the largest copy of bank rows.
POSITIVE_BLOCK = 65_536


@dataclass(frozen=True)
class MarginOptions:
    """What all back ends share: s > 0, 0 <= m < pi, the continuation, and columns at a time."""

    scale: float = 30.0
    margin: float = 0.0
    continuation: str = "linear"
    chunk: int = 8192

    def __post_init__(self) -> None:
        if not self.scale > 0 or not 0 <= self.margin < math.pi:
            raise ValueError(
                f"scale={self.scale}, margin={self.margin}: need scale > 0 and 0 <= margin < pi"
            )
        if self.continuation not in CONTINUATIONS:
            raise ValueError(
                f"continuation={self.continuation!r}; allowed: {', '.join(CONTINUATIONS)}"
            )
        if self.chunk < 1:
            raise ValueError(f"chunk={self.chunk}; need at least 1")


def margin_softmax(
    x: Tensor,
    w: Tensor,
    indptr: Tensor,
    indices: Tensor,
    *,
    weights: Tensor | None = None,
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
        backend: a name from `pymcip.ops.backends("margin_softmax")`, or "auto".
        **options: fields of `MarginOptions`: scale (30), margin (0, radians), continuation
            ("linear"), chunk (8192 columns at a time: extra memory is O(B * chunk), never B * C).

    Returns:
        Losses [B], fp32 (fp64 if `x` is fp64). Arithmetic is in that dtype, autocast or not.

    Raises:
        ValueError: shapes, dtypes, indices or options don't fit.
        BackendError: the back end asked for can't run here.
    """
    checked = MarginOptions(**options)
    _check(x, w, indptr, indices, weights)
    chosen = select("margin_softmax", backend, device=x.device.type, dtype=str(x.dtype))
    result: Tensor = chosen.load()(x, w, indptr, indices, weights, checked)
    return result


def _check(x: Tensor, w: Tensor, indptr: Tensor, indices: Tensor, weights: Tensor | None) -> None:
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[1]:
        raise ValueError(f"x {tuple(x.shape)} and w {tuple(w.shape)}: need [B, D] and [C, D]")
    if not x.is_floating_point() or not w.is_floating_point():
        raise ValueError(f"x is {x.dtype} and w is {w.dtype}: both must be floating point")
    if indptr.dtype != torch.int64 or indices.dtype != torch.int64:
        raise ValueError(f"indptr is {indptr.dtype}, indices is {indices.dtype}: need torch.int64")
    if indptr.shape != (x.shape[0] + 1,) or indices.ndim != 1:
        raise ValueError(
            f"indptr {tuple(indptr.shape)}, indices {tuple(indices.shape)} for {x.shape[0]} rows: "
            f"need [{x.shape[0] + 1}] and [nnz]"
        )
    devices = {tensor.device for tensor in (x, w, indptr, indices)}
    if len(devices) > 1:
        raise ValueError(f"tensors are on {sorted(map(str, devices))}: need one device")
    if weights is not None and weights.shape != indices.shape:
        raise ValueError(f"weights {tuple(weights.shape)} for indices {tuple(indices.shape)}")
    if x.device.type == "cpu":  # elsewhere the check would cost a synchronisation
        n = indices.numel()
        if int(indptr[0]) != 0 or int(indptr[-1]) != n or bool((indptr.diff() < 0).any()):
            raise ValueError(f"indptr must rise from 0 to {n}; got {indptr[:8].tolist()}…")
        if n and (int(indices.min()) < 0 or int(indices.max()) >= w.shape[0]):
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


def margin_softmax_torch(
    x: Tensor,
    w: Tensor,
    indptr: Tensor,
    indices: Tensor,
    weights: Tensor | None,
    options: MarginOptions,
) -> Tensor:
    """The oracle: plain torch in fp32 (or fp64), one chunk of columns at a time, on any device."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    counts = indptr.diff()
    if weights is None:
        share = 1 / counts.clamp_min(1).to(dtype)
        weights = share.repeat_interleave(counts)
    weights = weights.detach().to(dtype)
    loss: Tensor = _MarginSoftmax.apply(x.to(dtype), w, indptr, indices, weights, options)  # type: ignore[no-untyped-call]
    return loss


class _MarginSoftmax(torch.autograd.Function):
    """Forward keeps O(B + nnz) beside its inputs; backward computes the logits anew."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        w: Tensor,
        indptr: Tensor,
        indices: Tensor,
        weights: Tensor,
        options: MarginOptions,
    ) -> Tensor:
        scale, chunk = options.scale, options.chunk
        with torch.autocast(x.device.type, enabled=False):
            norms = x.norm(dim=1, keepdim=True).clamp_min(MIN_NORM)
            unit = x / norms
            rows = torch.repeat_interleave(indptr.diff())
            log_z = x.new_full((x.shape[0],), -math.inf)
            for start, columns in _unit_chunks(w, chunk, x.dtype):
                logits = (unit @ columns.T).mul_(scale)
                _mask_positives(logits, start, rows, indices, -math.inf)
                log_z = torch.logaddexp(log_z, logits.logsumexp(1))
            cosine = torch.empty_like(weights)
            for block, bank_rows in _positive_blocks(w, indices, x.dtype):
                cosine[block] = (unit[rows[block]] * bank_rows).sum(1)
            value, slope = margin_logit(cosine, options.margin, options.continuation)
            gap = log_z[rows] - scale * value
            softplus = torch.logaddexp(gap, torch.zeros_like(gap))
            loss = torch.zeros_like(log_z).index_add_(0, rows, weights * softplus)
        pull = weights * torch.sigmoid(gap)
        ctx.save_for_backward(unit, norms, w, rows, indices, log_z, pull, slope)
        ctx.scale, ctx.chunk = scale, chunk
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        unit, norms, w, rows, indices, log_z, pull, slope = ctx.saved_tensors
        scale, chunk = ctx.scale, ctx.chunk
        need_x, need_w = ctx.needs_input_grad[:2]
        with torch.autocast(unit.device.type, enabled=False):
            pull = pull * grad_outputs[0].to(unit.dtype)[rows]
            push = torch.zeros_like(log_z).index_add_(0, rows, pull)
            # dL/dcos of the positives, and of the negatives (chunk by chunk below).
            pull = -scale * slope * pull
            grad_unit = torch.zeros_like(unit)
            grad_w = torch.zeros(w.shape, dtype=unit.dtype, device=w.device) if need_w else None
            for start, columns in _unit_chunks(w, chunk, unit.dtype):
                logits = (unit @ columns.T).mul_(scale)
                _mask_positives(logits, start, rows, indices, -math.inf)
                # A row whose columns are all positives has log_z = -inf, and no negatives.
                grad = (logits - log_z.clamp_min(torch.finfo(unit.dtype).min)[:, None]).exp_()
                grad.mul_(scale * push[:, None])
                if need_x:
                    grad_unit.addmm_(grad, columns)
                if grad_w is not None:
                    torch.mm(grad.T, unit, out=grad_w[start : start + columns.shape[0]])
            for block, bank_rows in _positive_blocks(w, indices, unit.dtype):
                if need_x:
                    grad_unit.index_add_(0, rows[block], pull[block, None] * bank_rows)
                if grad_w is not None:
                    grad_w.index_add_(0, indices[block], pull[block, None] * unit[rows[block]])
            grad_x = _through_norm(grad_unit, unit, norms) if need_x else None
            if grad_w is not None:
                for start in range(0, w.shape[0], chunk):
                    part = slice(start, start + chunk)
                    values = w[part].to(unit.dtype)
                    lengths = values.norm(dim=1, keepdim=True).clamp_min(MIN_NORM)
                    grad_w[part] = _through_norm(grad_w[part], values / lengths, lengths)
                grad_w = grad_w.to(w.dtype)
        return grad_x, grad_w, None, None, None, None


def _unit_chunks(w: Tensor, chunk: int, dtype: torch.dtype) -> Any:
    for start in range(0, w.shape[0], chunk):
        part = w[start : start + chunk].to(dtype)
        yield start, part / part.norm(dim=1, keepdim=True).clamp_min(MIN_NORM)


def _positive_blocks(w: Tensor, indices: Tensor, dtype: torch.dtype) -> Any:
    for start in range(0, indices.numel(), POSITIVE_BLOCK):
        block = slice(start, start + POSITIVE_BLOCK)
        part = w[indices[block]].to(dtype)
        yield block, part / part.norm(dim=1, keepdim=True).clamp_min(MIN_NORM)


def _mask_positives(
    logits: Tensor, start: int, rows: Tensor, indices: Tensor, value: float
) -> None:
    here = (indices >= start) & (indices < start + logits.shape[1])
    logits[rows[here], indices[here] - start] = value


def _through_norm(grad: Tensor, unit: Tensor, norms: Tensor) -> Tensor:
    """Gradient with respect to v of a function of v/|v|: project out v's direction, divide by |v|."""
    return (grad - (grad * unit).sum(1, keepdim=True) * unit) / norms
