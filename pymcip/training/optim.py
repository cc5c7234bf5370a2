"""Optimizer, weight-decay groups and learning-rate schedule, as open_clip's trainer has them."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from pymcip.configs import TrainConfig


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], *, lr: float, wd: float, exempt: bool = True
) -> list[dict[str, object]]:
    """Two AdamW groups: with `exempt`, no weight decay on vectors, norms and biases (open_clip's rule)."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        small = parameter.ndim < 2 or any(word in name for word in ("bn", "ln", "bias"))
        (plain if exempt and (small or "logit_scale" in name) else decayed).append(parameter)
    groups: list[dict[str, object]] = [
        {"params": plain, "weight_decay": 0.0, "peak_lr": lr},
        {"params": decayed, "weight_decay": wd, "peak_lr": lr},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(groups: list[dict[str, object]], config: TrainConfig) -> torch.optim.AdamW:
    """Fused AdamW; each group's learning rate is set before every step from its `peak_lr`."""
    return torch.optim.AdamW(
        groups, lr=0.0, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
    )


def cosine_with_warmup(step: int, *, warmup: int, total: int, floor: float = 0.0) -> float:
    """Share of the peak learning rate at optimizer step `step` (0-based) of `total`.

    Linear from 1/warmup to 1, then a half cosine to `floor`. A warm-up longer than half of the run is cut
    to half of it, so that short runs reach their peak.
    """
    warmup = min(warmup, total // 2)
    if step < warmup:
        return (step + 1) / warmup
    share = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
    return floor + (1 - floor) * share
