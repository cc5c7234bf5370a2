"""Steps whose loss or gradient is not finite are skipped, and stop a run if there are many."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import pymcip
from pymcip.errors import (
    CheckpointError,
    TrainingDivergedError,
)
from pymcip.exporting import write_export
from pymcip.model import ClipModel
from pymcip.training import loop
from pymcip.training.checkpoints import load_checkpoint
from pymcip.training.image_stage import ImageStage
from tests.conftest import lines_of


def poison(monkeypatch: pytest.MonkeyPatch, bad_steps: set[int], what: str) -> None:
    """Make the loss or the gradient of some global steps (counted from 1) NaN."""
    original = ImageStage.backward
    count = [0]

    def backward(self: ImageStage, micro_batches: list[Any]) -> dict[str, torch.Tensor]:
        values = original(self, micro_batches)
        count[0] += 1
        if count[0] in bad_steps:
            if what == "loss":
                values["loss"] = values["loss"] * float("nan")
            elif what == "tower":
                self.clip.model.visual.proj.grad[0, 0] = float("inf")
            else:
                self.classes.weight.grad[0, 0] = float("nan")
        return values

    monkeypatch.setattr(ImageStage, "backward", backward)


@pytest.mark.parametrize("what", ["loss", "tower", "classes"])
def test_steps_with_bad_numbers_are_skipped_and_counted(
    what: str, run_options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, {2, 4}, what)
    result = pymcip.train(**run_options, method="gpr")
    assert result.skipped_steps == 2
    for value in torch.load(result.state_dict, weights_only=True).values():
        assert torch.isfinite(value).all()
    assert [record["skipped_steps"] for record in lines_of(result.out)] == [0, 1, 1, 2, 2, 2]


def test_ten_bad_steps_in_a_row_stop_the_run_and_name_a_checkpoint(
    run_options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, set(range(4, 40)), "loss")
    with pytest.raises(TrainingDivergedError, match=r"10 steps in a row.*step_0+\d+\.pt") as caught:
        pymcip.train(**{**run_options, "epochs": 9}, method="gpr")
    named = next(word for word in str(caught.value).split() if word.endswith(".pt."))
    for value in load_checkpoint(Path(named.rstrip(".")))["model"].values():
        assert torch.isfinite(value).all()


def test_batch_norm_statistics_survive_a_skipped_step() -> None:
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3))
    before = loop.running_statistics(model)
    model(torch.full((4, 3), float("nan")))
    assert not torch.isfinite(model[0].running_mean).all()
    for buffer, copy in before:
        buffer.copy_(copy)
    assert torch.isfinite(model[0].running_mean).all()
    assert int(model[0].num_batches_tracked) == 0


@pytest.mark.parametrize("how", ["huge", "skipped"])
def test_a_diverged_run_exports_nothing_and_says_so(
    how: str, run_options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**run_options, "method": "gpr"}
    if how == "huge":
        options |= {"lr": 1e6, "warmup": 0}
    else:
        poison(monkeypatch, {1, 2, 4, 5}, "loss")
    said = "it was .* before training" if how == "huge" else "4 of 6 steps were skipped"
    with pytest.raises(TrainingDivergedError, match=rf"{said}.*Nothing is exported"):
        pymcip.train(**options)
    assert not (Path(options["out"]) / "exported").exists()


def test_weights_that_are_not_finite_are_not_exported(tiny_clip: ClipModel, tmp_path: Path) -> None:
    with torch.no_grad():
        tiny_clip.model.visual.proj[0, 0] = float("inf")  # type: ignore[union-attr,index,operator]
    with pytest.raises(CheckpointError, match=r"visual\.proj holds NaN or infinity"):
        write_export(tiny_clip, tmp_path / "out")
    assert not (tmp_path / "out").exists()
