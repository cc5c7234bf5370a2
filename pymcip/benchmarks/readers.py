"""Lists, JSON and MATLAB files of public data sets, read into plain values or refused.

Pickles are read by `pymcip.benchmarks.unpickling`. `title` is the data set's, for messages.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pymcip.data.sources import some
from pymcip.errors import DataError, MissingDependencyError


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


def read_numbered(path: Path, title: str) -> dict[int, str]:
    """Read lines `number text`, in the order of the file.

    Raises:
        DataError: lines are of another form, numbers repeat, or the file is no UTF-8 text.
    """
    found: dict[int, str] = {}
    problems = []
    for row, line in enumerate(read_lines(path, title), start=1):
        number, _, text = line.strip().partition(" ")
        if not line.strip():
            continue
        if not number.isdecimal() or not text.strip():
            problems.append(f"line {row} is {line!r:.60}, needed: a number and a text")
        elif int(number) in found:
            problems.append(f"line {row}: {number} is there already")
        else:
            found[int(number)] = text.strip()
    if problems or not found:
        raise DataError(f"{title}: {path}: {some(problems) or 'it is empty'}; get it again")
    return found


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
