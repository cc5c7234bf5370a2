"""Captions and images in JSON: COCO's annotations, Karpathy's splits, BLIP's lists, JSON lines."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from pymcip.data.column_names import FILE_COLUMNS, LABEL_COLUMNS
from pymcip.data.columns import TEXTS
from pymcip.data.compact import Labels, Names
from pymcip.data.labels import label_of
from pymcip.data.sources import some, suffix
from pymcip.data.tables import Annotations, open_text, read_lines
from pymcip.errors import DataError

_CAPTIONS = ("caption", "captions", "title", "text", "sentences", "raw")
_Rows = list[tuple[str, dict[str, Any]]]  # where each is, and an object under the usual names

_log = logging.getLogger("pymcip.data")


def parse(text: str | bytes, where: object) -> Any:
    """Parse JSON; raises DataError that says where it is if it is none, or too deep."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {error}") from error


def captions_of(value: Mapping[str, Any], where: str) -> list[str]:
    """Return the captions of one object: of its first key of captions that has any.

    Raises:
        DataError: they are no texts.
    """
    for name in _CAPTIONS:
        if value.get(name) is not None:
            return _texts(value[name], f"{where}, {name}")
    return []


def first_text(value: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    """Return the first of these keys that holds a text or a whole number, as text."""
    for name in names:
        if isinstance(value.get(name), (str, int)):
            return str(value[name])
    return None


def read_json(path: Path) -> Annotations:
    """Read a JSON file (one document) or JSON lines, and say what it is.

    Raises:
        DataError: it is no JSON, or none of the layouts that are known.
    """
    if suffix(path) == ".jsonl":
        lines = enumerate((line for block in read_lines(path) for line in block), start=1)
        values = [(f"line {i}", parse(x, f"{path}, line {i}")) for i, x in lines if x.strip()]
        return _annotations(path, "JSON lines", _checked(path, values))
    try:
        with open_text(path) as stream:
            content = stream.read()
    except (ValueError, OSError) as error:
        raise DataError(f"{path} can't be read: {error}") from error
    value = parse(content, path)
    if isinstance(value, list):
        kind = "JSON, a list of objects, as BLIP's"
        if value and all(isinstance(each, str) for each in value):
            kind, value = "JSON, a list of captions", [{"caption": text} for text in value]
        values = [(f"[{i}]", each) for i, each in enumerate(value)]
        return _annotations(path, kind, _checked(path, values))
    if isinstance(value, dict) and isinstance(value.get("images"), list):
        if isinstance(value.get("annotations"), list):
            return _annotations(path, "COCO's captions", _coco(path, value))
        return _annotations(path, "Karpathy's captions", _karpathy(path, value["images"]))
    if not (
        isinstance(value, dict)
        and value
        and all(isinstance(each, (str, list)) for each in value.values())
    ):
        raise _unknown(path, value)
    values = [(repr(name), {"image": name, "caption": each}) for name, each in value.items()]
    return _annotations(path, "JSON, captions by image", _checked(path, values))


def _annotations(path: Path, kind: str, rows: _Rows) -> Annotations:
    """Take image, label and captions of each row."""
    captions = [captions_of(value, f"{path}, {where}") for where, value in rows]
    files = [first_text(value, FILE_COLUMNS) or "" for _, value in rows]
    places = [where for where, _ in rows]
    return Annotations(
        path,
        kind,
        pa.chunked_array([pa.array(captions, TEXTS)]),
        Names(files) if any(files) else None,
        Labels(label_of(first_text(value, LABEL_COLUMNS)) for _, value in rows),
        places.__getitem__,
    )


def _checked(path: Path, values: list[tuple[str, Any]]) -> _Rows:
    """Check that each value is an object with a caption or an image."""
    for where, value in values:
        if not isinstance(value, dict):
            raise DataError(f"{path}, {where}: {value!r:.60} is no object with image and caption")
        if first_text(value, FILE_COLUMNS) is None and not captions_of(value, f"{path}, {where}"):
            raise DataError(
                f"{path}, {where}: there is neither a caption nor an image, only {some(map(repr, value))}"
            )
    return values


def _unknown(path: Path, value: Any) -> DataError:
    shown = (
        f"an object of {some(map(repr, value))}" if isinstance(value, dict) else repr(value)[:60]
    )
    return DataError(
        f"{path} is {shown}; known: COCO's captions (images, annotations), Karpathy's (images with "
        "sentences), a list of objects with image and caption (BLIP's), captions by image"
    )


def _texts(value: Any, where: str) -> list[str]:
    """Take a text, a list of texts, or a list of objects with raw or caption as texts."""
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return _texts(next((value[k] for k in ("raw", "caption", "text") if k in value), 0), where)
    if isinstance(value, list):
        return [text for each in value for text in _texts(each, where)]
    raise DataError(f"{where} is {value!r:.60}; needed: a text or a list of texts")


def _coco(path: Path, value: Mapping[str, Any]) -> _Rows:
    rows: dict[Any, dict[str, Any]] = {}
    for where, image in _numbered(path, "images", value["images"]):
        number = image.get("id")
        if not isinstance(number, (int, str)) or number in rows:
            raise DataError(f"{path}, {where}: id {number!r} is no number, or there twice")
        rows[number] = {"image": first_text(image, FILE_COLUMNS), "captions": []}
    for where, each in _numbered(path, "annotations", value["annotations"]):
        number = each.get("image_id")
        if not isinstance(number, (int, str)) or number not in rows:
            raise DataError(f"{path}, {where}: image_id {number!r} is the id of no image")
        if "caption" not in each:
            raise DataError(
                f"{path}, {where} has no caption: it is a file of COCO's for another task; give "
                "captions_….json"
            )
        rows[number]["captions"] += _texts(each["caption"], f"{path}, {where}")
    return [(f"image {number}", row) for number, row in rows.items()]


def _karpathy(path: Path, images: list[Any]) -> _Rows:
    rows: _Rows = []
    splits: Counter[str] = Counter()
    for where, image in _numbered(path, "images", images):
        if "sentences" not in image:
            raise _unknown(path, {"images": images, **image})
        splits[str(image.get("split"))] += 1
        name = image.get("filename")
        if isinstance(name, str) and isinstance(image.get("filepath"), str):
            name = f"{image['filepath']}/{name}"
        name = name if isinstance(name, str) else None
        rows.append((where, {"image": name, "sentences": image["sentences"]}))
    if len(splits) > 1:
        counts = ", ".join(f"{split} {count}" for split, count in splits.items())
        _log.warning("%s: the images of all splits are taken: %s", path, counts)
    return rows


def _numbered(path: Path, name: str, rows: list[Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{path}, {name}[{number}]: {row!r:.60} is no object")
        yield f"{name}[{number}]", row
