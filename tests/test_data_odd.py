"""Users' folders, tables and shards as they come: one image per file, classes, what is left out, pixels."""

from __future__ import annotations

import errno
import importlib
import io
import json
import logging
import os
import unicodedata
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from torchvision import transforms

from pymcip.data import decode, load_images
from pymcip.data.loading import iterate_batches
from pymcip.errors import DataError, DecodeError
from tests.conftest import encoded, picture, sample_members, write_shard

SUFFIXES = {".jpg": "JPEG", ".jfif": "JPEG", ".jpe": "JPEG", ".avif": "AVIF", ".jp2": "JPEG2000"}


def put(path: Path, number: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(picture(number)))
    return path


def names(data: Any) -> list[str]:
    return [Path(data.key(index)).name for index in range(len(data))]


def pixels(array: np.ndarray, file_format: str = "PNG", **options: Any) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, file_format, **options)
    return np.asarray(decode(buffer.getvalue(), "x"))


# One image per file


def test_rows_of_one_file_are_one_image(tmp_path: Path) -> None:
    put(tmp_path / "a.jpg")
    put(tmp_path / "b.jpg", 1)
    (tmp_path / "link.jpg").symlink_to("a.jpg")
    table = tmp_path / "t.csv"
    rows = [
        "a.jpg,x,one",
        "./a.jpg,x,two",
        "b.jpg,y,three",
        f"{tmp_path}/link.jpg,x,four",
        "a.jpg,x,one",
    ]
    table.write_text("\n".join(["filepath,label,title", *rows]))
    data = load_images(table)
    assert names(data) == ["a.jpg", "b.jpg"]
    assert [data.titles(index) for index in range(2)] == [("one", "two", "four"), ("three",)]
    table.write_text("filepath,label\na.jpg,x\nb.jpg,y\nlink.jpg,y\n")
    with pytest.raises(
        DataError, match=r"one file has two labels: a\.jpg .*line 2.*'x', link\.jpg .*'y'"
    ):
        load_images(table)


def test_links_in_folders(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path / "a" / "1.jpg")
    put(tmp_path / "b" / "1.jpg", 1)
    put(tmp_path.parent / "elsewhere" / "deep" / "2.jpg", 2)
    (tmp_path / "a" / "same.jpg").symlink_to("1.jpg")
    (tmp_path / "a" / "up").symlink_to("..")
    (tmp_path / "a" / "lost.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "b" / "more").symlink_to(tmp_path.parent / "elsewhere")
    (tmp_path.parent / "elsewhere" / "deep" / "round").symlink_to(tmp_path / "b")
    data = load_images(tmp_path)
    assert names(data) == ["1.jpg", "1.jpg", "2.jpg"]
    reasons = {Path(item.key).name: item.reason for item in data.left_out}
    assert reasons == {
        "lost.jpg": "a link to nothing",
        "round": "a link to a folder that it lies in",
        "up": "a link to a folder that it lies in",
    }
    (tmp_path / "b" / "other.jpg").symlink_to("../a/1.jpg")
    with pytest.raises(DataError, match=r"two labels: a/1\.jpg: 'a', b/other\.jpg: 'b'"):
        load_images(tmp_path)


# Classes


def test_folders_of_systems_and_tools_are_no_classes(tmp_path: Path) -> None:
    for name in ("hat", "shoe", "@eaDir", "__MACOSX", ".ipynb_checkpoints", "hat/@eaDir/1.jpg"):
        put(tmp_path / name / "1.jpg", len(name))
    (tmp_path / "hat" / "Thumbs.db").write_bytes(b"x")
    data = load_images(tmp_path)
    assert data.class_names == ["hat", "shoe"]
    assert len(data) == 2
    assert data.left_out == ()


@pytest.mark.parametrize(
    "splits", [("train", "val"), ("Train", "test", "extra"), ("train2017", "val2017")]
)
def test_splits_are_no_classes(splits: tuple[str, ...], tmp_path: Path) -> None:
    for number, split in enumerate(splits):
        put(tmp_path / split / "cat" / "1.jpg", number)
        put(tmp_path / split / "dog" / "1.jpg", 9 + number)
    for labelled in (True, False):
        with pytest.raises(
            DataError, match=rf"holds splits \({splits[0]}, {splits[1]}\).*give one"
        ):
            load_images(tmp_path, labelled=labelled)
    assert load_images(tmp_path / splits[0]).class_names == ["cat", "dog"]


def test_splits_without_classes_are_unlabelled(tmp_path: Path) -> None:
    put(tmp_path / "train" / "1.jpg")
    put(tmp_path / "test" / "1.jpg", 1)
    assert load_images(tmp_path, labelled=False).class_names == []
    with pytest.raises(DataError, match="2 of 2 images have no class"):
        load_images(tmp_path)
    put(tmp_path / "tram" / "1.jpg", 2)
    (tmp_path / "test").rename(tmp_path / "ferry")
    assert load_images(tmp_path).class_names == [
        "ferry",
        "train",
        "tram",
    ]  # trains are a class here


def test_img2dataset_files(tmp_path: Path) -> None:
    for shard in ("00000", "00001"):
        put(tmp_path / shard / "1.jpg", int(shard))
        (tmp_path / shard / "1.txt").write_text(f"caption of {shard}\nin two lines")
        caption = {"caption": f"caption of {shard}\nin two lines", "status": "success"}
        (tmp_path / shard / "1.json").write_text(json.dumps(caption))
        (tmp_path / f"{shard}_stats.json").write_text("{}")
    data = load_images(tmp_path, labelled=False)
    assert data.class_names == []
    assert data.titles(1) == ("caption of 00001\nin two lines",)
    for shard in ("00000", "00001"):
        (tmp_path / f"{shard}_stats.json").unlink()
    assert load_images(tmp_path, labelled=False).class_names == []  # a json beside every image
    (tmp_path / "00001" / "1.json").unlink()
    assert load_images(tmp_path).class_names == [
        "00000",
        "00001",
    ]  # nothing says that they are shards


def test_texts_beside_images(tmp_path: Path) -> None:
    for number, text in enumerate(("a hat\nseen from above\n", "0 0.5 0.5 0.1 0.2\n", "")):
        put(tmp_path / f"{number}.jpg", number)
        (tmp_path / f"{number}.txt").write_text(text)
    data = load_images(tmp_path, labelled=False)
    assert [data.titles(index) for index in range(3)] == [("a hat", "seen from above"), (), ()]
    assert [item.reason for item in data.left_out] == ["numbers beside an image, no captions"]


@pytest.mark.parametrize("missing", ["", " ", "nan", "NaN", "<NA>", "\ufeff"])
def test_missing_labels_are_named_by_row(missing: str, tmp_path: Path) -> None:
    for number in range(3):
        put(tmp_path / f"{number}.jpg", number)
    table = tmp_path / "t.csv"
    table.write_text(
        f"\ufefffilepath,label\n0.jpg,\ufeffa\n1.jpg,{missing}\n2.jpg,b\n", encoding="utf-8"
    )
    with pytest.raises(
        DataError, match=r"1 of 3 images have no class: .*1\.jpg \(.*t\.csv, line 3\)"
    ):
        load_images(table)
    data = load_images(table, labelled=False)
    assert data.class_names == ["a", "b"]
    assert data.labels.tolist() == [0, -1, 1]


def test_nan_in_parquet(tmp_path: Path) -> None:
    for number in range(3):
        put(tmp_path / f"{number}.jpg", number)
    columns = {"filepath": ["0.jpg", "1.jpg", "2.jpg"], "label": [1.0, float("nan"), 2.0]}
    pa.parquet.write_table(pa.table(columns), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"1\.jpg \(.*, row 2\)"):
        load_images(tmp_path / "t.parquet")
    assert load_images(tmp_path / "t.parquet", labelled=False).class_names == ["1", "2"]


def test_classes_are_joined_in_nfc(tmp_path: Path) -> None:
    for number, form in enumerate(("NFC", "NFD")):
        put(tmp_path / unicodedata.normalize(form, "café") / f"{form}.jpg", number)
    put(tmp_path / "Café" / "1.jpg", 2)
    data = load_images(tmp_path)
    assert data.class_names == ["Café", "café"]  # exact case
    assert np.bincount(data.labels).tolist() == [1, 2]


# What is left out


def test_kinds_of_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    known = [suffix for suffix, name in SUFFIXES.items() if name in Image.SAVE]
    for number, suffix in enumerate(known):
        path = tmp_path / "a" / f"{number}{suffix}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded(picture(number), SUFFIXES[suffix]))
    put(tmp_path / "b" / "download", 20)
    put(tmp_path / "b" / "photo.JPG_large", 21)
    for name in ("raw.nef", "drawing.svg", "film.mp4", "torn.part"):
        (tmp_path / "b" / name).write_bytes(b"II*\0no")
    (tmp_path / "b" / "notes.md").write_text("x")
    os.mkfifo(tmp_path / "b" / "pipe.jpg")
    data = load_images(tmp_path)
    assert len(data) == len(known) + 2
    assert all(data.read(index).size == (40, 40) for index in range(len(data)))
    assert {Path(item.key).name: item.reason for item in data.left_out} == {
        **dict.fromkeys(
            ("drawing.svg", "film.mp4", "raw.nef", "torn.part"),
            "no kind of image that Pillow reads here",
        ),
        "pipe.jpg": "no regular file",
    }
    assert "2 files are images by their content though their names do not say so" in caplog.text


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    place = os.fsencode(tmp_path) + b"/x"
    os.mkdir(place)  # noqa: PTH102
    put(tmp_path / "y" / "1.jpg")
    with open(place + b"/caf\xe9.jpg", "wb") as handle:
        handle.write(encoded(picture(1)))
    data = load_images(tmp_path)
    assert data.key(0).endswith(r"/x/caf\udce9.jpg")
    assert data.read(0).size == (40, 40)
    data.fingerprint()


def test_dots_in_the_names_of_shards(tmp_path: Path) -> None:
    samples = {"IMG_2023.01.02": 0, "IMG_2023.01.03": 1, "p": 2}
    members = [
        member
        for key, number in samples.items()
        for member in sample_members(key, {"jpg": picture(number), "cls": number % 2})
    ]
    mixed = [
        ("q.cls", b"1"),
        ("q.left.jpg", encoded(picture(5))),
        ("r.heic", b"x"),
        ("r.cls", b"0"),
    ]
    data = load_images(write_shard(tmp_path / "x.tar", [*members, *mixed]))
    assert names(data) == ["IMG_2023.01.02.jpg", "IMG_2023.01.03.jpg", "p.jpg"]
    assert data.labels.tolist() == [0, 1, 0]
    reasons = {Path(item.key).name: item.reason for item in data.left_out}
    assert "a dot in the key" in reasons["q.left.jpg"]
    assert reasons["q.cls"] == "no image under its key"
    assert reasons["r.heic"] == "no kind of image that Pillow reads here"


def test_archives_one_behind_the_other(tmp_path: Path) -> None:
    parts = [
        write_shard(tmp_path / f"{n}.tar", sample_members(str(n), {"jpg": picture(n), "cls": n}))
        for n in range(3)
    ]
    joined = tmp_path / "joined.tar"
    content = b"".join(part.read_bytes() for part in parts)
    joined.write_bytes(content)
    data = load_images(joined)
    assert data.class_names == ["0", "1", "2"]
    assert np.array_equal(
        np.asarray(data.read(2)), np.asarray(load_images(parts[2], labelled=False).read(0))
    )
    joined.write_bytes(content + b"junk" * 500)
    with pytest.raises(DataError, match="can't be read as a tar shard"):
        load_images(joined)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_an_image_that_cannot_be_opened_is_skipped(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.jpg", "b.jpg"):
        put(tmp_path / name)
    data = load_images(tmp_path, labelled=False)
    whole = Path.read_bytes

    def read(path: Path) -> bytes:
        if path.name == "a.jpg":
            raise OSError(number, os.strerror(number))
        return whole(path)

    monkeypatch.setattr(Path, "read_bytes", read)
    (batch,) = iterate_batches(data, [0, 1], transforms.ToTensor(), batch_size=2)
    assert batch.indices.tolist() == [1]
    assert f"a.jpg can't be opened: {os.strerror(number)}" in batch.skipped[0].reason


def test_pipes_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "t.csv")
    with pytest.raises(DataError, match="neither a file nor a folder"):
        load_images(tmp_path / "t.csv")


# Pixels


def test_grey_is_scaled_by_its_format() -> None:
    low, high = (np.full((4, 4), 200, np.uint16) for _ in range(2))
    high[0, 0] = 65535
    assert pixels(low).max() == 0
    assert np.array_equal(pixels(low)[1], pixels(high)[1])  # whatever the brightest pixel is
    assert pixels(high).max() == 255
    assert (
        pixels(np.full((4, 4), 77 * 256, np.uint16), "TIFF").tolist()
        == np.full((4, 4, 3), 77).tolist()
    )
    ramp = np.array([[0, 0.5, 1]], np.float32)
    assert pixels(ramp, "TIFF")[0, :, 0].tolist() == [0, 128, 255]
    assert pixels(ramp / 2, "TIFF")[0, :, 0].tolist() == [0, 64, 128]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([[0, 2]], np.float32), "float pixels are not all from 0 to 1"),
        (np.array([[0, np.nan]], np.float32), "float pixels are not all from 0 to 1"),
        (np.array([[0, 2]], np.int32), "32-bit integers have no range"),
    ],
)
def test_grey_without_a_range_is_refused(array: np.ndarray, message: str) -> None:
    with pytest.raises(DecodeError, match=message):
        pixels(array, "TIFF")


def test_pictures_of_12_bits_are_reported_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.import_module("pymcip.data.decode"), "said", set())
    pixels(np.full((4, 4), 8192, np.uint16))  # an eighth of the range
    assert not caplog.text
    for _ in range(2):
        pixels(np.full((4, 4), 4095, np.uint16))
    said = "x is a picture of 16 bits that uses the values up to 4095 only and comes out dark"
    assert caplog.text.count(said) == 1


def test_a_png_may_say_how_many_bits_are_significant(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.import_module("pymcip.data.decode"), "said", set())
    samples = np.arange(0, 4096, 5, dtype=np.uint16).reshape(4, -1)  # of 12 bits
    eight = (samples >> 4).tolist()

    def decoded(values: np.ndarray, bits: int) -> Any:
        content = encoded(Image.fromarray(values), "PNG")
        body = b"sBIT" + bytes([bits])
        chunk = b"\0\0\0\1" + body + zlib.crc32(body).to_bytes(4, "big")
        return np.asarray(decode(content[:33] + chunk + content[33:], "x"))[:, :, 0]

    assert decoded(samples, 12).tolist() == eight  # stored as they were
    for scaled in (samples << 4, samples << 4 | samples >> 8, samples * 65535.0 / 4095 + 0.5):
        assert decoded(scaled.astype(np.uint16), 12).tolist() == eight  # as PNG has it
    assert not caplog.text
    dark = samples % 256 << 4  # scaled, and dark
    assert decoded(dark, 12).max() == 15
    assert decoded(samples, 16).tolist() == (samples >> 8).tolist()
    assert decoded(samples + 1, 10).max() == 16  # brighter than it says
    assert decoded(samples, 0).max() == 15


@pytest.fixture
def resized(tiny_images: Callable[..., Path]) -> Callable[..., Any]:
    """Load two images, the first of a size of its own, with a transform."""

    def load(size: tuple[int, int], transform: Any) -> Any:
        folder = tiny_images(classes=1, per_class=2)
        Image.new("RGB", size).save(folder / "class0" / "0.jpg")
        data = load_images(folder, labelled=False)
        (batch,) = iterate_batches(data, [0, 1], transform, batch_size=2)
        return batch

    return load


def test_a_picture_that_a_transform_makes_huge_is_skipped(resized: Callable[..., Any]) -> None:
    transform = transforms.Compose(
        [transforms.Resize(64), transforms.CenterCrop(64), transforms.ToTensor()]
    )
    batch = resized((60_000, 1), transform)
    assert batch.indices.tolist() == [1]
    assert "60000 x 1 pixels become 245760000" in batch.skipped[0].reason


def test_a_transform_that_fails_skips_the_picture(
    resized: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    def transform(image: Image.Image) -> torch.Tensor:
        if image.width < 40:
            raise ValueError("too small")
        return transforms.functional.to_tensor(image)

    with caplog.at_level(logging.WARNING):
        batch = resized((8, 8), transform)
    assert batch.indices.tolist() == [1]
    assert "0.jpg: the transform fails (ValueError: too small)" in batch.skipped[0].reason
