"""Metrics of full rankings: `pymcip.metrics` against what one writes in NumPy or torch.

The cases have the sizes of GPR1200 (12,000 images of 1,200 classes, all against all), INSTRE (1,250
queries, 27,293 images) and ROxford (70 queries, 4,993 images; easy, hard and junk rows). The rows
resemble embeddings: classes around centres of their own and a common mean, noise with a decaying
spectrum. The straightforward rivals multiply in fp32, argsort whole rankings (stable, so that ties
go to the lower row) and add up each query's hits in a loop of Python. "points off" is the largest
difference from the same in fp64, in points of a percentage. One of them leaves open how ties fall.

The goal, set for GPR1200, is a fifth of the time of the quicker rival that decides ties, and at
most 500 MB beside the embeddings.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from harness import Report, Rival, Timing, common_arguments, compare

from pymcip import metrics

OURS, OPEN_TIES = "pymcip", "numpy, ties left open"
MOST_BYTES, TIMES = 500_000_000, 5.0
BLOCK = 1000  # queries whose rankings a rival holds at once: all of GPR1200's would be 1.2 GB


@dataclass(frozen=True)
class Case:
    name: str
    queries: int  # 0: all against all
    database: int
    classes: int
    own: float  # share of the class's centre in a row
    dim: int = 768


CASES = (
    Case("gpr1200", 0, 12_000, 1200, 0.42),
    Case("instre", 1250, 27_293, 200, 0.32),
    Case("roxford", 70, 4993, 40, 0.32),
)
SMALL = (
    Case("gpr1200", 0, 120, 12, 0.42, 64),
    Case("instre", 25, 273, 5, 0.32, 64),
    Case("roxford", 14, 250, 5, 0.32, 64),
)


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = common_arguments(__doc__)
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in CASES])
    parser.add_argument(
        "--rivals", nargs="+", metavar="WORD", help="only those whose names hold one of these"
    )
    parser.add_argument("--smoke", action="store_true", help="a hundredth of the sizes")
    return parser.parse_args(words)


@dataclass(frozen=True)
class Problem:
    """Unit rows, fp32, on the host; labels of GPR1200, lists of rows of the others."""

    queries: torch.Tensor
    database: torch.Tensor
    labels: np.ndarray
    truth: list[dict[str, np.ndarray]]


def resembling(case: Case) -> Problem:
    generator = torch.Generator().manual_seed(0)

    def unit(rows: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(rows, dim=1)

    def normal(rows: int) -> torch.Tensor:
        spectrum = (1 + torch.arange(case.dim) / 64).rsqrt()
        return unit(torch.randn(rows, case.dim, generator=generator) * spectrum)

    centres, mean = normal(case.classes), normal(1)

    def near(labels: torch.Tensor) -> torch.Tensor:
        own = case.own * (0.7 + 0.6 * torch.rand(len(labels), 1, generator=generator))
        return unit(own * centres[labels] + 0.4 * mean + 0.8 * normal(len(labels)))

    labels = torch.arange(case.database) * case.classes // case.database
    database = near(labels)
    if not case.queries:
        return Problem(database, database, labels.numpy(), [])
    asked = torch.arange(case.queries) % case.classes
    kinds = torch.randint(3, (case.database,), generator=generator)
    truth = []
    for label in asked:
        own = labels == label
        lists = {
            name: (own & (kinds == kind)).nonzero()[:, 0].numpy()
            for kind, name in enumerate(("easy", "hard", "junk"))
        }
        truth.append(lists | {"ok": own.nonzero()[:, 0].numpy()})
    return Problem(near(asked), database, labels.numpy(), truth)


# --------------------------------------------------------------------------------------------------
# The rivals: whole rankings, hits in a loop


def rankings_numpy(queries: np.ndarray, database: np.ndarray) -> np.ndarray:
    return np.argsort(-(queries @ database.T), axis=1, kind="stable")


def rankings_unstable(queries: np.ndarray, database: np.ndarray) -> np.ndarray:
    """NumPy's default sort, which has AVX-512 and leaves open how ties fall."""
    return np.argsort(-(queries @ database.T), axis=1)


def rankings_torch(queries: torch.Tensor, database: torch.Tensor) -> np.ndarray:
    return (queries @ database.T).argsort(dim=1, descending=True, stable=True).cpu().numpy()


def step_map(order: Callable[[Any, Any], np.ndarray], rows: Any, labels: np.ndarray) -> float:
    """GPR1200's mAP."""
    total = 0.0
    for first in range(0, len(rows), BLOCK):
        for query, ranking in enumerate(order(rows[first : first + BLOCK], rows), start=first):
            hits = np.flatnonzero(labels[ranking] == labels[query])
            own = 0.0
            for number, rank in enumerate(hits, start=1):
                own += number / (rank + 1)
            total += own / len(hits)
    return 100 * total / len(rows)


def trapezoid(ranking: np.ndarray, relevant: np.ndarray, junk: np.ndarray) -> tuple[float, Any]:
    """AP and 1-based places as revisitop computes them."""
    places = np.flatnonzero(np.isin(ranking, relevant))
    ignored = np.flatnonzero(np.isin(ranking, junk))
    places = places - np.searchsorted(ignored, places)
    total = 0.0
    for number, rank in enumerate(places):
        before = 1.0 if rank == 0 else number / rank
        total += (before + (number + 1) / (rank + 1)) / 2
    return total / len(relevant), places + 1


def trapezoidal(rankings: np.ndarray, truth: Sequence[Mapping[str, np.ndarray]]) -> float:
    """INSTRE's mAP."""
    none = np.empty(0, dtype=np.int64)
    found = [trapezoid(line, own["ok"], none)[0] for line, own in zip(rankings, truth, strict=True)]
    return 100 * float(np.mean(found))


def revisited(rankings: np.ndarray, truth: Sequence[Mapping[str, np.ndarray]]) -> dict[str, float]:
    """ROxford's mAP and mP@k."""
    figures = {}
    for name, (good, bad) in metrics.REVISITED.items():
        precisions, shares = [], []
        for line, own in zip(rankings, truth, strict=True):
            relevant = np.concatenate([own[kind] for kind in good])
            if len(relevant):
                junk = np.concatenate([own[kind] for kind in bad])
                precision, places = trapezoid(line, relevant, junk)
                precisions.append(precision)
                reaches = [min(int(places.max()), k) for k in (1, 5, 10)]
                shares.append([(places <= reach).sum() / reach for reach in reaches])
        figures[f"{name}_map"] = 100 * float(np.mean(precisions))
        for k, share in zip((1, 5, 10), np.mean(shares, axis=0), strict=True):
            figures[f"{name}_mp{k}"] = 100 * float(share)
    return figures


def straightforward(
    case: Case, problem: Problem, order: Callable[[Any, Any], np.ndarray], give: Callable[..., Any]
) -> Callable[[], Any]:
    queries, database = give(problem.queries), give(problem.database)
    if case.name == "gpr1200":
        return lambda: step_map(order, database, problem.labels)
    measure = trapezoidal if case.name == "instre" else revisited
    return lambda: measure(order(queries, database), problem.truth)


def ours(case: Case, problem: Problem, device: str) -> Callable[[], Any]:
    queries, database = problem.queries.to(device), problem.database.to(device)
    if case.name == "gpr1200":
        return lambda: metrics.full_ranking_map(database, problem.labels)
    if case.name == "instre":
        positives = [own["ok"] for own in problem.truth]
        return lambda: metrics.trapezoidal_retrieval(queries, database, positives)
    return lambda: metrics.revisited_retrieval(queries, database, problem.truth)


def points_off(exact: Any) -> Callable[[Any], float]:
    def check(found: Any) -> float:
        if isinstance(exact, Mapping):
            return max(abs(found[name] - value) for name, value in exact.items())
        return abs(float(found) - float(exact))

    return check


def goal(timings: Sequence[Timing]) -> dict[str, Any]:
    """How many times quicker than the quicker rival that decides ties, and the peak of memory."""
    medians = {timing.rival: timing.quantile(0.5) for timing in timings}
    own, open_ties = medians.pop(OURS), medians.pop(OPEN_TIES)
    memory = next(timing.memory for timing in timings if timing.rival == OURS)
    times = min(medians.values()) / own
    return {
        "times_quicker": round(times, 2),
        "times_quicker_than_open_ties": round(open_ties / own, 2),
        "peak_bytes": memory,
        "met": times >= TIMES and (memory is None or memory <= MOST_BYTES),
    }


def main(words: Sequence[str] | None = None) -> None:
    options = arguments(words)
    report = Report("metrics", device=options.device, dtype="float32", store=options.store)
    goals = {}
    for case in SMALL if options.smoke else CASES:
        if options.cases and case.name not in options.cases:
            continue
        problem = resembling(case)
        exact = straightforward(case, problem, rankings_numpy, lambda rows: rows.double().numpy())()
        check = points_off(exact)
        ways: dict[str, tuple[Callable[[Any, Any], np.ndarray], Callable[..., Any]]] = {
            "torch mm+argsort+loop": (rankings_torch, lambda rows: rows.to(options.device)),
            OPEN_TIES: (rankings_unstable, lambda rows: rows.numpy()),
            "numpy dot+argsort+loop": (rankings_numpy, lambda rows: rows.numpy()),
        }
        rivals = [Rival(OURS, ours(case, problem, options.device), check)]
        rivals += [
            Rival(name, straightforward(case, problem, *way), check) for name, way in ways.items()
        ]
        if options.rivals:
            rivals = [
                rival for rival in rivals if any(word in rival.name for word in options.rivals)
            ]
        timings = compare(rivals, repetitions=options.repetitions, device=options.device)
        queries = case.queries or case.database
        figure = exact if isinstance(exact, float) else exact["medium_map"]
        report.add(
            {"case": case.name, "N": queries, "M": case.database, "D": case.dim}
            | {"mAP": round(figure, 2)},
            timings,
            work=queries * case.database / 1e6,
            unit="Mpairs",
            accuracy="points off",
        )
        if not options.rivals:
            goals[case.name] = goal(timings)
    print()
    for name, reached in goals.items():
        print(f"{name}: {reached}")
    report.finish(notes={"goals": goals})


if __name__ == "__main__":
    main()
