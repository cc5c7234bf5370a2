"""Caption corpora on disk: text, TSV, CSV, parquet and tar shards, each distinct caption once."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute

from pymcip.configs import Source, Sources
from pymcip.data import shards
from pymcip.data.sources import (
    DELIMITERS,
    as_list,
    find,
    folder_files,
    open_text,
    parquet_columns,
    read_table,
    some,
    suffix,
)
from pymcip.errors import DataError
from pymcip.progress import progress

CAPTION_COLUMNS = ("caption", "title", "text")
SUFFIXES = (".txt", *DELIMITERS, ".parquet", ".tar")
_LINES_AT_A_TIME = 100_000

_log = logging.getLogger("pymcip.data")


class Captions:
    """Distinct captions, in the order of their first occurrence. Made by `load_captions`.

    Attributes:
        duplicates: how many rows were left out because the same text was there before.
    """

    def __init__(self, texts: Iterable[str] | pa.Array, duplicates: int = 0) -> None:
        column = texts if isinstance(texts, pa.Array) else pa.array(texts, pa.large_string())
        self._column = column
        self.duplicates = duplicates

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, index: int) -> str:
        return str(self._column[int(index)].as_py())

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _LINES_AT_A_TIME):
            yield from self.slice(start, start + _LINES_AT_A_TIME)

    def __repr__(self) -> str:
        return f"Captions({len(self)} texts, {self.duplicates} duplicates left out)"

    @property
    def texts(self) -> list[str]:
        """All captions as a new list; a corpus of many millions is better read by `slice`."""
        return self.slice(0, len(self))

    def slice(self, start: int, stop: int) -> list[str]:
        """Return the captions start to stop-1."""
        texts: list[str] = self._column.slice(start, max(0, stop - start)).to_pylist()
        return texts

    def fingerprint(self) -> str:
        """Identify the texts and their order, as SHA-256 in hex."""
        digest = hashlib.sha256()
        for start in range(0, len(self), _LINES_AT_A_TIME):
            digest.update(json.dumps(self.slice(start, start + _LINES_AT_A_TIME)).encode())
        return digest.hexdigest()


def load_captions(sources: Sources | list[Source]) -> Captions:
    """Read all captions of one source or of several; exact duplicates are one row.

    A source is a file, a pattern (`{000000..000078}.tar`, `*.tsv`) or a folder of such files:

    - text, a caption per line;
    - TSV: without a header, a caption per line or CC12M's `url<TAB>caption`, taken as it stands;
      with a header that names a column `caption`, `title` or `text`, read with CSV quoting;
    - CSV or parquet with such a column;
    - tar shards with `txt` members (else the json's caption). In a folder, a shard that has a
      parquet file of the same name beside it (img2dataset's output) is not opened: the parquet
      file holds its captions, those of images that could not be downloaded included.

    Text files may be compressed (`.gz`, `.zst`, `.bz2`). White space around a caption is dropped,
    and so are blank captions.

    Raises:
        DataError: nothing is there, a file can't be read or has no such column, or there is no
            caption at all.
    """
    listed = as_list(sources)
    files = [path for source in listed for path in _files(source)]
    columns = [_read(path) for path in progress(files, description="reading captions", unit="file")]
    merged = pa.chunked_array(columns, pa.large_string())
    trimmed = pa.compute.utf8_trim_whitespace(merged)
    kept = trimmed.filter(pa.compute.greater(pa.compute.binary_length(trimmed), 0))
    distinct = pa.compute.unique(kept)
    if not len(distinct):
        raise DataError(f"{some(listed)}: there is not one caption; expected text, a line each")
    duplicates = len(kept) - len(distinct)
    if duplicates:
        _log.info(
            "%s: %d captions, %d duplicates left out", some(listed), len(distinct), duplicates
        )
    return Captions(distinct, duplicates)


def _files(source: Source) -> list[Path]:
    files: list[Path] = []
    for path in find(source):
        if path.is_dir():
            found = folder_files(path, SUFFIXES)
            tables = {file.stem for file in found if _has_captions(file)}
            found = [file for file in found if suffix(file) != ".tar" or file.stem not in tables]
            if not found:
                raise DataError(
                    f"the folder {path} holds no captions; expected files of the kinds "
                    f"{', '.join(SUFFIXES)}"
                )
            files += found
        elif suffix(path) in SUFFIXES:
            files.append(path)
        else:
            raise DataError(
                f"{path} is no caption file; allowed: {', '.join(SUFFIXES)}, the text ones also "
                "with .gz, .zst or .bz2"
            )
    return files


def _has_captions(path: Path) -> bool:
    if suffix(path) != ".parquet":
        return False
    return _caption_column(parquet_columns(path)) is not None


def _caption_column(names: Iterable[str]) -> str | None:
    lowered = {name.strip().lower(): name for name in names}
    return next((lowered[name] for name in CAPTION_COLUMNS if name in lowered), None)


def _read(path: Path) -> pa.Array:
    kind = suffix(path)
    if kind == ".tar":
        return pa.array(_shard_captions(path), pa.large_string())
    if kind == ".txt":
        return _concatenate(_lines(path))
    if kind == ".tsv":
        first = next(_lines(path), [])
        cells = first[0].split("\t") if first else []
        if _caption_column(cells) is None:
            return _concatenate(_raw_cells(path))
    return _table_captions(path)


def _table_captions(path: Path) -> pa.Array:
    if suffix(path) == ".parquet":
        names = parquet_columns(path)
    else:
        first = next(_lines(path), [""])
        delimiter = DELIMITERS[suffix(path)]
        names = [cell.strip().strip('"') for cell in first[0].split(delimiter)]
    column = _caption_column(names)
    if column is None:
        raise DataError(
            f"{path} has no column {', '.join(CAPTION_COLUMNS[:-1])} or {CAPTION_COLUMNS[-1]}; it "
            f"starts with {some(names)}. Give the caption column one of these names"
        )
    values = read_table(path, [column])[column]
    return values.cast(pa.large_string()).drop_null().combine_chunks()


def _lines(path: Path) -> Iterator[list[str]]:
    """Yield the lines of a text file in blocks, without their ends."""
    try:
        with open_text(path) as stream:
            rest = b""
            while block := stream.read(1 << 24):
                *lines, rest = (rest + block).split(b"\n")
                if lines:
                    yield [line.decode("utf-8-sig") for line in lines]
            if rest:
                yield [rest.decode("utf-8-sig")]
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}); convert it first") from error
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} can't be read: {error}") from error


def _raw_cells(path: Path) -> Iterator[list[str]]:
    """Yield the last cells of a TSV without header, as they stand; blank lines are dropped."""
    width = None
    number = 0
    for lines in _lines(path):
        captions = []
        for line in lines:
            number += 1
            cells = line.rstrip("\r").split("\t")
            if not line.strip():
                continue
            width = width or len(cells)
            if len(cells) != width or width > 2:
                raise DataError(
                    f"{path}, line {number}: {len(cells)} cells; expected "
                    + (f"{width} as in the first line" if width <= 2 else "url<TAB>caption")
                    + ", or a header that names a column caption, title or text"
                )
            captions.append(cells[-1])
        yield captions


def _concatenate(blocks: Iterable[list[str]]) -> pa.Array:
    arrays = [pa.array(block, pa.large_string()) for block in blocks]
    return pa.concat_arrays(arrays) if arrays else pa.array([], pa.large_string())


def _shard_captions(path: Path) -> Iterator[str]:
    with path.open("rb") as handle:
        for _, sample in shards.read_index(path):
            if "txt" in sample:
                yield shards.read_text(path, handle, sample["txt"])
            elif "json" in sample:
                yield from _json_caption(path, shards.read_text(path, handle, sample["json"]))


def _json_caption(path: Path, text: str) -> Iterator[str]:
    try:
        value: Any = json.loads(text)
    except ValueError as error:
        raise DataError(f"{path} holds a json member that is not JSON: {error}") from error
    column = _caption_column(value) if isinstance(value, dict) else None
    if column is not None and isinstance(value[column], str):
        yield value[column]
