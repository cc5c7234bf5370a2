"""Which models are loaded, and what open_clip would let pass in silence is refused."""

from __future__ import annotations

import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import open_clip
import pytest
import safetensors.torch
import torch

from pymcip.errors import CheckpointError, ConfigError
from pymcip.model import (
    is_convolutional,
    load,
    weights_fingerprint,
)
from tests.conftest import TINY_MODEL, TINY_TIMM, images, picture, write_hub_folder


@pytest.fixture
def known_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Make "tiny" a name that open_clip knows, with a tag of each kind and no downloads."""
    path = tmp_path / "tiny.pt"
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", TINY_MODEL)
    tags = {
        "plain": {"url": "https://example.invalid/plain.pt", "quick_gelu": False},
        "quick": {"url": "https://example.invalid/quick.pt", "quick_gelu": True},
    }
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny", tags)
    downloads: list[Any] = []

    def download(tag: dict[str, Any], **options: Any) -> str:
        downloads.append(tag["url"])
        return str(path)

    monkeypatch.setattr(open_clip.factory, "download_pretrained", download)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = open_clip.create_model("tiny")
    torch.save(model.state_dict(), path)
    return {"path": path, "downloads": downloads, "model": model}


# Names


def test_known_name_with_random_weights(known_model: dict[str, Any]) -> None:
    clip = load("tiny", "random", device="cpu")
    assert clip.model_cfg["embed_dim"] == 16
    assert clip.preprocess_cfg["size"] in (32, (32, 32))
    assert known_model["downloads"] == []


def test_slash_of_openai_names_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-16", TINY_MODEL)
    assert load("tiny/16", "random", device="cpu").name == "tiny-16"


def test_checkpoint_path_is_loaded(known_model: dict[str, Any]) -> None:
    clip = load("tiny", str(known_model["path"]), device="cpu")
    wanted = weights_fingerprint(known_model["model"].state_dict())
    assert weights_fingerprint(clip.model.state_dict()) == wanted


def test_published_checkpoint_loads(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A plain state dict of ViT-L-14-336, as MCIP's authors publish it; the weights are random.

    It is given by its name in a folder, and gets QuickGELU, as OpenAI's weights do.
    """
    with torch.device("meta"):
        state = open_clip.create_model("ViT-L-14-336", device="meta").state_dict()
    largest = max(value.numel() for value in state.values())
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(largest + len(state), generator=generator).half()
    for start, (name, value) in enumerate(state.items()):  # all of them share one storage
        state[name] = numbers[start : start + value.numel()].view(value.shape)
    path = tmp_path / "MCIP-ViT-L-14-336.pth"
    torch.save(state, path)
    clip = load("ViT-L-14-336", str(path.with_suffix("")), device="cpu")
    loaded = clip.model.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(value, state[name].float()) for name, value in loaded.items())
    assert clip.embed_dim == 768
    assert clip.preprocess_cfg["size"] in (336, (336, 336))
    assert clip.model_cfg["quick_gelu"]
    assert "QuickGELU" not in caplog.text


def test_a_file_may_need_quick_gelu(
    known_model: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-quickgelu", TINY_MODEL)
    load("tiny", str(known_model["path"]), device="cpu")
    assert "model='tiny-quickgelu'" in caplog.text


@pytest.mark.parametrize(
    ("model", "pretrained", "words"),
    [
        (
            "tiny",
            "MCIP-tiny",
            "no file MCIP-tiny.pth.*https://visual-computing.com/.*/MCIP-tiny.pth",
        ),
        ("tiny", "kept/MCIP-tiny.pth", "no file kept/MCIP-tiny.pth"),
        ("ViT-B-32", "MCIP-tiny", "does not go with model='ViT-B-32'; allowed: tiny"),
    ],
)
def test_published_checkpoints_are_not_downloaded(
    model: str,
    pretrained: str,
    words: str,
    known_model: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("pymcip.model.loading.PUBLISHED", ("MCIP-tiny",))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=words):
        load(model, pretrained, device="cpu")
    assert known_model["downloads"] == []


def test_a_published_checkpoint_of_other_keys(
    known_model: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("pymcip.model.loading.PUBLISHED", ("MCIP-tiny",))
    monkeypatch.chdir(tmp_path)
    state = known_model["model"].state_dict()
    state["visual.projection"] = state.pop("visual.proj")
    torch.save(state, "MCIP-tiny.pth")
    with pytest.raises(CheckpointError, match=r"visual\.proj"):
        load("tiny", "MCIP-tiny", device="cpu")


def test_a_file_is_preprocessed_as_the_models_tags_say(
    known_model: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SigLIP's mean, deviation and squeezing for a SigLIP file; what tags differ in is open_clip's."""
    half = (0.5, 0.5, 0.5)
    tags = {
        name: {"url": "", "mean": half, "std": half, "resize_mode": mode}
        for name, mode in (("one", "squash"), ("other", "squash"))
    }
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny", tags)
    path = str(known_model["path"])
    found = load("tiny", path, device="cpu").preprocess_cfg
    assert (found["mean"], found["std"], found["resize_mode"]) == (half, half, "squash")
    assert found["interpolation"] == "bicubic"
    monkeypatch.setitem(tags["other"], "resize_mode", "shortest")
    monkeypatch.setitem(tags["other"], "mean", (0.1, 0.2, 0.3))
    found = load("tiny", path, device="cpu").preprocess_cfg
    assert found["mean"] == open_clip.OPENAI_DATASET_MEAN
    assert (found["std"], found["resize_mode"]) == (half, "shortest")


@pytest.mark.parametrize(("tag", "quick"), [("plain", False), ("quick", True)])
def test_quick_gelu_follows_the_tag(known_model: dict[str, Any], tag: str, quick: bool) -> None:
    clip = load("tiny", tag, device="cpu", precision="fp32")
    assert known_model["downloads"] == [f"https://example.invalid/{tag}.pt"]
    assert clip.model_cfg.get("quick_gelu", False) is quick
    kinds = {type(module) for module in clip.model.modules()}
    assert (open_clip.transformer.QuickGELU in kinds) is quick
    assert (torch.nn.GELU in kinds) is not quick


@pytest.mark.parametrize(
    ("model", "pretrained", "words"),
    [
        ("tinny", None, ["model='tinny' is not known to open_clip", "tiny"]),
        ("some-org/some.clip", None, ["did you mean 'hf-hub:some-org/some.clip'?"]),
        ("openai/clip-vit-base-patch32", None, ["mean model='ViT-B-32' with pretrained='openai'?"]),
        ("openai/clip-vit-large-patch14-336", None, ["mean model='ViT-L-14-336' with"]),
        ("tiny", None, ["without pretrained=", "plain, quick", "pretrained='random'"]),
        ("tiny", "fast", ["pretrained='fast' is neither a file nor a tag", "plain, quick"]),
        ("local-dir:/nowhere", None, ["no open_clip_config.json in /nowhere"]),
        ("local-dir:", None, ["names nothing"]),
        ("local-dir:TINY", "plain", ["names its own weights"]),
    ],
)
def test_names_that_are_wrong(
    known_model: dict[str, Any],
    tiny_model_dir: Path,
    model: str,
    pretrained: str | None,
    words: list[str],
) -> None:
    with pytest.raises(ConfigError) as raised:
        load(model.replace("TINY", str(tiny_model_dir)), pretrained, device="cpu")
    for word in words:
        assert word in str(raised.value)


def test_device_that_is_not_there(tiny_model_dir: Path) -> None:
    with pytest.raises(ConfigError, match="device='abacus' can't be used here"):
        load(f"local-dir:{tiny_model_dir}", device="abacus")


# Folders


@pytest.mark.parametrize("place", ["exported/hub", "hub", "."])
def test_run_folder_is_resolved(tiny_model_dir: Path, tmp_path: Path, place: str) -> None:
    shutil.copytree(tiny_model_dir, tmp_path / "run" / place, dirs_exist_ok=True)
    clip = load(str(tmp_path / "run"), device="cpu")
    assert clip.name == f"local-dir:{tmp_path / 'run' / place}"


def test_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"without exported/hub/open_clip_config\.json"):
        load(str(tmp_path))


# Damaged and foreign weights


@pytest.fixture
def model_copy(tiny_model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "copy"))


def test_folder_without_weights_is_not_a_random_model(model_copy: Path) -> None:
    (model_copy / "open_clip_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="could not be loaded"):
        load(f"local-dir:{model_copy}", device="cpu")


@pytest.mark.parametrize("keep", [0, 100, 5000])
def test_truncated_safetensors(model_copy: Path, keep: int) -> None:
    path = model_copy / "open_clip_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="undamaged plain state dict"):
        load(f"local-dir:{model_copy}", device="cpu")


def test_damaged_config(model_copy: Path) -> None:
    (model_copy / "open_clip_config.json").write_text('{"model_cfg": {')
    with pytest.raises(CheckpointError, match="JSONDecodeError"):
        load(f"local-dir:{model_copy}", device="cpu")


def test_weights_of_another_model(model_copy: Path) -> None:
    path = model_copy / "open_clip_model.safetensors"
    state = safetensors.torch.load_file(path)
    state["visual.proj"] = torch.zeros(32, 8)
    safetensors.torch.save_file(state, path)
    with pytest.raises(CheckpointError, match=r"visual\.proj"):
        load(f"local-dir:{model_copy}", device="cpu")


class Trap:
    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('the checkpoint ran code')",)


def write_trap(path: Path) -> None:
    path.write_bytes(pickle.dumps({"state_dict": Trap()}))


def write_garbage(path: Path) -> None:
    path.write_bytes(b"not a checkpoint at all" * 50)


def write_other_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.txt", "hello")


def write_list(path: Path) -> None:
    torch.save([torch.zeros(3)], path)


def write_nothing(path: Path) -> None:
    torch.save({}, path)


@pytest.mark.parametrize(
    "write", [write_trap, write_garbage, write_other_zip, write_list, write_nothing]
)
def test_files_that_are_no_state_dict(known_model: dict[str, Any], write: Any) -> None:
    write(known_model["path"])
    with pytest.raises(CheckpointError, match="belong together"):
        load("tiny", str(known_model["path"]), device="cpu")


# Image size


def test_vit_at_another_size_keeps_weights_and_resizes_positions(tiny_model_dir: Path) -> None:
    small = load(f"local-dir:{tiny_model_dir}", device="cpu", precision="fp32")
    large = load(f"local-dir:{tiny_model_dir}", image_size=64, device="cpu", precision="fp32")
    assert large.model_cfg["vision_cfg"]["image_size"] == 64
    assert large.preprocess_cfg["size"] in (64, (64, 64))
    assert large.preprocess_val(picture(0, size=90)).shape == (3, 64, 64)
    assert large.encode_images(images(size=64)).shape == (3, 16)
    before, after = small.model.state_dict(), large.model.state_dict()
    changed = {name for name in before if before[name].shape != after[name].shape}
    assert changed == {"visual.positional_embedding"}
    assert after["visual.positional_embedding"].shape == (17, 32)
    for name in before.keys() - changed:
        assert torch.equal(before[name], after[name])


def test_timm_at_another_size(tmp_path: Path) -> None:
    folder = write_hub_folder(tmp_path / "timm", **TINY_TIMM)
    clip = load(f"local-dir:{folder}", image_size=96, device="cpu", precision="fp32")
    assert clip.preprocess_val(picture(0, size=120)).shape == (3, 96, 96)
    assert clip.encode_images(images(size=96)).shape == (3, 16)
    assert clip.model_cfg["custom_text"] is True
    assert is_convolutional(clip.model)
    kernel = next(value for value in clip.model.visual.parameters() if value.ndim == 4)  # type: ignore[union-attr]
    assert kernel.is_contiguous(memory_format=torch.channels_last)
