"""The runs that the demo and `pymcip sweep` compare: their options, their folders, their metrics.

A two-stage method starts from the finished run of its first stage, which is a method too; so `gpr`
is trained once for itself and for `2sft`, and `mcip` for itself and for `mcip+rea`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pymcip.configs import TrainConfig
from pymcip.configs.sweep import with_both_weights
from pymcip.errors import PymcipError
from pymcip.evaluation import evaluate
from pymcip.files import read_json, write_json
from pymcip.training import train
from pymcip.training.checkpoints import checkpoint_files

FIRST_STAGE = {"2sft": "gpr", "mcip+rea": "mcip"}
# Options that a method may not use; such a setting makes no other run of it.
OF_IMAGES = {
    "margin", "scale", "lr", "lr_classes", "epochs", "batch_size", "warmup", "train_size",
    "unlock_layers", "freeze_bn_stats", "class_init", "class_balanced", "continuation", "aug_cfg",
    "appended_dims", "grad_clip_classes", "train_resize", "patch_dropout",
}  # fmt: skip
OF_CAPTION_LOSS = {
    "lambda_class", "lambda_caption", "caption_scale", "caption_margin", "positives", "negatives",
    "loss_delta", "repel", "caption_mean",
}  # fmt: skip
OF_MINING = {"threshold", "k", "caption_table", "caption_noise", "mine_model", "mine_pretrained"}
Changes = Mapping[str, Mapping[str, Any]]  # by method: options that it has in place of the base's
NO_CHANGES: Changes = {}


@dataclass(frozen=True)
class Point:
    """One training of a comparison."""

    settings: dict[str, Any]  # the compared options that it sets and uses
    config: TrainConfig  # the base with them
    run: str  # the name of its run, which points of the same config share
    first: Point | None = None  # the point whose run a two-stage method starts from


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
    unused: set[str] = set()
    for names, used in (
        (OF_IMAGES, own.trains_images),
        (OF_CAPTION_LOSS, own.uses_captions_for_images),
        (OF_MINING, own.needs_captions),
        ({name for name in settings if name.startswith("rea_")}, own.realigns),
    ):
        unused |= set() if used else names
    settings = {name: value for name, value in settings.items() if name not in unused}
    first = None
    if method in FIRST_STAGE:
        first = make_point(base, {**settings, "method": FIRST_STAGE[method]}, changes)
    config = replace(own, **with_both_weights(settings))
    differing = [
        f"{name}={value}"
        for name, value in settings.items()
        if any(getattr(config, n) != getattr(own, n) for n in with_both_weights({name: value}))
    ]
    return Point(settings, config, "_".join([method, *differing]), first)


def second_stage(config: TrainConfig, model: str) -> TrainConfig:
    """The second stage of a two-stage method as a run of its own, on top of `model`.

    Pseudo-captions are those of the first stage: mined by the model that it started from.
    """
    miner = (config.mine_model, config.mine_pretrained)
    if config.mine_model is None and config.caption_table is None:
        miner = (config.model, config.pretrained)
    return replace(
        config,
        method="rea",
        model=model,
        pretrained=None,
        mine_model=miner[0],
        mine_pretrained=miner[1],
        projector="lock",  # rea leaves the image tower as it is; discard is none of its options
    )


def trained(point: Point, runs: Path, failed: dict[str, PymcipError]) -> Path:
    """The finished run folder of a point below `runs`, trained now if there is none.

    `failed` has the errors of earlier calls by run name; such a run is not tried again.
    Checkpoints are removed.
    """
    out = runs / point.run
    if not (out / "result.json").is_file():  # written last
        if point.run in failed:
            raise failed[point.run]
        config = replace(point.config, out=out, resume="latest")
        try:
            if point.first:
                config = second_stage(config, str(trained(point.first, runs, failed)))
            result = train(config)
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
