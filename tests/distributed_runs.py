"""What each of the processes of test_distributed.py does: torchrun … distributed_runs.py FOLDER.

FOLDER holds jobs.json, a list of jobs in order, and takes what is found of each: NUMBER-RANK.pt.
Started again after a kill, the processes leave out the jobs that are done.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import random
import runpy
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn

import pymcip
from pymcip.distributed import joined, rank, rows_of, share, world
from pymcip.losses import ArcMargin, MCArcMargin
from pymcip.model.towers import (
    image_parameters,
    text_parameters,
    unlock_image_tower,
    unlock_text_tower,
)
from pymcip.ops.arrays import MatrixParts
from pymcip.training import loop
from pymcip.training.replicas import gather, replicated, shard_of, to_first
from pymcip.training.sharding import bring_back, clip_gradients, divided, is_part, whole

training: Any = importlib.import_module("pymcip.training.train")  # the function has its name
ROWS, DIM, MICRO_BATCHES = 4, 8, 4
STARTED_BEFORE = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


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
    repelled = MCArcMargin(bank[own], **options, positives="compete", repel=0.1)
    columns = torch.unique(labels)  # as with negatives="batch"
    run = replicated(tower, tower)
    losses = []
    for turn, number in enumerate(share(MICRO_BATCHES)):
        together = [share(MICRO_BATCHES, of)[turn] for of in range(world())]
        features = gather(run(pixels[number], last=number == share(MICRO_BATCHES)[-1]))
        shown = labels[together].flatten()
        indptr = torch.arange(len(shown) + 1)
        loss = (
            head(features, shown).sum()
            + captions(features, indptr, shown, columns=columns).sum()
            + repelled(features, indptr, shown).sum()
        )
        (loss + captions(features, indptr, shown).sum()).backward()
        losses.append(loss.detach())
    return {
        "loss": torch.stack(losses).sum(),
        "tower": [p.grad for p in tower.parameters()],
        "matrix": to_first(head.weight.grad),
    }


def divided_step(model: str, part: Literal["image", "text"]) -> dict[str, Any]:
    """A step in fp64 of a tower that is divided among the processes: its norm and whole gradients.

    `held`: the share of its weights, gradients and moments that this process has.
    """
    clip = pymcip.load(model, device="cpu", precision="fp32")
    clip.model.double()
    if part == "image":
        unlock_image_tower(clip, projector="keep", unlock_layers=None)
    else:
        unlock_text_tower(clip, None)
    trained = divided(clip, SimpleNamespace(sharding="full"), part)
    generator = torch.Generator().manual_seed(0)
    shape = (MICRO_BATCHES, ROWS, clip.embed_dim)
    slopes = torch.randn(shape, generator=generator, dtype=torch.float64)
    shape = (MICRO_BATCHES, ROWS, 3, clip.image_size, clip.image_size)
    batches = torch.randn(shape, generator=generator, dtype=torch.float64)
    if part == "text":
        shape = (MICRO_BATCHES, ROWS, clip.context_length)
        batches = torch.randint(1, 1000, shape, generator=generator)
    run = replicated(getattr(trained.model, f"encode_{part}"), trained.model)
    for number in share(MICRO_BATCHES):
        features = run(batches[number], last=number == share(MICRO_BATCHES)[-1])
        (features * slopes[number]).sum().backward()
    named = {"image": image_parameters, "text": text_parameters}[part]
    parameters = dict(named(trained.model))
    norm = clip_gradients(list(parameters.values()), 1.0)
    gradients = {name: whole(p.grad).clone() for name, p in parameters.items()}
    optimizer = torch.optim.AdamW(parameters.values(), fused=True)
    optimizer.step()
    bring_back(trained, clip)
    kept = [x for p in parameters.values() for x in (p, p.grad, *optimizer.state[p].values())]
    own = sum(x.to_local().numel() if is_part(x) else x.numel() for x in kept)
    return {
        "norm": norm, "gradients": gradients, "held": own / sum(x.numel() for x in kept),
        "weights": clip.model.state_dict(),
    }  # fmt: skip


def train(
    options: dict[str, Any],
    disturb: str | None = None,
    at: int = 0,
    end: int = 0,
    killed_save: int | None = None,
    kills: int = 0,
    apart: str | None = None,
) -> dict[str, Any]:
    """A run; in its step `at` the last process `disturb`s: "nan", "SIGTERM" or "SIGKILL".

    `end`: the step after which a callback of the first process ends a stage.
    `killed_save`: a step at whose checkpoint process 0 is killed when half of it is written, after
    one restart; that half stays as OUT.half. `kills`: how often a random process is killed at a random
    moment, 1 to 9 steps after its start; OUT.kills has a line for each. `apart`: the captions of the last
    process.
    """
    if apart is not None and rank() == world() - 1:
        options["captions"] = apart
    calls = []
    ending = pymcip.Callbacks(on_step=lambda s: calls.append(s) or s.global_step == end)  # type: ignore[func-returns-value]
    inner, write = loop.optimizer_step, torch.save
    saving = threading.Event()
    chance = random.Random(STARTED_BEFORE)
    victim, left = chance.randrange(world()), chance.randint(1, 8)

    def kill(step: int) -> None:
        with Path(options["out"]).with_suffix(".kills").open("a") as lines:
            lines.write(f"process {rank()}, step {step}{', saving' * saving.is_set()}\n")
        os.kill(os.getpid(), signal.SIGKILL)

    def disturbed(run: Any, stage: Any, micro_batches: Any) -> dict[str, float]:
        nonlocal left
        left -= 1
        if kills > STARTED_BEFORE and rank() == victim and left == 0:
            step = run.position.global_step + 1
            threading.Timer(chance.uniform(0, 0.3), kill, [step]).start()
        here = rank() == world() - 1 and run.position.global_step + 1 == at
        if not here or STARTED_BEFORE:
            return inner(run, stage, micro_batches)
        if disturb == "nan":
            hook = stage.heads["classes"].weight.register_hook(lambda grad: grad * float("nan"))
            values = inner(run, stage, micro_batches)
            hook.remove()
            return values
        assert disturb is not None
        os.kill(os.getpid(), getattr(signal, disturb))
        return inner(run, stage, micro_batches)

    def cut_off(state: Any, handle: Any) -> None:
        whole = io.BytesIO()
        write(state, whole)
        content = whole.getvalue()
        now = STARTED_BEFORE == 1 and state.get("global_step", -1) == killed_save
        handle.write(content[: len(content) // (1 + now)])
        if now:
            handle.flush()
            os.link(handle.name, Path(options["out"]).with_suffix(".half"))
            os.kill(os.getpid(), signal.SIGKILL)

    weights: dict[str, Tensor] = {}
    last = loop.Run.save

    def saved(self: Any, stage: Any) -> Path:
        saving.set()
        path = last(self, stage)
        saving.clear()
        weights.update({k: v.clone() for k, v in self.clip.model.state_dict().items()})
        return path

    bank_rows: list[int] = []  # how many are read at a time

    class Counted(MatrixParts):
        def __getitem__(self, rows: Any) -> Any:
            found = super().__getitem__(rows)
            bank_rows.append(len(found))
            return found

    training.MatrixParts = Counted
    loop.optimizer_step, loop.Run.save, torch.save = disturbed, saved, cut_off
    try:
        result = pymcip.train(**options, callbacks=ending if end else None)
    except pymcip.errors.ConfigError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        loop.optimizer_step, loop.Run.save, torch.save = inner, last, write
        training.MatrixParts = MatrixParts
    return {
        "steps": result.steps, "skipped": result.skipped_steps, "interrupted": result.interrupted,
        "checkpoint": result.checkpoint.name, "weights": weights, "calls": len(calls),
        "bank_rows": bank_rows,
    }  # fmt: skip


def command(words: list[str]) -> dict[str, Any]:
    """`python -m pymcip` with these words."""
    sys.argv = ["pymcip", *words]
    try:
        runpy.run_module("pymcip", run_name="__main__")
    except SystemExit as end:
        return {"status": end.code}
    return {}


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    for number, job in enumerate(json.loads((folder / "jobs.json").read_text())):
        out = folder / f"{number}-{rank()}.pt"
        if out.exists():
            continue
        if "classes" in job or "part" in job:
            with joined("cpu"):
                found = gradients(**job) if "classes" in job else divided_step(**job)
        else:
            found = command(**job) if "words" in job else train(**job)
        torch.save(found, out)


if __name__ == "__main__":
    main()
