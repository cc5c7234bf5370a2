"""Images inside parquet files, as Hugging Face's datasets have them: a column of bytes."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet

from pymcip.contents import digest_of, digest_of_files
from pymcip.data.columns import lists_in, reading_parquet
from pymcip.errors import DecodeError
from pymcip.progress import progress

BYTES, PATH = "bytes", "path"  # fields of a struct of an image
MOST_KEPT = 4  # row groups


def image_column(path: Path, names: Sequence[str]) -> str | None:
    """Return the first of the columns `names` that holds images themselves; None: there is none.

    It is binary, or a struct with a binary field `bytes`, and its first value is there and no text.
    """
    with reading_parquet(path):
        file = pyarrow.parquet.ParquetFile(path)
        for name in names:
            index = file.schema_arrow.get_field_index(name)
            if index < 0 or not _binary(file.schema_arrow.field(index).type):
                continue
            for batch in file.iter_batches(batch_size=1, columns=[name]):
                content = _contents(batch.column(0))[0].as_py()
                if content is not None and not _is_text(content):
                    return name
                break
    return None


def class_names_of(path: Path, column: str) -> list[str]:
    """Return the names of a label column's numbers, which Hugging Face's datasets write; may be empty."""
    described = (pyarrow.parquet.read_schema(path).metadata or {}).get(b"huggingface", b"{}")
    try:
        feature = json.loads(described)["info"]["features"][column]
        return [str(name) for name in feature.get("names", [])]
    except (ValueError, KeyError, TypeError, AttributeError):
        return []


def _binary(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        index = kind.get_field_index(BYTES)
        return index >= 0 and _binary(kind.field(index).type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _contents(column: pa.Array | pa.ChunkedArray) -> Any:
    return pa.compute.struct_field(column, BYTES) if pa.types.is_struct(column.type) else column


def _is_text(content: bytes) -> bool:
    try:
        content[:64].decode()
    except UnicodeDecodeError:
        return False
    return b"\0" not in content[:64]


class ParquetStore:
    """Images in the column of parquet files, whose row groups are read when they are needed.

    Args:
        paths: of the files.
        columns: the name of the column in each.
        titles: the captions of each image, large_list<large_string> [N], or None.
    """

    _digest = ""  # of all files, once it is known

    def __init__(self, paths: list[Path], columns: list[str], titles: pa.Array | None) -> None:
        self._paths, self._columns, self._titles = paths, columns, titles
        places: list[tuple[int, int, int]] = []  # file, row group, rows
        sizes: list[Any] = []
        names: list[str] = []
        for number, (path, column) in enumerate(
            progress(list(zip(paths, columns, strict=True)), description="indexing", unit="file")
        ):
            with reading_parquet(path):
                file = pyarrow.parquet.ParquetFile(path)
                for group in range(file.num_row_groups):
                    values = file.read_row_group(group, columns=[column])[column]
                    lengths = pa.compute.fill_null(pa.compute.binary_length(_contents(values)), 0)
                    sizes.append(lengths.to_numpy())
                    places.append((number, group, len(values)))
                    names += _names(values, len(names))
        counts = [rows for _, _, rows in places]
        self._groups = np.repeat(np.arange(len(places)), counts)
        self._offsets: npt.NDArray[np.int64] = np.concatenate(
            [np.empty(0, np.int64), *(np.arange(rows, dtype=np.int64) for rows in counts)]
        )
        self._places = places
        self._sizes = np.concatenate([np.empty(0, np.int64), *sizes])
        self._names = names
        self._kept: dict[int, pa.ChunkedArray] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def key(self, row: int) -> str:
        number = self._places[self._groups[row]][0]
        return f"{self._paths[number]}/{self._names[row]}"

    def titles(self, row: int) -> tuple[str, ...]:
        return () if self._titles is None else tuple(self._titles[row].as_py())

    def size(self, row: int) -> int:
        return int(self._sizes[row])

    def read(self, row: int) -> bytes:
        content: bytes | None = self._group(int(self._groups[row]))[int(self._offsets[row])].as_py()
        if content is None:
            raise DecodeError(f"{self.key(row)}: the row has no image")
        return content

    def digest(self, row: int) -> bytes:
        return digest_of(self.read(row))

    def files(self) -> list[Path]:
        return self._paths

    def fingerprint(self) -> list[Any]:
        self._digest = self._digest or digest_of_files(self._paths)
        titles = None if self._titles is None else lists_in(self._titles)
        return ["parquet", [path.name for path in self._paths], titles, self._digest]

    def _group(self, place: int) -> pa.ChunkedArray:
        with self._lock:
            if place not in self._kept:
                number, group, _ = self._places[place]
                path, column = self._paths[number], self._columns[number]
                with reading_parquet(path):
                    table = pyarrow.parquet.ParquetFile(path).read_row_group(
                        group, columns=[column]
                    )
                if len(self._kept) >= MOST_KEPT:
                    self._kept.pop(next(iter(self._kept)))
                self._kept[place] = _contents(table[column])
            return self._kept[place]


def _names(values: pa.ChunkedArray, first: int) -> list[str]:
    """Names of images: those that the column has, else their numbers."""
    kind = values.type
    if pa.types.is_struct(kind) and kind.get_field_index(PATH) >= 0:
        given = pa.compute.struct_field(values, PATH).to_pylist()
    else:
        given = [None] * len(values)
    return [name or f"row {first + row}" for row, name in enumerate(given)]
