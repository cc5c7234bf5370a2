"""What a page over an index shows: results, with where a second index has them, and thumbnails."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pymcip.contents import digest_of, picture_digest
from pymcip.data import ImageData, load_images
from pymcip.data.decode import decode, thumbnail
from pymcip.errors import ConfigError, DataError
from pymcip.files import atomic_path
from pymcip.search.index import Hit, Index

SIDE = 320  # pixels of a thumbnail's longer side
MOST = 2_000  # results that can be paged through
COMPARED = 200  # ranks, at least, up to which two indexes are compared


class Gallery:
    """An index, and maybe another one of the same images by another model.

    Thumbnails are made when they are first asked for, and kept in the index's folder, in
    `thumbnails/`, by the content of their image; where that can't be written they are made anew.

    Args:
        index: the index.
        baseline: what its results are compared with.

    Raises:
        DataError: the two hold other images.
    """

    def __init__(self, index: Index, baseline: Index | None = None) -> None:
        if baseline is not None and not index.same_images(baseline):
            raise DataError(
                f"{baseline.folder} holds other images than {index.folder}, or in another order; "
                "run pymcip index for both with the same images"
            )
        self.index, self.baseline = index, baseline
        self._order = np.random.default_rng(0).permutation(len(index))  # of a page without a query
        self._data: ImageData | None = None
        self._lock = threading.Lock()

    def about(self) -> dict[str, Any]:
        """How many images there are, of which models, and whether dimensions are appended."""
        clip, baseline = self.index.clip, self.baseline
        return {
            "images": len(self.index),
            "model": clip.name,
            "baseline": None if baseline is None else baseline.clip.name,
            "appended": clip.embed_dim > clip.joint_dim,
        }

    def search(
        self,
        *,
        text: str | None = None,
        row: int | None = None,
        picture: bytes | None = None,
        weight: float = 0.5,
        strength: float | None = None,
        offset: int = 0,
        limit: int = 24,
    ) -> dict[str, Any]:
        """Results `offset` to `offset + limit` of a query, as plain values; without one, of any images.

        Args:
            text, weight, strength: as `Index.search` takes them.
            row: of the index: its picture is searched by.
            picture: an image file's bytes.
            offset, limit: which results; at most `MOST` in all, 100 at once.

        Returns:
            `total`, how many can be asked for; `hits`; and `baseline`, its hits, or None. A hit is a
            dict of `Hit`'s fields, `rank` (from 0), `other`, its rank in the other index or None if
            it is not among the first `compared` there, and `thumbnail`, a path of the server.

        Raises:
            ConfigError, DecodeError, DataError: as `Index.search`.
        """
        if not (0 <= offset < MOST and 1 <= limit <= 100):
            raise ConfigError(
                f"offset={offset}, limit={limit} are not allowed; allowed: 0 to {MOST - 1}, 1 to 100"
            )
        total = min(MOST, len(self.index))
        found = {"total": total, "baseline": None, "compared": None}
        if text is None and row is None and picture is None:
            rows = self._order[:total][offset : offset + limit].tolist()
            described = self.index.describe(rows)
            hits = [
                Hit(item["image_path"], item["label"], tuple(item["captions"]), 0.0, number)
                for item, number in zip(described, rows, strict=True)
            ]
            listed = self._listed(hits, offset, None)
            return found | {"hits": [{**item, "score": None} for item in listed]}
        pictures: list[Any] = [] if row is None else [row]
        if picture is not None:
            pictures.append(decode(picture, "the picture"))
        last = min(total, offset + limit)
        depth = last if self.baseline is None else min(total, max(last, COMPARED))

        def hits_of(index: Index) -> list[Hit]:
            return index.search(text, pictures, weight=weight, strength=strength, k=depth)

        first = hits_of(self.index)
        if self.baseline is None:
            return found | {"hits": self._listed(first[offset:last], offset, None)}
        second = hits_of(self.baseline)
        return found | {
            "hits": self._listed(first[offset:last], offset, second),
            "baseline": self._listed(second[offset:last], offset, first),
            "compared": depth,
        }

    def _listed(
        self, hits: Sequence[Hit], first: int, others: Sequence[Hit] | None
    ) -> list[dict[str, Any]]:
        ranks = {hit.row: rank for rank, hit in enumerate(others or ())}
        contents = [item["content"] for item in self.index.describe([hit.row for hit in hits])]
        return [
            {
                **vars(hit),
                "rank": rank,
                "other": ranks.get(hit.row),
                "thumbnail": f"/thumbnails/{hit.row}?content={content}",
            }
            for rank, (hit, content) in enumerate(zip(hits, contents, strict=True), first)
        ]

    def thumbnail(self, row: int) -> bytes:
        """The thumbnail of a row: a JPEG.

        Raises:
            DataError: there is no such row; or its image is gone, changed, or can't be decoded.
        """
        if not 0 <= row < len(self.index):
            raise DataError(
                f"there is no row {row}; the index has the rows 0 to {len(self.index) - 1}"
            )
        item = self.index.describe([row])[0]
        kept = self.index.folder / "thumbnails" / item["content"][:2] / f"{item['content']}.jpg"
        with contextlib.suppress(OSError):
            return kept.read_bytes()
        content = thumbnail(self._read(item), SIDE)
        with contextlib.suppress(OSError), atomic_path(kept) as temporary:
            temporary.write_bytes(content)
        return content

    def _read(self, item: dict[str, Any]) -> Image.Image:
        """Decode the image of a row, from a file of its own, else from the index's sources."""
        path = item["image_path"]
        try:
            content = Path(path).read_bytes()
        except (OSError, ValueError):
            with self._lock:
                if self._data is None:
                    self._data = load_images(list(self.index.sources), labelled=False)
            if item["index"] < len(self._data) and self._data.key(item["index"]) == path:
                image, digest = self._data.read_with_digest(item["index"])
                if digest == item["content"]:
                    return image
        else:
            if picture_digest(digest_of(content)) == item["content"]:
                return decode(content, path, SIDE)
        raise DataError(
            f"{path} is gone or has changed since it was indexed; run pymcip index again"
        )
