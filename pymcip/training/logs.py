"""The logs of a run: out.log, metrics.jsonl, and trackers such as TensorBoard if asked for."""

from __future__ import annotations

import json
import logging
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias

import torch

from pymcip.distributed import is_first
from pymcip.errors import MissingDependencyError
from pymcip.files import damaged, write_text
from pymcip.folders import record_files
from pymcip.training.checkpoints import Position

_REMOVE = "Remove the line and run the same command again"
MEASURED = {"evaluation", "alignment"}  # keys of what an epoch's end writes
# Of a tracker: what takes numbers by name at a step, and what ends it.
Tracker: TypeAlias = tuple[Callable[[dict[str, Any], int], object], Callable[[], object]]


@contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Also write pymcip's log messages to `path` while the block runs."""
    logger = logging.getLogger("pymcip")
    record_files([path])
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        handler.close()


class MetricsLog:
    """metrics.jsonl: one JSON object a line; also sends numbers to the chosen trackers.

    Of several processes the first one writes.

    Args:
        folder: of the run.
        report_to: names of trackers.
        config: the run's options, for the trackers.
        seconds: that the run has taken before now, in all of its parts.
    """

    def __init__(
        self, folder: Path, report_to: tuple[str, ...], config: dict[str, Any], seconds: float = 0.0
    ) -> None:
        self.path = folder / "metrics.jsonl" if is_first() else Path(os.devnull)
        self.started = time.perf_counter() - seconds
        record_files([self.path])
        trackers = report_to if is_first() else ()
        self.trackers = [_open_tracker(name, folder, config) for name in trackers]
        self.handle = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed by __exit__)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *error: object) -> None:
        self.handle.close()
        for _, close in self.trackers:
            close()

    def write(self, record: dict[str, Any]) -> None:
        """Append a line, with the `seconds` since the run's start.

        Its `global_step` is the step that the trackers are given; what is measured at an epoch's end
        has names with a slash there, such as `evaluation/i2i_map`.
        """
        record = {**record, "seconds": round(self.seconds, 3)}
        self.handle.write(json.dumps(record) + "\n")
        self.handle.flush()
        step = record.pop("global_step")
        numbers = dict(_numbers(record))
        for log, _ in self.trackers:
            log(numbers, step)

    @property
    def seconds(self) -> float:
        """Since the run's start; of a run that was resumed without the time between its parts."""
        return time.perf_counter() - self.started

    def records(self) -> list[dict[str, Any]]:
        """Return all lines that the run has written so far."""
        return read_metrics(self.path)


def system_values(device: torch.device) -> dict[str, float]:
    """The most memory that this process has had so far, in GiB: its own, and of `device`, a GPU."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10
    found = {"memory_gib": round(peak / 2**30, 3)}
    if device.type == "cuda":
        found["gpu_memory_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 3)
    return found


def _numbers(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers by their names, those in dicts with the dict's name before a slash."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            yield prefix + name, value


def forget_after(path: Path, position: Position) -> tuple[dict[str, float], float]:
    """Drop the lines of metrics.jsonl that a killed run wrote after its last checkpoint.

    A checkpoint at the end of an epoch (`step` > 0) is written before that epoch is evaluated: an
    evaluation or a probe at its step is dropped too and done again. Returns the last evaluation that
    is kept, and the seconds that the run had taken by the last line; raises what `read_metrics` raises.
    """
    if not path.exists():
        return {}, 0.0
    kept: list[str] = []
    evaluation: dict[str, float] = {}
    evaluated = position.step == 0 and position.global_step > 0
    seconds = 0.0
    for record in read_metrics(path):
        seconds = max(seconds, record.get("seconds", 0.0))
        behind = position.global_step - record["global_step"]
        if behind > 0 or (behind == 0 and (evaluated or not MEASURED & record.keys())):
            kept.append(json.dumps(record) + "\n")
            evaluation = record.get("evaluation", evaluation)
    write_text(path, "".join(kept))
    return evaluation, seconds


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl; the last line is passed over if the run was killed while it was written.

    Raises:
        DamagedFileError: another line is not what was written.
    """
    lines = path.read_bytes().split(b"\n")  # the last of these is empty, or a part of a line
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            if number == len(lines) - 1:  # a crash of the machine may leave zeros
                break
            raise damaged(path, f"line {number} is no JSON ({error})", _REMOVE) from error
        if not isinstance(record, dict) or not isinstance(record.get("global_step"), int):
            raise damaged(path, f"line {number} has no global_step", _REMOVE)
        if not isinstance(record.get("seconds", 0.0), (int, float)):
            raise damaged(path, f"line {number}: seconds is {record['seconds']!r:.60}", _REMOVE)
        for name in MEASURED & record.keys():
            if not isinstance(record[name], dict):
                raise damaged(path, f"line {number}: {name} is {record[name]!r:.60}", _REMOVE)
        records.append(record)
    return records


def _open_tracker(name: str, folder: Path, config: dict[str, Any]) -> Tracker:
    try:
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(folder / "tensorboard"))
            for file in (folder / "tensorboard").iterdir():
                record_files([file])

            def log(numbers: dict[str, Any], step: int) -> None:
                for key, value in numbers.items():
                    writer.add_scalar(key, value, step)

            return log, writer.close
        module = import_module(name)
    except ImportError as error:
        raise MissingDependencyError(
            f"report_to={name!r} needs a package that is not installed: pip install {name}"
        ) from error
    if name == "mlflow":
        module.set_experiment("pymcip")
        module.start_run(run_name=folder.name)
        module.log_params(config)
        return lambda numbers, step: module.log_metrics(numbers, step=step), module.end_run
    # wandb and trackio share one interface
    module.init(project="pymcip", name=folder.name, config=config)
    return lambda numbers, step: module.log(numbers, step=step), module.finish
