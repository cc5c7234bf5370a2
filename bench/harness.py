"""Times rivals side by side: interleaved, warmed up, with quantiles and a figure of accuracy.

Rivals take turns within every repetition, each time starting with another one, so that a change of
the machine's clock or load affects all of them alike.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime as dt
import gc
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pymcip.environment import environment_report, package_version
from pymcip.model import has_bf16

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
# An absolute path, or one that starts in the home folder or above the current one.
PATH = re.compile(r"""(?<![^\s=:,'"(\[])(?:~|\.\.)?/(?!/)[^\s,'")\]]+""")

Accuracy = float | Mapping[str, float] | None


@dataclass(frozen=True)
class Rival:
    """One way to do the work: `run` is timed; `check` turns its first result into figures."""

    name: str
    run: Callable[[], Any]
    check: Callable[[Any], float | Mapping[str, float]] | None = None
    work: float | None = None  # of one run, if it differs from the others'


@dataclass(frozen=True)
class Timing:
    rival: str
    seconds: tuple[float, ...]
    accuracy: Accuracy
    work: float | None = None
    memory: int | None = None  # peak bytes above what was in use before, the result included
    error: str | None = None  # why there are no seconds

    def quantile(self, share: float) -> float:
        return float(np.quantile(self.seconds, share))


def compare(
    rivals: Sequence[Rival],
    *,
    repetitions: int = 5,
    warmup: int = 1,
    device: str = "cpu",
    seconds: float | None = None,
    least: int = 3,
    tolerant: bool = False,
) -> list[Timing]:
    """Wall-clock seconds of each rival's runs, up to the end of its work on the device.

    seconds: what all repetitions may take together; slower rivals then get fewer, but at least
        `least`.
    tolerant: a rival that raises gets a `Timing` with its error, and the others go on.
    """
    wait: Callable[[], object] = torch.cuda.synchronize if device == "cuda" else lambda: None
    found = []
    turns = []
    for rival in rivals:
        try:
            timing, once = _first_runs(rival, warmup, device, wait)
        except Exception as error:
            if not tolerant:
                raise
            timing, once = Timing(rival.name, (), None, error=describe(error)), 0.0
        share = repetitions if seconds is None else int(seconds / len(rivals) / max(once, 1e-9))
        turns.append(0 if timing.error else min(repetitions, max(least, share)))
        found.append(timing)
        gc.collect()
        if device == "cuda":
            try:
                wait()
            except RuntimeError as error:
                raise RuntimeError(
                    f"{rival.name} left the GPU unusable for this process, in which nothing more can "
                    "be measured; leave it out with --rivals, or give it a process of its own"
                ) from error
            torch.cuda.empty_cache()
    times: list[list[float]] = [[] for _ in rivals]
    gc.disable()
    try:
        for repetition in range(repetitions):
            for turn in range(len(rivals)):
                index = (repetition + turn) % len(rivals)
                if repetition >= turns[index]:
                    continue
                wait()
                start = time.perf_counter()
                try:
                    result = rivals[index].run()
                except Exception as error:
                    if not tolerant:
                        raise
                    found[index] = Timing(rivals[index].name, (), None, error=describe(error))
                    turns[index] = 0
                    times[index].clear()
                    continue
                wait()
                times[index].append(time.perf_counter() - start)
                del result
    finally:
        gc.enable()
    return [replace(timing, seconds=tuple(own)) for timing, own in zip(found, times, strict=True)]


def _first_runs(
    rival: Rival, warmup: int, device: str, wait: Callable[[], object]
) -> tuple[Timing, float]:
    """Accuracy and peak memory of the untimed runs, and the seconds that the last of them took."""
    before = resident() if device == "cpu" else None
    start = time.perf_counter()
    result = rival.run()
    wait()
    once = time.perf_counter() - start
    memory = peak_above(before)
    accuracy = rival.check(result) if rival.check else None
    del result
    for _ in range(warmup if device == "cuda" else warmup - 1):  # the first run tunes and compiles
        if device == "cuda":
            held = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        rival.run()
        wait()
        once = time.perf_counter() - start
        if device == "cuda":
            memory = torch.cuda.max_memory_allocated() - held
    return Timing(rival.name, (), accuracy, rival.work, memory), once


def resident() -> int | None:
    """Bytes resident now, with the peak set back to them; None where the system can't do that."""
    try:
        with contextlib.suppress(AttributeError):  # not glibc: freed memory may seem in use
            ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return None


def peak_above(resident: int | None) -> int | None:
    """The most bytes above `resident` since that was asked for; None of None."""
    return None if resident is None else max(0, _status("VmHWM") - resident)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def describe(error: BaseException) -> str:
    """Kind and first line of an error, cut to a table's width."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"[:200]


def training_dtype(device: str) -> str:
    """What `precision="amp_bf16"` runs in on the device."""
    return "bfloat16 autocast" if has_bf16(torch.device(device)) else "float32"


class Report:
    """Prints a table per case, and at the end one line of JSON.

    With `store` each row is added to a file as soon as it is there, so that a bench that is killed
    loses no more than what it was at: bench/results/BENCH.jsonl, or the one that the environment
    names in PYMCIP_BENCH_ROWS.
    """

    def __init__(
        self,
        bench: str,
        *,
        device: str,
        dtype: str,
        packages: Sequence[str] = (),
        store: bool = False,
    ) -> None:
        """`packages`: the rivals', whose versions go into the rows, too."""
        environment = environment_report()
        versions = environment["versions"] | {name: package_version(name) for name in packages}
        self.bench = bench
        self.rows: list[dict[str, Any]] = []
        self._file: Path | None = None
        if store:
            self._file = Path(os.environ.get("PYMCIP_BENCH_ROWS") or RESULTS / f"{bench}.jsonl")
        self._common = {
            "bench": bench,
            "device": torch.cuda.get_device_name()
            if device == "cuda"
            else environment["cpu"]["model"],
            "threads": torch.get_num_threads(),
            "dtype": dtype,
            "versions": {name: version for name, version in versions.items() if version},
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
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        """`work` per run in `unit` gives the rate; `ceiling` names the rival that bounds it.

        `accuracy` names the figure of rivals whose check gives a single one. `notes` go into every
        row as they are.
        """
        done = [row for row in timings if row.seconds]
        bound = next((row for row in done if row.rival == ceiling), None)
        figures = {row.rival: _figures(row.accuracy, accuracy) for row in done}
        columns = list(dict.fromkeys(name for own in figures.values() for name in own)) or [
            accuracy
        ]
        remembers = any(row.memory is not None for row in done)
        head = f"{'':<28}{'p50 ms':>10}{'p20':>10}{'p80':>10}{unit + '/s':>12}{'vs first':>10}"
        if bound:
            head += f"{'of ceiling':>12}{'x ceiling':>11}"
        head += f"{'peak MiB':>10}" if remembers else ""
        print("\n" + ", ".join(f"{name} {value}" for name, value in case.items()))
        print(head + "".join(f"{name:>12}" for name in columns))
        for timing in timings:
            row = {"case": dict(case), "rival": timing.rival, **(notes or {})}
            if not timing.seconds:
                print(f"{timing.rival:<28}  {timing.error}")
                self.record(row | {"error": timing.error})
                continue
            p20, p50, p80 = (timing.quantile(share) for share in (0.2, 0.5, 0.8))
            rate = (timing.work or work) / p50
            line = f"{timing.rival:<28}{p50 * 1e3:>10.2f}{p20 * 1e3:>10.2f}{p80 * 1e3:>10.2f}"
            line += f"{rate:>12.4g}{done[0].quantile(0.5) / p50:>9.2f}x"
            row |= {
                "repetitions": len(timing.seconds),
                "seconds": {"p20": p20, "p50": p50, "p80": p80},
                "rate": rate,
                "unit": f"{unit}/s",
                "of_ceiling": None,
                "accuracy": figures[timing.rival] or {accuracy: None},
            }
            if bound:
                share = rate / ((bound.work or work) / bound.quantile(0.5))
                row |= {"of_ceiling": share, "times_ceiling": p50 / bound.quantile(0.5)}
                line += f"{share:>12.1%}{row['times_ceiling']:>10.2f}x"
            if timing.memory is not None:
                row["peak_bytes"] = timing.memory
            if remembers:
                mebibytes = "" if timing.memory is None else f"{timing.memory / 2**20:.1f}"
                line += f"{mebibytes:>10}"
            shown = [figures[timing.rival].get(name) for name in columns]
            print(
                line + "".join(f"{'' if value is None else _brief(value):>12}" for value in shown),
                flush=True,
            )
            self.record(row)

    def record(self, figures: Mapping[str, Any]) -> None:
        """Add a row: these figures with device, versions, commit and command; see `neutral`."""
        row = neutral({**self._common, **figures})
        self.rows.append(row)
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")

    def finish(
        self,
        *,
        summary: Mapping[str, Any] | None = None,
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        """Print `summary`, or all timings in brief with `notes` beside them, as the last line."""
        if self._file is not None:
            print(f"\n{len(self.rows)} rows added to {self._file}")
        if summary is not None:
            print(json.dumps(summary))
            return
        brief = []
        for row in self.rows:
            line = {"case": row["case"], "rival": row["rival"]}
            if "error" in row:
                brief.append(line | {"error": row["error"]})
                continue
            line |= {"p50": row["seconds"]["p50"], "rate": row["rate"]}
            extra = {name: row[name] for name in ("times_ceiling", "peak_bytes") if name in row}
            brief.append(line | extra | row["accuracy"])
        head = {"bench": self.bench, "device": self._common["device"], **(notes or {})}
        print(json.dumps({**head, "rows": brief}))


def neutral(value: Any) -> Any:
    """A JSON value without paths of this machine, so that it can be stored.

    In every text, paths in the repository become relative to its root, others their last part.
    """
    if isinstance(value, Mapping):
        return {name: neutral(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [neutral(item) for item in value]
    if isinstance(value, os.PathLike):
        return neutral(os.fspath(value))
    return PATH.sub(_neutral_path, value) if isinstance(value, str) else value


def _neutral_path(found: re.Match[str]) -> str:
    path = Path(found[0]).expanduser().resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


def _figures(accuracy: Accuracy, name: str) -> dict[str, float | None]:
    if accuracy is None:
        return {}
    return dict(accuracy) if isinstance(accuracy, Mapping) else {name: accuracy}


def _brief(value: float) -> str:
    return f"{value:.4f}" if value == 0 or abs(value) >= 1e-2 else f"{value:.1e}"


def common_arguments(description: str | None) -> argparse.ArgumentParser:
    """The options that every bench has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--store", action="store_true", help=f"add the rows to {RESULTS.name}/")
    return parser


def _commit() -> str | None:
    """PYMCIP_COMMIT, or else the commit that is checked out, marked if the tree differs."""
    if given := os.environ.get("PYMCIP_COMMIT"):
        return given
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
