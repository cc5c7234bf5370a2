"""Image sources: ImageFolders, tables, webdataset shards, lists of names, crops."""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pymcip.data import ImageData, list_images, load_images
from pymcip.errors import DataError, DecodeError
from tests.conftest import encoded, picture, sample_members, write_shard, write_table

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def labels_of(data: ImageData) -> list[str]:
    return [data.class_names[label] for label in data.labels]


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
    monkeypatch.setattr("pymcip.data.stores.ShardStore.MOST_OPEN", 2)
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
    assert load_images(moved).fingerprint() == fingerprint
    path = moved / "class0" / "0.jpg"
    path.write_bytes(path.read_bytes()[:-1] + b"x")  # of the same size, and at the same time
    os.utime(path, ns=(1, 1))
    assert load_images(moved).fingerprint() != fingerprint


def test_fingerprint_of_shards(shards: Callable[..., list[Path]]) -> None:
    path = shards()[0]
    fingerprint = load_images(path).fingerprint()
    os.utime(path, ns=(1, 1))
    assert load_images(path).fingerprint() == fingerprint
    content = path.read_bytes()
    place = content.index(b"JFIF")
    path.write_bytes(content[:place] + b"FIFJ" + content[place + 4 :])
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
