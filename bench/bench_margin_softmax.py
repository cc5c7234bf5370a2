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
allocated, on the CPU what was resident.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from harness import Report, Rival, common_arguments, compare
from margin_case import Case
from margin_rivals import GEMM, PACKAGES, Builder, Built, builders, free_memory

from pymcip.ops.margin_softmax import MOST_SCRATCH

PRODUCTS = {  # by mode, the most telling first
    "mc": 2,
    "mc filtered": 2,
    "forward": 1,
    "arc": 3,
    "arc kept": 3,
    "arc filtered": 3,
}
# Multiples of 384: quack's fastest path takes only multiples of 128, fastest of 192.
ROWS, COLUMNS, DIMS = (512, 4096, 8192), (168_192, 1_000_320, 12_000_000), (512, 768, 1152)
GOAL = (4096, 1_000_320, 768)  # the case that the project's goals are written for
OTHERS = ((8192, 168_192, 1152), (512, 12_000_000, 512))  # with it, every size at least once
DEFAULTS = {"cpu": ((512, 200_000, 768),), "cuda": (GOAL, *OTHERS)}
RESERVE = 2 << 30  # bytes for buffers of the rivals' libraries

Size = tuple[int, int, int]


def main() -> None:
    options = arguments()
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


def bytes_needed(mode: str, rows: int, columns: int, dim: int, scratch: int) -> int:
    """At least, for our op: the matrix of columns, what its gradient takes, and the scratch."""
    bank = 2 * columns * dim
    if not mode.startswith("arc"):
        return bank + scratch + RESERVE
    trainable = bank + 4 * columns * dim * 2 + 2 * columns * dim  # W, dW, W in half precision
    return trainable + RESERVE + (2 * rows * columns if mode == "arc kept" else scratch)


# --- a measurement -----------------------------------------------------------------------------


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
    for name, build in builders(case, mode):
        if words is None or name == GEMM or any(word in name for word in words):
            work = 2e-12 * math.prod(case.size) if name == GEMM else None
            run = Lazy(build, case, mode)
            yield Rival(name, run, run.check, work)


class Lazy:
    """A run whose own copies of the inputs are made first, once, and freed if it fails."""

    def __init__(self, build: Builder, case: Case, mode: str) -> None:
        self._build: Callable[[], Built] = lambda: build(case, mode)
        self._built: Built | None = None

    def __call__(self) -> Any:
        try:
            self._built = self._built or self._build()
            return self._built[0]()
        except Exception:
            self._built = None
            raise

    def check(self, result: Any) -> dict[str, float]:
        compute = self._built[1] if self._built else None
        return compute(result) if compute else {}


if __name__ == "__main__":
    main()
