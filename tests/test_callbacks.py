"""`train(callbacks=...)`: what the functions are given, when, and how they end a stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pymcip
from pymcip.errors import ConfigError
from tests.conftest import computed_of, lines_of


@pytest.fixture
def options(run_options: dict[str, Any], captions_file: Callable[..., Path]) -> dict[str, Any]:
    """Options of a measured run of 2 x 3 image steps and 2 x 2 text steps."""
    return {
        **run_options,
        "captions": str(captions_file()),
        "val_data": run_options["train_data"],
        "method": "mcip+rea",
        "rea_epochs": 2,
        "rea_batch_size": 6,
    }


def test_they_see_every_step_and_epoch_and_change_nothing(
    options: dict[str, Any], tmp_path: Path
) -> None:
    seen: list[tuple[str, pymcip.TrainState]] = []

    def note(name: str) -> Callable[[pymcip.TrainState], None]:
        return lambda state: seen.append((name, state))

    names = ("on_step", "on_evaluation", "on_epoch")
    result = pymcip.train(
        **options, callbacks=pymcip.Callbacks(**{name: note(name) for name in names})
    )
    plain = pymcip.train(**{**options, "out": str(tmp_path / "plain")})
    assert computed_of(result.out) == computed_of(plain.out)
    image, text = ((["on_step"] * steps + ["on_evaluation", "on_epoch"]) * 2 for steps in (3, 2))
    assert [name for name, _ in seen] == image + text
    lines = [line for line in lines_of(result.out) if "loss" in line]
    steps = [state for name, state in seen if name == "on_step"]
    for line, state in zip(lines, steps, strict=True):
        assert (state.stage, state.epoch, state.step, state.global_step) == tuple(
            line[name] for name in ("stage", "epoch", "step", "global_step")
        )
        assert state.losses == {name: line[name] for name in state.losses}
        assert {"loss", "grad_norm", "lr"} <= state.losses.keys()
        assert not state.metrics
    for name, last in (("on_evaluation", seen[-2][1]), ("on_epoch", seen[-1][1])):
        assert last.metrics == result.metrics, name
        assert last.before == result.before, name
    with pytest.raises(dataclasses.FrozenInstanceError):
        last.step = 0  # type: ignore[misc]
    with pytest.raises(TypeError):
        last.metrics["i2i_map"] = 100.0  # type: ignore[index]


@pytest.mark.parametrize("true", [True, np.True_])
def test_a_stage_that_is_ended_is_followed_by_what_follows_it(
    true: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    options["log_steps"] = 100
    result = pymcip.train(
        **options,
        callbacks=pymcip.Callbacks(on_step=lambda s: s.stage == "image" and true),
    )
    places = [
        (line["stage"], line["global_step"]) for line in lines_of(result.out) if "loss" in line
    ]
    assert places == [("image", 1), ("text", 3), ("text", 5)]
    assert result.steps == 5
    assert result.interrupted is None
    assert result.hub is not None
    measured = [line["global_step"] for line in lines_of(result.out) if "evaluation" in line]
    assert measured == [0, 1, 3, 5]
    log = (result.out / "out.log").read_text()
    assert "on_step returned True: the image stage ends in epoch 1 of 2, after step 1 of 3" in log
    again = pymcip.train(**options, resume="latest")  # it is a finished run
    assert again == result


def test_early_stopping_exports_the_model_of_that_epoch(
    options: dict[str, Any], tmp_path: Path
) -> None:
    options = {**options, "method": "gpr", "epochs": 5}
    result = pymcip.train(
        **options, callbacks=pymcip.Callbacks(on_evaluation=lambda state: state.epoch == 1)
    )
    assert result.steps == 6
    assert result.metrics == lines_of(result.out)[-1]["evaluation"]
    unmeasured = {**options, "out": str(tmp_path / "other"), "val_data": None, "holdout": 0.0}
    result = pymcip.train(
        **unmeasured, callbacks=pymcip.Callbacks(on_epoch=lambda state: not state.metrics)
    )
    assert result.steps == 3


def test_an_exception_ends_the_run_which_can_be_resumed(
    options: dict[str, Any], tmp_path: Path
) -> None:
    def fail(state: pymcip.TrainState) -> None:
        if state.global_step == 5:
            raise LookupError

    with pytest.raises(LookupError):
        pymcip.train(**options, callbacks=pymcip.Callbacks(on_step=fail))
    assert not (Path(options["out"]) / "exported").exists()
    resumed = pymcip.train(**options, resume="latest")
    whole = pymcip.train(**{**options, "out": str(tmp_path / "whole")})
    assert computed_of(resumed.out) == computed_of(whole.out)


def test_bad_callbacks_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"on_step=3 is not allowed; allowed: a function"):
        pymcip.Callbacks(on_step=3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"allowed: pymcip\.Callbacks"):
        pymcip.train(**options, callbacks=print)  # type: ignore[arg-type]
    assert not Path(options["out"]).exists()
    answers = pymcip.Callbacks(on_step=lambda state: 0.3)  # type: ignore[arg-type,return-value]
    with pytest.raises(ConfigError, match=r"on_step returned 0\.3; a callback returns True"):
        pymcip.train(**options, callbacks=answers)
