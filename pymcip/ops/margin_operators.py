"""The torch operators through which `margin_softmax` calls its back ends, and finds farthest columns.

To torch they are opaque, so that torch.compile keeps them whole. They make all tensors dense, keep
autocast away, and load the back end that they are given by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from pymcip.ops.dispatch import backends
from pymcip.ops.margin_contract import Coefficients, Problem
from pymcip.ops.margin_softmax_torch import farthest

_PROBLEM = (
    "Tensor x, Tensor w, Tensor? w_norms, Tensor indptr, Tensor indices, Tensor rows, "
    "float scale, ScalarType dtype, int chunk, int scratch"
)
_FIELDS = 10  # the arguments above are Problem's fields, in order


def _dense(value: Any) -> Any:
    """A tensor that is dense and row-major, with the strides that go with it; else as it is."""
    if not isinstance(value, Tensor):
        return value
    # The view: `contiguous` leaves the stride of a dimension of length 1 as it was.
    return value.contiguous().view(-1).view(value.shape)


def _load(backend: str) -> Any:
    (row,) = (row for row in backends("margin_softmax") if row.name == backend)
    return row.load()


@contextmanager
def _alone_on(device: torch.device) -> Iterator[None]:
    """Switch autocast off, and make the tensors' GPU the current one."""
    with torch.autocast(device.type, enabled=False), ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        yield


@torch.library.custom_op(
    "pymcip::margin_softmax_sums",
    mutates_args=(),
    schema=f"({_PROBLEM}, str backend, bool need_x, bool need_w, bool need_shares)"
    " -> (Tensor, Tensor, Tensor, Tensor[])",
)
def _sums(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    problem = Problem(*map(_dense, arguments[:_FIELDS]))
    backend, *needs = arguments[_FIELDS:]
    with _alone_on(problem.x.device):
        result = _load(backend).sums(problem, *needs)
    return result.log_z, result.cosine, result.shares, result.kept


@_sums.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    problem, (backend, *needs) = Problem(*arguments[:_FIELDS]), arguments[_FIELDS:]
    x, (count, _) = problem.x, problem.x.shape
    kept = _load(backend).kept(problem, *needs)
    return (
        x.new_empty(count),
        x.new_empty(problem.indices.shape),
        x.new_empty(count, problem.cells if needs[-1] else 0),
        [x.new_empty(shape, dtype=dtype) for shape, dtype in kept],
    )


@torch.library.custom_op(
    "pymcip::margin_softmax_gradients",
    mutates_args=(),
    schema=f"({_PROBLEM}, str backend, Tensor log_z, Tensor negative, Tensor positive,"
    " Tensor? active, Tensor[] kept, bool need_x, bool need_w) -> (Tensor, Tensor)",
)
def _gradients(*arguments: Any) -> tuple[Tensor, Tensor]:
    problem = Problem(*map(_dense, arguments[:_FIELDS]))
    backend, *coefficients, kept, need_x, need_w = arguments[_FIELDS:]
    with _alone_on(problem.x.device):
        grad_x, grad_w = _load(backend).gradients(
            problem, Coefficients(*map(_dense, coefficients)), kept, need_x, need_w
        )
    return grad_x, grad_w


@_gradients.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    x, w, (need_x, need_w) = *arguments[:2], arguments[-2:]
    return (x.new_empty(x.shape if need_x else 0), w.new_empty(w.shape if need_w else 0))


@torch.library.custom_op(
    "pymcip::margin_softmax_farthest", mutates_args=(), schema=f"({_PROBLEM}) -> Tensor"
)
def _farthest(*arguments: Any) -> Tensor:
    problem = Problem(*map(_dense, arguments))
    with _alone_on(problem.x.device):
        return farthest(problem)


@_farthest.register_fake
def _(*arguments: Any) -> Tensor:
    return torch.empty_like(Problem(*arguments).indptr[1:])


SUMS = torch.ops.pymcip.margin_softmax_sums
GRADIENTS = torch.ops.pymcip.margin_softmax_gradients
FARTHEST = torch.ops.pymcip.margin_softmax_farthest
