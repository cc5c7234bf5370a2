"""Weights between those before training and those after it: WiSE-FT (arXiv 2109.01903, eq. 1).

The weights at coefficient c are (1 - c) * original + c * tuned, of every parameter and of every
floating-point buffer (the statistics of batch norms). At 0 it is the original, at 1 the tuned one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


def interpolated(
    original: Mapping[str, Tensor], tuned: Mapping[str, Tensor], coefficient: float
) -> dict[str, Tensor]:
    """Weights between two state dicts of one architecture.

    Args:
        original: the state before training.
        tuned: the state after it: the same names, shapes, dtypes and devices.
        coefficient: 0 gives the original's bits, 1 the tuned model's.

    Returns:
        New tensors (at 0 and 1 the given ones). What training left as it was keeps its bits at every
        coefficient; tensors that aren't floating-point (counters, masks) are the tuned model's,
        but at 0.

    Raises:
        ValueError: the two hold different names.
    """
    if original.keys() != tuned.keys():
        names = sorted(original.keys() ^ tuned.keys())
        raise ValueError(f"{len(names)} names are in one state alone, such as {names[:3]}")
    if coefficient == 0:
        return dict(original)
    if coefficient == 1:
        return dict(tuned)
    return {
        name: torch.lerp(original[name], value, coefficient)
        if value.is_floating_point()
        else value.clone()
        for name, value in tuned.items()
    }


@dataclass(frozen=True)
class Search:
    """The coefficient that was found, what the model keeps there, and all that was measured.

    `tried` holds (coefficient, kept) in the order of measuring; `coefficient` is 0.0, where `kept`
    is 1 by definition, if none of them respected the bound.
    """

    coefficient: float
    kept: float
    tried: list[tuple[float, float]]


def largest_coefficient(
    kept: Callable[[float], float], least: float, *, evaluations: int = 8
) -> Search:
    """Search the largest coefficient at which the model keeps at least `least`.

    The tuned model (1) is tried first; then the interval between the largest coefficient known to
    respect the bound and the smallest above it that is known not to is halved. Where `kept` is not
    monotone a larger one may exist, but whatever is returned was measured and respects the bound.

    Args:
        kept: measures the model at a coefficient in (0, 1].
        least: the bound, in the same unit.
        evaluations: how often `kept` is called at most; 8 find the coefficient to 1/128.
    """
    tried: list[tuple[float, float]] = []
    low, low_kept, high = 0.0, 1.0, 1.0
    coefficient = 1.0
    for _ in range(evaluations):
        value = float(kept(coefficient))
        tried.append((coefficient, value))
        if value >= least:
            low, low_kept = coefficient, value
            if coefficient == 1:
                break
        else:
            high = coefficient
        coefficient = (low + high) / 2
    return Search(low, low_kept, tried)
