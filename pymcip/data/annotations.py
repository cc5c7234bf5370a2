"""Files that describe images or hold captions: one reader that recognises their layout.

`docs/data.md` lists the formats. The log says what a file was read as. A layout that can't be recognised
for sure is refused, with the first suspicious line.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute

from pymcip.data.column_names import (
    FILE_COLUMNS,
    LABEL_COLUMNS,
    caption_columns,
    columns_of,
    first_of,
    key_of,
    keys_of,
)  # fmt: skip
from pymcip.data.columns import TEXTS, grouped, parquet_columns, read_parquet, text_lists, texts
from pymcip.data.compact import Labels, Names
from pymcip.data.json_annotations import read_json
from pymcip.data.labels import label_of
from pymcip.data.parquet_images import class_names_of, image_column
from pymcip.data.sources import some, suffix
from pymcip.data.tables import (
    Annotations,
    Table,
    first_lines,
    read_delimited,
    read_lines,
    split_line,
)
from pymcip.data.tally import LeftOut
from pymcip.errors import DataError

TABLES = (".txt", ".csv", ".tsv", ".parquet", ".json", ".jsonl")
_SAMPLE = 200  # lines that a text is recognised by
_DELIMITERS = ("\t", ",", ";", "|")
_OWN = {".csv": ",", ".tsv": "\t"}
_ENDINGS = "jpe?g|jfif|png|webp|bmp|gif|tiff?|avif|heic"
_IMAGE_CELL = re.compile(rf"[^\t,;|]*\.(?:{_ENDINGS})(?:#\d+)?", re.IGNORECASE)
_STARTS_WITH_IMAGE = re.compile(rf"\S+\.(?:{_ENDINGS})(?:#\d+)?[\t,;| ]\s*\S", re.IGNORECASE)
_URL_CELL = re.compile(r"(?:https?|ftp|s3|data):\S+", re.IGNORECASE)
_NUMBER_CELL = re.compile(r"\d+")
_LOST_BAR = re.compile(
    r"(\d+)\s+(.*\S)"
)  # Flickr30k's results.csv has one row without its second bar

_log = logging.getLogger("pymcip.data")


@dataclass
class _Layout:
    """How a text file is to be read: as a table, or None as lines."""

    kind: str
    delimiter: str | None = None
    header: list[str] = field(default_factory=list)  # default: the first line
    rest: bool = False


_CELLS = {"url": _URL_CELL, "image": _IMAGE_CELL, "number": _NUMBER_CELL}
_FEW = 3  # rows, too few to tell whether all have the same number of cells


def read_annotations(path: Path, *, images: bool = False) -> Annotations:
    """Read a file of captions or of images with labels and captions, whatever its layout.

    Args:
        path: a text, CSV, TSV, parquet or JSON file; texts may be compressed.
        images: columns of images and labels are read too, and every caption; else only the first kind
            of captions (caption before title before text).

    Raises:
        DataError: the file can't be read, or its layout can't be recognised for sure.
    """
    kind = suffix(path)
    if kind in (".json", ".jsonl"):
        result = read_json(path)
    elif kind == ".parquet":
        result = _parquet(path, images)
    else:
        layout = _recognise(path, kind)
        result = _text(path, layout, images)
    _log.info("%s: read as %s", path, result.kind)
    return result


def _parquet(path: Path, images: bool) -> Annotations:
    content: str | None = None
    if images:
        content = image_column(path, columns_of(parquet_columns(path), FILE_COLUMNS))

    def choose(names: Sequence[str]) -> list[str]:
        return _wanted(path, [name for name in names if name != content], images)

    table = read_parquet(path, choose)
    result = _from_table(table, images)
    if content is not None:
        result.content, result.files = content, None
        result.kind += f", images themselves from {content}"
        label = first_of(result.names, LABEL_COLUMNS)
        named = class_names_of(path, label) if label is not None else []
        if named:
            result.labels = Labels(_name_of(number, named) for number in result.labels)
    return result


def _name_of(number: str | None, names: Sequence[str]) -> str | None:
    """The name of a class by its number; -1 stands for none."""
    if number is None or number == "-1":
        return None
    return names[int(number)] if number.isdecimal() and int(number) < len(names) else number


def has_captions(path: Path) -> bool:
    """Return whether a parquet file has a column of captions; raises DataError if it is none."""
    return bool(caption_columns(parquet_columns(path), every=False))


# Which columns


def _wanted(path: Path, names: Sequence[str], images: bool) -> list[str]:
    captions = caption_columns(names, every=images)
    if not images and not captions:
        raise DataError(
            f"{path} has no column caption, title or text; it starts with {some(names)}. Give the "
            "caption column one of these names, or say which it is: columns={'caption': NAME}"
        )
    others = [first_of(names, FILE_COLUMNS), first_of(names, LABEL_COLUMNS)] if images else []
    wanted = list(dict.fromkeys(name for name in (*others, *captions) if name is not None))
    keys = keys_of(names)
    for name in wanted:
        same = keys.count(keys[names.index(name)])
        if same > 1:
            raise DataError(f"{path} has {same} columns {name}; give each a name of its own")
    return wanted


def _from_table(table: Table, images: bool) -> Annotations:
    names = table.names
    columns = [name for name in caption_columns(names, every=images) if name in table.columns]
    lists = [text_lists(table, name) for name in columns]
    file = first_of(list(table.columns), FILE_COLUMNS) if images else None
    label = first_of(names, LABEL_COLUMNS) if images else None
    described = [f"captions from {', '.join(columns)}"] if columns else []
    described += [f"images from {file}"] if file else []
    described += [f"labels from {label}"] if label else []
    rows = len(table)
    return Annotations(
        path=table.path,
        kind=f"{table.kind}: {', '.join(described) or 'no column that is known'}",
        captions=_joined(lists, rows),
        files=None if file is None else Names(texts(table, file)),
        labels=Labels([None] * rows if label is None else map(label_of, texts(table, label))),
        where=replace(table, columns={}).where,
        left_out=[
            LeftOut(f"{table.path}, line {line}", "a header between the rows")
            for line in table.repeated
        ],
        names=names,
    )


def _joined(lists: Sequence[pa.ChunkedArray], rows: int) -> pa.ChunkedArray:
    """Join several columns of lists into one: a row's captions are those of all columns."""
    if not lists:
        return pa.chunked_array([pa.array([[]] * rows, TEXTS)])
    if len(lists) == 1:
        return lists[0]
    columns = zip(*(column.to_pylist() for column in lists), strict=True)
    return pa.chunked_array([pa.array([list(chain(*cells)) for cells in columns], TEXTS)])


# What a text is


def _text(path: Path, layout: _Layout, images: bool) -> Annotations:
    if layout.delimiter is None:
        return _lines(path, layout.kind)

    def choose(names: Sequence[str]) -> list[str]:
        return _wanted(path, names, images)

    try:
        table = read_delimited(
            path,
            layout.delimiter,
            choose,
            layout.header,
            how=("rest" if layout.rest else "lines") if layout.header else "any",
            cells={name: _CELLS[name] for name in layout.header if name in _CELLS},
        )
    except DataError as error:
        names = layout.header or split_line(first_lines(path, 1)[0], layout.delimiter)
        if not ("Expected" in str(error) and _files_and_captions(names)):
            raise
        # CLIP_benchmark's lists and Flickr30k's results.csv: the caption is all that follows the image.
        table = _repaired(path, layout.delimiter, names, with_header=not layout.header)
    result = _from_table(table, images)
    result.kind = f"{layout.kind} ({result.kind})" if layout.kind else result.kind
    if images and result.files is not None:
        result.files = Names(re.sub(r"#\d+$", "", name) for name in result.files)
    return result


def _files_and_captions(names: Sequence[str]) -> bool:
    """Return whether the first column is the image, the last the caption, a number between them."""
    first, last = first_of(names[:1], FILE_COLUMNS), caption_columns(names[-1:], every=False)
    return first is not None and bool(last) and len(names) in (2, 3)


def _repaired(path: Path, delimiter: str, names: list[str], *, with_header: bool) -> Table:
    """Read a table of images and captions whose captions hold the delimiter."""
    header = [names[0], names[-1]]
    if with_header:  # as the first line reads where it is split once, like the others
        header = [cell.strip() for cell in first_lines(path, 1)[0].split(delimiter, 1)]
    table = read_delimited(
        path, delimiter, list, header, how="rest", cells={header[0]: _IMAGE_CELL}
    )
    files, captions = table.columns.values()
    if len(names) == 3:
        texts = captions.to_pylist()
        for row, text in enumerate(texts):
            number, bar, caption = text.partition(delimiter)
            lost = _LOST_BAR.fullmatch(text)
            if bar and _NUMBER_CELL.fullmatch(number.strip()):
                texts[row] = caption.strip()
            elif lost:
                texts[row] = lost[2]
            else:
                raise DataError(f"{path}, {table.where(row)}: no number between image and caption")
        captions = pa.chunked_array([pa.array(texts, pa.large_string())])
    table.names = [names[0], names[-1]]
    table.columns = dict(zip(table.names, (files, captions), strict=True))
    return table


def _recognise(path: Path, kind: str) -> _Layout:
    """Say how to read a text file, from its name and its first lines."""
    head = first_lines(path, _SAMPLE)
    if not head:
        return _Layout("an empty text")
    if all(line.lstrip().startswith("{") and line.rstrip().endswith("}") for line in head):
        raise DataError(f"{path} holds JSON in each line; name it .jsonl")
    with_header = _with_header(head, kind)
    if with_header is not None:
        return with_header
    if kind == ".csv":
        raise DataError(
            f"{path} has no column caption, title or text; it starts with "
            f"{some(split_line(head[0], ','))}. Give the caption column one of these names, or "
            "say which it is: columns={'caption': NAME}"
        )
    bare = _without_header(path, head, kind)
    if bare is not None:
        return bare
    if kind == ".tsv" and any("\t" in line for line in head):
        width = head[0].count("\t") + 1
        for number, line in enumerate(head, start=1):
            if line.count("\t") + 1 != width:
                raise DataError(
                    f"{path}, line {number}: {line.count(chr(9)) + 1} cells; expected {width} as in the "
                    "first line"
                )
        raise DataError(
            f"{path}, line 1: {head[0]!r:.80}: {width} cells; expected url<TAB>caption, "
            "caption<TAB>url, image<TAB>caption, or a header that names a column caption, title or text"
        )
    _refuse_suspicious(path, head)
    return _Layout("text, a caption per line")


def _with_header(head: Sequence[str], kind: str) -> _Layout | None:
    """Recognise a header: the delimiter that gives the most names that are known."""
    best: tuple[int, str] = (0, "")
    order = [_OWN[kind]] if kind in _OWN else []
    for delimiter in dict.fromkeys([*order, *_DELIMITERS]):
        names = split_line(head[0], delimiter)
        known = [first_of(names, FILE_COLUMNS), first_of(names, LABEL_COLUMNS)]
        score = sum(name is not None for name in known) + len(caption_columns(names, every=True))
        if kind == ".txt" and (known[0] is None or score < 2 or len(names) < 2):
            continue
        if score > best[0]:
            best = score, delimiter
    if best[0] == 0:
        alone = kind == ".txt" and key_of(head[0]) in ("caption", "captions")
        return _Layout("", "\t") if alone else None
    return _Layout("", best[1])


def _without_header(path: Path, head: Sequence[str], kind: str) -> _Layout | None:
    """Recognise columns by their cells: addresses, image files, numbers, and one of captions."""
    for delimiter in ("\t",) if kind == ".tsv" else _DELIMITERS:
        rows = [[cell.strip() for cell in line.split(delimiter)] for line in head]
        widths = {len(row) for row in rows}
        files = all(_IMAGE_CELL.fullmatch(row[0]) for row in rows)
        if min(widths) < 2 or not (files or delimiter == "\t"):
            continue
        kinds = [_kind_of_cells([row[i] for row in rows]) for i in range(min(widths))]
        if files and kinds[1] == "number" and min(widths) > 2:
            kinds = ["image", "number", "caption"]
        elif files and (len(widths) > 1 or len(rows) < _FEW):
            kinds = ["image", "caption"]  # whose captions hold delimiters
        elif len(widths) > 1:
            continue
        if kinds.count("caption") != 1 or len(set(kinds)) < len(kinds):
            continue
        described = f"no header, columns of {' and '.join(kinds)}"
        return _Layout(described, delimiter, kinds, rest=kinds[-1] == "caption" and files)
    return None


def _kind_of_cells(cells: Sequence[str]) -> str:
    for name, pattern in _CELLS.items():
        if all(pattern.fullmatch(cell) for cell in cells):
            return name
    return "caption"


def _refuse_suspicious(path: Path, head: Sequence[str]) -> None:
    """Refuse text whose lines are not captions, or hold more than captions."""
    for what, pattern in (
        ("begins with an image's name", _STARTS_WITH_IMAGE),
        ("is a web address", _URL_CELL),
        ("begins with a web address", re.compile(r"(?:https?|ftp)://\S+[\t,;|]")),
    ):
        found = [number for number, line in enumerate(head, start=1) if pattern.match(line.strip())]
        if 2 * len(found) >= len(head) and found:
            line = head[found[0] - 1]
            raise DataError(
                f"{path}, line {found[0]}: {line!r:.80} {what}; expected a caption per line, or a table "
                "with a header (image, caption) or with the same columns in every line"
            )


def _lines(path: Path, kind: str) -> Annotations:
    """Read a caption per line."""
    lists = [
        grouped(np.ones(len(lines), np.int64), pa.array(lines, pa.large_string()))
        for lines in read_lines(path)
    ]
    captions = pa.chunked_array(lists, TEXTS)
    return Annotations(
        path, kind, captions, None, Labels([None] * len(captions)), lambda row: f"line {row + 1}"
    )
