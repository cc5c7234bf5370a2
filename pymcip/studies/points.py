"""Which settings a sweep tries, and the name of the run that trains each of them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pymcip.configs import SweepConfig, TrainConfig
from pymcip.demo.recipe import FIRST_STAGE
from pymcip.errors import ConfigError

Changes = Mapping[str, Mapping[str, Any]]  # by method: options that it has in place of the base's
NO_CHANGES: Changes = {}


@dataclass(frozen=True)
class Point:
    """One row of a study."""

    settings: dict[str, Any]  # the swept options that it sets and uses
    config: TrainConfig  # the base with them
    run: str  # the name of its run, which points of the same config share
    first: Point | None = None  # the point whose run a two-stage method goes on from


def label(settings: dict[str, Any], axes: int) -> str:
    """A point's name in tables and plots: its values alone if one option is swept."""
    values = {name: f"{v:g}" if isinstance(v, float) else str(v) for name, v in settings.items()}
    if axes == 1:
        return " ".join(values.values())
    return ", ".join(v if name == "method" else f"{name} {v}" for name, v in values.items())


def study_points(
    config: SweepConfig, base: TrainConfig, changes: Changes = NO_CHANGES
) -> list[Point]:
    """The points of a sweep around `base`, in the order of the options and of their values.

    Options that a point's method doesn't use are left out of it, and points that become equal by
    that are one: `gpr` is trained once, whatever thresholds a product tries.

    Raises:
        ConfigError: a combination is not allowed, or a swept option is used by no method.
    """
    axes = config.axes
    tried = [{name: value} for name, values in axes.items() for value in values]
    if config.grid == "product":
        products = itertools.product(*axes.values())
        tried = [dict(zip(axes, values, strict=True)) for values in products]
    points: dict[str, Point] = {}
    for settings in tried:
        point = make_point(base, settings, changes)
        if point.settings:
            points.setdefault(str(point.settings), point)
    methods = (config.grid == "product" and config.method) or (base.method,)
    problems = [
        f"{name} is swept, but method {', '.join(dict.fromkeys(methods))} doesn't use it"
        for name in axes
        if all(name not in point.settings for point in points.values())
    ]
    if problems:
        raise ConfigError(problems)
    return list(points.values())


def make_point(base: TrainConfig, settings: dict[str, Any], changes: Changes = NO_CHANGES) -> Point:
    """The point of `settings`, without those that its method doesn't use.

    `changes` make the base what its method is tried with; `settings` are over them.
    """
    method = settings.get("method", base.method)
    own = replace(base, **{"method": method, **changes.get(method, {})})
    used = {"method"}
    if own.trains_images:
        used |= {"margin", "scale", "lr", "epochs"}
    if own.uses_captions_for_images:
        used |= {"lambda_caption", "caption_margin", "caption_scale"}
    if own.needs_captions:
        used |= {"threshold", "k", "caption_noise"}
    settings = {name: value for name, value in settings.items() if name in used}
    first = None
    if method in FIRST_STAGE:
        first = make_point(base, {**settings, "method": FIRST_STAGE[method]}, changes)
    each = {f"{name}={value}": {name: value} for name, value in settings.items()}
    differing = [name for name, one in each.items() if replace(own, **_options(one)) != own]
    run = "_".join([method, *differing])
    return Point(settings, replace(own, **_options(settings)), run, first)


def _options(settings: dict[str, Any]) -> dict[str, Any]:
    """TrainConfig's options for swept settings: the weights of the two losses sum to 1."""
    if "lambda_caption" not in settings:
        return settings
    return {**settings, "lambda_class": round(1 - settings["lambda_caption"], 12)}
