"""Steps per second of `pymcip train`, and the bytes that a process sends in one, at W = 1, 2, 4.

A small ViT with random weights on generated pictures, method mcip: the image tower, a class matrix and
a bank of captions; gloo, a thread per process. What is sent is what the process writes within a step
(/proc/self/io). Beside it the same by arithmetic, which `sent` gives for large runs, too; and how far the
losses of the steps are from those of the first W.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import safetensors.torch
import torch
from harness import Report
from PIL import Image

import pymcip
from pymcip.distributed import rank, world
from pymcip.training import loop

STEPS, UNTIMED = 8, 3
BATCH, MICRO_BATCHES, CLASSES, CAPTIONS = 16, 4, 32, 2000
SIDE, DIM = 64, 128
MODEL = {
    "embed_dim": DIM,
    "vision_cfg": {"image_size": SIDE, "layers": 4, "width": 192, "head_width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1},
}  # fmt: skip
NOTE = "2 cores shared with other work, so times are rough; bytes are exact"
LARGE: dict[str, int] = {"batch": 4096, "dim": 768, "parameters": 304_000_000}  # ViT-L-14-336


def sent(processes: int, *, batch: int, dim: int, parameters: int) -> dict[str, float]:
    """Bytes that one of W processes sends in a step, by rings; `batch` is the global one.

    Features are gathered; summed are their gradients from the margin loss, and those of the tower.
    All are fp32. With captions the margin losses are two; their sums over rows are left out (KB).
    """
    share = (processes - 1) / processes
    features = 4 * batch * dim * share
    return {
        "features": features,
        "their gradients, arc_margin": 2 * features,
        "their gradients, caption_margin": 2 * features,
        "tower": 2 * 4 * parameters * share,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--store", action="store_true", help="add the row to results/")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder is not None:
        train(options.folder)
        return
    report = Report("distributed", device="cpu", dtype="fp32", store=options.store)
    with tempfile.TemporaryDirectory() as name:
        write_data(Path(name))
        measured = {str(count): measure(Path(name), count) for count in options.processes}
    losses = [np.array(one.pop("losses")) for one in measured.values()]
    for one, found in zip(measured.values(), losses, strict=True):
        one["loss difference"] = float(np.abs(found / losses[0] - 1).max())
    small = {"batch": BATCH * MICRO_BATCHES, "dim": DIM}
    row = {
        "case": {**small, "classes": CLASSES, "captions": CAPTIONS, "steps": STEPS - UNTIMED},
        "note": NOTE,
        "measured": measured,
        "computed": {**LARGE, **{str(count): sent(count, **LARGE) for count in (8, 64)}},
    }
    report.record(row)
    report.finish(summary=row)


def measure(folder: Path, processes: int) -> dict[str, Any]:
    """Medians over the steps of a run: steps per second, bytes sent by the process that sends most.

    And all steps' losses.
    """
    script = [str(Path(__file__)), "--folder", str(folder)]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = script if processes == 1 else [*torchrun, *script]
    subprocess.run([sys.executable, *words], check=True, env=environment)
    found = [json.loads((folder / f"{processes}-{i}.json").read_text()) for i in range(processes)]
    starts = found[0]["starts"][UNTIMED:]
    seconds = np.diff(starts)
    parameters = found[0]["parameters"]
    arithmetic = sent(processes, batch=BATCH * MICRO_BATCHES, dim=DIM, parameters=parameters)
    return {
        "steps per second": 1 / float(np.median(seconds)),
        "bytes": max(statistics.median(one["bytes"][UNTIMED:]) for one in found),
        "bytes computed": sum(arithmetic.values()),
        "parameters": parameters,
        "losses": found[0]["losses"],
    }


def train(folder: Path) -> None:
    """Be one of the processes: run, and write when its steps began and what it sent in each."""
    starts: list[float] = []
    sizes: list[int] = []
    losses: list[float] = []
    trained = 0
    inner = loop.optimizer_step

    def watched(run: Any, stage: Any, micro_batches: Any) -> dict[str, float]:
        nonlocal trained
        starts.append(time.perf_counter())
        before = written()
        values = inner(run, stage, micro_batches)
        sizes.append(written() - before)
        losses.append(values["loss"])
        trained = sum(p.numel() for p in run.clip.model.parameters() if p.grad is not None)
        return values

    loop.optimizer_step = watched
    pymcip.train(
        model=f"local-dir:{folder / 'model'}", train_data=str(folder / "images"),
        captions=str(folder / "captions.txt"), method="mcip", out=folder / f"run-{world()}", holdout=0,
        device="cpu", precision="fp32", epochs=1, batch_size=BATCH, accum_freq=MICRO_BATCHES,
        threshold=-1.0, workers=0, save_steps=1000,
    )  # fmt: skip
    found = {"starts": starts, "bytes": sizes, "parameters": trained, "losses": losses}
    (folder / f"{world()}-{rank()}.json").write_text(json.dumps(found))


def written() -> int:
    """Bytes that this process has written to files, pipes and sockets."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["wchar"])


def write_data(folder: Path) -> None:
    """Pictures in a folder per class, captions, and the model."""
    generator = np.random.default_rng(0)
    for number in range(STEPS * BATCH * MICRO_BATCHES):
        path = folder / "images" / str(number % CLASSES) / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((SIDE, SIDE)).save(path)
    (folder / "captions.txt").write_text("".join(f"thing {i}\n" for i in range(CAPTIONS)))
    model = folder / "model"
    model.mkdir()
    described = {"model_cfg": MODEL, "preprocess_cfg": {"size": SIDE}}
    (model / "open_clip_config.json").write_text(json.dumps(described))
    torch.manual_seed(0)
    weights = open_clip.create_model(f"local-dir:{model}", load_weights=False).state_dict()
    weights = {name: value.contiguous() for name, value in weights.items()}
    safetensors.torch.save_file(weights, model / "open_clip_model.safetensors")


if __name__ == "__main__":
    main()
