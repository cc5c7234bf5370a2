"""Ops with several back ends: contracts in each op's module, back ends in `dispatch`."""

from pymcip.ops.approximate import ApproximateIndex, ApproximateResult
from pymcip.ops.dispatch import backends, explain
from pymcip.ops.margin_softmax import margin_softmax
from pymcip.ops.ordering import order_bank
from pymcip.ops.packed_bank import PackedBank
from pymcip.ops.ranks import ranks
from pymcip.ops.topk import topk

__all__ = [
    "ApproximateIndex",
    "ApproximateResult",
    "PackedBank",
    "backends",
    "explain",
    "margin_softmax",
    "order_bank",
    "ranks",
    "topk",
]
