"""Readers of ObjectNet and FGVC-Aircraft on miniatures; what no listing's order changes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pymcip.benchmarks.aircraft import AIRCRAFT_DATABASE, AIRCRAFT_TEST
from pymcip.benchmarks.contract import AbsentError, Labelled, SuiteOptions
from pymcip.benchmarks.imagenet import IMAGENET_A, IMAGENET_SKETCH, IMAGENET_TRAIN, IMAGENET_VAL
from pymcip.benchmarks.imagenet_names import imagenet_names, imagenet_templates
from pymcip.benchmarks.objectnet import OBJECTNET
from pymcip.errors import DataError
from tests.benchmark_layouts import (
    AIRCRAFT_VARIANTS,
    write_aircraft,
    write_imagenet_a,
    write_imagenet_sketch,
    write_imagenet_train,
    write_imagenet_val,
    write_objectnet,
    write_webdataset,
)
from tests.benchmark_reading import PARTIAL
from tests.benchmark_reading import labelled as read
from tests.conftest import picture


def names(found: Labelled) -> list[str]:
    return [Path(found.images.key(row)).name for row in range(len(found.images))]


# ObjectNet


def test_objectnet(tmp_path: Path) -> None:
    write_objectnet(tmp_path)
    found = read(OBJECTNET, tmp_path)
    # In the order of the folders' names: drinking_cup, hand_towel_or_rag, t-shirt.
    assert found.names == ("drinking cup", "dishrag or hand towel", "t-shirt")
    assert names(found) == [f"{row}f{number}a.png" for row in (2, 3, 4) for number in (0, 1)]
    assert found.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert found.templates == imagenet_templates()
    assert found.candidates is None
    assert found.notes == ("partial: 6 of 18,574 images, 3 of 113 classes",)
    assert names(read(OBJECTNET, tmp_path / "objectnet-1.0")) == names(found)


def test_objectnets_border(tmp_path: Path) -> None:
    write_objectnet(tmp_path)
    found = read(OBJECTNET, tmp_path, dataclasses.replace(PARTIAL, objectnet_border=2))
    image = found.images.read(0)
    assert image.size == (40, 40)
    assert np.array_equal(np.asarray(image), np.asarray(picture(2, (40, 70, 210))))
    whole = read(OBJECTNET, tmp_path)
    assert whole.images.read(0).size == (44, 44)
    assert whole.images.read(0).getpixel((1, 1)) == (255, 0, 0)
    assert whole.images.fingerprint() != found.images.fingerprint()


def test_objectnet_as_clip_benchmark_lays_it_out(tmp_path: Path) -> None:
    write_objectnet(tmp_path)
    for path in sorted((tmp_path / "objectnet-1.0" / "mappings").iterdir()):
        path.rename(tmp_path / path.name)
    assert read(OBJECTNET, tmp_path).labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_objectnets_mappings_must_fit(tmp_path: Path) -> None:
    write_objectnet(tmp_path)
    mappings = tmp_path / "objectnet-1.0" / "mappings"
    shared = mappings / "objectnet_to_imagenet_1k.json"
    folders = mappings / "folder_to_objectnet_label.json"
    before = folders.read_text()
    (tmp_path / "objectnet-1.0" / "images" / "drill").mkdir()
    shared.write_text(json.dumps({**json.loads(shared.read_text()), "Wok": "wok"}))
    with pytest.raises(DataError, match=r"label\.json lacks: drill; no folder .*1k\.json: Wok"):
        read(OBJECTNET, tmp_path)
    folders.write_text(json.dumps({**json.loads(before), "drill": "T-shirt"}))
    with pytest.raises(DataError, match="gives several folders one label"):
        read(OBJECTNET, tmp_path)
    folders.write_text(before[:-9])
    with pytest.raises(DataError, match="can't be read as JSON"):
        read(OBJECTNET, tmp_path)
    folders.write_text('["drill"]')
    with pytest.raises(DataError, match="needed: an object"):
        read(OBJECTNET, tmp_path)
    folders.unlink()
    with pytest.raises(DataError, match=r"folder_to_objectnet_label\.json is missing"):
        read(OBJECTNET, tmp_path)


def test_a_partial_objectnet_must_be_asked_for(tmp_path: Path) -> None:
    write_objectnet(tmp_path)
    shutil.rmtree(tmp_path / "objectnet-1.0" / "images" / "drinking_cup")
    assert read(OBJECTNET, tmp_path).labels.tolist() == [1, 1, 2, 2]  # labels don't move up
    with pytest.raises(DataError, match="4 of 18,574 images, 2 of 113 classes"):
        read(OBJECTNET, tmp_path, SuiteOptions())


# FGVC-Aircraft


@pytest.mark.parametrize("inner", [".", "fgvc-aircraft-2013b", "fgvc-aircraft-2013b/data"])
def test_aircraft(tmp_path: Path, inner: str) -> None:
    write_aircraft(tmp_path)
    found = read(AIRCRAFT_TEST, tmp_path / inner)
    assert names(found) == ["1514522.jpg", "0747566.jpg", "1008575.jpg"]
    assert found.labels.tolist() == [3, 0, 2]
    assert found.names == AIRCRAFT_VARIANTS
    assert found.notes == ("partial: 3 of 3,333 images, 3 of 100 classes",)
    database = read(AIRCRAFT_DATABASE, tmp_path / inner)
    assert names(database) == ["1025794.jpg", "0481847.jpg", "1340192.jpg", "0056978.jpg"]
    assert database.labels.tolist() == [2, 0, 3, 2]
    assert database.notes == ("partial: 4 of 6,667 images, 3 of 100 classes",)
    options = dataclasses.replace(PARTIAL, aircraft_database="train")
    train = read(AIRCRAFT_DATABASE, tmp_path / inner, options)
    assert train.labels.tolist() == [2, 0]
    assert train.notes == ("partial: 2 of 3,334 images, 2 of 100 classes",)
    with pytest.raises(DataError, match="3 of 3,333 images, 3 of 100 classes"):
        read(AIRCRAFT_TEST, tmp_path / inner, SuiteOptions())


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("1514522 F/A-18", "line 4: 1514522 for the second time"),
        ("1514523", "line 4: '1514523'"),
        ("1514523 F/A-19", "line 4: '1514523 F/A-19'"),
        ("1514523 Boeing  717", "line 4"),
        ("151452 F/A-18", "line 4"),
        ("F/A-18 1514523", "line 4"),
        ("9999999 F/A-18", r"1 of 4 images .* are not there: .*9999999\.jpg"),
    ],
)
def test_malformed_aircraft_lists(tmp_path: Path, line: str, complaint: str) -> None:
    write_aircraft(tmp_path)
    path = tmp_path / "fgvc-aircraft-2013b" / "data" / "images_variant_test.txt"
    path.write_text(path.read_text() + line + "\n\n")
    with pytest.raises(DataError, match=complaint):
        read(AIRCRAFT_TEST, tmp_path)


def test_aircraft_with_missing_files(tmp_path: Path) -> None:
    write_aircraft(tmp_path)
    place = tmp_path / "fgvc-aircraft-2013b" / "data"
    (place / "images_variant_test.txt").rename(place / "images_variant_tests.txt")
    with pytest.raises(DataError, match=r"images_variant_test\.txt is missing"):
        read(AIRCRAFT_TEST, tmp_path)
    assert len(read(AIRCRAFT_DATABASE, tmp_path).labels) == 4
    (place / "variants.txt").write_text("707-320\nA380\n707-320\n")
    with pytest.raises(DataError, match="3 lines, 2 of them different"):
        read(AIRCRAFT_DATABASE, tmp_path)
    (place / "variants.txt").unlink()
    with pytest.raises(DataError, match=r"variants\.txt is missing"):
        read(AIRCRAFT_DATABASE, tmp_path)


def test_aircraft_that_vote_for_themselves(tmp_path: Path) -> None:
    write_aircraft(tmp_path)
    place = tmp_path / "fgvc-aircraft-2013b" / "data"
    with (place / "images_variant_trainval.txt").open("a") as handle:
        handle.write("1008575 Boeing 717\n")
    with pytest.raises(DataError, match="share 1 images: 1008575"):
        read(AIRCRAFT_DATABASE, tmp_path)


# Whatever the order of a listing


def test_labels_do_not_depend_on_the_listing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_imagenet_val(tmp_path / "val")
    write_imagenet_train(tmp_path / "train")
    write_imagenet_sketch(tmp_path / "sketch")
    write_imagenet_a(tmp_path / "a")
    write_objectnet(tmp_path / "objectnet")
    sets = [IMAGENET_VAL, IMAGENET_TRAIN, IMAGENET_SKETCH, IMAGENET_A, OBJECTNET]
    folders = ["val", "train", "sketch", "a", "objectnet"]
    real = os.scandir

    def read_all(reverse: bool) -> list[tuple[list[str], list[int], str]]:
        @contextlib.contextmanager
        def ordered(path: Any) -> Iterator[Iterator[os.DirEntry[str]]]:
            with real(path) as entries:
                yield iter(sorted(entries, key=lambda entry: entry.name, reverse=reverse))

        with monkeypatch.context() as patch:
            patch.setattr(os, "scandir", ordered)
            found = [
                read(data_set, tmp_path / name)
                for data_set, name in zip(sets, folders, strict=True)
            ]
        return [(names(each), each.labels.tolist(), each.images.fingerprint()) for each in found]

    assert read_all(reverse=True) == read_all(reverse=False)


# CLIP_benchmark's shards give the same labels


def write_shards(folder: Path, split: str, classes: list[int], names: list[str]) -> None:
    samples = [{"png": picture(row), "cls": str(label)} for row, label in enumerate(classes)]
    write_webdataset(folder, samples, split=split, names=names)


def test_shards_of_imagenet(tmp_path: Path) -> None:
    words = [f"name {label}" for label in range(1_000)]
    write_shards(tmp_path, "test", [278, 0, 6], words)
    write_shards(tmp_path, "train", [999], words)
    found = read(IMAGENET_VAL, tmp_path)
    assert found.labels.tolist() == [278, 0, 6]
    assert found.names == imagenet_names()
    assert found.templates == imagenet_templates()
    assert found.notes == ("partial: 3 of 50,000 images, 3 of 1,000 classes",)
    assert read(IMAGENET_SKETCH, tmp_path).notes[0].startswith("partial: 3 of 50,889 images")
    train = read(IMAGENET_TRAIN, tmp_path)
    assert train.labels.tolist() == [999]
    assert train.notes[0].startswith("partial: 1 of 1,281,167 images")
    shutil.rmtree(tmp_path / "train")
    with pytest.raises(AbsentError, match="no split 'train'"):
        read(IMAGENET_TRAIN, tmp_path)


def test_shards_of_imagenet_a(tmp_path: Path) -> None:
    write_shards(tmp_path, "test", [1, 0, 199], [f"name {label}" for label in range(200)])
    found = read(IMAGENET_A, tmp_path)
    assert found.labels.tolist() == [11, 6, 988]
    assert found.names == imagenet_names()
    assert found.candidates is not None
    assert found.candidates[:3] == (6, 11, 13)
    assert found.notes == ("partial: 3 of 7,500 images, 3 of 200 classes",)


def test_shards_of_objectnet(tmp_path: Path) -> None:
    words = [f"name {label}" for label in range(113)]
    write_shards(tmp_path, "test", [112, 0], words)
    found = read(OBJECTNET, tmp_path)
    assert found.labels.tolist() == [112, 0]
    assert found.names == tuple(words)
    assert found.templates == imagenet_templates()
    assert found.images.read(0).size == (40, 40)


def test_shards_of_aircraft(tmp_path: Path) -> None:
    words = [f"name {label}" for label in range(100)]
    write_shards(tmp_path, "test", [3, 99], words)
    write_shards(tmp_path, "train", [7], words)
    assert read(AIRCRAFT_TEST, tmp_path).labels.tolist() == [3, 99]
    with pytest.raises(AbsentError, match=r'no split trainval.*aircraft_database="train"'):
        read(AIRCRAFT_DATABASE, tmp_path)
    options = dataclasses.replace(PARTIAL, aircraft_database="train")
    assert read(AIRCRAFT_DATABASE, tmp_path, options).labels.tolist() == [7]
