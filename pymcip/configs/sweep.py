"""Options of the stage that trains at many settings and compares them."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pymcip.configs.options import Config, Source, Sources, option
from pymcip.configs.train import TrainConfig
from pymcip.errors import ConfigError

ImageMetric = Literal["i2i_map", "i2i_r1", "knn"]
TextMetric = Literal[
    "zero_shot", "zero_shot_top5", "t2i_map",
    "t2i_r1", "t2i_r5", "t2i_r10", "i2t_r1", "i2t_r5", "i2t_r10",
]  # fmt: skip


FIXED = (
    "model",
    "pretrained",
    "out",
    "seed",
    "first_stage",
    "resume",
    "overwrite",
)  # of the runs of a sweep


@dataclass(frozen=True, kw_only=True)
class SweepConfig(Config):
    """Options of `pymcip.sweep`."""

    set: dict[str, Any] = option(
        {},
        "options of train and the values to try, such as method=gpr,mcip margin=0.1,0.3; with "
        "lambda_caption, lambda_class is the rest to 1",
    )
    grid: Literal["axes", "product"] = option(
        "axes", "each option alone, the others as they are; or all combinations"
    )
    seeds: int = option(1, "how many seeds to run; tables give mean and deviation", at_least=1)
    train: Source | None = option(
        None,
        "JSON or YAML file of train's options, such as a run's config.json; default: the demo's",
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
        None, "continue the sweep in `out`: finished runs are taken as they are"
    )
    overwrite: bool = option(False, "replace what is in `out`")

    @property
    def axes(self) -> dict[str, tuple[Any, ...]]:
        """The options that are swept, each with its distinct values in the order given."""
        each = {name: _values(given) for name, given in self.set.items()}
        return {
            name: tuple(value for i, value in enumerate(values) if value not in values[:i])
            for name, values in each.items()
        }

    def problems(self) -> list[str]:
        problems = super().problems()
        if not any(self.axes.values()):
            problems.append("nothing is swept; give set=, such as {'method': ['gpr', 'mcip']}")
        for name, values in self.axes.items():
            if name in FIXED:
                problems.append(f"{name} can't be swept: the sweep sets it, the same for all runs")
                continue
            for value in values:
                # of a method and with weights that allow it; `study_points` checks the runs themselves
                own: dict[str, Any] = {
                    "model": "", "train_data": "", "out": "", "captions": "", "method": "mcip",
                    "positives": "compete", "distill": 1.0,
                }  # fmt: skip
                try:
                    TrainConfig.make(None, {**own, **with_both_weights({name: value})})
                except ConfigError as error:
                    problems += error.problems
        if self.train is None:
            problems += [
                f"{name} is for your own data: give `train` too, a file of train's options"
                for name in ("data", "class_names")
                if getattr(self, name) is not None
            ]
        elif self.smoke:
            problems.append("smoke is a size of the demo's world; it excludes `train`")
        if self.class_names is not None and self.data is None:
            problems.append("class_names are those of `data`; give `data` too")
        return problems


def with_both_weights(options: dict[str, Any]) -> dict[str, Any]:
    """Options of `train` for swept ones: the weights of the two losses sum to 1."""
    share = options.get("lambda_caption")
    if not isinstance(share, (int, float)):
        return options
    return {**options, "lambda_class": round(1 - share, 12)}


def _values(given: Any) -> list[Any]:
    """Split a text of values at its commas; numbers among them become numbers."""
    if not isinstance(given, str):
        return list(given) if isinstance(given, (list, tuple)) else [given]
    return [_value(word) for word in given.split(",") if word]


def _value(word: str) -> Any:
    try:
        return ast.literal_eval(word)
    except (ValueError, SyntaxError):
        return word
