"""The training loop, shared by all stages: steps, checkpoints, interruption, bad losses."""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pymcip.configs import TrainSettings
from pymcip.distributed import highest, is_first, rows_of
from pymcip.errors import CheckpointError, TrainingDivergedError
from pymcip.model import ClipModel
from pymcip.model.towers import training_batch_norms
from pymcip.progress import progress
from pymcip.training.callbacks import Callbacks, TrainState
from pymcip.training.checkpoints import Position, save_checkpoint
from pymcip.training.logs import MetricsLog, system_values
from pymcip.training.optim import cosine_with_warmup
from pymcip.training.pace import Pace
from pymcip.training.replicas import change_rows, to_first, total
from pymcip.training.sharding import bring_back, clip_gradients, own_moments, whole_moments

MAX_BAD_STEPS_IN_A_ROW = 10
LOSS_WORDS = {  # for the parts of the loss
    "arc_margin": "class labels",
    "caption_margin": "pseudo-captions",
    "distill": "distillation",
    "distill_mixtures": "distillation on mixtures",
    "distill_data": "distillation on distill_data",
}

_log = logging.getLogger("pymcip.training")


class Stage(Protocol):
    """Something to train, as `fit` sees it. A step is one optimizer update."""

    name: str
    epochs: int
    clip: ClipModel  # what is trained; maybe a divided copy of the run's (`training.sharding`)
    steps_per_epoch: int
    samples_per_step: int
    warmup: int
    optimizer: torch.optim.Optimizer
    heads: nn.ModuleDict  # trained beside the model, and saved with it; rows of matrices

    def train_mode(self) -> None:
        """Put the model's parts into train or evaluation mode."""

    def steps(self, epoch: int, first_step: int) -> Iterator[list[Any]]:
        """The micro-batches of each remaining step of the epoch, in every process all of them."""

    def backward(self, micro_batches: list[Any]) -> dict[str, Tensor]:
        """Add the step's gradients; return its detached scalars, "loss" among them.

        Of several processes each runs its share of the micro-batches, and returns the whole scalars.
        """


class Interruption:
    """Turn SIGINT and SIGTERM into a request that the loop meets after the current step.

    Outside of the loop (while embedding or mining, where finished parts are on disk) the first
    signal ends the work at once, as the second one does everywhere.

    Attributes:
        requested: the signal that this process was sent.
        agreed: one that a process of the run was sent, when all have exchanged it (`agree`).
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self.agreed: str | None = None
        self.deferring = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first = self.requested is None
        self.requested = signal.Signals(number).name
        if not (first and self.deferring):
            raise KeyboardInterrupt(self.requested)
        _log.info("%s: writing a checkpoint after this step", self.requested)

    def agree(self, failed: bool = False) -> bool:
        """Exchange with the other processes what was requested, and whether a step `failed` in one."""
        number = signal.Signals[self.requested] if self.requested else 0
        any_failed, any_number = highest(failed, number)
        self.agreed = signal.Signals(int(any_number)).name if any_number else None
        return bool(any_failed)

    @contextmanager
    def installed(self) -> Iterator[Interruption]:
        """Handle the signals in the block, and put the handlers back that were there before."""
        if threading.current_thread() is not threading.main_thread():
            yield self  # only the main thread may set handlers
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(number, self._handle) for number in numbers]
        try:
            yield self
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Let the block end itself after the first signal."""
        self.deferring = True
        try:
            yield
        finally:
            self.deferring = False


@dataclass
class Run:
    """What `fit` shares between the stages of one run."""

    clip: ClipModel
    config: TrainSettings
    out: Path
    log: MetricsLog
    interruption: Interruption
    position: Position
    end_of_epoch: Callable[[Run, Stage], None]  # evaluation; may raise position.best_score
    checkpoint: Path | None = None
    pace: Pace | None = None  # of the stage
    callbacks: Callbacks = field(default_factory=Callbacks)
    ended: bool = False  # the stage, by a callback

    def save(self, stage: Stage | None) -> Path:
        """Write a checkpoint at the run's position; None: between two stages.

        It holds the whole class matrix and whole towers, so that any number of processes can resume from it.
        """
        heads: dict[str, Tensor] = stage.heads.state_dict() if stage else {}
        optimizer = whole_moments(stage.optimizer) if stage else {}
        heads, optimizer = change_rows(heads, optimizer, to_first)
        if stage:
            bring_back(stage.clip, self.clip)
        state = {
            **asdict(self.position),
            "model": self.clip.model.state_dict(),
            "heads": heads,
            "optimizer": optimizer,
        }
        self.checkpoint = save_checkpoint(self.out / "checkpoints", state)
        return self.checkpoint

    def log_epoch(self, stage: Stage, name: str, measured: dict[str, float]) -> None:
        """Log what was measured, called `name`, at the end of an epoch of `stage`."""
        place = {"epoch": self.position.epoch, "global_step": self.position.global_step}
        self.log.write({name: measured, "stage": stage.name, **place})

    def call_back(self, name: str, stage: Stage, **values: dict[str, float]) -> None:
        """Call the user's function `name` with `values`; it may end the stage.

        Of several processes the first one calls it, and tells the others.
        """
        if getattr(self.callbacks, name) is None:
            return
        position = self.position
        state = TrainState(
            out=self.out,
            stage=stage.name,
            epoch=position.epoch,
            epochs=stage.epochs,
            step=position.step,
            steps_per_epoch=stage.steps_per_epoch,
            global_step=position.global_step,
            **{
                key: MappingProxyType(dict(values.get(key, {})))
                for key in ("losses", "metrics", "before")
            },
        )
        if highest(is_first() and self.callbacks.ends_stage(name, state))[0]:
            self.ended = True
            _log.info(
                "%s returned True: the %s stage ends in epoch %d of %d, after step %d of %d",
                name, stage.name, position.epoch + 1, stage.epochs, position.step,
                stage.steps_per_epoch,
            )  # fmt: skip


def restore(state: dict[str, Any], stage: Stage) -> None:
    """Put optimizer and heads of a checkpoint back (the model is loaded before)."""
    try:
        if state["optimizer"]:
            heads, optimizer = change_rows(
                state["heads"], state["optimizer"], lambda rows: rows[rows_of(len(rows))].clone()
            )
            stage.heads.load_state_dict(heads)
            stage.optimizer.load_state_dict(own_moments(stage.optimizer, optimizer))
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"the checkpoint does not belong to this run's {stage.name} stage: {error}. Move it away "
            "to resume from the one before it, or train anew with overwrite=True"
        ) from error


def fit(run: Run, stage: Stage) -> None:
    """Run `stage` from `run.position` to its end, or until a callback or an interruption ends it.

    A checkpoint is written before the first step (so that there is always one to name), every
    `save_steps`, at every epoch's last step (before its evaluation), and on interruption.
    """
    position = run.position
    if position.epoch == 0 and position.step == 0:
        run.save(stage)
    _log.info(
        "%s stage: %d epochs of %d steps, %d samples a step",
        stage.name, stage.epochs, stage.steps_per_epoch, stage.samples_per_step,
    )  # fmt: skip
    run.pace = Pace(run.config.workers)
    run.ended = False
    while position.epoch < stage.epochs and not run.ended:
        with run.interruption.deferred():
            run_epoch(run, stage)
            run.save(stage)
        run.interruption.agree()
        if run.interruption.agreed:
            return
        run.end_of_epoch(run, stage)
        position.epoch, position.step = position.epoch + 1, 0


def run_epoch(run: Run, stage: Stage) -> None:
    """Run the steps of an epoch that `run.position` leaves; ends early if asked to."""
    position, config = run.position, run.config
    total = stage.epochs * stage.steps_per_epoch
    stage.train_mode()
    clock = time.perf_counter()
    bar = progress(
        total=stage.steps_per_epoch,
        initial=position.step,
        description=f"{stage.name} epoch {position.epoch + 1}/{stage.epochs}",
        unit="step",
    )
    batches = stage.steps(position.epoch, position.step)
    if run.pace is not None:
        left = total - position.epoch * stage.steps_per_epoch - position.step
        batches = run.pace.watched(batches, stage=stage.name, left=left)
    with bar:
        for micro_batches in batches:
            done = position.epoch * stage.steps_per_epoch + position.step
            share = cosine_with_warmup(
                done, warmup=stage.warmup, total=total, floor=config.lr_floor
            )
            for group in stage.optimizer.param_groups:
                group["lr"] = group["peak_lr"] * share
            values = optimizer_step(run, stage, micro_batches)
            position.step += 1
            position.global_step += 1
            for name, value in values.items():
                position.sums[name] = position.sums.get(name, 0.0) + value
            position.steps_in_sums += bool(values)
            bar.update()
            losses = {**values, "lr": stage.optimizer.param_groups[0]["lr"]} if values else {}
            run.call_back("on_step", stage, losses=losses)
            if (
                position.global_step % config.log_steps == 0
                or position.step == stage.steps_per_epoch
                or run.ended
            ):
                _log_line(run, stage, time.perf_counter() - clock)
                clock = time.perf_counter()
            if position.bad_steps_in_a_row >= MAX_BAD_STEPS_IN_A_ROW:
                raise TrainingDivergedError(
                    f"loss or gradient was not finite in {MAX_BAD_STEPS_IN_A_ROW} steps in a row (up "
                    f"to step {position.global_step}; {position.skipped_steps} skipped in all). The "
                    f"last good checkpoint is {run.checkpoint}. Lower lr, or train with "
                    "precision='fp32'."
                )
            if run.interruption.agreed or run.ended:
                return
            unfinished = position.step < stage.steps_per_epoch
            if unfinished and position.global_step % config.save_steps == 0:
                run.save(stage)


def optimizer_step(run: Run, stage: Stage, micro_batches: list[Any]) -> dict[str, float]:
    """One optimizer step; {} if it was skipped because loss or gradient was not finite."""
    statistics = running_statistics(run.clip.model)
    stage.optimizer.zero_grad(set_to_none=True)
    values = stage.backward(micro_batches)
    parameters = [
        p for group in stage.optimizer.param_groups for p in group["params"] if p.grad is not None
    ]
    in_heads = {id(p) for p in stage.heads.parameters()}
    heads = [p for p in parameters if id(p) in in_heads]
    tower = [p for p in parameters if id(p) not in in_heads]
    limit = run.config.grad_clip_norm or math.inf
    values["grad_norm"] = clip_gradients(tower, limit)
    if run.config.grad_clip_classes is not None:
        own = nn.utils.get_total_norm([p.grad for p in heads if p.grad is not None])
        norm = total(own.square()).sqrt()  # over the rows of all processes
        nn.utils.clip_grads_with_norm_(heads, run.config.grad_clip_classes, norm, foreach=True)
    for p in heads:
        values["loss"] = values["loss"] + 0 * p.grad.sum()  # not finite if the gradient is not
    read = torch.stack([value.float() for value in values.values()]).tolist()  # one synchronisation
    numbers = dict(zip(values, read, strict=True))
    failed = not all(map(math.isfinite, read))
    if not run.interruption.agree(failed):
        stage.optimizer.step()
        run.position.bad_steps_in_a_row = 0
        return numbers
    for buffer, before in statistics:
        buffer.copy_(before)
    run.position.skipped_steps += 1
    run.position.bad_steps_in_a_row += 1
    _log.warning(
        "step %d skipped: loss or gradient is not finite (%s)", run.position.global_step, numbers
    )
    return {}


@torch.no_grad()
def running_statistics(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Buffers that a forward pass in train mode changes (batch norm), with copies of them."""
    return [
        (buffer, buffer.clone())
        for layer in training_batch_norms(model)
        for buffer in layer.buffers(recurse=False)
    ]


def _log_line(run: Run, stage: Stage, seconds: float) -> None:
    position = run.position
    steps = max(1, position.steps_in_sums)
    record: dict[str, Any] = {
        "stage": stage.name,
        "epoch": position.epoch,
        "step": position.step,
        "global_step": position.global_step,
        **{name: value / steps for name, value in position.sums.items()},
        "lr": stage.optimizer.param_groups[0]["lr"],
        "skipped_steps": position.skipped_steps,
        "samples_per_second": steps * stage.samples_per_step / max(seconds, 1e-9),
        "system": system_values(run.clip.device),
    }
    run.log.write(record)
    if "loss" in record:
        parts = [f"{LOSS_WORDS[name]} {record[name]:.3f}" for name in record if name in LOSS_WORDS]
        _log.info(
            "%s stage, epoch %d of %d, step %d of %d: loss %.3f%s, gradient norm %.2f, learning rate "
            "%.1e, %.1f samples/s",
            stage.name, position.epoch + 1, stage.epochs, position.step, stage.steps_per_epoch,
            record["loss"], f" ({', '.join(parts)})" if len(parts) > 1 else "", record["grad_norm"],
            record["lr"], record["samples_per_second"],
        )  # fmt: skip
    position.sums.clear()
    position.steps_in_sums = 0
