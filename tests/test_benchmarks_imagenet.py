"""Readers of ImageNet and its kin on miniatures, and their refusals."""

from __future__ import annotations

import builtins
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pymcip import metrics
from pymcip.benchmarks import imagenet
from pymcip.benchmarks.aircraft import AIRCRAFT_TEST
from pymcip.benchmarks.contract import AbsentError, DataSet, Labelled, SuiteOptions
from pymcip.benchmarks.imagenet import IMAGENET_A, IMAGENET_SKETCH, IMAGENET_TRAIN, IMAGENET_VAL
from pymcip.benchmarks.imagenet_names import imagenet_names, imagenet_templates, synsets
from pymcip.benchmarks.objectnet import OBJECTNET
from pymcip.errors import DataError, MissingDependencyError
from tests.benchmark_layouts import (
    save_picture,
    val_name,
    write_development_kit,
    write_imagenet_a,
    write_imagenet_sketch,
    write_imagenet_train,
    write_imagenet_val,
    write_imagenet_val_flat,
    write_solution,
)
from tests.benchmark_reading import labelled as read

VAL_LABELS = [278, 0, 212, 0, 6, 278]  # of the images 1 to 6


def names(found: Labelled) -> list[str]:
    return [Path(found.images.key(row)).name for row in range(len(found.images))]


def numbers(found: Labelled) -> dict[int, int]:
    """Give the labels of validation images by their numbers."""
    given = zip(names(found), found.labels.tolist(), strict=True)
    return {int(name[15:23]): label for name, label in given}


# The class index


def test_the_classes_of_imagenet() -> None:
    known = synsets()
    assert len(known) == 1_000
    assert list(known) == sorted(set(known))
    assert known[:2] == ("n01440764", "n01443537")
    assert known[999] == "n15075141"
    called = imagenet_names()
    assert len(called) == 1_000
    assert (called[0], called[1], called[999]) == ("tench", "goldfish", "toilet paper")
    templates = imagenet_templates()
    assert len(set(templates)) == 80
    assert templates[0] == "a bad photo of a {}."
    assert all(template.count("{}") == 1 for template in templates)


def test_the_classes_of_imagenet_a() -> None:
    known = synsets("imagenet_a_synsets.txt")
    assert len(known) == 200
    assert list(known) == sorted(set(known) & set(synsets()))
    with pytest.raises(MissingDependencyError, match=r"imagenet_b\.txt.*pip install"):
        synsets("imagenet_b.txt")


# ImageNet-1k val


def test_val_by_synset(tmp_path: Path) -> None:
    write_imagenet_val(tmp_path)
    found = read(IMAGENET_VAL, tmp_path)
    assert names(found) == [val_name(number) for number in (2, 4, 5, 3, 1, 6)]
    assert found.labels.tolist() == [0, 0, 6, 212, 278, 278]
    assert found.names[278] == "kit fox"
    assert found.names == imagenet_names()
    assert found.templates == imagenet_templates()
    assert found.candidates is None
    assert found.notes == ("partial: 6 of 50,000 images, 4 of 1,000 classes",)
    # The pictures are read from where the names say.
    assert found.images.read(0).size == (40, 40)
    # The folder itself may be given too.
    assert names(read(IMAGENET_VAL, tmp_path / "val")) == names(found)


@pytest.mark.parametrize("place", ["val", "ILSVRC/Data/CLS-LOC/val", "Data/CLS-LOC/val", "."])
def test_flat_val_with_kaggles_solution(tmp_path: Path, place: str) -> None:
    folder = tmp_path / "imagenet"
    write_imagenet_val_flat(folder / place)
    write_solution((tmp_path if place == "." else folder) / "LOC_val_solution.csv")
    found = read(IMAGENET_VAL, folder)
    assert names(found) == [val_name(number) for number in range(1, 7)]
    assert found.labels.tolist() == VAL_LABELS


def test_a_solution_without_boxes(tmp_path: Path) -> None:
    write_imagenet_val_flat(tmp_path / "val")
    path = tmp_path / "LOC_val_solution.csv"
    write_solution(path)
    rows = [line.split(" ")[0] for line in path.read_text().splitlines()]
    path.write_text("\n".join(rows))
    assert read(IMAGENET_VAL, tmp_path).labels.tolist() == VAL_LABELS


@pytest.mark.parametrize("kit", ["ILSVRC2012_devkit_t12/data", "data", "val/data"])
def test_flat_val_with_the_development_kit(tmp_path: Path, kit: str) -> None:
    write_imagenet_val_flat(tmp_path / "val")
    write_development_kit(tmp_path / kit)
    if kit == "val/data":  # lists beside the images: the folder is none of images
        (tmp_path / kit).rename(tmp_path / "data")
    found = read(IMAGENET_VAL, tmp_path)
    assert found.labels.tolist() == VAL_LABELS  # not the ids 1, 449, 2, … less one


def test_flat_val_with_synsets_in_the_names(tmp_path: Path) -> None:
    for number, synset in [(293, "n01498041"), (1, "n02119789")]:
        save_picture(tmp_path / "val" / val_name(number, f"_{synset}.JPEG"), number)
    assert numbers(read(IMAGENET_VAL, tmp_path)) == {1: 278, 293: 6}


def test_every_layout_of_val_gives_the_same_labels(tmp_path: Path) -> None:
    write_imagenet_val(tmp_path / "folders")
    write_imagenet_val_flat(tmp_path / "flat" / "val")
    write_solution(tmp_path / "flat" / "LOC_val_solution.csv")
    by_folder = numbers(read(IMAGENET_VAL, tmp_path / "folders"))
    assert by_folder == numbers(read(IMAGENET_VAL, tmp_path / "flat"))
    assert by_folder == dict(enumerate(VAL_LABELS, start=1))


def test_val_needs_fifty_images_of_each_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_imagenet_val(tmp_path)
    monkeypatch.setitem(imagenet.COUNTS, IMAGENET_VAL.name, {"images": 6, "classes": 4})
    with pytest.raises(DataError, match="found 0 of 1,000 classes of 50 images"):  # 1 or 2 each
        read(IMAGENET_VAL, tmp_path, SuiteOptions())


def test_a_partial_val_must_be_asked_for(tmp_path: Path) -> None:
    write_imagenet_val(tmp_path)
    with pytest.raises(DataError, match=r"6 of 50,000 images, 4 of 1,000 classes.*allow_partial"):
        read(IMAGENET_VAL, tmp_path, SuiteOptions())


def test_flat_val_names_missing_images(tmp_path: Path) -> None:
    write_imagenet_val_flat(tmp_path / "val")
    write_solution(tmp_path / "LOC_val_solution.csv")
    (tmp_path / "val" / val_name(3)).unlink()
    with pytest.raises(DataError, match="images that are missing: ILSVRC2012_val_00000003"):
        read(IMAGENET_VAL, tmp_path, SuiteOptions())
    found = read(IMAGENET_VAL, tmp_path)
    assert found.labels.tolist() == [278, 0, 0, 6, 278]
    assert found.notes == ("partial: 5 of 50,000 images, 3 of 1,000 classes",)


def test_flat_val_without_classes(tmp_path: Path) -> None:
    write_imagenet_val_flat(tmp_path / "val")
    with pytest.raises(DataError, match=r"nothing tells their classes.*LOC_val_solution\.csv"):
        read(IMAGENET_VAL, tmp_path)
    write_solution(tmp_path / "LOC_val_solution.csv")
    save_picture(tmp_path / "val" / val_name(9), 9)
    with pytest.raises(DataError, match=r"solution\.csv has no class of ILSVRC2012_val_00000009"):
        read(IMAGENET_VAL, tmp_path)


def test_flat_val_with_other_images(tmp_path: Path) -> None:
    write_imagenet_val_flat(tmp_path / "val")
    write_solution(tmp_path / "LOC_val_solution.csv")
    save_picture(tmp_path / "val" / val_name(2, ".png"), 9)
    save_picture(tmp_path / "val" / "ILSVRC2012_test_00000001.JPEG", 9)
    with pytest.raises(
        DataError,
        match=r"not named ILSVRC2012_val_NNNNNNNN\.JPEG: ILSVRC2012_test_00000001\.JPEG; "
        r"images that are there twice: ILSVRC2012_val_00000002",
    ):
        read(IMAGENET_VAL, tmp_path)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("ILSVRC2012_val_00000001", "line 8: 'ILSVRC2012_val_00000001'"),
        ("ILSVRC2012_val_00000007,n02119789 1 2 3", "line 8"),
        ("ILSVRC2012_val_00000007,", "line 8"),
        ("ILSVRC2012_val_00000007,n02119789 1 2 3 4 n01440764 1 2 3 4", "line 8"),
        ("n01440764_10026,n01440764 1 2 3 4", "line 8: 'n01440764_10026"),
        ("ILSVRC2012_val_00000001,n02119789 1 2 3 4", "line 8: .* for the second time"),
    ],
)
def test_malformed_solutions(tmp_path: Path, line: str, complaint: str) -> None:
    write_imagenet_val_flat(tmp_path / "val")
    path = tmp_path / "LOC_val_solution.csv"
    write_solution(path)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DataError, match=complaint):
        read(IMAGENET_VAL, tmp_path)


def test_a_solution_of_other_classes(tmp_path: Path) -> None:
    write_imagenet_val_flat(tmp_path / "val")
    path = tmp_path / "LOC_val_solution.csv"
    write_solution(path)
    path.write_text(path.read_text().replace("n02100735", "n00004475"))
    with pytest.raises(DataError, match="classes that are not ImageNet-1k's: n00004475"):
        read(IMAGENET_VAL, tmp_path)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("1\n449\n2\n0\n", "line 4: '0'"),
        ("1\n449\n1001\n", "line 3: '1001'"),  # a class that others belong to
        ("1\n\n2\n", "line 2: ''"),
        ("n02119789\n", "line 1: 'n02119789'"),
        ("", "no lines"),
        ("1\n449\n2\n449\n437\n", "has no class of ILSVRC2012_val_00000006"),
    ],
)
def test_malformed_development_kits(tmp_path: Path, text: str, complaint: str) -> None:
    write_imagenet_val_flat(tmp_path / "val")
    kit = tmp_path / "ILSVRC2012_devkit_t12" / "data"
    write_development_kit(kit)
    (kit / "ILSVRC2012_validation_ground_truth.txt").write_text(text)
    with pytest.raises(DataError, match=complaint):
        read(IMAGENET_VAL, tmp_path)


def test_damaged_meta(tmp_path: Path) -> None:
    write_imagenet_val_flat(tmp_path / "val")
    kit = tmp_path / "ILSVRC2012_devkit_t12" / "data"
    write_development_kit(kit)
    (kit / "meta.mat").write_bytes(b"no MATLAB file" * 20)
    with pytest.raises(DataError, match=r"meta\.mat can't be read.*unpack that again"):
        read(IMAGENET_VAL, tmp_path)
    (kit / "meta.mat").unlink()
    with pytest.raises(DataError, match=r"meta\.mat is missing"):
        read(IMAGENET_VAL, tmp_path)


def test_the_development_kit_needs_scipy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_imagenet_val_flat(tmp_path / "val")
    write_development_kit(tmp_path / "ILSVRC2012_devkit_t12" / "data")
    real = builtins.__import__

    def without_scipy(name: str, *rest: Any, **named: Any) -> Any:
        if name.startswith("scipy"):
            raise ImportError("No module named 'scipy'")
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without_scipy)
    with pytest.raises(MissingDependencyError, match=r'pip install "pymcip\[benchmarks\]"'):
        read(IMAGENET_VAL, tmp_path)


def test_val_with_folders_of_other_classes(tmp_path: Path) -> None:
    write_imagenet_val(tmp_path)
    save_picture(tmp_path / "val" / "n00004475" / val_name(7), 7)
    save_picture(tmp_path / "val" / val_name(8), 8)
    with pytest.raises(
        DataError,
        match="none of its 1,000 classes: n00004475; images outside of the classes' folders: "
        "ILSVRC2012_val_00000008",
    ):
        read(IMAGENET_VAL, tmp_path)


@pytest.mark.parametrize("data_set", [IMAGENET_VAL, IMAGENET_SKETCH], ids=["val", "sketch"])
def test_complete_sets_have_no_notes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data_set: DataSet
) -> None:
    write_imagenet_sketch(tmp_path)
    for synset, number in zip(synsets(), range(1, 2_001, 2), strict=True):
        for each in (number, number + 1):
            path = tmp_path / "val" / synset / val_name(each)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    images, classes = (2_000, 1_000) if data_set is IMAGENET_VAL else (8, 4)
    public = {"images": images, "classes": classes}
    monkeypatch.setitem(imagenet.COUNTS, data_set.name, public)
    monkeypatch.setattr(imagenet, "VAL_PER_CLASS", 2)
    assert read(data_set, tmp_path, SuiteOptions()).notes == ()


# Splits


def test_train(tmp_path: Path) -> None:
    write_imagenet_train(tmp_path)
    found = read(IMAGENET_TRAIN, tmp_path)
    assert found.labels.tolist() == [0, 0, 6, 6, 212, 212, 278, 278]
    assert names(found)[:3] == [
        "n01440764_10026.JPEG",
        "n01440764_1060.JPEG",
        "n01498041_10026.JPEG",
    ]
    assert found.notes == ("partial: 8 of 1,281,167 images, 4 of 1,000 classes",)
    (tmp_path / "ILSVRC" / "Data" / "CLS-LOC").mkdir(parents=True)
    (tmp_path / "train").rename(tmp_path / "ILSVRC" / "Data" / "CLS-LOC" / "train")
    assert names(read(IMAGENET_TRAIN, tmp_path)) == names(found)
    with pytest.raises(DataError, match="8 of 1,281,167 images"):
        read(IMAGENET_TRAIN, tmp_path, SuiteOptions())


def test_a_part_that_is_not_there_is_absent(tmp_path: Path) -> None:
    write_imagenet_val(tmp_path)
    with pytest.raises(
        AbsentError, match=r"ImageNet-1k train: .* holds none of its images\. .*https://image-net"
    ):
        read(IMAGENET_TRAIN, tmp_path)
    with pytest.raises(AbsentError):  # validation images in folders per synset are not train
        read(IMAGENET_TRAIN, tmp_path / "val")
    empty = tmp_path / "empty"
    (empty / "val").mkdir(parents=True)
    for data_set in (IMAGENET_VAL, IMAGENET_SKETCH, IMAGENET_A, OBJECTNET, AIRCRAFT_TEST):
        with pytest.raises(AbsentError, match=f"{data_set.title}: .* holds no"):
            read(data_set, empty if data_set is IMAGENET_VAL else empty / "val")


def test_wrong_splits(tmp_path: Path) -> None:
    write_imagenet_val(tmp_path)
    (tmp_path / "val").rename(tmp_path / "train")
    with pytest.raises(DataError, match="names don't begin with SYNSET_: n01440764/ILSVRC2012_val"):
        read(IMAGENET_TRAIN, tmp_path)
    shutil.rmtree(tmp_path / "train")
    write_imagenet_train(tmp_path)
    (tmp_path / "train").rename(tmp_path / "val")
    with pytest.raises(DataError, match="don't begin with ILSVRC2012_val_: n01440764/n01440764_1"):
        read(IMAGENET_VAL, tmp_path)


def test_a_training_image_in_the_folder_of_another_class(tmp_path: Path) -> None:
    write_imagenet_train(tmp_path)
    stray = tmp_path / "train" / "n01440764" / "n01440764_1060.JPEG"
    stray.rename(tmp_path / "train" / "n02119789" / stray.name)
    with pytest.raises(DataError, match="SYNSET_: n02119789/n01440764_1060"):
        read(IMAGENET_TRAIN, tmp_path)


# ImageNet-Sketch and ImageNet-A


def test_sketch(tmp_path: Path) -> None:
    write_imagenet_sketch(tmp_path)
    found = read(IMAGENET_SKETCH, tmp_path)
    assert found.labels.tolist() == [0, 0, 6, 6, 212, 212, 278, 278]
    assert found.names == imagenet_names()
    assert found.notes == ("partial: 8 of 50,889 images, 4 of 1,000 classes",)
    assert names(read(IMAGENET_SKETCH, tmp_path / "sketch")) == names(found)
    (tmp_path / "sketch" / "tench").mkdir()
    with pytest.raises(DataError, match="none of its 1,000 classes: tench"):
        read(IMAGENET_SKETCH, tmp_path)


@pytest.mark.parametrize("inner", [".", "imagenet-a"])
def test_imagenet_a(tmp_path: Path, inner: str) -> None:
    write_imagenet_a(tmp_path / inner)
    found = read(IMAGENET_A, tmp_path)
    assert found.labels.tolist() == [6, 6, 11, 11]
    assert len(found.names) == 1_000
    assert found.names[11] == "goldfinch"
    assert found.candidates is not None
    assert len(found.candidates) == 200  # all of them, whichever have images
    assert found.candidates[:3] == (6, 11, 13)
    assert found.notes == ("partial: 4 of 7,500 images, 2 of 200 classes",)


def test_imagenet_a_of_other_classes(tmp_path: Path) -> None:
    write_imagenet_a(tmp_path)
    (tmp_path / "n01531178").rename(tmp_path / "n01443537")  # a class of ImageNet-R, not of -A
    with pytest.raises(DataError, match="none of its 200 classes: n01443537"):
        read(IMAGENET_A, tmp_path)


def test_empty_class_folders(tmp_path: Path) -> None:
    write_imagenet_sketch(tmp_path)
    for path in (tmp_path / "sketch").glob("*/*.JPEG"):
        path.unlink()
    with pytest.raises(DataError, match="no images in folders of its classes"):
        read(IMAGENET_SKETCH, tmp_path)


# Figures computed by hand


def test_knn_of_val_by_hand(tmp_path: Path) -> None:
    write_imagenet_val(tmp_path)
    write_imagenet_train(tmp_path)
    val, train = read(IMAGENET_VAL, tmp_path), read(IMAGENET_TRAIN, tmp_path)
    # train: tench at 0 and 90 degrees, stingray at 180 both, setter at 270 both, kit fox at 80, 100.
    bank = on_circle(0, 90, 180, 180, 270, 270, 80, 100)
    # val: tench, tench, stingray, setter, kit fox, kit fox. With k = 3:
    #   5: tench (0); 80 and 90 are far, and count little          -> tench, right
    #   90: tench (90) weighs e^(1/0.07), kit fox 2 e^(cos 10/0.07), 1.6 times as much -> wrong
    #   181, 271: two of the class at one degree                   -> right
    #   79: kit fox (80, 100), tench (90)                          -> right
    #   -1: tench (0)                                              -> wrong
    queries = on_circle(5, 90, 181, 271, 79, -1)
    answers = metrics.knn_classify(bank, train.labels, queries, 3)
    assert answers.tolist() == [0, 278, 6, 212, 278, 0]
    assert np.mean(answers == val.labels) == 4 / 6


def test_zero_shot_of_imagenet_a_by_hand(tmp_path: Path) -> None:
    write_imagenet_a(tmp_path)
    found = read(IMAGENET_A, tmp_path)
    assert found.candidates is not None
    classifier = np.zeros((1_000, 2))
    classifier[:, 1] = -1  # all other classes at 270 degrees
    classifier[[6, 11, 0]] = on_circle(0, 90, 30)
    # stingray, stingray, goldfinch, goldfinch; tench lies at 30 degrees, but is no candidate.
    images = on_circle(25, 50, 50, 100)
    allowed = list(found.candidates)
    labels = np.searchsorted(allowed, found.labels)
    top = metrics.zero_shot_accuracy(images, classifier[allowed], labels)
    assert top[1] == 75  # 25: stingray; 50: goldfinch, right once of twice; 100: goldfinch
    # Were all 1,000 candidates, tench would take 25 and 50.
    assert metrics.zero_shot_accuracy(images, classifier, found.labels)[1] == 25


def on_circle(*degrees: float) -> np.ndarray[Any, np.dtype[np.float64]]:
    angles = np.deg2rad(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)
