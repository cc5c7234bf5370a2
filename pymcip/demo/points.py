"""The runs that the demo and `pymcip sweep` compare: their options, their folders, their metrics.

`gpr` is trained once for itself and as the first stage of `2sft`, and so is `mcip` for `mcip+rea`.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pymcip.configs import SweepConfig, TrainConfig
from pymcip.configs.sweep import with_both_weights
from pymcip.configs.train import FIRST_STAGE
from pymcip.errors import ConfigError, PymcipError
from pymcip.evaluation import evaluate
from pymcip.files import read_json, write_json
from pymcip.training import train
from pymcip.training.checkpoints import checkpoint_files

Changes = Mapping[str, Mapping[str, Any]]  # by method: options that it has in place of the base's
NO_CHANGES: Changes = {}


@dataclass(frozen=True)
class Point:
    """One training of a comparison."""

    settings: dict[str, Any]  # the compared options that it sets and uses
    config: TrainConfig  # the base with them
    run: str  # the name of its run, which points of the same config share
    first: Point | None = None  # whose run is the first stage of this one


def label(settings: dict[str, Any], axes: int) -> str:
    """A point's name in tables and plots: its values alone if one option is swept."""
    values = {name: f"{v:g}" if isinstance(v, float) else str(v) for name, v in settings.items()}
    if axes == 1:
        return " ".join(values.values())
    return ", ".join(v if name == "method" else f"{name} {v}" for name, v in values.items())


def make_point(base: TrainConfig, settings: dict[str, Any], changes: Changes = NO_CHANGES) -> Point:
    """The point of `settings`, without those that its method doesn't use.

    `changes` make the base what its method is tried with; `settings` are over them.
    """
    method = settings.get("method", base.method)
    own = replace(base, **{"method": method, **changes.get(method, {})})
    settings = {name: value for name, value in settings.items() if name not in own.unused}
    config = replace(own, **with_both_weights(settings))
    first = None
    if method in FIRST_STAGE and config.budget is None:
        first = make_point(base, {**settings, "method": FIRST_STAGE[method]}, changes)
    differing = [
        f"{name}={value}"
        for name, value in settings.items()
        if any(getattr(config, n) != getattr(own, n) for n in with_both_weights({name: value}))
    ]
    return Point(settings, config, "_".join([method, *differing]), first)


def study_points(
    config: SweepConfig, base: TrainConfig, changes: Changes = NO_CHANGES
) -> list[Point]:
    """The points of a sweep around `base`, in the order of the options and of their values.

    Options that a point's method doesn't use are left out of it. Points of equal runs are one: `gpr` is
    trained once, whatever thresholds a product tries, and of options that are tried alone those that
    have the base's value share a point, which has them all in its settings.

    Raises:
        ConfigError: a combination is not allowed, or a swept option is used by no method.
    """
    axes = config.axes
    tried = [{name: value} for name, values in axes.items() for value in values]
    if config.grid == "product":
        products = itertools.product(*axes.values())
        tried = [dict(zip(axes, values, strict=True)) for values in products]
    points: dict[str, Point] = {}  # by what is trained
    for settings in tried:
        point = make_point(base, settings, changes)
        if not point.settings:
            continue
        same = points.setdefault(str(point.config), point)
        if config.grid == "axes":  # the base's own values, of several options, are one point
            both = {**same.settings, **point.settings}
            points[str(point.config)] = replace(same, settings=both)
    methods = (config.grid == "product" and axes.get("method")) or (base.method,)
    problems = [
        f"{name} is swept, but method {', '.join(dict.fromkeys(methods))} doesn't use it"
        for name in axes
        if all(name not in point.settings for point in points.values())
    ]
    if problems:
        raise ConfigError(problems)
    return list(points.values())


def trained(point: Point, runs: Path, failed: dict[str, PymcipError]) -> Path:
    """The finished run folder of a point below `runs`, trained now if there is none.

    `failed` has the errors of earlier calls by run name; such a run is not tried again.
    Checkpoints are removed.
    """
    out = runs / point.run
    if not (out / "result.json").is_file():  # written last
        if point.run in failed:
            raise failed[point.run]
        try:
            first = trained(point.first, runs, failed) if point.first else None
            result = train(replace(point.config, out=out, resume="latest", first_stage=first))
        except PymcipError as error:
            failed[point.run] = error
            raise
        if result.interrupted:
            raise KeyboardInterrupt(result.interrupted)
    for file in (*checkpoint_files(out / "checkpoints"), out / "checkpoints" / "best.pt"):
        file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # it is gone, or holds something else
        (out / "checkpoints").rmdir()
    return out


def measured(config: TrainConfig, data: dict[str, Any], file: Path) -> dict[str, float]:
    """Metrics of a config's model, by `evaluate` with the options `data`; from `file` if they are there."""
    if not file.is_file():
        names = ("model", "pretrained", "image_size", "device", "precision")
        model = {name: getattr(config, name) for name in names}
        write_json(file, evaluate(**model, **data).metrics)
    found: dict[str, float] = read_json(file, {})
    return found
