"""Inputs of the bench of the margin losses, and what their results are compared with, in fp64."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

CHECKED_ROWS, CHECKED_COLUMNS = 64, 256
PART = 65_536  # columns made at a time


class Positives(NamedTuple):
    """In CSR form, as `margin_softmax` takes them; `rows` is each one's row."""

    indptr: Tensor
    indices: Tensor
    rows: Tensor

    @classmethod
    def of(cls, columns: Tensor) -> Positives:
        """From [B, n] column indices."""
        count, each = columns.shape
        ids = torch.arange(count + 1, device=columns.device)
        return cls(ids * each, columns.reshape(-1), ids[:-1].repeat_interleave(each))


class Expected(NamedTuple):
    """fp64: losses [B], or their one scalar; gradients of the checked rows and columns.

    `unit_x` and `unit_w` are with respect to unit rows, `dx` and `dw` to the rows as they are.
    """

    loss: Tensor
    unit_x: Tensor
    dx: Tensor
    unit_w: Tensor
    dw: Tensor


class Case:
    """The inputs of one size, the same in every process, and their reference results."""

    def __init__(self, rows: int, columns: int, dim: int, options: argparse.Namespace) -> None:
        self.size, self.options = (rows, columns, dim), options
        device = self.device = torch.device(options.device)
        generator = torch.Generator(device).manual_seed(0)

        def noise(*shape: int) -> Tensor:
            """Gaussian rows of about unit length."""
            return torch.randn(shape, generator=generator, device=device).mul_(dim**-0.5)

        size = min(options.cluster, columns)
        clusters = columns // size
        centres = normalize(noise(clusters, dim), dim=1)
        dtype = getattr(torch, options.bank_dtype)
        self.bank = torch.empty(columns, dim, dtype=dtype, device=device)
        for first, part in zip(range(0, columns, PART), self.bank.split(PART), strict=True):
            ids = torch.arange(first, first + len(part), device=device) // size
            near = centres[ids.clamp_max(clusters - 1)] + 0.75 * noise(*part.shape)
            part.copy_(normalize(near, dim=1))
        self.norms = torch.cat([part.float().norm(dim=1) for part in self.bank.split(PART)])
        cluster = torch.randint(clusters, (rows, 1), generator=generator, device=device)
        order = torch.rand(rows, size, generator=generator, device=device).argsort(dim=1)
        columns_of = cluster * size + order[:, : min(options.positives, size)]
        self.several, self.one = Positives.of(columns_of), Positives.of(columns_of[:, :1])
        mean = self.bank[columns_of].float().mean(1)
        self.x = normalize(mean, dim=1) + 0.5 * noise(rows, dim)
        self.row_ids = spread(rows, CHECKED_ROWS, device)
        labels = self.one.indices[self.row_ids]
        self.column_ids = torch.cat(
            [labels, spread(columns, CHECKED_COLUMNS - CHECKED_ROWS, device)]
        ).unique()
        self._matrix: Tensor | None = None
        self._expected: dict[tuple[str, bool], Expected] = {}

    @property
    def labels(self) -> Tensor:
        """The one positive of each row."""
        return self.one.indices

    @property
    def matrix(self) -> Tensor:
        """The trainable matrix, fp32: the bank's rows, with norms from 0.5 to 2."""
        if self._matrix is None:
            generator = torch.Generator(self.device).manual_seed(1)
            norms = torch.rand(len(self.bank), 1, generator=generator, device=self.device)
            self._matrix = self.bank.float().mul_(norms.mul_(2).sub_(1).exp2_())
        return self._matrix

    def expected(self, kind: str, trainable: bool) -> Expected:
        """kind: "several" or "one" positive, with the margin; "plain", one without; "sigmoid"."""
        key = kind, trainable
        if key not in self._expected:
            w = self.matrix if trainable else self.bank
            ids = self.row_ids, self.column_ids
            scale = self.options.scale
            if kind == "sigmoid":
                self._expected[key] = sigmoid_reference(self.x, w, self.labels, scale, *ids)
            else:
                positives = self.several if kind == "several" else self.one
                margin = 0.0 if kind == "plain" else self.options.margin
                self._expected[key] = reference(self.x, w, positives, scale, margin, *ids)
        return self._expected[key]


def spread(count: int, most: int, device: torch.device) -> Tensor:
    """At most that many of `count` ids, evenly spread."""
    exact = torch.float64
    return torch.linspace(0, count - 1, min(count, most), dtype=exact, device=device).long()


def unit_rows(part: Tensor) -> tuple[Tensor, Tensor]:
    """fp64 unit rows, and their norms [n, 1]."""
    part = part.detach().double()
    norms = part.norm(dim=1, keepdim=True)
    return part / norms, norms


def through_norm(grad: Tensor, unit: Tensor, norms: Tensor) -> Tensor:
    return (grad - (grad * unit).sum(1, keepdim=True) * unit) / norms


def chunks(w: Tensor, rows: int) -> Iterable[tuple[int, Tensor]]:
    """fp64 unit rows of W, as many at once as keep [rows, chunk] within 512 MiB."""
    size = max(1, 2**26 // max(rows, w.shape[1]))
    for start in range(0, len(w), size):
        yield start, unit_rows(w[start : start + size])[0]


@torch.no_grad()
def reference(
    x: Tensor,
    w: Tensor,
    positives: Positives,
    scale: float,
    margin: float,
    row_ids: Tensor,
    column_ids: Tensor,
) -> Expected:
    """The contract of `pymcip.ops.margin_softmax` ("linear") in fp64, apart from its code."""
    _, indices, rows = positives
    x_unit, x_norms = unit_rows(x)
    total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    pulled = torch.zeros(len(row_ids), x.shape[1], dtype=torch.float64, device=x.device)
    for start, columns in chunks(w, len(x)):
        e = (x_unit @ columns.T).sub_(1).mul_(scale).exp_()
        here = (indices >= start) & (indices < start + len(columns))
        e[rows[here], indices[here] - start] = 0
        total += e.sum(1)
        pulled += e[row_ids] @ columns
    log_z = total.log() + scale
    own = unit_rows(w[indices])[0]
    cosine = (x_unit[rows] * own).sum(1).clamp(-1, 1)
    theta = cosine.acos()
    inside = theta + margin <= math.pi
    psi = torch.where(inside, (theta + margin).cos(), cosine - margin * math.sin(margin))
    slope = torch.where(inside, (theta + margin).sin() / theta.sin(), 1.0)
    gap = log_z[rows] - scale * psi
    weights = 1 / positives.indptr.diff().double()[rows]
    loss = torch.zeros_like(total).index_add_(0, rows, weights * gap.logaddexp(0 * gap))
    pull = weights * gap.sigmoid()
    negative = scale * torch.zeros_like(total).index_add_(0, rows, pull)
    positive = -scale * slope * pull
    of_own = torch.zeros_like(x_unit).index_add_(0, rows, positive[:, None] * own)
    unit_x = (negative / total)[row_ids, None] * pulled + of_own[row_ids]

    w_unit, w_norms = unit_rows(w[column_ids])
    pushed = negative[:, None] * (scale * x_unit @ w_unit.T - log_z[:, None]).exp()
    hit = indices[:, None] == column_ids
    entry, place = hit.nonzero(as_tuple=True)
    pushed[rows[entry], place] = positive[entry]
    unit_w = pushed.T @ x_unit
    return Expected(
        loss,
        unit_x,
        through_norm(unit_x, x_unit[row_ids], x_norms[row_ids]),
        unit_w,
        through_norm(unit_w, w_unit, w_norms),
    )


@torch.no_grad()
def sigmoid_reference(
    x: Tensor, w: Tensor, labels: Tensor, scale: float, row_ids: Tensor, column_ids: Tensor
) -> Expected:
    """Mean over all pairs of the sigmoid loss of scale (cos - 1), one positive per row; unit rows."""
    x_unit = unit_rows(x)[0]
    rows = torch.arange(len(x), device=x.device)
    norm = 1 / (len(x) * len(w))
    loss = torch.zeros((), dtype=torch.float64, device=x.device)
    unit_x = torch.zeros(len(row_ids), x.shape[1], dtype=torch.float64, device=x.device)
    for start, columns in chunks(w, len(x)):
        logits = (x_unit @ columns.T).sub_(1).mul_(scale)
        target = torch.zeros_like(logits)
        here = (labels >= start) & (labels < start + len(columns))
        target[rows[here], labels[here] - start] = 1
        loss += norm * (logits.logaddexp(0 * logits) - target * logits).sum()
        unit_x += norm * scale * (logits.sigmoid() - target)[row_ids] @ columns
    w_unit = unit_rows(w[column_ids])[0]
    difference = (scale * (x_unit @ w_unit.T - 1)).sigmoid()
    difference -= (labels[:, None] == column_ids).double()
    unit_w = norm * scale * difference.T @ x_unit
    return Expected(loss, unit_x, unit_x, unit_w, unit_w)


class Result(NamedTuple):
    loss: Tensor  # [B], or a scalar
    dx: Tensor | None = None
    dw: Tensor | None = None
    kept: float | Tensor | None = None  # share of the filter's cells


def errors(case: Case, result: Result, wanted: Expected, *, unit: bool = False) -> dict[str, float]:
    """By name, those of what was computed; `unit`: its gradients are of unit rows."""
    loss = wanted.loss.sum() if result.loss.ndim == 0 else wanted.loss
    found = {"loss err": error(result.loss, loss)}
    if result.dx is not None:
        found["dX err"] = error(result.dx[case.row_ids], wanted.unit_x if unit else wanted.dx)
    if result.dw is not None:
        found["dW err"] = error(result.dw[case.column_ids], wanted.unit_w if unit else wanted.dw)
    if result.kept is not None:
        found["kept"] = float(result.kept)
    return found


def error(found: Tensor, wanted: Tensor) -> float:
    difference = (found.detach().double() - wanted).abs().max()
    return float(difference / wanted.abs().max())
