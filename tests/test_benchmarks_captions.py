"""Readers of Flickr30k and COCO: order, captions and owners of miniatures, and what they refuse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pymcip import metrics
from pymcip.benchmarks.captions import COCO, FLICKR30K
from pymcip.benchmarks.contract import AbsentError, Captioned, DataSet, SuiteOptions
from pymcip.errors import DataError
from tests.benchmark_layouts import (
    write_coco,
    write_coco_val2017,
    write_flickr30k,
    write_webdataset,
)
from tests.conftest import picture

PARTIAL = SuiteOptions(allow_partial=True)


def read(data_set: DataSet, folder: Path, options: SuiteOptions = PARTIAL) -> Captioned:
    found = data_set.read(folder, options)
    assert isinstance(found, Captioned)
    return found


def names(found: Captioned, base: Path) -> list[str]:
    return [
        Path(found.images.key(row)).relative_to(base).as_posix() for row in range(len(found.images))
    ]


def edit(path: Path, change: Callable[[Any], object]) -> None:
    """Change a JSON file's document in place."""
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


# What the layouts say


def test_flickr30k(tmp_path: Path) -> None:
    listed = write_flickr30k(tmp_path)
    found = read(FLICKR30K, tmp_path)
    assert listed == ["1009434119.jpg", "1007129816.jpg", "101362133.jpg"]
    assert names(found, tmp_path / "flickr30k-images") == listed
    assert len(found.captions) == 15
    assert found.captions[0] == "Caption 0 of 1009434119 . "
    assert found.captions[6] == "Caption 1 of 1007129816 . \n"  # raw: nothing is stripped
    assert found.owners.dtype == np.int64
    assert found.owners.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert found.notes == ("partial: 3 of 1,000 images, 15 of 5,000 captions",)
    assert found.images.read(2).size == (40, 40)


def test_flickr30k_as_clip_benchmark_lists_it(tmp_path: Path) -> None:
    write_flickr30k(tmp_path)
    reference = read(FLICKR30K, tmp_path)
    listed = [Path(reference.images.key(int(owner))).name for owner in reference.owners]
    lines = [
        f"{name},{text.strip()}, it says\n"
        for name, text in zip(listed, reference.captions, strict=True)
    ]
    (tmp_path / "dataset_flickr30k.json").unlink()
    path = tmp_path / "flickr30k_test_karpathy.txt"
    path.write_text("image,caption\n" + "".join(lines))
    found = read(FLICKR30K, tmp_path)
    assert found.captions == tuple(f"{text.strip()}, it says" for text in reference.captions)
    assert found.owners.tolist() == reference.owners.tolist()
    assert found.images.fingerprint() == reference.images.fingerprint()
    path.write_text("image,caption\nno image here\n")
    with pytest.raises(DataError, match="line 2: 'no image here'"):
        read(FLICKR30K, tmp_path)


def test_flickr30k_number_by_hand(tmp_path: Path) -> None:
    write_flickr30k(tmp_path)
    found = read(FLICKR30K, tmp_path)
    texts = np.eye(3)[found.owners]
    texts[[1, 7]] = [0.0, 0.6, 0.8]  # captions of images 0 and 1, both nearer to image 2
    # R@1: 13 of 15 captions; R@2: caption 7 finds image 1 second, caption 1 finds image 0 third.
    # Each image still has captions of its own that are nearest to it.
    scores = metrics.cross_modal_recall(np.eye(3), texts, found.owners, ks=(1, 2, 3))
    assert scores["t2i_r1"] == pytest.approx(100 * 13 / 15)
    assert scores["t2i_r2"] == pytest.approx(100 * 14 / 15)
    assert scores["t2i_r3"] == scores["i2t_r1"] == 100


@pytest.mark.parametrize(
    ("images", "captions"),
    [
        ("flickr30k_images", "caption_datasets"),
        ("flickr30k_images/flickr30k_images", "karpathy"),
        ("images", "annotations"),
        ("Images", "."),
        (".", "."),
        ("flickr30k/flickr30k-images", "flickr30k"),
    ],
)
def test_flickr30k_folders_that_circulate(tmp_path: Path, images: str, captions: str) -> None:
    listed = write_flickr30k(tmp_path / "original")
    reference = read(FLICKR30K, tmp_path / "original")
    folder = tmp_path / "flickr30k"
    shutil.copytree(tmp_path / "original" / "flickr30k-images", folder / images)
    (folder / captions).mkdir(exist_ok=True)
    file = "dataset_flickr30k.json"
    shutil.copy(tmp_path / "original" / file, folder / captions / file)
    found = read(FLICKR30K, folder)
    assert names(found, folder / images) == listed
    assert found.captions == reference.captions
    assert found.images.fingerprint() == reference.images.fingerprint()


@pytest.mark.parametrize(("images", "captions"), [("", ""), ("images", "annotations")])
def test_coco_karpathy(tmp_path: Path, images: str, captions: str) -> None:
    listed = write_coco(tmp_path)
    if images:
        for folder, name in ((images, "val2014"), (captions, "dataset_coco.json")):
            (tmp_path / folder).mkdir()
            (tmp_path / name).rename(tmp_path / folder / name)
    write_coco_val2017(tmp_path)  # Karpathy's split wins
    found = read(COCO, tmp_path)
    assert listed == [
        "val2014/COCO_val2014_000000391895.jpg",
        "val2014/COCO_val2014_000000060623.jpg",
        "val2014/COCO_val2014_000000184613.jpg",
    ]
    assert names(found, tmp_path / images) == listed
    assert found.owners.tolist() == [0] * 5 + [1] * 6 + [2] * 5
    assert [found.captions[row] for row in (0, 10, 11)] == [
        "A 0 of 391895",
        "A 5 of 60623",
        "A 0 of 184613",
    ]
    assert found.notes == ("partial: 3 of 5,000 images, 16 of 25,010 captions",)


def test_coco_val2017(tmp_path: Path) -> None:
    listed = write_coco_val2017(tmp_path)
    found = read(COCO, tmp_path)
    assert names(found, tmp_path) == listed
    # Images in the order of `images`, though the annotations name the last image first.
    assert found.captions[:5] == tuple(f"Turn {turn} of 397133." for turn in range(5))
    assert found.captions[-1] == "Turn 4 of 252219."
    assert found.owners.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert found.notes == (
        "COCO val2017, not the Karpathy test split",
        "partial: 3 of 5,000 images, 15 of 25,014 captions",
    )


def test_coco_test_karpathy(tmp_path: Path) -> None:
    write_coco_val2017(tmp_path)
    (tmp_path / "val2017").rename(tmp_path / "val2014")
    file = tmp_path / "annotations" / "captions_val2017.json"
    file.rename(tmp_path / "coco_test_karpathy.json")
    found = read(COCO, tmp_path)
    assert names(found, tmp_path)[0] == "val2014/000000397133.jpg"
    assert found.notes == ("partial: 3 of 5,000 images, 15 of 25,010 captions",)


def test_coco_number_by_hand(tmp_path: Path) -> None:
    write_coco(tmp_path)
    found = read(COCO, tmp_path)
    texts = np.eye(3)[found.owners]
    texts[5:11] = [0.8, 0.6, 0.0]  # all six captions of image 1 are nearest to image 0
    scores = metrics.cross_modal_recall(np.eye(3), texts, found.owners, ks=(1, 2))
    assert scores["t2i_r1"] == pytest.approx(100 * 10 / 16)
    assert scores["t2i_r2"] == 100
    assert scores["i2t_r1"] == 100  # they are the nearest texts of image 1 all the same


@pytest.mark.parametrize(
    ("data_set", "total"), [(FLICKR30K, "5 of 5,000"), (COCO, "5 of 25,010")], ids=lambda x: str(x)
)
def test_webdataset_folders(tmp_path: Path, data_set: DataSet, total: str) -> None:
    samples = [{"jpg": picture(0), "txt": "one\ntwo\nthree"}, {"jpg": picture(1), "txt": "a\nb"}]
    folder = tmp_path / data_set.folders[-1]
    write_webdataset(folder, samples)
    assert data_set.find(tmp_path, {}) == [folder]
    found = read(data_set, folder)
    assert found.captions == ("one", "two", "three", "a", "b")
    assert found.owners.tolist() == [0, 0, 0, 1, 1]
    assert total in found.notes[0]


def test_partial_leaves_out_images_that_are_missing(tmp_path: Path) -> None:
    listed = write_flickr30k(tmp_path)
    (tmp_path / "flickr30k-images" / listed[0]).unlink()
    found = read(FLICKR30K, tmp_path)
    assert names(found, tmp_path / "flickr30k-images") == listed[1:]
    assert found.captions[0] == "Caption 0 of 1007129816 . "
    assert found.owners.tolist() == [0] * 5 + [1] * 5
    assert found.notes == ("partial: 2 of 1,000 images, 10 of 5,000 captions",)


# What is refused


@pytest.mark.parametrize(
    ("data_set", "write", "counts"),
    [
        (FLICKR30K, write_flickr30k, "3 of 1,000 images, 15 of 5,000 captions"),
        (COCO, write_coco, "3 of 5,000 images, 16 of 25,010 captions"),
        (COCO, write_coco_val2017, "3 of 5,000 images, 15 of 25,014 captions"),
    ],
)
def test_other_numbers(
    tmp_path: Path, data_set: DataSet, write: Callable[[Path], list[str]], counts: str
) -> None:
    write(tmp_path)
    with pytest.raises(DataError, match=f"{data_set.title}: found {counts}.*allow_partial"):
        data_set.read(tmp_path, SuiteOptions())


@pytest.mark.parametrize("data_set", [FLICKR30K, COCO])
def test_nothing_there(tmp_path: Path, data_set: DataSet) -> None:
    (tmp_path / "readme.txt").write_text("hello")
    with pytest.raises(AbsentError, match=r"holds neither dataset_\w+.json"):
        data_set.read(tmp_path, PARTIAL)
    with pytest.raises(AbsentError, match=r"(?s)https?://.*dataset_\w+.json"):
        data_set.find(tmp_path, {})


def test_halves(tmp_path: Path) -> None:
    write_flickr30k(tmp_path / "f")
    file = tmp_path / "f" / "dataset_flickr30k.json"
    text = file.read_text()
    file.unlink()
    with pytest.raises(DataError, match=r"no dataset_flickr30k.json.*caption_datasets.zip") as info:
        FLICKR30K.read(tmp_path / "f", PARTIAL)
    assert not isinstance(info.value, AbsentError)
    file.write_text(text)
    shutil.rmtree(tmp_path / "f" / "flickr30k-images")
    with pytest.raises(DataError, match=r"none of the 3 images .* 1009434119.jpg; looked in"):
        FLICKR30K.read(tmp_path / "f", PARTIAL)

    write_coco(tmp_path / "c")
    shutil.rmtree(tmp_path / "c" / "val2014")
    with pytest.raises(
        DataError, match=r"dataset_coco.json is there, but not the images, .*val2014/"
    ):
        COCO.read(tmp_path / "c", PARTIAL)
    write_coco_val2017(tmp_path / "c")
    (tmp_path / "c" / "annotations" / "captions_val2017.json").unlink()
    with pytest.raises(DataError, match=r"dataset_coco.json is there.*no captions_val2017.json"):
        COCO.read(tmp_path / "c", PARTIAL)


def test_missing_images(tmp_path: Path) -> None:
    listed = write_coco(tmp_path)
    for name in listed[1:]:
        (tmp_path / name).unlink()
    with pytest.raises(
        DataError, match=r"COCO: 2 of 3 images .*COCO_val2014_000000060623.jpg.*allow_partial=True"
    ):
        COCO.read(tmp_path, SuiteOptions())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: [row.update(split="val") for row in d["images"]], "'test', only of val 5"),
        (lambda d: d.update(dataset="flickr8k"), "is of 'flickr8k'; needed: that of 'flickr30k'"),
        (
            lambda d: d["images"].append(d["images"][1]),
            r"images\[5\]: 1009434119.jpg is there twice",
        ),
        (
            lambda d: d["images"][2].update(filename="../x.jpg"),
            r"images\[2\]: '../x.jpg' is no file",
        ),
        (lambda d: d["images"][2].update(filename=7), r"images\[2\]: 7 is no file name"),
        (lambda d: d["images"][4].update(sentences=[]), "101362133.jpg has no captions"),
        (lambda d: d["images"][4].pop("sentences"), "101362133.jpg has no captions"),
        (lambda d: d["images"][4]["sentences"][0].pop("raw"), "or one that is no text"),
        (lambda d: d.pop("images"), "no list of objects 'images', only 'dataset'"),
        (lambda d: d["images"].append(3), "no list of objects 'images'"),
    ],
)
def test_malformed_karpathy(tmp_path: Path, change: Callable[[Any], object], message: str) -> None:
    write_flickr30k(tmp_path)

    edit(tmp_path / "dataset_flickr30k.json", change)
    with pytest.raises(DataError, match=message):
        FLICKR30K.read(tmp_path, PARTIAL)


def test_several_problems_at_once(tmp_path: Path) -> None:
    write_flickr30k(tmp_path)

    def change(document: Any) -> None:
        document["images"][1]["sentences"] = []
        document["images"][4]["filename"] = "/etc/passwd"

    edit(tmp_path / "dataset_flickr30k.json", change)
    with pytest.raises(DataError, match=r"images\[1\].*no captions.*images\[4\].*/etc/passwd"):
        FLICKR30K.read(tmp_path, PARTIAL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["annotations"][3].update(image_id=5), r"annotations\[3\]: image_id 5 is no"),
        (lambda d: d["annotations"][3].pop("image_id"), r"annotations\[3\]: image_id None"),
        (lambda d: d["annotations"][3].pop("caption"), "image 252219: .* or one that is no text"),
        (lambda d: d["images"].append(d["images"][0]), r"images\[3\]: id 397133 .* there twice"),
        (
            lambda d: d["images"].append({**d["images"][0], "id": 8}),
            "image 8: val2017/.* there twice",
        ),
        (lambda d: d["images"].append({"id": 9, "file_name": "9.jpg"}), "image 9: .* no captions"),
        (lambda d: d["images"][0].pop("file_name"), "image 397133: None is no file name"),
        (lambda d: d.update(images=[], annotations=[]), "no images"),
        (lambda d: d.pop("annotations"), "no list of objects 'annotations'"),
    ],
)
def test_malformed_coco(tmp_path: Path, change: Callable[[Any], object], message: str) -> None:
    write_coco_val2017(tmp_path)

    edit(tmp_path / "annotations" / "captions_val2017.json", change)
    with pytest.raises(DataError, match=message):
        COCO.read(tmp_path, PARTIAL)


def test_no_json(tmp_path: Path) -> None:
    write_flickr30k(tmp_path)
    file = tmp_path / "dataset_flickr30k.json"
    text = file.read_text()
    file.write_text(text[:200])
    with pytest.raises(DataError, match=r"dataset_flickr30k.json can't be read as JSON"):
        FLICKR30K.read(tmp_path, PARTIAL)
    file.write_text(f"[{text}]")
    with pytest.raises(DataError, match="holds a list; needed: an object"):
        FLICKR30K.read(tmp_path, PARTIAL)
