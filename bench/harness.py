"""Times rivals side by side: interleaved, warmed up, with quantiles and a figure of accuracy.

Rivals take turns within every repetition, each time starting with another one, so that a change of
the machine's clock or load meets all of them alike.
"""

from __future__ import annotations

import argparse
import datetime as dt
import gc
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pymcip.environment import environment_report

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Rival:
    """One way to do the work: `run` is timed; `check` turns its last result into a figure."""

    name: str
    run: Callable[[], Any]
    check: Callable[[Any], float] | None = None


@dataclass(frozen=True)
class Timing:
    rival: str
    seconds: tuple[float, ...]
    accuracy: float | None

    def quantile(self, share: float) -> float:
        return float(np.quantile(self.seconds, share))


def compare(
    rivals: Sequence[Rival], *, repetitions: int = 5, warmup: int = 1, device: str = "cpu"
) -> list[Timing]:
    """Wall-clock seconds of each rival's runs, up to the end of its work on the device."""
    wait: Callable[[], object] = torch.cuda.synchronize if device == "cuda" else _nothing
    accuracies: list[float | None] = []
    for rival in rivals:
        result = rival.run()
        accuracies.append(rival.check(result) if rival.check else None)
        for _ in range(warmup - 1):
            rival.run()
    seconds: list[list[float]] = [[] for _ in rivals]
    gc.collect()
    gc.disable()
    try:
        for repetition in range(repetitions):
            for turn in range(len(rivals)):
                index = (repetition + turn) % len(rivals)
                wait()
                start = time.perf_counter()
                result = rivals[index].run()
                wait()
                seconds[index].append(time.perf_counter() - start)
                del result
    finally:
        gc.enable()
    return [
        Timing(rival.name, tuple(times), accuracy)
        for rival, times, accuracy in zip(rivals, seconds, accuracies, strict=True)
    ]


def _nothing() -> None:
    pass


class Report:
    """Prints a table per case; at the end one line of JSON, and on request the rows in a file."""

    def __init__(self, bench: str, *, device: str, dtype: str) -> None:
        environment = environment_report()
        self.bench = bench
        self.rows: list[dict[str, Any]] = []
        self._common = {
            "bench": bench,
            "device": torch.cuda.get_device_name()
            if device == "cuda"
            else environment["cpu"]["model"],
            "threads": torch.get_num_threads(),
            "dtype": dtype,
            "versions": {
                name: version for name, version in environment["versions"].items() if version
            },
            "core": environment["core"],
            "platform": platform.platform(),
            "commit": _commit(),
            "command": " ".join([Path(sys.executable).name, *sys.argv]),
            "time": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        }

    def add(
        self,
        case: Mapping[str, Any],
        timings: Sequence[Timing],
        *,
        work: float,
        unit: str,
        accuracy: str,
        ceiling: str | None = None,
    ) -> None:
        """`work` per run in `unit` gives the rate; `ceiling` names the rival that bounds it."""
        bound = next((work / row.quantile(0.5) for row in timings if row.rival == ceiling), None)
        head = f"{'':<24}{'p50 ms':>10}{'p20':>10}{'p80':>10}{unit + '/s':>12}{'vs first':>10}"
        print("\n" + ", ".join(f"{name} {value}" for name, value in case.items()))
        print(head + (f"{'of ceiling':>12}" if bound else "") + f"{accuracy:>12}")
        first = timings[0].quantile(0.5)
        for timing in timings:
            p20, p50, p80 = (timing.quantile(share) for share in (0.2, 0.5, 0.8))
            rate = work / p50
            figure = "" if timing.accuracy is None else f"{timing.accuracy:.4f}"
            print(
                f"{timing.rival:<24}{p50 * 1e3:>10.2f}{p20 * 1e3:>10.2f}{p80 * 1e3:>10.2f}"
                f"{rate:>12.4g}{first / p50:>9.2f}x"
                + (f"{rate / bound:>12.1%}" if bound else "")
                + f"{figure:>12}"
            )
            self.rows.append(
                {
                    **self._common,
                    "case": dict(case),
                    "rival": timing.rival,
                    "repetitions": len(timing.seconds),
                    "seconds": {"p20": p20, "p50": p50, "p80": p80},
                    "rate": rate,
                    "unit": f"{unit}/s",
                    "of_ceiling": rate / bound if bound else None,
                    "accuracy": {accuracy: timing.accuracy},
                }
            )

    def record(self, figures: Mapping[str, Any]) -> None:
        """Add a row that is no timing: figures with device, versions, commit and command."""
        self.rows.append({**self._common, **figures})

    def finish(self, *, store: bool, summary: Mapping[str, Any] | None = None) -> None:
        """Store the rows if asked to; print `summary`, or all timings in brief, as the last line."""
        if store:
            RESULTS.mkdir(exist_ok=True)
            path = RESULTS / f"{self.bench}.jsonl"
            with path.open("a", encoding="utf-8") as stream:
                stream.writelines(json.dumps(row) + "\n" for row in self.rows)
            print(f"\n{len(self.rows)} rows added to {path}")
        if summary is not None:
            print(json.dumps(summary))
            return
        brief = [
            {"case": row["case"], "rival": row["rival"], "p50": row["seconds"]["p50"]}
            | {"rate": row["rate"], **row["accuracy"]}
            for row in self.rows
        ]
        print(json.dumps({"bench": self.bench, "device": self._common["device"], "rows": brief}))


def common_arguments(description: str | None) -> argparse.ArgumentParser:
    """The options that every bench has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--store", action="store_true", help=f"add the rows to {RESULTS.name}/")
    return parser


def _commit() -> str | None:
    """The checked-out commit, marked if the tree differs from it; None outside a repository."""
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
