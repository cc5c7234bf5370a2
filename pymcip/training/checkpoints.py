"""Checkpoints: complete or absent, the last two and the best, loaded with `weights_only=True`."""

from __future__ import annotations

import math
import os
import zipfile
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from pymcip.distributed import is_first, world
from pymcip.errors import CheckpointError, reason_of
from pymcip.files import atomic_path

FORMAT = 1
KEPT = 2


@dataclass
class Position:
    """How far the run is. All of it goes into a checkpoint."""

    stage: int = 0
    epoch: int = 0
    step: int = 0  # within the epoch
    global_step: int = 0
    skipped_steps: int = 0
    bad_steps_in_a_row: int = 0
    best_score: float = -math.inf
    sums: dict[str, float] = field(default_factory=dict)  # since the last logged line
    steps_in_sums: int = 0


def save_checkpoint(folder: Path, state: dict[str, Any]) -> Path:
    """Write `step_<global step>.pt`, then drop all but the last two (and the best).

    Of several processes the first one writes.
    """
    path = folder / f"step_{state['global_step']:08d}.pt"
    if not is_first():
        return path
    with atomic_path(path) as temporary, temporary.open("wb") as handle:
        torch.save({"format": FORMAT, **state}, handle)  # a file's name would be part of it
    for old in checkpoint_files(folder)[:-KEPT]:
        old.unlink()
    return path


def mark_best(checkpoint: Path) -> None:
    """Make `best.pt` the same file as `checkpoint` (a hard link: no second copy on disk)."""
    with atomic_path(checkpoint.with_name("best.pt")) as temporary:
        os.link(checkpoint, temporary)


def checkpoint_files(folder: Path) -> list[Path]:
    """Step checkpoints in `folder`, oldest first. Leftovers of a killed write don't count."""
    return sorted(folder.glob("step_*.pt"))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint with `weights_only=True`, after a look at its checksums.

    Raises:
        CheckpointError: it is damaged, of another version, or no checkpoint.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch writes checksums, and doesn't read them
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"its part {damaged} has another checksum than when it was written")
        state: dict[str, Any] = torch.load(
            path, map_location="cpu", weights_only=True, mmap=world() > 1
        )
    except Exception as error:  # what a damaged file raises is not bounded by a list
        raise CheckpointError(
            f"{path} can't be read as a pymcip checkpoint: {reason_of(error)}.\nMove it away to "
            "resume from the one before it, or train anew with overwrite=True."
        ) from error
    found = state.get("format") if isinstance(state, dict) else type(state).__name__
    if found != FORMAT:
        raise CheckpointError(
            f"{path} has checkpoint format {found!r}, this pymcip reads {FORMAT}; resume with the "
            "pymcip version that wrote it, or train anew."
        )
    plain = {item.name: type(item.default) for item in fields(Position) if item.name != "sums"}
    parts = dict.fromkeys(("sums", "model", "heads", "optimizer"), dict)
    wrong = [
        name
        for name, kind in (plain | parts).items()
        if not isinstance(state.get(name), kind) or (kind is int and state[name] < 0)
    ]
    if wrong:
        raise CheckpointError(
            f"{path} is no whole checkpoint: {', '.join(wrong)} can't be what it holds. Move it away "
            "to resume from the one before it, or train anew with overwrite=True."
        )
    return state


def load_weights(model: torch.nn.Module, state: dict[str, Any], path: Path, name: str) -> None:
    """Put the weights of a checkpoint's `state`, read from `path`, into the model called `name`.

    Raises:
        CheckpointError: they are another model's.
    """
    try:
        model.load_state_dict(state["model"], strict=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"{path} holds another model than {name!r}: {reason_of(error)}\n"
            "Resume with the model that the run was started with."
        ) from error
