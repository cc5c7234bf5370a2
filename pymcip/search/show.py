"""What `pymcip search` shows: a table, lines of JSON, or a page of thumbnails."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from pymcip.configs import SearchConfig
from pymcip.errors import DataError
from pymcip.files import write_text
from pymcip.model import load
from pymcip.pages import data_uri, filled
from pymcip.search.gallery import Gallery
from pymcip.search.index import Hit, Index


def search_and_show(config: SearchConfig) -> str:
    """Search as the options say, and write the page if there is to be one.

    Returns:
        The results as a table, or as lines of JSON.

    Raises:
        What `Index` and `Index.search` raise.
    """
    clip = None
    if config.model is not None:
        clip = load(config.model, config.pretrained, device=config.device)
    index = Index(config.index, clip=clip, device=config.device)
    hits = index.search(
        text=config.text,
        image=config.image,
        weight=config.weight,
        without=[*config.without, *map(Path, config.without_image)],
        k=config.k,
        where={"label": config.label} if config.label else None,
        strength=config.strength,
    )
    if config.html is not None:
        query = " + ".join(map(str, [*config.text, *config.image]))
        write_text(config.html, page(hits, query, Gallery(index)))
    if config.json:
        return "".join(json.dumps(dataclasses.asdict(hit)) + "\n" for hit in hits)
    return table(hits)


def table(hits: Sequence[Hit]) -> str:
    """Rank, score, label and path of each result, in columns."""
    rows = [("rank", "score", "label", "path")]
    rows += [
        (str(rank), f"{hit.score:.4f}", _plain(hit.label or ""), _plain(hit.path))
        for rank, hit in enumerate(hits, 1)
    ]
    width = max(len(row[2]) for row in rows)
    return "".join(f"{row[0]:>4}  {row[1]:>7}  {row[2]:<{width}}  {row[3]}\n" for row in rows)


def page(hits: Sequence[Hit], query: str, gallery: Gallery) -> str:
    """A page of HTML that holds its thumbnails; where an image is gone, only the path is shown."""
    shown = [
        {
            **vars(hit),
            "score": f"{hit.score:.4f}",
            "label": hit.label or "",
            "picture": _picture(gallery, hit),
        }
        for hit in hits
    ]
    return filled("hits.html", title=query, hits=shown)


def _picture(gallery: Gallery, hit: Hit) -> str:
    try:
        return data_uri(gallery.thumbnail(hit.row))
    except DataError:
        return ""


def _plain(text: str) -> str:
    """A text without what would steer a terminal or break a line."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
