"""Ranks on the CPU: torch's fp32 products, counted in C++ (csrc/ranks.hpp)."""

from __future__ import annotations

from torch import Tensor

from pymcip.ops.arrays import Array, matrix_pointer, torch_threads
from pymcip.ops.ranks_torch import Asked, over_blocks


def ranks_cpu(
    queries: Array, bank: Array, starts: Tensor, ids: Tensor, longest: float, *, threads: int
) -> Tensor:
    """Ranks int64 [P], as `ranks_torch` gives them; while it runs, torch uses `threads`, too."""
    from pymcip import _core

    def count(
        products: Tensor, block: Tensor, rows: Tensor, start: int, first: int, asked: Asked
    ) -> None:
        left, left_owner = matrix_pointer(block)
        right, right_owner = matrix_pointer(rows)
        _core.ranks_count(
            products.data_ptr(),
            products.stride(0),
            left,
            right,
            start,
            asked.starts.data_ptr() + first * asked.starts.element_size(),
            asked.ids.data_ptr(),
            asked.scores.data_ptr(),
            asked.above.data_ptr(),
            asked.below.data_ptr(),
            asked.counts.data_ptr(),
            threads,
        )
        del left_owner, right_owner  # what the addresses point into

    with torch_threads(threads):
        return over_blocks(queries, bank, starts.contiguous(), ids, longest, count)
