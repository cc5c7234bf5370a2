"""The alignment budget in whole runs: what is exported, sources of the probe, resuming."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import pymcip
from pymcip.data import load_images
from pymcip.errors import ConfigError, DataError
from pymcip.model import load
from pymcip.training.budget import AlignmentBudget
from pymcip.training.checkpoints import load_checkpoint
from pymcip.training.interpolation import interpolated
from pymcip.training.probe import AlignmentProbe, Kept
from pymcip.training.probe_sources import load_probe_sources, probe_pixels, probe_rows
from tests.conftest import computed_of, lines_of, picture, start_killed, train_until_killed
from tests.probe_cases import TEXTS, THINGS, drawn_accuracy


def drawn_candidates(similarities: np.ndarray, right: np.ndarray) -> int:
    """How many candidates make the task neither too hard nor, below 8, a matter of luck."""
    for candidates in (64, 32, 16):
        if drawn_accuracy(similarities, right, candidates) >= 0.5:
            return candidates
    return 8


@pytest.fixture
def options(run_options: dict[str, Any], captions_file: Callable[..., Path]) -> dict[str, Any]:
    """Options of a run of 2 x 3 steps whose budget bites."""
    return {
        **run_options,
        "captions": str(captions_file(TEXTS)),
        "lr": 1e-2,
        "rea_epochs": 2,
        "rea_batch_size": 6,
        "rea_lr": 1e-5,
        "alignment_budget": 0.05,
    }


def remeasured(options: dict[str, Any], hub: Path) -> float:
    """What the exported model keeps on the run's probe, made again from its definition."""
    original, tuned = (
        load(name, device="cpu", precision="fp32")
        for name in (options["model"], f"local-dir:{hub}")
    )
    pixels, _ = probe_pixels(original, None, load_images(options["train_data"]), 32, 0, 0)
    texts = [TEXTS[row] for row in probe_rows(len(TEXTS), 0)]
    probe = AlignmentProbe(original, pixels, texts, seed=0)
    return probe.measure(tuned, texts=True).alignment


@pytest.mark.parametrize("method", ["mcip", "gpr", "mcip+rea"])
def test_exported_model_keeps_the_budget(method: str, options: dict[str, Any]) -> None:
    result = pymcip.train(**options, method=method)
    found = result.alignment
    assert found is not None
    assert result.hub is not None
    assert found["respected"]
    assert 0 < found["coefficient"] < 1
    assert found["kept_tuned"] < 0.95 <= found["kept"]
    assert [found["coefficient"], found["kept"]] in found["tried"]
    # the probe of mcip has the stored, rounded vectors of its captions
    assert remeasured(options, result.hub) == pytest.approx(found["kept"], abs=2e-3)
    assert found["probe"]["images"] == 32
    assert found["probe"]["captions"] == 64
    records = [record for record in lines_of(result.out) if "alignment" in record]
    steps = [3, 6, 8, 10] if method == "mcip+rea" else [3, 6]
    assert [record["global_step"] for record in records] == steps
    by_epoch = [Kept(**record["alignment"]).alignment for record in records]
    assert by_epoch == found["kept_by_epoch"]
    assert by_epoch[-1] == found["kept_tuned"]
    assert json.loads((result.out / "alignment.json").read_text()) == found
    assert pymcip.train(**options, method=method, resume="latest") == result


@pytest.mark.parametrize("tower", ["vit", "timm"])
def test_exported_weights_lie_between(
    tower: str, options: dict[str, Any], hub_folder: Callable[..., Path]
) -> None:
    """Of both kinds of tower, batch norms' statistics included."""
    options = {**options, "val_data": options["train_data"], "method": "mcip"}
    if tower == "timm":
        vision = {
            "timm_model_name": "test_efficientnet",
            "timm_model_pretrained": False,
            "timm_pool": "avg",
            "timm_proj": "linear",
            "image_size": 32,
        }
        options |= {"model": f"local-dir:{hub_folder('timm', vision_cfg=vision)}"}
        options |= {"lr": 2e-3, "alignment_budget": 0.2, "freeze_bn_stats": False}
    result = pymcip.train(**options)
    tuned = load_checkpoint(result.checkpoint)["model"]  # as trained: to be searched again
    assert result.alignment is not None
    assert 0 < result.alignment["coefficient"] < 1
    original = load(options["model"], device="cpu", precision="fp32").model.state_dict()
    expected = interpolated(original, tuned, result.alignment["coefficient"])
    exported = torch.load(result.state_dict, weights_only=True)
    assert expected.keys() == exported.keys()
    assert all(torch.equal(value, expected[name]) for name, value in exported.items())
    changed = {name for name in exported if not torch.equal(exported[name], original[name])}
    assert {name for name in tuned if not torch.equal(tuned[name], original[name])} == changed
    assert any("running_var" in name for name in changed) == (tower == "timm")
    measured = pymcip.evaluate(
        str(result.out), data=options["val_data"], device="cpu", precision="fp32"
    ).metrics
    assert result.metrics == {name: measured[name] for name in result.metrics}


def test_a_generous_budget_changes_nothing(options: dict[str, Any], tmp_path: Path) -> None:
    plain = pymcip.train(**{**options, "alignment_budget": None}, method="gpr")
    assert plain.alignment is None
    assert not (plain.out / "alignment.json").exists()
    for budget in (0.999999, 1.0):
        kept = pymcip.train(
            **{**options, "alignment_budget": budget, "out": tmp_path / f"{budget}"}, method="gpr"
        )
        one, other = (torch.load(run.state_dict, weights_only=True) for run in (plain, kept))
        assert all(torch.equal(value, other[name]) for name, value in one.items())
        if budget < 1:
            assert kept.alignment is not None
            assert kept.alignment["coefficient"] == 1
        else:
            assert kept.alignment is None


def test_a_budget_that_nothing_keeps_exports_nothing(
    options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    options = {**options, "alignment_budget": 0.0, "lr": 1.0, "method": "mcip"}
    result = pymcip.train(**options)
    assert result.alignment is not None
    assert not result.alignment["respected"]
    assert result.alignment["coefficient"] == 0
    assert result.alignment["kept"] is None
    assert result.alignment["standard_error"] is None
    assert len(result.alignment["tried"]) == 8
    assert result.hub is None
    assert result.state_dict is None
    assert result.interrupted is None
    assert not (result.out / "exported").exists()
    assert result.checkpoint.is_file()
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert any("nothing is exported" in text and "Lower lr" in text for text in warnings)
    assert pymcip.train(**options, resume="latest") == result


def test_probe_of_ones_own(
    options: dict[str, Any], tiny_images: Callable[..., Path], tmp_path: Path
) -> None:
    own = tiny_images("own", classes=5)
    (tmp_path / "names.tsv").write_text("0\tred square\n1\tgreen square\n2\tdog\n3\tdog\n")
    sources = {"probe_data": str(own), "probe_class_names": str(tmp_path / "names.tsv")}
    result = pymcip.train(**{**options, **sources, "captions": None}, method="gpr")
    assert result.alignment is not None
    assert result.alignment["probe"] == {
        "images": 20,
        "captions": 3,
        "source": "probe_data, probe_class_names",
    }
    (tmp_path / "own.txt").write_text("one caption\nand another\n")
    result = pymcip.train(
        **{**options, "out": tmp_path / "second", "probe_captions": str(tmp_path / "own.txt")},
        method="rea",
    )
    assert result.alignment is not None
    assert result.alignment["probe"]["captions"] == 2


def probe_shards(shards: Callable[..., list[Path]], **changes: Any) -> str:
    """24 images of 4 classes; every third caption is that of another image too."""
    samples = []
    for index in range(24):
        number = index - 1 if index % 3 == 1 else index
        text = f"a photo of a {THINGS[index % 4]}, number {number}"
        samples.append({"jpg": picture(index), "cls": index % 4, "txt": text, **changes})
    return str(shards(samples, name="probe", per_shard=12)[0].parent / "*.tar")


def test_captions_of_the_probe_are_the_truth(
    options: dict[str, Any], shards: Callable[..., list[Path]]
) -> None:
    options = {**options, "captions": None, "probe_data": probe_shards(shards), "lr": 1e-3}
    options["alignment_budget"] = 0.9
    config = pymcip.TrainConfig(**options, method="gpr")
    sources = load_probe_sources(config, None)
    assert sources is not None
    assert sources.images is not None
    rows = np.array([3, 4, 0])
    texts, right = sources.answers(rows)
    assert texts == list(dict.fromkeys(sources.images.titles(row)[0] for row in rows))
    assert [[texts[text] for text in own] for own in right] == [
        list(sources.images.titles(row)) for row in rows
    ]
    result = pymcip.train(**options, method="gpr")
    found = result.alignment
    assert found is not None
    titles = {title for row in range(24) for title in sources.images.titles(row)}
    assert found["probe"] == {
        "images": 24,
        "captions": len(titles),
        "source": "probe_data with their own captions",
    }
    assert result.hub is not None
    original, tuned = (
        load(name, device="cpu", precision="fp32")
        for name in (options["model"], f"local-dir:{result.hub}")
    )
    asked = sorted(titles)
    mask = np.array([[text in sources.images.titles(row) for text in asked] for row in range(24)])
    before, after = (
        (clip.encode_images(images.half().float()) @ clip.encode_texts(asked).T).numpy()
        for clip in (original, tuned)
        for images in [
            torch.stack([clip.preprocess_val(sources.images.read(row)) for row in range(24)])
        ]
    )
    to_text = drawn_candidates(before, mask)
    back = drawn_candidates(before.T, mask.T)
    ratios = np.array(
        [
            drawn_accuracy(after, mask, to_text) / drawn_accuracy(before, mask, to_text),
            drawn_accuracy(after.T, mask.T, back) / drawn_accuracy(before.T, mask.T, back),
        ]
    )
    assert found["image_to_text"] == pytest.approx(ratios[0], abs=1e-9)
    assert found["text_to_image"] == pytest.approx(ratios[1], abs=1e-9)
    assert found["kept"] == pytest.approx(ratios.min(), abs=1e-9)
    assert 0 < found["standard_error"] < 1


def test_classes_of_the_probe_are_the_truth(
    options: dict[str, Any], shards: Callable[..., list[Path]], tmp_path: Path
) -> None:
    names = tmp_path / "names.tsv"
    names.write_text("0\tred square\n1\tgreen square\n2\tdog\n3\tdog\n4\tcup\n")
    options = {**options, "probe_data": probe_shards(shards), "probe_class_names": str(names)}
    sources = load_probe_sources(pymcip.TrainConfig(**options, method="gpr"), None)
    assert sources is not None
    assert sources.images is not None
    assert sources.description == "probe_data with their own classes"
    texts, right = sources.answers(np.arange(24))
    assert texts == ["red square", "green square", "dog", "cup"]
    labels = [sources.images.class_names[label] for label in sources.images.labels]
    assert right == [[min(int(label), 2)] for label in labels]
    result = pymcip.train(**options, method="gpr")
    assert result.alignment is not None
    assert result.alignment["probe"]["captions"] == 4
    names.write_text("0\tred square\n1\tgreen square\n2\tdog\n")  # not all labels have names
    sources = load_probe_sources(pymcip.TrainConfig(**options, method="gpr"), None)
    assert sources is not None
    assert sources.truth is None


def test_captions_given_are_asked_for_instead_of_the_images_own(
    options: dict[str, Any], shards: Callable[..., list[Path]], tmp_path: Path
) -> None:
    given = {"probe_data": probe_shards(shards), "probe_captions": options["captions"]}
    config = pymcip.TrainConfig(**{**options, **given}, method="gpr")
    sources = load_probe_sources(config, None)
    assert sources is not None
    assert sources.truth is None
    assert sources.description == "probe_data, probe_captions"


def test_a_probe_without_texts(options: dict[str, Any], shards: Callable[..., list[Path]]) -> None:
    source = probe_shards(shards, txt="the same")
    options = {**options, "captions": None, "probe_data": source, "method": "gpr"}
    with pytest.raises(DataError, match="no captions, or all the same one; give captions="):
        pymcip.train(**options)
    assert not Path(options["out"]).exists()


# --- resuming -----------------------------------------------------------------------------------


def assert_same_run(first: pymcip.TrainResult, second: pymcip.TrainResult) -> None:
    """Exported bits and the tuned weights before, logged numbers, the search."""
    one, other = (torch.load(run.state_dict, weights_only=True) for run in (first, second))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    one, other = (load_checkpoint(run.checkpoint)["model"] for run in (first, second))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert computed_of(first.out) == computed_of(second.out)
    assert first.alignment is not None
    assert second.alignment is not None
    assert {**first.alignment, "seconds": 0} == {**second.alignment, "seconds": 0}
    assert first.metrics == second.metrics


def test_resumed_after_sigkill_gives_the_same_bits(options: dict[str, Any], tmp_path: Path) -> None:
    options = {**options, "method": "mcip", "epochs": 3}
    options |= {"val_data": options["train_data"], "precision": "amp_bf16"}
    killed = {**options, "out": str(tmp_path / "killed"), "resume": "latest"}
    child = start_killed(random.SystemRandom().randrange(4, 10), killed, tmp_path)
    whole = pymcip.train(**options)
    train_until_killed(child)
    assert_same_run(whole, pymcip.train(**killed))


@pytest.mark.parametrize("where", ["after_epoch", "keep"])
def test_resumed_after_a_kill_while_probing(
    where: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**options, "method": "mcip", "val_data": options["train_data"]}
    whole = pymcip.train(**options)
    stopped = {**options, "out": str(tmp_path / "stopped")}

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(AlignmentBudget, where, stop)
        with pytest.raises(KeyboardInterrupt):
            pymcip.train(**stopped)
    assert not (tmp_path / "stopped" / "result.json").exists()
    assert_same_run(whole, pymcip.train(**stopped, resume="latest"))


# --- bad options --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alignment_budget": -0.1}, "alignment_budget=-0.1"),
        ({"alignment_budget": 1.5}, "alignment_budget=1.5 is not allowed; it must be <= 1"),
        ({"method": "2sft", "projector": "discard"}, "gives up the joint"),
        ({"method": "gpr", "captions": None}, "give captions=, probe_captions= or probe_class"),
        ({"alignment_budget": None, "probe_data": "x"}, "probe_data is for a budget"),
        ({"alignment_budget": None, "probe_captions": "x"}, "probe_captions is for a budget"),
        ({"probe_captions": "x", "probe_class_names": "y"}, "exclude each other"),
    ],
)
def test_bad_options(changes: dict[str, Any], message: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=message):
        pymcip.train(**{**options, **changes})
    assert not Path(options["out"]).exists()


def test_the_recipe_has_a_budget(options: dict[str, Any]) -> None:
    plain = {name: value for name, value in options.items() if name != "alignment_budget"}
    config = pymcip.TrainConfig(**plain, method="mcip+", probe_data="x")
    assert config.alignment_budget is None
    assert config.budget == 0.02
    with pytest.raises(ConfigError, match="probe_data is for a budget"):
        pymcip.TrainConfig(**plain, method="mcip", probe_data="x")


def test_bad_sources_are_refused_before_any_work(options: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("a single caption\n")
    (tmp_path / "one.tsv").write_text("0\tdog\n1\tdog\n")
    (tmp_path / "single").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "single" / "one.jpg")
    for changes, message in [
        ({"captions": str(tmp_path / "one.txt")}, "1 captions, too few"),
        ({"probe_captions": str(tmp_path / "one.txt")}, "holds one caption"),
        ({"probe_class_names": str(tmp_path / "one.tsv")}, "holds one name"),
        ({"probe_data": str(tmp_path / "single")}, "holds one image"),
        ({"probe_data": str(tmp_path / "nowhere")}, "nowhere"),
    ]:
        with pytest.raises(DataError, match=message):
            pymcip.train(**{**options, **changes}, method="gpr")
    assert not Path(options["out"]).exists()


def test_the_probe_is_not_overwritten(
    options: dict[str, Any], tiny_images: Callable[..., Path]
) -> None:
    inside = tiny_images("run/probe")
    with pytest.raises(pymcip.errors.OutputExistsError, match="overwrite would remove"):
        pymcip.train(**options, method="gpr", probe_data=str(inside), overwrite=True)
    assert inside.is_dir()
