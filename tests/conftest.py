"""Fixtures shared by the tests: a tiny random CLIP, and writers of small data sets of each kind."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():  # Triton decides at its import, and others import it
    os.environ["TRITON_INTERPRET"] = "1"

import contextlib
import importlib
import io
import json
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet
import pytest
import safetensors.torch
from PIL import Image

from pymcip.configs import TrainSettings
from pymcip.data import Captions, load_images
from pymcip.embedding import EmbeddingFolder, embed_captions, embed_images
from pymcip.model import ClipModel, load
from tests.beside import BESIDE


def pytest_collection_finish(session: pytest.Session) -> None:
    if not session.config.option.collectonly:
        BESIDE.start({name for item in session.items for name in getattr(item, "fixturenames", ())})


def pytest_unconfigure() -> None:
    BESIDE.stop()


@pytest.fixture(scope="session", autouse=True)
def unsynced() -> Iterator[None]:
    """Leave out waiting for the disk, which takes longer than a tiny run: no test cuts the power."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


TINY_MODEL = {
    "embed_dim": 16,
    "vision_cfg": {
        "image_size": 32,
        "layers": 1,
        "width": 32,
        "head_width": 16,
        "patch_size": 16,
    },
    "text_cfg": {
        "context_length": 16,
        "vocab_size": 49408,
        "width": 32,
        "heads": 2,
        "layers": 1,
    },
}
TINY_TIMM: dict[str, Any] = {
    **TINY_MODEL,
    "vision_cfg": {
        "timm_model_name": "test_efficientnet",
        "timm_model_pretrained": False,
        "timm_pool": "avg",
        "timm_proj": "linear",
        "image_size": 64,
    },
    "custom_text": True,
}
TINY_PREPROCESSING = {
    "size": 32,
    "mode": "RGB",
    "mean": list(open_clip.OPENAI_DATASET_MEAN),
    "std": list(open_clip.OPENAI_DATASET_STD),
    "interpolation": "bicubic",
    "resize_mode": "shortest",
    "fill_color": 0,
}
CAPTIONS = [
    "a photo of a red square",
    "a green square on a plain ground",
    "the blue square",
    "a drawing of something yellow",
    "grey noise, nothing else",
    "two dogs run over wet grass",
    "a city at night seen from above",
    "fresh apples in a wooden box",
]
COLOURS = [(200, 40, 40), (40, 180, 60), (40, 70, 210), (210, 200, 40), (150, 60, 190)]


def write_hub_folder(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Write a hub-style folder of the tiny model, random weights; `changes` update its config."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": {**TINY_MODEL, **changes}, "preprocess_cfg": TINY_PREPROCESSING}
    (folder / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    safetensors.torch.save_file(weights, folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the hub-style folder of a random CLIP: D = 16, 32 px images, 16 tokens."""
    return write_hub_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def hub_folder(tmp_path: Path) -> Callable[..., Path]:
    """Write another such folder: `hub_folder("name", vision_cfg=...)` changes its config."""

    def write(name: str, **changes: Any) -> Path:
        return write_hub_folder(tmp_path / name, **changes)

    return write


@pytest.fixture
def tiny_clip(tiny_model_dir: Path) -> ClipModel:
    """Load the tiny model afresh, on the CPU in fp32."""
    return load(f"local-dir:{tiny_model_dir}", device="cpu", precision="fp32")


def picture(seed: int, colour: Sequence[int] = (128, 128, 128), size: int = 40) -> Image.Image:
    """Make a noisy RGB picture with a square in `colour`; the seed decides noise and place."""
    generator = np.random.default_rng(seed)
    pixels = generator.integers(90, 166, (size, size, 3), dtype=np.uint8)
    top, left = generator.integers(0, size // 2, 2)
    pixels[top : top + size // 2, left : left + size // 2] = colour
    return Image.fromarray(pixels)


def images(count: int = 3, size: int = 32) -> torch.Tensor:
    """Standard normal pixels, float32 [count, 3, size, size], the same in every call."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def encoded(image: Image.Image, file_format: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format)
    return buffer.getvalue()


@pytest.fixture
def tiny_images(tmp_path: Path) -> Callable[..., Path]:
    """Make ImageFolders: `tiny_images(name="images", classes=3, per_class=4, size=40)` -> path.

    Writes `name/class{c}/{i}.jpg`; pictures of a class share the colour of a square.
    """

    def make(name: str = "images", classes: int = 3, per_class: int = 4, size: int = 40) -> Path:
        for label in range(classes):
            folder = tmp_path / name / f"class{label}"
            folder.mkdir(parents=True)
            for index in range(per_class):
                image = picture(label * 1000 + index, COLOURS[label % len(COLOURS)], size)
                image.save(folder / f"{index}.jpg")
        return tmp_path / name

    return make


def write_shard(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """Write a tar file of members in the order given; names are written as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def sample_members(key: str, sample: Mapping[str, Any]) -> list[tuple[str, bytes]]:
    """Tar members of one sample: images and bytes as they are, dicts as JSON, the rest as text."""
    members = []
    for extension, value in sample.items():
        if isinstance(value, Image.Image):
            file_format = {"jpg": "JPEG", "jpeg": "JPEG"}.get(extension, extension.upper())
            content = encoded(value, file_format)
        elif isinstance(value, bytes):
            content = value
        elif isinstance(value, Mapping):
            content = json.dumps(value).encode()
        else:
            content = str(value).encode()
        members.append((f"{key}.{extension}", content))
    return members


def files(folder: Path) -> dict[str, bytes]:
    """The content of every file below a folder, by its path in it."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows as the table that the path's ending asks for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pa.parquet.write_table(pa.Table.from_pylist(list(rows)), path)
        return path
    separator = "\t" if path.suffix == ".tsv" else ","
    lines = [separator.join(rows[0])]
    lines += [
        separator.join(
            f'"{cell}"' if separator in str(cell) else str(cell) for cell in row.values()
        )
        for row in rows
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def shards(tmp_path: Path) -> Callable[..., list[Path]]:
    """Writer of webdataset shards: `shards(samples, name="shards", per_shard=4)` -> tar paths.

    A sample is a dict extension -> content, for example
    `{"jpg": picture(0), "cls": 3, "txt": "a caption", "json": {"caption": "…"}}`. Without samples
    it writes 12: classes 0 to 2, each with a caption of its own.
    """

    def write(
        samples: Sequence[Mapping[str, Any]] | None = None, name: str = "shards", per_shard: int = 4
    ) -> list[Path]:
        if samples is None:
            samples = [
                {
                    "jpg": picture(index, COLOURS[index % 3]),
                    "cls": index % 3,
                    "txt": f"{CAPTIONS[index % 3]}, number {index}",
                }
                for index in range(12)
            ]
        paths = []
        for number, start in enumerate(range(0, len(samples), per_shard)):
            members = []
            for offset, sample in enumerate(samples[start : start + per_shard]):
                members += sample_members(f"{start + offset:06d}", sample)
            paths.append(write_shard(tmp_path / name / f"{number:06d}.tar", members))
        return paths

    return write


@pytest.fixture
def captions_file(tmp_path: Path) -> Callable[..., Path]:
    """Writer of caption text files, a line each: `captions_file(lines=CAPTIONS, name="c.txt")`."""

    def write(lines: Sequence[str] = CAPTIONS, name: str = "captions.txt") -> Path:
        path = tmp_path / name
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return path

    return write


@pytest.fixture
def ten_images(shards: Callable[..., list[Path]]) -> Path:
    """Make ten labelled images in shards; the third can't be decoded."""
    samples: list[dict[str, Any]] = [
        {"jpg": picture(i), "cls": i % 3, "txt": f"picture {i}"} for i in range(10)
    ]
    samples[2]["jpg"] = b"\xff\xd8\xff broken\tand\nodd"
    return shards(samples)[0].parent


@pytest.fixture
def embedded(
    tiny_clip: ClipModel, shards: Callable[..., list[Path]], tmp_path: Path
) -> EmbeddingFolder:
    """Embed twelve images and eight captions with the tiny model into one folder."""
    data = load_images(shards()[0].parent)
    embed_images(tiny_clip, data, tmp_path / "embedded", part_size=5)
    return embed_captions(tiny_clip, Captions(CAPTIONS), tmp_path / "embedded", part_size=3)


@pytest.fixture
def run_options(
    tmp_path: Path, tiny_model_dir: Path, tiny_images: Callable[..., Path]
) -> dict[str, Any]:
    """Options of a run of 2 x 3 image steps, but for its captions."""
    return {
        "model": f"local-dir:{tiny_model_dir}",
        "train_data": str(tiny_images("train")),
        "threshold": -1.0,
        "out": str(tmp_path / "run"),
        "device": "cpu",
        "precision": "fp32",
        "epochs": 2,
        "batch_size": 4,
        "lr": 1e-3,
        "warmup": 2,
        "log_steps": 1,
        "save_steps": 2,
    }


def settings_for(**changes: Any) -> TrainSettings:
    """The settings of a run of `mcip`, with nothing left to choose; its files are never opened."""
    chosen = {
        "model": "m", "train_data": "d", "captions": "c", "out": "o", "method": "mcip",
        "epochs": 3, "batch_size": 64, "train_size": 32, "lr": 1e-5,
        "warmup": 100, "lr_classes": 1e-4,
    }  # fmt: skip
    return TrainSettings(**{**chosen, **changes})


def lines_of(out: Path) -> list[dict[str, Any]]:
    """The records of a run folder's metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def computed_of(out: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl without figures of time and memory: equal for equal runs."""
    times = {"seconds", "samples_per_second", "system"}
    return [{k: v for k, v in line.items() if k not in times} for line in lines_of(out)]


KILLED = """
import json, os, signal, sys
import pymcip
from pymcip.training import loop

step, options = int(sys.argv[1]), json.loads(sys.argv[2])
inner = loop.optimizer_step

def killed(run, stage, micro_batches):
    values = inner(run, stage, micro_batches)
    if run.position.global_step + 1 == step:
        os.kill(os.getpid(), signal.SIGKILL)
    return values

loop.optimizer_step = killed
sys.stdin.read()
pymcip.train(**options)
"""


def start_killed(step: int, options: Mapping[str, Any], cwd: Path) -> subprocess.Popen[str]:
    """Start a process that imports what it needs, and trains when `train_until_killed` lets it.

    `step`: the one within which SIGKILL ends it. `cwd` is not the repository, whose folder would be
    imported.
    """
    return subprocess.Popen(
        [sys.executable, "-c", KILLED, str(step), json.dumps(options)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd,
    )  # fmt: skip


def train_until_killed(child: subprocess.Popen[str]) -> None:
    _, error = child.communicate("", timeout=240)
    assert child.returncode == -signal.SIGKILL, f"{child.args}: {error}"


@contextlib.contextmanager
def bench_module(name: str) -> Iterator[Any]:
    """Import a bench by its name, with bench/ on the path meanwhile; skip the test without one."""
    folder = Path(__file__).parents[1] / "bench"
    if not folder.is_dir():
        pytest.skip("no bench/ here")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield importlib.import_module(name)
