"""Settings that fit by themselves, classes held out to measure a run, and what is said about it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pymcip
from pymcip.configs import TrainConfig
from pymcip.data import ImageData, load_images
from pymcip.errors import ConfigError
from pymcip.model import ClipModel
from pymcip.training.inputs import held_out_classes
from pymcip.training.settings import fit_settings
from pymcip.training.validation import shortcomings
from tests.conftest import settings_for

AUTO = ("epochs", "batch_size", "lr", "warmup", "lr_classes", "train_size")


@pytest.fixture
def options(run_options: dict[str, Any], tiny_images: Callable[..., Path]) -> dict[str, Any]:
    """A run with every option left to itself that may be, of ten classes."""
    kept = {name: value for name, value in run_options.items() if name not in AUTO}
    return {**kept, "train_data": str(tiny_images("ten", classes=10, per_class=3)), "epochs": 2}


def config_for(**changes: Any) -> TrainConfig:
    return TrainConfig(**{"model": "m", "train_data": "d", "out": "o", **changes})


def of_size(count: int) -> ImageData:
    """As many images as a test wants to count; they are never read."""
    rows = np.zeros(count, np.int64)
    return ImageData([], rows, rows, rows, ["a"], np.zeros(1, np.int64))


# Settings


@pytest.mark.parametrize(
    ("images", "batch", "epochs"),
    [(10, 32, 30), (1000, 32, 8), (2640, 32, 3), (8000, 32, 3), (20_000, 64, 3), (10**6, 128, 3)],
)
def test_small_sets_get_small_batches_and_enough_steps(
    tiny_clip: ClipModel, images: int, batch: int, epochs: int
) -> None:
    found, reasons = fit_settings(config_for(), tiny_clip, of_size(images))
    assert reasons["batch_size"] == f"{images} images"
    assert (found.batch_size, found.epochs) == (batch, epochs)
    steps = max(1, images // batch) * epochs
    assert found.warmup == round(0.1 * steps)
    assert found.lr_classes == pytest.approx(max(10 * found.lr, min(0.01, 1 / steps)), rel=0.05)


def test_the_learning_rate_falls_with_the_tower(tiny_clip: ClipModel) -> None:
    """1e-5 for 3e8 parameters, 3e-4 for 4e6: the paper's, and one that was measured on icons."""
    count = sum(value.numel() for value in tiny_clip.model.visual.parameters())  # type: ignore[union-attr,operator]
    found, _ = fit_settings(config_for(), tiny_clip, of_size(100))
    assert found.lr == pytest.approx(1e-5 * (3e8 / count) ** 0.8, rel=0.05)
    assert abs(1e-5 * (3e8 / 4e6) ** 0.8 / 3e-4 - 1) < 0.1


def test_what_is_given_is_kept_and_counts(tiny_clip: ClipModel) -> None:
    given = {"epochs": 7, "batch_size": 10, "lr": 0.5, "lr_classes": 0.25}
    found, reasons = fit_settings(config_for(**given), tiny_clip, of_size(100))
    assert reasons.keys() == {"warmup", "train_size"}
    assert {name: getattr(found, name) for name in given} == given
    assert found.warmup == 7  # a tenth of 70 steps


def test_how_many_dimensions_are_appended() -> None:
    assert config_for().extra_dims == config_for(method="gpr", appended_dims=64).extra_dims == 64
    assert config_for(appended_dims=5).extra_dims == 5
    assert config_for(method="gpr").extra_dims == 0


def test_a_convolutional_tower_trains_on_smaller_crops(
    tiny_clip: ClipModel, hub_folder: Callable[..., Path]
) -> None:
    assert fit_settings(config_for(), tiny_clip, of_size(100))[0].train_size == 32  # a ViT
    with pytest.raises(ConfigError, match=r"train_size=24 can't be used .* allowed for it: 32"):
        fit_settings(config_for(train_size=24), tiny_clip, of_size(100))


def test_thresholds_of_openais_weights(tiny_clip: ClipModel) -> None:
    images = of_size(100)
    assert fit_settings(config_for(), tiny_clip, images)[0].threshold == "auto"
    assert fit_settings(config_for(pretrained="openai"), tiny_clip, images)[0].threshold == 0.27


def test_a_run_keeps_what_it_took(
    options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="pymcip"):
        first = pymcip.train(**options)
    taken = json.loads((first.out / "config.json").read_text())
    assert all(taken[name] != "auto" for name in AUTO)
    assert f"lr: {taken['lr']} (an image tower of" in caplog.text
    assert taken["appended_dims"] == "auto"  # another method may be tried with this file
    assert pymcip.train(**options, resume="latest") == first
    with pytest.raises(ConfigError, match=r"lr: was .*, now 0.5"):
        pymcip.train(**options, resume="latest", lr=0.5)


# Classes that are held out


def test_classes_held_out_measure_the_run(options: dict[str, Any]) -> None:
    result = pymcip.train(**options)
    assert result.before.keys() == result.metrics.keys() >= {"i2i_map", "i2i_r1"}
    logged = (result.out / "out.log").read_text()
    assert "2 classes with 6 images (holdout=0.1); trained on: 8 classes with 24 images" in logged
    assert "dimensions appended, of 24 images in 8 classes" in logged  # what is measured
    assert "dimensions appended, of 30 images in 10 classes" in logged  # what is exported
    clip = pymcip.load(str(result.out), precision="fp32")
    assert len(clip.gate.prototypes) == 10  # type: ignore[attr-defined]
    (line,) = (line for line in logged.splitlines() if "among classes that were held out" in line)
    for number in (1, 2):
        of_head = re.search(rf"head {number}: ([^;]*)", line)
        assert of_head is not None
        found = dict(pair.split(": ") for pair in of_head[1].split(", "))
        assert found.keys() == {"1", "1.5", "2", "3", "5"}
    assert f"weight {clip.weight:g}, by the image-to-image mAP" in line  # type: ignore[attr-defined]


def test_text_search_of_the_default_is_the_base_models(
    options: dict[str, Any], tmp_path: Path
) -> None:
    names = tmp_path / "names.tsv"
    names.write_text("".join(f"class{i}\tthing {i}\n" for i in range(10)), encoding="utf-8")
    found = pymcip.train(**options, val_class_names=str(names))
    for name in ("zero_shot", "zero_shot_top5"):
        assert found.metrics[name] == found.before[name]


@pytest.mark.parametrize(
    ("sizes", "holdout", "count"),
    [
        ([3] * 10, 0.1, 2),
        ([3] * 40, 0.25, 10),
        ([3] * 7, 0.1, 0),  # too few classes
        ([3] * 10, 0.0, 0),
        ([1] * 9 + [2] * 3, 0.5, 3),  # classes of one image measure nothing
        ([4000] * 9, 0.5, 0),  # no two of them are few enough images
    ],
)
def test_how_many_classes_are_held_out(sizes: list[int], holdout: float, count: int) -> None:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    zeros = np.zeros(len(labels), np.int64)
    images = ImageData(
        [], zeros, zeros, labels, [str(i) for i in range(len(sizes))], zeros[: len(sizes)]
    )
    found = [held_out_classes(images, config_for(holdout=holdout, seed=seed)) for seed in (0, 0, 1)]
    assert np.array_equal(found[0], found[1])
    assert {len(set(chosen)) for chosen in found} in ({count}, {count, count - 1})
    assert all(sizes[i] > 1 for i in found[0])


def test_a_class_of_every_source_is_trained_on(tiny_images: Callable[..., Path]) -> None:
    images = load_images([str(tiny_images("a", classes=9)), str(tiny_images("b", classes=1))])
    for seed in range(10):
        assert 9 not in held_out_classes(images, config_for(holdout=0.9, seed=seed))


def test_images_of_classes(tiny_images: Callable[..., Path]) -> None:
    images = load_images(tiny_images(classes=4, per_class=2))
    chosen = images.of_classes([3, 1])
    assert chosen.class_names == ["class3", "class1"]
    assert [images.key(int(i)) for i in np.flatnonzero(np.isin(images.labels, [1, 3]))] == [
        chosen.key(i) for i in range(len(chosen))
    ]
    for row, label in enumerate(chosen.labels):
        assert f"/{chosen.class_names[label]}/" in chosen.key(row)


# What is said of a model that isn't better


@pytest.mark.parametrize(
    ("before", "after", "losses", "words"),
    [
        ({"i2i_map": 50.0}, {"i2i_map": 50.1}, [9.0, 1.0], []),
        ({"i2i_map": 50.0}, {"i2i_map": 50.0}, [9.0, 8.5], ["hardly learnt: raise lr (now 1e-05)"]),
        ({"i2i_map": 50.0}, {"i2i_map": 40.0}, [9.0, 1.0], ["50.0 -> 40.0", "lower lr"]),
        ({"i2i_map": 50.0}, {"i2i_map": 40.0}, [], ["lower lr"]),
        (
            {"i2i_map": 50.0, "zero_shot": 30.0, "t2i_r5": 20.0},
            {"i2i_map": 60.0, "zero_shot": 20.0, "t2i_r5": 20.0},
            [9.0, 1.0],
            ["zero-shot top-1 30.0 -> 20.0)", "method='appended'"],
        ),
    ],
)
def test_a_model_that_is_not_better_is_named(
    before: dict[str, float], after: dict[str, float], losses: list[float], words: list[str]
) -> None:
    found = shortcomings(settings_for(), before, after, losses)
    assert len(found) == bool(words)
    for word in words:
        assert word in found[0]


def test_a_run_that_learns_nothing_says_so(
    options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING", logger="pymcip"):
        result = pymcip.train(**{**options, "lr": 1e-12, "lr_classes": 1e-12}, method="gpr")
    assert result.hub is not None
    assert "image search is not better than before" in caplog.text
    assert "hardly learnt: raise lr" in caplog.text


def test_captions_that_are_not_used_are_named(
    options: dict[str, Any], captions_file: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING", logger="pymcip"):
        pymcip.train(**options, captions=str(captions_file()))
    assert "captions= is given, and method='appended' does not use it" in caplog.text
