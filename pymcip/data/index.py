"""Index images on disk: ImageFolders, tables of paths, webdataset tar shards, lists of names."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pymcip.configs import Source, Sources
from pymcip.data import shards
from pymcip.data.annotations import TABLES, read_annotations
from pymcip.data.captions import caption_lines
from pymcip.data.columns import TEXTS
from pymcip.data.decode import kind_of_suffix
from pymcip.data.images import UNLABELLED, ImageData
from pymcip.data.indexed import Indexed, joined
from pymcip.data.json_annotations import captions_of, first_text, parse
from pymcip.data.labels import (
    are_shards,
    class_name,
    is_ignored,
    label_of,
    plain,
    splits_among,
)
from pymcip.data.parquet_images import ParquetStore
from pymcip.data.sources import as_list, find, folder_files, some, suffix
from pymcip.data.stores import FileStore, Int64, ShardIndex, ShardStore, states_of
from pymcip.data.tally import Tally
from pymcip.data.walk import Folder, class_folder
from pymcip.errors import DataError
from pymcip.progress import progress

LABEL_KEYS = ("cls", "label", "class", "class_name")  # of a json beside an image, without a .cls

_log = logging.getLogger("pymcip.data")


def load_images(sources: Sources | list[Source], *, labelled: bool = True) -> ImageData:
    """Index images of one source or of several; the labels of each source are its own classes.

    A source is one of:

    - an ImageFolder: `folder/class/…/image.jpg`, of all formats that Pillow reads; a txt beside an
      image, of the same name, holds its captions, one per line;
    - a table (CSV, TSV, parquet, JSON, Flickr's and COCO's lists; see `docs/data.md`) with a column
      `filepath` (relative to the table's folder, or absolute), `label`, and optionally `title`;
    - webdataset tar shards with images and `cls`, `txt`, `json` members: one tar, a pattern such as
      `{000000..000078}.tar` or `*.tar`, or a folder of tars (img2dataset's output too). Without
      `cls`, the json's `label`, `class` or `class_name` is the label; its `caption` or `title` is a
      title, as is each line of `txt`.

    One file is one image, however often and by whatever names it is listed: its captions are those of
    all its rows. Classes are joined by their names in Unicode's form NFC, and are in the order of
    their labels' text, or of their values if all of a source's labels are integers. What is left out
    is logged by reason and kept in `ImageData.left_out`.

    Args:
        sources: paths or patterns.
        labelled: every image must have a class. If False, classes are optional (label -1), and a
            folder may hold images directly.

    Raises:
        DataError: nothing is there, an image has no class or several, there is only one class, a
            folder holds splits (train, val) instead of classes, a table or shard can't be read, or a
            shard holds a member whose name points outside of it.
    """
    listed = as_list(sources)
    if not listed:
        raise DataError("no image source was given; give a folder, a table or tar shards")
    found: list[Indexed] = []
    source_ids, rows, labels = [], [], []
    class_names: list[str] = []
    class_sources: list[int] = []
    for number, source in enumerate(listed):
        indexed = _index(source)
        indexed.tally.report(source)
        _check_labels(source, indexed, labelled)
        codes, names = _number_classes(indexed.labels)
        _report_gaps(source, names)
        found.append(indexed)
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
        [indexed.store for indexed in found],
        np.concatenate(rows),
        np.concatenate(source_ids),
        np.concatenate(labels),
        class_names,
        np.array(class_sources, np.int64),
        left_out=tuple(item for indexed in found for item in indexed.tally.items),
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


def _index(source: Source) -> Indexed:
    """Index a source of any kind."""
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
        return _index_tables(paths)
    raise DataError(
        f"{source} is no image source; allowed: a folder (one), tables ({', '.join(TABLES)}), or "
        f"tar shards, not {some(paths)}. Give several sources as a list"
    )


# Folders


def _index_folder(folder: Path) -> Indexed:
    tally = Tally()
    found = Folder(str(folder), tally)
    names = found.names
    if not names:
        tally.report(folder)
        raise DataError(
            f"the folder {folder} holds no images; expected {folder}/class/image.jpg (any kind of "
            "image that Pillow reads) or tar shards"
        )
    folders = [class_folder(name) for name in names]
    classes = list(dict.fromkeys(name for name in folders if name is not None))
    _report_empty(folder, classes)
    splits = splits_among(classes)
    if splits and any(os.path.dirname(os.path.dirname(name)) for name in names):  # noqa: PTH120
        raise DataError(
            f"{folder} holds splits ({some(splits)}), which are no classes; give one of them, such as "
            f"{folder / splits[0]}, or several as a list of sources"
        )
    with os.scandir(folder) as entries:
        beside = [entry.name for entry in entries if entry.is_file()]
    stems = (os.path.splitext(name)[0] for name in names)  # noqa: PTH122
    described = bool(found.sidecars) and all(f"{stem}.json" in found.sidecars for stem in stems)
    sharded = are_shards(classes, beside, described=described)
    if sharded or splits:
        what = "shards of img2dataset" if sharded else "splits"
        tally.remarks.append(f"the folders {some(classes)} are {what}, not classes")
        folders = [None] * len(names)
    named = {each: class_name(each) for each in classes}
    labels = [None if each is None else named[each] for each in folders]
    titles: list[list[str]] | None = None
    if found.sidecars:
        titles = [[] for _ in names]
        for row, name in enumerate(names):
            label, titles[row] = _beside(folder, name, found.sidecars, tally, with_json=sharded)
            labels[row] = labels[row] or label
    return joined("folder", folder, names, labels, titles, found.states, tally)


def _beside(
    folder: Path, name: str, sidecars: set[str], tally: Tally, *, with_json: bool
) -> tuple[str | None, list[str]]:
    """Read label and captions from the txt and json beside an image."""
    stem = os.path.splitext(name)[0]  # noqa: PTH122
    texts = {}
    for extension in ("txt", "json") if with_json else ("txt",):
        path = folder / f"{stem}.{extension}"
        if f"{stem}.{extension}" in sidecars:
            try:
                texts[extension] = path.read_bytes().decode("utf-8-sig")
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"{path} can't be read as UTF-8 text: {error}") from error
    only_numbers = not any(character.isalpha() for character in texts.get("txt", "a"))
    if only_numbers and texts.pop("txt").strip():
        tally.add(f"{folder}/{stem}.txt", "numbers beside an image, no captions")
    return _described(f"{folder}/{plain(stem)}", texts)


def _report_empty(folder: Path, classes: Iterable[str]) -> None:
    known = set(classes)
    with os.scandir(folder) as entries:
        empty = [
            entry.name
            for entry in sorted(entries, key=lambda entry: entry.name)
            if entry.name not in known and entry.is_dir() and not is_ignored(entry.name)
        ]
    if empty:
        _log.warning(
            "%s: folders without images are no classes: %s", folder, some(map(plain, empty))
        )


# Tables


def _index_tables(paths: list[Path]) -> Indexed:
    base = Path(os.path.commonpath([path.absolute().parent for path in paths]))
    names: list[str] = []
    labels: list[str | None] = []
    titles: list[list[str]] = []
    where: list[str] = []
    contents: dict[Path, str] = {}
    tally = Tally()
    for path in paths:
        found = read_annotations(path, images=True)
        tally.items += found.left_out
        if found.content is not None:
            contents[path] = found.content
            labels += found.labels
            titles += found.captions.to_pylist()
            continue
        if found.files is None:
            raise DataError(
                f"{path} has no column filepath; it has {', '.join(found.names) or 'none'}. Expected a "
                "header with filepath, label and optionally title, or columns={'filepath': NAME}"
            )
        if None in found.files:
            row = found.files.index(None)
            raise DataError(f"{path}: row {row + 1} has no filepath ({found.where(row)})")
        files = [str(name) for name in found.files]
        folder = _folder_of(path.absolute().parent, files)
        below = os.path.relpath(folder, base)
        names += [os.path.normpath(os.path.join(below, name)) for name in files]  # noqa: PTH118
        labels += found.labels
        titles += found.captions.to_pylist()
        where += [f"{path}, {found.where(row)}" for row in range(len(files))]
    if contents and names:
        raise DataError(
            f"{some(paths)}: some hold images themselves, others name files; give them as two sources"
        )
    if contents:
        store = ParquetStore(
            list(contents),
            list(contents.values()),
            pa.array(titles, TEXTS) if any(titles) else None,
        )
        return Indexed(store, labels, tally)
    if not names:
        raise DataError(f"{some(paths)}: the table has no rows")
    return joined(
        "table", base, names, labels, titles, states_of("table", base, names), tally, where
    )


def _folder_of(folder: Path, names: Sequence[str]) -> Path:
    """Return the folder that a table's names are relative to: its own, or one that lies in it."""
    if not names or os.path.lexists(folder / names[0]):
        return folder
    places = [each for each in sorted(folder.iterdir()) if each.is_dir()]
    there = [each for each in places if (each / names[0]).is_file()]
    if len(there) != 1:
        return folder
    _log.info("%s: the images of its tables lie in %s", folder, there[0])
    return there[0]


# Shards


def _index_shards(paths: list[Path]) -> Indexed:
    indices: list[ShardIndex] = []
    labels: list[str | None] = []
    seen: dict[str | None, str | None] = {}  # so that equal labels are one string in memory
    tally = Tally()
    for path in progress(paths, description="indexing shards", unit="shard"):
        images: list[shards.Member] = []
        titles: list[list[str]] = []
        with path.open("rb") as handle:
            for _, sample in shards.read_index(path, tally):
                image = shards.image_of(sample)
                if image is None:
                    tally.add(*_without_image(path, sample))
                    continue
                label, texts = _described(
                    f"{path}/{plain(image.name)}",
                    {
                        extension: shards.read_text(path, handle, sample[extension])
                        for extension in ("cls", "txt", "json")
                        if extension in sample
                    },
                )
                images.append(image)
                labels.append(seen.setdefault(label, label))
                titles.append(texts)
        indices.append(
            ShardIndex(
                np.array([image.offset for image in images], np.int64),
                np.array([image.size for image in images], np.int64),
                pa.array([plain(image.name) for image in images], pa.large_string()),
                pa.array(titles, TEXTS),
            )
        )
    if not labels:
        tally.report(some(paths))
        raise DataError(
            f"{some(paths)}: no images; expected members named key.jpg (or "
            f"{', '.join(shards.IMAGE_EXTENSIONS[1:])}, …) with key.cls beside them"
        )
    return Indexed(ShardStore(paths, indices), labels, tally)


def _without_image(path: Path, sample: shards.Sample) -> tuple[str, str]:
    """Name a sample without an image, and say why it has none."""
    for extension, member in sample.items():
        if "." not in extension and kind_of_suffix(f".{extension}") in ("other image", "unknown"):
            return f"{path}/{plain(member.name)}", "no kind of image that Pillow reads here"
    return f"{path}/{plain(next(iter(sample.values())).name)}", "no image under its key"


def _described(where: str, texts: dict[str, str]) -> tuple[str | None, list[str]]:
    """Read label and captions of one image from its cls, txt and json."""
    described: dict[str, Any] = {}
    if "json" in texts:
        value = parse(texts["json"], f"{where}: its json")
        described = value if isinstance(value, dict) else {}
    label = label_of(texts.get("cls")) or label_of(first_text(described, LABEL_KEYS))
    titles = caption_lines(texts.get("txt", ""), described.get("caption"))
    for name in ("title", "caption"):
        if described.get(name) is not None:
            more = captions_of({"caption": described[name]}, where)
            titles += [text.strip() for text in more if text.strip() and text.strip() not in titles]
    return label, titles


# Labels


def _check_labels(source: Source, indexed: Indexed, labelled: bool) -> None:
    without = [row for row, label in enumerate(indexed.labels) if label is None]
    if not without or (not labelled and len(without) == len(indexed.labels)):
        return
    message = (
        f"{source}: {len(without)} of {len(indexed.labels)} images have no class: "
        f"{some((indexed.place(row) for row in without[:6]), len(without))}"
    )
    if labelled:
        raise DataError(
            f"{message}. Each needs one: a folder of its own, a label in the table, or a cls member "
            "beside it"
        )
    _log.warning("%s", message)


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
    digits = text.removeprefix("-")
    return digits.isdecimal() and len(digits) < 1000  # Python refuses to read thousands of digits


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
