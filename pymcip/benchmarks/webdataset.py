"""CLIP_benchmark's layout: a public data set as tar shards, with class names and prompts beside them.

The layout is written by `clip_benchmark_export_wds`; the organisation clip-benchmark keeps the data
sets on the Hugging Face hub under the names that the folders then have: wds_imagenet1k (splits train
and test; test is ImageNet's val), wds_imagenet_sketch, wds_imagenet-a, wds_objectnet,
wds_fgvc_aircraft (train and test), wds_flickr30k, wds_mscoco_captions (train and test):

    wds_NAME/
      classnames.txt                          a name per line; line k is called by cls k-1
      zeroshot_classification_templates.txt   a prompt per line, {c} stands for the name
      dataset_type.txt                        "retrieval" if captioned; absent: classification
      test/nshards.txt                        the number of shards
      test/0.tar, test/1.tar, …               numbers without leading zeros
      train/…

A sample is s0000000.jpg (or .png, .webp) with s0000000.cls, the class counted from 0 in decimal, or
with s0000000.txt, a caption per line, in which a newline is spelt as backslash and n. The classes of
wds_imagenet-a are 0 to 199 in the order of its synsets, those of wds_objectnet 0 to 112 in the order
of ObjectNet's folder names. Its pictures are ObjectNet's own files: the red border is still there.

Source: https://github.com/LAION-AI/CLIP_benchmark (webdataset_builder.py, datasets/builder.py).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pymcip.benchmarks.contract import (
    AbsentError,
    Captioned,
    Labelled,
    SuiteOptions,
    check_counts,
)
from pymcip.benchmarks.readers import read_text
from pymcip.data import ImageData, load_images
from pymcip.data.sources import some
from pymcip.errors import DataError
from pymcip.metrics.inputs import Int64

CLASS_NAMES = "classnames.txt"
TEMPLATES = "zeroshot_classification_templates.txt"
KIND = "dataset_type.txt"
NUMBER_OF_SHARDS = "nshards.txt"
PLACEHOLDER = "{c}"

_LFS_POINTER = b"version https://git-lfs"


def is_layout(folder: Path) -> bool:
    """Return whether a folder has CLIP_benchmark's layout: a subfolder holds numbered shards."""
    with os.scandir(folder) as entries:
        return any(
            entry.is_dir()
            and any(Path(entry.path, name).is_file() for name in (NUMBER_OF_SHARDS, "0.tar"))
            for entry in entries
        )


def read_labelled(
    folder: Path,
    split: str,
    title: str,
    expected: Mapping[str, int],
    options: SuiteOptions,
    *,
    class_ids: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
    templates: Sequence[str] | None = None,
) -> Labelled:
    """Read a split of a labelled data set.

    Args:
        folder: holds the split's folder, the class names and the templates.
        split: "test", "train", …
        title: the data set's, for messages.
        expected: the public numbers of "images" and "classes", whichever are to be checked.
        options: `allow_partial` admits other numbers, and shards that are missing.
        class_ids: the label of each cls, for shards that count other classes than the labels do
            (ImageNet-A: 200 of 0 to 999); they become the candidates. None: the label is the cls.
        names: what prompts call each label; None: classnames.txt (not with `class_ids`).
        templates: prompts with `{}`; None: those of the folder.

    Returns:
        The images in the order of the shards. classnames.txt, where it is there, must have a line
        for each class also if `names` replaces its words.

    Raises:
        AbsentError: the split's folder is not there.
        DataError: shards or lists are missing, damaged or of another data set; a cls is missing,
            no number or out of range; the numbers are not the expected ones.
    """
    if names is None and class_ids is not None:
        raise ValueError("class_ids needs names: classnames.txt has a line per cls, not per label")
    _check_kind(folder, title, ("", "classification"))
    data, partial = _load(folder, split, title, options)
    lines = _class_names(folder, title, needed=names is None)
    if names is None:
        names = lines
    number = len(names) if class_ids is None else len(class_ids)
    if lines and len(lines) != number:
        raise DataError(
            f"{title}: {folder / CLASS_NAMES} has {len(lines)} lines; needed: {number}, one per class. "
            "It belongs to another data set, or was cut short: get it again"
        )
    labels = _classes(data, title, number)
    classes = len(np.unique(labels))
    notes = check_counts(title, {"images": len(data), "classes": classes}, expected, options)
    candidates = None
    if class_ids is not None:
        labels = np.asarray(class_ids, np.int64)[labels]
        if len(set(class_ids)) < len(names):
            candidates = tuple(sorted(set(class_ids)))
    return Labelled(
        images=data,
        labels=labels,
        names=tuple(names),
        templates=_templates(folder, title) if templates is None else tuple(templates),
        candidates=candidates,
        notes=partial + notes,
    )


def read_captioned(
    folder: Path, split: str, title: str, expected: Mapping[str, int], options: SuiteOptions
) -> Captioned:
    """Read a split of a captioned data set.

    The captions are the lines of each image's .txt, in order, as `pymcip.data` reads them: blank lines
    are none, and a backslash with an n becomes the newline again that the export replaced by it, but
    not at a caption's ends, where white space is dropped, as CLIP's tokenizers do.

    Args:
        folder: holds the split's folder.
        split: "test", "train", …
        title: the data set's, for messages.
        expected: the public numbers of "images" and "captions", whichever are to be checked.
        options: `allow_partial` admits other numbers, and shards that are missing.

    Raises:
        AbsentError: the split's folder is not there.
        DataError: shards are missing or damaged; the data set is labelled, not captioned; an image
            has no caption; the numbers are not the expected ones.
    """
    _check_kind(folder, title, ("retrieval",))
    data, partial = _load(folder, split, title, options)
    captions: list[str] = []
    owners: list[int] = []
    without = []
    for row in range(len(data)):
        lines = data.titles(row)
        captions += lines
        owners += [row] * len(lines)
        if not lines:
            without.append(data.key(row))
    if without:
        raise DataError(
            f"{title}: {len(without)} of {len(data)} images have no caption: {some(without)}; each "
            "needs a .txt beside it, with a caption per line"
        )
    notes = check_counts(title, {"images": len(data), "captions": len(captions)}, expected, options)
    return Captioned(data, tuple(captions), np.array(owners, np.int64), partial + notes)


def _load(
    folder: Path, split: str, title: str, options: SuiteOptions
) -> tuple[ImageData, tuple[str, ...]]:
    """Index a split's shards; notes if `allow_partial` lets some of them be missing."""
    place = folder / split
    if not place.is_dir():
        there = [path.parent.name for path in sorted(folder.glob(f"*/{NUMBER_OF_SHARDS}"))]
        raise AbsentError(
            f"there is no split {split!r} in {folder}"
            + (f", only {some(there)}" if there else "")
            + f"; needed: {place}/{{{NUMBER_OF_SHARDS},0.tar,…}}"
        )
    number = _number_of_shards(place / NUMBER_OF_SHARDS, title)
    present = sorted(path.name for path in place.glob("*.tar"))
    wanted = [f"{shard}.tar" for shard in range(number)]
    odd = [name for name in present if name not in set(wanted)]
    missing = [name for name in wanted if name not in set(present)]
    pointers = [name for name in present if _is_pointer(place / name)]
    problems = []
    if odd:
        problems.append(f"not among them: {some(odd)}")
    if pointers:
        problems.append(f"Git LFS pointers, no shards: {some(pointers)} (run git lfs pull)")
    if missing and not (options.allow_partial and len(missing) < number):
        problems.append(f"missing: {some(missing)}")
    if problems:
        raise DataError(
            f"{title}: {place / NUMBER_OF_SHARDS} says {number} shards, 0.tar to {number - 1}.tar; "
            f"{'; '.join(problems)}. Complete the download"
        )
    partial = check_counts(title, {"shards": number - len(missing)}, {"shards": number}, options)
    return load_images(place, labelled=False), partial


def _number_of_shards(path: Path, title: str) -> int:
    text = read_text(path, title).strip()
    if not re.fullmatch(r"[1-9][0-9]{0,5}", text):
        raise DataError(
            f"{title}: {path} says {text[:40]!r}; needed: the number of shards, 1 to 999999"
        )
    return int(text)


def _is_pointer(path: Path) -> bool:
    with path.open("rb") as handle:
        return handle.read(len(_LFS_POINTER)) == _LFS_POINTER


def _check_kind(folder: Path, title: str, allowed: tuple[str, ...]) -> None:
    path = folder / KIND
    kind = read_text(path, title).strip().lower() if path.is_file() else ""
    if kind not in allowed:
        raise DataError(
            f"{title}: {path} says {kind!r}"[:300]
            + f"; needed: {' or '.join(repr(text) for text in allowed)}. The folder holds another "
            "data set, or the file is missing"
        )


def _class_names(folder: Path, title: str, *, needed: bool) -> list[str]:
    path = folder / CLASS_NAMES
    text = read_text(path, title) if needed or path.is_file() else ""
    lines = [line.strip() for line in text.rstrip().split("\n")]
    if lines == [""] and not needed:
        return []
    blank = [row + 1 for row, line in enumerate(lines) if not line]
    if blank:
        raise DataError(
            f"{title}: {path}: line {some(blank)} is blank; needed: a name for each class"
        )
    return lines


def _templates(folder: Path, title: str) -> tuple[str, ...]:
    path = folder / TEMPLATES
    lines = [line.strip() for line in read_text(path, title).split("\n") if line.strip()]
    wrong = [line for line in lines if PLACEHOLDER not in line]
    if wrong or not lines:
        raise DataError(
            f"{title}: {path}: {some(map(repr, wrong)) if wrong else 'no lines'}; needed: prompts "
            f"with {PLACEHOLDER} for the class name, one per line"
        )
    return tuple(line.replace(PLACEHOLDER, "{}") for line in lines)


def _classes(data: ImageData, title: str, number: int) -> Int64:
    """Read each image's cls as a number: int64 [N], 0 <= cls < number."""
    bare = np.flatnonzero(data.labels < 0)
    if len(bare):
        raise DataError(
            f"{title}: {len(bare)} of {len(data)} images have no class: "
            f"{some((data.key(int(row)) for row in bare[:6]), len(bare))}; each needs a .cls beside it"
        )
    wrong = [
        text
        for text in data.class_names
        if not (text.isascii() and text.isdecimal() and int(text) < number)
    ]
    if wrong:
        raise DataError(
            f"{title}: cls {some(map(repr, wrong))}; needed: 0 to {number - 1}. The shards are of "
            "another data set"
        )
    return np.array([int(text) for text in data.class_names], np.int64)[data.labels]
