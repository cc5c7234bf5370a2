"""Lists, JSON and MATLAB files of public data sets, read into plain values or refused.

Pickles are read by `pymcip.benchmarks.unpickling`. `title` is the data set's, for messages.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pymcip.data.sources import some
from pymcip.errors import DataError, MissingDependencyError

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


def read_text(path: Path, title: str) -> str:
    """Read a text file of UTF-8, with or without a byte-order mark.

    Raises:
        DataError: it is missing, or no such text.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(
            f"{title}: {path} is missing; the data set comes with it. Get it from where the images "
            "come from"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{title}: {path} can't be read as UTF-8 text: {error}. Get the file again"
        ) from error


def read_lines(path: Path, title: str) -> list[str]:
    """Read the lines of a text file, without their ends; raises what `read_text` raises."""
    return read_text(path, title).splitlines()


def read_keyed(
    path: Path,
    title: str,
    parse: Callable[[str], tuple[Key, Value] | None],
    needed: str,
    *,
    header: str = "",
) -> dict[Key, Value]:
    """Read lines of a key and a value, in the order of the file; blank ones and `header` are skipped.

    `parse` makes key and value of a line, and None of one that is not of the form `needed`.

    Raises:
        DataError: lines of another form, a key twice, no lines, or the file is no UTF-8 text.
    """
    found: dict[Key, Value] = {}
    problems = []
    for number, text in enumerate(read_lines(path, title), start=1):
        line = text.strip()
        if line in ("", header):
            continue
        pair = parse(line)
        if pair is None:
            problems.append(f"line {number}: {line[:60]!r}")
        elif pair[0] in found:
            problems.append(f"line {number}: {pair[0]} for the second time")
        else:
            found[pair[0]] = pair[1]
    if problems or not found:
        raise DataError(f"{title}: {path}: {some(problems) or 'no lines'}; needed: {needed}")
    return found


def read_numbered(path: Path, title: str) -> dict[int, str]:
    """Read lines `number text` as `read_keyed` does, which says what is raised."""

    def parse(line: str) -> tuple[int, str] | None:
        number, _, text = line.partition(" ")
        return (int(number), text.strip()) if number.isdecimal() and text.strip() else None

    return read_keyed(path, title, parse, "a number and a text in each line, each number once")


def read_json(path: Path, title: str) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        DataError: it can't be read, or holds something else.
    """
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(
            f"{title}: {path} can't be read as JSON: {error}. Get the file again"
        ) from error
    if not isinstance(document, dict):
        raise DataError(
            f"{title}: {path} holds a {type(document).__name__}; needed: an object. Get the file again"
        )
    return document


def load_mat(
    path: Path, title: str, wanted: Sequence[str], advice: str, *, squeeze: bool = False
) -> dict[str, Any]:
    """Read variables of a MATLAB file up to version 7.

    Args:
        path: the file.
        title: the data set's.
        wanted: names of the variables.
        advice: the end of the message if it can't be read.
        squeeze: drop axes of length 1.

    Raises:
        MissingDependencyError: scipy can't be imported.
        DataError: it is no such file, or a variable is missing.
    """
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise MissingDependencyError(
            f"{title}: {path.name} needs scipy, which can't be imported ({error}); run: pip install "
            '"pymcip[benchmarks]"'
        ) from error
    try:
        table: dict[str, Any] = loadmat(path, variable_names=list(wanted), squeeze_me=squeeze)
    except Exception as error:  # scipy raises errors of many types on damaged files
        raise DataError(
            f"{title}: {path} can't be read as a MATLAB file of version 7 or lower "
            f"({type(error).__name__}: {error}); {advice}"
        ) from error
    absent = [name for name in wanted if name not in table]
    if absent:
        raise DataError(f"{title}: {path} has no {' and no '.join(absent)}; {advice}")
    return table
