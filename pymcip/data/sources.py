"""The files that a source (a path, a pattern, a folder) names.

Nothing here knows about images or captions: `images` and `captions` build on it.
"""

from __future__ import annotations

import glob
import logging
import os
import re
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path

from pymcip.configs import Source, Sources
from pymcip.errors import DataError

COMPRESSIONS = (".gz", ".zst", ".bz2")
_NAMED = 5  # how many offenders an error names
_MOST_EXPANDED = 1_000_000
_log = logging.getLogger("pymcip.data")
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
    """The lower-case extension of a file; `.gz` and other compressions are left off."""
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

    A file that several names lead to (a link, another spelling) is listed once.

    Raises:
        DataError: one of them is missing or no regular file (a pipe would never end), or the
            source is not on a local disk.
    """
    text = os.fspath(source)
    if "://" in text or text.startswith("pipe:"):
        raise DataError(
            f"{text} is not a local path; allowed: a file, a folder, or a pattern such as "
            "data/{000000..000078}.tar. Download the data first"
        )
    path = Path(text).expanduser()
    if os.path.lexists(path):
        return _regular([path])
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
    return _regular(found)


def _regular(paths: list[Path]) -> list[Path]:
    """Refuse what is neither a file nor a folder; list each file once."""
    found: dict[tuple[int, ...], Path] = {}
    for number, path in enumerate(paths):
        try:
            status = path.stat()
        except OSError as error:
            raise DataError(f"{path} can't be opened: {error.strerror}") from error
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            raise DataError(f"{path} is neither a file nor a folder; write its content to a file")
        # Some file systems have no inodes: each file is itself there.
        place = (status.st_dev, status.st_ino) if status.st_ino else (-1, number)
        first = found.setdefault(place, path)
        if first is not path:
            _log.warning("%s is the same file as %s and is read once", path, first)
    return list(found.values())


def folder_files(folder: Path, extensions: Sequence[str]) -> list[Path]:
    """List a folder's own visible files with one of the extensions, in natural order."""
    files = [
        path
        for path in folder.iterdir()
        if suffix(path) in extensions and not path.name.startswith(".") and path.is_file()
    ]
    return sorted(files, key=natural)
