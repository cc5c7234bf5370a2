"""What a loaded model gives: embeddings, scale, fingerprints."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch

from pymcip.model import (
    ClipModel,
    evaluation_mode,
    has_bf16,
    load,
    weights_fingerprint,
)
from tests.conftest import images, picture, write_hub_folder

# What a loaded model gives


def test_hub_folder_gives_what_open_clip_gives(tiny_model_dir: Path) -> None:
    clip = load(f"local-dir:{tiny_model_dir}", device="cpu", precision="fp32")
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tiny_model_dir}")
    model.eval()
    pixels = torch.stack([clip.preprocess_val(picture(seed)) for seed in range(3)])
    torch.testing.assert_close(pixels[0], preprocess(picture(0)), rtol=0, atol=0)
    with torch.no_grad():
        wanted = model.encode_image(pixels, normalize=True)
        wanted_text = model.encode_text(open_clip.tokenize(["a dog"], 16), normalize=True)
    torch.testing.assert_close(clip.encode_images(pixels), wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(clip.encode_texts(["a dog"]), wanted_text, rtol=0, atol=1e-6)
    assert clip.embed_dim == 16
    assert not clip.model.training
    assert clip.encode_texts([]).shape == (0, 16)


def test_embeddings_are_unit_fp32_in_either_precision(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "pymcip.model.loading.has_bf16", lambda device: True
    )  # as it is emulated elsewhere
    exact = load(f"local-dir:{tiny_model_dir}", device="cpu", precision="fp32")
    rough = load(f"local-dir:{tiny_model_dir}", device="cpu", precision="amp_bf16")
    got = rough.encode_images(images())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.norm(dim=1), torch.ones(3), rtol=0, atol=1e-6)
    difference = (got - exact.encode_images(images())).abs().max()
    assert 0 < difference < 0.05
    assert {value.dtype for value in rough.model.parameters()} == {torch.float32}


def test_a_cpu_without_bf16_runs_in_fp32(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("pymcip.model.loading.has_bf16", lambda device: False)
    with caplog.at_level("INFO"):
        clip = load(f"local-dir:{tiny_model_dir}", device="cpu", precision="amp_bf16")
    assert "fp32, not amp_bf16" in caplog.text
    exact = load(f"local-dir:{tiny_model_dir}", device="cpu", precision="fp32")
    assert torch.equal(clip.encode_images(images()), exact.encode_images(images()))
    assert clip.fingerprint() == exact.fingerprint()


@pytest.mark.parametrize(("stored", "scale"), [(20.0, 20.0), (100.0, 100.0), (117.33, 100.0)])
def test_logit_scale_is_at_most_100(tiny_clip: ClipModel, stored: float, scale: float) -> None:
    """As CLIP and open_clip clip it in training; what is stored stays."""
    with torch.no_grad():
        tiny_clip.model.logit_scale.fill_(np.log(stored))  # type: ignore[union-attr,operator]
    assert tiny_clip.logit_scale == pytest.approx(scale, rel=1e-6)
    assert float(tiny_clip.model.logit_scale.detach().exp()) == pytest.approx(stored, rel=1e-6)  # type: ignore[union-attr,operator]


def test_has_bf16_is_what_the_cpu_says() -> None:
    assert has_bf16(torch.device("cuda"))
    flags = set(Path("/proc/cpuinfo").read_text(encoding="ascii").split())
    if "avx512_bf16" in flags:
        assert has_bf16(torch.device("cpu"))
    elif "avx2" in flags and not flags & {"avx512bw", "avx_vnni", "avx_ne_convert"}:
        assert not has_bf16(torch.device("cpu"))
    else:
        pytest.skip("what oneDNN makes of this CPU is not told by its flags alone")


def test_features_keep_the_graph_and_encoding_keeps_the_mode(tiny_clip: ClipModel) -> None:
    tiny_clip.model.train()
    tiny_clip.model.visual.eval()  # type: ignore[union-attr]
    assert tiny_clip.image_features(images()).requires_grad
    assert not tiny_clip.encode_images(images()).requires_grad
    assert tiny_clip.model.training
    assert not tiny_clip.model.visual.training  # type: ignore[union-attr]

    def fail() -> None:
        with evaluation_mode(tiny_clip.model):
            assert not tiny_clip.model.training
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        fail()
    assert tiny_clip.model.training


def test_texts_are_encoded_alike_in_any_batch_size(tiny_clip: ClipModel) -> None:
    texts = [f"number {i}" for i in range(7)]
    torch.testing.assert_close(
        tiny_clip.encode_texts(texts, 2), tiny_clip.encode_texts(texts), rtol=0, atol=1e-6
    )


# Fingerprints


def test_fingerprint_is_the_same_for_the_same_model(tiny_model_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model_dir, tmp_path / "elsewhere")
    one = load(f"local-dir:{tiny_model_dir}", device="cpu")
    other = load(f"local-dir:{tmp_path / 'elsewhere'}", device="cpu")
    for part in ("model", "image", "text"):
        assert one.fingerprint(part) == other.fingerprint(part)
    assert len({one.fingerprint(part) for part in ("model", "image", "text")}) == 3


def test_fingerprint_changes_with_the_weights_of_its_tower(tiny_clip: ClipModel) -> None:
    before = {part: tiny_clip.fingerprint(part) for part in ("model", "image", "text")}
    with torch.no_grad():
        tiny_clip.model.visual.proj[0, 0] += 1e-3  # type: ignore[union-attr,index,operator]
    assert tiny_clip.fingerprint("image") != before["image"]
    assert tiny_clip.fingerprint("model") != before["model"]
    assert tiny_clip.fingerprint("text") == before["text"]
    with torch.no_grad():
        tiny_clip.model.text_projection[0, 0] += 1e-3  # type: ignore[index,operator]
    assert tiny_clip.fingerprint("text") != before["text"]


def test_fingerprint_changes_with_transform_precision_and_activation(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    name = f"local-dir:{tiny_model_dir}"
    clip = load(name, device="cpu", precision="fp32")
    quick = write_hub_folder(tmp_path / "quick", quick_gelu=True)
    others = [
        dataclasses.replace(clip, precision="amp_bf16"),
        load(name, device="cpu", precision="fp32", image_size=64),
        load(f"local-dir:{quick}", device="cpu", precision="fp32"),
    ]
    prints = {other.fingerprint("image") for other in [clip, *others]}
    assert len(prints) == 4


def test_weights_fingerprint_covers_names_shapes_and_types() -> None:
    value = torch.arange(6, dtype=torch.float32)
    states = [
        {"a": value},
        {"b": value},
        {"a": value.view(2, 3)},
        {"a": value.view(torch.int32)},
        {"a": value, "b": torch.tensor(1.0)},
        {"a": value, "b": torch.tensor(1)},
    ]
    assert len({weights_fingerprint(state) for state in states}) == len(states)
    assert weights_fingerprint({"a": value.flip(0).flip(0)}) == weights_fingerprint({"a": value})


def test_config_of_a_folder_is_kept_whole(tiny_model_dir: Path) -> None:
    config = json.loads((tiny_model_dir / "open_clip_config.json").read_text())
    assert load(f"local-dir:{tiny_model_dir}", device="cpu").model_cfg == config["model_cfg"]


def test_fingerprint_is_the_same_in_every_process(tiny_clip: ClipModel) -> None:
    """Transforms of older open_clip hold plain functions, whose repr has a memory address."""
    before = tiny_clip.fingerprint("image")
    steps = tiny_clip.preprocess_val.transforms  # type: ignore[attr-defined]
    prints = []
    for _ in range(2):

        def convert(image: object) -> object:
            return image

        tiny_clip.preprocess_val = type(tiny_clip.preprocess_val)([convert, *steps])  # type: ignore[call-arg]
        prints.append((tiny_clip.fingerprint("image"), tiny_clip.transform, convert))
    assert prints[0][0] == prints[1][0] != before
    assert "0x" not in prints[0][1]


def test_texts_beyond_the_context_are_counted(
    tiny_clip: ClipModel, caplog: pytest.LogCaptureFixture
) -> None:
    fits = " ".join(["dog"] * 14)  # 16 tokens with start and end
    texts = ["dog", fits, f"{fits} dog", f"{fits} cat cat"]
    _, cut = tiny_clip.encode_and_count(texts)
    assert cut.tolist() == [False, False, True, True]
    tiny_clip.encode_texts(texts, batch_size=3)
    assert "2 of 4 texts are longer than the model's context of 16 tokens" in caplog.text
    caplog.clear()
    tiny_clip.encode_texts(texts[:2])
    assert not caplog.text
