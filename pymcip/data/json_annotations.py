"""Captions and images in JSON: COCO's annotations, Karpathy's splits, BLIP's lists, JSON lines."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pymcip.data.labels import label_of
from pymcip.data.sources import some, suffix
from pymcip.data.tables import open_text, read_lines
from pymcip.errors import DataError

_FILES = ("filepath", "file_path", "file_name", "filename", "image_path", "path", "image", "img")
_LABELS = ("label", "cls", "class", "class_name")
_CAPTIONS = ("caption", "captions", "title", "text", "sentences", "raw")

_log = logging.getLogger("pymcip.data")


@dataclass
class Described:
    """Rows of a JSON file: captions, image and label of each, and where each is."""

    kind: str
    captions: list[list[str]] = field(default_factory=list)
    files: list[str | None] | None = None
    labels: list[str | None] = field(default_factory=list)
    where: list[str] = field(default_factory=list)


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


def read_json(path: Path) -> Described:
    """Read a JSON file (one document) or JSON lines, and say what it is.

    Raises:
        DataError: it is no JSON, or none of the layouts that are known.
    """
    if suffix(path) == ".jsonl":
        rows = []
        number = 0
        for lines in read_lines(path):
            for line in lines:
                number += 1
                if line.strip():
                    rows.append((f"line {number}", parse(line, f"{path}, line {number}")))
        return _objects(path, "JSON lines", rows)
    try:
        with open_text(path) as stream:
            content = stream.read()
    except (ValueError, OSError) as error:
        raise DataError(f"{path} can't be read: {error}") from error
    value = parse(content, path)
    if isinstance(value, list):
        if value and all(isinstance(each, str) for each in value):
            rows = [(f"[{i}]", {"caption": text}) for i, text in enumerate(value)]
            return _objects(path, "JSON, a list of captions", rows)
        rows = [(f"[{i}]", each) for i, each in enumerate(value)]
        return _objects(path, "JSON, a list of objects, as BLIP's", rows)
    if isinstance(value, dict) and isinstance(value.get("images"), list):
        if isinstance(value.get("annotations"), list):
            return _coco(path, value)
        return _karpathy(path, value["images"])
    if (
        isinstance(value, dict)
        and value
        and all(isinstance(v, (str, list)) for v in value.values())
    ):
        rows = [(repr(name), {"image": name, "caption": each}) for name, each in value.items()]
        return _objects(path, "JSON, captions by image", rows)
    raise _unknown(path, value)


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


def _objects(path: Path, kind: str, rows: list[tuple[str, Any]]) -> Described:
    """Read a row per object, with image, label and captions under the usual names."""
    found = Described(kind)
    files: list[str | None] = []
    for where, value in rows:
        if not isinstance(value, dict):
            raise DataError(f"{path}, {where}: {value!r:.60} is no object with image and caption")
        captions = captions_of(value, f"{path}, {where}")
        file = first_text(value, _FILES)
        if not captions and file is None:
            raise DataError(
                f"{path}, {where}: there is neither a caption nor an image, only {some(map(repr, value))}"
            )
        _add(found, files, where, file, first_text(value, _LABELS), captions)
    if any(files):
        found.files = files
    return found


def _add(
    found: Described,
    files: list[str | None],
    where: str,
    file: str | None,
    label: str | None,
    captions: list[str],
) -> None:
    files.append(file)
    found.where.append(where)
    found.labels.append(label_of(label))
    found.captions.append(captions)


def _coco(path: Path, value: Mapping[str, Any]) -> Described:
    found = Described("COCO's captions")
    names: dict[Any, str | None] = {}
    texts: dict[Any, list[str]] = {}
    for where, image in _numbered(path, "images", value["images"]):
        number = image.get("id")
        if not isinstance(number, (int, str)) or number in names:
            raise DataError(f"{path}, {where}: id {number!r} is no number, or there twice")
        names[number], texts[number] = first_text(image, _FILES), []
    for where, each in _numbered(path, "annotations", value["annotations"]):
        number = each.get("image_id")
        if not isinstance(number, (int, str)) or number not in texts:
            raise DataError(f"{path}, {where}: image_id {number!r} is the id of no image")
        if "caption" not in each:
            raise DataError(
                f"{path}, {where} has no caption: it is a file of COCO's for another task; give "
                "captions_….json"
            )
        texts[number] += _texts(each["caption"], f"{path}, {where}")
    files: list[str | None] = []
    for number, name in names.items():
        _add(found, files, f"image {number}", name, None, texts[number])
    found.files = files if any(files) else None
    return found


def _karpathy(path: Path, images: list[Any]) -> Described:
    found = Described("Karpathy's captions")
    files: list[str | None] = []
    splits: Counter[str] = Counter()
    for where, image in _numbered(path, "images", images):
        if "sentences" not in image:
            raise _unknown(path, {"images": images, **image})
        splits[str(image.get("split"))] += 1
        name = image.get("filename")
        if isinstance(name, str) and isinstance(image.get("filepath"), str):
            name = f"{image['filepath']}/{name}"
        captions = _texts(image["sentences"], f"{path}, {where}")
        _add(found, files, where, name if isinstance(name, str) else None, None, captions)
    found.files = files if any(files) else None
    if len(splits) > 1:
        counts = ", ".join(f"{split} {count}" for split, count in splits.items())
        _log.warning("%s: the images of all splits are taken: %s", path, counts)
    return found


def _numbered(path: Path, name: str, rows: list[Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{path}, {name}[{number}]: {row!r:.60} is no object")
        yield f"{name}[{number}]", row
