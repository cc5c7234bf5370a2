"""Evaluation of a run on images it isn't trained on: before it, after every epoch, at the end."""

from __future__ import annotations

import logging
from dataclasses import asdict

import numpy as np

from pymcip.benchmarks import SuiteOptions
from pymcip.configs import TrainSettings, Workers
from pymcip.data import ImageData
from pymcip.data.class_names import ClassNames
from pymcip.evaluation import in_words
from pymcip.evaluation.examples import Examples
from pymcip.evaluation.own_data import Measured, check_own, measure_model
from pymcip.files import damaged, read_json, write_json
from pymcip.model import ClipModel
from pymcip.training.checkpoints import mark_best
from pymcip.training.loop import Run, Stage

EMBED_BATCH = 64
IMAGE_SEARCH = "i2i_map"
TEXT_SEARCH = ("zero_shot", "t2i", "i2t")  # how their names begin
SAME = 0.1  # points by which a figure of text search may fall in rounding
LEARNT = 0.9  # of the first loss: a run that ends above it hardly learnt

_log = logging.getLogger("pymcip.training")


class Validation:
    """Evaluations of a model in training, in percent.

    Attributes:
        before: of the untrained model; {} until `start`. `found_before`: what it finds.
        metrics: the last one. `measured`: with all that belongs to it; None if it was read from a file.
        remarks: what is not better in the end.
    """

    def __init__(
        self,
        clip: ClipModel,
        data: ImageData,
        class_names: ClassNames | None,
        *,
        held_out: bool,
        workers: Workers,
        metrics: dict[str, float],
    ) -> None:
        self.clip, self.data, self.class_names, self.workers = clip, data, class_names, workers
        self.held_out = held_out  # whether `data` are classes of train_data
        self.before: dict[str, float] = {}
        self.found_before: Examples | None = None
        self.metrics = metrics
        self.measured: Measured | None = None
        self.remarks: list[str] = []

    def start(self, run: Run) -> None:
        """Evaluate the untrained model, or read what a run that is resumed found."""
        path = run.out / "before.json"
        if not path.is_file():
            if run.position.global_step > 0:
                return  # the untrained model is gone; a killed run lost its first evaluation
            examples = asdict(self.update().examples)
            write_json(path, {"metrics": self.metrics, "examples": examples})
        advice = "Remove it; the run continues without these figures"
        values = read_json(path, {"metrics": dict, "examples": dict}, advice)
        self.before = values["metrics"]
        try:
            self.found_before = Examples.of(values["examples"])
        except (KeyError, TypeError, ValueError) as error:
            raise damaged(path, f"its examples can't be read: {error!r}", advice) from error
        if run.position.global_step == 0:
            run.log.write({"evaluation": self.before, "global_step": 0})

    def after_epoch(self, run: Run, stage: Stage) -> None:
        """Evaluate, log, and mark the run's last checkpoint if it is the best so far."""
        self.update()
        if run.config.extra_dims:  # the tower in training serves image search alone
            for name in [name for name in self.metrics if name.startswith(TEXT_SEARCH)]:
                del self.metrics[name]
        run.log_epoch(stage, "evaluation", self.metrics)
        position = run.position
        names = ("i2i_map", "zero_shot", "t2i_r5")  # the mean of those that were measured
        score = float(np.mean([self.metrics[name] for name in names if name in self.metrics] or 0))
        _log.info("after epoch %d, in percent: %s", position.epoch + 1, in_words(self.metrics))
        if score > position.best_score and run.checkpoint is not None:
            position.best_score = score
            mark_best(run.checkpoint)

    def update(self) -> Measured:
        """Evaluate the model as it is now."""
        own = check_own(self.data, None, self.class_names)
        self.measured = measure_model(
            own, self.clip, SuiteOptions(), batch_size=EMBED_BATCH, workers=self.workers
        )
        self.metrics = self.measured.metrics
        return self.measured

    def finish(self, run: Run, clip: ClipModel, *, changed: bool) -> None:
        """Evaluate the model to export, and log the figures before and after, and what is not better.

        `changed`: whether it is another model than at the end of the last epoch.
        """
        self.clip = clip
        if changed or self.measured is None:
            self.update()
        if not self.before:
            return
        source = "classes that were held out" if self.held_out else "val_data"
        _log.info(
            "before -> after, in percent, on %d images of %s: %s",
            len(self.data), source, in_words(self.metrics, self.before),
        )  # fmt: skip
        steps = [
            line for line in run.log.records() if line.get("stage") == "image" and "loss" in line
        ]
        self.remarks = shortcomings(
            run.config, self.before, self.metrics, [line["loss"] for line in steps]
        )
        for line in self.remarks:
            _log.warning("%s", line)


def shortcomings(
    config: TrainSettings, before: dict[str, float], after: dict[str, float], losses: list[float]
) -> list[str]:
    """What of a trained model is not better than before, each with a likely cause and a next step.

    Args:
        config: the options of the run.
        before, after: metrics in percent.
        losses: of the image stage, in order.
    """
    found = []
    if (
        (config.trains_images or config.extra_dims)
        and IMAGE_SEARCH in before
        and after[IMAGE_SEARCH] <= before[IMAGE_SEARCH]
    ):
        figures = in_words({IMAGE_SEARCH: after[IMAGE_SEARCH]}, before)
        change = f"image search is not better than before ({figures})"
        if losses and losses[-1] > LEARNT * losses[0]:
            cause = (
                f"the loss only went from {losses[0]:.2f} to {losses[-1]:.2f}, so the model hardly "
                f"learnt: raise lr (now {config.lr:g}) or epochs (now {config.epochs})"
            )
        else:
            cause = (
                "the training classes were learnt, but others did not gain: lower lr (now "
                f"{config.lr:g}) or epochs (now {config.epochs}), or train on more classes; with "
                "few images to measure by (holdout, val_data) it may be chance"
            )
        found.append(f"{change}: {cause}")
    fallen = {
        name: value
        for name, value in after.items()
        if name.startswith(TEXT_SEARCH) and value < before.get(name, 0) - SAME
    }
    if fallen:
        found.append(
            f"text search is worse than before ({in_words(fallen, before)}): training moved the images away "
            "from the texts. method='appended' leaves text search as it is; alignment_budget= bounds "
            "what is lost"
        )
    return found
