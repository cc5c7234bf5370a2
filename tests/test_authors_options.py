"""Options that the recipes of the authors' scripts need, each by what it changes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import pymcip
from pymcip.data import load_images
from pymcip.errors import ConfigError
from pymcip.mining import CaptionLists, bounds_of
from pymcip.model import ClipModel
from pymcip.model.towers import set_patch_dropout, text_parameters, unlock_text_tower
from pymcip.training.batches import train_transform
from pymcip.training.checkpoints import Position
from pymcip.training.image_stage import ImageStage
from pymcip.training.loop import Interruption, optimizer_step
from pymcip.training.text_stage import Pairs, TextStage
from tests.conftest import images, settings_for


@pytest.fixture
def stage_of(tiny_images: Callable[..., Path], tiny_clip: ClipModel) -> Callable[..., ImageStage]:
    """Make image stages over 12 images of 3 classes, of which every third has no pseudo-caption."""
    data = load_images(tiny_images())
    positives = CaptionLists(bounds_of([1, 1, 0] * 4), np.arange(8) % 5)
    bank = np.random.default_rng(0).standard_normal((5, 16)).astype(np.float32)

    def make(**changes: Any) -> ImageStage:
        return ImageStage(
            tiny_clip,
            data,
            settings_for(**changes),
            class_rows=None,
            bank=bank,
            positives=positives,
        )

    return make


def batch() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(images(12), torch.arange(12))]


def test_rows_of_xavier(stage_of: Callable[..., ImageStage]) -> None:
    first, second = (stage_of(class_init="xavier").classes.weight.detach() for _ in range(2))
    assert torch.equal(first, second)
    bound = math.sqrt(6 / (3 + 16))
    assert 0.9 * bound < float(first.abs().max()) <= bound
    assert abs(float(first.mean())) < bound / 4


@pytest.mark.parametrize("exempt", [True, False])
def test_weight_decay_of_class_rows(exempt: bool, stage_of: Callable[..., ImageStage]) -> None:
    stage = stage_of(wd=0.3, wd_exempt=exempt)
    groups = stage.optimizer.param_groups
    (of_classes,) = (g for g in groups if g["params"][0] is stage.classes.weight)
    assert of_classes["weight_decay"] == (0.0 if exempt else 0.3)
    assert {group["weight_decay"] for group in groups} == ({0.0, 0.3} if exempt else {0.3})


def test_the_class_matrix_is_clipped_by_itself(stage_of: Callable[..., ImageStage]) -> None:
    norms = []
    for limit in (None, 1e-3):
        stage = stage_of(grad_clip_norm=1e-2, grad_clip_classes=limit)
        run: Any = SimpleNamespace(
            clip=stage.clip, config=stage.config, position=Position(), interruption=Interruption()
        )
        stage.optimizer.zero_grad()  # and with a learning rate of 0 the weights stay
        values = optimizer_step(run, stage, batch())
        tower = [p.grad for p in stage.clip.model.visual.parameters() if p.grad is not None]  # type: ignore[union-attr,operator]
        assert float(torch.nn.utils.get_total_norm(tower)) == pytest.approx(1e-2, rel=1e-3)
        assert stage.classes.weight.grad is not None
        norms.append((values["grad_norm"], float(stage.classes.weight.grad.norm())))
    assert norms[0][0] == pytest.approx(norms[1][0])
    assert norms[0][1] > 1e-2
    assert norms[1][1] == pytest.approx(1e-3, rel=1e-3)


def test_images_without_captions_count_in_the_mean(stage_of: Callable[..., ImageStage]) -> None:
    losses = [
        float(stage_of(caption_mean=mean).backward(batch())["caption_margin"])
        for mean in ("captioned", "all")
    ]
    assert losses[1] == pytest.approx(losses[0] * 8 / 12, rel=1e-5)


def test_squares_are_cropped_and_flipped(tiny_clip: ClipModel) -> None:
    """A ramp from left to right, twice as wide as high: squeezed into a square, cropped to 16/18."""
    ramp = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (128, 1))).convert("RGB")
    transform = train_transform(tiny_clip, 32, {}, 1.125)
    std = torch.tensor(tiny_clip.preprocess_cfg["std"])
    starts = set()
    for _ in range(40):
        pixels = transform(ramp)
        assert pixels.shape == (3, 32, 32)
        assert torch.allclose(pixels, pixels[:, :1], atol=1e-5)  # all lines are the same
        ends = (pixels[:, 0, -1] - pixels[:, 0, 0]) * std * 255
        assert torch.allclose(ends.abs(), torch.tensor(31 * 256 / 36), atol=6)
        starts.add((round(float(pixels[0, 0, 0]), 2), bool(ends[0] > 0)))
    assert {rises for _, rises in starts} == {True, False}
    assert len(starts) == 10  # five places, two ways


def test_colours_are_jittered(tiny_clip: ClipModel) -> None:
    grey = Image.new("RGB", (50, 40), (120, 130, 140))
    for aug_cfg, colours in (
        ({}, 1),
        ({"color_jitter": 0.4}, 8),
        ({"color_jitter": (0.4,) * 4}, 8),
    ):
        transform = train_transform(tiny_clip, 32, aug_cfg, 1.125)
        assert len({tuple(transform(grey)[:, 0, 0].tolist()) for _ in range(8)}) == colours


@pytest.mark.parametrize(
    ("aug_cfg", "words"),
    [
        ({"scale": (0.5, 1.0), "use_timm": True}, "scale, use_timm can't be applied"),
        ({"zoom": 2}, "unknown keys"),
        ({"color_jitter": "much"}, "color_jitter='much' is not allowed"),
        ({"color_jitter": -1.0}, "color_jitter=-1.0 is not allowed"),
    ],
)
def test_augmentation_that_squares_refuse(
    tiny_clip: ClipModel, aug_cfg: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        train_transform(tiny_clip, 32, aug_cfg, 1.125)


def test_patch_dropout(tiny_clip: ClipModel) -> None:
    visual: Any = tiny_clip.model.visual
    names, before = list(tiny_clip.model.state_dict()), tiny_clip.image_features(images())
    set_patch_dropout(tiny_clip, 0.5)
    lengths: list[int] = []
    visual.transformer.register_forward_pre_hook(lambda _, given: lengths.append(given[0].shape[1]))
    assert torch.equal(tiny_clip.image_features(images()), before)
    visual.train()
    assert not torch.equal(tiny_clip.image_features(images()), tiny_clip.image_features(images()))
    assert lengths == [5, 3, 3]  # the class token, and two of four patches
    assert list(tiny_clip.model.state_dict()) == names


def test_patch_dropout_of_other_towers() -> None:
    trunk = timm.create_model("test_vit", num_classes=0)
    clip: Any = SimpleNamespace(
        name="t", model=SimpleNamespace(visual=SimpleNamespace(trunk=trunk))
    )
    set_patch_dropout(clip, 0.25)
    pixels = images(2, trunk.pretrained_cfg["input_size"][1])
    assert not torch.equal(trunk(pixels), trunk(pixels))
    clip.model.visual.trunk = timm.create_model("test_efficientnet", num_classes=0)
    with pytest.raises(ConfigError, match=r"patch_dropout=0.25 is for ViTs.*allowed for it: 0"):
        set_patch_dropout(clip, 0.25)


def test_the_last_groups_of_the_text_tower(tiny_clip: ClipModel) -> None:
    def trained(groups: int) -> set[str]:
        unlock_text_tower(tiny_clip, groups)
        return {name for name, p in tiny_clip.model.named_parameters() if p.requires_grad}

    every = {name for name, _ in text_parameters(tiny_clip.model)}
    assert trained(1) == {"text_projection"}
    last = {name for name in every if name.startswith(("transformer.", "ln_final."))}
    assert trained(2) == {"text_projection", *last}
    assert trained(9) == every
    tiny_clip.model.transformer = torch.nn.Identity()
    with pytest.raises(ConfigError, match="rea_unlock_layers=1 can't be done"):
        unlock_text_tower(tiny_clip, 1)


def test_a_trained_logit_scale(tiny_clip: ClipModel) -> None:
    """Its gradient is the slope of the loss, in one batch and in two parts; it stays below 100."""
    vectors = torch.nn.functional.normalize(torch.randn(6, 16), dim=1)
    pairs = Pairs(
        vectors, CaptionLists(np.arange(7), np.arange(6)), [f"text {i}" for i in range(6)]
    )
    stage = TextStage(tiny_clip, pairs, settings_for(rea_logit_scale=True))
    scale: Any = tiny_clip.model.logit_scale
    assert any(p is scale for group in stage.optimizer.param_groups for p in group["params"])
    whole, rows = slice(0, 6), np.arange(6)
    losses = []
    for value in (2.999, 3.001, 3.0):
        scale.data.fill_(value)
        stage.optimizer.zero_grad()
        losses.append(float(stage.backward([(rows, rows)])["loss"]))
    slope = (losses[1] - losses[0]) / 0.002
    assert float(scale.grad) == pytest.approx(slope, rel=1e-2, abs=1e-3)
    found = float(scale.grad)
    stage.optimizer.zero_grad()
    stage.backward([(rows[part], rows[part]) for part in (slice(0, 2), slice(2, 6))])
    assert float(scale.grad) == pytest.approx(found, rel=1e-4)
    scale.data.fill_(9.0)
    stage.backward([(rows[whole], rows[whole])])
    assert float(scale.detach()) == pytest.approx(math.log(100))


def test_a_run_by_the_authors_recipe(
    run_options: dict[str, Any], captions_file: Callable[..., Path], tiny_model_dir: Path
) -> None:
    before = pymcip.load(f"local-dir:{tiny_model_dir}", device="cpu").model.state_dict()
    small = {"batch_size": 4, "epochs": 1, "threshold": -1.0, "rea_batch_size": 4}
    result = pymcip.train(
        **{**run_options, **small, "rea_epochs": 1, "captions": str(captions_file())},
        recipe="authors-siglip",
    )
    after = torch.load(result.state_dict, weights_only=True)
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert "logit_scale" in changed
    assert "text_projection" in changed
    assert not changed & {"token_embedding.weight", "positional_embedding"}
    assert result.skipped_steps == 0
