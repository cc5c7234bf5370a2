"""Names and descriptions of classes: read from the user's file and joined to the data's labels."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pymcip.data.images import ImageData
from pymcip.data.labels import class_name, difference
from pymcip.data.sources import some
from pymcip.data.tables import read_lines
from pymcip.errors import DataError

_COLUMNS = ("label", "name", "description")


@dataclass(frozen=True)
class ClassNames:
    """A file of class names: of each row the label, the name and, if given, the description."""

    labels: tuple[str, ...]
    names: tuple[str, ...]
    descriptions: tuple[str, ...] | None = None


@dataclass(frozen=True)
class ClassTexts:
    """Class texts, each once, and which of them each class of the data has (int64 [C])."""

    texts: list[str]
    of_class: npt.NDArray[np.int64]


def read_class_names(path: str | os.PathLike[str]) -> ClassNames:
    r"""Read a TSV file of class names: `label<TAB>name[<TAB>description]`, a class per row.

    `label` is the label as the data have it: folder name, label column, or the number in a shard's
    cls member; both are compared in Unicode's form NFC. With a header (a first row that holds the words "label" and "name") columns are
    found by name and others are ignored; without one they are taken by position. There is no
    quoting. The order of the rows means nothing.

    Raises:
        DataError: the file is missing, not UTF-8, or has missing, empty or repeated entries.
    """
    try:
        lines = [line for block in read_lines(Path(path)) for line in block]
    except DataError as error:
        raise DataError(f"class_names: {error}") from error
    table = [
        (number, [cell.strip() for cell in line.split("\t")])
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    columns = list(_COLUMNS)
    if table and {"label", "name"} <= {cell.lower() for cell in table[0][1]}:
        columns = [cell.lower() for cell in table.pop(0)[1]]
    elif table:
        columns = columns[: len(table[0][1])]
    if not table:
        raise DataError(f"class_names: {path} has no rows; needed: label<TAB>name in each")
    problems: list[str] = []
    if "name" not in columns:
        problems.append(f"line {table[0][0]} has one column; needed: label<TAB>name")
        table = []
    wanted = [name for name in _COLUMNS if name in columns]
    rows = [(number, dict(zip(columns, cells, strict=False))) for number, cells in table]
    seen: dict[str, int] = {}
    for number, row in rows:
        row["label"] = class_name(row.get("label", ""))
        empty = [name for name in wanted if not row.get(name)]
        if empty:
            problems.append(f"line {number}: no {' and no '.join(empty)}")
        elif row["label"] in seen:
            problems.append(
                f"line {number}: label {row['label']!r} stands in line {seen[row['label']]} already"
            )
        seen.setdefault(row["label"], number)
    if problems:
        raise DataError(f"class_names: {path} can't be used: {some(problems)}")
    found = {name: tuple(row[name] for _, row in rows) for name in wanted}
    return ClassNames(found["label"], found["name"], found.get("description"))


def name_texts(data: ImageData, class_names: ClassNames) -> ClassTexts:
    """Return the names of the data's classes; raises DataError if one has none."""
    names = [class_names.names[row] for row in rows_of_classes(data, class_names)]
    return class_texts(names, names)


def rows_of_classes(data: ImageData, class_names: ClassNames) -> list[int]:
    """Find the row of `class_names` that each class of the data has.

    Raises:
        DataError: a class has none.
    """
    of_label = {label: row for row, label in enumerate(class_names.labels)}
    missing = [repr(label) for label in data.class_names if label not in of_label]
    if missing:
        known = ", ".join(repr(label) for label in class_names.labels[:5])
        sides = difference("the data", data.class_names, "class_names", class_names.labels)
        raise DataError(
            f"class_names has no row for {len(missing)} of the data's {data.num_classes} labels: "
            f"{some(missing)}; it has labels such as {known} ({sides}). Give each label of the data a "
            "row label<TAB>name"
        )
    return [of_label[label] for label in data.class_names]


def class_texts(of_class: Sequence[str], candidates: Sequence[str]) -> ClassTexts:
    """Number the candidates, each once, and find the text of each class among them."""
    texts = list(dict.fromkeys(candidates))
    number = {text: row for row, text in enumerate(texts)}
    return ClassTexts(texts, np.array([number[text] for text in of_class], dtype=np.int64))
