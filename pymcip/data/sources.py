"""From a source (a path, a pattern, a folder) to the files it means, and tables as Arrow.

Nothing here knows about images or captions: `images` and `captions` build on it.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from pymcip.configs import Source, Sources
from pymcip.errors import DataError

COMPRESSIONS = (".gz", ".zst", ".bz2")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
TABLES = (*DELIMITERS, ".parquet")
_NAMED = 5  # how many offenders an error names
_MOST_EXPANDED = 1_000_000
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{},]*(?:,[^{},]*)+)\}")


def as_list(sources: Sources | list[Source]) -> list[Source]:
    """Make a list of one source or of several."""
    return list(sources) if isinstance(sources, (tuple, list)) else [sources]


def some(names: Iterable[object], count: int | None = None) -> str:
    """Name the first few of many for a message: "a, b, c … (12 in all)"."""
    listed = [str(name) for name in names]
    count = len(listed) if count is None else count
    text = ", ".join(listed[:_NAMED])
    return text if count <= _NAMED else f"{text} … ({count} in all)"


def suffix(path: Path) -> str:
    """The lower-case extension of a file; `.gz` and the like are left off."""
    suffixes = [part.lower() for part in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def natural(path: Path | str) -> list[tuple[int, int, str]]:
    """Sort key that puts `part2` before `part10`."""
    pieces = re.split(r"(\d+)", str(path))
    return [(0, int(text), text) if text.isdigit() else (1, 0, text) for text in pieces]


def expand_braces(pattern: str) -> list[str]:
    """Expand `{000..078}` and `{a,b}` as a shell does: several braces give every combination."""
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    first, last, listed = match.groups()
    if listed is not None:
        choices = listed.split(",")
    else:
        step = 1 if int(first) <= int(last) else -1
        numbers = range(int(first), int(last) + step, step)
        if len(numbers) > _MOST_EXPANDED:
            raise DataError(
                f"{pattern} stands for {len(numbers)} files; allowed: up to {_MOST_EXPANDED}"
            )
        padded = any(len(text) > 1 and text.startswith("0") for text in (first, last))
        width = max(len(first), len(last)) if padded else 0
        choices = [str(number).zfill(width) for number in numbers]
    rest = expand_braces(pattern[match.end() :])
    return [pattern[: match.start()] + choice + tail for choice in choices for tail in rest]


def find(source: Source) -> list[Path]:
    """List the files or folders that a path, brace pattern or glob pattern names; all exist.

    Raises:
        DataError: one of them is missing, or the source is not on a local disk.
    """
    text = os.fspath(source)
    if "://" in text or text.startswith("pipe:"):
        raise DataError(
            f"{text} is not a local path; allowed: a file, a folder, or a pattern such as "
            "data/{000000..000078}.tar. Download the data first"
        )
    path = Path(text).expanduser()
    if path.exists():
        return [path]
    found: list[Path] = []
    missing = []
    for pattern in expand_braces(str(path)):
        if glob.has_magic(pattern):
            matches = sorted(map(Path, glob.glob(pattern, recursive=True)), key=natural)  # noqa: PTH207
        else:
            matches = [Path(pattern)] if Path(pattern).exists() else []
        found += matches
        if not matches:
            missing.append(pattern)
    if missing:
        raise DataError(
            f"there is nothing at {some(missing)}; the path is relative to {Path.cwd()}. "
            "Give an existing file, folder or pattern"
        )
    return found


def folder_files(folder: Path, extensions: Sequence[str]) -> list[Path]:
    """List a folder's own visible files with one of the extensions, in natural order."""
    files = [
        path
        for path in folder.iterdir()
        if suffix(path) in extensions and not path.name.startswith(".") and path.is_file()
    ]
    return sorted(files, key=natural)


def open_text(path: Path) -> pa.NativeFile:
    """Open a file for reading bytes, decompressed if its name ends in .gz, .zst or .bz2."""
    return pa.input_stream(str(path), compression="detect", buffer_size=1 << 20)


def parquet_columns(path: Path) -> list[str]:
    """Return the names of a parquet file's columns.

    Raises:
        DataError: it is no parquet file.
    """
    try:
        names: list[str] = pyarrow.parquet.read_schema(path).names
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} can't be read as PARQUET: {error}") from error
    return names


def read_table(path: Path, text_columns: Iterable[str]) -> pa.Table:
    """Read a CSV or TSV file (with a header and CSV quoting) or a parquet file.

    Of a parquet file only the columns named in `text_columns` are read; of a CSV or TSV file all,
    and those columns stay text ("007" is not turned into 7).

    Raises:
        DataError: the file can't be parsed.
    """
    text_columns = list(text_columns)
    try:
        if suffix(path) == ".parquet":
            wanted = [name for name in parquet_columns(path) if name in text_columns]
            return pyarrow.parquet.read_table(path, columns=wanted)
        with open_text(path) as stream:
            return pyarrow.csv.read_csv(
                stream,
                parse_options=pyarrow.csv.ParseOptions(
                    delimiter=DELIMITERS[suffix(path)], newlines_in_values=True
                ),
                convert_options=pyarrow.csv.ConvertOptions(
                    column_types=dict.fromkeys(text_columns, pa.string())
                ),
            )
    except (pa.ArrowInvalid, pa.ArrowTypeError, OSError) as error:
        raise DataError(f"{path} can't be read as {suffix(path)[1:].upper()}: {error}") from error
