from collections.abc import Callable
from typing import TypeAlias

# address, dtype, rows, columns, row stride, column stride (strides in elements)
_Matrix: TypeAlias = tuple[int, str, int, int, int, int]

# addresses of codes, groups and sums
_Packed: TypeAlias = tuple[int, ...]

def topk(
    queries: _Matrix,
    bank: list[tuple[_Matrix, _Packed | None]],
    k: int,
    threshold: float,
    exact: bool,
    threads: int,
    kernel: str,
    ids: int,
    scores: int,
    progress: Callable[[int, int], object] | None = None,
) -> tuple[str, int] | None: ...
def topk_pack(
    rows: _Matrix,
    codes: int,
    groups: int,
    sums: int,
    threads: int,
    kernel: str,
    progress: Callable[[int, int], object] | None = None,
) -> tuple[str, int] | None: ...
def topk_scores(queries: _Matrix, bank: _Matrix, ids: int, count: int, scores: int) -> None: ...
def ranks_count(
    products: int,
    stride: int,
    queries: _Matrix,
    bank: _Matrix,
    first: int,
    starts: int,
    ids: int,
    scores: int,
    above: int,
    below: int,
    counts: int,
    threads: int,
) -> None: ...
def topk_pass(columns: int, k: int) -> int: ...
def topk_kernels() -> list[str]: ...
def build_info() -> dict[str, str | None]: ...
def cuda_info() -> dict[str, object] | None: ...
