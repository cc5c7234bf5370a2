"""Labelled images by index, whatever sources they come from; pixels are read one at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from pymcip.contents import digest_of, picture_digest
from pymcip.data.compact import UNLABELLED
from pymcip.data.decode import crop, decode
from pymcip.data.stores import Int64, Store
from pymcip.data.tally import LeftOut
from pymcip.errors import DataError
from pymcip.files import json_pieces


@dataclass(frozen=True, eq=False, repr=False)
class ImageData:
    """All images of one or several sources, by index 0 to N-1. Made by `load_images`.

    Attributes:
        stores: where the images of each source lie.
        rows: int64 [N], the row of each image in its source's store.
        source_ids: int64 [N], the source of each image.
        labels: int64 [N], the class of each image, 0 to C-1 over all sources; -1: unlabelled.
        class_names: C texts, the label as the source spells it (folder name, table cell, cls).
        class_sources: int64 [C], the source each class belongs to.
        crops: float32 [N, 4], the box each image is cut to (see `cropped`), or None.
        left_out: what else in the sources could have been an image, and why it is not among these.
        least_side: see `reduced`; None: images are read at their full size.
    """

    stores: list[Store]
    rows: Int64
    source_ids: Int64
    labels: Int64
    class_names: list[str]
    class_sources: Int64
    crops: npt.NDArray[np.float32] | None = None
    left_out: tuple[LeftOut, ...] = ()
    least_side: int | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return (
            f"ImageData({len(self)} images, {self.num_classes} classes, "
            f"{len(self.stores)} source(s))"
        )

    @property
    def num_classes(self) -> int:
        """How many classes C there are over all sources."""
        return len(self.class_names)

    def _place(self, index: int) -> tuple[Store, int]:
        return self.stores[self.source_ids[index]], int(self.rows[index])

    def key(self, index: int) -> str:
        """Return the image's path, or its shard's path and the member's name."""
        store, row = self._place(index)
        return store.key(row)

    def titles(self, index: int) -> tuple[str, ...]:
        """Return the captions that come with the image (title column, .txt, json); may be none."""
        store, row = self._place(index)
        return store.titles(row)

    def files(self) -> Iterator[Path]:
        """Yield the files that hold the images of all sources."""
        return (path for store in self.stores for path in store.files())

    def read(self, index: int) -> Image.Image:
        """Decode one image to RGB; see `decode`.

        Raises:
            DecodeError: it is cut short, no image, or a decompression bomb.
            DataError: its file is gone or has shrunk.
        """
        store, row = self._place(index)
        return self._decoded(index, store.read(row))

    def read_with_digest(self, index: int) -> tuple[Image.Image, str]:
        """Decode one image, and digest (hex) its file's bytes and its crop; raises as `read`.

        Images of equal digests are the same picture.
        """
        store, row = self._place(index)
        content = store.read(row)
        return self._decoded(index, content), self._with_crop(index, digest_of(content))

    def digest(self, index: int) -> str:
        """Return the digest of `read_with_digest` without decoding; raises DataError as `read`.

        A file whose digest `fingerprint` has found is not read again.
        """
        store, row = self._place(index)
        return self._with_crop(index, store.digest(row))

    def size(self, index: int) -> int:
        """Return how many bytes the image's file has."""
        store, row = self._place(index)
        return store.size(row)

    def _decoded(self, index: int, content: bytes) -> Image.Image:
        key = self.key(index)
        if self.crops is None:
            return decode(content, key, self.least_side)
        return crop(decode(content, key), self.crops[index], key)

    def _with_crop(self, index: int, digest: bytes) -> str:
        return picture_digest(digest, b"" if self.crops is None else self.crops[index].tobytes())

    def select(self, indices: npt.ArrayLike) -> ImageData:
        """Return the images at `indices` (int [M]), in that order; the classes stay the same."""
        chosen = np.asarray(indices, np.int64)
        return replace(
            self,
            rows=self.rows[chosen],
            source_ids=self.source_ids[chosen],
            labels=self.labels[chosen],
            crops=None if self.crops is None else self.crops[chosen],
        )

    def of_classes(self, classes: npt.ArrayLike) -> ImageData:
        """Return the images of `classes` (int [K]) alone, which become the classes 0 to K-1."""
        chosen = np.asarray(classes, np.int64)
        label = np.full(self.num_classes + 1, UNLABELLED)  # the last one: of unlabelled images
        label[chosen] = np.arange(len(chosen))
        kept = self.select(np.flatnonzero(label[self.labels] != UNLABELLED))
        return replace(
            kept,
            labels=label[kept.labels],
            class_names=[self.class_names[i] for i in chosen],
            class_sources=self.class_sources[chosen],
        )

    def cropped(self, boxes: npt.ArrayLike) -> ImageData:
        """Return the same images, each cut to a box after decoding and before the transform.

        Args:
            boxes: float [4] for all images or [N, 4]: left, top, right, bottom in pixels, as
                `PIL.Image.Image.crop` takes them; right and bottom of 0 or less are counted from
                the far side, so that (2, 2, -2, -2) takes a border of two pixels off.

        Raises:
            DataError: the boxes have another shape, or are empty.
        """
        given = np.asarray(boxes, np.float32)
        if given.shape not in ((4,), (len(self), 4)) or not np.isfinite(given).all():
            raise DataError(
                f"crops are {list(given.shape)}; needed: finite [4] or [{len(self)}, 4], left, "
                "top, right, bottom"
            )
        table = np.broadcast_to(given, (len(self), 4))
        empty = ((table[:, 2:] > 0) & (table[:, 2:] <= table[:, :2])).any(axis=1)
        if empty.any():
            row = int(empty.argmax())
            raise DataError(f"the crop of {self.key(row)}, {table[row].tolist()}, is empty")
        return replace(self, crops=table)

    def reduced(self, least_side: int) -> ImageData:
        """Return the same images, of which large JPEGs are read at a part of their size; see `decode`.

        Images with crops are read at their full size: the boxes are in its pixels.

        Args:
            least_side: pixels that the shorter side keeps at least.
        """
        return replace(self, least_side=least_side)

    def fingerprint(self) -> str:
        """Identify the images by what they hold, as SHA-256 in hex; see `pymcip.contents`.

        It covers content, names below the source's folder, captions, order and labels.
        """
        digest = hashlib.sha256()
        described = [*(store.fingerprint() for store in self.stores), self.class_names]
        for piece in json_pieces(described):
            digest.update(piece.encode())
        for column in (self.source_ids, self.rows, self.labels):
            digest.update(np.ascontiguousarray(column).data)
        if self.crops is not None:
            digest.update(np.ascontiguousarray(self.crops).data)
        if self.least_side is not None:
            digest.update(f"reduced {self.least_side}".encode())
        return digest.hexdigest()
