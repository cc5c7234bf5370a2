"""What a run says of itself: its log, the trackers, its seconds."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import pymcip
from pymcip.training import loop
from tests.conftest import lines_of


@pytest.fixture
def options(run_options: dict[str, Any], captions_file: Callable[..., Path]) -> dict[str, Any]:
    """Options of a run of 2 x 3 steps that is measured on its training images."""
    return {
        **run_options,
        "captions": str(captions_file()),
        "val_data": run_options["train_data"],
        "method": "mcip",
    }


def test_the_log_says_what_is_trained_and_what_comes_next(options: dict[str, Any]) -> None:
    result = pymcip.train(**options)
    log = (result.out / "out.log").read_text()
    data = options["val_data"]
    for text in (
        f"run {result.out}: method mcip, model {options['model']} on cpu, precision fp32",
        "training data: 12 images of 3 classes; 8 captions",
        "image stage, epoch 1 of 2, step 3 of 3: loss ",
        " (class labels ",
        "after epoch 2, in percent: image-to-image mAP ",
        "before -> after, in percent, on 12 images of val_data: image-to-image mAP ",
        f"the weights for open_clip: local-dir:{result.hub}",
    ):
        assert text in log
    command = log.splitlines()[-1].partition("images of your own: ")[2]
    words = ["--model", str(result.out), "--baseline", options["model"], "--data", data]
    assert shlex.split(command) == ["pymcip", "evaluate", *words]


def test_trackers_get_what_is_measured_too(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[int, dict[str, float]]] = []
    tracker = SimpleNamespace(
        init=lambda **_: None,
        log=lambda numbers, step: sent.append((step, numbers)),
        finish=lambda: None,
    )
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    result = pymcip.train(**options, report_to=["wandb"], alignment_budget=0.9)
    records = lines_of(result.out)
    assert [step for step, _ in sent] == [record["global_step"] for record in records]
    last = {name: value for _, numbers in sent for name, value in numbers.items()}
    for name, value in result.metrics.items():
        assert last[f"evaluation/{name}"] == value
    assert result.alignment is not None
    probed = next(r["alignment"] for r in reversed(records) if "alignment" in r)
    assert {f"alignment/{k}": v for k, v in probed.items()}.items() <= last.items()
    assert all(isinstance(v, (int, float)) for _, numbers in sent for v in numbers.values())
    assert last["loss"] == [r["loss"] for r in records if "loss" in r][-1]


def test_seconds_count_all_parts_of_a_run(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted after a step that takes long, and resumed."""
    inner = loop.optimizer_step
    first_part = time.perf_counter()

    def slow(run: Any, stage: Any, micro_batches: Any) -> dict[str, float]:
        time.sleep(0.5)
        run.interruption.requested = "SIGTERM"
        return inner(run, stage, micro_batches)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "optimizer_step", slow)
        stopped = pymcip.train(**options)
    first = time.perf_counter() - first_part
    assert stopped.interrupted == "SIGTERM"
    assert 0.5 < stopped.seconds <= first
    log = (stopped.out / "out.log").read_text()
    assert "To continue: the same command with --resume latest" in log.splitlines()[-1]
    second = time.perf_counter()
    resumed = pymcip.train(**options, resume="latest")
    second = time.perf_counter() - second
    assert 0.5 < resumed.seconds <= first + second
    seconds = [record["seconds"] for record in lines_of(resumed.out)]
    assert seconds == sorted(seconds)
    assert resumed.seconds >= seconds[-1]
