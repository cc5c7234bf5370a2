"""A running average of weights (Polyak averaging), kept beside the ones that are trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class RunningAverage:
    """Exponential average of a module's trained parameters and floating-point buffers.

    After update k (from 0) it is decay_k * average + (1 - decay_k) * now, with
    decay_k = min(decay, (1 + k) / (10 + k)): the start, which is soon far away, is forgotten fast.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self._tensors: dict[str, Tensor] = {
            name: tensor.detach()
            for name, tensor in [*module.named_parameters(), *module.named_buffers()]
            if tensor.is_floating_point()
            and (tensor.requires_grad or not isinstance(tensor, nn.Parameter))
        }
        self._average = {name: tensor.clone() for name, tensor in self._tensors.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now, after an optimizer step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(
            list(self._average.values()), list(self._tensors.values()), weight=1 - decay
        )
        self.updates += 1

    @torch.no_grad()
    def store(self) -> None:
        """Give the module the average for good."""
        for name, tensor in self._tensors.items():
            tensor.copy_(self._average[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the module have the average inside the block, and its own weights again after it."""
        own = {name: tensor.clone() for name, tensor in self._tensors.items()}
        self.store()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, tensor in self._tensors.items():
                    tensor.copy_(own[name])

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds; the tensors are the average's own, not copies."""
        return {"average": self._average, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's average.

        Raises:
            KeyError, RuntimeError: it is of another module, or holds none.
        """
        if state["average"].keys() != self._average.keys():
            raise KeyError("the running average is of other weights")
        for name, value in state["average"].items():
            self._average[name].copy_(value)
        self.updates = state["updates"]
