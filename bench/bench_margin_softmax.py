"""The margin losses, forward and backward, against their rivals and a bare matrix product.

One case is B rows, C columns, D dims; G is the time of one plain product of that size with its
output written, measured in the same run. "x ceiling" is a time as a multiple of G, "of ceiling" a
rate as a share of G's. TFLOP count the products that a mode is made of, 2 B C D each, whatever a
rival really computes (some compute the logits twice, a filter leaves products out).

    forward       1 product    MCArcMargin, the losses alone, no gradient
    mc            2            MCArcMargin: a frozen bank in half precision, several positives per
                               row; losses and dX
    mc filtered   2            the same with the certified filter
    arc kept      3            ArcMargin: a trainable fp32 matrix; losses, dX and dW; a scratch that
                               holds the exponentials
    arc           3            the same with a small scratch: the logits are computed anew
    arc filtered  3            the same with the certified filter

The data resemble those after training: columns in clusters, a cluster's columns side by side, rows
near the mean of their positives. "kept" is the share of cells that the filter left in.

Errors are largest absolute errors over the largest absolute value, against fp64 on the same fp32
inputs: losses of all rows (their sum, where a rival returns only that), dX of 64 rows, dW of at
most 256 columns.

Rivals do what they can of that work. ArcFace as plain torch, compiled, and pytorch-metric-learning
have one positive per row. Cross-entropy rivals (cut-cross-entropy, liger, quack) have no margin and
no norms either: they get m = 0 and one positive on unit rows times the scale, already rounded to
half precision. siglip-kernel has another loss (sigmoids, no softmax) with the same three products,
checked against its own fp64. memeff is left out: it takes only as many columns as rows.

Peak memory is above what was in use before the call, results included: on CUDA what torch
allocated, on the CPU the resident memory of a fresh process.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import itertools
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from harness import Report, Rival, Timing, common_arguments, compare
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, pad

from pymcip.ops import backends
from pymcip.ops.margin_softmax import MOST_SCRATCH, MarginOptions, margin_softmax_filtered

PRODUCTS = {  # by mode, the most telling first
    "mc": 2,
    "mc filtered": 2,
    "forward": 1,
    "arc": 3,
    "arc kept": 3,
    "arc filtered": 3,
}
PACKAGES = {  # modules, and what pip calls them
    "cut_cross_entropy": "cut-cross-entropy",
    "liger_kernel": "liger-kernel",
    "quack": "quack-kernels",
    "siglip_kernel": "siglip-kernel",
    "pytorch_metric_learning": "pytorch-metric-learning",
}
# Multiples of 384: quack's fastest path takes only multiples of 128, fastest of 192.
ROWS, COLUMNS, DIMS = (512, 4096, 8192), (168_192, 1_000_320, 12_000_000), (512, 768, 1152)
GOAL = (4096, 1_000_320, 768)  # the case that the project's goals are written for
OTHERS = ((8192, 168_192, 1152), (512, 12_000_000, 512))  # with it, every size at least once
DEFAULTS = {"cpu": ((512, 200_000, 768),), "cuda": (GOAL, *OTHERS)}
GEMM = "plain GEMM"
CHECKED_ROWS, CHECKED_COLUMNS = 64, 256
PART = 65_536  # columns made at a time
INT32 = 2**31  # some rivals' kernels address elements in 32 bits
RESERVE = 2 << 30  # bytes for buffers of the rivals' libraries

Size = tuple[int, int, int]


def main() -> None:
    options = arguments()
    if options.peak_of:
        mode, name = options.peak_of.split(":")
        print_peak(mode, name, options)
        return
    started = time.monotonic()
    chosen, left_out = select_cases(options, free_memory(options.device))
    missing = [pip for module, pip in PACKAGES.items() if importlib.util.find_spec(module) is None]
    print(f"rivals not installed: {', '.join(missing) or 'none'}")
    report = Report(
        "margin_softmax",
        device=options.device,
        dtype=options.bank_dtype,
        packages=tuple(PACKAGES.values()),
        store=options.store,
    )
    try:
        for place, (size, modes) in enumerate(chosen):
            case: Case | None = None
            for turn, mode in enumerate(modes):
                left = options.seconds - (time.monotonic() - started)
                if left < 0:
                    left_out.append((size, mode, f"--seconds {options.seconds:g} were over"))
                    continue
                case = case or Case(*size, options)
                to_come = len(modes) - turn + sum(len(more) for _, more in chosen[place + 1 :])
                measure(case, mode, report, left / 2 / to_come)  # the rest is setting up
            del case
    finally:
        for size, mode, reason in left_out:
            print(f"left out: B, C, D = {size}, {mode}: {reason}")
        notes = {"not_installed": missing, "left_out": [list(row) for row in left_out]}
        report.finish(notes=notes)


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = common_arguments(__doc__)
    parser.set_defaults(repetitions=None)
    add = parser.add_argument
    add("--rows", type=int, nargs="+", help="B; default: a choice of cases")
    add("--columns", type=int, nargs="+", help="C")
    add("--dims", type=int, nargs="+", help="D")
    add("--modes", nargs="+", choices=tuple(PRODUCTS), help="default: all in the first case")
    add("--full", action="store_true", help="all modes in all combinations of sizes")
    add("--seconds", type=float, help="begin no mode after that; default: 600, on cuda 240")
    add("--rivals", nargs="+", help="only those whose names contain one of these words")
    add("--compute", nargs="+", default=["auto"], help="dtypes of our products")
    add("--bank-dtype", choices=("bfloat16", "float16", "float32"), help="of the frozen bank")
    add("--scale", type=float, default=30.0)
    add("--margin", type=float, default=0.3)
    add("--delta", type=float, default=1e-3, help="of the filtered modes")
    add("--positives", type=int, default=8, help="per row, in MCArcMargin")
    add("--cluster", type=int, default=1024, help="columns of a cluster")
    add("--scratch", type=int, help="bytes; default: 2^31 on cuda, 2^26 on the CPU")
    add("--skip-memory", action="store_true", help="on the CPU: start no processes to measure it")
    add("--peak-of", help=argparse.SUPPRESS)  # MODE:RIVAL, in the process that measures its memory
    options = parser.parse_args(words)
    cuda = options.device == "cuda"
    options.repetitions = options.repetitions or (20 if cuda else 5)
    options.seconds = options.seconds or (240 if cuda else 600)
    # The one pass with a frozen bank needs bfloat16 on a GPU; the CPU's default matches the files.
    options.bank_dtype = options.bank_dtype or ("bfloat16" if cuda else "float16")
    options.scratch = options.scratch or (MOST_SCRATCH if cuda else 1 << 26)
    return options


# --- which cases ------------------------------------------------------------------------------


def select_cases(
    options: argparse.Namespace, free: float
) -> tuple[list[tuple[Size, list[str]]], list[tuple[Size, str, str]]]:
    """Sizes with their modes, the most telling first, and those that can't fit the memory.

    Without sizes asked for, all modes run for the first case only; the others show how the two
    losses scale.
    """
    given = options.rows or options.columns or options.dims
    defaults = DEFAULTS[options.device]
    if given or options.full:
        first = defaults[0]
        sizes = itertools.product(
            options.rows or (ROWS if options.full else first[:1]),
            options.columns or (COLUMNS if options.full else first[1:2]),
            options.dims or (DIMS if options.full else first[2:]),
        )
        order = {size: place for place, size in enumerate(defaults)}
        wanted = sorted(sizes, key=lambda size: (order.get(size, len(order)), math.prod(size)))
    else:
        wanted = list(defaults)
    chosen: list[tuple[Size, list[str]]] = []
    left_out: list[tuple[Size, str, str]] = []
    for place, size in enumerate(wanted):
        brief = not (given or options.full) and place > 0
        modes = options.modes or (["mc", "arc"] if brief else list(PRODUCTS))
        fitting = []
        for mode in modes:
            needed = bytes_needed(mode, *size, options.scratch)
            if needed <= free:
                fitting.append(mode)
            else:
                reason = f"needs {needed / 2**30:.0f} GiB of {free / 2**30:.0f} GiB free"
                left_out.append((size, mode, reason))
        if fitting:
            chosen.append((size, fitting))
    return chosen, left_out


def free_memory(device: str) -> float:
    """Bytes on a GPU; on the CPU whatever it takes."""
    return torch.cuda.mem_get_info()[0] if device == "cuda" else math.inf


def bytes_needed(mode: str, rows: int, columns: int, dim: int, scratch: int) -> int:
    """At least, for our op: the matrix of columns, what its gradient takes, and the scratch."""
    bank = 2 * columns * dim
    if not mode.startswith("arc"):
        return bank + scratch + RESERVE
    trainable = bank + 4 * columns * dim * 2 + 2 * columns * dim  # W, dW, W in half precision
    return trainable + RESERVE + (2 * rows * columns if mode == "arc kept" else scratch)


# --- data and the fp64 reference --------------------------------------------------------------


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


# --- rivals -----------------------------------------------------------------------------------


def measure(case: Case, mode: str, report: Report, seconds: float) -> None:
    """Time all rivals in one mode, and report them."""
    options = case.options
    rows, columns, dim = case.size
    timings = compare(
        list(rivals(case, mode)),
        repetitions=options.repetitions,
        device=options.device,
        seconds=seconds,
        tolerant=True,
    )
    if options.device == "cpu" and not options.skip_memory:
        timings = [with_peak(timing, mode, case) for timing in timings]
    figures = {"mode": mode, "B": rows, "C": columns, "D": dim, "scale": options.scale}
    if mode.startswith("mc") or mode == "forward":
        figures["positives"] = options.positives
    if mode not in ("forward", "arc kept"):
        figures["scratch"] = options.scratch
    if mode.endswith("filtered"):
        figures |= {"delta": options.delta, "cluster": options.cluster}
    report.add(
        figures,
        timings,
        work=2e-12 * PRODUCTS[mode] * rows * columns * dim,
        unit="TFLOP",
        accuracy="loss err",
        ceiling=GEMM,
    )


def rivals(case: Case, mode: str) -> Iterable[Rival]:
    """Ours first. They are set up when they are first run, so that it may fail."""
    words = case.options.rivals
    cuda = case.options.device == "cuda"
    for name, build in [
        *ours(case, mode),
        (GEMM, gemm),
        *([("torch.compile ArcFace", compiled_arcface)] if cuda else []),
        *metric_learning(mode),
        *(cross_entropies(case, mode) if cuda else []),
        *(siglip(mode) if cuda else []),
    ]:
        if words is None or name == GEMM or any(word in name for word in words):
            work = 2e-12 * math.prod(case.size) if name == GEMM else None
            run = Lazy(build, case, mode)
            yield Rival(name, run, run.check, work)


Built = tuple[Callable[[], Any], Callable[[Any], dict[str, float]] | None]
Builder = Callable[[Case, str], Built]


class Lazy:
    """A run whose own copies of the inputs are made first, once, and let go if it fails."""

    def __init__(self, build: Builder, case: Case, mode: str) -> None:
        self._build: Callable[[], Built] = lambda: build(case, mode)
        self._built: Built | None = None

    def prepare(self) -> Built:
        if self._built is None:
            self._built = self._build()
        return self._built

    def __call__(self) -> Any:
        try:
            return self.prepare()[0]()
        except Exception:
            self._built = None
            raise

    def check(self, result: Any) -> dict[str, float]:
        compute = self.prepare()[1]
        return compute(result) if compute else {}


def gradients(loss: Tensor, x: Tensor, w: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """dX and, if there is a trainable W, dW; nothing stays in the tensors themselves."""
    if w is None:
        return torch.autograd.grad(loss.sum(), x)[0], None
    dx, dw = torch.autograd.grad(loss.sum(), [x, w])
    return dx, dw


def ours(case: Case, mode: str) -> Iterable[tuple[str, Builder]]:
    for compute in case.options.compute:
        dtype = dtype_of(case, mode, compute)
        name = str(dtype).removeprefix("torch.")
        for row in backends("margin_softmax"):
            if row.obstacle(case.options.device, name, dim=case.size[2]) is None:
                yield f"pymcip {row.name} {short(name)}", our_builder(row.name, compute)


def dtype_of(case: Case, mode: str, compute: str) -> torch.dtype:
    """Of the products' operands, for W in fp32 or the bank."""
    like = case.x if mode.startswith("arc") else case.bank
    return MarginOptions(compute=compute).compute_dtype(case.x, like)


def short(dtype: str) -> str:
    return dtype.replace("bfloat", "bf").replace("float", "fp")


def our_builder(backend: str, compute: str) -> Builder:
    def build(case: Case, mode: str) -> Built:
        options = case.options
        trains, filters = mode.startswith("arc"), mode.endswith("filtered")
        rows, columns, _ = case.size
        scratch = min(options.scratch, rows * columns)  # less than keeping E would take
        if mode == "arc kept":
            scratch = rows * columns * (2 if options.device == "cuda" else 4)
        positives = case.one if trains else case.several
        x = case.x.detach().requires_grad_(mode != "forward")
        w = case.matrix.detach().requires_grad_() if trains else case.bank

        def run() -> Result:
            loss, skipped = margin_softmax_filtered(
                x, w, positives.indptr, positives.indices,
                w_norms=None if trains else case.norms, backend=backend, compute=compute,
                scale=options.scale, margin=options.margin, scratch=scratch,
                delta=options.delta if filters else 0.0,
            )  # fmt: skip
            kept = 1 - skipped.cells / skipped.of if filters else None
            if mode == "forward":
                return Result(loss)
            dx, dw = gradients(loss, x, w if trains else None)
            return Result(loss.detach(), dx, dw, kept)

        kind = "one" if trains else "several"
        return run, lambda result: errors(case, result, case.expected(kind, trains))

    return build


def gemm(case: Case, mode: str) -> Built:
    """X W' in the dtype of our (first) products, in parts if the output takes much of the memory."""
    rows, columns, _ = case.size
    dtype = dtype_of(case, mode, case.options.compute[0])
    exact = mode.startswith("arc") and dtype.itemsize > 2
    x, w = case.x.to(dtype), (case.matrix if exact else case.bank).to(dtype)
    part = columns
    held = None
    if case.options.device == "cuda":
        free = int(free_memory(case.options.device)) // 4
        part = min(columns, max(256, free // (rows * dtype.itemsize)))
    else:  # fresh pages cost time there
        held = torch.empty(rows * part, dtype=dtype)

    def run() -> None:
        out = torch.empty(rows * part, dtype=dtype, device=x.device) if held is None else held
        for start in range(0, columns, part):
            chunk = w[start : start + part]
            torch.mm(x, chunk.T, out=out[: rows * len(chunk)].view(rows, len(chunk)))

    return run, None


def arcface(x: Tensor, w: Tensor, labels: Tensor, scale: float, margin: float, half: Any) -> Tensor:
    """ArcFace as one writes it, with all logits; elementwise parts that a compiler can fuse."""
    cosine = (normalize(x, dim=1).to(half) @ w.T).float()
    target = cosine.gather(1, labels[:, None]).clamp(-1 + 1e-7, 1 - 1e-7)
    theta = target.acos()
    inside = theta + margin <= math.pi
    psi = torch.where(inside, (theta + margin).cos(), target - margin * math.sin(margin))
    columns = torch.arange(w.shape[0], device=w.device)
    logits = scale * torch.where(columns[None, :] == labels[:, None], psi, cosine)
    return cross_entropy(logits, labels, reduction="none")


def compiled_arcface(case: Case, mode: str) -> Built:
    trains = mode.startswith("arc")
    options = case.options
    half = case.bank.dtype
    x = case.x.detach().requires_grad_(mode != "forward")
    w = case.matrix.detach().requires_grad_() if trains else case.bank

    def loss_of(x: Tensor, w: Tensor) -> Tensor:
        unit = normalize(w, dim=1).to(half) if trains else w
        return arcface(x, unit, case.labels, options.scale, options.margin, half)

    torch._dynamo.reset()  # or old sizes would count against its limit of recompilations
    function = torch.compile(loss_of, dynamic=False)

    def run() -> Result:
        loss = function(x, w)
        if mode == "forward":
            return Result(loss)
        return Result(loss.detach(), *gradients(loss, x, w if trains else None))

    return run, lambda result: errors(case, result, case.expected("one", trains))


def metric_learning(mode: str) -> Iterable[tuple[str, Builder]]:
    """As it comes (W trainable) and, beside a frozen bank, with W frozen too."""
    if importlib.util.find_spec("pytorch_metric_learning"):
        yield "metric-learning ArcFace", lambda case, mode: arcface_loss(case, mode, True)
        if mode.startswith("mc"):
            yield "metric-learning, W frozen", lambda case, mode: arcface_loss(case, mode, False)


def arcface_loss(case: Case, mode: str, trains: bool) -> Built:
    losses = import_module("pytorch_metric_learning.losses")
    rows, columns, dim = case.size
    trainable = mode.startswith("arc")
    needed = 40 * rows * columns  # ten matrices B x C in fp32
    if free_memory(case.options.device) < needed:
        raise MemoryError(f"needs about {needed / 2**30:.0f} GiB for matrices of B x C")
    values = case.matrix if trainable else case.bank
    module = losses.ArcFaceLoss(
        num_classes=columns,
        embedding_size=dim,
        margin=math.degrees(case.options.margin),
        scale=case.options.scale,
        weight_init_func=lambda w: w.data.copy_(values.T),
    ).to(case.device)
    module.W.requires_grad_(trains and mode != "forward")
    x = case.x.detach().requires_grad_(mode != "forward")

    def run() -> Result:
        loss = module(x, case.labels)
        if mode == "forward":
            return Result(loss.detach())
        dx, dw = gradients(loss, x, module.W if trains else None)
        return Result(loss.detach(), dx, dw)

    def check(result: Result) -> dict[str, float]:  # it returns the mean over the rows
        dx = None if result.dx is None else result.dx * rows
        dw = None if result.dw is None else result.dw[:, case.column_ids].T * rows
        wanted = case.expected("one", trainable)
        found = errors(case, Result(result.loss * rows, dx), wanted)
        return found if dw is None else found | {"dW err": error(dw, wanted.dw)}

    return run, check


def cross_entropies(case: Case, mode: str) -> Iterable[tuple[str, Builder]]:
    rows, columns, dim = case.size
    if importlib.util.find_spec("cut_cross_entropy"):
        yield "cce (m = 0)", cross_entropy_builder(cut_cross_entropy(exact=False))
        yield "cce_exact (m = 0)", cross_entropy_builder(cut_cross_entropy(exact=True))
    if importlib.util.find_spec("liger_kernel"):
        yield "liger CuTe (m = 0)", cross_entropy_builder(liger_cute(rows, columns), 256)
        # Its own chunks hold B x D logits, a few rows at C = 1M; larger ones are worth a look.
        budget = max(1, 2**29 // (rows * dim))
        yield "liger (m = 0)", cross_entropy_builder(liger(1))
        yield "liger, 1 GiB chunks (m = 0)", cross_entropy_builder(liger(budget))
    if importlib.util.find_spec("quack"):
        yield "quack (m = 0)", cross_entropy_builder(quack(rows, columns))


CrossEntropy = Callable[[Tensor, Tensor, Tensor], Tensor]  # x, w, labels -> losses or their sum


def cross_entropy_builder(load: Callable[[Case], CrossEntropy], multiple: int = 1) -> Builder:
    """m = 0 and one positive, on unit rows times the scale.

    To rivals that take only a multiple of columns, rows of zeros are given too: each adds e^0 to a
    sum of C such terms.
    """

    def build(case: Case, mode: str) -> Built:
        function = load(case)
        scale, trains = case.options.scale, mode.startswith("arc")
        x = (normalize(case.x, dim=1) * scale).to(case.bank.dtype)
        x.requires_grad_(mode != "forward")
        more = -len(case.bank) % multiple
        w = pad(case.bank, (0, 0, 0, more)) if more else case.bank.detach()
        w.requires_grad_(trains)

        def run() -> Result:
            with torch.set_grad_enabled(mode != "forward"):
                loss = function(x, w, case.labels)
            if mode == "forward":
                return Result(loss)
            return Result(loss.detach(), *gradients(loss, x, w if trains else None))

        def check(result: Result) -> dict[str, float]:  # its rows were x times the scale
            dx = None if result.dx is None else result.dx.double() * scale
            scaled = Result(result.loss, dx, result.dw)
            return errors(case, scaled, case.expected("plain", trains), unit=True)

        return run, check

    return build


def cut_cross_entropy(*, exact: bool) -> Callable[[Case], CrossEntropy]:
    def load(case: Case) -> CrossEntropy:
        _, columns, dim = case.size
        if columns * dim >= INT32:
            raise ValueError(f"C D = {columns * dim:.1e}: its kernels address W in 32 bits")
        package = import_module("cut_cross_entropy")
        chosen: dict[str, Any] = {"impl": "cce"}
        if exact:  # releases differ: a name of its own, or the default without its filter
            named = "CCE_EXACT" in package.LinearCrossEntropyImpl.__members__
            chosen = {"impl": "cce_exact"} if named else {"impl": "cce", "filter_eps": None}
        return lambda x, w, labels: package.linear_cross_entropy(
            x, w, labels, reduction="none", **chosen
        )

    return load


def liger(chunk_budget: int) -> Callable[[Case], CrossEntropy]:
    def load(case: Case) -> CrossEntropy:
        function = import_module(
            "liger_kernel.transformers.functional"
        ).liger_fused_linear_cross_entropy
        # Losses one by one would make it compute the logits a second time.
        more = {} if chunk_budget == 1 else {"chunk_mem_const": chunk_budget}
        return lambda x, w, labels: function(x, w, labels, reduction="sum", **more)

    return load


def liger_cute(rows: int, columns: int) -> Callable[[Case], CrossEntropy]:
    """Its newest kernels, for Hopper alone; they make both gradients, whatever is wanted."""

    def load(case: Case) -> CrossEntropy:
        try:
            module = import_module("liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90")
        except ImportError as error:
            raise ImportError(f"{error}; pip install 'liger-kernel[cutedsl]>=0.8.5'") from error
        function = module.liger_fused_linear_cross_entropy_sm90
        chunk = chunk_rows(rows, columns)

        def summed(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
            parts = zip(x.split(chunk), labels.split(chunk), strict=True)
            return torch.stack([function(own, w, ids, reduction="sum") for own, ids in parts]).sum()

        return summed

    return load


def chunk_rows(rows: int, columns: int) -> int:
    """Rows of logits at a time: quack's default of 4096, or as many as 32-bit addresses reach."""
    return max(128, min(4096, (INT32 - 1) // columns // 128 * 128, -(-rows // 128) * 128))


def quack(rows: int, columns: int) -> Callable[[Case], CrossEntropy]:
    def load(case: Case) -> CrossEntropy:
        function = import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy
        chunk = chunk_rows(rows, columns)
        return lambda x, w, labels: function(
            x, w, labels, chunk_size=chunk, reduction="sum", tuned=False
        )

    return load


def siglip(mode: str) -> Iterable[tuple[str, Builder]]:
    """It always makes both gradients, so it is compared where both are wanted."""
    if mode.startswith("arc") and importlib.util.find_spec("siglip_kernel"):
        yield "siglip (other loss)", siglip_builder


def siglip_builder(case: Case, mode: str) -> Built:
    function = import_module("siglip_kernel.fused_siglip_plus").fused_siglip_plus_loss
    rows, columns, _ = case.size
    scale = case.options.scale
    x = normalize(case.x, dim=1).to(case.bank.dtype).requires_grad_()
    w = case.bank.detach().requires_grad_()
    temperature = torch.tensor(math.log(scale), device=case.device, requires_grad=True)
    bias = torch.tensor(-scale, device=case.device, requires_grad=True)
    ids = torch.arange(columns, device=case.device)
    # Its kernel addresses a chunk's logits in 32 bits; its own choice on Hopper is 4096 rows.
    chunk = max(1, min(rows, 4096, (INT32 - 1) // columns))

    def run() -> Result:
        loss = function(
            x, w, temperature, bias, case.labels, ids,
            symmetric=False, num_groups=columns, chunk_size=chunk,
        )  # fmt: skip
        return Result(loss.detach(), *gradients(loss, x, w))

    return run, lambda result: errors(case, result, case.expected("sigmoid", True), unit=True)


# --- peak memory on the CPU -------------------------------------------------------------------


def with_peak(timing: Timing, mode: str, case: Case) -> Timing:
    """With the peak memory of one run in a fresh process, if that can be measured."""
    if timing.error:
        return timing
    names = dict(zip(("--rows", "--columns", "--dims"), map(str, case.size), strict=True))
    command = [sys.executable, *sys.argv, *itertools.chain(*names.items())]
    child = subprocess.run(
        [*command, "--modes", mode, "--peak-of", f"{mode}:{timing.rival}"],
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        return replace(timing, memory=int(child.stdout.split()[-1]))
    except (IndexError, ValueError):
        print(f"no peak memory of {timing.rival}: {(child.stderr or child.stdout)[-200:]}")
        return timing


def print_peak(mode: str, name: str, options: argparse.Namespace) -> None:
    """Run a rival on a small problem, then on the real one, and print what the latter took."""
    (rows,), (columns,), (dim,) = options.rows, options.columns, options.dims
    for size in ((min(rows, 8), min(columns, 512), dim), (rows, columns, dim)):
        (run,) = (r.run for r in rivals(Case(*size, options), mode) if r.name == name)
        assert isinstance(run, Lazy)
        run.prepare()
        peak = peak_of(run)
    print(peak)


def peak_of(run: Callable[[], Any]) -> int:
    """Bytes by which resident memory rises above what it is now, while `run` runs (Linux)."""
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that the heap still holds would hide some
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    result = run()
    peak = resident("VmHWM") - before
    del result
    return max(peak, 0)


def resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


if __name__ == "__main__":
    main()
