"""Whether a run has diverged: its weights are unusable, though no single step failed."""

from __future__ import annotations

import math

import torch
from torch import nn

from pymcip.errors import TrainingDivergedError
from pymcip.training.checkpoints import Position

MOST_GROWTH = 1000.0  # of a tensor's norm; training changes it by a few per cent

_ADVICE = "Nothing is exported. Train anew (overwrite=True) with a lower lr, or precision='fp32'"


@torch.no_grad()
def weight_norms(model: nn.Module) -> dict[str, float]:
    """The norm of each floating-point parameter; NaN or infinity where it is not finite."""
    return {
        name: float(torch.linalg.vector_norm(value, dtype=torch.float64))
        for name, value in model.named_parameters()
        if value.is_floating_point()
    }


def refuse_diverged(
    model: nn.Module, before: dict[str, float], position: Position | None = None
) -> None:
    """Raise TrainingDivergedError if the run has diverged.

    It has if a parameter is not finite or has a thousand times its norm before training (`before`,
    as `weight_norms` gives it; at least 1); or, with the `position` at the end, if most steps were
    skipped.
    """
    if position is not None and 2 * position.skipped_steps > position.global_step:
        raise TrainingDivergedError(
            f"{position.skipped_steps} of {position.global_step} steps were skipped, as loss or "
            f"gradient was not finite. {_ADVICE}"
        )
    for name, norm in weight_norms(model).items():
        if not math.isfinite(norm):
            raise TrainingDivergedError(f"the weights {name} are not finite. {_ADVICE}")
        if norm > MOST_GROWTH * max(1.0, before.get(name, 1.0)):
            raise TrainingDivergedError(
                f"the weights {name} have the norm {norm:.3g}; it was {before.get(name, 0.0):.3g} before "
                f"training. {_ADVICE}"
            )
