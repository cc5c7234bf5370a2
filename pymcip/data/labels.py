"""What is a class, and what only looks like one: folder names, label texts, and how they are joined."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable

from pymcip.data.sources import some

# Folders that systems and tools put beside a user's files; so are names that begin with a dot.
_IGNORED_FOLDERS = {
    "@eadir", "@recently-snapshot", "@recycle", "@tmp", "#recycle", "#snapshot", "$recycle.bin",
    "__macosx", "__pycache__", "lost+found", "system volume information",
}  # fmt: skip
_IGNORED_FILES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}
_TRAINING = re.compile(r"(train|training)([-_]?\d+)?")
_TESTING = re.compile(r"(val|valid|validation|test|testing|dev|eval|holdout)([-_]?\d+|[-_]dev)?")
_MISSING = {"", "nan", "NaN", "<NA>", "NaT"}  # as pandas and NumPy write a missing value
_SHARD = re.compile(r"\d{5,}")


def plain(text: str) -> str:
    """Return a text as it can be written: bytes that are not UTF-8 are escaped."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "backslashreplace").decode()
    return text


def class_name(text: str) -> str:
    """Return a label as classes are joined by: in Unicode's form NFC, without space at its ends."""
    return plain(unicodedata.normalize("NFC", text).strip().strip("\ufeff").strip())


def label_of(text: str | None) -> str | None:
    """Return the class that a cell, a cls member or a JSON value names; None if none."""
    name = "" if text is None else class_name(text)
    return None if name in _MISSING else name


def is_ignored(name: str) -> bool:
    """Return whether a file or folder is a system's or a tool's own, not the user's."""
    lowered = name.lower()
    return name.startswith(".") or lowered in _IGNORED_FOLDERS or lowered in _IGNORED_FILES


def splits_among(names: Iterable[str]) -> list[str]:
    """Return the names that are splits, such as train and val; [] if the names may be classes.

    They are splits if all of them are named so, or if one is named as training data and another one
    as data to test with.
    """
    listed = list(names)
    training = [name for name in listed if _TRAINING.fullmatch(name.lower())]
    testing = [name for name in listed if _TESTING.fullmatch(name.lower())]
    found = [name for name in listed if name in {*training, *testing}]
    return found if len(found) == len(listed) or (training and testing) else []


def are_shards(folders: Collection[str], files: Collection[str], *, described: bool) -> bool:
    """Return whether folders are img2dataset's shards, as it writes files: 00000, 00001, …

    Args:
        folders: names of the folders that hold images.
        files: names of the files beside them.
        described: every image has a json beside it.
    """
    known = {name.split(".")[0].removesuffix("_stats") for name in files}
    return bool(folders) and all(
        _SHARD.fullmatch(name) and (described or name in known) for name in folders
    )


def difference(first: str, names: Collection[str], second: str, others: Collection[str]) -> str:
    """Say which classes only one side has: how many, the first five; "" if both have the same."""
    parts = []
    for name, own, other in ((first, names, others), (second, others, names)):
        known = set(other)
        only = [each for each in own if each not in known]
        if only:
            parts.append(
                f"{len(only)} of the {len(own)} classes of {name} only: {some(map(repr, only))}"
            )
    return "; ".join(parts)
