"""The logs of a run: out.log, metrics.jsonl, and trackers such as TensorBoard if asked for."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any

from pymcip.errors import MissingDependencyError
from pymcip.files import write_text
from pymcip.training.checkpoints import Position

MEASURED = {"evaluation", "alignment"}  # keys of what an epoch's end writes


@contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Also write pymcip's log messages to `path` while the block runs."""
    logger = logging.getLogger("pymcip")
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
    """metrics.jsonl: one JSON object a line; also sends numbers to the chosen trackers."""

    def __init__(self, folder: Path, report_to: tuple[str, ...], config: dict[str, Any]) -> None:
        self.path = folder / "metrics.jsonl"
        self.trackers = [_make_tracker(name, folder, config) for name in report_to]
        self.handle = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed by __exit__)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.handle.close()
        for tracker in self.trackers:
            tracker.close()

    def write(self, record: dict[str, Any]) -> None:
        """Append a line; its `global_step` is the step that the trackers are given."""
        self.handle.write(json.dumps(record) + "\n")
        self.handle.flush()
        numbers = {
            name: value
            for name, value in record.items()
            if isinstance(value, (int, float)) and name != "global_step"
        }
        for tracker in self.trackers:
            tracker.log(numbers, record["global_step"])


def forget_after(path: Path, position: Position) -> dict[str, float]:
    """Drop the lines of metrics.jsonl that a killed run wrote after its last checkpoint.

    A checkpoint at the end of an epoch (`step` > 0) is written before that epoch is evaluated: an
    evaluation or a probe at its step is dropped too and done again. Returns the last evaluation that
    is kept.
    """
    if not path.exists():
        return {}
    kept: list[str] = []
    evaluation: dict[str, float] = {}
    evaluated = position.step == 0 and position.global_step > 0
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # the line being written when the run was killed
            continue
        behind = position.global_step - record["global_step"]
        if behind > 0 or (behind == 0 and (evaluated or not MEASURED & record.keys())):
            kept.append(line + "\n")
            evaluation = record.get("evaluation", evaluation)
    write_text(path, "".join(kept))
    return evaluation


class _TensorBoard:
    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, numbers: dict[str, Any], step: int) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class _Module:
    """wandb and trackio share one interface: init, log, finish."""

    def __init__(self, module: Any, folder: Path, config: dict[str, Any]) -> None:
        self.module = module
        module.init(project="pymcip", name=folder.name, config=config)

    def log(self, numbers: dict[str, Any], step: int) -> None:
        self.module.log(numbers, step=step)

    def close(self) -> None:
        self.module.finish()


def _make_tracker(name: str, folder: Path, config: dict[str, Any]) -> Any:
    try:
        if name == "tensorboard":
            return _TensorBoard(folder, config)
        return _Module(import_module(name), folder, config)
    except ImportError as error:
        raise MissingDependencyError(
            f"report_to={name!r} needs a package that is not installed: pip install {name}"
        ) from error
