"""Index images on disk: ImageFolders, tables of paths, webdataset tar shards, lists of names."""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pymcip.configs import Source, Sources
from pymcip.data import shards
from pymcip.data.images import IMAGE_SUFFIXES, UNLABELLED, ImageData
from pymcip.data.sources import (
    TABLES,
    as_list,
    find,
    folder_files,
    parquet_columns,
    read_table,
    some,
    suffix,
)
from pymcip.data.stores import FileStore, Int64, ShardIndex, ShardStore, Store
from pymcip.errors import DataError
from pymcip.progress import progress

TITLE_COLUMNS = ("title", "caption")
LABEL_KEYS = ("cls", "label", "class", "class_name")  # of a shard's json, if there is no .cls
TITLES = pa.large_list(pa.large_string())

_log = logging.getLogger("pymcip.data")


def load_images(sources: Sources | list[Source], *, labelled: bool = True) -> ImageData:
    """Index images of one source or of several; the labels of each source are its own classes.

    A source is one of:

    - an ImageFolder: `folder/class/…/image.jpg`;
    - a CSV, TSV or parquet table with columns `filepath` (relative to the table's folder, or
      absolute), `label`, and optionally `title`;
    - webdataset tar shards with `jpg|jpeg|png|webp`, `cls`, `txt`, `json` members: one tar, a
      pattern such as `{000000..000078}.tar` or `*.tar`, or a folder of tars (img2dataset's output
      too). Without `cls`, the json's `label`, `class` or `class_name` is the label; its `caption`
      or `title` is a title, as is `txt`.

    Classes are in the order of their labels' text, or of their values if all of a source's labels
    are integers.

    Args:
        sources: paths or patterns.
        labelled: every image must have a class. If False, classes are optional (label -1), and a
            folder may hold images directly.

    Raises:
        DataError: nothing is there, an image has no class, there is only one class, a table or
            shard can't be read, or a shard holds a member whose name points outside of it.
    """
    listed = as_list(sources)
    if not listed:
        raise DataError("no image source was given; give a folder, a table or tar shards")
    stores: list[Store] = []
    source_ids, rows, labels = [], [], []
    class_names: list[str] = []
    class_sources: list[int] = []
    for number, source in enumerate(listed):
        store, texts = _index(source, labelled)
        if labelled:
            _check_labels(source, store, texts)
        codes, names = _number_classes(texts)
        _report_gaps(source, names)
        stores.append(store)
        source_ids.append(np.full(len(codes), number, np.int64))
        rows.append(np.arange(len(codes), dtype=np.int64))
        labels.append(np.where(codes == UNLABELLED, UNLABELLED, codes + len(class_names)))
        class_names += names
        class_sources += [number] * len(names)
    if labelled and len(class_names) < 2:
        raise DataError(
            f"{some(listed)}: there is only one class ({class_names[0]!r}); labelled data need two "
            "at least, as folder/class/image.jpg, a label column, or cls members"
        )
    return ImageData(
        stores,
        np.concatenate(rows),
        np.concatenate(source_ids),
        np.concatenate(labels),
        class_names,
        np.array(class_sources, np.int64),
    )


def list_images(
    folder: Source,
    names: Sequence[str],
    labels: npt.ArrayLike | None = None,
    class_names: Sequence[str] = (),
    *,
    kind: str = "list",
) -> ImageData:
    """Make an index of named files, for readers of layouts that `load_images` doesn't know.

    Args:
        folder: what the names are relative to.
        names: N file names.
        labels: int [N], 0 <= label < C; None: no labels.
        class_names: C texts.
        kind: goes into the fingerprint.

    Raises:
        DataError: there are no names, files are missing, or the labels don't fit.
    """
    if not len(names):
        raise DataError(f"{folder}: the list of images is empty")
    store = FileStore(kind, Path(folder), list(names), None)
    numbers = np.full(len(names), UNLABELLED) if labels is None else np.asarray(labels)
    numbers = numbers.astype(np.int64)
    if numbers.shape != (len(names),) or numbers.max() >= len(class_names):
        raise DataError(
            f"{folder}: {len(names)} images with labels {list(numbers.shape)} up to "
            f"{numbers.max()} of {len(class_names)} classes; needed: a label below the number of classes for each"
        )
    return ImageData(
        [store],
        np.arange(len(names), dtype=np.int64),
        np.zeros(len(names), np.int64),
        numbers,
        list(class_names),
        np.zeros(len(class_names), np.int64),
    )


def _index(source: Source, labelled: bool) -> tuple[Store, list[str | None]]:
    """Index a source of any kind: the store, and each image's label or None."""
    paths = find(source)
    if len(paths) == 1 and paths[0].is_dir():
        tars = folder_files(paths[0], (".tar",))
        if tars:
            return _index_shards(tars)
        return _index_folder(paths[0])
    tars = [path for path in paths if suffix(path) == ".tar"]
    if tars:  # img2dataset's parquet and json files beside the shards say nothing more
        return _index_shards(tars)
    if paths and all(path.is_file() and suffix(path) in TABLES for path in paths):
        return _index_tables(paths, labelled)
    raise DataError(
        f"{source} is no image source; allowed: a folder (one), tables ({', '.join(TABLES)}), or "
        f"tar shards, not {some(paths)}. Give several sources as a list"
    )


def _index_folder(folder: Path) -> tuple[Store, list[str | None]]:
    names: list[str] = []
    labels: list[str | None] = []
    empty = []
    with os.scandir(folder) as entries:
        visible = [entry for entry in entries if not entry.name.startswith(".")]
    for entry in sorted(visible, key=lambda entry: entry.name):
        if entry.is_dir():
            found = list(_walk(Path(entry.path)))
            names += [os.path.relpath(path, folder) for path in found]
            labels += [entry.name] * len(found)
            if not found:
                empty.append(entry.name)
        elif Path(entry.name).suffix.lower() in IMAGE_SUFFIXES:
            names.append(entry.name)
            labels.append(None)
    if not names:
        raise DataError(
            f"the folder {folder} holds no images; expected {folder}/class/image.jpg (any of "
            f"{', '.join(IMAGE_SUFFIXES)}) or tar shards"
        )
    if empty:
        _log.warning("%s: folders without images are no classes: %s", folder, some(empty))
    return FileStore("folder", folder, names, None), labels


def _walk(folder: Path) -> Iterator[str]:
    for parent, children, files in os.walk(folder, followlinks=True):
        children[:] = sorted(name for name in children if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES:
                yield f"{parent}/{name}"


def _index_tables(paths: list[Path], labelled: bool) -> tuple[Store, list[str | None]]:
    base = Path(os.path.commonpath([path.parent for path in paths]))
    names: list[str] = []
    labels: list[str | None] = []
    titles: list[list[str]] = []
    for path in paths:
        table = read_table(path, ("filepath", "label", *TITLE_COLUMNS))
        wanted = ("filepath", "label") if labelled else ("filepath",)
        absent = [name for name in wanted if name not in table.column_names]
        if absent:
            names = parquet_columns(path) if suffix(path) == ".parquet" else table.column_names
            raise DataError(
                f"{path} has no column {' and no column '.join(absent)}; it has "
                f"{', '.join(names) or 'none'}. Expected a header with filepath, "
                "label and optionally title"
            )
        files = _texts(table, "filepath")
        if None in files:
            raise DataError(f"{path}: row {files.index(None) + 1} has no filepath")
        folder = os.path.relpath(path.parent, base)
        names += [os.path.normpath(os.path.join(folder, str(name))) for name in files]  # noqa: PTH118
        labels += _texts(table, "label")
        columns = [_texts(table, name) for name in TITLE_COLUMNS if name in table.column_names]
        titles += (
            [[text for text in row if text] for row in zip(*columns, strict=True)]
            if columns
            else [[] for _ in files]
        )
    if not names:
        raise DataError(f"{some(paths)}: the table has no rows")
    return FileStore("table", base, names, pa.array(titles, TITLES)), labels


def _texts(table: pa.Table, column: str) -> list[str | None]:
    """Take a column as stripped text; None for what is missing or blank."""
    if column not in table.column_names:
        return [None] * len(table)
    values = table[column].cast(pa.string()).to_pylist()
    return [(value.strip() or None) if value is not None else None for value in values]


def _index_shards(paths: list[Path]) -> tuple[Store, list[str | None]]:
    indices: list[ShardIndex] = []
    labels: list[str | None] = []
    seen: dict[str | None, str | None] = {}  # so that equal labels are one string in memory
    without = 0
    for path in progress(paths, description="indexing shards", unit="shard"):
        images: list[shards.Member] = []
        titles: list[list[str]] = []
        with path.open("rb") as handle:
            for _, sample in shards.read_index(path):
                image = next(
                    (sample[name] for name in shards.IMAGE_EXTENSIONS if name in sample), None
                )
                if image is None:
                    without += 1
                    continue
                label, texts = _describe(path, handle, sample)
                images.append(image)
                labels.append(seen.setdefault(label, label))
                titles.append(texts)
        indices.append(
            ShardIndex(
                np.array([image.offset for image in images], np.int64),
                np.array([image.size for image in images], np.int64),
                pa.array([image.name for image in images], pa.large_string()),
                pa.array(titles, TITLES),
            )
        )
    if not labels:
        raise DataError(
            f"{some(paths)}: no images; expected members named key.jpg (or "
            f"{', '.join(shards.IMAGE_EXTENSIONS[1:])}) with key.cls beside them"
        )
    if without:
        _log.warning("%s: %d keys have no image and are left out", some(paths), without)
    return ShardStore(paths, indices), labels


def _describe(
    path: Path, handle: io.BufferedReader, sample: shards.Sample
) -> tuple[str | None, list[str]]:
    """Read label and titles of one sample from its cls, txt and json members."""
    described: dict[str, Any] = {}
    if "json" in sample:
        try:
            value = json.loads(shards.read_text(path, handle, sample["json"]))
        except ValueError as error:
            raise DataError(f"{path}/{sample['json'].name} is not JSON: {error}") from error
        described = value if isinstance(value, dict) else {}
    label = shards.read_text(path, handle, sample["cls"]).strip() if "cls" in sample else ""
    if not label:
        label = next((_plain(described[name]) for name in LABEL_KEYS if name in described), "")
    texts = [shards.read_text(path, handle, sample["txt"])] if "txt" in sample else []
    texts += [described[name] for name in TITLE_COLUMNS if isinstance(described.get(name), str)]
    return label or None, list(dict.fromkeys(text.strip() for text in texts if text.strip()))


def _plain(value: Any) -> str:
    return str(value).strip() if isinstance(value, (str, int)) else ""


def _check_labels(source: Source, store: Store, labels: list[str | None]) -> None:
    without = [row for row, label in enumerate(labels) if label is None]
    if without:
        raise DataError(
            f"{source}: {len(without)} of {len(labels)} images have no class: "
            f"{some((store.key(row) for row in without[:6]), len(without))}. Each needs one: a "
            "folder of its own, a label in the table, or a cls member beside it"
        )


def _number_classes(labels: Iterable[str | None]) -> tuple[Int64, list[str]]:
    """Number the labels in class order: codes int64 [N] (-1: no label) and the C labels."""
    texts = list(labels)
    distinct = {text for text in texts if text is not None}
    if all(_is_integer(text) for text in distinct):
        names = sorted(distinct, key=lambda text: (int(text), text))
    else:
        names = sorted(distinct)
    codes: dict[str | None, int] = {name: code for code, name in enumerate(names)}
    codes[None] = UNLABELLED
    return np.fromiter((codes[text] for text in texts), np.int64, len(texts)), names


def _is_integer(text: str) -> bool:
    return text.isdecimal() or (text[:1] == "-" and text[1:].isdecimal())


def _report_gaps(source: Source, names: list[str]) -> None:
    """Warn of integers that are missing between the lowest and the highest label."""
    if not names or not all(_is_integer(name) for name in names):
        return
    present = {int(name) for name in names}
    low, high = min(present), max(present)
    count = high - low + 1 - len(present)
    if count:
        missing = (value for value in range(low, high) if value not in present)
        _log.warning(
            "%s: no image has the label %s; classes are numbered without these gaps",
            source,
            some((next(missing) for _ in range(min(count, 6))), count),
        )
