"""One image per file: rows that lead to the same file are one image with several captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from pymcip.data.columns import TEXTS
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
        labels: of each, None where there is none.
        tally: what was left out.
        where: of each, where it stands in a table; None: it is in no table.
    """

    store: Store
    labels: list[str | None]
    tally: Tally
    where: list[str] | None = None

    def place(self, row: int) -> str:
        """Name an image, with its place in the table."""
        key = self.store.key(row)
        return key if self.where is None else f"{key} ({self.where[row]})"


def joined(
    kind: str,
    base: Path,
    names: Sequence[str],
    labels: Sequence[str | None],
    titles: Sequence[Sequence[str]] | None,
    states: States,
    tally: Tally,
    where: Sequence[str] | None = None,
) -> Indexed:
    """Join the rows that lead to one file: by another spelling, a link, or for another caption.

    `states`: uint64 [N, 3] of the files, see `pymcip.data.walk.state_of`.

    Raises:
        DataError: a file has several labels.
    """
    rows: list[int] = []  # the first of each file
    texts: dict[int, list[str]] = {}
    found: list[str | None] = list(labels)
    conflicts = []
    others = 0
    for row, first in enumerate(_firsts(names, states)):
        if titles is not None and titles[row]:
            texts.setdefault(first, []).extend(text.strip() for text in titles[row])
        if first == row:
            rows.append(row)
            continue
        others += names[first] != names[row]
        if found[first] is None:
            found[first] = found[row]
        elif found[row] not in (None, found[first]):
            conflicts.append(
                f"{_named(names, where, first)}: {found[first]!r}, {_named(names, where, row)}: "
                f"{found[row]!r}"
            )
    if conflicts:
        raise DataError(
            f"{base}: one file has two labels: {some(conflicts)}. An image has one class: take one of "
            "the two out"
        )
    if len(rows) < len(names):
        tally.notes.append(
            f"{len(names)} rows are {len(rows)} images: the captions of a file's rows are its own"
            if where is not None
            else f"{others} names are links to images that are there, and no images of their own"
        )
    captions = None
    if any(texts.values()):
        kept = ([text for text in dict.fromkeys(texts.get(row, ())) if text] for row in rows)
        captions = pa.array(kept, TEXTS)
    store = FileStore(kind, base, [names[row] for row in rows], captions, states[rows])
    return Indexed(
        store,
        [found[row] for row in rows],
        tally,
        None if where is None else [where[row] for row in rows],
    )


def _firsts(names: Sequence[str], states: States) -> Sequence[int]:
    """Return for each row the first one that leads to the same file."""
    inodes = states[:, 1]
    if inodes.all() and len(np.unique(inodes)) == len(inodes):
        return range(len(names))
    first_of: dict[tuple[int, ...], int] = {}
    found = []
    for row, (device, inode, _) in enumerate(states.tolist()):
        # Some file systems have no inodes: a name is all there is to go by then.
        place = (device, inode) if inode else (-1, hash(names[row]))
        found.append(first_of.setdefault(place, row))
    return found


def _named(names: Sequence[str], where: Sequence[str] | None, row: int) -> str:
    return plain(names[row]) + ("" if where is None else f" ({where[row]})")
