"""What a run says of itself: its log, the trackers, its seconds."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import pymcip
from pymcip.cli import main
from pymcip.embedding import EmbeddingFolder
from pymcip.training import loop
from pymcip.training.pace import Pace
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
    before, after = result.before["i2i_map"], result.metrics["i2i_map"]
    row = f"| image-to-image mAP | {before:.2f} | {after:.2f} | {after - before:+.2f} |"
    assert row in result.markdown.splitlines()
    assert result._repr_markdown_() == result.markdown
    assert replace(result, before={})._repr_markdown_().startswith("`TrainResult(")
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
    assert last["system/memory_gib"] > 0.05
    assert last["samples_per_second"] > 0


def test_mlflow_gets_them_too(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any]] = []

    def noted(name: str) -> Callable[..., None]:
        return lambda *values, **named: calls.append((name, [*values, *named.values()]))

    names = ("set_experiment", "start_run", "log_params", "log_metrics", "end_run")
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(**{n: noted(n) for n in names}))
    result = pymcip.train(**options, report_to=["mlflow"])
    records = lines_of(result.out)
    assert [name for name, _ in calls[:3]] == ["set_experiment", "start_run", "log_params"]
    assert calls[1][1] == ["run"]
    assert calls[2][1][0]["method"] == "mcip"
    assert [values[1] for _, values in calls[3:-1]] == [line["global_step"] for line in records]
    assert calls[-1] == ("end_run", [])


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


# Warnings


def paced(work: float, wait: float, workers: int, *, left: int = 10_000) -> None:
    """Steps of `work` seconds, for each of which `wait` seconds pass before its batch is there."""
    now = [0.0]

    def batches() -> Iterator[int]:
        for number in range(30):
            now[0] += 1000 if number == 0 else wait  # workers start
            yield number

    pace = Pace(workers, clock=lambda: now[0])
    assert list(range(30)) == [
        batch
        for batch in pace.watched(batches(), stage="image", left=left)
        if now.__setitem__(0, now[0] + work) is None  # type: ignore[func-returns-value]
    ]


@pytest.mark.parametrize(
    ("work", "wait", "left", "texts"),
    [
        (0.3, 0.05, 10_000, []),  # 58 minutes
        (0.4, 0.05, 10_000, ["take about 1:14:51 more (0.45 s a step, 9979 steps left)"]),
        (0.1, 0.05, 1000, ["waits for its data 33 % of the time: raise workers (now 0"]),
    ],
)
def test_slow_runs_are_warned_of_once(
    work: float, wait: float, left: int, texts: list[str],
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr("pymcip.training.pace.usable_cores", lambda: 4)
    paced(work, wait, 0, left=left)
    assert len(caplog.records) == len(texts)
    for text, record in zip(texts, caplog.records, strict=True):
        assert text in record.message
    caplog.clear()
    if wait > work / 3:
        paced(work, wait, 3, left=left)
        assert "smaller image files" in caplog.text


def test_a_run_watches_its_steps(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("pymcip.training.pace.STEPS", 4)
    monkeypatch.setattr("pymcip.training.pace.LONG", 0.0)
    pymcip.train(**{**options, "method": "gpr", "epochs": 3, "val_data": None})
    assert "s a step, 3 steps left)" in caplog.text


def test_classes_with_one_image_are_counted(
    options: dict[str, Any], tiny_images: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    data = tiny_images("few", classes=3, per_class=2)
    sorted(data.glob("*/*"))[0].unlink()
    pymcip.train(**{**options, "train_data": str(data), "method": "gpr", "epochs": 1})
    assert "1 of 3 classes have one image" in caplog.text


def test_few_images_with_captions(
    embedded: EmbeddingFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cosines = embedded.vectors("img") @ embedded.vectors("text").T
    best = np.sort(cosines.max(axis=1))
    common = {"images": embedded.path, "captions": embedded.path}
    pymcip.mine_captions(**common, out=tmp_path / "a", threshold=float(best[5] - 1e-4))
    assert "no pseudo-caption" not in caplog.text
    pymcip.mine_captions(**common, out=tmp_path / "b", threshold=float(best[10] - 1e-4))
    assert "83 % of the images have no pseudo-caption" in caplog.text


# Runs side by side


def test_runs_side_by_side(
    options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {**options, "method": "gpr", "epochs": 1, "lr_classes": 0.01}
    runs = tmp_path / "runs"
    first = pymcip.train(**{**options, "out": str(runs / "a")})
    second = pymcip.train(**{**options, "out": str(runs / "more" / "b"), "lr": 2e-3})
    (second.out / "result.json").unlink()  # as if it were killed
    assert main(["runs", str(runs)]) == 0
    *table, line = capsys.readouterr().out.splitlines()
    found = json.loads(line)["runs"]
    assert list(found) == ["a", "more/b"]
    assert found["a"]["metrics"] == first.metrics
    assert found["a"]["before"] == first.before
    assert found["a"]["settings"] == {"method": "gpr", "lr": 1e-3}
    assert found["more/b"] == {"settings": {"method": "gpr", "lr": 2e-3}}
    change = f"{first.before['i2i_map']:.1f} -> {first.metrics['i2i_map']:.1f}"
    assert table[0].startswith(
        "| run | method | settings that differ | image-to-image mAP | k-NN |"
    )
    assert table[2].startswith(f"| a | gpr | lr=0.001 | {change} |")
    assert table[3] == "| more/b | gpr | lr=0.002 |  |  |  | not finished |"


def test_no_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(tmp_path)]) == 2
    assert "there is no run below" in capsys.readouterr().err
    assert main(["runs"]) == 2
    assert "folder is required" in capsys.readouterr().err
