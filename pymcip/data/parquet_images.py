"""Images inside parquet files, as Hugging Face's datasets have them: a column of bytes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet

from pymcip.data.columns import lists_in, reading_parquet
from pymcip.data.stores import PackedStore
from pymcip.errors import DecodeError
from pymcip.progress import progress

BYTES, PATH = "bytes", "path"  # fields of a struct of an image


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


class ParquetStore(PackedStore[pa.ChunkedArray]):
    """Images in the column of parquet files, whose row groups are read when they are needed.

    Args:
        paths: of the files.
        columns: the name of the column in each.
        titles: the captions of each image, large_list<large_string> [N], or None.
    """

    MOST_OPEN = 4  # row groups

    def __init__(
        self, paths: list[Path], columns: list[str], titles: pa.ChunkedArray | None
    ) -> None:
        super().__init__(paths, titles)
        self._columns = columns
        places: list[tuple[int, int, int]] = []  # file, row group, rows
        sizes: list[Any] = [np.empty(0, np.int64)]
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
        self._first_rows = np.cumsum([0, *counts])  # of each row group
        self._places, self._names = places, names
        self._sizes = np.concatenate(sizes)

    def _opened(self, number: int) -> pa.ChunkedArray:
        file, group, _ = self._places[number]
        path, column = self._paths[file], self._columns[file]
        with reading_parquet(path):
            table = pyarrow.parquet.ParquetFile(path).read_row_group(group, columns=[column])
        return _contents(table[column])

    def key(self, row: int) -> str:
        number = self._places[self._groups[row]][0]
        return f"{self._paths[number]}/{self._names[row]}"

    def read(self, row: int) -> bytes:
        group = int(self._groups[row])
        content: bytes | None = self._part(group)[row - int(self._first_rows[group])].as_py()
        if content is None:
            raise DecodeError(f"{self.key(row)}: the row has no image")
        return content

    def fingerprint(self) -> list[Any]:
        names, digest = self.content()
        titles = None if self._titles is None else lists_in(self._titles)
        return ["parquet", names, titles, digest]


def _names(values: pa.ChunkedArray, first: int) -> list[str]:
    """Names of images: those that the column has, else their numbers."""
    kind = values.type
    if pa.types.is_struct(kind) and kind.get_field_index(PATH) >= 0:
        given = pa.compute.struct_field(values, PATH).to_pylist()
    else:
        given = [None] * len(values)
    return [name or f"row {first + row}" for row, name in enumerate(given)]
