"""ImageNet-1k (val and train), ImageNet-Sketch and ImageNet-A.

Labels are ImageNet's: its 1,000 synset ids in sorted order (the order of open_clip's names, and of
cls in CLIP_benchmark's shards), for -Sketch and -A too. Each data set is also read in
CLIP_benchmark's layout (see `pymcip.benchmarks.webdataset`), with the same labels.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from pymcip.benchmarks import webdataset
from pymcip.benchmarks.contract import (
    AbsentError,
    DataSet,
    Labelled,
    SuiteOptions,
    check_counts,
)
from pymcip.benchmarks.folders import count_labels, list_classes, list_entries
from pymcip.benchmarks.imagenet_names import imagenet_names, imagenet_templates, synsets
from pymcip.benchmarks.imagenet_val import TITLE, list_flat_val
from pymcip.data import list_images

COUNTS = {
    "imagenet1k-val": {"images": 50_000, "classes": 1_000},
    "imagenet1k-train": {"images": 1_281_167, "classes": 1_000},
    "imagenet-sketch": {"images": 50_889, "classes": 1_000},
    "imagenet-a": {"images": 7_500, "classes": 200},
}
VAL_PER_CLASS = 50
_SYNSET = re.compile(r"n\d{8}")
_CLS_LOC = "Data/CLS-LOC"


def _read(
    data: DataSet,
    folder: Path,
    options: SuiteOptions,
    *,
    places: Sequence[str],
    split: str = "test",
    stem: str = "",
    synset_list: str | None = None,
) -> Labelled:
    """Read a data set of ImageNet's classes from shards, or from a folder per synset.

    ImageNet-1k's validation images may also lie in one folder; then their classes are taken from the
    synsets in their names (Hugging Face), from LOC_val_solution.csv (Kaggle), or from the
    development kit, whose ILSVRC2012_ID (1 to 1,000, not in the order of the synsets) meta.mat maps
    to synsets.

    Labels are ImageNet's, 0 to 999, so that ImageNet's training images can vote for all of them.

    Args:
        data: the data set.
        folder: where it lies.
        options: of the suite.
        places: folders below `folder` that may hold the images.
        split: that of CLIP_benchmark's shards.
        stem: what images' names begin with, `{}` for the synset.
        synset_list: timm's list of the synsets, if they are not ImageNet's 1,000; they are the
            candidates of zero-shot, whichever of them have images.

    Raises:
        AbsentError: there are no images.
        DataError: there are other images among them, or some are missing or without a class.
        MissingDependencyError: the development kit is needed, and SciPy is missing.
    """
    expected = COUNTS[data.name]
    known, candidates = synsets(), None
    if synset_list is not None:
        label_of = {synset: label for label, synset in enumerate(known)}
        known = synsets(synset_list)
        candidates = tuple(label_of[synset] for synset in known)
    if webdataset.is_layout(folder):
        found = webdataset.read_labelled(
            folder,
            split,
            data.title,
            expected,
            options,
            class_ids=candidates,
            names=imagenet_names(),
            templates=imagenet_templates(),
        )
    else:
        place = _find_split(folder, places, stem.replace("{}_", "n"))
        folders, files = list_entries(place)
        if files and not folders and data is IMAGENET_VAL:
            names, labels = list_flat_val(folder, place, files, options)
        else:
            names, labels = list_classes(place, data.title, known, stem)
        notes = check_counts(data.title, count_labels(labels), expected, options)
        if candidates is not None:
            labels = np.array(candidates, np.int64)[labels]
        found = Labelled(
            list_images(place, names), labels, imagenet_names(), imagenet_templates(), candidates,
            notes,
        )  # fmt: skip
    if data is IMAGENET_VAL and not found.notes:  # complete, but some may lie in another's folder
        even = int(np.sum(np.bincount(found.labels) == VAL_PER_CLASS))
        what = f"classes of {VAL_PER_CLASS} images"
        check_counts(data.title, {what: even}, {what: 1_000}, options)
    return found


def _find_split(folder: Path, places: Sequence[str], stem: str) -> Path:
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
    raise AbsentError(f"{folder} holds none of its images")


IMAGENET_VAL = DataSet(
    name="imagenet1k-val",
    title=TITLE,
    folders=(
        "imagenet1k",
        "imagenet-1k",
        "imagenet",
        "ImageNet",
        "ILSVRC2012",
        "imagenet-object-localization-challenge",
        "wds_imagenet1k",
    ),
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
    reader=partial(
        _read,
        places=("val", f"ILSVRC/{_CLS_LOC}/val", f"{_CLS_LOC}/val", "ILSVRC2012_img_val", "."),
        stem="ILSVRC2012_val_",
    ),
)


IMAGENET_TRAIN = replace(
    IMAGENET_VAL,
    name="imagenet1k-train",
    title="ImageNet-1k train",
    layout="""
train/n01440764/n01440764_10026.JPEG         1,000 folders named by synset ids, 1,281,167 images
                                             (or in ILSVRC/Data/CLS-LOC/train/)
or train/{nshards.txt,0.tar,…}               CLIP_benchmark's shards
""",
    reader=partial(
        _read,
        places=(
            "train",
            f"ILSVRC/{_CLS_LOC}/train",
            f"{_CLS_LOC}/train",
            "ILSVRC2012_img_train",
            ".",
        ),
        split="train",
        stem="{}_",
    ),
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
    reader=partial(_read, places=("sketch", "ImageNet-Sketch", ".")),
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
    reader=partial(
        _read,
        places=("imagenet-a", "."),
        synset_list="imagenet_a_synsets.txt",
    ),
)
