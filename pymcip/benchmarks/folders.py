"""Folders of images as data sets are unpacked: what is in them, and which one is meant."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from pymcip.data.decode import image_suffixes
from pymcip.data.sources import some
from pymcip.errors import DataError
from pymcip.metrics.inputs import Int64
from pymcip.progress import progress


def list_entries(place: Path) -> tuple[list[str], list[str]]:
    """List a folder's visible folders and its images, sorted."""
    folders, files = [], []
    with os.scandir(place) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue  # .DS_Store and the like
            if os.path.splitext(entry.name)[1].lower() in image_suffixes():  # noqa: PTH122  a million
                files.append(entry.name)
            elif entry.is_dir():
                folders.append(entry.name)
    return sorted(folders), sorted(files)


def image_names(base: Path, below: str = "", *, deep: bool = False) -> Iterator[str]:
    """Yield the visible images of a folder, `/`-separated from `base`, in no particular order.

    With `below`, or `deep`, folders in it are entered.
    """
    pending = [below]
    while pending:
        inside = pending.pop()
        folders, files = list_entries(base / inside) if (base / inside).is_dir() else ([], [])
        yield from (f"{inside}/{name}".lstrip("/") for name in files)
        if below or deep:
            pending += [f"{inside}/{name}".lstrip("/") for name in folders]


def first_folder(
    folder: Path, names: Sequence[str], accepts: Callable[[Path], bool] = Path.is_dir
) -> Path:
    """Return the first of the folders below `folder` ("": itself) that is accepted, else `folder`."""
    return next((folder / name for name in names if accepts(folder / name)), folder)


def first_file(folders: Iterable[Path], name: str) -> Path | None:
    """Return the first file of this name in the folders; None if there is none."""
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def any_exists(folder: Path, names: Iterable[str]) -> bool:
    """Return whether the folder holds a file or folder of one of the names."""
    return any((folder / name).exists() for name in names)


def list_classes(
    place: Path, title: str, known: Sequence[str], stem: str | None
) -> tuple[list[str], Int64]:
    """List the images of a folder per class: names below `place`, and labels int64 [N].

    Args:
        place: holds the folders.
        title: the data set's, for messages.
        known: the folders' names in the order of the labels.
        stem: what images' names begin with, `{}` for the folder's; None: unknown folders are
            ignored.

    Raises:
        DataError: folders are unknown, images lie outside of them or have other names, or there are
            none.
    """
    folders, files = list_entries(place)
    unknown = [] if stem is None else sorted(set(folders) - set(known))
    problems = []
    if unknown:
        problems.append(f"folders that are none of its {len(known):,} classes: {some(unknown)}")
    if files:
        problems.append(f"images outside of the classes' folders: {some(files)}")
    names: list[str] = []
    sizes = []
    foreign: list[str] = []
    present = set(folders)
    listed = [(label, name) for label, name in enumerate(known) if name in present]
    for label, name in progress(listed, description=f"listing {title}", unit="folder"):
        _, found = list_entries(place / name)
        start = (stem or "").replace("{}", name)
        foreign += [f"{name}/{each}" for each in found if not each.startswith(start)]
        names += [f"{name}/{each}" for each in found]
        sizes.append((label, len(found)))
    if foreign:
        form = (stem or "").replace("{}", "SYNSET")
        problems.append(f"images whose names don't begin with {form}: {some(foreign)}")
    if not names:
        problems.append("no images in folders of its classes")
    if problems:
        raise DataError(
            f"{title}: {place} has {'; '.join(problems)}. Needed: a folder per class, such as "
            f"{known[0]}, with its images and nothing else; is this another data set or split?"
        )
    labels = np.repeat(
        np.array([label for label, _ in sizes], np.int64), [size for _, size in sizes]
    )
    return names, labels


def count_labels(labels: Int64) -> dict[str, int]:
    """Count images and classes, as `check_counts` takes them."""
    return {"images": len(labels), "classes": len(np.unique(labels))}
