"""Faster depthwise convolutions under bf16 autocast on the CPU.

torch computes the weight gradient of a bf16 depthwise convolution on the CPU several times more
slowly than in fp32, and it dominates the training step of networks such as EfficientNet
(`bench/bench_depthwise.py`). Forward and input gradient stay in bf16, as autocast has them; the
weight gradient alone is computed in fp32, from the same bf16 values: it only gains precision.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn


class _DepthwiseConv2d(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, options: tuple[Any, ...]
    ) -> Tensor:
        x, weight = x.to(torch.bfloat16), weight.to(torch.bfloat16)
        ctx.save_for_backward(x, weight)
        ctx.options = options
        return torch.nn.functional.conv2d(x, weight, None, *options)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (x, weight) = grad_outputs, ctx.saved_tensors
        stride, padding, dilation, groups = ctx.options

        def gradients(dtype: torch.dtype, wanted: tuple[bool, bool, bool]) -> Any:
            return torch.ops.aten.convolution_backward(
                grad.to(dtype), x.to(dtype), weight.to(dtype), None, stride, padding, dilation,
                False, (0, 0), groups, wanted,
            )  # fmt: skip

        need_x, need_weight, _ = ctx.needs_input_grad
        return (
            gradients(torch.bfloat16, (True, False, False))[0] if need_x else None,
            gradients(torch.float32, (False, True, False))[1] if need_weight else None,
            None,
        )


def _forward(layer: nn.Conv2d, x: Tensor) -> Tensor:
    if not (
        torch.is_autocast_enabled("cpu") and torch.is_grad_enabled() and x.device.type == "cpu"
    ):
        return type(layer).forward(layer, x)
    options = (layer.stride, layer.padding, layer.dilation, layer.groups)
    result: Tensor = _DepthwiseConv2d.apply(x, layer.weight, options)  # type: ignore[no-untyped-call]
    return result


def speed_up_depthwise(model: nn.Module) -> int:
    """Let a model's plain depthwise convolutions take their weight gradient in fp32, in place.

    Parameters, state dict and evaluation stay as they are. Layers with a bias or with padding given
    by name are left as they are.

    Returns:
        The number of layers changed.
    """
    layers = [
        layer
        for layer in model.modules()
        if type(layer) is nn.Conv2d
        and layer.groups == layer.in_channels > 1
        and layer.bias is None
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
    ]
    for layer in layers:
        layer.forward = types.MethodType(_forward, layer)  # type: ignore[method-assign]
    return len(layers)
