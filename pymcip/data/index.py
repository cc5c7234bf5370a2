"""Index images on disk: ImageFolders, tables of paths, webdataset tar shards, lists of names."""

from __future__ import annotations

import logging
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pymcip.configs import Source, Sources
from pymcip.data import shards
from pymcip.data.annotations import TABLES, Annotations, read_annotations
from pymcip.data.captions import caption_lines
from pymcip.data.columns import TEXTS, column_of, has_texts
from pymcip.data.compact import UNLABELLED, Labels, Names
from pymcip.data.decode import kind_of_suffix
from pymcip.data.images import ImageData
from pymcip.data.indexed import Indexed, joined
from pymcip.data.json_annotations import captions_of, first_text, parse
from pymcip.data.kept_index import ShardIndex, kept_index
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
from pymcip.data.stores import FileStore, Int64, ShardStore, Store, states_of
from pymcip.data.tally import LeftOut, Tally
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
    stores: list[Store] = []
    left_out: list[LeftOut] = []
    source_ids, rows, labels = [], [], []
    class_names: list[str] = []
    class_sources: list[int] = []
    for number, source in enumerate(listed):
        indexed = _index(source)
        indexed.tally.report(source)
        _check_labels(source, indexed, labelled)
        codes, names = _number_classes(indexed.labels)
        _report_gaps(source, names)
        stores.append(indexed.store)
        left_out += indexed.tally.items
        source_ids.append(np.full(len(codes), number, np.int64))
        rows.append(np.arange(len(codes), dtype=np.int64))
        labels.append(np.add(codes, len(class_names), out=codes, where=codes != UNLABELLED))
        class_names += names
        class_sources += [number] * len(names)
    if labelled and len(class_names) < 2:
        raise DataError(
            f"{some(listed)}: there is only one class ({class_names[0]!r}); labelled data need two "
            "at least, as folder/class/image.jpg, a label column, or cls members"
        )
    return ImageData(
        stores,
        _together(rows),
        _together(source_ids),
        _together(labels),
        class_names,
        np.array(class_sources, np.int64),
        left_out=tuple(left_out),
    )


def _together(parts: list[Int64]) -> Int64:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


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
    store = FileStore(kind, Path(folder), Names(names), None)
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
    folders = Labels(map(class_folder, names))
    classes = folders.names
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
        folders = Labels(None for _ in names)
    named: dict[str | None, str] = {each: class_name(each) for each in folders.names}
    labels = Labels(map(named.get, folders))

    def beside_each() -> Iterator[list[str]]:
        for row, name in enumerate(names):
            label, titles = _beside(folder, name, found.sidecars, tally, with_json=sharded)
            labels[row] = labels[row] or label
            yield titles

    titles = column_of(beside_each()) if found.sidecars else None
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
    names, labels = Names(), Labels()
    titles: list[pa.Array] = []
    places: list[tuple[int, Annotations]] = []  # each with its first row
    contents: dict[Path, str] = {}
    tally = Tally()
    for path in paths:
        found = read_annotations(path, images=True)
        tally.items += found.left_out
        if found.content is not None:
            contents[path] = found.content
            labels.extend(found.labels)
            titles += found.captions.chunks
            continue
        if found.files is None:
            raise DataError(
                f"{path} has no column filepath; it has {', '.join(found.names) or 'none'}. Expected a "
                "header with filepath, label and optionally title, or columns={'filepath': NAME}"
            )
        without = next((row for row, name in enumerate(found.files) if not name), None)
        if without is not None:
            raise DataError(f"{path}: row {without + 1} has no filepath ({found.where(without)})")
        folder = _folder_of(path.absolute().parent, next(iter(found.files), None))
        below = os.path.relpath(folder, base)
        places.append((len(names), found))
        for name in found.files:
            names.append(os.path.normpath(os.path.join(below, name)))  # noqa: PTH118
        labels.extend(found.labels)
        titles += found.captions.chunks
        found.files, found.labels = None, Labels()
    if contents and names:
        raise DataError(
            f"{some(paths)}: some hold images themselves, others name files; give them as two sources"
        )
    if contents:
        captions = pa.chunked_array(titles, TEXTS)
        store = ParquetStore(
            list(contents), list(contents.values()), captions if has_texts(captions) else None
        )
        return Indexed(store, labels, tally)
    if not names:
        raise DataError(f"{some(paths)}: the table has no rows")

    def where(row: int) -> str:
        first, found = next(place for place in reversed(places) if place[0] <= row)
        return f"{found.path}, {found.where(row - first)}"

    return joined(
        "table", base, names, labels, pa.chunked_array(titles, TEXTS),
        states_of("table", base, names), tally, where,
    )  # fmt: skip


def _folder_of(folder: Path, name: str | None) -> Path:
    """Return the folder that a table's names, such as `name`, are relative to: its own, or one in it."""
    if name is None or os.path.lexists(folder / name):
        return folder
    places = [each for each in sorted(folder.iterdir()) if each.is_dir()]
    there = [each for each in places if (each / name).is_file()]
    if len(there) != 1:
        return folder
    _log.info("%s: the images of its tables lie in %s", folder, there[0])
    return there[0]


# Shards


def _index_shards(paths: list[Path]) -> Indexed:
    found = kept_index(paths, lambda: _read_shards(paths))
    store = ShardStore(paths, found.ends, found.names, found.offsets, found.sizes, found.titles)
    return Indexed(store, found.labels, found.tally)


def _read_shards(paths: list[Path]) -> ShardIndex:
    names, labels, tally = Names(), Labels(), Tally()
    offsets, sizes, ends = array("q"), array("q"), array("q")

    def titles_of_each() -> Iterator[list[str]]:
        for path in progress(paths, description="indexing shards", unit="shard"):
            with path.open("rb") as handle:
                for _, sample in shards.read_index(path, tally):
                    image = shards.image_of(sample)
                    if image is None:
                        tally.add(*_without_image(path, sample))
                        continue
                    label, titles = _described(
                        f"{path}/{plain(image.name)}",
                        {
                            extension: shards.read_text(path, handle, sample[extension])
                            for extension in ("cls", "txt", "json")
                            if extension in sample
                        },
                    )
                    names.append(plain(image.name))
                    offsets.append(image.offset)
                    sizes.append(image.size)
                    labels.append(label)
                    yield titles
            ends.append(len(names))

    titles = column_of(titles_of_each())
    if not len(names):
        tally.report(some(paths))
        raise DataError(
            f"{some(paths)}: no images; expected members named key.jpg (or "
            f"{', '.join(shards.IMAGE_EXTENSIONS[1:])}, …) with key.cls beside them"
        )
    return ShardIndex(
        np.asarray(ends), names, np.asarray(offsets), np.asarray(sizes),
        labels, titles if has_texts(titles) else None, tally,
    )  # fmt: skip


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
    without = np.asarray(indexed.labels.codes) == UNLABELLED
    count = int(np.count_nonzero(without))
    if not count or (not labelled and count == len(without)):
        return
    first = islice((row for row, alone in enumerate(without) if alone), 6)
    message = (
        f"{source}: {count} of {len(without)} images have no class: "
        f"{some(map(indexed.place, first), count)}"
    )
    if labelled:
        raise DataError(
            f"{message}. Each needs one: a folder of its own, a label in the table, or a cls member "
            "beside it"
        )
    _log.warning("%s", message)


def _number_classes(labels: Labels) -> tuple[Int64, list[str]]:
    """Number the labels in class order: codes int64 [N] (-1: no label) and the C labels."""
    used = np.zeros(len(labels.names) + 1, bool)
    used[labels.codes] = True
    present = np.flatnonzero(used[:-1]).tolist()
    if all(_is_integer(labels.names[code]) for code in present):
        present.sort(key=lambda code: (int(labels.names[code]), labels.names[code]))
    else:
        present.sort(key=labels.names.__getitem__)
    number = np.full(len(used), UNLABELLED, np.int64)  # the last one: of unlabelled images
    number[present] = np.arange(len(present))
    return number[labels.codes], [labels.names[code] for code in present]


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
