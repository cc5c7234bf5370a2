"""Ground truth of query sets: lists of images, relevant rows and boxes, checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pymcip.benchmarks.contract import DataSet, QuerySet, SuiteOptions, check_counts
from pymcip.data import list_images
from pymcip.data.sources import some
from pymcip.errors import DataError
from pymcip.metrics.inputs import Int64


def make_query_set(
    data: DataSet,
    path: Path,
    base: Path,
    database: Sequence[str],
    queries: Sequence[str],
    truth: Sequence[dict[str, Int64]],
    problems: Sequence[str],
    boxes: Iterable[Any] | None,
    expected: Mapping[str, int],
    options: SuiteOptions,
    places: Mapping[str, str] | None = None,
) -> QuerySet:
    """Check the ground truth as a whole and index its images.

    Args:
        data: the data set.
        path: the file of the ground truth, for messages.
        base: the folder of the images.
        database, queries: names of images, as the ground truth has them.
        truth: each query's rows of the database.
        problems: what is wrong with these rows.
        boxes: x1, y1, x2, y2 of each query, to which it is cropped; None: it is not.
        expected: the public numbers of queries and database images.
        options: of the suite.
        places: the files of the names, below `base`; None: the names are files.

    Raises:
        DataError: lists or rows can't be right, images are missing, or the numbers are others.
    """
    wrong = []
    if len(truth) != len(queries):
        wrong.append(f"gnd has {len(truth)} entries, qimlist has {len(queries)}")
    twice = [name for name, count in Counter(database).items() if count > 1]
    if twice:
        wrong.append(f"imlist has images twice: {some(twice)}")
    both = sorted(set(database) & set(queries))
    if both:
        wrong.append(f"queries are in the database too: {some(both)}")
    names = [*database, *queries]
    outside = [name for name in names if ".." in name.split("/")]
    if outside:
        wrong.append(f"names lead out of the folder: {some(outside)}")
    wrong += problems
    if wrong:
        raise DataError(f"{path} can't be used: {some(wrong)}. Get it from its authors again")
    absent = [] if places is None else [name for name in names if name not in places]
    if absent:
        raise DataError(
            f"{len(absent)} of the {len(names)} images that {path.name} lists are not below {base}: "
            f"{some(f'{name}.jpg' for name in absent)}; unpack the archives of {data.source} there"
        )
    images = list_images(base, names if places is None else [places[name] for name in names])
    asked = images.select(range(len(database), len(names)))
    if boxes is not None:
        asked = asked.cropped(_boxes(path, boxes))
    found = {"queries": len(queries), "database images": len(database)}
    notes = check_counts(data.title, found, expected, options)
    return QuerySet(images.select(range(len(database))), asked, tuple(truth), notes=notes)


def as_rows(values: Any, count: int, first: int, what: str, problems: list[str]) -> Int64:
    """Make 0-based rows, int64 [n], of indices below `count` that are counted from `first`."""
    try:
        given = np.asarray(values).reshape(-1)
        numeric = given.dtype.kind in "iuf" and bool(np.isfinite(given).all())
        rows = given.astype(np.int64) if numeric else None
    except (TypeError, ValueError):
        rows = None
    if rows is None or not np.array_equal(rows, given):
        problems.append(f"{what}: no list of whole numbers")
        return np.empty(0, np.int64)
    wrong = rows[(rows < first) | (rows >= count + first)]
    if len(wrong):
        problems.append(f"{what}: {some(wrong.tolist())} is not {first} to {count + first - 1}")
    if len(np.unique(rows)) < len(rows):
        problems.append(f"{what}: an image is there twice")
    return rows - first


def _boxes(path: Path, values: Iterable[Any]) -> npt.NDArray[np.float64]:
    """Make float64 [Q, 4]: left, top, right, bottom."""
    boxes, problems = [], []
    for number, value in enumerate(values):
        try:
            box = np.asarray(value, np.float64).reshape(-1)
        except (TypeError, ValueError):
            box = np.empty(0)
        if box.shape != (4,) or not (box[0] < box[2] > 0 and box[1] < box[3] > 0):
            problems.append(f"query {number}: {box.tolist()}")
        boxes.append(box)
    if problems:
        raise DataError(
            f"{path}: bbx must be x1, y1, x2, y2 with x1 < x2 and y1 < y2 (not x, y, width, height), "
            f"got {some(problems)}. Get the file again, or measure without cropping"
        )
    return np.stack(boxes)


def as_texts(path: Path, key: str, value: Any) -> list[str]:
    """Make a list of a list, an array of strings, or a cell array as scipy reads it."""
    parts = np.asarray(value).reshape(-1) if isinstance(value, np.ndarray) else value
    texts = []
    for part in parts if isinstance(parts, (list, tuple, np.ndarray)) else [None]:
        if isinstance(part, np.ndarray) and part.size == 1:  # a cell
            part = part.reshape(-1)[0]
        if isinstance(part, bytes):  # of an array that Python 2 wrote
            part = part.decode("latin1")
        if not isinstance(part, str) or not part.strip():
            raise DataError(f"{path}: {key} holds {part!r:.60}; needed: names of images")
        texts.append(str(part).strip().lstrip("/"))
    if not texts:
        raise DataError(f"{path}: {key} is empty; needed: names of images")
    return texts
