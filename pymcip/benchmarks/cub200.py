"""CUB-200-2011: the classes by which metric learning tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pymcip.benchmarks.contract import AbsentError, DataSet, Labelled, SuiteOptions, check_counts
from pymcip.benchmarks.folders import any_exists, first_folder
from pymcip.benchmarks.readers import read_numbered
from pymcip.data import list_images
from pymcip.data.sources import some
from pymcip.errors import DataError

CUB_COUNTS = {"images": 5_924, "classes": 100}
CUB_TEST = range(100, 200)  # classes, 0-based: the second half, by which retrieval tests


def _read(data: DataSet, folder: Path, options: SuiteOptions) -> Labelled:
    """Read the images of CUB-200-2011's classes 100 to 199 (counted from 0), as images.txt has them.

    That is the split of metric learning: by class, not by train_test_split.txt, whose two parts have
    all classes.

    Raises:
        AbsentError: none of the lists is there.
        DataError: a list is missing or malformed, the lists disagree, images are missing, or the
            counts are others.

    Source: Wah et al. (2011); Song et al., Lifted structured embedding (CVPR 2016), for the split.
    """
    lists = ("images.txt", "image_class_labels.txt", "classes.txt")
    base = first_folder(
        folder,
        ("", "CUB_200_2011", "CUB_200_2011/CUB_200_2011"),
        lambda path: any_exists(path, lists),
    )
    absent = [name for name in lists if not (base / name).is_file()]
    if len(absent) == len(lists):
        raise AbsentError(f"{folder} has none of {', '.join(lists)}")
    if absent:
        raise DataError(f"{base} has no {' and no '.join(absent)}; unpack CUB_200_2011.tgz again")
    paths, classes, names = (read_numbered(base / name, data.title) for name in lists)
    problems = []
    unlike = paths.keys() ^ classes.keys()
    if unlike:
        problems.append(
            f"images.txt and image_class_labels.txt don't list the same images: {some(sorted(unlike))}"
        )
    strange = sorted(
        number
        for number, label in classes.items()
        if not label.isdecimal() or int(label) not in names
    )
    if strange:
        problems.append(
            f"image_class_labels.txt has classes that classes.txt lacks: {some(strange)}"
        )
    if not problems:
        problems += [
            f"image {number} is {path}, but its class is {classes[number]} {names[int(classes[number])]}"
            for number, path in paths.items()
            if path.partition("/")[0] != names[int(classes[number])]
        ]
    if problems:
        raise DataError(f"{base}: {some(problems)}; unpack CUB_200_2011.tgz again")
    chosen = [number for number in paths if int(classes[number]) - 1 in CUB_TEST]
    labels = np.array([int(classes[number]) - 1 for number in chosen], np.int64)
    found = {"images": len(chosen), "classes": len(np.unique(labels))}
    notes = check_counts("CUB-200-2011, classes 100 to 199", found, CUB_COUNTS, options)
    return Labelled(list_images(base / "images", [paths[i] for i in chosen]), labels, notes=notes)


CUB200 = DataSet(
    name="cub200",
    title="CUB-200-2011",
    folders=("CUB_200_2011", "cub200", "CUB200", "cub_200_2011", "cub"),
    source="https://www.vision.caltech.edu/datasets/cub_200_2011/ (CUB_200_2011.tgz)",
    layout="""
images.txt                  1 001.Black_footed_Albatross/Black_Footed_Albatross_0046_18.jpg
image_class_labels.txt      1 1
classes.txt                 1 001.Black_footed_Albatross
images/001.Black_footed_Albatross/*.jpg
""",
    reader=_read,
)
