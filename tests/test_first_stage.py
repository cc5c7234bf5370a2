"""Two-stage methods that take their first stage from a finished run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import pymcip
from pymcip.errors import ConfigError, DamagedFileError
from pymcip.training import train


@pytest.fixture
def options(
    tmp_path: Path,
    tiny_model_dir: Path,
    tiny_images: Callable[..., Path],
    captions_file: Callable[..., Path],
) -> dict[str, Any]:
    return {
        "model": f"local-dir:{tiny_model_dir}",
        "train_data": str(tiny_images("train")),
        "val_data": str(tiny_images("val")),
        "captions": str(captions_file()),
        "threshold": -1.0,
        "k": 2,
        "device": "cpu",
        "precision": "fp32",
        "workers": 0,
        "epochs": 1,
        "batch_size": 4,
        "lr": 1e-3,
        "warmup": 1,
        "rea_epochs": 1,
        "rea_batch_size": 6,
        "freeze_bn_stats": False,
        "cache": tmp_path / "cache",
    }


def weights(result: pymcip.TrainResult) -> dict[str, torch.Tensor]:
    assert result.state_dict is not None
    state: dict[str, torch.Tensor] = torch.load(result.state_dict, weights_only=True)
    return state


def evaluations(out: Path) -> list[Any]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [(line["global_step"], line["evaluation"]) for line in lines if "evaluation" in line]


@pytest.mark.parametrize(
    ("first", "method", "more"),
    [
        ("gpr", "2sft", {}),
        ("gpr", "2sft", {"projector": "discard", "class_init": "random"}),
        ("mcip", "mcip+rea", {"distill": 1.0, "patch_dropout": 0.2}),
    ],
)
def test_the_result_is_that_of_both_stages_in_one_run(
    options: dict[str, Any], tmp_path: Path, first: str, method: str, more: dict[str, Any]
) -> None:
    options |= more
    whole = train(**options, method=method, out=tmp_path / "whole")
    given = {**options, "out": tmp_path / "first", "method": first}
    if method == "2sft":
        del given["captions"]  # which gpr doesn't use
    begun = train(**given)
    second = train(**options, method=method, out=tmp_path / "second", first_stage=begun.out)
    one, other, tuned = weights(whole), weights(second), weights(begun)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert any(not torch.equal(one[name], tuned[name]) for name in one)
    assert (second.steps, second.metrics, second.before) == (
        whole.steps,
        whole.metrics,
        whole.before,
    )
    assert evaluations(second.out) == evaluations(whole.out)
    again = train(**options, method=method, out=second.out, first_stage=begun.out, resume="latest")
    assert again == second


def test_another_run_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    first = train(**options, method="gpr", out=tmp_path / "first")
    two = {**options, "method": "2sft", "out": tmp_path / "second", "first_stage": first.out}
    for changes, message in (
        ({"lr": 2e-3, "seed": 1}, r"lr: was 0\.001, now 0\.002; seed: was 0, now 1"),
        ({"method": "mcip+rea"}, "method: was 'gpr', now 'mcip'"),
        ({"first_stage": tmp_path}, r"holds no result\.json, so it is no finished run"),
        ({"method": "mcip"}, "first_stage= is for 2sft and mcip"),
        ({"alignment_budget": 0.1}, "without alignment_budget"),
    ):
        with pytest.raises(ConfigError, match=message):
            train(**{**two, **changes})
    image = next(Path(options["train_data"]).rglob("*.jpg"))
    Image.new("RGB", (32, 32), (1, 2, 3)).save(image)
    with pytest.raises(ConfigError, match="is not the first stage of this one: other images of"):
        train(**two)
    assert not (tmp_path / "second").exists()


def test_names_of_classes_that_are_held_out(
    options: dict[str, Any], tmp_path: Path, tiny_images: Callable[..., Path]
) -> None:
    many = {**options, "val_data": None, "train_data": str(tiny_images("many", classes=8))}
    first = train(**many, method="gpr", out=tmp_path / "first")
    (tmp_path / "names.tsv").write_text("".join(f"class{i}\tname {i}\n" for i in range(8)))
    named = {"method": "2sft", "rea_class_names": tmp_path / "names.tsv"}
    with pytest.raises(ConfigError, match="other rea_class_names, which name held-out classes"):
        train(**many, **named, out=tmp_path / "second", first_stage=first.out)


def test_weights_that_are_damaged(options: dict[str, Any], tmp_path: Path) -> None:
    first = train(**options, method="gpr", out=tmp_path / "first")
    assert first.state_dict is not None
    first.state_dict.write_bytes(b"no weights")
    with pytest.raises(DamagedFileError, match=r"state_dict\.pt is damaged"):
        train(**options, method="2sft", out=tmp_path / "second", first_stage=first.out)
