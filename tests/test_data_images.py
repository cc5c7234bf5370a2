"""Image sources: what is indexed, what is read, and what bad input says."""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from pymcip.data import ImageData, list_images, load_images
from pymcip.data.loading import Skipped, iterate_batches
from pymcip.data.sources import expand_braces, natural
from pymcip.errors import DataError, DecodeError
from tests.conftest import encoded, picture, sample_members, write_shard

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def labels_of(data: ImageData) -> list[str]:
    return [data.class_names[label] for label in data.labels]


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


# What a source may be


def test_image_folder(tiny_images: Callable[..., Path]) -> None:
    folder = tiny_images(classes=3, per_class=4)
    (folder / "class1" / "notes.txt").write_text("not an image")
    (folder / "class2" / "deeper").mkdir()
    picture(7).save(folder / "class2" / "deeper" / "UPPER.PNG")
    data = load_images(folder)
    assert len(data) == 13
    assert data.num_classes == 3
    assert data.class_names == ["class0", "class1", "class2"]
    assert data.labels.dtype == np.int64
    assert np.bincount(data.labels).tolist() == [4, 4, 5]
    assert data.key(0) == str(folder / "class0" / "0.jpg")
    assert data.titles(0) == ()
    for index in range(len(data)):
        assert Path(data.key(index)).relative_to(folder).parts[0] == labels_of(data)[index]
    pixels = np.asarray(data.read(0))
    assert np.array_equal(pixels, np.asarray(Image.open(data.key(0)).convert("RGB")))


@pytest.mark.parametrize("ending", ["csv", "tsv", "parquet"])
def test_table(ending: str, tiny_images: Callable[..., Path]) -> None:
    folder = tiny_images(classes=2, per_class=2)
    absolute = folder / "class1" / "1.jpg"
    rows = [
        {"filepath": "class0/0.jpg", "label": "pears", "title": "two pears, ripe"},
        {"filepath": "class0/1.jpg", "label": "apples", "title": ""},
        {"filepath": str(absolute), "label": "pears", "title": "a pear"},
    ]
    data = load_images(write_table(folder / f"list.{ending}", rows))
    assert labels_of(data) == ["pears", "apples", "pears"]
    assert data.class_names == ["apples", "pears"]
    assert [data.titles(i) for i in range(3)] == [("two pears, ripe",), (), ("a pear",)]
    assert data.key(2) == str(absolute)
    assert data.read(1).size == (40, 40)


def test_csv_quoting(tiny_images: Callable[..., Path]) -> None:
    folder = tiny_images(classes=2, per_class=1)
    text = 'label,title,filepath\n"a, b","say ""hi""\nthere",class0/0.jpg\nNA,,class1/0.jpg\n'
    (folder / "list.csv").write_text(text)
    data = load_images(folder / "list.csv")
    assert data.titles(0) == ('say "hi"\nthere',)
    assert labels_of(data) == ["a, b", "NA"]


def test_table_in_another_folder_and_several_tables(tiny_images: Callable[..., Path]) -> None:
    folder = tiny_images(classes=2, per_class=1)
    for number in range(2):
        row = {"filepath": f"../class{number}/0.jpg", "label": f"x{number}"}
        write_table(folder / "lists" / f"{number}.csv", [row])
    data = load_images(folder / "lists" / "{0..1}.csv")
    assert [Path(data.key(i)).resolve().parent.name for i in range(2)] == ["class0", "class1"]
    assert data.read(1).mode == "RGB"


def test_integer_labels_are_ordered_by_value(tiny_images: Callable[..., Path]) -> None:
    folder = tiny_images(classes=3, per_class=1)
    rows = [{"filepath": f"class{i}/0.jpg", "label": label} for i, label in enumerate([10, 9, 8])]
    for ending in ("csv", "parquet"):
        data = load_images(write_table(folder / f"list.{ending}", rows))
        assert data.class_names == ["8", "9", "10"]
        assert data.labels.tolist() == [2, 1, 0]


@pytest.mark.parametrize("how", ["folder", "braces", "glob", "list"])
def test_shards(how: str, shards: Callable[..., list[Path]]) -> None:
    paths = shards()
    folder = paths[0].parent
    sources: dict[str, Any] = {
        "folder": folder,
        "braces": folder / "{000000..000002}.tar",
        "glob": str(folder / "*.tar"),
        "list": [folder],
    }
    data = load_images(sources[how])
    assert len(data) == 12
    assert data.class_names == ["0", "1", "2"]
    assert data.labels.tolist() == [i % 3 for i in range(12)]
    assert data.key(5) == f"{paths[1]}/000005.jpg"
    assert data.titles(5) == ("the blue square, number 5",)
    direct = Image.open(io.BytesIO(encoded(picture(5, (40, 70, 210)))))
    assert np.array_equal(np.asarray(data.read(5)), np.asarray(direct))


def test_one_source_per_shard_has_classes_of_its_own(shards: Callable[..., list[Path]]) -> None:
    data = load_images(tuple(shards()[:2]))
    assert data.num_classes == 6
    assert data.class_names == ["0", "1", "2"] * 2
    assert data.class_sources.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.source_ids.tolist() == [0] * 4 + [1] * 4
    assert set(data.labels[:4]) == {0, 1, 2}
    assert set(data.labels[4:]) == {3, 4, 5}


def test_webdataset_names(tmp_path: Path) -> None:
    image = encoded(picture(1))
    members = [
        ("__meta__.json", b"{}"),
        ("a/7.cls", b" 4\n"),
        ("a/7.seg.png", encoded(picture(2), "PNG")),  # key 7, extension "seg.png": not the image
        ("a/7.JPEG", image),
        ("b.x/7.webp", encoded(picture(3), "WEBP")),
        ("b.x/7.json", json.dumps({"label": 5, "caption": "from json", "width": 3}).encode()),
        ("b.x/7.txt", b"from txt\n"),
        ("c.png", encoded(picture(4), "PNG")),
        ("c.json", json.dumps({"class_name": "zebra", "caption": None}).encode()),
        ("._c.png", b"macOS"),
        ("README", b"no extension"),
    ]
    data = load_images(write_shard(tmp_path / "x.tar", members))
    assert labels_of(data) == ["4", "5", "zebra"]
    assert [data.key(i).rpartition(".tar/")[2] for i in range(3)] == [
        "a/7.JPEG",
        "b.x/7.webp",
        "c.png",
    ]
    assert [data.titles(i) for i in range(3)] == [(), ("from txt", "from json"), ()]
    assert [data.read(i).size for i in range(3)] == [(40, 40)] * 3


def test_img2dataset_folder(shards: Callable[..., list[Path]]) -> None:
    samples = [
        {
            "jpg": picture(i),
            "txt": f"caption {i}",
            "json": {"caption": f"caption {i}", "key": str(i)},
        }
        for i in range(4)
    ]
    folder = shards(samples)[0].parent
    write_table(folder / "000000.parquet", [{"key": "0", "caption": "caption 0"}])
    (folder / "000000_stats.json").write_text("{}")
    data = load_images(folder, labelled=False)
    assert len(data) == 4
    assert data.titles(2) == ("caption 2",)  # once, though txt and json both hold it
    assert data.labels.tolist() == [-1] * 4
    assert data.num_classes == 0
    assert len(load_images(folder / "*", labelled=False)) == 4


def test_long_names_in_shards(tmp_path: Path) -> None:
    name = "long/" * 60 + "name"
    members = [
        *sample_members(name, {"jpg": picture(0), "cls": 0}),
        *sample_members("short", {"jpg": picture(1), "cls": 1}),
    ]
    data = load_images(write_shard(tmp_path / "x.tar", members))
    assert data.key(0).endswith(f"/{name}.jpg")
    assert np.asarray(data.read(0)).mean() != np.asarray(data.read(1)).mean()


def test_unlabelled_folder(tmp_path: Path) -> None:
    for number in range(3):
        picture(number).save(tmp_path / f"{number}.png")
    data = load_images(tmp_path, labelled=False)
    assert len(data) == 3
    assert data.labels.tolist() == [-1, -1, -1]
    assert data.class_names == []


def test_select(shards: Callable[..., list[Path]]) -> None:
    data = load_images(shards()[0].parent)
    part = data.select([7, 2, 2])
    assert [part.key(i) for i in range(3)] == [data.key(7), data.key(2), data.key(2)]
    assert part.labels.tolist() == [1, 2, 2]
    assert part.num_classes == 3
    assert part.titles(0) == data.titles(7)
    assert len(data) == 12
    assert part.select([0]).key(0) == data.key(7)


def test_pickled_after_reading(shards: Callable[..., list[Path]]) -> None:
    data = load_images(shards()[0].parent)
    pixels = np.asarray(data.read(3))
    again = pickle.loads(pickle.dumps(data))
    assert np.array_equal(np.asarray(again.read(3)), pixels)
    assert again.fingerprint() == data.fingerprint()


def test_more_shards_than_open_files(
    shards: Callable[..., list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load_images(shards(per_shard=1)[0].parent)
    monkeypatch.setattr("pymcip.data.images.ShardStore.MOST_OPEN", 2)
    opened = Path("/proc/self/fd")
    before = len(list(opened.iterdir())) if opened.exists() else 0
    for index in [*range(12), 0, 11]:
        assert data.read(index).mode == "RGB"
    if before:
        assert len(list(opened.iterdir())) <= before + 2


def test_fingerprint_follows_the_files(tiny_images: Callable[..., Path]) -> None:
    folder = tiny_images(classes=2, per_class=2)
    data = load_images(folder)
    fingerprint = data.fingerprint()
    assert load_images(folder).fingerprint() == fingerprint
    assert data.select([1, 0, 2, 3]).fingerprint() != fingerprint
    moved = folder.rename(folder.with_name("moved"))
    assert load_images(moved).fingerprint() == fingerprint
    os.utime(moved / "class0" / "0.jpg", ns=(1, 1))
    assert load_images(moved).fingerprint() != fingerprint


def test_fingerprint_of_shards(shards: Callable[..., list[Path]]) -> None:
    path = shards()[0]
    fingerprint = load_images(path).fingerprint()
    os.utime(path, ns=(1, 1))
    assert load_images(path).fingerprint() != fingerprint


def test_nothing_is_extracted(shards: Callable[..., list[Path]], tmp_path: Path) -> None:
    data = load_images(shards()[0].parent)
    before = sorted(tmp_path.rglob("*"))
    data.read(0)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real data at {SHARED}")
def test_real_shards() -> None:
    train = load_images(SHARED / "grocery" / "grocery-train-{000000..000002}.tar")
    assert (len(train), train.num_classes) == (2640, 81)
    assert train.class_names == [str(number) for number in range(81)]
    assert max(train.read(1234).size) == 224
    assert len(load_images(SHARED / "clothing")) == 713


# Decoding


def corrupted(kind: str) -> bytes:
    whole = encoded(picture(0, size=200))
    return {
        "truncated": whole[: len(whole) // 2],
        "header only": whole[:20],
        "empty": b"",
        "text": b"<html>404</html>",
        "png": encoded(picture(0), "PNG")[:60] + b"\0" * 40,
    }[kind]


@pytest.mark.parametrize("kind", ["truncated", "header only", "empty", "text", "png"])
def test_damaged_image(kind: str, tiny_images: Callable[..., Path]) -> None:
    folder = tiny_images(classes=2, per_class=2)
    (folder / "class0" / "0.jpg").write_bytes(corrupted(kind))
    data = load_images(folder)
    with pytest.raises(DecodeError, match=r"class0/0\.jpg can't be decoded \(\d+ bytes\)"):
        data.read(0)
    assert data.read(1).mode == "RGB"


@pytest.mark.parametrize("limit", [1000, 799])  # Pillow warns below twice its limit, raises above
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bomb(
    limit: int, tiny_images: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load_images(tiny_images(classes=2, per_class=1))  # 40 x 40 = 1600 pixels
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(DecodeError, match=f"more than {limit} pixels.*decompression bomb"):
        data.read(0)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1600)
    assert data.read(0).size == (40, 40)


def test_decompression_bomb_where_warnings_are_errors(
    tiny_images: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load_images(tiny_images(classes=2, per_class=1))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DecodeError, match="decompression bomb"):
        data.read(0)


def test_modes_become_rgb(tmp_path: Path) -> None:
    folder = tmp_path / "modes"
    colour = Image.new("RGB", (8, 8), (200, 100, 50))
    palette = colour.quantize(4)
    images = {
        "rgba.png": Image.new("RGBA", (8, 8), (200, 100, 50, 0)),
        "palette.png": palette,
        "palette.gif": palette,
        "cmyk.jpg": colour.convert("CMYK"),
        "grey.png": Image.new("L", (8, 8), 77),
        "greyalpha.png": Image.new("LA", (8, 8), (77, 10)),
        "sixteen.png": Image.fromarray(np.full((8, 8), 77 * 256 + 13, np.uint16)),
        "bits.png": Image.new("1", (8, 8), 1),
    }
    for number, (name, image) in enumerate(images.items()):
        path = folder / f"class{number % 2}" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        extra: dict[str, Any] = {"transparency": bytes([0, 9, 9, 9])}
        image.save(path, **(extra if name == "palette.png" else {}))
    data = load_images(folder)
    means = {
        Path(data.key(i)).name: np.asarray(data.read(i)).mean(axis=(0, 1)) for i in range(len(data))
    }
    assert len(means) == len(images)
    for name in ("rgba.png", "palette.png", "palette.gif", "cmyk.jpg"):
        assert np.abs(means[name] - [200, 100, 50]).max() <= 4, name
    for name in ("grey.png", "greyalpha.png", "sixteen.png"):
        assert means[name].tolist() == [77, 77, 77], name
    assert means["bits.png"].tolist() == [255, 255, 255]


def test_exif_orientation_is_left(tmp_path: Path) -> None:
    wide = Image.new("RGB", (30, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    wide.save(tmp_path / "wide.jpg", exif=exif)
    assert load_images(tmp_path, labelled=False).read(0).size == (30, 10)


# Batches


@pytest.mark.parametrize("workers", [0, 1])
def test_batches(workers: int, shards: Callable[..., list[Path]]) -> None:
    samples = [{"jpg": picture(i), "cls": i % 2} for i in range(7)]
    samples[2]["jpg"] = samples[4]["jpg"] = b"broken"
    data = load_images(shards(samples)[0].parent)
    batches = list(iterate_batches(data, [6, 4, 2, 1, 0], _mean, batch_size=2, workers=workers))
    assert [batch.indices.tolist() for batch in batches] == [[6], [1], [0]]
    assert [[item.index for item in batch.skipped] for batch in batches] == [[4], [2], []]
    assert all(isinstance(item, Skipped) for batch in batches for item in batch.skipped)
    assert "000004.jpg" in batches[0].skipped[0].key
    assert torch.equal(batches[1].images[0], _mean(data.read(1)))


def test_batch_without_any_image(shards: Callable[..., list[Path]]) -> None:
    samples = [{"jpg": b"broken", "cls": i} for i in range(2)]
    data = load_images(shards(samples)[0])
    (batch,) = iterate_batches(data, np.arange(2), _mean, batch_size=2)
    assert len(batch.indices) == len(batch.images) == 0
    assert len(batch.skipped) == 2


def _mean(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image).mean(axis=(0, 1)))[:, None, None].float()


# Bad input


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing at .*absent; .*Give an existing file, folder"):
        load_images(tmp_path / "absent")
    with pytest.raises(DataError, match=r"nothing at .*\*\.tar"):
        load_images(tmp_path / "*.tar")
    with pytest.raises(DataError, match="no image source was given"):
        load_images(())


def test_missing_shards_of_a_pattern_are_named(shards: Callable[..., list[Path]]) -> None:
    folder = shards()[0].parent
    with pytest.raises(DataError, match=r"000003\.tar, .*000009\.tar|000003\.tar.*\(7 in all\)"):
        load_images(folder / "{000000..000009}.tar")


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no images; expected .*class/image\.jpg"):
        load_images(tmp_path)
    (tmp_path / "class0").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        load_images(tmp_path)


def test_empty_class_folder_is_reported(
    tiny_images: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny_images(classes=2, per_class=1)
    (folder / "nothing").mkdir()
    with caplog.at_level(logging.WARNING):
        assert load_images(folder).class_names == ["class0", "class1"]
    assert "without images are no classes: nothing" in caplog.text


def test_url() -> None:
    with pytest.raises(
        DataError, match="not a local path; allowed: a file, a folder, or a pattern"
    ):
        load_images("https://example.org/{000..010}.tar")


def test_unknown_kind(tmp_path: Path) -> None:
    (tmp_path / "x.pdf").write_text("x")
    with pytest.raises(DataError, match=r"no image source; allowed: a folder .*\.csv.*tar shards"):
        load_images(tmp_path / "x.pdf")


def test_one_class(tiny_images: Callable[..., Path]) -> None:
    folder = tiny_images(classes=1)
    with pytest.raises(DataError, match=r"only one class \('class0'\).*two at least"):
        load_images(folder)
    assert load_images(folder, labelled=False).num_classes == 1


def test_image_without_a_class(
    tiny_images: Callable[..., Path], shards: Callable[..., list[Path]]
) -> None:
    folder = tiny_images(classes=2, per_class=2)
    picture(0).save(folder / "stray.jpg")
    with pytest.raises(DataError, match=r"1 of 5 images have no class: .*stray\.jpg"):
        load_images(folder)
    rows = [{"filepath": "class0/0.jpg", "label": "a"}, {"filepath": "class1/0.jpg", "label": " "}]
    with pytest.raises(DataError, match=r"1 of 2 images have no class: .*class1/0\.jpg"):
        load_images(write_table(folder / "list.csv", rows))
    samples = [{"jpg": picture(i), **({"cls": i} if i < 2 else {})} for i in range(10)]
    with pytest.raises(DataError, match=r"8 of 10 images .*000002\.jpg, .* … \(8 in all\)"):
        load_images(shards(samples)[0].parent)


def test_label_gaps(shards: Callable[..., list[Path]], caplog: pytest.LogCaptureFixture) -> None:
    path = shards([{"jpg": picture(i), "cls": label} for i, label in enumerate([9, 2, 4])])[0]
    with caplog.at_level(logging.WARNING):
        data = load_images(path)
    assert data.labels.tolist() == [2, 0, 1]
    assert data.class_names == ["2", "4", "9"]
    assert "no image has the label 3, 5, 6, 7, 8; classes are numbered" in caplog.text


def test_huge_label_gap_is_reported_quickly(
    shards: Callable[..., list[Path]], caplog: pytest.LogCaptureFixture
) -> None:
    path = shards([{"jpg": picture(i), "cls": label} for i, label in enumerate([0, 10**15])])[0]
    with caplog.at_level(logging.WARNING):
        load_images(path)
    assert f"1, 2, 3, 4, 5 … ({10**15 - 1} in all)" in caplog.text


@pytest.mark.parametrize("name", ["../evil.jpg", "a/../../evil.jpg", "/etc/evil.jpg"])
def test_unsafe_member(name: str, tmp_path: Path) -> None:
    members = [*sample_members("0", {"jpg": picture(0), "cls": 0}), (name, b"x")]
    path = write_shard(tmp_path / "bad.tar", members)
    with pytest.raises(DataError, match=r"bad\.tar: member '.*evil\.jpg' points outside"):
        load_images(path)


def test_links_in_shards_are_not_followed(tmp_path: Path) -> None:
    path = write_shard(
        tmp_path / "x.tar",
        [
            member
            for i in range(2)
            for member in sample_members(str(i), {"jpg": picture(i), "cls": i})
        ],
    )
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("2.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    assert len(load_images(path)) == 2


@pytest.mark.parametrize("cut", [700, 5000])
def test_truncated_shard(cut: int, shards: Callable[..., list[Path]]) -> None:
    path = shards([{"jpg": picture(i, size=200), "cls": i} for i in range(3)])[0]
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"000000\.tar can't be read as a tar shard: .*cut short"):
        load_images(path)


def test_damaged_header_does_not_end_a_shard_in_silence(shards: Callable[..., list[Path]]) -> None:
    path = shards()[0]
    with tarfile.open(path) as archive:
        third = archive.getmembers()[4].offset
    content = bytearray(path.read_bytes())
    content[third : third + 50] = b"x" * 50
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"damaged header at byte {third}"):
        load_images(path)


def test_shard_cut_after_indexing(shards: Callable[..., list[Path]]) -> None:
    path = shards()[0]
    data = load_images(path)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(DataError, match="cut short since it was indexed") as caught:
        data.read(3)
    assert not isinstance(caught.value, DecodeError)  # embedding must not skip it


def test_compressed_shard(shards: Callable[..., list[Path]], tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(shards()[0], "0.jpg")
    with pytest.raises(DataError, match=r"uncompressed tar \(unpack \.tar\.gz first\)"):
        load_images(path)


def test_duplicate_member(tmp_path: Path) -> None:
    sample = sample_members("0", {"jpg": picture(0), "cls": 0})
    with pytest.raises(DataError, match=r"member 0\.jpg is there twice"):
        load_images(write_shard(tmp_path / "x.tar", [*sample, *sample]))


def test_keys_without_an_image_are_reported(
    shards: Callable[..., list[Path]], caplog: pytest.LogCaptureFixture
) -> None:
    samples = [
        {"jpg": picture(0), "cls": 0},
        {"cls": 1, "txt": "lost"},
        {"png": picture(1), "cls": 2},
    ]
    with caplog.at_level(logging.WARNING):
        assert len(load_images(shards(samples)[0])) == 2
    assert "1 keys have no image" in caplog.text


def test_shards_without_images(shards: Callable[..., list[Path]]) -> None:
    with pytest.raises(DataError, match=r"no images; expected members named key\.jpg"):
        load_images(shards([{"txt": "only text"}])[0])


@pytest.mark.parametrize(("member", "message"), [("json", "is not JSON"), ("cls", "not UTF-8")])
def test_broken_member(member: str, message: str, shards: Callable[..., list[Path]]) -> None:
    path = shards([{"jpg": picture(0), member: b"\xff\xfe{"}])[0]
    with pytest.raises(DataError, match=message):
        load_images(path)


@pytest.mark.parametrize("ending", ["csv", "tsv", "parquet"])
def test_table_without_columns(ending: str, tmp_path: Path) -> None:
    path = write_table(tmp_path / f"x.{ending}", [{"file": "a.jpg", "label": "1"}])
    with pytest.raises(DataError, match=r"no column filepath; it has .*file.* Expected a header"):
        load_images(path)


def test_table_with_missing_files(tiny_images: Callable[..., Path]) -> None:
    folder = tiny_images(classes=2, per_class=1)
    rows = [{"filepath": f"class{i}/0.jpg", "label": f"{i}"} for i in range(4)]
    with pytest.raises(DataError, match=r"2 of 4 images .* are not there: .*class2/0\.jpg"):
        load_images(write_table(folder / "x.csv", rows))


def test_broken_tables(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("filepath,label\na.jpg,1\nb.jpg,2,3\n")
    with pytest.raises(DataError, match=r"x\.csv can't be read as CSV: .*[Ee]xpected 2 columns"):
        load_images(tmp_path / "x.csv")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"x\.parquet can't be read as PARQUET"):
        load_images(tmp_path / "x.parquet")
    (tmp_path / "y.csv").write_text("filepath,label\n")
    with pytest.raises(DataError, match="no rows"):
        load_images(tmp_path / "y.csv")
    (tmp_path / "z.csv").write_text("filepath,label\n,1\n")
    with pytest.raises(DataError, match="row 1 has no filepath"):
        load_images(tmp_path / "z.csv")


def test_braces() -> None:
    assert expand_braces("{08..11}") == ["08", "09", "10", "11"]
    assert expand_braces("{3..1}-{a,b}") == ["3-a", "3-b", "2-a", "2-b", "1-a", "1-b"]
    assert expand_braces("x{0..2}.tar") == ["x0.tar", "x1.tar", "x2.tar"]
    assert expand_braces("{single}") == ["{single}"]
    with pytest.raises(DataError, match="allowed: up to"):
        expand_braces("{0..99999999}")


def test_a_path_with_braces_is_a_path(shards: Callable[..., list[Path]], tmp_path: Path) -> None:
    path = shards()[0].rename(tmp_path / "x{0..3}.tar")
    assert len(load_images(path)) == 4


def test_natural_order() -> None:
    assert sorted(["b", "a10", "a2", "10", "9"], key=natural) == ["9", "10", "a2", "a10", "b"]


# Lists of names, crops


def test_lists_of_names_keep_their_order(tmp_path: Path) -> None:
    for number, name in enumerate(("b/1.png", "a.jpg", "b/0.png")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture(number).save(tmp_path / name)
    data = list_images(tmp_path, ["b/1.png", "a.jpg", "b/0.png"], [1, 0, 1], ["x", "y"])
    assert [data.key(i) for i in range(3)] == [
        str(tmp_path / name) for name in ("b/1.png", "a.jpg", "b/0.png")
    ]
    assert data.labels.tolist() == [1, 0, 1]
    assert np.array_equal(np.asarray(data.read(2)), np.asarray(picture(2)))
    unlabelled = list_images(tmp_path, ["a.jpg"])
    assert unlabelled.labels.tolist() == [-1]
    other = list_images(tmp_path, ["a.jpg", "b/1.png", "b/0.png"], [0, 1, 1], ["x", "y"])
    assert other.fingerprint() != data.fingerprint()


@pytest.mark.parametrize(
    ("names", "labels", "message"),
    [
        ([], None, "the list of images is empty"),
        (["a.png", "no.png"], None, r"1 of 2 images of .* are not there: .*no\.png$"),
        (["a.png"], [2], r"labels \[1\] up to 2 of 2 classes"),
        (["a.png"], [0, 1], r"1 images with labels \[2\]"),
    ],
)
def test_lists_that_do_not_fit(tmp_path: Path, names: list[str], labels: Any, message: str) -> None:
    picture(0).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=message):
        list_images(tmp_path, names, labels, ["x", "y"])


def test_crops_are_cut_before_the_transform(tmp_path: Path) -> None:
    for number in range(2):
        picture(number, size=40).save(tmp_path / f"{number}.png")
    data = list_images(tmp_path, ["0.png", "1.png"])
    pixels = [np.asarray(picture(number, size=40)) for number in range(2)]
    boxes = [[3, 5, 20, 33], [1.4, 2.6, 38.4, 30.6]]  # Pillow rounds
    cropped = data.cropped(boxes)
    assert np.array_equal(np.asarray(cropped.read(0)), pixels[0][5:33, 3:20])
    assert np.array_equal(np.asarray(cropped.read(1)), pixels[1][3:31, 1:38])
    assert np.array_equal(np.asarray(cropped.select([1]).read(0)), pixels[1][3:31, 1:38])
    border = data.cropped((2, 2, -2, -2))
    assert np.array_equal(np.asarray(border.read(1)), pixels[1][2:-2, 2:-2])
    assert np.array_equal(np.asarray(data.read(0)), pixels[0])  # itself unchanged
    assert len({each.fingerprint() for each in (data, cropped, border)}) == 3
    assert data.cropped(boxes).fingerprint() == cropped.fingerprint()


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([1, 2, 3], r"crops are \[3\]"),
        ([[0, 0, 5, 5]] * 2, r"crops are \[2, 4\]"),
        ([0, 0, float("nan"), 5], "needed: finite"),
        ([[5, 0, 5, 9]], r"a\.png, \[5\.0, 0\.0, 5\.0, 9\.0\], is empty"),
    ],
)
def test_crops_that_do_not_fit(tmp_path: Path, boxes: Any, message: str) -> None:
    picture(0).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=message):
        list_images(tmp_path, ["a.png"]).cropped(boxes)


def test_an_image_smaller_than_its_border_cannot_be_decoded(tmp_path: Path) -> None:
    picture(0, size=4).save(tmp_path / "a.png")
    with pytest.raises(DecodeError, match="is 4 x 4: too small for the crop"):
        list_images(tmp_path, ["a.png"]).cropped((2, 2, -2, -2)).read(0)
