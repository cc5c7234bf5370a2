"""Optimizer, weight-decay groups and learning-rate schedule, as open_clip's trainer has them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from pymcip.config import TrainConfig


def parameter_groups(
    named: Iterable[tuple[str, Tensor]],
    *,
    lr: float,
    wd: float,
    depths: Mapping[str, int] | None = None,
    decay: float = 1.0,
) -> list[dict[str, object]]:
    """AdamW groups: no weight decay on vectors, scalars, norms and biases (open_clip's rule).

    Two groups; or two for each depth, the deepest (nearest to the output) first, where `depths` tells
    every parameter's (from `towers.layer_depths`): the learning rate at depth d of 0 … top is
    lr * decay^(top - d), top being the largest in `depths` whether it is trained or not.
    """
    top = max(depths.values(), default=0) if depths else 0
    sorted_out: dict[tuple[int, bool], list[Tensor]] = {}
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        exempt = parameter.ndim < 2 or any(word in name for word in ("bn", "ln", "bias"))
        below = top - depths[name] if depths else 0
        key = below, not (exempt or "logit_scale" in name)
        sorted_out.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": wd if decayed else 0.0,
            "peak_lr": lr * decay**below,
        }
        for (below, decayed), parameters in sorted(sorted_out.items(), key=lambda item: item[0])
    ]


def make_optimizer(groups: list[dict[str, object]], config: TrainConfig) -> torch.optim.AdamW:
    """Fused AdamW; each group's rate is set before every step from its `peak_lr`."""
    return torch.optim.AdamW(
        groups, lr=0.0, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
    )


def cosine_with_warmup(step: int, *, warmup: int, total: int) -> float:
    """Share of the peak learning rate at optimizer step `step` (0-based) of `total`.

    Linear from 1/warmup to 1, then a half cosine to 0. A warm-up longer than half of the run is cut
    to half of it, so that short runs reach their peak.
    """
    warmup = min(warmup, total // 2)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
