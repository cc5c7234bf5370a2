from collections.abc import Callable
from typing import TypeAlias

# address, dtype, rows, columns, row stride, column stride (strides in elements)
_Matrix: TypeAlias = tuple[int, str, int, int, int, int]

def topk(
    queries: _Matrix,
    bank: _Matrix,
    k: int,
    threshold: float,
    threads: int,
    kernel: str,
    ids: int,
    scores: int,
    progress: Callable[[int, int], object] | None = None,
) -> None: ...
def topk_kernels() -> list[str]: ...
def build_info() -> dict[str, str | None]: ...
def cuda_info() -> dict[str, object] | None: ...
