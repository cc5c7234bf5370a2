"""What the machine can do at best, by torch alone: copies, and plain products of the goals' sizes.

It needs nothing that is compiled here, so `gpu_check.py` runs it while the package is built. Products
of a long matrix are made in parts of it, written to memory that is used again, as a fused kernel's
rivals do, and once whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from harness import Report, Rival, common_arguments, compare

PRODUCTS = (  # M, N, K, rows of N at a time
    (8192, 8192, 8192, 8192),
    (4096, 1_000_320, 768, 1_000_320),
    (4096, 1_000_320, 768, 65_536),
    (8192, 1_048_576, 768, 65_536),
    (2048, 1_048_576, 768, 65_536),
)
COPIED = 2 << 30  # bytes
INT8 = 8192  # rows, columns and depth


def main(words: Sequence[str] | None = None) -> None:
    parser = common_arguments(__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes")
    options = parser.parse_args(words)
    report = Report("ceilings", device=options.device, dtype="various", store=options.store)
    for case, run, work, unit in cases(options.device, options.smoke):
        timings = compare(
            [Rival("torch", run)],
            repetitions=options.repetitions,
            warmup=3,
            device=options.device,
            tolerant=True,
        )
        report.add(case, timings, work=work, unit=unit, accuracy="error")
    report.finish()


def cases(
    device: str, smoke: bool
) -> Iterator[tuple[dict[str, Any], Callable[[], Any], float, str]]:
    """What each is, a call of it, the work of one, and its unit."""
    size = 1 << 16 if smoke else COPIED
    yield {"what": "copy", "bytes": size}, copy(size, device), 2e-9 * size, "GB"  # read and written
    for m, n, k, part in ((64, 256, 32, 128),) if smoke else PRODUCTS:
        case = {"what": "bf16 product", "M": m, "N": n, "K": k, "part": part}
        yield case, bf16_product(m, n, k, part, device), 2e-12 * m * n * k, "TFLOP"
    size = 64 if smoke else INT8
    a, b = (
        torch.randint(-127, 128, (size, size), device=device, dtype=torch.int8) for _ in range(2)
    )
    case = {"what": "int8 product", "M": size, "N": size, "K": size}
    yield case, lambda: torch._int_mm(a, b.T), 2e-12 * size**3, "TOP"


def copy(size: int, device: str) -> Callable[[], Any]:
    source = torch.ones(size // 2, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def bf16_product(m: int, n: int, k: int, part: int, device: str) -> Callable[[], None]:
    a, b = (torch.randn(rows, k, device=device).bfloat16() for rows in (m, n))
    out = torch.empty(m * part, device=device, dtype=torch.bfloat16)

    def run() -> None:
        for block in b.split(part):
            torch.mm(a, block.T, out=out[: m * len(block)].view(m, len(block)))

    return run


if __name__ == "__main__":
    main()
