"""Embedding again into a folder: what is kept, what is made again, what is refused."""

from __future__ import annotations

import dataclasses
import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

import pymcip
from pymcip.data import Captions, ImageData, load_images
from pymcip.data.loading import iterate_batches
from pymcip.embedding import EmbeddingFolder, embed_captions, embed_images
from pymcip.errors import (
    DataError,
    OutputExistsError,
    ResourceError,
    StaleEmbeddingsError,
)
from pymcip.model import ClipModel, load
from pymcip.training.batches import train_transform
from tests.conftest import CAPTIONS, files, picture, write_hub_folder

FP16_STEP = 2.0**-11  # relative rounding error of float16


# Resuming


class StoppedError(Exception):
    pass


def test_interrupted_run_goes_on(
    tiny_clip: ClipModel, ten_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load_images(ten_images)
    whole = files(embed_images(tiny_clip, data, tmp_path / "whole", part_size=4).path)
    out = tmp_path / "out"
    read: list[int] = []
    original = ImageData.read_with_digest

    def counting_read(self: ImageData, index: int) -> Any:
        read.append(index)
        if len(read) == 6:
            raise StoppedError
        return original(self, index)

    monkeypatch.setattr(ImageData, "read_with_digest", counting_read)
    with pytest.raises(StoppedError):
        embed_images(tiny_clip, data, out, part_size=4, batch_size=1)
    with pytest.raises(DataError, match=r"holds 1 of 3 parts of images; run pymcip\.embed again"):
        EmbeddingFolder(out).parts("img")
    assert len(EmbeddingFolder(out).skipped) == 1
    embed_images(tiny_clip, data, out, part_size=4)
    assert read[6:] == [4, 5, 6, 7, 8, 9]  # the complete part is kept
    assert files(out) == whole
    embed_images(tiny_clip, data, out, part_size=4)
    assert len(read) == 12  # nothing is left to do


@pytest.mark.parametrize("lost", ["metadata/metadata_1.parquet", "img_emb/img_emb_0.npy"])
def test_lost_file_is_made_again(
    lost: str, tiny_clip: ClipModel, ten_images: Path, tmp_path: Path
) -> None:
    data = load_images(ten_images)
    whole = files(embed_images(tiny_clip, data, tmp_path, part_size=4).path)
    (tmp_path / lost).unlink()
    embed_images(tiny_clip, data, tmp_path, part_size=4)
    assert files(tmp_path) == whole


@pytest.mark.parametrize("full", ["vectors", "metadata", "skipped"])
def test_full_disk(
    full: str,
    tiny_clip: ClipModel,
    ten_images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = load_images(ten_images).select([0, 1, 3, 4, 2, 5])  # the broken one in the second part
    out = tmp_path / "out"
    calls = []
    at = 3 if full == "skipped" else 2  # texts: the fingerprint, then the list of each part

    def disk_full_in_second_part(write: Callable[..., Any]) -> Callable[..., Any]:
        def writing(*arguments: Any, **options: Any) -> Any:
            calls.append(arguments)
            if len(calls) == at:
                if hasattr(arguments[0], "write"):
                    arguments[0].write(b"half of it")
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(*arguments, **options)

        return writing

    with monkeypatch.context() as patch:
        if full == "vectors":
            patch.setattr(np, "save", disk_full_in_second_part(np.save))
        elif full == "metadata":
            write_table = disk_full_in_second_part(pa.parquet.write_table)
            patch.setattr(pa.parquet, "write_table", write_table)
        else:
            # The first text written is the fingerprint.
            patch.setattr(Path, "write_text", disk_full_in_second_part(Path.write_text))
        with pytest.raises(OSError, match="No space left"):
            embed_images(tiny_clip, data, out, part_size=4)
    assert not [path for path in out.rglob("*") if path.name.endswith(".tmp")]
    assert len(np.load(out / "img_emb" / "img_emb_0.npy")) == 4  # what was complete still is
    assert (out / "metadata" / "metadata_0.parquet").is_file()
    assert not (out / "metadata" / "metadata_1.parquet").exists()
    whole = files(embed_images(tiny_clip, data, tmp_path / "whole", part_size=4).path)
    assert files(embed_images(tiny_clip, data, out, part_size=4).path) == whole


# Stale folders


def test_other_weights_are_refused(
    tiny_clip: ClipModel, tiny_images: Callable[..., Path], tmp_path: Path
) -> None:
    data = load_images(tiny_images())
    before = files(embed_images(tiny_clip, data, tmp_path / "out").path)
    with torch.no_grad():
        tiny_clip.model.visual.proj[0, 0] += 1e-3  # type: ignore[union-attr,index,operator]
    with pytest.raises(StaleEmbeddingsError, match=r"another model \(.*overwrite=True"):
        embed_images(tiny_clip, data, tmp_path / "out")
    assert files(tmp_path / "out") == before
    embed_captions(tiny_clip, Captions(CAPTIONS), tmp_path / "out")
    with torch.no_grad():
        tiny_clip.model.visual.proj[0, 0] += 1e-3  # type: ignore[union-attr,index,operator]
    embed_captions(tiny_clip, Captions(CAPTIONS), tmp_path / "out")  # the text tower is the same


def test_other_transform_is_refused(
    tiny_model_dir: Path, tiny_images: Callable[..., Path], tmp_path: Path
) -> None:
    data = load_images(tiny_images())
    name = f"local-dir:{tiny_model_dir}"
    clip = load(name, device="cpu", precision="fp32")
    embed_images(clip, data, tmp_path / "out")
    changed = dataclasses.replace(clip, preprocess_val=train_transform(clip, 32, {}))
    with pytest.raises(StaleEmbeddingsError, match=r"another transform \(transform: Compose"):
        embed_images(changed, data, tmp_path / "out")
    with pytest.raises(StaleEmbeddingsError, match=r"another precision \(precision: fp32, now amp"):
        embed_images(dataclasses.replace(clip, precision="amp_bf16"), data, tmp_path / "out")


def test_other_data_are_refused(
    tiny_clip: ClipModel, tiny_images: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_images()
    embed_images(tiny_clip, load_images(folder), tmp_path / "out")
    with pytest.raises(StaleEmbeddingsError, match="another part_size"):
        embed_images(tiny_clip, load_images(folder), tmp_path / "out", part_size=5)
    picture(99).save(folder / "class0" / "0.jpg")
    with pytest.raises(StaleEmbeddingsError, match=r"another images \(images: 12 rows"):
        embed_images(tiny_clip, load_images(folder), tmp_path / "out")
    embed_captions(tiny_clip, Captions(["a", "b"]), tmp_path / "out")
    with pytest.raises(StaleEmbeddingsError, match=r"another captions \(captions: 2 rows"):
        embed_captions(tiny_clip, Captions(["a", "c"]), tmp_path / "out")


def test_overwrite(
    tiny_model_dir: Path, captions_file: Callable[..., Path], tmp_path: Path
) -> None:
    other = write_hub_folder(tmp_path / "other", seed=1)
    options = {"captions": captions_file(), "out": tmp_path / "out", "device": "cpu"}
    first = pymcip.embed(model=f"local-dir:{tiny_model_dir}", **options).vectors("text")
    first = np.array(first)
    with pytest.raises(StaleEmbeddingsError, match="another model"):
        pymcip.embed(model=f"local-dir:{other}", **options)
    second = pymcip.embed(model=f"local-dir:{other}", overwrite=True, **options).vectors("text")
    assert np.abs(first - second).max() > 0.1


def test_foreign_files_are_not_touched(
    tiny_model_dir: Path, captions_file: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(OutputExistsError, match="not empty"):
        pymcip.embed(
            model=f"local-dir:{tiny_model_dir}",
            captions=captions_file(),
            out=tmp_path,
            device="cpu",
        )


def test_embeddings_of_unknown_origin_are_refused(tiny_clip: ClipModel, tmp_path: Path) -> None:
    embed_captions(tiny_clip, Captions(CAPTIONS), tmp_path)
    (tmp_path / "text_fingerprint.json").unlink()
    with pytest.raises(StaleEmbeddingsError, match="what they were made from is not known"):
        embed_captions(tiny_clip, Captions(CAPTIONS), tmp_path)


class Ending:
    """A transform that ends a worker process."""

    def __call__(self, image: Any) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        return torch.zeros(1)


def test_what_happens_in_a_worker_ends_the_work_with_its_reason(
    tiny_images: Callable[..., Path], tiny_clip: ClipModel
) -> None:
    folder = tiny_images()
    data = load_images(folder)
    with pytest.raises(ResourceError, match=r"A decoding process \(\d+\).*use fewer workers"):
        list(iterate_batches(data, [0, 1], Ending(), batch_size=1, workers=1))
    (folder / "class0" / "0.jpg").unlink()
    with pytest.raises(DataError, match=r"^\S+0\.jpg can't be read any more: [^\n]*$"):
        list(iterate_batches(data, [0, 1], tiny_clip.preprocess_val, batch_size=1, workers=1))
