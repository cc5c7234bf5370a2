"""Which tile sizes a kernel runs with: measured once per shape class, and remembered on disk.

The first call of a shape class times every candidate on the real inputs (tens of milliseconds
each); the choice goes to `$PYMCIP_CACHE/tuning` (default: `~/.cache/pymcip/tuning`), one file per
GPU model, Triton version and version of the candidates. `PYMCIP_TUNE=0` takes the first candidate
instead of timing. Nothing happens at import. Tile sizes decide in which order sums are made, so the
last bits of a result are those of the choice: the same ones as long as it is remembered.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
import triton
from triton.runtime.errors import OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor

from pymcip.errors import BackendError
from pymcip.files import atomic_path

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
VERSION = 2  # of the kernels and their candidates
REPETITIONS = 5


@dataclass(frozen=True)
class Config:
    """Tile sizes (rows, columns, depth of the product), warps per program, pipeline stages."""

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int


def capability(device: torch.device | None = None) -> int:
    """The major compute capability (None: of the current device); Hopper's under the interpreter.

    From 9 (Hopper) on tiles move by the tensor memory accelerator, before it by pointers.
    """
    return 9 if INTERPRETED else torch.cuda.get_device_capability(device)[0]


def probe() -> str | None:
    """Why Triton's kernels can't run on this machine; None if they can."""
    if not INTERPRETED and not torch.cuda.is_available():
        return "needs a CUDA device"
    if capability() < 8:
        return "needs a GPU of compute capability 8.0 or later, for bfloat16"
    return None


def tiles(tensor: torch.Tensor, block: list[int], tma: bool) -> torch.Tensor | TensorDescriptor:
    """What a kernel reads tiles of `block` from, or writes them to: see `capability`."""
    return TensorDescriptor.from_tensor(tensor, block) if tma else tensor


chosen: dict[str, Config] = {}
read_files: set[Path] = set()


def launch(
    kernel: str,
    shape_class: Sequence[object],
    candidates: Sequence[Config],
    run: Callable[[Config], None],
    *,
    timed: bool = True,
) -> None:
    """Run with the best candidate, or where the GPU lacks the resources for it with the next.

    `run` launches the kernel with one; it may be called many times. Not `timed`, nor where nothing
    can be timed: the choice that is remembered, else the candidates in their order.
    """
    if INTERPRETED:
        return run(candidates[0])
    file = choices_file()
    _load(file)
    key = f"{file.stem}: {kernel} " + " ".join(map(str, shape_class))
    best = chosen.get(key)
    if best not in candidates:
        best = None
    untimed = os.environ.get("PYMCIP_TUNE") == "0" or torch.cuda.is_current_stream_capturing()
    if best is None and timed and not untimed and len(candidates) > 1:
        timings = {config: time_config(run, config) for config in candidates}
        best = min(timings, key=timings.__getitem__)
        if timings[best] < float("inf"):
            chosen[key] = best
            _save(file, key, best)
    lacking: OutOfResources | None = None
    for config in candidates if best is None else (best, *candidates):
        try:
            return run(config)
        except OutOfResources as error:  # raised before anything is launched
            lacking = error
    raise BackendError(
        f"{kernel}: none of {len(candidates)} tile sizes fits this GPU ({lacking}). "
        "Choose backend='torch'"
    )


def time_config(run: Callable[[Config], None], config: Config) -> float:
    """Median milliseconds; infinite if the GPU lacks the resources."""
    try:
        run(config)
    except OutOfResources:
        return float("inf")
    milliseconds = []
    for _ in range(REPETITIONS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run(config)
        end.record()
        end.synchronize()
        milliseconds.append(start.elapsed_time(end))
    return median(milliseconds)


def choices_file() -> Path:
    folder = Path(os.environ.get("PYMCIP_CACHE") or Path.home() / ".cache" / "pymcip") / "tuning"
    device = torch.cuda.get_device_name().replace(" ", "-").replace("/", "-")
    return folder / f"{device}-triton{triton.__version__}-v{VERSION}.json"


def _load(file: Path) -> None:
    if file in read_files:
        return
    read_files.add(file)
    chosen.update(_stored(file))


def _stored(file: Path) -> dict[str, Config]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {key: Config(**value) for key, value in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}  # absent, or not ours: timed again


def _save(file: Path, key: str, config: Config) -> None:
    """Store a choice; where the file can't be written, the next process times the kernel again."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        stored = {**_stored(file), key: config}
        with atomic_path(file) as temporary:
            text = json.dumps({name: asdict(value) for name, value in stored.items()}, indent=1)
            temporary.write_text(text, encoding="utf-8")
    except OSError:
        return
