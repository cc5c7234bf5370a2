"""Ground truth of query sets: lists of images, relevant rows and boxes, checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pymcip.benchmarks.contract import Int64
from pymcip.data import ImageData, list_images
from pymcip.data.sources import some
from pymcip.errors import DataError

Floats = npt.NDArray[np.float64]


def check_lists(database: Sequence[str], queries: Sequence[str], described: int) -> list[str]:
    """Say what is wrong with the lists of images of a query set."""
    problems = []
    if described != len(queries):
        problems.append(f"gnd has {described} entries, qimlist has {len(queries)}")
    twice = [name for name, count in Counter(database).items() if count > 1]
    if twice:
        problems.append(f"imlist has images twice: {some(twice)}")
    both = sorted(set(database) & set(queries))
    if both:
        problems.append(f"queries are in the database too: {some(both)}")
    outside = [name for name in (*database, *queries) if ".." in name.split("/")]
    if outside:
        problems.append(f"names lead out of the folder: {some(outside)}")
    return problems


def raise_problems(path: Path, problems: Sequence[str]) -> None:
    if problems:
        raise DataError(f"{path} can't be used: {some(problems)}. Get it from its authors again")


def open_query_set(
    base: Path, database: Sequence[str], queries: Sequence[str]
) -> tuple[ImageData, ImageData]:
    """Index database and queries, and report what is missing of both at once."""
    both = list_images(base, [*database, *queries])
    return both.select(range(len(database))), both.select(range(len(database), len(both)))


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


def as_boxes(path: Path, values: Iterable[Any]) -> Floats:
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
