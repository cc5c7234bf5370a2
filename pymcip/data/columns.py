"""Parquet files, and columns of any type as texts."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet

from pymcip.data.labels import plain
from pymcip.data.tables import Choose, Table
from pymcip.errors import DataError

_ROWS = 8192  # lists at a time
TEXTS = pa.large_list(pa.large_string())
_STRINGS = ("string", "large_string", "string_view")
_TEXT_FIELDS = ("raw", "caption", "sentence", "text", "path")  # of a struct that stands for a text


def read_parquet(path: Path, choose: Choose) -> Table:
    """Read the wanted columns of a parquet file.

    Raises:
        DataError: it is no parquet file.
    """
    names = parquet_columns(path)
    wanted = list(choose(names))
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
        DataError: a cell is of another type, or not UTF-8.
    """
    pieces: list[pa.Array] = []
    for piece in table.columns[name].chunks:
        if pa.types.is_dictionary(piece.type):
            piece = piece.dictionary_decode()
        flat = _flat(piece)
        if flat is not None:
            counts = pa.compute.is_valid(flat).to_numpy(zero_copy_only=False)
            pieces.append(grouped(counts.astype(np.int64), flat.drop_null()))
            continue
        if str(piece.type) in _STRINGS:
            piece = piece.cast(pa.large_binary())  # to find what is not UTF-8
        first = sum(map(len, pieces))
        cells = enumerate(piece.to_pylist(), start=first)
        pieces.append(pa.array([_cell_texts(table, name, *cell) for cell in cells], TEXTS))
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


def grouped(counts: npt.NDArray[np.int64], values: pa.Array) -> pa.Array:
    """Make lists of texts of the values, of which list i has the next counts[i]."""
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), values)


def _flat(piece: pa.Array) -> pa.Array | None:
    """Cast texts, whole numbers and truth values to large_string at once; None where that fails."""
    kind = piece.type
    whole = pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind)
    if not (whole or str(kind) in _STRINGS):
        return None
    try:
        values = piece.cast(pa.large_string())
        values.validate(full=True)
    except pa.ArrowInvalid:
        return None
    return values


def _cell_texts(table: Table, name: str, row: int, cell: Any) -> list[str]:
    """Take a cell of any type as texts."""
    if isinstance(cell, dict):
        cell = next((cell[field] for field in _TEXT_FIELDS if field in cell), cell)
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return []
    if isinstance(cell, list):
        return [text for each in cell for text in _cell_texts(table, name, row, each)]
    if isinstance(cell, (str, int)):
        return [str(cell)]
    if isinstance(cell, float) and cell.is_integer():
        return [str(int(cell))]
    where = f"{table.path}, {table.where(row)}: column {name}"
    if isinstance(cell, bytes):
        try:
            return [cell.decode()]
        except UnicodeDecodeError as error:
            shown = plain(cell[:60].decode("utf-8", "backslashreplace"))
            raise DataError(f"{where} is not UTF-8 text ({error.reason}): {shown}") from error
    shown = repr(cell) if isinstance(cell, float) else table.columns[name].type
    raise DataError(
        f"{where} holds {shown}; needed: a text per row, a list of texts, or a whole number"
    )
