"""LoRA (arXiv 2106.09685) on the image tower: a weight W becomes W0 + B A, and only A, B train.

The module keeps its plain weights. After each optimizer step they are set to W0 + B A, and the
gradients of A and B come from the weight's own by the chain rule: dA = B^T dW, dB = dW A^T. So
evaluation, checkpoints and exports see an ordinary model, and there is nothing to merge.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from pymcip.errors import ConfigError
from pymcip.training.sampling import random_generator

STREAM = 10  # of `random_generator`


def adapted_weights(tower: nn.Module) -> Iterator[str]:
    """Names of the unlocked weights that LoRA goes to: matrices, and undivided convolutions'."""
    for name, module in tower.named_modules():
        prefix = f"{name}." if name else ""
        plain = isinstance(module, nn.Linear) or (
            isinstance(module, nn.Conv2d) and module.groups == 1
        )
        if plain and module.weight.requires_grad:
            yield f"{prefix}weight"
        if isinstance(module, nn.MultiheadAttention):
            weights = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
            for weight in weights:
                parameter = getattr(module, weight, None)
                if parameter is not None and parameter.requires_grad:
                    yield f"{prefix}{weight}"


class LowRank(nn.Module):
    """The pairs A [r, fan_in], B [fan_out, r] of a tower; its other parameters are locked.

    A starts as N(0, 1 / fan_in), B as 0, so the tower starts as it is in `original`. The rank of a
    small weight is at most its smaller side. A and B are buffers: to the trainer, whose clipping
    tells heads from tower, they are the tower.

    Args:
        tower: the image tower; what is locked in it gets no pair.
        original: the same tower as it was before any training, W0.
        rank: r.
        seed: of A.

    Raises:
        ConfigError: the tower has no such weight that is not locked.
    """

    def __init__(self, tower: nn.Module, original: nn.Module, rank: int, seed: int) -> None:
        super().__init__()
        self.names = list(adapted_weights(tower))
        if not self.names:
            raise ConfigError(
                f"lora_rank={rank}: the part of the image tower that is trained has no matrix or "
                "convolution to adapt; give lora_rank=0, or unlock more of it"
            )
        parameters, starts = dict(tower.named_parameters()), dict(original.named_parameters())
        self.weights = [parameters[name] for name in self.names]
        self.starts = [starts[name].detach() for name in self.names]
        generator = random_generator(seed, STREAM)
        for index, weight in enumerate(self.weights):
            rows, columns = weight.shape[0], weight[0].numel()
            inner = min(rank, rows, columns)
            down = generator.standard_normal((inner, columns), dtype=np.float32) * columns**-0.5
            tensors = {"down": torch.from_numpy(down), "up": torch.zeros(rows, inner)}
            for name, value in tensors.items():
                self.register_buffer(
                    f"{name}_{index}", value.to(weight.device, weight.dtype).requires_grad_()
                )
        for parameter in tower.parameters():
            parameter.requires_grad_(False)
        for weight in self.weights:
            weight.requires_grad_(True)

    def pair(self, index: int) -> tuple[Tensor, Tensor]:
        """Return A and B of weight `names[index]`."""
        return self.get_buffer(f"down_{index}"), self.get_buffer(f"up_{index}")

    def named_factors(self) -> Iterator[tuple[str, Tensor]]:
        """All A and B, each under the name of its weight."""
        for index, name in enumerate(self.names):
            for factor in self.pair(index):
                yield name, factor

    @torch.no_grad()
    def take_gradients(self) -> None:
        """Move the weights' gradients to A and B; to be called once, when a step's are summed."""
        for index, weight in enumerate(self.weights):
            if weight.grad is None:
                continue
            down, up = self.pair(index)
            slope = weight.grad.reshape(len(weight), -1)
            down.grad, up.grad = up.T @ slope, slope @ down.T
            weight.grad = None

    @torch.no_grad()
    def write(self) -> None:
        """Set the tower's weights to W0 + B A."""
        for index, (weight, start) in enumerate(zip(self.weights, self.starts, strict=True)):
            down, up = self.pair(index)
            weight.copy_(start + (up @ down).view(start.shape))
