"""`pymcip.train` as users call it: methods, run folder, resuming, bad input."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch
from PIL import Image

import pymcip
from pymcip.configs import TrainConfig
from pymcip.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    OutputExistsError,
    ResourceError,
    StaleEmbeddingsError,
)
from pymcip.folders import MANIFEST
from pymcip.model import ClipModel
from pymcip.training import loop
from pymcip.training.checkpoints import checkpoint_files, load_checkpoint, save_checkpoint
from pymcip.training.text_stage import Pairs, TextStage
from tests.conftest import computed_of, files, lines_of, start_killed, train_until_killed

METHODS = ["gpr", "2sft", "mcip", "mcip+rea", "rea", "mcip+"]


@pytest.fixture
def options(run_options: dict[str, Any], captions_file: Callable[..., Path]) -> dict[str, Any]:
    """Options of a run of 2 x 3 image steps and 2 x 2 text steps."""
    return {
        **run_options,
        "captions": str(captions_file()),
        "rea_epochs": 2,
        "rea_batch_size": 6,
        "rea_lr": 1e-3,
    }


def state_of(path: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(path, weights_only=True)
    return state


@pytest.mark.parametrize("method", METHODS)
def test_methods(method: str, options: dict[str, Any], tiny_model_dir: Path) -> None:
    if method == "mcip+":
        options["alignment_budget"] = 0.999  # keeps anything
    result = pymcip.train(**options, method=method)
    before = open_clip.create_model(f"local-dir:{tiny_model_dir}").state_dict()
    after = state_of(result.state_dict)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    trains_image, trains_text = method != "rea", method not in ("gpr", "mcip")
    image = {name for name in before if name.startswith("visual.")}
    text = set(before) - image - {"logit_scale", "attn_mask"}
    assert changed & image == (image if trains_image else set())
    # token rows that no caption uses stay; the matrix as a whole changes
    assert changed & text == (text if trains_text else set())
    assert result.steps == 6 * trains_image + 4 * trains_text
    assert result.skipped_steps == 0
    assert result.interrupted is None
    records = [record for record in lines_of(result.out) if "loss" in record]
    assert [record["global_step"] for record in records] == list(range(1, result.steps + 1))
    stages = ["image"] * (6 * trains_image) + ["text"] * (4 * trains_text)
    assert [record["stage"] for record in records] == stages
    assert ("caption_margin" in records[0]) == (method.startswith("mcip"))
    names = {path.name for path in result.out.iterdir()}
    assert {"config.json", "out.log", "metrics.jsonl", "checkpoints", "exported"} <= names
    loaded = pymcip.load(str(result.out), device="cpu", precision="fp32")
    for name, value in loaded.model.state_dict().items():
        assert torch.equal(value, after[name])


def test_loss_falls_and_embeddings_separate(options: dict[str, Any]) -> None:
    result = pymcip.train(
        **{**options, "epochs": 15, "val_data": options["train_data"]}, method="gpr"
    )
    losses = [record["loss"] for record in lines_of(result.out) if "loss" in record]
    assert np.mean(losses[-6:]) < 0.7 * np.mean(losses[:6])
    assert result.metrics["i2i_map"] > result.before["i2i_map"]


def test_discarded_projector_is_realigned_and_loads(options: dict[str, Any]) -> None:
    result = pymcip.train(**options, method="2sft", projector="discard")
    model = open_clip.create_model(f"local-dir:{result.hub}")
    assert model.visual.proj.shape[0] == model.visual.proj.shape[1] == 32
    assert torch.equal(model.visual.proj, torch.eye(32))
    assert model.encode_text(torch.zeros(1, 16, dtype=torch.int64)).shape == (1, 32)


def test_several_sources_have_their_own_classes(
    options: dict[str, Any], tiny_images: Callable[..., Path]
) -> None:
    second = tiny_images("second", classes=2)
    sources = [options["train_data"], str(second)]
    result = pymcip.train(
        **{**options, "train_data": sources, "train_weights": (1.0, 2.0), "class_balanced": True},
        method="gpr",
    )
    state = load_checkpoint(checkpoint_files(result.checkpoint.parent)[0])
    assert state["heads"]["classes.weight"].shape == (5, 16)


def test_validation_marks_the_best_checkpoint(options: dict[str, Any]) -> None:
    result = pymcip.train(**{**options, "val_data": options["train_data"]}, method="mcip")
    evaluations = [record for record in lines_of(result.out) if "evaluation" in record]
    assert [record["global_step"] for record in evaluations] == [0, 3, 6]
    assert result.metrics == evaluations[-1]["evaluation"]
    assert result.before == evaluations[0]["evaluation"]
    assert result.best_checkpoint is not None
    scores = [
        np.mean(
            [r["evaluation"][k] for k in ("i2i_map", "zero_shot", "t2i_r5") if k in r["evaluation"]]
        )
        for r in evaluations[1:]
    ]
    best = load_checkpoint(result.best_checkpoint)
    assert best["global_step"] == (3, 6)[int(np.argmax(scores))]


# --- resuming -----------------------------------------------------------------------------------


def final_states(out: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    state = load_checkpoint(checkpoint_files(out / "checkpoints")[-1])
    return state, state_of(out / "exported" / "state_dict.pt")


def assert_same_run(first: Path, second: Path) -> None:
    """Weights, class matrix, optimizer, random states and logged numbers, bit for bit."""
    for one, other in zip(final_states(first), final_states(second), strict=True):
        assert_equal(one, other)
    assert computed_of(first) == computed_of(second)


def assert_equal(one: Any, other: Any) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b)
    else:
        assert one == other


def test_resumed_after_sigkill_gives_the_same_bits(options: dict[str, Any], tmp_path: Path) -> None:
    """Killed at three random steps, in either stage, and resumed each time."""
    options = {**options, "method": "mcip+rea", "epochs": 3, "precision": "amp_bf16", "workers": 0}
    generator = random.Random(os.getpid())
    points = sorted(generator.sample(range(1, 14), 3))
    killed = {**options, "out": str(tmp_path / "killed"), "resume": "latest"}
    children = [start_killed(point, killed, tmp_path) for point in points]
    whole = pymcip.train(**options)
    assert whole.steps == 13
    for child in children:
        train_until_killed(child)
    resumed = pymcip.train(**killed)
    assert resumed.steps == whole.steps, points
    assert_same_run(whole.out, resumed.out)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_signals_write_a_checkpoint_and_end_cleanly(
    name: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**options, "method": "mcip", "save_steps": 1000}
    whole = pymcip.train(**options)
    stopped = {**options, "out": str(tmp_path / "stopped")}
    inner = loop.optimizer_step

    def signalled(run: Any, stage: Any, micro_batches: Any) -> dict[str, float]:
        if run.position.global_step == 1:
            os.kill(os.getpid(), getattr(signal, name))
        return inner(run, stage, micro_batches)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "optimizer_step", signalled)
        result = pymcip.train(**stopped)
    assert signal.getsignal(signal.SIGTERM) is before
    assert result.interrupted == name
    assert result.hub is None
    assert load_checkpoint(result.checkpoint)["global_step"] == 2
    resumed = pymcip.train(**stopped, resume="latest")
    assert resumed.interrupted is None
    assert_same_run(whole.out, resumed.out)


def test_resuming_a_finished_run_returns_its_result(options: dict[str, Any]) -> None:
    result = pymcip.train(**options, method="gpr")
    again = pymcip.train(**options, method="gpr", resume="latest")
    assert again == result


def test_a_run_folder_can_be_moved(options: dict[str, Any], tmp_path: Path) -> None:
    result = pymcip.train(**options, method="gpr")
    moved = result.out.rename(tmp_path / "moved")
    again = pymcip.train(**{**options, "out": moved}, method="gpr", resume="latest")
    assert again.hub == moved / "exported" / "hub"
    assert again.checkpoint.is_file()


def test_resume_refuses_other_options_and_other_models(options: dict[str, Any]) -> None:
    result = pymcip.train(**options, method="gpr")
    with pytest.raises(ConfigError, match=r"lr: was 0\.001, now 0\.002"):
        pymcip.train(**{**options, "lr": 2e-3}, method="gpr", resume="latest")
    (result.out / "result.json").unlink()
    path = checkpoint_files(result.out / "checkpoints")[-1]
    state = load_checkpoint(path)
    state["model"].pop("visual.proj")
    save_checkpoint(path.parent, state)
    with pytest.raises(CheckpointError, match="holds another model"):
        pymcip.train(**options, method="gpr", resume="latest")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="can't be read"):
        pymcip.train(**options, method="gpr", resume="latest")


def test_resume_refuses_other_inputs_by_name(
    options: dict[str, Any], captions_file: Callable[..., Path], hub_folder: Callable[..., Path]
) -> None:
    model = hub_folder("model")
    options = {**options, "model": f"local-dir:{model}", "val_data": options["train_data"]}
    result = pymcip.train(**options, method="mcip")
    (result.out / "result.json").unlink()  # killed at its end

    def refused(match: str, undo: Callable[[], object]) -> None:
        with pytest.raises(StaleEmbeddingsError, match=f"was started with other .*{match}"):
            pymcip.train(**options, method="mcip", resume="latest")
        undo()

    picture = Path(options["train_data"]) / "class0" / "0.jpg"
    content, status = picture.read_bytes(), picture.stat()
    picture.write_bytes(content[:-3] + b"x" + content[-2:])
    os.utime(picture, ns=(status.st_atime_ns, status.st_mtime_ns))
    refused("images of train_data.* images of val_data", lambda: picture.write_bytes(content))
    captions_file(["other words", "and more"])
    refused("captions", captions_file)
    weights = model / "open_clip_model.safetensors"
    before = weights.read_bytes()
    state = safetensors.torch.load_file(weights)
    safetensors.torch.save_file({k: v + 1 for k, v in state.items()}, weights)
    refused("weights of model", lambda: weights.write_bytes(before))


def test_resume_refuses_a_folder_that_is_no_run(options: dict[str, Any]) -> None:
    out = Path(options["out"])
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="no pymcip run"):
        pymcip.train(**options, method="gpr", resume="latest")
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


def test_a_run_killed_while_exporting_keeps_its_metrics(options: dict[str, Any]) -> None:
    """Nothing is left to train or evaluate, so both come from what the run has written."""
    options = {**options, "val_data": options["train_data"], "method": "gpr"}
    result = pymcip.train(**options)
    (result.out / "result.json").unlink()
    log = (result.out / "metrics.jsonl").read_text()
    resumed = pymcip.train(**options, resume="latest")
    assert resumed.metrics == result.metrics
    assert resumed.before == result.before
    assert (result.out / "metrics.jsonl").read_text() == log


def test_checkpoints_are_pruned_and_hold_no_code(options: dict[str, Any]) -> None:
    result = pymcip.train(**{**options, "save_steps": 1}, method="gpr")
    folder = result.out / "checkpoints"
    assert len(checkpoint_files(folder)) == 2
    assert not list(folder.glob(".*"))
    for path in checkpoint_files(folder):
        torch.load(path, weights_only=True)


def test_a_full_disk_leaves_the_last_checkpoint_whole(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = torch.save
    calls = []

    def full(state: Any, handle: Any, **rest: Any) -> None:
        calls.append(handle)
        if len(calls) == 3:
            handle.write(b"half of a checkpoint")
            raise OSError(28, "No space left on device")
        inner(state, handle, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(ResourceError, match=r"No space left.*run the same command again"):
            pymcip.train(**options, method="gpr")
    folder = Path(options["out"]) / "checkpoints"
    files = checkpoint_files(folder)
    assert len(files) == 2
    assert len(list(folder.iterdir())) == 2
    for path in files:
        load_checkpoint(path)
    resumed = pymcip.train(**options, method="gpr", resume="latest")
    assert resumed.steps == 6


# --- bad input ----------------------------------------------------------------------------------


def test_a_filled_output_folder_is_refused(options: dict[str, Any]) -> None:
    out = Path(options["out"])
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="not empty"):
        pymcip.train(**options, method="gpr")
    with pytest.raises(OutputExistsError, match=r"precious\.txt, which pymcip did not write"):
        pymcip.train(**options, method="gpr", overwrite=True)
    assert files(out) == {"precious.txt": b"mine"}


def test_overwrite_removes_what_the_run_wrote_and_nothing_else(options: dict[str, Any]) -> None:
    out = pymcip.train(**options, method="mcip").out
    written = {name for name in files(out) if name != MANIFEST}
    (out / "exported" / "notes.txt").write_text("mine")
    (out / "slurm.log").write_text("mine")
    other = pymcip.train(**{**options, "lr": 1e-4}, method="gpr", overwrite=True)
    left = files(out)
    assert left["exported/notes.txt"] == left["slurm.log"] == b"mine"
    assert not any(name.startswith("mined/") for name in left)
    assert other.steps == 6
    assert {"mined", "embeddings"} <= {name.split("/")[0] for name in written}


def test_bad_input_writes_nothing(options: dict[str, Any], tmp_path: Path) -> None:
    names = tmp_path / "names.tsv"
    names.write_text("class0\tapple\nclass1\tpear\n", encoding="utf-8")
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"train_data": str(tmp_path / "absent")}, DataError, "absent"),
        ({"captions": str(tmp_path / "absent.txt")}, DataError, "absent"),
        ({"model": "local-dir:/absent"}, ConfigError, "open_clip_config.json"),
        ({"model": "ViT-B-32", "pretrained": None}, ConfigError, "random weights"),
        ({"aug_cfg": {"zoom": 2}}, ConfigError, "zoom"),
        ({"device": "cuda:77"}, ConfigError, "cuda:77"),
        ({"rea_data": options["train_data"], "method": "rea"}, DataError, "no captions"),
        (
            {"rea_class_names": str(names), "method": "mcip+rea"},
            DataError,
            "no row for 1 of .* 'class2'",
        ),
    ]
    for change, kind, message in cases:
        with pytest.raises(kind, match=message):
            pymcip.train(**{"method": "mcip", **options, **change})
        assert not Path(options["out"]).exists()


def test_overwrite_does_not_remove_what_is_read(options: dict[str, Any]) -> None:
    images = Path(options["train_data"])
    with pytest.raises(OutputExistsError, match="is read from the output folder"):
        pymcip.train(**{**options, "out": str(images.parent), "overwrite": True}, method="gpr")
    run = pymcip.train(**options, method="gpr").out
    picture = run / "exported" / "hub" / "0.jpg"  # such as a demo's own pictures
    picture.write_bytes((images / "class0" / "0.jpg").read_bytes())
    with (run / MANIFEST).open("a") as listed:
        listed.write('"exported/hub/0.jpg"\n')
    (images / "class0" / "0.jpg").unlink()
    (images / "class0" / "0.jpg").symlink_to(picture)
    with pytest.raises(OutputExistsError, match="is read from the output folder"):
        pymcip.train(**options, method="gpr", overwrite=True)
    assert picture.exists()


def test_zero_captions_over_the_threshold(options: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="threshold"):
        pymcip.train(**{**options, "threshold": 1.0}, method="mcip")


def test_undecodable_images_are_left_out_and_listed(options: dict[str, Any]) -> None:
    broken = Path(options["train_data"]) / "class1" / "0.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    result = pymcip.train(**options, method="mcip")
    skipped = list(result.out.glob("embeddings/images-*/skipped.tsv"))
    assert "class1/0.jpg" in skipped[0].read_text()


def test_a_class_that_loses_all_its_images_is_named(options: dict[str, Any]) -> None:
    for path in (Path(options["train_data"]) / "class1").iterdir():
        path.write_bytes(b"not an image")
    with pytest.raises(DataError, match="class1"):
        pymcip.train(**options, method="gpr")


def test_realignment_on_given_pairs(
    options: dict[str, Any], shards: Callable[..., list[Path]]
) -> None:
    pairs = shards()
    result = pymcip.train(
        **{**options, "captions": None, "rea_data": str(pairs[0].parent)}, method="2sft"
    )
    assert result.steps == 6 + 4


def test_realignment_with_class_names(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each image has the prompts of its own class's name, beside its pseudo-captions."""
    table = tmp_path / "names.tsv"  # in another order, and with a class that has no images
    table.write_text("class2\tfig\nother\tnut\nclass0\tapple\nclass1\tfig\n", encoding="utf-8")
    found = []

    inner = TextStage.__init__

    def noted(self: TextStage, clip: ClipModel, pairs: Pairs, config: TrainConfig) -> None:
        found.append(pairs)
        inner(self, clip, pairs, config)

    monkeypatch.setattr(TextStage, "__init__", noted)
    changes = {"rea_class_names": str(table), "rea_templates": ("a {}", "{}, a fruit", "{}")}
    result = pymcip.train(**{**options, **changes}, method="mcip+rea")
    assert result.steps == 6 + 4
    (pairs,) = found
    assert pairs.names is not None
    assert len(set(pairs.texts)) == len(pairs.texts)
    prompts = [["a apple", "apple, a fruit", "apple"], ["a fig", "fig, a fruit", "fig"]]
    expected = [prompts[min(label, 1)] for label in range(3) for _ in range(4)]
    assert [[pairs.texts[i] for i in row] for row in pairs.names] == expected
    captions = {pairs.texts[i] for i in pairs.captions.ids}
    assert captions
    assert not captions & {prompt for row in prompts for prompt in row}


def test_gradient_checkpointing_and_accumulation_run(options: dict[str, Any]) -> None:
    result = pymcip.train(
        **{**options, "batch_size": 3, "rea_batch_size": 3},
        method="mcip+rea",
        grad_checkpointing=True,
        accum_freq=2,
    )
    assert result.steps == 2 * 2 + 2 * 2


def test_convolutional_tower_with_batch_norm(
    options: dict[str, Any], tmp_path: Path, hub_folder: Callable[..., Path]
) -> None:
    """A timm tower: its running statistics change in training and stay with freeze_bn_stats."""
    vision = {
        "timm_model_name": "test_efficientnet",
        "timm_model_pretrained": False,
        "timm_pool": "avg",
        "timm_proj": "linear",
        "image_size": 32,
    }
    folder = hub_folder("timm", vision_cfg=vision)
    before = open_clip.create_model(f"local-dir:{folder}").state_dict()
    for freeze in (False, True):
        result = pymcip.train(
            **{**options, "model": f"local-dir:{folder}", "out": str(tmp_path / f"run{freeze}")},
            method="gpr",
            freeze_bn_stats=freeze,
        )
        after = state_of(result.state_dict)
        names = [name for name in before if name.endswith("running_mean")]
        assert names
        assert all(torch.equal(before[name], after[name]) == freeze for name in names)


def test_image_size_can_be_changed(options: dict[str, Any]) -> None:
    result = pymcip.train(**options, method="gpr", image_size=48)
    clip = pymcip.load(str(result.out), device="cpu", precision="fp32")
    pixels = clip.preprocess_val(Image.new("RGB", (60, 60)))
    assert pixels.shape == (3, 48, 48)
    assert clip.encode_images(pixels[None]).shape == (1, 16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("workers", [0, 2])
def test_gpu_training_with_bf16(workers: int, options: dict[str, Any]) -> None:
    options = {**options, "device": "cuda", "precision": "amp_bf16", "workers": workers}
    result = pymcip.train(**{**options, "val_data": options["train_data"]}, method="mcip+rea")
    assert result.steps == 6 + 4
    assert result.skipped_steps == 0
    on_cpu = pymcip.load(str(result.out), device="cpu", precision="fp32")
    for value in on_cpu.model.state_dict().values():
        assert torch.isfinite(value).all()
