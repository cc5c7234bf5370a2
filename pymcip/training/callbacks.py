"""Functions of the user's that `pymcip.train` calls while it trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeAlias

import numpy as np

from pymcip.errors import ConfigError


@dataclass(frozen=True)
class TrainState:
    """Where a run is; what a callback is given. Nothing in it can be changed.

    Attributes:
        out: the run folder.
        stage: "image", or "text" for re-alignment.
        epoch: of the stage, from 0, as in `metrics.jsonl`.
        epochs: of the stage.
        step: steps that the epoch has done.
        steps_per_epoch: of the stage.
        global_step: steps that the run has done, in all stages.
        losses: loss, its parts, the gradient's norm and the learning rate (`loss`, …, `grad_norm`, `lr`)
            of the step in `on_step`, else {}; {} too where the step was skipped, as its loss was not finite.
        metrics: of the evaluation in `on_evaluation` and `on_epoch`, in percent; {} in `on_step`, and
            in a run that is not measured.
        before: the same of the untrained model.
    """

    out: Path
    stage: str
    epoch: int
    epochs: int
    step: int
    steps_per_epoch: int
    global_step: int
    losses: Mapping[str, float]
    metrics: Mapping[str, float]
    before: Mapping[str, float]


Callback: TypeAlias = Callable[[TrainState], "bool | None"]


@dataclass(frozen=True, kw_only=True)
class Callbacks:
    """Functions that `train` calls; each is given a `TrainState`.

    One that returns True ends the stage that is being trained. All that follows its last epoch
    follows then too: its evaluation, re-alignment if the method has it, the alignment budget, the
    export. An exception ends the run as it is, without an export; `resume="latest"` continues it
    from its last checkpoint. Of several processes (torchrun) each needs them, and the first one calls
    them for all.

    Attributes:
        on_step: after every step.
        on_evaluation: after the evaluation at an epoch's end.
        on_epoch: after that, at every epoch's end, also in a run that is not measured.

    Raises:
        ConfigError: one is not a function.
    """

    on_step: Callback | None = None
    on_evaluation: Callback | None = None
    on_epoch: Callback | None = None

    def __post_init__(self) -> None:
        given = {item.name: getattr(self, item.name) for item in fields(self)}
        problems = [
            f"{name}={value!r} is not allowed; allowed: a function of one pymcip.TrainState, or None"
            for name, value in given.items()
            if not (value is None or callable(value))
        ]
        if problems:
            raise ConfigError(problems)

    def ends_stage(self, name: str, state: TrainState) -> bool:
        """Call the function `name`, if there is one; return whether it ends the stage.

        Raises:
            ConfigError: it returned something else than True, False and None.
        """
        function: Callback | None = getattr(self, name)
        answer = None if function is None else function(state)
        if answer is None or isinstance(answer, (bool, np.bool_)):
            return bool(answer)
        raise ConfigError(
            f"{name} returned {answer!r:.60}; a callback returns True to end the stage, else False or None"
        )
