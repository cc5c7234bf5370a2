"""Exports are read back in a fresh process that knows open_clip and no pymcip."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch

import pymcip
from pymcip.embedding import EmbeddingFolder
from pymcip.errors import (
    DataError,
    MissingDependencyError,
    OutputExistsError,
    StaleEmbeddingsError,
)
from pymcip.exporting import write_export, write_index
from pymcip.model import ClipModel, load, plain_state
from pymcip.model.appended import Gate, appended_clip, linear_head
from tests.conftest import TINY_MODEL, TINY_TIMM, picture, write_hub_folder

READER = """
import json, sys
import numpy as np, open_clip, torch
from PIL import Image

for work in sys.argv[1:]:
    name = work.split("/")[-1]
    open_clip.add_model_config(work + "/architectures")
    pixels = torch.from_numpy(np.load(work + "/pixels.npy"))
    tokens = torch.from_numpy(np.load(work + "/tokens.npy"))
    found = {}
    plain = open_clip.create_model(name)
    state = torch.load(work + "/out/state_dict.pt", map_location="cpu", weights_only=True)
    plain.load_state_dict(state, strict=True)
    hub, _, preprocess = open_clip.create_model_and_transforms("local-dir:" + work + "/out/hub")
    tokenizer = open_clip.get_tokenizer("local-dir:" + work + "/out/hub")
    with torch.inference_mode():
        for form, model in (("plain", plain), ("hub", hub)):
            model.eval()
            found[form + "_images"] = model.encode_image(pixels).numpy()
            found[form + "_texts"] = model.encode_text(tokens).numpy()
    found["pixels"] = preprocess(Image.open(work + "/picture.png")).numpy()
    found["tokens"] = tokenizer(["a red square", "a dog"]).numpy()
    np.savez(work + "/found.npz", **found)
assert not any(name.split(".")[0] == "pymcip" for name in sys.modules)
"""
VIT: dict[str, Any] = {**TINY_MODEL, "quick_gelu": True}
CASES: dict[str, tuple[dict[str, Any], int | None]] = {
    "plain": (TINY_MODEL, None),
    "quick_gelu": (VIT, None),
    "other_size": (VIT, 48),
    "timm_other_size": (TINY_TIMM, 96),
}


@pytest.fixture(scope="module")
def read_back(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export every case and have one fresh process read them all with open_clip alone."""
    base = tmp_path_factory.mktemp("exports")
    for case, (model_cfg, image_size) in CASES.items():
        folder = write_hub_folder(base / case / "model", **model_cfg)
        clip = load(f"local-dir:{folder}", image_size=image_size, device="cpu", precision="fp32")
        result = write_export(clip, base / case / "out")
        assert result.state_dict == base / case / "out" / "state_dict.pt"
        assert result.hub == base / case / "out" / "hub"
        architecture = json.loads(json.dumps(model_cfg))
        size = image_size or architecture["vision_cfg"]["image_size"]
        architecture["vision_cfg"]["image_size"] = size
        (base / case / "architectures").mkdir()
        (base / case / "architectures" / f"{case}.json").write_text(json.dumps(architecture))
        pixels = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))
        np.save(base / case / "pixels.npy", pixels.numpy())
        np.save(base / case / "tokens.npy", clip.tokenizer(["a red square", "a dog"]).numpy())
        picture(0, size=77).save(base / case / "picture.png")
    done = subprocess.run(
        [sys.executable, "-c", READER, *(str(base / case) for case in CASES)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return base


@pytest.mark.parametrize("case", CASES)
def test_open_clip_alone_gives_the_same_bits(read_back: Path, case: str) -> None:
    work = read_back / case
    found = np.load(work / "found.npz")
    clip = load(
        f"local-dir:{work / 'model'}", image_size=CASES[case][1], device="cpu", precision="fp32"
    )
    # In the layout that open_clip gives a model: channels-last convolutions round differently.
    clip.model.to(memory_format=torch.contiguous_format)
    tokens = clip.tokenizer(["a red square", "a dog"])
    with torch.inference_mode():
        pixels = torch.from_numpy(np.load(work / "pixels.npy"))
        images = clip.model.encode_image(pixels).numpy()  # type: ignore[operator]
        texts = clip.model.encode_text(tokens).numpy()  # type: ignore[operator]
    for form in ("plain", "hub"):
        np.testing.assert_array_equal(found[f"{form}_images"], images)
        np.testing.assert_array_equal(found[f"{form}_texts"], texts)
    np.testing.assert_array_equal(found["pixels"], clip.preprocess_val(picture(0, size=77)).numpy())
    np.testing.assert_array_equal(found["tokens"], tokens.numpy())


def test_quick_gelu_makes_a_difference_that_the_test_above_would_see(tmp_path: Path) -> None:
    quick = load(f"local-dir:{write_hub_folder(tmp_path / 'q', **VIT)}", precision="fp32")
    other = load(f"local-dir:{write_hub_folder(tmp_path / 'p')}", precision="fp32")
    other.model.load_state_dict(quick.model.state_dict())
    texts = ["a red square"]
    assert not torch.equal(quick.encode_texts(texts), other.encode_texts(texts))


def test_state_dict_is_plain(tmp_path: Path) -> None:
    folder = write_hub_folder(tmp_path / "model", **TINY_TIMM)
    clip = load(f"local-dir:{folder}", device="cpu")  # its convolutions are channels-last
    result = write_export(clip, tmp_path / "out")
    state = torch.load(result.state_dict, weights_only=True)
    assert type(state) is dict
    model = clip.model.state_dict()
    assert list(state) == list(model)
    for name, value in state.items():
        assert torch.equal(value, model[name]), name
        assert value.is_contiguous()
        wanted = torch.float32 if model[name].is_floating_point() else model[name].dtype
        assert value.dtype == wanted
    hub = safetensors.torch.load_file(result.hub / "open_clip_model.safetensors")
    assert hub.keys() == state.keys()


def test_plain_state_unties_shared_and_sliced_tensors() -> None:
    first, second = torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    sliced = torch.nn.Linear(2, 4, bias=False)
    sliced.weight = torch.nn.Parameter(torch.randn(4, 8).to(torch.bfloat16)[:, ::4])
    model = torch.nn.Sequential(first, second, sliced)
    state = plain_state(model)
    assert len({value.data_ptr() for value in state.values()}) == 3
    assert safetensors.torch.save(state)
    assert state["2.weight"].dtype == torch.float32
    assert torch.equal(state["2.weight"], sliced.weight.float())


def test_hub_config_says_all_that_open_clip_needs(tmp_path: Path) -> None:
    folder = write_hub_folder(tmp_path / "model", **VIT)
    clip = load(f"local-dir:{folder}", image_size=48, device="cpu")
    hub = write_export(clip, tmp_path / "out").hub
    config = json.loads((hub / "open_clip_config.json").read_text())
    assert config.keys() == {"model_cfg", "preprocess_cfg"}
    assert config["model_cfg"]["quick_gelu"] is True
    assert config["model_cfg"]["vision_cfg"]["image_size"] == 48
    assert config["preprocess_cfg"]["mean"] == list(open_clip.OPENAI_DATASET_MEAN)
    assert sorted(path.name for path in hub.iterdir()) == [
        "open_clip_config.json",
        "open_clip_model.safetensors",
    ]


class SavedTokenizer:
    """Stands in for open_clip's HFTokenizer, whose package is not a dependency."""

    def __call__(self, texts: list[str]) -> torch.Tensor:
        return torch.zeros(len(texts), 16, dtype=torch.int64)

    def save_pretrained(self, folder: Path) -> None:
        (Path(folder) / "tokenizer.json").write_text("{}")


def test_hugging_face_tokenizer_is_saved_and_found_again(
    tiny_clip: ClipModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = dataclasses.replace(tiny_clip, tokenizer=SavedTokenizer())
    hub = write_export(clip, tmp_path).hub
    assert (hub / "tokenizer.json").is_file()
    opened: list[str] = []

    def tokenizer(source: Any, **options: Any) -> SavedTokenizer:
        opened.append(str(source))
        return SavedTokenizer()

    monkeypatch.setattr(open_clip.factory, "HFTokenizer", tokenizer)
    open_clip.get_tokenizer(f"local-dir:{hub}")
    assert opened == [str(hub)]
    assert "hf_tokenizer_name" not in tiny_clip.model_cfg["text_cfg"]


def test_export_is_a_model_of_pymcip_too(tiny_model_dir: Path, tmp_path: Path) -> None:
    result = pymcip.export(model=str(tiny_model_dir), out=tmp_path / "out", device="cpu")
    assert result.index is None
    again = load(str(tmp_path / "out"), device="cpu")
    original = load(str(tiny_model_dir), device="cpu")
    assert again.fingerprint() == original.fingerprint()


def test_existing_files_are_replaced_whole(
    tiny_clip: ClipModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_export(tiny_clip, tmp_path)
    (tmp_path / "hub" / "leftover.txt").write_text("old")
    before = (tmp_path / "state_dict.pt").read_bytes()

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", full)
        with pytest.raises(OSError, match="No space left"):
            write_export(tiny_clip, tmp_path)
    assert (tmp_path / "hub" / "open_clip_model.safetensors").is_file()
    assert len((tmp_path / "state_dict.pt").read_bytes()) == len(before)
    write_export(tiny_clip, tmp_path)
    assert (tmp_path / "hub" / "leftover.txt").read_text() == "old"  # not ours
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hub", "state_dict.pt"]


def test_output_folder_is_protected(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = tmp_path / "run" / "exported" / "hub"
    write_hub_folder(model)
    with pytest.raises(OutputExistsError, match="not empty"):
        pymcip.export(model=str(tmp_path / "run"), out=tmp_path / "run", device="cpu")
    for name in (str(tmp_path / "run"), f"local-dir:{model}"):
        with pytest.raises(OutputExistsError, match="overwrite would remove"):
            pymcip.export(model=name, out=tmp_path / "run", overwrite=True, device="cpu")
    assert (model / "open_clip_model.safetensors").is_file()


# The index


@pytest.fixture
def embedded(
    tiny_model_dir: Path, tiny_images: Callable[..., Path], tmp_path: Path
) -> EmbeddingFolder:
    images = tiny_images(classes=3, per_class=4)
    (images / "class1" / "0.jpg").write_bytes(b"no picture")
    return pymcip.embed(
        model=str(tiny_model_dir), images=images, out=tmp_path / "emb", part_size=5, device="cpu"
    )


def test_index_finds_images_by_their_number(
    embedded: EmbeddingFolder, tiny_model_dir: Path, tmp_path: Path
) -> None:
    result = pymcip.export(
        model=str(tiny_model_dir), out=tmp_path / "out", index=embedded.path, device="cpu"
    )
    assert result.index == tmp_path / "out" / "index.faiss"
    index = faiss.read_index(str(result.index))
    assert index.ntotal == 11
    vectors = np.asarray(embedded.vectors("img"), dtype=np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    rows = embedded.rows("img")
    assert 4 not in rows  # class1/0.jpg
    scores, found = index.search(vectors.astype(np.float32), 3)
    wanted = vectors @ vectors.T
    np.testing.assert_array_equal(found[:, 0], rows)
    np.testing.assert_allclose(scores, -np.sort(-wanted, axis=1)[:, :3], atol=1e-5)
    assert index.reconstruct(5).shape == (16,)


def test_index_of_other_embeddings_is_refused(embedded: EmbeddingFolder, tmp_path: Path) -> None:
    other = write_hub_folder(tmp_path / "other", seed=5)
    with pytest.raises(StaleEmbeddingsError, match="another model"):
        pymcip.export(model=str(other), out=tmp_path / "out", index=embedded.path, device="cpu")
    assert not (tmp_path / "out").exists()


def test_index_does_not_mind_the_precision(
    embedded: EmbeddingFolder, tiny_model_dir: Path, tmp_path: Path
) -> None:
    result = pymcip.export(
        model=str(tiny_model_dir),
        out=tmp_path / "out",
        index=embedded.path,
        precision="fp32",
        device="cpu",
    )
    assert result.index is not None


def test_index_of_a_folder_that_clip_retrieval_wrote(tiny_clip: ClipModel, tmp_path: Path) -> None:
    (tmp_path / "emb" / "img_emb").mkdir(parents=True)
    vectors = np.eye(16, dtype=np.float16)
    np.save(tmp_path / "emb" / "img_emb" / "img_emb_0.npy", vectors)
    path = write_index(EmbeddingFolder(tmp_path / "emb"), tmp_path / "index.faiss")
    index = faiss.read_index(str(path))
    assert index.search(np.eye(16, dtype=np.float32)[[3]], 1)[1].tolist() == [[3]]


def test_index_needs_image_embeddings(tiny_clip: ClipModel, tmp_path: Path) -> None:
    (tmp_path / "emb" / "img_emb").mkdir(parents=True)
    np.save(tmp_path / "emb" / "img_emb" / "img_emb_0.npy", np.empty((0, 16), np.float16))
    with pytest.raises(DataError, match="no image embeddings"):
        write_index(EmbeddingFolder(tmp_path / "emb"), tmp_path / "index.faiss")


@pytest.mark.parametrize(
    ("module", "extra", "option"),
    [("faiss", "faiss", {"index": "embeddings"}), ("onnxruntime", "onnx", {"onnx": True})],
)
def test_an_extra_that_is_not_installed(
    module: str,
    extra: str,
    option: dict[str, Any],
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependencyError, match=rf'pip install "pymcip\[{extra}\]"'):
        pymcip.export(model=str(tiny_model_dir), out=tmp_path / "out", **option)
    assert not (tmp_path / "out").exists()


# ONNX


def test_onnx_gives_the_vectors_of_both_towers(tiny_clip: ClipModel, tmp_path: Path) -> None:
    """With dimensions appended by a tower that shares its first block with the joint one's."""
    tower = copy.deepcopy(tiny_clip.model.visual)
    with torch.no_grad():
        tower.transformer.resblocks[-1].mlp.c_fc.weight.mul_(2)
    head = linear_head(
        torch.randn(4, tiny_clip.embed_dim, generator=torch.Generator().manual_seed(2)),
        torch.zeros(4),
    )
    gate = Gate(torch.eye(tiny_clip.embed_dim)[:2], 0.5, 0.1)
    clip = appended_clip(tiny_clip, tower, head, 2.0, gate)
    write_export(clip, tmp_path)
    result = pymcip.export(model=str(tmp_path), out=tmp_path / "out", onnx=True, device="cpu")
    assert result.onnx == tmp_path / "out" / "onnx"
    runtime = pytest.importorskip("onnxruntime")
    size = clip.image_size
    pixels = torch.randn(5, 3, size, size, generator=torch.Generator().manual_seed(1))
    tokens = clip.tokenizer(["a red square", "a dog"])
    again = load(str(tmp_path), device="cpu", precision="fp32")
    for file, name, batch, features in (
        ("image.onnx", "pixels", pixels, again.image_features),
        ("text.onnx", "tokens", tokens, again.text_features),
    ):
        session = runtime.InferenceSession(str(result.onnx / file))
        with torch.no_grad():
            wanted = features(batch).numpy().astype(np.float64)
        for rows in (len(batch), 1):
            (found,) = session.run(None, {name: batch[:rows].numpy()})
            assert found.shape == (rows, clip.embed_dim)
            np.testing.assert_allclose(found, wanted[:rows], atol=1e-5)
