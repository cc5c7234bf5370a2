"""One image per file: rows that lead to the same file are one image with several captions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute

from pymcip.data.columns import column_of, has_texts, lists_in
from pymcip.data.compact import Labels, Names
from pymcip.data.labels import plain
from pymcip.data.sources import some
from pymcip.data.stores import FileStore, Store
from pymcip.data.tally import Tally
from pymcip.data.walk import States
from pymcip.errors import DataError


@dataclass
class Indexed:
    """The images of one source, their labels, and what was left out.

    Attributes:
        store: where they lie.
        labels: of each.
        tally: what was left out.
        where: says of each where it stands in a table; None: it is in no table.
    """

    store: Store
    labels: Labels
    tally: Tally
    where: Callable[[int], str] | None = None

    def place(self, row: int) -> str:
        """Name an image, with its place in the table."""
        return _with_place(self.store.key(row), self.where, row)


def joined(
    kind: str,
    base: Path,
    names: Names,
    labels: Labels,
    titles: pa.ChunkedArray | None,
    states: States,
    tally: Tally,
    where: Callable[[int], str] | None = None,
) -> Indexed:
    """Join the rows that lead to one file: by another spelling, a link, or for another caption.

    Args:
        titles: of each row, see `pymcip.data.columns.TEXTS`; or None.
        states: uint64 [N, 3] of the files, see `pymcip.data.walk.state_of`.
        where: says of each row where it stands in a table.

    Raises:
        DataError: a file has several labels.
    """
    firsts = _firsts(names, states)
    if firsts is not None:
        _join_labels(base, names, labels, firsts, where)
        own = firsts == np.arange(len(names))
        rows = np.flatnonzero(own).tolist()
        if where is not None:
            note = f"{len(names)} rows are {len(rows)} images: the captions of a file's rows are its own"
        else:
            others = np.flatnonzero(~own).tolist()
            count = sum(names[row] != names[int(firsts[row])] for row in others)
            note = f"{count} names are links to images that are there, and no images of their own"
        tally.notes.append(note)
        if titles is not None:
            titles = _join_titles(titles, firsts)
        names = Names(names[row] for row in rows)
        labels, states = Labels(labels[row] for row in rows), states[rows]
        if where is not None:
            place, kept = where, rows  # of a row of the table
            where = lambda row: place(kept[row])  # noqa: E731
    captions = None
    if titles is not None and has_texts(titles):
        stripped = (dict.fromkeys(map(str.strip, texts)) for texts in lists_in(titles))
        captions = column_of([text for text in texts if text] for texts in stripped)
    return Indexed(FileStore(kind, base, names, captions, states), labels, tally, where)


def _firsts(names: Names, states: States) -> npt.NDArray[np.int64] | None:
    """Return for each row the first one that leads to the same file; None: each leads to its own."""
    inodes = np.sort(states[:, 1])
    if inodes.all() and (inodes[1:] != inodes[:-1]).all():
        return None
    places = states[:, :2].copy()
    for row in np.flatnonzero(places[:, 1] == 0).tolist():
        # Some file systems have no inodes: a name is all there is to go by then.
        places[row] = np.iinfo(np.uint64).max, hash(names[row]) & np.iinfo(np.int64).max
    order = np.lexsort((places[:, 1], places[:, 0]))
    new = np.ones(len(order), bool)
    new[1:] = (np.diff(places[order], axis=0) != 0).any(axis=1)
    firsts = np.empty(len(order), np.int64)
    firsts[order] = order[new][np.cumsum(new) - 1]
    return None if new.all() else firsts


def _join_labels(
    base: Path,
    names: Names,
    labels: Labels,
    firsts: npt.NDArray[np.int64],
    where: Callable[[int], str] | None,
) -> None:
    """Give the first row of each file the label that any of its rows has; refuse several."""
    conflicts = []
    for row in np.flatnonzero(firsts != np.arange(len(firsts))).tolist():
        first, label = int(firsts[row]), labels[row]
        if labels[first] is None:
            labels[first] = label
        elif label not in (None, labels[first]):
            one, other = (_with_place(plain(names[i]), where, i) for i in (first, row))
            conflicts.append(f"{one}: {labels[first]!r}, {other}: {label!r}")
    if conflicts:
        raise DataError(
            f"{base}: one file has two labels: {some(conflicts)}. An image has one class: take one of "
            "the two out"
        )


def _join_titles(titles: pa.ChunkedArray, firsts: npt.NDArray[np.int64]) -> pa.ChunkedArray:
    """Return the captions of each file: those of all its rows, in their order."""
    order = np.argsort(firsts, kind="stable")
    grouped = pa.concat_arrays(titles.chunks).take(order)
    counts = pa.compute.fill_null(pa.compute.list_value_length(grouped), 0).to_numpy()
    starts = np.flatnonzero(np.diff(firsts[order], prepend=-1))
    offsets = np.append(np.cumsum(counts)[starts] - counts[starts], counts.sum())
    return pa.chunked_array([pa.LargeListArray.from_arrays(offsets, grouped.flatten())])


def _with_place(key: str, where: Callable[[int], str] | None, row: int) -> str:
    return key if where is None else f"{key} ({where(row)})"
