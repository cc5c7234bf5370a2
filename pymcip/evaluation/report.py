"""report.html: figures in plain words, what the models find, what was left out, on one page."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pymcip.data import ImageData
from pymcip.data.decode import thumbnail
from pymcip.data.tally import LeftOut
from pymcip.errors import DataError
from pymcip.evaluation.examples import Examples, Ranking
from pymcip.evaluation.tables import metric_in_words
from pymcip.files import write_text
from pymcip.pages import data_uri, filled

REPORT = "report.html"
SIDE, QUALITY = 96, 60  # of a thumbnail
SECONDS, SHARE = 1.5, 0.015  # for thumbnails: the larger one, a share of the reported work's time
BYTES = 400_000  # of all thumbnails
WORST, LISTED = 8, 20  # classes; things of a kind that were left out


@dataclass(frozen=True)
class Named:
    """Images, and what their classes are called in words."""

    images: ImageData
    names: Sequence[str]


class Thumbnails:
    """Small pictures for one page, each once, until time or space is used up.

    Args:
        seconds: how long the reported work took.
    """

    def __init__(self, seconds: float) -> None:
        self.until = time.monotonic() + max(SECONDS, SHARE * seconds)
        self.room = BYTES
        self.missing = 0
        self.pictures: list[str] = []  # addresses that hold them
        self._numbers: dict[tuple[int, int], int] = {}

    def add(self, data: ImageData, row: int) -> int | None:
        """Return the number of a picture in `pictures`; None: it can't be read, or there is no room."""
        key = id(data), row
        if key in self._numbers:
            return self._numbers[key]
        if time.monotonic() < self.until and self.room > 0:
            try:
                content = thumbnail(data.reduced(2 * SIDE).read(row), SIDE, QUALITY)
            except (DataError, OSError):  # gone since it was measured
                self.missing += 1
                return None
            self.room -= len(content)
            self._numbers[key] = len(self.pictures)
            self.pictures.append(data_uri(content))
            return self._numbers[key]
        self.missing += 1
        return None


@dataclass(frozen=True)
class Model:
    """One column of a report: a model's heading, its figures in percent, and what it finds."""

    heading: str
    metrics: Mapping[str, float]
    examples: Examples | None = None


@dataclass(frozen=True)
class LeftOuts:
    """Things of a kind that were left out, and where all of them are listed ("": nowhere)."""

    what: str
    items: Sequence[LeftOut]
    listed: str = ""


def write_report(
    out: Path,
    title: str,
    models: Sequence[Model],
    data: Named | None,
    left_out: Iterable[LeftOuts],
    thumbnails: Thumbnails,
    words: Callable[[str], tuple[str, str]] = metric_in_words,
    **sections: Any,
) -> Path:
    """Write report.html into a folder.

    Args:
        out: the folder.
        title: of the page.
        models: one, or two of which the second is compared with the first.
        data: the images that `Examples` number; None: there are no examples.
        left_out: by what it is; empty ones are skipped.
        thumbnails: with those that sections show.
        words: title and meaning of a figure, by its name.
        sections: more values for the template `report.html`.

    Raises:
        ResourceError: the disk is full.
    """
    each = [model.examples for model in models if model.examples is not None]
    shown: dict[str, Any] = {"pictures": [], "texts": [], "worst": []}
    if data is not None and each:
        for kind in ("texts", "pictures"):
            shown[kind] = _rankings(data, [getattr(one, kind) for one in each], thumbnails)
        shown["worst"] = _worst(data, each, thumbnails)
        shown["headings"] = [model.heading for model in models if model.examples is not None]
    values = {
        **dict.fromkeys(("lead", "note", "remarks", "charts", "budget", "mined", "settings"), ()),
        **sections,
    }
    text = filled(
        "report.html",
        side=SIDE,
        title=title,
        headings=[model.heading for model in models],
        figures=[
            _figure(name, words(name), models) for name in (models[-1].metrics if models else ())
        ],
        shown=shown,
        left_out=[kind for kind in left_out if kind.items],
        most_listed=LISTED,
        thumbnails=thumbnails,
        **values,
    )
    write_text(out / REPORT, text)
    return out / REPORT


def _figure(name: str, words: tuple[str, str], models: Sequence[Model]) -> dict[str, Any]:
    values = [model.metrics.get(name) for model in models]
    change = None
    if len(values) == 2 and None not in values:
        change = round(values[1], 2) - round(values[0], 2)  # type: ignore[arg-type]
    return {
        "name": words[0],
        "meaning": words[1],
        "values": values,
        "change": change,
    }


def _rankings(
    data: Named, each: Sequence[Sequence[Ranking]], thumbnails: Thumbnails
) -> list[dict[str, Any]]:
    """The queries that all models have, as long as there is room for all pictures of one."""
    found = []
    for rankings in zip(*each, strict=False):
        query = rankings[0].query
        if any(ranking.query != query for ranking in rankings):
            continue
        own = picture_of(data, query, thumbnails) if isinstance(query, int) else None
        sides = [
            [
                {**picture_of(data, row, thumbnails), "hit": hit}
                for row, hit in zip(ranking.rows, ranking.hits, strict=True)
            ]
            for ranking in rankings
        ]
        found.append({"text": query, "picture": own, "sides": sides})
    return found


def picture_of(data: Named, row: int, thumbnails: Thumbnails) -> dict[str, Any]:
    """What the template shows of a picture: its thumbnail's number, its label, its key."""
    label = data.images.labels[row]
    return {
        "number": thumbnails.add(data.images, row),
        "label": data.names[label] if label >= 0 else "",
        "key": data.images.key(row),
    }


def _worst(data: Named, each: Sequence[Examples], thumbnails: Thumbnails) -> list[dict[str, Any]]:
    """The classes of several images whose images find each other worst."""
    values = [{number: ap for number, _, ap in one.classes} for one in each]
    several = [(ap, number, size) for number, size, ap in each[-1].classes if size > 1]
    return [
        {
            "name": data.names[number],
            "size": size,
            "values": [of.get(number) for of in values],
            "picture": picture_of(data, int((data.images.labels == number).argmax()), thumbnails),
        }
        for _, number, size in sorted(several)[:WORST]
    ]
