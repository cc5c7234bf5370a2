"""Labelled images on disk as one index: ImageFolders, tables of paths, webdataset tar shards.

An index holds names, offsets and labels in Arrow and NumPy arrays (tens of bytes per image), so it
takes millions of images and can be sent to worker processes. Pixels are read one image at a time.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import logging
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image, UnidentifiedImageError

from pymcip.configs import Source, Sources
from pymcip.data import shards
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
from pymcip.errors import DataError, DecodeError
from pymcip.files import file_fingerprint
from pymcip.progress import progress

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff",
)  # fmt: skip
TITLE_COLUMNS = ("title", "caption")
LABEL_KEYS = ("cls", "label", "class", "class_name")  # of a shard's json, if there is no .cls
UNLABELLED = -1
TITLES = pa.large_list(pa.large_string())

_log = logging.getLogger("pymcip.data")
Int64 = npt.NDArray[np.int64]


class Store(Protocol):
    """Where the images of one source lie; rows are counted from 0."""

    def key(self, row: int) -> str: ...

    def titles(self, row: int) -> tuple[str, ...]: ...

    def read(self, row: int) -> bytes: ...

    def fingerprint(self) -> list[Any]: ...


class FileStore:
    """Images as files below a folder."""

    def __init__(self, kind: str, base: Path, names: list[str], titles: pa.Array | None) -> None:
        self._kind = kind
        self._base = base
        self._names = pa.array(names, pa.large_string())
        self._titles = titles
        self._sizes = np.empty(len(names), np.int64)
        self._times = np.empty(len(names), np.int64)
        missing = []
        for row, name in enumerate(
            progress(names, description="checking image files", unit="file")
        ):
            try:
                status = (base / name).stat()
            except OSError:
                missing.append(base / name)
                continue
            self._sizes[row], self._times[row] = status.st_size, status.st_mtime_ns
        if missing:
            raise DataError(
                f"{len(missing)} of {len(names)} images of {base} are not there: {some(missing)}"
                + (
                    ". A table's filepath is relative to the table's folder, or absolute"
                    if kind == "table"
                    else ""
                )
            )

    def key(self, row: int) -> str:
        return str(self._base / self._names[row].as_py())

    def titles(self, row: int) -> tuple[str, ...]:
        return () if self._titles is None else tuple(self._titles[row].as_py())

    def read(self, row: int) -> bytes:
        try:
            return Path(self.key(row)).read_bytes()
        except OSError as error:
            raise DataError(f"{self.key(row)} can't be read any more: {error}") from error

    def fingerprint(self) -> list[Any]:
        titles = None if self._titles is None else self._titles.to_pylist()
        names = self._names.to_pylist()
        return [self._kind, names, titles, self._sizes.tolist(), self._times.tolist()]


class _Descriptor:
    """A file open for reading until nothing refers to it: safe to drop while a thread reads."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class ShardIndex(NamedTuple):
    """The images of one shard: their bytes' places int64 [n], member names, lists of titles."""

    offsets: Int64
    sizes: Int64
    names: pa.Array
    titles: pa.Array


class ShardStore:
    """Images inside tar shards, read by offset; the shards stay as they are."""

    MOST_OPEN = 64

    def __init__(self, paths: list[Path], indices: list[ShardIndex]) -> None:
        counts = [len(index.offsets) for index in indices]
        self._paths = paths
        self._shard_ids = np.repeat(np.arange(len(paths), dtype=np.int32), counts)
        self._offsets = np.concatenate([index.offsets for index in indices])
        self._sizes = np.concatenate([index.sizes for index in indices])
        self._names = pa.concat_arrays([index.names for index in indices])
        self._titles = pa.concat_arrays([index.titles for index in indices])
        self._open: dict[int, _Descriptor] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def _descriptor(self, shard: int) -> _Descriptor:
        with self._lock:
            descriptor = self._open.get(shard)
            if descriptor is None:
                if len(self._open) >= self.MOST_OPEN:
                    self._open.pop(next(iter(self._open)))
                descriptor = self._open[shard] = _Descriptor(self._paths[shard])
            return descriptor

    def key(self, row: int) -> str:
        return f"{self._paths[self._shard_ids[row]]}/{self._names[row].as_py()}"

    def titles(self, row: int) -> tuple[str, ...]:
        return tuple(self._titles[row].as_py())

    def read(self, row: int) -> bytes:
        size, offset = int(self._sizes[row]), int(self._offsets[row])
        try:
            content = os.pread(self._descriptor(int(self._shard_ids[row])).number, size, offset)
        except OSError as error:
            raise DataError(f"{self.key(row)} can't be read any more: {error}") from error
        if len(content) < size:
            raise DataError(f"{self.key(row)}: the shard has been cut short since it was indexed")
        return content

    def fingerprint(self) -> list[Any]:
        return ["shards", [file_fingerprint(path) for path in self._paths]]


class ImageData:
    """All images of one or several sources, by index 0 to N-1. Made by `load_images`.

    Attributes:
        labels: int64 [N], the class of each image, 0 to C-1 over all sources; -1: unlabelled.
        class_names: C texts, the label as the source spells it (folder name, table cell, cls).
        class_sources: int64 [C], the source each class belongs to.
        source_ids: int64 [N], the source of each image.
        crops: float32 [N, 4], the box each image is cut to (see `cropped`), or None.
    """

    crops: npt.NDArray[np.float32] | None = None

    def __init__(
        self,
        stores: list[Store],
        rows: Int64,
        source_ids: Int64,
        labels: Int64,
        class_names: list[str],
        class_sources: Int64,
    ) -> None:
        self._stores = stores
        self._rows = rows
        self.source_ids = source_ids
        self.labels = labels
        self.class_names = class_names
        self.class_sources = class_sources

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        return (
            f"ImageData({len(self)} images, {self.num_classes} classes, "
            f"{len(self._stores)} source(s))"
        )

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def _place(self, index: int) -> tuple[Store, int]:
        return self._stores[self.source_ids[index]], int(self._rows[index])

    def key(self, index: int) -> str:
        """Return the image's path, or its shard's path and the member's name."""
        store, row = self._place(index)
        return store.key(row)

    def titles(self, index: int) -> tuple[str, ...]:
        """Return the captions that come with the image (title column, .txt, json); may be none."""
        store, row = self._place(index)
        return store.titles(row)

    def read(self, index: int) -> Image.Image:
        """Decode one image to RGB; see `decode`.

        Raises:
            DecodeError: it is cut short, no image, or a decompression bomb.
            DataError: its file is gone or has shrunk.
        """
        store, row = self._place(index)
        image = decode(store.read(row), store.key(row))
        return image if self.crops is None else _crop(image, self.crops[index], store.key(row))

    def select(self, indices: npt.ArrayLike) -> ImageData:
        """Return the images at `indices` (int [M]), in that order; the classes stay the same."""
        chosen = np.asarray(indices, np.int64)
        part = copy.copy(self)
        part._rows = self._rows[chosen]
        part.source_ids = self.source_ids[chosen]
        part.labels = self.labels[chosen]
        part.crops = None if self.crops is None else self.crops[chosen]
        return part

    def cropped(self, boxes: npt.ArrayLike) -> ImageData:
        """Return the same images, each cut to a box after decoding and before the transform.

        Args:
            boxes: float [4] for all images or [N, 4]: left, top, right, bottom in pixels, as
                `PIL.Image.Image.crop` takes them; right and bottom of 0 or less are counted from
                the far side, so that (2, 2, -2, -2) takes a border of two pixels off.

        Raises:
            DataError: the boxes have another shape, or are empty.
        """
        given = np.asarray(boxes, np.float32)
        if given.shape not in ((4,), (len(self), 4)) or not np.isfinite(given).all():
            raise DataError(
                f"crops are {list(given.shape)}; needed: finite [4] or [{len(self)}, 4], left, top, "
                "right, bottom"
            )
        table = np.broadcast_to(given, (len(self), 4))
        empty = ((table[:, 2:] > 0) & (table[:, 2:] <= table[:, :2])).any(axis=1)
        if empty.any():
            row = int(empty.argmax())
            raise DataError(f"the crop of {self.key(row)}, {table[row].tolist()}, is empty")
        part = copy.copy(self)
        part.crops = table
        return part

    def fingerprint(self) -> str:
        """Identify the images without reading them, as SHA-256 in hex.

        It covers names below the source's folder, sizes, modification times, order and labels.
        """
        digest = hashlib.sha256()
        described = [*(store.fingerprint() for store in self._stores), self.class_names]
        digest.update(json.dumps(described).encode())
        for column in (self.source_ids, self._rows, self.labels):
            digest.update(np.ascontiguousarray(column).data)
        if self.crops is not None:
            digest.update(np.ascontiguousarray(self.crops).data)
        return digest.hexdigest()


def decode(content: bytes, key: str) -> Image.Image:
    """Decode an image file to RGB, as open_clip's loaders do.

    The first frame is taken, an alpha channel is dropped, the EXIF orientation is left as it is;
    16-bit grey is scaled to 8 bits (Pillow alone would clip it).

    Raises:
        DecodeError: it is cut short, no image, or has more than `PIL.Image.MAX_IMAGE_PIXELS`
            pixels (a decompression bomb; Pillow itself only warns up to twice as many).
    """
    try:
        image = Image.open(io.BytesIO(content))
        pixels = image.width * image.height
        if Image.MAX_IMAGE_PIXELS is not None and pixels > Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError(f"{pixels} pixels")
        image.load()
        return _to_rgb(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DecodeError(
            f"{key}: more than {Image.MAX_IMAGE_PIXELS} pixels ({error}), as a decompression bomb "
            "has; raise PIL.Image.MAX_IMAGE_PIXELS if the image is to be trusted"
        ) from error
    except Exception as error:  # Pillow's decoders raise errors of many types on damaged files
        what = f"{type(error).__name__}: {error}"
        if isinstance(error, UnidentifiedImageError):
            what = "not an image, or of a kind that Pillow does not read"
        raise DecodeError(f"{key} can't be decoded ({len(content)} bytes): {what}") from error


def _crop(image: Image.Image, box: npt.NDArray[np.float32], key: str) -> Image.Image:
    left, top, right, bottom = (float(edge) for edge in box)
    right += image.width if right <= 0 else 0
    bottom += image.height if bottom <= 0 else 0
    if round(right) <= round(left) or round(bottom) <= round(top):
        raise DecodeError(
            f"{key} is {image.width} x {image.height}: too small for the crop {box.tolist()}"
        )
    return image.crop((left, top, right, bottom))  # type: ignore[arg-type]  # it rounds


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # 16 bits, in one of Pillow's several modes for them
        values = np.asarray(image).astype(np.int64)
        if values.max(initial=0) > 255:
            values >>= 8
        image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    elif image.mode in ("P", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


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
            f"{folder}: {len(names)} images with labels {list(numbers.shape)} up to {numbers.max()} of "
            f"{len(class_names)} classes; needed: a label below the number of classes for each"
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
    """Tell the kind of a source and index it: the store, and each image's label or None."""
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
