"""What each of the processes of test_distributed.py does: torchrun … distributed_runs.py FOLDER.

FOLDER holds jobs.json, a list of jobs in order, and takes what is found of each: NUMBER-RANK.pt.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pymcip
from pymcip.distributed import joined, rank, rows_of, share, world
from pymcip.losses import ArcMargin, MCArcMargin
from pymcip.training import loop
from pymcip.training.replicas import gather, replicated, shard_of, to_first

ROWS, DIM, MICRO_BATCHES = 4, 8, 4


def gradients(classes: int) -> dict[str, Any]:
    """A step in fp64 of a small tower, a class matrix and a bank: losses and unclipped gradients."""
    generator = torch.Generator().manual_seed(0)
    tower = nn.Sequential(nn.Linear(6, DIM), nn.Tanh(), nn.Linear(DIM, DIM)).double()
    matrix, bank = torch.randn(2, classes, DIM, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        for p in tower.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    pixels = torch.randn(MICRO_BATCHES, ROWS, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, classes, (MICRO_BATCHES, ROWS), generator=generator)
    own = rows_of(classes)
    options = {"shard": shard_of(own), "backend": "torch", "compute": "float64"}
    head = ArcMargin(own.stop - own.start, DIM, **options).double()
    with torch.no_grad():
        head.weight.copy_(matrix[own])
    captions = MCArcMargin(bank[own], **options)
    columns = torch.unique(labels)  # as with negatives="batch"
    run = replicated(tower, tower)
    losses = []
    for turn, number in enumerate(share(MICRO_BATCHES)):
        together = [share(MICRO_BATCHES, of)[turn] for of in range(world())]
        features = gather(run(pixels[number], last=number == share(MICRO_BATCHES)[-1]))
        shown = labels[together].flatten()
        indptr = torch.arange(len(shown) + 1)
        loss = (
            head(features, shown).sum() + captions(features, indptr, shown, columns=columns).sum()
        )
        (loss + captions(features, indptr, shown).sum()).backward()
        losses.append(loss.detach())
    return {
        "loss": torch.stack(losses).sum(),
        "tower": [p.grad for p in tower.parameters()],
        "matrix": to_first(head.weight.grad),
    }


def train(
    options: dict[str, Any], disturb: str | None = None, at: int = 0, end: int = 0
) -> dict[str, Any]:
    """A run; in its step `at` the last process `disturb`s: "nan", "SIGTERM" or "SIGKILL".

    `end`: the step after which a callback of the first process ends a stage.
    """
    calls = []
    ending = pymcip.Callbacks(on_step=lambda s: calls.append(s) or s.global_step == end)  # type: ignore[func-returns-value]
    inner = loop.optimizer_step

    def disturbed(run: Any, stage: Any, micro_batches: Any) -> dict[str, float]:
        here = rank() == world() - 1 and run.position.global_step + 1 == at
        if not here or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
            return inner(run, stage, micro_batches)
        if disturb == "nan":
            hook = stage.heads["classes"].weight.register_hook(lambda grad: grad * float("nan"))
            values = inner(run, stage, micro_batches)
            hook.remove()
            return values
        assert disturb is not None
        os.kill(os.getpid(), getattr(signal, disturb))
        return inner(run, stage, micro_batches)

    weights: dict[str, Tensor] = {}
    last = loop.Run.save

    def saved(self: Any, stage: Any) -> Path:
        weights.update({k: v.clone() for k, v in self.clip.model.state_dict().items()})
        return last(self, stage)

    loop.optimizer_step, loop.Run.save = disturbed, saved
    try:
        result = pymcip.train(**options, callbacks=ending if end else None)
    except pymcip.errors.PymcipError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        loop.optimizer_step, loop.Run.save = inner, last
    return {
        "steps": result.steps, "skipped": result.skipped_steps, "interrupted": result.interrupted,
        "checkpoint": result.checkpoint.name, "weights": weights, "calls": len(calls),
    }  # fmt: skip


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    for number, job in enumerate(json.loads((folder / "jobs.json").read_text())):
        if "classes" in job:
            with joined("cpu"):
                found = gradients(**job)
        else:
            found = train(**job)
        torch.save(found, folder / f"{number}-{rank()}.pt")


if __name__ == "__main__":
    main()
