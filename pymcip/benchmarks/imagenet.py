"""ImageNet-1k (val and train), ImageNet-Sketch and ImageNet-A.

Labels are ImageNet's: its 1,000 synset ids in sorted order (the order of open_clip's names, and of
cls in CLIP_benchmark's shards), for -Sketch and -A too. Each data set is also read in
CLIP_benchmark's layout (see `pymcip.benchmarks.webdataset`), with the same labels.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from pymcip.benchmarks import webdataset
from pymcip.benchmarks.contract import (
    AbsentError,
    DataSet,
    Int64,
    Labelled,
    SuiteOptions,
    check_counts,
)
from pymcip.benchmarks.folders import count_labels, list_classes, list_entries
from pymcip.benchmarks.imagenet_names import imagenet_names, imagenet_templates, synsets
from pymcip.benchmarks.imagenet_val import TITLE, list_flat_val
from pymcip.data import ImageData, list_images

VAL_COUNTS = {"images": 50_000, "classes": 1_000}
TRAIN_COUNTS = {"images": 1_281_167, "classes": 1_000}
SKETCH_COUNTS = {"images": 50_889, "classes": 1_000}
A_COUNTS = {"images": 7_500, "classes": 200}
VAL_PER_CLASS = 50
_SYNSET = re.compile(r"n\d{8}")
_FOLDERS = (
    "imagenet1k",
    "imagenet-1k",
    "imagenet",
    "ImageNet",
    "ILSVRC2012",
    "imagenet-object-localization-challenge",
    "wds_imagenet1k",
)


def read_imagenet_val(folder: Path, options: SuiteOptions) -> Labelled:
    """Read ImageNet-1k's 50,000 validation images, 50 of each of the 1,000 classes.

    They lie in a folder per synset, or all in one folder; then their classes are taken from the
    synsets in their names (Hugging Face), from LOC_val_solution.csv (Kaggle), or from the
    development kit, whose ILSVRC2012_ID (1 to 1,000, not in the order of the synsets) meta.mat maps
    to synsets.

    Raises:
        AbsentError: there are no validation images.
        DataError: there are other images among them, or some are missing or without a class.
        MissingDependencyError: the development kit is needed, and SciPy is missing.
    """
    if webdataset.is_layout(folder):
        return _imagenet_shards(folder, "test", IMAGENET_VAL.title, VAL_COUNTS, options)
    places = ("val", "ILSVRC/Data/CLS-LOC/val", "Data/CLS-LOC/val", "ILSVRC2012_img_val", ".")
    place = _find_split(folder, places, IMAGENET_VAL, "ILSVRC2012_val_")
    folders, files = list_entries(place)
    if folders:
        names, labels = list_classes(place, IMAGENET_VAL.title, synsets(), "ILSVRC2012_val_")
    else:
        names, labels = list_flat_val(folder, place, files, options)
    notes = check_counts(IMAGENET_VAL.title, count_labels(labels), VAL_COUNTS, options)
    if not notes:  # complete, but images may lie in folders of other classes
        even = int(np.sum(np.bincount(labels) == VAL_PER_CLASS))
        what = f"classes of {VAL_PER_CLASS} images"
        notes = check_counts(IMAGENET_VAL.title, {what: even}, {what: 1_000}, options)
    return _imagenet(list_images(place, names), labels, notes)


def read_imagenet_train(folder: Path, options: SuiteOptions) -> Labelled:
    """Read ImageNet-1k's 1,281,167 training images from a folder per synset.

    Raises:
        AbsentError: there are no training images.
        DataError: there are other images among them, or some are missing.
    """
    if webdataset.is_layout(folder):
        return _imagenet_shards(folder, "train", IMAGENET_TRAIN.title, TRAIN_COUNTS, options)
    places = (
        "train",
        "ILSVRC/Data/CLS-LOC/train",
        "Data/CLS-LOC/train",
        "ILSVRC2012_img_train",
        ".",
    )
    place = _find_split(folder, places, IMAGENET_TRAIN, "n")
    names, labels = list_classes(place, IMAGENET_TRAIN.title, synsets(), "{}_")
    notes = check_counts(IMAGENET_TRAIN.title, count_labels(labels), TRAIN_COUNTS, options)
    return _imagenet(list_images(place, names), labels, notes)


def read_imagenet_sketch(folder: Path, options: SuiteOptions) -> Labelled:
    """Read ImageNet-Sketch's 50,889 images of ImageNet's 1,000 classes.

    Raises:
        AbsentError: there are no images.
        DataError: some are missing, or there are folders of other classes.
    """
    if webdataset.is_layout(folder):
        return _imagenet_shards(folder, "test", IMAGENET_SKETCH.title, SKETCH_COUNTS, options)
    place = _find_split(folder, ("sketch", "ImageNet-Sketch", "."), IMAGENET_SKETCH, "")
    names, labels = list_classes(place, IMAGENET_SKETCH.title, synsets(), "")
    notes = check_counts(IMAGENET_SKETCH.title, count_labels(labels), SKETCH_COUNTS, options)
    return _imagenet(list_images(place, names), labels, notes)


def read_imagenet_a(folder: Path, options: SuiteOptions) -> Labelled:
    """Read ImageNet-A's 7,500 images of 200 of ImageNet's classes.

    Labels are ImageNet's, 0 to 999, so that ImageNet's training images can vote for them; the
    candidates of zero-shot are the 200, whichever of them have images.

    Raises:
        AbsentError: there are no images.
        DataError: some are missing, or there are folders of other classes.
    """
    known = synsets("imagenet_a_synsets.txt")
    label_of = {synset: label for label, synset in enumerate(synsets())}
    candidates = tuple(label_of[synset] for synset in known)
    if webdataset.is_layout(folder):
        return webdataset.read_labelled(
            folder,
            "test",
            IMAGENET_A.title,
            A_COUNTS,
            options,
            class_ids=candidates,
            names=imagenet_names(),
            templates=imagenet_templates(),
        )
    place = _find_split(folder, ("imagenet-a", "."), IMAGENET_A, "")
    names, labels = list_classes(place, IMAGENET_A.title, known, "")
    notes = check_counts(IMAGENET_A.title, count_labels(labels), A_COUNTS, options)
    own = np.array(candidates, np.int64)[labels]
    return _imagenet(list_images(place, names), own, notes, candidates)


def _imagenet(
    images: ImageData,
    labels: Int64,
    notes: tuple[str, ...],
    candidates: tuple[int, ...] | None = None,
) -> Labelled:
    return Labelled(images, labels, imagenet_names(), imagenet_templates(), candidates, notes)


def _imagenet_shards(
    folder: Path, split: str, title: str, expected: Mapping[str, int], options: SuiteOptions
) -> Labelled:
    names, templates = imagenet_names(), imagenet_templates()
    return webdataset.read_labelled(
        folder, split, title, expected, options, names=names, templates=templates
    )


def _find_split(folder: Path, places: Iterable[str], data: DataSet, stem: str) -> Path:
    """Return the first of the places that holds images or folders.

    The folder itself (".") may be the one of another split: the names of its images must begin with
    `stem`.
    """
    for name in places:
        place = folder / name
        if not place.is_dir():
            continue
        folders, files = list_entries(place)
        if name == ".":
            classes = [each for each in folders if _SYNSET.fullmatch(each)]
            samples = files[:1] + [
                each for one in classes[:3] for each in list_entries(place / one)[1]
            ]
            if samples and samples[0].startswith(stem):
                return place
        elif folders or files:
            return place
    raise AbsentError(f"{data.title}: {folder} holds none of its images. {data.how_to_get()}")


IMAGENET_VAL = DataSet(
    name="imagenet1k-val",
    title=TITLE,
    folders=_FOLDERS,
    source="https://image-net.org/download-images (ILSVRC 2012), "
    "https://www.kaggle.com/c/imagenet-object-localization-challenge or "
    "https://huggingface.co/datasets/clip-benchmark/wds_imagenet1k",
    layout="""
val/n01440764/ILSVRC2012_val_00000293.JPEG   1,000 folders named by synset ids, 50 images each
or val/ILSVRC2012_val_00000001.JPEG          all 50,000 in it (or in ILSVRC/Data/CLS-LOC/val/), with
   LOC_val_solution.csv                      Kaggle's, or
   ILSVRC2012_devkit_t12/data/               meta.mat, ILSVRC2012_validation_ground_truth.txt
or test/{nshards.txt,0.tar,…}                CLIP_benchmark's shards
""",
    read=read_imagenet_val,
)


IMAGENET_TRAIN = DataSet(
    name="imagenet1k-train",
    title="ImageNet-1k train",
    folders=_FOLDERS,
    source=IMAGENET_VAL.source,
    layout="""
train/n01440764/n01440764_10026.JPEG         1,000 folders named by synset ids, 1,281,167 images
                                             (or in ILSVRC/Data/CLS-LOC/train/)
or train/{nshards.txt,0.tar,…}               CLIP_benchmark's shards
""",
    read=read_imagenet_train,
)


IMAGENET_SKETCH = DataSet(
    name="imagenet-sketch",
    title="ImageNet-Sketch",
    folders=(
        "imagenet-sketch",
        "imagenet_sketch",
        "ImageNet-Sketch",
        "sketch",
        "wds_imagenet_sketch",
    ),
    source="https://github.com/HaohanWang/ImageNet-Sketch or "
    "https://huggingface.co/datasets/clip-benchmark/wds_imagenet_sketch",
    layout="""
sketch/n01440764/sketch_0.JPEG               1,000 folders named by synset ids, 50,889 images
or test/{nshards.txt,0.tar,…}                CLIP_benchmark's shards
""",
    read=read_imagenet_sketch,
)


IMAGENET_A = DataSet(
    name="imagenet-a",
    title="ImageNet-A",
    folders=("imagenet-a", "imagenet_a", "ImageNet-A", "wds_imagenet-a"),
    source="https://github.com/hendrycks/natural-adv-examples or "
    "https://huggingface.co/datasets/clip-benchmark/wds_imagenet-a",
    layout="""
n01498041/*.jpg                              200 folders named by synset ids, 7,500 images
or test/{nshards.txt,0.tar,…}                CLIP_benchmark's shards
""",
    read=read_imagenet_a,
)
