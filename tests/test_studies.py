"""Sweeps: the runs they train, their tables and plots, and how they are resumed."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import pymcip
from pymcip.cli import main
from pymcip.configs import TrainConfig
from pymcip.demo import points
from pymcip.demo.recipe import SMOKE
from pymcip.demo.world import WorldConfig, prepare_world
from pymcip.errors import (
    ConfigError,
    DataError,
    MissingDependencyError,
    OutputExistsError,
    PymcipError,
)
from pymcip.studies import pareto_front, sweep
from pymcip.training import train


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """The command line sets pymcip's log level; keep it from other tests."""
    level = logging.getLogger("pymcip").level
    yield
    logging.getLogger("pymcip").setLevel(level)


@pytest.fixture
def own(
    tmp_path: Path,
    tiny_model_dir: Path,
    tiny_images: Callable[..., Path],
    captions_file: Callable[..., Path],
    shards: Callable[..., list[Path]],
) -> dict[str, Any]:
    """Options of a sweep over data of one's own: 3 steps of training, tiny."""
    names = tmp_path / "names.tsv"
    names.write_text("0\tred\n1\tgreen\n2\tblue\n")
    options = {
        "model": f"local-dir:{tiny_model_dir}",
        "train_data": [str(tiny_images("train"))],
        "captions": str(captions_file()),
        "method": "mcip",
        "threshold": -1.0,
        "k": 2,
        "out": str(tmp_path / "elsewhere"),
        "device": "cpu",
        "precision": "fp32",
        "epochs": 1,
        "batch_size": 4,
        "lr": 1e-3,
        "warmup": 1,
        "rea_epochs": 1,
        "rea_batch_size": 6,
        "seed": 5,
        "val_data": str(shards()[0].parent),
        "val_class_names": str(names),
    }
    (tmp_path / "train.json").write_text(json.dumps(options))
    return {"train": tmp_path / "train.json", "out": tmp_path / "sweep"}


class Trainings:
    """Stands in front of `train`: what was trained, and what may happen instead."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.configs: list[TrainConfig] = []
        self.instead: Callable[[TrainConfig], Any] = lambda config: None
        monkeypatch.setattr(points, "train", self)

    def __call__(self, config: TrainConfig) -> Any:
        self.configs.append(config)
        return self.instead(config) or train(config)

    @property
    def names(self) -> list[str]:
        return ["/".join(Path(config.out).parts[-3:]) for config in self.configs]


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> Trainings:
    return Trainings(monkeypatch)


def test_a_sweep_on_data_of_ones_own(own: dict[str, Any], trainings: Trainings) -> None:
    values = {"method": ("gpr", "2sft", "mcip"), "caption_noise": (0.0, 0.5)}
    result = sweep(**own, set=values, seeds=2)
    per_seed = ["gpr", "2sft", "mcip", "mcip_caption_noise=0.5"]
    assert trainings.names == [f"seed{s}/runs/{name}" for s in (5, 6) for name in per_seed]
    assert [config.seed for config in trainings.configs] == [5] * 4 + [6] * 4
    out = result.out
    assert len(list((out / "embeddings").glob("captions-*"))) == 1, "one cache for all runs"
    assert not list(out.glob("seed*/runs/*/checkpoints"))
    assert {path.name for path in out.iterdir()} == {
        *("table.md", "sweep.json", "config.json", "base.json", "embeddings", "seed5", "seed6"),
        ".pymcip-files",
        *("front.png", "front.svg", "by_caption_noise.png", "by_caption_noise.svg"),
    }
    assert [row["point"] for row in result.table] == [
        "base", "gpr", "2sft", "mcip, caption_noise 0", "caption_noise 0.5",
    ]  # fmt: skip
    # every number once more, from what pymcip.evaluate says of the run folders
    training = json.loads(own["train"].read_text())
    data = {"data": training["val_data"], "class_names": training["val_class_names"]}
    model = {"device": "cpu", "precision": "fp32"}
    base = pymcip.evaluate(model=training["model"], **data, **model).metrics
    noisy = [
        pymcip.evaluate(
            model=str(out / f"seed{s}" / "runs" / "mcip_caption_noise=0.5"), **data, **model
        ).metrics
        for s in (5, 6)
    ]
    row = result.table[-1]
    first, second = (one["i2i_map"] for one in noisy)
    assert row["retrieval"]["mean"] == pytest.approx((first + second) / 2, abs=1e-4)
    assert row["retrieval"]["deviation"] == pytest.approx(abs(first - second) / 2**0.5, abs=1e-4)
    assert row["retrieval"]["gain"] == pytest.approx(
        (first + second) / 2 - base["i2i_map"], abs=1e-4
    )
    text = [(one["t2i_r5"] + one["zero_shot"]) / 2 for one in noisy]
    assert row["alignment"]["mean"] == pytest.approx(sum(text) / 2, abs=1e-4)
    assert row["t2i_r5"]["mean"] == pytest.approx(sum(one["t2i_r5"] for one in noisy) / 2, abs=1e-4)
    pairs = [[row["alignment"]["mean"], row["retrieval"]["mean"]] for row in result.table]
    assert result.front == [result.table[i]["point"] for i in pareto_front(pairs)]
    written = json.loads((out / "sweep.json").read_text())
    assert written["table"] == result.table
    assert [one["seed"] for one in written["per_seed"]] == result.seeds == [5, 6]
    assert (out / "table.md").read_text() == result.markdown
    for row in result.table:
        assert f"| {row['point']} | {row['retrieval']['mean']:.1f} ± " in result.markdown
    with Image.open(out / "front.png") as picture:
        assert picture.size == (960, 720)
    assert "Pareto front" in (out / "front.svg").read_text()


def test_going_on_trains_and_measures_what_is_missing(
    own: dict[str, Any], trainings: Trainings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(config: TrainConfig) -> Any:
        if len(trainings.configs) == 2:
            raise KeyboardInterrupt
        return None

    trainings.instead = interrupted
    with pytest.raises(KeyboardInterrupt):
        sweep(**own, set={"k": (1, 2, 3)})
    assert not (own["out"] / "sweep.json").exists()
    trainings.instead = lambda config: None
    with pytest.raises(OutputExistsError):
        sweep(**own, set={"k": (1, 2, 3)})
    trainings.configs.clear()
    result = sweep(**own, set={"k": (1, 2, 3)}, resume="latest")
    assert trainings.names == ["seed5/runs/mcip", "seed5/runs/mcip_k=3"]
    plots = {path: path.read_bytes() for path in own["out"].glob("*.svg")}
    trainings.configs.clear()
    monkeypatch.setattr(points, "evaluate", None)
    again = sweep(**own, set={"k": (1, 2, 3)}, resume="latest")
    assert trainings.configs == []
    assert again.table == result.table
    assert again.markdown == result.markdown
    assert plots == {path: path.read_bytes() for path in own["out"].glob("*.svg")}
    monkeypatch.undo()
    more = sweep(**own, set={"k": (3, 4)}, resume="latest")
    assert [row["point"] for row in more.table] == ["base", "3", "4"]
    assert more.table[1]["retrieval"] == result.table[3]["retrieval"]


def test_going_on_refuses_another_recipe_and_other_folders(own: dict[str, Any]) -> None:
    sweep(**own, set={"k": (1,)})
    options = json.loads(own["train"].read_text())
    own["train"].write_text(json.dumps({**options, "batch_size": 3}))
    with pytest.raises(ConfigError, match=r"other settings \(train\.batch_size\)"):
        sweep(**own, set={"k": (1,)}, resume="latest")
    (own["out"] / "config.json").unlink()
    with pytest.raises(ConfigError, match="so it is no sweep"):
        sweep(**own, set={"k": (1,)}, resume="latest")
    with pytest.raises(OutputExistsError, match="is read from the output folder"):
        sweep(**{**own, "out": own["train"].parent}, set={"k": (1,)}, overwrite=True)
    assert own["train"].exists()


def test_a_point_that_fails_is_a_row(own: dict[str, Any], trainings: Trainings) -> None:
    result = sweep(
        **own,
        set={"method": ("mcip", "mcip+rea"), "threshold": (-1.0, 1.0)},
        grid="product",
        seeds=1,
    )
    assert list(result.failed) == ["mcip, threshold 1", "mcip+rea, threshold 1"]
    assert "no caption of any image" in result.failed["mcip, threshold 1"]
    assert [row["point"] for row in result.table if "error" not in row] == [
        "base",
        "mcip, threshold -1",
        "mcip+rea, threshold -1",
    ]
    assert trainings.names.count("seed5/runs/mcip_threshold=1.0") == 1, "not tried again for rea"
    assert "failed: seed 5: no caption" in result.markdown
    assert not set(result.failed) & set(result.front)
    written = json.loads((own["out"] / "sweep.json").read_text())
    assert "error" in written["per_seed"][0]["points"][1]


def test_no_point_succeeds(own: dict[str, Any]) -> None:
    with pytest.raises(PymcipError, match=r"none of the 1 points .* 1: seed 5: no caption"):
        sweep(**own, set={"threshold": (1.0,)})
    assert (own["out"] / "sweep.json").exists()


def test_a_signal_stops_the_sweep(
    own: dict[str, Any], trainings: Trainings, caplog: pytest.LogCaptureFixture
) -> None:
    def stopped(config: TrainConfig) -> Any:
        finished = train(config)
        return dataclasses.replace(finished, interrupted="SIGTERM")

    trainings.instead = stopped
    with pytest.raises(KeyboardInterrupt, match="SIGTERM"):
        sweep(**own, set={"k": (1, 2)})
    assert len(trainings.configs) == 1
    assert "resume='latest' continues" in caplog.text


def test_metrics_that_are_chosen(own: dict[str, Any]) -> None:
    result = sweep(**own, set={"k": (1,)}, retrieval="i2i_r1", alignment=("zero_shot",))
    written = json.loads((own["out"] / "sweep.json").read_text())
    assert written["qualities"] == {"retrieval": ["i2i_r1"], "alignment": ["zero_shot"]}
    found = written["per_seed"][0]["points"][0]["metrics"]
    row = result.table[1]
    assert row["alignment"]["mean"] == pytest.approx(found["zero_shot"], abs=1e-4)
    assert row["retrieval"]["mean"] == pytest.approx(found["i2i_r1"], abs=1e-4)
    assert row["alignment"]["deviation"] is None
    assert "| k | I2I R@1 | zero-shot | captions per image | front |" in result.markdown


def test_data_without_the_metric(
    own: dict[str, Any], trainings: Trainings, tiny_images: Callable[..., Path]
) -> None:
    images = str(tiny_images("other", classes=2))
    with pytest.raises(DataError, match="alignment can't be measured by t2i_r5: the data need"):
        sweep(**own, data=images, set={"k": (1,)}, alignment=("zero_shot", "t2i_r5"))
    assert trainings.configs == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "can't be read: No such file"),
        ("{", "is not JSON"),
        ("[]", "holds list; needed: a JSON object"),
        ('{"model": "m", "rate": 1}', "give `data`"),
        ('{"model": "m", "rate": 1}', "unknown option 'rate'"),
    ],
)
def test_training_options_that_are_wrong(content: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        sweep(train=path, set={"k": (1,)}, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_matplotlib_is_asked_for_before_any_work(
    own: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "pymcip\[plots\]"'):
        sweep(**own, set={"k": (1,)})
    assert not own["out"].exists()


def test_a_world_is_composed_once(tmp_path: Path) -> None:
    config = dataclasses.replace(SMOKE.world, captions=40, seed=1)
    world = prepare_world(config, tmp_path)
    times = [path.stat().st_mtime_ns for path in world.shards("train")]
    assert prepare_world(config, tmp_path) == world
    assert [path.stat().st_mtime_ns for path in world.shards("train")] == times
    other: WorldConfig = dataclasses.replace(config, seed=2)
    before = world.captions.read_text()
    assert prepare_world(other, tmp_path).captions.read_text() != before


def test_alignment_is_kept_on_the_demos_probe(tmp_path: Path) -> None:
    result = sweep(smoke=True, set={"method": ("mcip+",)}, seeds=1, out=tmp_path / "sweep")
    row = result.table[1]
    assert row["point"] == "mcip+"
    assert 0 < row["coefficient"] <= 1
    folder = tmp_path / "sweep" / "seed0"
    options = json.loads((folder / "runs" / "mcip+" / "config.json").read_text())
    assert options["probe_data"] == str(folder / "world" / "probe-*.tar")
    assert options["alignment_budget"] == SMOKE.plus["alignment_budget"]


def test_a_sweep_on_the_demos_world(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sweep", "--smoke", "--set", "threshold=-1,auto", "--out", str(tmp_path / "sweep")]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "| threshold | I2I mAP | alignment | T2I R@5 | zero-shot | captions per image | front |"
    )
    shown = json.loads(lines[-1])
    assert [row["point"] for row in shown["table"]] == ["base", "-1", "auto"]
    threshold = shown["table"][2]["threshold"]
    assert any(line.startswith(f"| auto ({threshold:.3f}) |") for line in lines)
    assert (tmp_path / "sweep" / "seed0" / "runs" / "mcip_threshold=auto").is_dir()
    assert "by_threshold.png" in {path.name for path in (tmp_path / "sweep").iterdir()}
