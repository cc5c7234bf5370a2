"""One launch of each big kernel, after one that compiles and tunes: for ncu.

ncu --profile-from-start off --clock-control none python bench/gpu_profile.py margin
"""

from __future__ import annotations

import argparse

import torch

from pymcip.ops import topk
from pymcip.ops.margin_softmax import margin_softmax


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("op", choices=("topk", "margin"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--rows", type=int, help="default: 8192 queries, 4096 rows of X")
    parser.add_argument("--columns", type=int, default=131_072)
    parser.add_argument("--dims", type=int, default=768)
    options = parser.parse_args()
    run = run_topk if options.op == "topk" else run_margin
    run(options)
    if options.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
    run(options)
    if options.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def run_topk(options: argparse.Namespace) -> None:
    """By the exact search's screen and by the one in half precision."""
    shapes = ((options.rows or 8192, options.dims), (options.columns, options.dims))
    queries, bank = (torch.randn(shape, device=options.device).bfloat16() for shape in shapes)
    for exact in (True, False):
        topk(queries, bank, 10, exact=exact)


def run_margin(options: argparse.Namespace) -> None:
    """Trainable columns, then a frozen bank."""
    rows, columns, device = options.rows or 4096, options.columns, options.device
    x = torch.randn(rows, options.dims, device=device, requires_grad=True)
    w = torch.randn(columns, options.dims, device=device, requires_grad=True)
    bank = w.detach().bfloat16()
    indptr = torch.arange(rows + 1, device=device)
    indices = torch.randint(columns, (rows,), device=device)
    for matrix, norms in ((w, None), (bank, bank.float().norm(dim=1))):
        loss = margin_softmax(
            x, matrix, indptr, indices, w_norms=norms, scale=30.0, margin=0.3, scratch=2 << 30
        )
        loss.sum().backward()


if __name__ == "__main__":
    main()
