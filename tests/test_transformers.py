"""Folders for transformers, read by transformers alone and compared with open_clip."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer

import pymcip
from pymcip.errors import CheckpointError, ConfigError
from pymcip.exporting import write_export
from pymcip.model import ClipModel, load
from pymcip.model.appended import Gate, appended_clip, linear_head
from pymcip.transformers import write_transformers
from tests.conftest import TINY_MODEL, TINY_PREPROCESSING, TINY_TIMM, picture, write_hub_folder

transformers = pytest.importorskip(
    "transformers", reason="the extra transformers is not installed", exc_type=ImportError
)

VISION, TEXT = TINY_MODEL["vision_cfg"], TINY_MODEL["text_cfg"]
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "quick_gelu": {"quick_gelu": True, "custom_text": True},
    "shapes": {  # nothing of a tower is the other's
        "vision_cfg": {
            **VISION, "layers": 3, "width": 48, "patch_size": 8, "mlp_ratio": 2.0,
            "norm_kwargs": {"eps": 0.5},
        },
        "text_cfg": {
            **TEXT, "layers": 2, "width": 64, "heads": 4, "context_length": 20,
            "act_kwargs": {"approximate": "tanh"},
        },
    },
}  # fmt: skip
TEXTS = [
    "a photo of a cat",
    "Hello,  World!! it's FINE",
    "école naïve straße 3.14 東京 🍌",
    "don't; we're 100% foo_bar",
    "a very long text " * 20,
    "",
]


@pytest.mark.parametrize("case", MODELS)
def test_transformers_gives_the_vectors_of_open_clip(case: str, tmp_path: Path) -> None:
    folder = write_hub_folder(tmp_path / "model", **MODELS[case])
    result = pymcip.export(model=str(folder), out=tmp_path / "out", transformers=True, device="cpu")
    assert result.transformers == tmp_path / "out" / "transformers"
    clip = load(str(folder), device="cpu", precision="fp32")
    model = transformers.CLIPModel.from_pretrained(result.transformers).eval()
    processor = transformers.CLIPProcessor.from_pretrained(result.transformers)
    pixels = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    tokens = processor(text=TEXTS, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        found = model(pixel_values=pixels, **tokens)
    logits = clip.logit_scale * clip.encode_images(pixels) @ clip.encode_texts(TEXTS).T
    np.testing.assert_allclose(found.image_embeds, clip.encode_images(pixels), atol=2e-6)
    np.testing.assert_allclose(found.text_embeds, clip.encode_texts(TEXTS), atol=2e-6)
    np.testing.assert_allclose(found.logits_per_image, logits, atol=1e-4)


def test_tokens_are_the_same_up_to_the_end(tiny_clip: ClipModel, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(write_transformers(tiny_clip, tmp_path))
    found = tokenizer(TEXTS, padding="max_length", truncation=True)["input_ids"]
    for mine, theirs in zip(tiny_clip.tokenizer(TEXTS).tolist(), found, strict=True):
        end = mine.index(max(mine)) + 1
        assert theirs == mine[:end] + [max(mine)] * (len(mine) - end)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"resize_mode": "squash"},
        {"interpolation": "bilinear", "mean": [0.5, 0.4, 0.3], "std": [0.5, 0.4, 0.3]},
    ],
)
def test_pixels_are_the_same(changes: dict[str, Any], tmp_path: Path) -> None:
    folder = write_hub_folder(tmp_path / "model")
    preprocessing = {**TINY_PREPROCESSING, **changes}
    config = json.loads((folder / "open_clip_config.json").read_text())
    (folder / "open_clip_config.json").write_text(
        json.dumps({**config, "preprocess_cfg": preprocessing})
    )
    result = pymcip.export(model=str(folder), out=tmp_path / "out", transformers=True, device="cpu")
    clip = load(str(folder), device="cpu")
    image = picture(0, size=77).resize((100, 60))
    for backend, off in (("pil", 0.0), ("torchvision", 0.1)):
        processor = transformers.CLIPProcessor.from_pretrained(result.transformers, backend=backend)
        found = processor(images=image, return_tensors="pt")["pixel_values"][0]
        np.testing.assert_allclose(found, clip.preprocess_val(image), atol=off + 1e-6)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (TINY_TIMM, "image tower is a TimmModel"),
        ({"vision_cfg": {**VISION, "pool_type": "avg"}}, "pool_type of the image tower is 'avg'"),
        ({"text_cfg": {**TEXT, "pool_type": "last"}}, "pool_type of the texts is 'last'"),
        ({"text_cfg": {**TEXT, "no_causal_mask": True}}, "causal mask is False"),
        ({"custom_text": True, "text_cfg": {**TEXT, "embed_cls": True}}, "not in both: cls_emb"),
        ({"vision_cfg": {**VISION, "ls_init_value": 0.1}}, r"not in both: .*\.ls_1\.gamma"),
        ({"vision_cfg": {**VISION, "no_ln_pre": True}}, "not in both: .*pre_layrnorm"),
        ({"init_logit_bias": -10.0}, "not in both: logit_bias"),
        ({"text_cfg": {**TEXT, "block_type": "custom"}}, "blocks of the texts is 'Custom"),
    ],
)
def test_a_model_without_a_counterpart_is_refused(
    config: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    folder = write_hub_folder(tmp_path / "model", **config)
    with pytest.raises(ConfigError, match=f"{reason}.* Allowed: .* use onnx=True"):
        pymcip.export(model=str(folder), out=tmp_path / "out", transformers=True, device="cpu")
    assert not (tmp_path / "out").exists()


def test_appended_dimensions_are_refused(tiny_clip: ClipModel, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(2)
    head = linear_head(torch.randn(4, tiny_clip.embed_dim, generator=generator), torch.zeros(4))
    gate = Gate(torch.eye(tiny_clip.embed_dim)[:2], 0.5, 0.1)
    write_export(appended_clip(tiny_clip, None, head, 2.0, gate), tmp_path / "model")
    with pytest.raises(ConfigError, match=r"appended dimensions.* use onnx=True"):
        pymcip.export(model=str(tmp_path / "model"), out=tmp_path / "out", transformers=True)


def other_pixels(clip: ClipModel) -> ClipModel:
    return dataclasses.replace(clip, preprocess_cfg={**clip.preprocess_cfg, "mean": [0.5] * 3})


def other_tokens(clip: ClipModel) -> ClipModel:
    return dataclasses.replace(
        clip, tokenizer=SimpleTokenizer(context_length=16, clean="canonicalize")
    )


def other_images(clip: ClipModel) -> ClipModel:
    clip.model.visual.ln_post.register_forward_hook(lambda module, inputs, output: output + 0.1)
    return clip


def other_texts(clip: ClipModel) -> ClipModel:
    clip.model.ln_final.register_forward_hook(lambda module, inputs, output: output + 0.1)
    return clip


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (other_pixels, r"images 1\.0+, of texts 1\.0+, .* pixels 0\.[1-9].*tokens the same"),
        (other_tokens, r"pixels 0\.0.* tokens differ"),
        (other_images, r"images 0\.\d+, of texts 1\.0+, .* tokens the same"),
        (other_texts, r"images 1\.0+, of texts 0\.\d+, .* tokens the same"),
    ],
)
def test_what_differs_is_not_put_in_place(
    change: Callable[[ClipModel], ClipModel], found: str, tiny_clip: ClipModel, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=found):
        write_transformers(change(tiny_clip), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
