"""What the margin losses are compared with: one builder per rival, and ours.

A builder copies a case's inputs into the form that it needs, and returns the call that is timed and
the function that gives its errors. Rivals that are not installed are left out.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

import torch
from margin_case import Case, Result, error, errors
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, pad

from pymcip.ops import backends
from pymcip.ops.margin_softmax import MarginOptions, margin_softmax_filtered

PACKAGES = {  # modules, and what pip calls them
    "cut_cross_entropy": "cut-cross-entropy",
    "liger_kernel": "liger-kernel",
    "quack": "quack-kernels",
    "siglip_kernel": "siglip-kernel",
    "pytorch_metric_learning": "pytorch-metric-learning",
}
GEMM = "plain GEMM"
INT32 = 2**31  # some rivals' kernels address elements in 32 bits

Built = tuple[Callable[[], Any], Callable[[Any], dict[str, float]] | None]
Builder = Callable[[Case, str], Built]


def builders(case: Case, mode: str) -> Iterable[tuple[str, Builder]]:
    """All rivals that can take part, ours first."""
    yield from ours(case, mode)
    yield GEMM, gemm
    cuda = case.options.device == "cuda"
    if cuda:
        yield "torch.compile ArcFace", compiled_arcface
    yield from metric_learning(mode)
    if cuda:
        yield from cross_entropies(case, mode)
        yield from siglip(mode)


def free_memory(device: str) -> float:
    """Bytes on a GPU; on the CPU whatever it takes."""
    return torch.cuda.mem_get_info()[0] if device == "cuda" else math.inf


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
