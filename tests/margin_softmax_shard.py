"""One of the two processes of test_margin_softmax_shards.py: a shard of a problem's columns.

python tests/margin_softmax_shard.py RANK PORT OUT OPTIONS    options: a list, results of each
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch import Tensor, distributed

from pymcip.ops.margin_softmax import Shard, margin_softmax_filtered

ROWS, COLUMNS, DIM, CUT = 9, 700, 16, 300  # the first shard holds columns 0 … 299


def problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row 2 has no positive, row 3 one in each shard, row 4 all of the first shard.

    The farthest columns of row 8 are one in each shard, of equal cosines.
    """
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(ROWS, DIM, generator=generator, dtype=torch.float64)
    w = torch.randn(COLUMNS, DIM, generator=generator, dtype=torch.float64)
    axes = torch.eye(DIM, dtype=torch.float64)
    x[8] = axes[0]
    w[10] = w[500] = axes[1] - 3 * axes[0]
    own = [[5], [650, 3], [], [299, 300], list(range(CUT)), *([i, 400 + i] for i in range(4))]
    indptr = torch.tensor([0, *map(len, own)]).cumsum(0)
    return x, w, indptr, torch.tensor([column for row in own for column in row])


def run(x: Tensor, w: Tensor, *positives: Tensor, **options: Any) -> list[Tensor]:
    """Loss, dX, dW, and the mass that the filter dropped; each row's loss weighs differently."""
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    loss, skipped = margin_softmax_filtered(x, w, *positives, scale=20.0, margin=0.3, **options)
    (loss * torch.arange(1, 1 + len(loss))).sum().backward()
    assert x.grad is not None
    assert w.grad is not None
    return [loss.detach(), x.grad, w.grad, skipped.mass]


def main() -> None:
    rank, port, out, ways = int(sys.argv[1]), *sys.argv[2:4], json.loads(sys.argv[4])
    torch.set_num_threads(1)
    x, w, *positives = problem()
    distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    part = slice(0, CUT) if rank == 0 else slice(CUT, COLUMNS)
    shard = Shard(part.start)
    torch.save([run(x, w[part], *positives, shard=shard, **options) for options in ways], out)
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
