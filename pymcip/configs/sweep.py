"""Options of the stage that trains at many settings and compares them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from pymcip.configs.options import Config, Source, Sources, option
from pymcip.configs.train import Method, TrainConfig
from pymcip.errors import ConfigError

ImageMetric = Literal["i2i_map", "i2i_r1", "knn"]
TextMetric = Literal[
    "zero_shot", "zero_shot_top5", "t2i_map",
    "t2i_r1", "t2i_r5", "t2i_r10", "i2t_r1", "i2t_r5", "i2t_r10",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SweptOptions(Config):
    """The options of `pymcip.sweep` that hold values to try."""

    method: tuple[Method, ...] = option((), "methods to try")
    threshold: tuple[float | Literal["auto"], ...] = option((), "lowest cosines to try, or auto")
    lambda_caption: tuple[float, ...] = option(
        (), "weights of MCArcMargin to try, 0 to 1; lambda_class is the rest to 1", at_most=1
    )
    margin: tuple[float, ...] = option((), "m of ArcMargin to try, radians")
    scale: tuple[float, ...] = option((), "s of ArcMargin to try")
    caption_margin: tuple[float, ...] = option((), "m of MCArcMargin to try, radians")
    caption_scale: tuple[float, ...] = option((), "s of MCArcMargin to try")
    k: tuple[int, ...] = option((), "pseudo-captions per image to try")
    caption_noise: tuple[float, ...] = option((), "shares of random pseudo-captions to try")
    lr: tuple[float, ...] = option((), "learning rates of the image tower to try")
    epochs: tuple[int, ...] = option((), "passes over the training images to try")

    @property
    def axes(self) -> dict[str, tuple[Any, ...]]:
        """The options that are swept, each with its distinct values in the order given."""
        each = {item.name: getattr(self, item.name) for item in fields(SweptOptions)}
        return {name: tuple(dict.fromkeys(values)) for name, values in each.items() if values}


@dataclass(frozen=True, kw_only=True)
class SweepConfig(SweptOptions):
    """Options of `pymcip.sweep`."""

    grid: Literal["axes", "product"] = option(
        "axes", "each option alone, the others as they are; or all combinations"
    )
    seeds: int = option(1, "how many seeds to run; tables give mean and deviation", at_least=1)
    train: Source | None = option(
        None, "JSON file of train's options, such as a run's config.json; default: the demo's"
    )
    data: Sources | None = option(
        None, "images to evaluate on, with `train`; default: its val_data and val_class_names"
    )
    class_names: Source | None = option(None, "TSV of class names of `data`, as for evaluate")
    templates: tuple[str, ...] = option(
        ("a photo of a {}.", "{}"), "zero-shot prompts, with `train`; {} stands for the class name"
    )
    retrieval: ImageMetric = option("i2i_map", "what image search is measured by")
    alignment: tuple[TextMetric, ...] = option(
        (),
        "what text search is measured by, the mean of several; "
        "default: those of t2i_r5 and zero_shot that the data allow",
    )
    smoke: bool = option(False, "the demo's tiny world: shows that everything runs")
    out: Source = option(Path("runs/sweep"), "folder to write: table.md, sweep.json, plots, runs")
    resume: Literal["latest"] | None = option(
        None, "go on with the sweep in `out`: finished runs are taken as they are"
    )
    overwrite: bool = option(False, "replace what is in `out`")

    def problems(self) -> list[str]:
        problems = super().problems()
        if not self.axes:
            flags = ", ".join(item.name.replace("_", "-") for item in fields(SweptOptions))
            problems.append(f"nothing is swept; give values for at least one of {flags}")
        for name, values in self.axes.items():
            for value in values:
                try:
                    TrainConfig(model="", train_data="", out="", captions="", **{name: value})
                except ConfigError as error:
                    problems += error.problems
        if self.train is None:
            problems += [
                f"{name} is for your own data: give `train` too, a JSON file of train's options"
                for name in ("data", "class_names")
                if getattr(self, name) is not None
            ]
        elif self.smoke:
            problems.append("smoke is a size of the demo's world; it excludes `train`")
        if self.class_names is not None and self.data is None:
            problems.append("class_names are those of `data`; give `data` too")
        return problems
