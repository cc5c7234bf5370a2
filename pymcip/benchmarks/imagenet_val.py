"""Classes of ImageNet's validation images that lie in one folder, read from the lists beside them."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pymcip.benchmarks.contract import SuiteOptions
from pymcip.benchmarks.imagenet_names import synsets
from pymcip.benchmarks.readers import load_mat, read_keyed, read_lines
from pymcip.data.sources import some
from pymcip.errors import DataError
from pymcip.metrics.inputs import Int64

TITLE = "ImageNet-1k val"
SOLUTION = "LOC_val_solution.csv"  # of Kaggle's ILSVRC
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"  # of the development kit, as is meta.mat
DEVELOPMENT_KITS = ("ILSVRC2012_devkit_t12/data", "data", ".")
_VAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})(?:_(n\d{8}))?")


def list_flat_val(
    folder: Path, place: Path, files: list[str], options: SuiteOptions
) -> tuple[list[str], Int64]:
    """List validation images that lie in one folder: names and labels int64 [N]."""
    numbers: dict[int, str] = {}
    own: dict[int, str] = {}
    odd, twice = [], []
    for name in files:
        match = _VAL_NAME.fullmatch(os.path.splitext(name)[0])  # noqa: PTH122
        number = int(match[1]) if match else 0
        if match is None:
            odd.append(name)
        elif number in numbers:
            twice.append(name)
        else:
            numbers[number] = name
            if match[2]:
                own[number] = match[2]
    problems = []
    if odd:
        problems.append(f"images not named ILSVRC2012_val_NNNNNNNN.JPEG: {some(odd)}")
    if twice:
        problems.append(f"images that are there twice: {some(twice)}")
    if problems:
        raise DataError(
            f"{TITLE}: {place} has {'; '.join(problems)}. Needed: the validation images, "
            "each once, or a folder per synset"
        )
    source, truth = "their names", own
    if len(own) < len(numbers):
        source, truth = _find_truth(folder, place)
    missing = sorted(set(truth) - set(numbers))
    unlabelled = sorted(set(numbers) - set(truth))
    label_of = {synset: label for label, synset in enumerate(synsets())}
    unknown = sorted({synset for synset in truth.values() if synset not in label_of})
    if unlabelled:
        problems.append(f"{source} has no class of {_val_names(unlabelled)}")
    if unknown:
        problems.append(f"{source} names classes that are not ImageNet-1k's: {some(unknown)}")
    if missing and not options.allow_partial:
        problems.append(f"{source} lists images that are missing: {_val_names(missing)}")
    if problems:
        raise DataError(
            f"{TITLE}: {place}: {'; '.join(problems)}. Needed: the 50,000 validation "
            "images and their classes"
        )
    order = sorted(numbers)
    labels = np.array([label_of[truth[number]] for number in order], np.int64)
    return [numbers[number] for number in order], labels


def _val_names(numbers: Sequence[int]) -> str:
    return some((f"ILSVRC2012_val_{number:08d}" for number in numbers[:6]), len(numbers))


def _find_truth(folder: Path, place: Path) -> tuple[str, dict[int, str]]:
    """Find the validation images' synsets by number: in the images' folder or in those above it."""
    above = [place]
    while above[-1] != folder and above[-1] != above[-1].parent:
        above.append(above[-1].parent)
    for each in [*above, folder.parent]:
        if (each / SOLUTION).is_file():
            return SOLUTION, _read_solution(each / SOLUTION)
        for kit in DEVELOPMENT_KITS:
            if (each / kit / GROUND_TRUTH).is_file():
                return GROUND_TRUTH, _read_development_kit(each / kit)
    raise DataError(
        f"{TITLE}: the images of {place} lie in one folder, and nothing tells their "
        f"classes. Sort them into a folder per synset, or put Kaggle's {SOLUTION} into {folder}, or "
        f"unpack ILSVRC2012_devkit_t12.tar.gz there ({DEVELOPMENT_KITS[0]}/{GROUND_TRUTH}, meta.mat)"
    )


def _read_solution(path: Path) -> dict[int, str]:
    """Read Kaggle's solution: an image's id, then a synset and four edges for each of its boxes.

    Copies without the boxes have the synset alone.
    """

    def parse(line: str) -> tuple[int, str] | None:
        row = next(csv.reader([line]))
        match = _VAL_NAME.fullmatch(row[0])
        words = row[1].split() if len(row) == 2 else []
        classes = set(words[::5])
        if match is None or (len(words) % 5 and len(words) > 1) or len(classes) != 1:
            return None
        return int(match[1]), classes.pop()

    needed = (
        "ILSVRC2012_val_NNNNNNNN,SYNSET LEFT TOP RIGHT BOTTOM, the last five once per box and all of "
        "one synset, or the synset alone; each image once"
    )
    return read_keyed(path, TITLE, parse, needed, header="ImageId,PredictionString")


def _read_development_kit(folder: Path) -> dict[int, str]:
    """Read the development kit: line i is the ILSVRC2012_ID of image i, and meta.mat maps it."""
    path = folder / GROUND_TRUTH
    synset_of = _read_meta(folder / "meta.mat")
    ids = [line.strip() for line in read_lines(path, TITLE)]
    while ids and not ids[-1]:
        ids.pop()
    wrong = [
        f"line {number}: {text[:40]!r}"
        for number, text in enumerate(ids, start=1)
        if not (text.isascii() and text.isdecimal() and int(text) in synset_of)
    ]
    if wrong or not ids:
        raise DataError(
            f"{TITLE}: {path}: {some(wrong) or 'no lines'}; needed: in each line the "
            f"ILSVRC2012_ID of a class of {folder / 'meta.mat'}, counted from 1"
        )
    return {number: synset_of[int(text)] for number, text in enumerate(ids, start=1)}


def _read_meta(path: Path) -> dict[int, str]:
    """Read the synsets of the classes (those without children) by their ILSVRC2012_ID."""
    if not path.is_file():
        raise DataError(
            f"{TITLE}: {path} is missing; it is part of ILSVRC2012_devkit_t12.tar.gz and "
            f"maps the numbers of {GROUND_TRUTH} to synsets"
        )
    advice = "it is part of ILSVRC2012_devkit_t12.tar.gz; unpack that again"
    table = np.atleast_1d(load_mat(path, TITLE, ("synsets",), advice, squeeze=True)["synsets"])
    try:
        rows = zip(table["ILSVRC2012_ID"], table["WNID"], table["num_children"], strict=True)
        return {int(number): str(synset) for number, synset, children in rows if int(children) == 0}
    except (IndexError, TypeError, ValueError) as error:  # other fields, or of another kind
        raise DataError(f"{TITLE}: {path} can't be read ({error}); {advice}") from error
