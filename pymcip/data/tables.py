"""Text as it lies on the disk: encodings, lines, delimiters and quoting; what a table is, and what it says about images.

What a table is about is for `annotations` to say; here are lines and cells, each with its place.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import re
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pyarrow as pa

from pymcip.data.compact import Labels, Names
from pymcip.data.tally import LeftOut
from pymcip.errors import DataError

_BLOCK = 1 << 24  # bytes of text that are read together
_ROWS = 100_000  # rows that become a piece of a column together

# Of a table: which of its columns are wanted.
Choose = Callable[[Sequence[str]], Sequence[str]]


@dataclass
class Table:
    """The wanted columns of a table.

    Attributes:
        path: the file.
        kind: what it was read as, in words.
        names: of all columns.
        columns: the wanted ones, Arrow arrays of any type.
        lines: the line on which each row begins, or none of a table without lines.
        repeated: the lines of headers between the rows, which are no rows.
    """

    path: Path
    kind: str
    names: list[str]
    columns: dict[str, pa.ChunkedArray]
    lines: array[int] = field(default_factory=lambda: array("q"))
    repeated: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()))) if self.columns else 0

    def where(self, row: int) -> str:
        """Say where a row is in the file."""
        return f"line {self.lines[row]}" if self.lines else f"row {row + 1}"


@dataclass
class Annotations:
    """What a file says about images, row by row.

    Attributes:
        path: the file.
        kind: what it was taken for, in words.
        captions: large_list<large_string> [N]: the captions of each row.
        files: the image of each row, "" where a row has none; or None: no row has one.
        labels: the class of each row.
        where: says where a row is in the file.
        left_out: rows that are no rows.
        names: of all columns, of a table.
        content: the column that holds the images themselves; None: there is none.
    """

    path: Path
    kind: str
    captions: pa.ChunkedArray
    files: Names | None
    labels: Labels
    where: Callable[[int], str]
    left_out: list[LeftOut] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    content: str | None = None


# Lines


def open_text(path: Path) -> pa.NativeFile:
    """Open a file for reading bytes, decompressed if its name ends in .gz, .zst or .bz2."""
    return pa.input_stream(str(path), compression="detect", buffer_size=1 << 20)


def read_lines(path: Path) -> Iterator[list[str]]:
    r"""Yield the lines of a text file in blocks, without their ends and byte-order marks.

    It is UTF-8, or UTF-16 with a byte-order mark. Lines end with "\n" or "\r\n", or with "\r" where
    there is no other end; other line breaks of Unicode are part of a line.

    Raises:
        DataError: it is no such text (the message names the first line), or can't be read.
    """
    number = 0
    try:
        with open_text(path) as stream:
            block = stream.read(_BLOCK)
            decoder = codecs.getincrementaldecoder(_encoding(path, block))()
            mac = b"\r" in block and b"\n" not in block
            rest = ""
            while True:
                try:
                    text = rest + decoder.decode(block, final=not block)
                except UnicodeDecodeError as error:
                    line = number + 1 + error.object[: error.start].count(b"\n")
                    raise DataError(
                        f"{path} is not UTF-8 text (line {line}: {error.reason}); convert it first"
                    ) from error
                *lines, rest = text.replace("\r", "\n").split("\n") if mac else text.split("\n")
                if not block and rest:
                    lines.append(rest)
                if "\0" in text:
                    first = next((i for i, line in enumerate(lines) if "\0" in line), len(lines))
                    raise DataError(
                        f"{path}, line {number + first + 1} holds a zero byte; it is damaged, or no text"
                    )
                if lines:
                    number += len(lines)
                    yield [line.removesuffix("\r").lstrip("\ufeff") for line in lines]
                if not block:
                    return
                block = stream.read(_BLOCK)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} can't be read: {error}") from error


def _encoding(path: Path, start: bytes) -> str:
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    sample = start[:4096]
    if sample.count(b"\0") * 4 > len(sample):
        raise DataError(
            f"{path} seems to be UTF-16 or UTF-32 without a byte-order mark, or no text; save it as "
            "UTF-8"
        )
    return "utf-8"


def first_lines(path: Path, count: int) -> list[str]:
    """Return the first lines that are not blank; raises what `read_lines` raises."""
    found: list[str] = []
    for lines in read_lines(path):
        found += [line for line in lines[: 4 * count] if line.strip()]
        if len(found) >= count:
            break
    return found[:count]


# Delimited text


def split_line(line: str, delimiter: str) -> list[str]:
    """Split one line into stripped cells; quotes are taken off where all of them are closed."""
    try:
        cells = next(csv.reader([line], delimiter=delimiter, strict=True), [])
    except csv.Error:
        cells = line.split(delimiter)
    return [cell.strip() for cell in cells]


def read_delimited(
    path: Path,
    delimiter: str,
    choose: Choose,
    header: Sequence[str] = (),
    *,
    how: Literal["any", "lines", "rest"] = "any",
    cells: Mapping[str, re.Pattern[str]] | None = None,
) -> Table:
    """Read the wanted columns of a text table.

    It is read with quoting if every quote that opens a cell is closed before a delimiter or the end
    of a line, else each line is a row and quotes are text. A quoted cell of several lines is taken
    only where the file is quoted beyond doubt.

    Args:
        path: the file.
        delimiter: between cells.
        choose: which of the columns' names are wanted.
        header: names of the columns; default: the first line has them.
        how: "lines": there is no quoting. "rest": each line is a row, and its last cell the rest of
            the line, in quotes or not.
        cells: of columns by name, what each of their cells must be.

    Raises:
        DataError: a line has another number of cells than the header or one that is not as it must
            be, or it can't be said whether a cell of several lines is one.
    """
    checked = cells or {}
    if how == "any":
        with contextlib.suppress(csv.Error):
            return _read_rows(path, delimiter, choose, list(header), "quoted", checked)
        how = "lines"
    return _read_rows(path, delimiter, choose, list(header), how, checked)


def _records(path: Path, delimiter: str, how: str, width: int) -> Iterator[tuple[int, list[str]]]:
    """Yield rows of stripped cells, each with the number of its last line."""
    lines = (line for block in read_lines(path) for line in block)
    if how == "quoted":
        reader = csv.reader((f"{line}\n" for line in lines), delimiter=delimiter, strict=True)
        for row in reader:
            width = width or len(row)
            if width == 1 < len(row):  # one column has no delimiter: the line is the cell
                raise csv.Error
            yield reader.line_num, [cell.strip() for cell in row]
        return
    for number, line in enumerate(lines, start=1):
        width = width or (line.count(delimiter) + 1 if line.strip() else 0)
        cells = line.split(delimiter, width - 1) if how == "rest" or width == 1 else None
        cells = [cell.strip() for cell in cells or line.split(delimiter)]
        if (
            (how == "rest" or width == 1)
            and len(cells[-1]) > 1
            and cells[-1][0] == cells[-1][-1] == '"'
        ):
            inner = cells[-1][1:-1].replace('""', "")
            if '"' not in inner:
                cells[-1] = cells[-1][1:-1].replace('""', '"').strip()
        yield number, cells


def _read_rows(
    path: Path,
    delimiter: str,
    choose: Choose,
    header: list[str],
    how: str,
    checked: Mapping[str, re.Pattern[str]],
) -> Table:
    """Read a table; raises csv.Error if it is not quoted as it must be for "quoted"."""
    records = _records(path, delimiter, how, len(header))
    last = 0  # line that has been read
    if not header:
        last, header = next((record for record in records if any(record[1])), (0, []))
    places = {name: header.index(name) for name in (choose(header) if header else ())}
    patterns = [(header.index(name), pattern) for name, pattern in checked.items()]
    kind = _NAMES.get(delimiter, delimiter)
    table = Table(path, f"{kind}, {'quoted' if how == 'quoted' else 'without quoting'}", header, {})
    pending: dict[str, list[str]] = {name: [] for name in places}
    pieces: dict[str, list[pa.Array]] = {name: [] for name in places}

    def take_pending() -> None:
        for name, column in pending.items():
            pieces[name].append(pa.array(column, pa.large_string()))
            column.clear()

    several = 0  # the first line of the first cell that has several
    for number, cells in records:
        first, last = last + 1, number
        if not any(cells):
            continue
        if len(cells) != len(header):
            raise _ragged(path, delimiter, first, len(cells), len(header))
        if cells == header:
            if first > 1:
                table.repeated.append(first)
            continue
        for place, pattern in patterns:
            if not pattern.fullmatch(cells[place]):
                raise DataError(
                    f"{path}, line {first}: {cells[place]!r:.60} is no {header[place]}, as in the other "
                    "lines; correct it, put cells that hold the delimiter into quotes, or give the file a header"
                )
        if number > first and not several:
            several = first
        table.lines.append(first)
        for name, place in places.items():
            pending[name].append(cells[place])
        if len(table.lines) % _ROWS == 0:
            take_pending()
    if several and not _surely_quoted(path, delimiter, len(header)):
        raise DataError(
            f"{path}, line {several}: a quote opens a cell that closes on another line, and nothing "
            "else in the file is quoted; double the quotes and put all cells with quotes into "
            "quotes, or write it as parquet"
        )
    take_pending()
    table.columns = {
        name: pa.chunked_array(parts, pa.large_string()) for name, parts in pieces.items()
    }
    return table


_NAMES = {",": "CSV", "\t": "TSV"}


def _ragged(path: Path, delimiter: str, line: int, found: int, expected: int) -> DataError:
    return DataError(
        f"{path} can't be read as {_NAMES.get(delimiter, f'a table with {delimiter!r}')}: line {line}: "
        f"Expected {expected} columns as in the header, got {found}. Put cells that hold the "
        "delimiter, a quote or a line break into quotes"
    )


def _surely_quoted(path: Path, delimiter: str, width: int) -> bool:
    """Return whether lines can only be read with quoting, or something else than they shows it."""
    d = re.escape(delimiter)
    shown = re.compile(rf'(?:^|{d})"(?:[^"]|"")*(?:{d}|"")(?:[^"]|"")*"(?={d}|$)')
    uneven = False
    for number, line in enumerate((line for block in read_lines(path) for line in block), start=1):
        if number == 1 and line.startswith('"') and line.endswith('"'):
            return True  # a writer that quotes headers quotes everything
        if '"' in line and shown.search(line):
            return True
        uneven |= bool(line.strip()) and line.count(delimiter) + 1 != width
    return uneven
