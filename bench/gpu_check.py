"""Builds pymcip with CUDA and runs its GPU tests and benches, in a limited time; loses nothing.

    python bench/gpu_check.py                 # a folder in bench/results/gpu
    python bench/gpu_check.py --rehearse      # the same steps with tiny cases on the CPU
    python bench/gpu_check.py --summary OUT   # the summary of an earlier run, from its files

It runs under the Python that holds torch with CUDA, needs the standard library alone to start, and
no network. Every result is in the folder as soon as it is there: machine.txt, log.txt (what each
step printed), steps.jsonl, tests.txt, rows.jsonl (what the benches measured), profiles.txt, and at
the end summary.md. The exit status is 0 if what has to pass has passed, 1 if not, 2 if it can't run.
"""

from __future__ import annotations

import argparse
import datetime as dt
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import gpu_environment
from gpu_runner import STEPS, Runner, Step
from gpu_steps import ROOT, Places, steps
from gpu_summary import is_good, summary

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
HINT = """Where there is a network: make gpu-wheels (fills gpu-wheels/). Carry that folder here with the rest,
or name it: make gpu-check GPU_WHEELS=FOLDER."""


def main(words: Sequence[str] | None = None) -> int:
    options = arguments(words)
    if options.summary:
        return finish(options.summary)
    out: Path = options.out
    if (out / STEPS).exists():
        print(f"{out} holds an earlier check; name another folder with --out (make: OUT=FOLDER)")
        return 2
    needed, wanted = gpu_environment.missing(options.wheels)
    if needed:
        print(
            f"{sys.executable} lacks {', '.join(needed)}, without which nothing can be built or measured."
        )
    if wanted:
        print(f"Not here, so that a part is left out: {', '.join(wanted)}.")
    if needed or wanted:
        print(HINT)
    if not options.rehearse and not gpu_environment.gpus():
        print("gpu-check needs a CUDA device, and the driver shows none: nothing was checked.")
        print("Without one: python bench/gpu_check.py --rehearse")
        return 2
    if needed and not options.rehearse:
        return 2
    with tempfile.TemporaryDirectory() as folder:
        if options.rehearse:
            places = Places(Path(sys.executable), Path(folder) / "venv", options.wheels, out)
        else:
            venv = ROOT / ".venv-gpu"
            places = Places(venv / "bin" / "python", venv, options.wheels, out)
        planned = steps(places, rehearse=options.rehearse)
        return check(planned, out, options.seconds, missing=[*needed, *wanted])


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    lines = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser(description=lines[0])
    add = parser.add_argument
    now = dt.datetime.now(dt.timezone.utc).strftime("%Y-%m-%d-%H%M%S")
    default = ROOT / "bench" / "results" / "gpu" / now
    add("--out", type=Path, default=default, help="default: bench/results/gpu/DATE")
    add("--seconds", type=float, default=570.0, help="for all steps together; default: 570")
    add("--wheels", type=Path, default=ROOT / "gpu-wheels", help="default: gpu-wheels/")
    add("--rehearse", action="store_true", help="tiny cases on the CPU, with this Python's pymcip")
    add("--summary", type=Path, metavar="OUT", help="only that of an earlier check's files")
    options = parser.parse_args(words)
    options.out, options.wheels = options.out.resolve(), options.wheels.resolve()
    return options


def check(
    planned: Sequence[Step],
    out: Path,
    seconds: float,
    *,
    missing: Sequence[str] = (),
    grace: float = 8.0,
) -> int:
    """Run the steps and sum up, even when interrupted."""
    out.mkdir(parents=True, exist_ok=True)
    runner = Runner(out, seconds, grace)
    before = {number: signal.signal(number, runner.stop) for number in STOPPING}
    try:
        runner.run(planned, missing=list(missing))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return finish(out)


def finish(out: Path) -> int:
    text = summary(out)
    (out / "summary.md").write_text(text, encoding="utf-8")
    print(f"\n{text}\nin {out}")
    return 0 if is_good(out) else 1


if __name__ == "__main__":
    sys.exit(main())
