"""Top-k of inner products: every back end of `pymcip.ops.topk` against what else there is.

The data resemble an image and a caption model's: unit rows in clusters around a common mean, with a
decaying spectrum; the cosine of an image and one of its cluster's captions is around 0.3, and the
threshold of 0.27 admits a few hundred of 200,000. Recall is the share of the pairs in an fp64
ranking of the first queries that are found (threshold applied). "screen" is exact=False: the answer
in low precision, not ranked again. Rivals (`topk_rivals`) hold the bank in their own form beforehand;
pymcip's plain rows take it as it is, packing it if they need to, and "packed" ones hold it packed.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from harness import Report, Rival, common_arguments, compare, describe
from topk_rivals import CONTENDERS, Merge, MissingRivalError, Problem, product_alone

from pymcip.ops import PackedBank, backends, topk

CHECKED = 64  # queries whose ranking is compared with fp64's
CLUSTERS = 2000
DIMS, KS, QUERIES, THRESHOLD = (512, 768, 1152), (1, 10, 64), (1, 64, 2048), 0.27
SUBSET = {"dims": (768,), "k": (10,), "queries": QUERIES}
BANK = {"cpu": 200_000, "cuda": 2_000_000}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PACKED = {  # back end, and whether it is exact
    "pymcip packed": ("auto", True),
    "pymcip packed, screen": ("auto", False),
    "pymcip packed, avx512_vnni": ("avx512_vnni", True),
}
GEMM = "torch bf16 product alone"  # the ceiling: what can't be had faster without 8 bits
PACKAGES = ("faiss-cpu", "faiss-gpu", "numkong", "cuvs-cu12", "cuvs-cu13")


@dataclass(frozen=True)
class Case:
    dim: int
    k: int
    queries: int
    threshold: float | None


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = common_arguments(__doc__)
    parser.add_argument("--dims", type=int, nargs="+", metavar="D", help=f"of {DIMS}, or any")
    parser.add_argument("--k", type=int, nargs="+", help=f"of {KS}, or any")
    parser.add_argument("--queries", type=int, nargs="+", metavar="N", help=f"of {QUERIES}, or any")
    parser.add_argument("--bank", type=int, metavar="M", help=f"rows; default: {BANK}")
    parser.add_argument(
        "--full", action="store_true", help="all D x k x N and back ends, with all the time"
    )
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="of all rows")
    parser.add_argument(
        "--rivals", nargs="+", metavar="WORD", help="only those whose names hold one of these"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        help="for all: slow rivals run but once, and cases that would begin later are left out; "
        "default: 200, with --full none",
    )
    floors = parser.add_mutually_exclusive_group()
    floors.add_argument(
        "--threshold",
        type=float,
        help=f"only with this; default: with {THRESHOLD} and without",
    )
    floors.add_argument("--no-threshold", action="store_true", help="only without")
    options = parser.parse_args(words)
    options.bank = options.bank or BANK[options.device]
    if options.seconds is None and not options.full:
        options.seconds = 200.0
    return options


def select_cases(options: argparse.Namespace) -> list[Case]:
    """The largest first, as its figures matter most; rows of one bank beside each other."""
    whole = {"dims": DIMS, "k": KS, "queries": QUERIES}
    axes = [
        getattr(options, name) or (whole if options.full else SUBSET)[name]
        for name in ("dims", "k", "queries")
    ]
    floors: list[float | None] = [THRESHOLD, None]
    if options.no_threshold:
        floors = [None]
    elif options.threshold is not None:
        floors = [options.threshold]
    return [
        Case(dim, k, count, floor)
        for dim in axes[0]
        for count in sorted(axes[2], reverse=True)
        for k in axes[1]
        for floor in floors
    ]


def main(words: Sequence[str] | None = None) -> None:
    options = arguments(words)
    end = None if options.seconds is None else time.monotonic() + options.seconds
    report = Report(
        "topk",
        device=options.device,
        dtype=options.dtype,
        packages=PACKAGES,
        store=options.store,
    )
    missing: dict[str, str] = {}
    left_out = []
    packing: dict[str, float] = {}
    cases = select_cases(options)
    for dim, group in itertools.groupby(cases, key=lambda case: case.dim):
        own = list(group)
        count = max(case.queries for case in own)
        made = resembling(count, options.bank, dim, options.device)
        queries, bank = (rows.to(DTYPES[options.dtype]) for rows in made)
        del made
        packed = None
        if any(asked_for(name, options) for name in PACKED):
            packed, packing[f"D {dim}"] = pack(bank, missing)
        wanted = fp64_ranking(queries[:CHECKED], bank, max(case.k for case in own))
        for case in own:
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                left_out.append(str(case))
                continue
            problem = Problem(queries[: case.queries], bank, case.k, torch.get_num_threads())
            timings = compare(
                rivals(problem, case.threshold, wanted, options, missing, packed),
                repetitions=options.repetitions,
                device=options.device,
                seconds=None if left is None else left / (len(cases) - cases.index(case)) / 2,
                least=3 if left is None else 1,
                tolerant=True,
            )
            report.add(
                {
                    "N": case.queries,
                    "M": options.bank,
                    "D": dim,
                    "k": case.k,
                    "threshold": case.threshold,
                },
                timings,
                work=2e-9 * case.queries * len(bank) * dim,
                unit="GFLOP",
                accuracy=f"recall@{case.k}",
                ceiling=GEMM,
            )
    print()
    for name, reason in missing.items():
        print(f"{name}: {reason}")
    print(f"seconds to pack the bank, once: {packing}; cases left out: {left_out or 'none'}")
    notes = {"missing": missing, "left_out": left_out, "packing_seconds": packing}
    report.finish(notes=notes)


def resembling(
    count: int, bank_count: int, dim: int, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit rows, fp32: images and captions, which share clusters and a mean, and are apart."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(rows: int) -> torch.Tensor:
        return torch.randn(rows, dim, generator=generator, device=device)

    def unit(rows: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(rows, dim=1)

    centres, mean = unit(normal(CLUSTERS)), unit(normal(1))
    spectrum = (1 + torch.arange(dim, device=device) / 64).rsqrt()

    def near(rows: int, own: float, noise: float) -> torch.Tensor:
        chosen = torch.randint(CLUSTERS, (rows,), generator=generator, device=device)
        return unit(own * centres[chosen] + 0.3 * mean + noise * unit(normal(rows) * spectrum))

    bank = torch.empty(bank_count, dim, device=device)
    for block in bank.split(65_536):
        block.copy_(near(len(block), 0.65, 0.7))
    return near(count, 0.42, 0.85), bank


def fp64_ranking(
    queries: torch.Tensor, bank: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and scores of the k best, in fp64, on the host."""
    best = Merge(k)
    for start in range(0, len(bank), 16_384):
        best.add(queries.double() @ bank[start : start + 16_384].double().T, start)
    return best.ids.cpu(), best.scores.cpu()


def asked_for(name: str, options: argparse.Namespace) -> bool:
    return options.rivals is None or any(word in name for word in options.rivals)


def pack(bank: torch.Tensor, missing: dict[str, str]) -> tuple[Any, float]:
    """The bank packed where it is, and the seconds that takes; None if it can't be had."""
    try:
        PackedBank.pack(bank[:1])  # the back end's first check, and what a device has yet to do
        start = time.perf_counter()
        packed = PackedBank.pack(bank)
        return packed, time.perf_counter() - start
    except Exception as error:
        missing["pymcip packed"] = describe(error)
        return None, 0.0


def rivals(
    problem: Problem,
    threshold: float | None,
    wanted: tuple[torch.Tensor, torch.Tensor],
    options: argparse.Namespace,
    missing: dict[str, str],
    packed: Any = None,
) -> list[Rival]:
    """Those that were asked for and can run here; why others can't goes into `missing`."""
    k, dtype = problem.k, options.dtype

    def recall(result: tuple[Any, Any]) -> dict[str, float]:
        """Of the pairs in fp64's answer, the share found; nothing if there are none."""
        found = torch.as_tensor(result[0])[:CHECKED].cpu()
        ids, scores = (part[: len(found), :k] for part in wanted)
        due = scores >= (-torch.inf if threshold is None else threshold)
        if not due.any():
            return {}
        hit = torch.stack([torch.isin(own, got) for own, got in zip(ids, found, strict=True)])
        return {f"recall@{k}": float(hit[due].double().mean())}

    def reaching(call: Callable[[], tuple[Any, Any]]) -> Callable[[], tuple[Any, Any]]:
        """Drop what is below the threshold, as a caller has to."""
        if threshold is None:
            return call

        def run() -> tuple[Any, Any]:
            ids, scores = (torch.as_tensor(part) for part in call())
            return torch.where(scores >= threshold, ids, -1), scores

        return run

    def ours(bank: Any, backend: str, exact: bool) -> Callable[[], tuple[Any, Any]]:
        return lambda: topk(problem.queries, bank, k, threshold, exact=exact, backend=backend)

    listed = partial(asked_for, options=options)
    chosen: list[Rival] = []
    for row in backends("topk"):
        names = {f"pymcip {row.name}": True, f"pymcip {row.name}, screen": False}
        if not any(map(listed, names)):
            continue
        reason = row.obstacle(options.device, dtype, k=k, dim=problem.bank.shape[1])
        if reason is not None:
            missing[f"pymcip {row.name}"] = reason
            continue
        # Screens of slow back ends would take a third of the time of a run that isn't to be long.
        every = options.full or options.rivals is not None or not chosen
        chosen += [
            Rival(name, ours(problem.bank, row.name, exact), recall)
            for name, exact in names.items()
            if listed(name) and (exact or every)
        ]
    if packed is not None:
        here = (row for row in backends("topk") if not row.obstacle(options.device, dtype))
        runnable = {"auto", *(row.name for row in here)}
        chosen += [
            Rival(name, ours(packed, backend, exact), recall)
            for name, (backend, exact) in PACKED.items()
            if listed(name) and backend in runnable
        ]
    for contender in CONTENDERS:
        if contender.device != options.device or not listed(contender.name):
            continue
        try:
            call = contender.make(problem)
        except MissingRivalError as reason:
            missing[contender.name] = str(reason)
        except Exception as error:
            missing[contender.name] = describe(error)
        else:
            chosen.append(Rival(contender.name, reaching(call), recall))
    rows = 20_000 if options.device == "cpu" else 65_536
    chosen.append(Rival(GEMM, product_alone(problem, torch.bfloat16, rows)))
    return chosen


if __name__ == "__main__":
    main()
