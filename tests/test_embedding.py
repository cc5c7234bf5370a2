"""Embedding folders: layout, resuming, refusing what is stale, skipping what can't be decoded."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

import pymcip
from pymcip.data import Captions, ImageData, load_captions, load_images
from pymcip.data.loading import DecodedImages
from pymcip.embedding import EmbeddingCache, EmbeddingFolder, embed_captions, embed_images
from pymcip.errors import (
    ConfigError,
    DataError,
    DecodeError,
)
from pymcip.model import ClipModel
from tests.conftest import CAPTIONS, files, picture

FP16_STEP = 2.0**-11  # relative rounding error of float16


def expected_images(clip: ClipModel, data: ImageData, rows: list[int]) -> np.ndarray:
    """The oracle: one image at a time through the bare open_clip model, in fp32."""
    model: Any = clip.model
    vectors = []
    for row in rows:
        with torch.no_grad():
            vector = model.encode_image(clip.preprocess_val(data.read(row))[None])[0]
        vectors.append((vector / vector.norm()).numpy())
    return np.stack(vectors)


def test_images(tiny_clip: ClipModel, ten_images: Path, tmp_path: Path) -> None:
    data = load_images(ten_images)
    folder = embed_images(tiny_clip, data, tmp_path / "out", batch_size=3, part_size=4)
    kept = [0, 1, 3, 4, 5, 6, 7, 8, 9]
    assert [part.shape for part in folder.parts("img")] == [(3, 16), (4, 16), (2, 16)]
    assert all(isinstance(part, np.memmap) for part in folder.parts("img"))
    assert folder.vectors("img").dtype == np.float16
    assert folder.rows("img").dtype == np.int64
    assert folder.rows("img").tolist() == kept
    expected = expected_images(tiny_clip, data, kept)
    np.testing.assert_allclose(folder.vectors("img"), expected, atol=FP16_STEP, rtol=0)
    norms = np.linalg.norm(folder.vectors("img").astype(np.float64), axis=1)
    assert np.abs(norms - 1).max() < FP16_STEP
    metadata = folder.metadata("img").to_pylist()
    assert [row["index"] for row in metadata] == kept
    assert metadata[2]["image_path"] == data.key(3)
    assert metadata[3]["label"] == "1"
    assert metadata[2]["caption"] == "picture 3"


def test_captions(tiny_clip: ClipModel, tmp_path: Path) -> None:
    captions = Captions([*CAPTIONS, "a caption " * 30])
    folder = embed_captions(tiny_clip, captions, tmp_path / "out", batch_size=2, part_size=4)
    assert [len(part) for part in folder.parts("text")] == [4, 4, 1]
    assert folder.captions() == captions.texts
    assert folder.rows("text").tolist() == list(range(9))
    model: Any = tiny_clip.model
    with torch.no_grad():
        expected = model.encode_text(tiny_clip.tokenizer(captions.texts))
    expected /= expected.norm(dim=-1, keepdim=True)
    np.testing.assert_allclose(folder.vectors("text"), expected, atol=FP16_STEP, rtol=0)


def test_layout_is_clip_retrievals(
    tiny_model_dir: Path,
    tiny_images: Callable[..., Path],
    captions_file: Callable[..., Path],
    tmp_path: Path,
) -> None:
    folder = pymcip.embed(
        model=f"local-dir:{tiny_model_dir}",
        images=tiny_images(),
        captions=captions_file(),
        out=tmp_path / "out",
        device="cpu",
        precision="fp32",
    )
    assert sorted(files(folder.path)) == [
        ".pymcip-files",
        "img_emb/img_emb_0.npy",
        "img_fingerprint.json",
        "metadata/metadata_0.parquet",
        "text_emb/text_emb_0.npy",
        "text_fingerprint.json",
        "text_metadata/metadata_0.parquet",
    ]
    assert np.load(folder.path / "img_emb/img_emb_0.npy").shape == (12, 16)
    assert isinstance(folder.vectors("img"), np.memmap)
    assert folder.skipped == []
    assert "images in 1 part(s), captions in 1 part(s)" in repr(folder)


def test_part_names_sort_as_text(tiny_clip: ClipModel, tmp_path: Path) -> None:
    captions = Captions([f"caption {number}" for number in range(11)])
    folder = embed_captions(tiny_clip, captions, tmp_path, part_size=1)
    names = sorted(path.name for path in (tmp_path / "text_emb").iterdir())
    assert names[:2] == ["text_emb_00.npy", "text_emb_01.npy"]
    assert names[-1] == "text_emb_10.npy"
    assert folder.captions() == captions.texts


def test_order_and_batches_do_not_matter(
    tiny_clip: ClipModel, ten_images: Path, tmp_path: Path
) -> None:
    data = load_images(ten_images)
    one = embed_images(tiny_clip, data, tmp_path / "1", batch_size=10, part_size=100)
    two = embed_images(tiny_clip, data, tmp_path / "2", batch_size=1, part_size=3)
    np.testing.assert_allclose(one.vectors("img"), two.vectors("img"), atol=FP16_STEP, rtol=0)
    assert one.metadata("img").equals(two.metadata("img"))


def test_worker_processes_give_the_same(
    tiny_clip: ClipModel, ten_images: Path, tmp_path: Path
) -> None:
    data = load_images(ten_images)
    embed_images(tiny_clip, data, tmp_path / "0", part_size=6, batch_size=3)
    embed_images(tiny_clip, data, tmp_path / "1", part_size=6, batch_size=3, workers=1)
    assert files(tmp_path / "0") == files(tmp_path / "1")


def test_data_set_can_be_sent_to_spawned_workers(tiny_clip: ClipModel, ten_images: Path) -> None:
    data = load_images(ten_images)
    items = DecodedImages(data, [4, 2], tiny_clip.preprocess_val)
    sent = pickle.loads(pickle.dumps(items))
    assert torch.equal(sent[0].image, items[0].image)
    assert sent[0].content == items[0].content
    assert sent[1] == items[1]
    assert sent[1].index == 2


# Undecodable images


def test_skipped_images_are_listed(
    tiny_clip: ClipModel, ten_images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = load_images(ten_images)
    with caplog.at_level(logging.WARNING):
        folder = embed_images(tiny_clip, data, tmp_path / "out", part_size=4)
    (skipped,) = folder.skipped
    assert skipped["index"] == 2
    assert skipped["key"] == data.key(2)
    assert "can't be decoded" in skipped["reason"]
    assert "1 of 10 images can't be decoded and are left out; they are listed in" in caplog.text
    lines = (tmp_path / "out" / "skipped.tsv").read_text().splitlines()
    assert lines[0] == "index\tkey\treason"
    assert len(lines) == 2


def test_what_was_left_out_is_listed(tiny_clip: ClipModel, tmp_path: Path) -> None:
    picture(0).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"broken")
    (tmp_path / "c.svg").write_text("<svg/>")
    data = load_images(tmp_path, labelled=False)
    for _ in range(2):  # also where all is there already
        folder = embed_images(tiny_clip, data, tmp_path / "out")
        assert [item["index"] for item in folder.skipped] == [1]
        lines = (tmp_path / "out" / "skipped.tsv").read_text().splitlines()
        assert lines[1] == f"-1\t{tmp_path}/c.svg\tno kind of image that Pillow reads here"
        assert len(lines) == 3
    assert folder.contents() == [data.digest(0)]


def test_captions_beyond_the_context_are_counted(
    tiny_clip: ClipModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    captions = Captions(["short", "dog " * 20, "dog " * 20 + "cat", "end"])
    for _ in range(2):
        folder = embed_captions(tiny_clip, captions, tmp_path / "out", batch_size=2, part_size=3)
        assert folder.captions_cut == 2
    assert caplog.text.count("2 of 4 texts are longer than the model's context") == 2


def test_nothing_can_be_decoded(
    tiny_clip: ClipModel, shards: Callable[..., list[Path]], tmp_path: Path
) -> None:
    data = load_images(shards([{"jpg": b"broken", "cls": i} for i in range(5)])[0].parent)
    for _ in range(2):  # the second call finds the parts complete, and must say the same
        with pytest.raises(DataError, match=r"not one of 5 images can be decoded: .*000000\.jpg"):
            embed_images(tiny_clip, data, tmp_path / "out", part_size=2)
    assert EmbeddingFolder(tmp_path / "out").vectors("img").shape == (0, 16)


def test_vanished_file_is_no_undecodable_image(
    tiny_clip: ClipModel, tiny_images: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_images()
    data = load_images(folder)
    (folder / "class1" / "0.jpg").unlink()
    with pytest.raises(DataError, match="can't be read any more") as caught:
        embed_images(tiny_clip, data, tmp_path / "out")
    assert not isinstance(caught.value, DecodeError)


# Opening


def test_folder_that_clip_retrieval_wrote(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    paths, texts = [f"{i}.jpg" for i in range(5)], [f"text {i}" for i in range(5)]
    for name in ("img_emb", "text_emb", "metadata"):
        (tmp_path / name).mkdir()
    vectors = generator.standard_normal((5, 8))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    for number, rows in enumerate((slice(0, 3), slice(3, 5))):
        np.save(tmp_path / "img_emb" / f"img_emb_{number}.npy", vectors[rows])
        np.save(tmp_path / "text_emb" / f"text_emb_{number}.npy", -vectors[rows])
        table = pa.table({"image_path": paths[rows], "caption": texts[rows]})
        pa.parquet.write_table(table, tmp_path / "metadata" / f"metadata_{number}.parquet")
    folder = EmbeddingFolder(tmp_path)
    assert np.array_equal(folder.vectors("img"), vectors)
    assert np.array_equal(folder.vectors("text"), -vectors)
    assert folder.rows("img").tolist() == [0, 1, 2, 3, 4]
    assert folder.captions() == texts
    assert folder.metadata("img")["image_path"].to_pylist() == paths
    assert folder.skipped == []


def test_description_of_some_rows(tiny_clip: ClipModel, tmp_path: Path) -> None:
    texts = [f"a picture of {number}" for number in range(8)]
    folder = embed_captions(tiny_clip, Captions(texts), tmp_path, part_size=3)
    rows = np.array([0, 2, 3, 7])
    assert folder.describe("text", rows) == folder.metadata("text").take(rows).to_pylist()
    assert folder.describe("text", rows[:0]) == []
    part = tmp_path / "text_metadata" / "metadata_1.parquet"
    pa.parquet.write_table(pa.parquet.read_table(part).slice(1), part)
    with pytest.raises(DataError, match="7 rows of metadata for 8 embeddings"):
        folder.describe("text", rows)
    with pytest.raises(DataError, match="holds no metadata of images"):
        folder.describe("img", rows)


def test_no_embedding_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no embedding folder"):
        EmbeddingFolder(tmp_path)


def test_missing_kind(tiny_clip: ClipModel, tmp_path: Path) -> None:
    folder = embed_captions(tiny_clip, Captions(CAPTIONS), tmp_path)
    with pytest.raises(DataError, match="0 of 0 parts of images"):
        folder.parts("img")


def test_damaged_parts(tiny_clip: ClipModel, tmp_path: Path) -> None:
    folder = embed_captions(tiny_clip, Captions(CAPTIONS), tmp_path)
    part = tmp_path / "text_emb" / "text_emb_0.npy"
    np.save(part, np.load(part)[:5])
    with pytest.raises(DataError, match=r"text_emb_0\.npy is damaged: its checksum is another"):
        folder.metadata("text")
    part.write_bytes(part.read_bytes()[:30])
    with pytest.raises(DataError, match="can't be read as a NumPy array"):
        folder.parts("text")
    np.save(part, np.zeros(3, np.int64))
    with pytest.raises(DataError, match=r"is int64 \[3\]; expected float16"):
        folder.parts("text")


def test_embedding_that_is_not_finite(
    tiny_clip: ClipModel, tiny_images: Callable[..., Path], tmp_path: Path
) -> None:
    with torch.no_grad():
        tiny_clip.model.visual.proj[0, 0] = float("nan")  # type: ignore[union-attr,index,operator]
    with pytest.raises(DataError, match=r"not finite for .*0\.jpg; its weights are damaged"):
        embed_images(tiny_clip, load_images(tiny_images()), tmp_path / "out")


def test_config_errors_come_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to embed"):
        pymcip.embed(model="ViT-B-32", out=tmp_path / "out")
    with pytest.raises(DataError, match="there is nothing at"):
        pymcip.embed(model="ViT-B-32", images=tmp_path / "absent", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unknown_model_leaves_no_folder(captions_file: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not known to open_clip"):
        pymcip.embed(model="ViT-nothing", captions=captions_file(), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_fingerprint_is_readable(tiny_clip: ClipModel, tmp_path: Path) -> None:
    embed_captions(tiny_clip, Captions(CAPTIONS), tmp_path, part_size=3)
    stored = json.loads((tmp_path / "text_fingerprint.json").read_text())
    assert stored["rows"] == 8
    assert stored["parts"] == 3
    assert stored["data"] == Captions(CAPTIONS).fingerprint()
    assert stored["model_fingerprint"] == tiny_clip.fingerprint("text")


def test_moved_folder_is_the_same_folder(
    tiny_clip: ClipModel, captions_file: Callable[..., Path], tmp_path: Path
) -> None:
    captions = load_captions(captions_file())
    embed_captions(tiny_clip, captions, tmp_path / "a")
    shutil.move(tmp_path / "a", tmp_path / "b")
    before = files(tmp_path / "b")
    embed_captions(tiny_clip, captions, tmp_path / "b")
    assert files(tmp_path / "b") == before


# The cache


def test_cache_embeds_once_per_model_and_data(
    tiny_clip: ClipModel, tiny_images: Callable[..., Path], tmp_path: Path, monkeypatch: Any
) -> None:
    data = load_images(tiny_images())
    captions = Captions(["one", "two"])
    cache = EmbeddingCache(tiny_clip, tmp_path / "cache", batch_size=5)
    images, texts = cache.images(data), cache.captions(captions)
    wanted = embed_images(tiny_clip, data, tmp_path / "plain")
    assert np.array_equal(images.vectors("img"), wanted.vectors("img"))
    assert texts.captions() == ["one", "two"]
    calls: list[str] = []
    for name in ("encode_images", "encode_texts"):
        encode = getattr(ClipModel, name)

        def counted(
            self: ClipModel, *given: Any, _e: Any = encode, _n: str = name, **more: Any
        ) -> Any:
            calls.append(_n)
            return _e(self, *given, **more)

        monkeypatch.setattr(ClipModel, name, counted)
    again = EmbeddingCache(tiny_clip, tmp_path / "cache")
    assert again.images(data).path == images.path
    assert again.captions(captions).path == texts.path
    assert calls == []
    # Other data, other crops and other weights are other subfolders.
    assert again.images(data.cropped((1, 1, -1, -1))).path != images.path
    with torch.no_grad():
        next(tiny_clip.model.visual.parameters()).add_(1)
    changed = EmbeddingCache(tiny_clip, tmp_path / "cache")
    assert changed.images(data).path != images.path
    assert changed.captions(captions).path == texts.path  # the text tower is the same
    assert set(calls) == {"encode_images"}
