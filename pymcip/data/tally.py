"""What was left out of a source, by reason: counted in the log, listed in skipped.tsv."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field

from pymcip.data.sources import some

_log = logging.getLogger("pymcip.data")


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Something that is not among the images or captions of a source: its path or key, and why."""

    key: str
    reason: str


@dataclass
class Tally:
    """What is left out while a source is indexed.

    Attributes:
        items: everything that could have been an image or a caption.
        others: how many files of other kinds are there, by extension.
        remarks: what is unusual about the source, though nothing is left out.
        notes: what is usual but worth mentioning.
    """

    items: list[LeftOut] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    remarks: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, key: str, reason: str) -> None:
        """Count one thing that is left out."""
        self.items.append(LeftOut(key, reason))

    def reasons(self) -> dict[str, list[str]]:
        """Return the keys of what is left out by reason, in the order of the first of each."""
        found: dict[str, list[str]] = {}
        for item in self.items:
            found.setdefault(item.reason, []).append(item.key)
        return found

    def report(self, source: object) -> None:
        """Log one line per reason and remark."""
        for reason, keys in self.reasons().items():
            _log.warning("%s: %d left out, %s: %s", source, len(keys), reason, some(keys))
        for remark in self.remarks:
            _log.warning("%s: %s", source, remark)
        for note in self.notes:
            _log.info("%s: %s", source, note)
        if self.others:
            kinds = ", ".join(f"{n} {suffix}" for suffix, n in self.others.most_common(10))
            _log.info("%s: files that are no images are passed over: %s", source, kinds)
