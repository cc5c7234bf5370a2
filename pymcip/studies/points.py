"""Which settings a sweep tries, and which run gives each of them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pymcip.configs import SweepConfig, TrainConfig
from pymcip.errors import ConfigError

# A two-stage method goes on from the finished run of its first stage, which is a method too.
FIRST_STAGE = {"2sft": "gpr", "mcip+rea": "mcip"}

Changes = Mapping[str, Mapping[str, Any]]  # by method: options that it has in place of the base's
NO_CHANGES: Changes = {}


@dataclass(frozen=True)
class Point:
    """One row of a study.

    `settings` are the swept options that it sets and uses; `config` is the base with them; `run` is
    the name of its run, which points of the same settings share.
    """

    settings: dict[str, Any]
    config: TrainConfig
    run: str


def label(settings: dict[str, Any], axes: int) -> str:
    """How a point is called in tables and plots: by its values alone if one option is swept."""
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
    if config.grid == "axes":
        tried = [{name: value} for name, values in axes.items() for value in values]
    else:
        tried = [
            dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())
        ]
    points: list[Point] = []
    problems: list[str] = []
    for settings in tried:
        try:
            point = make_point(base, settings, changes)
        except ConfigError as error:
            problems += error.problems
            continue
        if point.settings and all(point.settings != other.settings for other in points):
            points.append(point)
    methods = dict.fromkeys(config.method if config.grid == "product" else ())
    shown = ", ".join(methods or [base.method])
    if not problems:
        problems += [
            f"{name} is swept, but method {shown} doesn't use it"
            for name in axes
            if all(name not in point.settings for point in points)
        ]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return points


def make_point(base: TrainConfig, settings: dict[str, Any], changes: Changes = NO_CHANGES) -> Point:
    """The point of `settings`, without those that its method doesn't use.

    `changes` make the base what its method is tried with; `settings` are over them.
    """
    method = settings.get("method", base.method)
    base = dataclasses.replace(base, **{"method": method, **changes.get(method, {})})
    config = dataclasses.replace(base, **_options(settings))
    used = _used(config)
    settings = {name: value for name, value in settings.items() if name in used}
    config = dataclasses.replace(base, **_options(settings))
    differing = [
        f"{name}={value}"
        for name, value in settings.items()
        if name != "method"
        and any(getattr(base, key) != changed for key, changed in _options({name: value}).items())
    ]
    return Point(settings, config, "_".join([config.method, *differing]))


def first_stage(base: TrainConfig, point: Point, changes: Changes = NO_CHANGES) -> Point | None:
    """The point whose run a two-stage method goes on from; None for methods of one stage."""
    method = FIRST_STAGE.get(point.config.method)
    if method is None:
        return None
    return make_point(base, {**point.settings, "method": method}, changes)


def second_stage(config: TrainConfig, model: str) -> TrainConfig:
    """The second stage of a two-stage method as a run of its own, on top of `model`.

    Pseudo-captions are those of the first stage: mined by the model that it started from.
    """
    miner = (config.mine_model, config.mine_pretrained)
    if config.mine_model is None:
        miner = (config.model, config.pretrained)
    return dataclasses.replace(
        config,
        method="rea",
        model=model,
        pretrained=None,
        mine_model=miner[0],
        mine_pretrained=miner[1],
        projector="lock",  # rea leaves the image tower as it is; discard is none of its options
    )


def _options(settings: dict[str, Any]) -> dict[str, Any]:
    """TrainConfig's options for swept settings: the weights of the two losses sum to 1."""
    options = dict(settings)
    if "lambda_caption" in settings:
        options["lambda_class"] = round(1 - settings["lambda_caption"], 12)
    return options


def _used(config: TrainConfig) -> set[str]:
    """The swept options that have a say in what is computed."""
    used = {"method"}
    if config.trains_images:
        used |= {"margin", "scale", "lr", "epochs"}
    if config.uses_captions_for_images:
        used |= {"lambda_caption", "caption_margin", "caption_scale"}
    if config.needs_captions:
        used |= {"threshold", "k", "caption_noise"}
    return used
