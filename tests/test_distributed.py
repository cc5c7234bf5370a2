"""Training by two processes: what one process finds, whole checkpoints, and ends that all agree on."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import pymcip
from pymcip.errors import CheckpointError, ConfigError
from pymcip.model import ClipModel
from pymcip.training.checkpoints import checkpoint_files, load_checkpoint
from pymcip.training.sharding import check_sharding
from tests.conftest import (
    CAPTIONS,
    COLOURS,
    TINY_MODEL,
    computed_of,
    picture,
    settings_for,
    write_hub_folder,
)

SCRIPT = Path(__file__).with_name("distributed_runs.py")
SPEC = importlib.util.spec_from_file_location("distributed_runs", SCRIPT)
assert SPEC is not None
assert SPEC.loader is not None
runs = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(runs)
CLASSES = [1003, 5, 1]  # an uneven cut, and a process without rows
FIRST = 1e-6  # relative error of fp32 sums in another order, in the first step
ROUNDING = 1e-5  # and after some: AdamW divides by the gradient, so rounding of small ones grows
STEPS = 10  # 6 on images, 4 on texts
KILLS = int(os.environ.get("PYMCIP_KILLS", "0"))


def run_jobs(
    folder: Path, jobs: list[dict[str, Any]], restarts: int, seconds: int = 300
) -> tuple[list[list[Any]], str]:
    """What each job found, in each of two processes that torchrun starts, and what they printed."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    options = ["--standalone", "--nproc-per-node", "2", "--max-restarts", str(restarts)]
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *options, str(SCRIPT), str(folder)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder, env=environment,
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=seconds)
    finally:
        process.terminate()  # killed, it would leave its processes behind
    assert process.returncode == 0, said
    names = [[folder / f"{number}-{rank}.pt" for rank in range(2)] for number in range(len(jobs))]
    found = [[torch.load(name, weights_only=True) for name in pair] for pair in names]
    return found, said


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> dict[str, Any]:
    """Options of a run whose steps have two micro-batches, but for its folder."""
    folder = tmp_path_factory.mktemp("world")
    for label in range(3):
        (folder / "train" / f"class{label}").mkdir(parents=True)
        for index in range(4):
            image = picture(label * 1000 + index, COLOURS[label])
            image.save(folder / "train" / f"class{label}" / f"{index}.jpg")
    (folder / "captions.txt").write_text("".join(f"{line}\n" for line in CAPTIONS))
    return {
        "model": f"local-dir:{tiny_model_dir}", "train_data": str(folder / "train"),
        "captions": str(folder / "captions.txt"), "threshold": -1.0, "k": 2, "holdout": 0,
        "method": "mcip+rea", "distill": 1.0, "mixtures": 0.5, "negatives": "bank",
        "positives": "compete", "repel": 0.1,
        "device": "cpu", "precision": "fp32", "epochs": 2, "batch_size": 2, "accum_freq": 2,
        "lr": 1e-3, "warmup": 2, "log_steps": 1, "save_steps": 2, "rea_epochs": 2,
        "grad_clip_classes": 1.0,
        "rea_batch_size": 3, "rea_lr": 1e-3, "resume": "latest",
    }  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, world: dict[str, Any]) -> dict[str, Any]:
    """What two processes found of the jobs, by name."""
    folder = tmp_path_factory.mktemp("jobs")
    names = (
        "whole bank nan stopped half ended many few killed parts halted mixed remains scale apart"
    )
    full = {**world, "sharding": "full"}
    small = {"width": 33, "layers": 2}  # rows that two processes can't share evenly
    odd = write_hub_folder(
        folder / "odd",
        vision_cfg={**TINY_MODEL["vision_cfg"], **small, "head_width": 11},
        text_cfg={**TINY_MODEL["text_cfg"], **small, "heads": 3},
    )
    out = {name: str(folder / name) for name in names.split()}
    gpr = {**world, "method": "gpr", "distill": 0, "mixtures": 0}
    (folder / "other.txt").write_text("a red square\n" * 8)
    config = folder / "config.json"
    config.write_text(json.dumps({**gpr, "epochs": 3}))  # 9 steps, as no other job has
    appended = {"method": "appended", "distill": 0, "mixtures": 0, "epochs": 1, "resume": None}
    jobs: dict[str, dict[str, Any]] = {f"gradients {n}": {"classes": n} for n in CLASSES}
    for part in ("image", "text"):
        jobs[f"{part} step"] = {"model": f"local-dir:{odd}", "part": part}
    jobs |= {
        "whole": {"options": {**world, "out": out["whole"]}},
        "bank": {
            "options": {
                **world, **appended, "out": out["bank"], "alignment_budget": 0.9,
                "val_data": world["train_data"],
            }
        },
        "nan": {"options": {**gpr, "out": out["nan"]}, "disturb": "nan", "at": 3},
        "stopped": {"options": {**world, "out": out["stopped"]}, "disturb": "SIGTERM", "at": 3},
        "half": {"options": {**world, "out": out["half"]}, "disturb": "SIGTERM", "at": 3},
        "resumed": {"options": {**world, "out": out["stopped"]}},
        "parts": {"options": {**full, "out": out["parts"], "val_data": world["train_data"]}},
        "halted": {"options": {**full, "out": out["halted"]}, "disturb": "SIGTERM", "at": 3},
        "continued": {"options": {**full, "out": out["halted"]}},
        "remains": {"options": {**full, "out": out["remains"]}, "disturb": "SIGTERM", "at": 3},
        "mixed": {"options": {**world, "out": out["mixed"]}, "disturb": "SIGTERM", "at": 3},
        "in parts": {"options": {**full, "out": out["mixed"]}},
        "apart": {"options": {**full, "out": out["apart"]}, "apart": str(folder / "other.txt")},
        "scale": {"options": {**full, "out": out["scale"], "rea_logit_scale": True}},
        "ended": {"options": {**gpr, "out": out["ended"]}, "end": 2},
        "many": {"options": {**world, "out": out["many"], "accum_freq": 3}},
        "few": {"options": {**world, "out": out["few"], "batch_size": 7}},
        "command": {"words": ["train", "--config", str(config), "--out", str(folder / "command")]},
        "killed": {
            "options": {**world, "out": out["killed"]},
            "disturb": "SIGKILL", "at": 6, "killed_save": 8,
        },
    }  # fmt: skip
    results, said = run_jobs(folder, list(jobs.values()), restarts=2)
    return {"folder": folder, "said": said, **dict(zip(jobs, results, strict=True))}


def close(one: Any, other: Any, tolerance: float) -> bool:
    return bool((one - other).abs().max() <= tolerance * max(1.0, float(other.abs().max())))


@pytest.mark.parametrize("classes", CLASSES)
def test_a_step_has_the_gradients_of_one_process(classes: int, found: dict[str, Any]) -> None:
    whole = runs.gradients(classes)
    for own in found[f"gradients {classes}"]:
        assert close(own["loss"], whole["loss"], 1e-11)
        for one, other in zip(own["tower"], whole["tower"], strict=True):
            assert close(one, other, 1e-11)
    first, _ = found[f"gradients {classes}"]
    assert close(first["matrix"], whole["matrix"], 1e-11)


@pytest.mark.parametrize("part", ["image", "text"])
def test_a_step_of_a_divided_tower_has_the_gradients_of_one_process(
    part: str, found: dict[str, Any]
) -> None:
    whole = runs.divided_step(f"local-dir:{found['folder'] / 'odd'}", part)
    assert whole["held"] == 1
    for own in found[f"{part} step"]:
        assert own["held"] < 0.55
        assert close(own["norm"], whole["norm"], 1e-11)
        for kind in ("gradients", "weights"):
            assert own[kind].keys() == whole[kind].keys()
            for name, value in whole[kind].items():
                assert close(own[kind][name], value, 1e-11), name


@pytest.fixture(scope="module")
def one(world: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of one process, with evaluations."""
    out = tmp_path_factory.mktemp("runs") / "one"
    result = pymcip.train(**world, out=out, val_data=world["train_data"])
    assert result.steps == STEPS
    return result.out


@pytest.mark.parametrize("run", ["whole", "parts", "mixed"])
def test_a_run_is_that_of_one_process(run: str, one: Path, found: dict[str, Any]) -> None:
    """Also with divided towers, and if they are divided from the fourth step on."""
    two = found["folder"] / run
    last = {"mixed": "in parts"}.get(run, run)
    assert [result["steps"] for result in found[last]] == [STEPS, STEPS]
    mine = [x for x in computed_of(one) if run == "parts" or "evaluation" not in x]
    lines = zip(mine, computed_of(two), strict=True)
    for line, other in lines:
        assert line.keys() == other.keys()
        assert line.get("stage") == other.get("stage")
        assert line.get("caption_margin", 1) > 0
        for name in line.keys() - {"stage"}:
            tolerance = FIRST if line["global_step"] == 1 else ROUNDING
            assert other[name] == pytest.approx(line[name], rel=tolerance, abs=tolerance), name
    states = [
        load_checkpoint(checkpoint_files(out / "checkpoints")[-1])["model"] for out in (one, two)
    ]
    for name, value in states[0].items():
        assert close(states[1][name], value, ROUNDING), name
    log = (two / "out.log").read_text()
    assert "2 processes, each with 1 of a step's 2 micro-batches" in log
    assert ("divided among the processes" in log) == (run != "whole")


def test_each_process_reads_its_own_captions_alone(found: dict[str, Any]) -> None:
    half = -(-len(CAPTIONS) // 2)
    assert [result["bank_rows"] for result in found["whole"]] == [[half], [len(CAPTIONS) - half]]


def test_the_towers_stay_equal(found: dict[str, Any]) -> None:
    for name in ("whole", "bank", "nan", "ended", "resumed", "parts", "in parts"):
        first, second = (result["weights"] for result in found[name])
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_default_method_and_a_budget_run(found: dict[str, Any]) -> None:
    assert [result["steps"] for result in found["bank"]] == [3, 3]
    out = found["folder"] / "bank"
    result = json.loads((out / "result.json").read_text())
    assert result["metrics"]
    assert result["alignment"]["kept"]
    assert pymcip.load(str(out), device="cpu").embed_dim == 2 * 16  # as many appended as there are


def test_a_step_that_fails_in_one_process_is_skipped_by_all(found: dict[str, Any]) -> None:
    assert [result["skipped"] for result in found["nan"]] == [1, 1]
    assert [result["steps"] for result in found["nan"]] == [6, 6]


def test_a_signal_to_one_process_ends_all(found: dict[str, Any]) -> None:
    for result in found["stopped"]:
        assert (result["steps"], result["interrupted"]) == (3, "SIGTERM")
        assert result["checkpoint"] == "step_00000003.pt"


def test_a_callback_of_the_first_process_ends_the_stage_of_all(found: dict[str, Any]) -> None:
    assert [result["steps"] for result in found["ended"]] == [2, 2]
    assert [result["calls"] for result in found["ended"]] == [2, 0]


@pytest.mark.parametrize(("name", "later"), [("whole", "resumed"), ("parts", "continued")])
def test_it_resumes_to_the_same_bits(name: str, later: str, found: dict[str, Any]) -> None:
    for whole, resumed in zip(found[name], found[later], strict=True):
        assert resumed["steps"] == whole["steps"]
        for name, value in whole["weights"].items():
            assert torch.equal(value, resumed["weights"][name]), name


def test_what_cannot_be_shared_out_is_refused(found: dict[str, Any]) -> None:
    for result in found["many"]:
        assert "ConfigError: accum_freq=3" in result["error"]
        assert "allowed with them: accum_freq=2, 4" in result["error"]
    for result in found["few"]:
        assert "ConfigError: 12 images" in result["error"]
        assert "batch_size of 6 at most" in result["error"]
    for result in found["scale"]:
        assert "ConfigError: sharding='full' with rea_logit_scale=True" in result["error"]
        assert "allowed: rea_logit_scale=False, or sharding='none'" in result["error"]
    for result in found["apart"]:
        assert "ConfigError: the 2 processes read different captions" in result["error"]
    for name in ("many", "few", "scale", "apart"):
        assert not (found["folder"] / name).exists(), name


def test_weights_that_cannot_be_divided_are_refused(
    second: Callable[..., None], world: dict[str, Any], tmp_path: Path, tiny_clip: ClipModel
) -> None:
    second(WORLD_SIZE="2", RANK="0")
    config = settings_for(**{**world, "out": tmp_path / "run", "sharding": "full"})
    check_sharding(config, tiny_clip)
    visual: Any = tiny_clip.model.visual
    for value in (torch.nn.Parameter(torch.ones(())), visual.proj):
        visual.again = value
        with pytest.raises(ConfigError, match=r"visual\.(again|proj).*allowed: sharding='none'"):
            check_sharding(config, tiny_clip)
    del visual.again
    check_sharding(config, tiny_clip)


@pytest.mark.parametrize("name", ["half", "remains"])
def test_one_process_resumes_what_two_began(
    name: str, world: dict[str, Any], found: dict[str, Any]
) -> None:
    """Interrupted in its image stage: the class matrix, divided towers and their moments are whole."""
    out = found["folder"] / name
    state = load_checkpoint(checkpoint_files(out / "checkpoints")[-1])
    assert state["heads"]["classes.weight"].shape == (3, 16)
    (number,) = state["optimizer"]["param_groups"][-1]["params"]
    assert state["optimizer"]["state"][number]["exp_avg_sq"].shape == (3, 16)
    shapes = {tuple(values["exp_avg"].shape) for values in state["optimizer"]["state"].values()}
    assert shapes >= {
        tuple(state["model"][f"visual.{tensor}"].shape) for tensor in ("proj", "conv1.weight")
    }
    result = pymcip.train(**world, out=out)
    assert result.steps == STEPS
    for line, other in zip(computed_of(out), computed_of(found["folder"] / "whole"), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=ROUNDING)


def test_torchrun_restarts_a_run_that_lost_a_process(found: dict[str, Any]) -> None:
    """The last process in a step, then process 0 while it writes a checkpoint."""
    with pytest.raises(CheckpointError):
        load_checkpoint(found["folder"] / "killed.half")
    names = {path.name for path in (found["folder"] / "killed" / "checkpoints").iterdir()}
    assert names == {"step_00000008.pt", "step_00000010.pt"}
    for result, whole in zip(found["killed"], found["whole"], strict=True):
        assert result["steps"] == STEPS
        for name, value in whole["weights"].items():
            assert torch.equal(value, result["weights"][name]), name


@pytest.mark.skipif(not KILLS, reason="takes minutes; PYMCIP_KILLS=10 kills a run ten times")
@pytest.mark.parametrize("sharding", ["none", "full"])
def test_random_kills_change_no_bit(sharding: str, world: dict[str, Any], tmp_path: Path) -> None:
    options = {
        **world,
        "sharding": sharding,
        "epochs": 4 * KILLS,
        "rea_epochs": KILLS,
        "save_steps": 1,
    }
    jobs = [
        {"options": {**options, "out": str(tmp_path / "whole")}},
        {"options": {**options, "out": str(tmp_path / "killed")}, "kills": KILLS},
    ]
    (whole, killed), _ = run_jobs(tmp_path, jobs, restarts=KILLS, seconds=100 * KILLS)
    lines = (tmp_path / "killed.kills").read_text()
    print(lines)
    assert lines.count("process") == KILLS
    for one, other in zip(whole, killed, strict=True):
        assert one["steps"] == other["steps"]
        for name, value in one["weights"].items():
            assert torch.equal(value, other["weights"][name]), name


def test_the_command_line_has_one_voice(found: dict[str, Any]) -> None:
    assert [result["status"] for result in found["command"]] == [0, 0]
    assert found["said"].count("9 steps in") == 1
    assert found["said"].count('"steps": 9') == 1


@pytest.fixture
def second(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def environment(**values: str) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    return environment


def test_an_environment_that_is_not_torchruns_is_refused(
    second: Callable[..., None], world: dict[str, Any], tmp_path: Path
) -> None:
    options = {**world, "out": tmp_path / "run"}
    cases = [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two'"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK=2 and WORLD_SIZE=2"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "without MASTER_ADDR, MASTER_PORT"),
    ]
    for values, message in cases:
        second(**values)
        with pytest.raises(ConfigError, match=message):
            pymcip.train(**options)
