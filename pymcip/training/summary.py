"""What the log of a run says at its start and at its end."""

from __future__ import annotations

import logging
import shlex
from datetime import timedelta

from pymcip.configs import TrainSettings
from pymcip.distributed import world
from pymcip.evaluation.report import REPORT
from pymcip.model import ClipModel
from pymcip.training.inputs import Inputs
from pymcip.training.result import TrainResult

_log = logging.getLogger("pymcip.training")


def log_start(
    config: TrainSettings, reasons: dict[str, str], clip: ClipModel, inputs: Inputs
) -> None:
    """Log the model, the data and the settings of a run, and which of them were chosen for it."""
    _log.info(
        "run %s: method %s, model %s on %s, precision %s",
        config.out, config.method, config.model, clip.device, clip.precision,
    )  # fmt: skip
    captions = f"; {len(inputs.captions):,} captions" if inputs.captions is not None else ""
    _log.info(
        "training data: %s images of %s classes%s",
        f"{len(inputs.images):,}", f"{inputs.images.num_classes:,}", captions,
    )  # fmt: skip
    if inputs.captions is not None and "captions" in config.unused:
        _log.warning(
            "captions= is given, and method=%r does not use it; mcip, mcip+ and re-alignment do",
            config.method,
        )
    if world() > 1:
        each = config.accum_freq // world()
        _log.info(
            "%d processes, each with %d of a step's %d micro-batches; the global batch is %d images",
            world(), each, config.accum_freq, config.accum_freq * config.batch_size,
        )  # fmt: skip
        if config.sharding == "full":
            _log.info("the tower in training is divided among the processes (sharding='full')")
    inputs.log_what_is_measured(config.holdout)
    for name, reason in reasons.items():
        _log.info("%s: %s (%s)", name, getattr(config, name), reason)


def log_end(result: TrainResult, config: TrainSettings) -> None:
    """Log where the weights of a run lie, and what to do next."""
    took, skipped = timedelta(seconds=round(result.seconds)), result.skipped_steps
    why = f"; {skipped} of them skipped, because loss or gradient was not finite" if skipped else ""
    _log.info("%d steps in %s%s", result.steps, took, why)
    if result.interrupted:
        _log.info(
            "interrupted by %s; checkpoint: %s. To continue: the same command with --resume latest",
            result.interrupted, result.checkpoint,
        )  # fmt: skip
    else:
        _log.info("the report of the run, for a browser: %s", result.out / REPORT)
    if result.hub is not None:
        _log.info("the weights for open_clip: local-dir:%s", result.hub)
        _log.info("to compare on images of your own: %s", evaluate_command(result, config))


def evaluate_command(result: TrainResult, config: TrainSettings) -> str:
    """The command that measures a run beside the model that it started from.

    DATA stands for labelled images, unless the run has `val_data`.
    """
    words = ["pymcip", "evaluate", "--model", str(result.out), "--baseline", config.model]
    if config.pretrained is not None:
        words += ["--baseline-pretrained", config.pretrained]
    data = config.val_data if config.val_data is not None else "DATA"
    words += ["--data", *map(str, data if isinstance(data, tuple) else (data,))]
    if config.columns and config.val_data is not None:
        words += ["--columns", *(f"{role}={name}" for role, name in config.columns.items())]
    return shlex.join(words)
