"""Parquet files, and columns of any type as texts."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet

from pymcip.data.labels import plain
from pymcip.data.tables import Choose, Table, check_once
from pymcip.errors import DataError

_ROWS = 8192  # lists at a time
TEXTS = pa.large_list(pa.large_string())
_TEXT_FIELDS = ("raw", "caption", "sentence", "text", "path")  # of a struct that stands for a text


def read_parquet(path: Path, choose: Choose) -> Table:
    """Read the wanted columns of a parquet file.

    Raises:
        DataError: it is no parquet file, or a wanted name is there twice.
    """
    names = parquet_columns(path)
    wanted = list(choose(names))
    check_once(path, names, wanted)
    with reading_parquet(path):
        table = pyarrow.parquet.read_table(path, columns=wanted)
        table.validate()
    columns = {name: table[name] for name in wanted}
    return Table(path, "parquet", names, columns)


def parquet_columns(path: Path) -> list[str]:
    """Return the names of a parquet file's columns.

    Raises:
        DataError: it is no parquet file.
    """
    with reading_parquet(path):
        names: list[str] = pyarrow.parquet.read_schema(path).names
    return names


@contextlib.contextmanager
def reading_parquet(path: Path) -> Iterator[None]:
    """Raise DataError where the block can't read the parquet file."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: names that are no UTF-8
        raise DataError(f"{path} can't be read as PARQUET: {error}") from error


# Lists of texts


def lists_in(column: pa.ChunkedArray) -> Iterator[list[str]]:
    """Yield the texts of each row of a column of `TEXTS`, of which a block is read at a time."""
    for start in range(0, len(column), _ROWS):
        yield from column[start : start + _ROWS].to_pylist()


def has_texts(column: pa.ChunkedArray) -> bool:
    """Whether any row of a column of `TEXTS` has a text."""
    return any(len(chunk.flatten()) for chunk in column.chunks)


def column_of(lists: Iterable[list[str]]) -> pa.ChunkedArray:
    """Make a column of `TEXTS` of them; no more than a block of Python's own lists is held."""
    rows, blocks = iter(lists), []
    while block := list(islice(rows, _ROWS)):
        blocks.append(pa.array(block, TEXTS))
    return pa.chunked_array(blocks, TEXTS)


# Columns


def text_lists(table: Table, name: str) -> pa.ChunkedArray:
    """Take a column as lists of texts, a list per row: large_list<large_string>.

    A cell is a text, a list of texts, or a struct with a field raw, caption, sentence or text; a
    missing one is an empty list.

    Raises:
        DataError: the column is of another type, or a row is not UTF-8.
    """
    pieces = [_lists(table, name, piece) for piece in table.columns[name].chunks]
    return pa.chunked_array(pieces, TEXTS)


def texts(table: Table, name: str) -> Iterator[str]:
    """Yield a column's texts, one per row, stripped; "" for what is missing, blank or NaN.

    Raises:
        DataError: the column is of another type, a cell holds several texts or a fraction, or a row
            is not UTF-8.
    """
    for row, piece in enumerate(lists_in(text_lists(table, name))):
        if len(piece) > 1:
            raise DataError(
                f"{table.path}, {table.where(row)}: column {name} holds {len(piece)} values "
                f"({piece[0]!r}, …); needed: one per row"
            )
        yield piece[0].strip() if piece else ""


def _lists(table: Table, name: str, piece: pa.Array) -> pa.Array:
    kind = piece.type
    if pa.types.is_dictionary(kind):
        return _lists(table, name, piece.dictionary_decode())
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _flattened(table, name, piece)
    flat = _flat(table, name, piece)
    counts = pa.compute.is_valid(flat).to_numpy(zero_copy_only=False)
    return _grouped(counts.astype(np.int64), flat.drop_null())


def _flattened(table: Table, name: str, piece: pa.Array) -> pa.Array:
    """Join lists (of texts, of structs, of lists) into a list of texts per row."""
    outer = pa.compute.fill_null(pa.compute.list_value_length(piece), 0)
    inner = _lists(table, name, piece.flatten())
    sizes = pa.compute.list_value_length(inner).to_numpy(zero_copy_only=False)
    ends = np.concatenate([[0], np.cumsum(sizes)])
    stops = np.cumsum(outer.to_numpy(zero_copy_only=False).astype(np.int64))
    starts = np.concatenate([[0], stops])[:-1].astype(np.int64)
    return _grouped(ends[stops] - ends[starts] if len(stops) else stops, inner.flatten())


def _grouped(counts: Any, values: pa.Array) -> pa.Array:
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return pa.LargeListArray.from_arrays(
        pa.array(offsets, pa.int64()), values.cast(pa.large_string())
    )


def _flat(table: Table, name: str, piece: pa.Array) -> pa.Array:
    """Take a column of one value per row as large_string, null where there is none."""
    kind = piece.type
    if pa.types.is_struct(kind):
        field_name = next((each for each in _TEXT_FIELDS if kind.get_field_index(each) >= 0), None)
        if field_name is not None:
            inner = pa.compute.struct_field(piece, field_name)
            return _flat(table, name, inner)
    if pa.types.is_floating(kind):
        return pa.array(
            [_whole(table, name, row, value) for row, value in enumerate(piece.to_pylist())],
            pa.large_string(),
        )
    text = (
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or str(kind) == "string_view"
        or pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
    )
    if not (
        text or pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind)
    ):
        raise DataError(
            f"{table.path}: column {name} holds {kind}; needed: a text per row, a list of texts, or a "
            "number"
        )
    try:
        values = piece.cast(pa.large_string())
        values.validate(full=True)
    except pa.ArrowInvalid:
        raise _not_utf8(table, name, piece) from None
    return values


def _whole(table: Table, name: str, row: int, value: float | None) -> str | None:
    if value is None or math.isnan(value):
        return None
    if not float(value).is_integer():
        raise DataError(
            f"{table.path}: column {name} holds {value!r} ({table.where(row)} or later); needed: a text "
            "or a whole number"
        )
    return str(int(value))


def _not_utf8(table: Table, name: str, piece: pa.Array) -> DataError:
    """Find the first row whose bytes are no text."""
    for row, value in enumerate(piece.cast(pa.large_binary())):
        content = value.as_py()
        try:
            (content or b"").decode()
        except UnicodeDecodeError as error:
            before = 0
            for other in table.columns[name].chunks:
                if other.equals(piece):
                    break
                before += len(other)
            return DataError(
                f"{table.path}, {table.where(before + row)}: column {name} is not UTF-8 text "
                f"({error.reason}): {plain(content[:60].decode('utf-8', 'backslashreplace'))}"
            )
    return DataError(f"{table.path}: column {name} is not UTF-8 text")
