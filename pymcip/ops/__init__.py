"""The compute kernels that the rest is built on: exact top-k, ranks and margin losses.

Each op is one public function whose module states its contract; its back ends (C++, CUDA, Triton,
torch) are listed in `pymcip.ops.dispatch`.
"""

from pymcip.ops.approximate import ApproximateIndex
from pymcip.ops.dispatch import backends, explain
from pymcip.ops.margin_softmax import margin_softmax
from pymcip.ops.ordering import order_bank
from pymcip.ops.packed_bank import PackedBank
from pymcip.ops.ranks import ranks
from pymcip.ops.recall import ApproximateResult
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
