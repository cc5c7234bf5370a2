"""Evaluation on `val_data` while training: before it, after every epoch, and at the end."""

from __future__ import annotations

import logging

import numpy as np

from pymcip.data import ImageData
from pymcip.data.class_names import ClassNames
from pymcip.evaluation import evaluate_model
from pymcip.files import read_json, write_json
from pymcip.model import ClipModel
from pymcip.training.checkpoints import mark_best
from pymcip.training.loop import Run, Stage

EMBED_BATCH = 64

_log = logging.getLogger("pymcip.training")


class Validation:
    """Evaluations of a model in training, in percent.

    Attributes:
        before: of the untrained model; {} until `start`.
        metrics: the last one.
    """

    def __init__(
        self,
        clip: ClipModel,
        data: ImageData,
        class_names: ClassNames | None,
        *,
        workers: int,
        metrics: dict[str, float],
    ) -> None:
        self.clip, self.data, self.class_names, self.workers = clip, data, class_names, workers
        self.before: dict[str, float] = {}
        self.metrics = metrics

    def start(self, run: Run) -> None:
        """Evaluate the untrained model, or read what a run that is resumed found."""
        path = run.out / "before.json"
        if not path.is_file():
            if run.position.global_step > 0:
                return  # the untrained model is gone; a killed run lost its first evaluation
            self.update()
            write_json(path, self.metrics)
        self.before = read_json(path, {}, "Remove it; the run goes on without these figures")
        if run.position.global_step == 0:
            run.log.write({"evaluation": self.before, "global_step": 0})

    def after_epoch(self, run: Run, stage: Stage) -> None:
        """Evaluate, log, and mark the run's last checkpoint if it is the best so far."""
        self.update()
        run.log_epoch(stage, "evaluation", self.metrics)
        position = run.position
        names = ("i2i_map", "zero_shot", "t2i_r5")  # the mean of those that were measured
        score = float(np.mean([self.metrics[name] for name in names if name in self.metrics]))
        _log.info("epoch %d: %s (score %.2f)", position.epoch + 1, self.metrics, score)
        if score > position.best_score and run.checkpoint is not None:
            position.best_score = score
            mark_best(run.checkpoint)

    def update(self) -> None:
        """Evaluate the model as it is now."""
        self.metrics = evaluate_model(
            self.clip, self.data,
            class_names=self.class_names, batch_size=EMBED_BATCH, workers=self.workers,
        )  # fmt: skip
