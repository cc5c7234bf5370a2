"""By which names the columns of a table are recognised, and names that the user gives."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from pymcip.data.sources import some
from pymcip.errors import DataError, did_you_mean

FILE_COLUMNS = (
    "filepath", "file_path", "file_name", "filename", "image_path", "image_name", "img_path", "path",
    "image", "img",
)  # fmt: skip
LABEL_COLUMNS = ("label", "cls", "class", "class_name")
CAPTION_COLUMNS = ("caption", "title", "text", "comment", "sentence", "raw")
_ROLES = {"filepath": FILE_COLUMNS, "label": LABEL_COLUMNS, "caption": CAPTION_COLUMNS}
_NUMBERED = re.compile(r"(.*?)s?(_raw|_?\d+)?")


@dataclass
class _Given:
    """The user's names by role, those that were found, and all names of the tables."""

    names: Mapping[str, str]
    found: set[str] = field(default_factory=set)
    seen: dict[str, None] = field(default_factory=dict)


_GIVEN: ContextVar[_Given | None] = ContextVar("columns", default=None)


@contextmanager
def columns_named(columns: Mapping[str, object]) -> Iterator[None]:
    """Recognise columns of tables that are read in the block by the user's names too.

    Args:
        columns: names by role ("filepath", "label", "caption"). In a table that has one of them, no
            other column has its role.

    Raises:
        DataError: at the end, no table had a column of one of the names.
    """
    given = _Given({role: str(name) for role, name in columns.items()})
    token = _GIVEN.set(given if columns else None)
    try:
        yield
    finally:
        _GIVEN.reset(token)
    for role, name in given.names.items():
        if name not in given.found:
            raise DataError(
                f"columns: no table (CSV, TSV, parquet) has a column {name!r}, to be read as {role}; "
                f"there are {some(given.seen)}{did_you_mean(name, given.seen)}"
            )


def key_of(name: str) -> str:
    """What a column is recognised by: its name in lower case, without white space around it."""
    return _bare(name).lower()


def keys_of(names: Sequence[str]) -> list[str]:
    """The keys of a table's columns; those that the user names have the key of their role."""
    keys = list(map(key_of, names))
    given = _GIVEN.get()
    if given is None:
        return keys
    bare = list(map(_bare, names))
    given.seen |= dict.fromkeys(bare)
    for role, name in given.names.items():
        if name in bare:
            given.found.add(name)
            keys = ["" if _role_of(key) == role else key for key in keys]
            keys = [role if each == name else key for each, key in zip(bare, keys, strict=True)]
    return keys


def columns_of(names: Sequence[str], known: Sequence[str]) -> list[str]:
    """The columns that have one of the known keys, in the order of the keys; the leftmost of each."""
    columns = dict(reversed(list(zip(keys_of(names), names, strict=True))))
    return [columns[key] for key in known if key in columns]


def first_of(names: Sequence[str], known: Sequence[str]) -> str | None:
    """The first of these columns, if there is one."""
    return next(iter(columns_of(names, known)), None)


def caption_columns(names: Sequence[str], *, every: bool) -> list[str]:
    """The columns of captions: those of the first kind, or with `every` title and caption."""
    found: dict[str, list[str]] = {}
    for key, name in zip(keys_of(names), names, strict=True):
        match = _NUMBERED.fullmatch(key)
        if match and match[1] in CAPTION_COLUMNS:
            found.setdefault(match[1], []).append(name)
    both = [*found.get("title", []), *found.get("caption", [])] if every else []
    return both or next((found[kind] for kind in CAPTION_COLUMNS if kind in found), [])


def _bare(name: str) -> str:
    return name.strip().strip("\ufeff")


def _role_of(key: str) -> str | None:
    match = _NUMBERED.fullmatch(key)
    if match and match[1] in CAPTION_COLUMNS:
        return "caption"
    return next((role for role, known in _ROLES.items() if key in known), None)
