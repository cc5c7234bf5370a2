"""The table of pseudo-captions: which captions each image has, in memory and on disk."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet

from pymcip.configs import Source
from pymcip.files import atomic_path, damaged, read_npz, write_npz

TABLE = "caption_table"
_AGAIN = "Mine it again with pymcip.mine_captions"
_FIELDS = {
    "indptr": ("int64", 1),
    "ids": ("int64", 1),
    "cosines": ("float32", 1),
    "num_captions": ("int64", 0),
}

Int64: TypeAlias = npt.NDArray[np.int64]
Float32: TypeAlias = npt.NDArray[np.float32]


@dataclass(frozen=True)
class CaptionLists:
    """The captions of N images: those of image i are `ids[indptr[i]:indptr[i + 1]]`.

    Attributes:
        indptr: int64 [N + 1], ascending from 0.
        ids: int64 [nnz], numbers of captions in whatever corpus or bank the lists belong to.
    """

    indptr: Int64
    ids: Int64

    def __len__(self) -> int:
        return len(self.indptr) - 1

    def counts(self, images: Int64 | None = None) -> Int64:
        """The number of captions of each image, int64 [N], or of some images only, int64 [B]."""
        if images is None:
            return np.diff(self.indptr)
        return self.indptr[images + 1] - self.indptr[images]

    def take(self, images: Int64) -> CaptionLists:
        """The lists of some images (int64 [B]) in that order; those of others are not read."""
        indptr, places = self._places(images)
        return CaptionLists(indptr, self.ids[places])

    def _places(self, images: Int64) -> tuple[Int64, Int64]:
        """Bounds of the lists of some images (int64 [B]), and where their entries are."""
        counts = self.counts(images)
        indptr = bounds_of(counts)
        return indptr, np.arange(indptr[-1]) + np.repeat(self.indptr[images] - indptr[:-1], counts)


def bounds_of(counts: npt.ArrayLike) -> Int64:
    """`CaptionLists.indptr`, int64 [N + 1], of lists that are so long (int [N])."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


@dataclass(frozen=True)
class CaptionTable(CaptionLists):
    """The pseudo-captions of N images, each list by descending cosine, then ascending id.

    Images are rows of img_emb, captions rows of text_emb.

    Attributes:
        cosines: float32 [nnz], of each image and its caption.
        num_captions: rows of the caption corpus.
    """

    cosines: Float32
    num_captions: int

    def __getitem__(self, image: int) -> tuple[Int64, Float32]:
        """Return the caption ids of one image and their cosines."""
        if not -len(self) <= image < len(self):
            message = f"image {image} is not in a table of {len(self)} images"
            raise IndexError(message)
        image %= len(self)
        place = slice(self.indptr[image], self.indptr[image + 1])
        return self.ids[place], self.cosines[place]

    def take(self, images: Int64) -> CaptionTable:
        """The table of some images (int64 [B]) in that order."""
        indptr, places = self._places(images)
        return replace(self, indptr=indptr, ids=self.ids[places], cosines=self.cosines[places])

    def save(self, folder: Source) -> None:
        """Write caption_table.npz, and caption_table.parquet (image, caption, cosine)."""
        images = np.repeat(np.arange(len(self)), self.counts())
        pairs = pa.table({"image": images, "caption": self.ids, "cosine": self.cosines})
        with atomic_path(Path(folder) / f"{TABLE}.parquet") as temporary:
            pa.parquet.write_table(pairs, temporary)
        write_npz(Path(folder) / f"{TABLE}.npz", **asdict(self))

    @classmethod
    def load(cls, path: Source) -> CaptionTable:
        """Read a table from its folder or its .npz file.

        Raises:
            DamagedFileError: there is none, or it can't be read.
        """
        file = Path(path)
        if file.is_dir():
            file = file / f"{TABLE}.npz"
        values = read_npz(file, _FIELDS, _AGAIN)
        count = int(values.pop("num_captions"))
        table = cls(**values, num_captions=count)
        bounds, ids = table.indptr, table.ids
        fits = len(bounds) > 0 and len(ids) == len(table.cosines) == bounds[-1] and bounds[0] == 0
        if not fits or (np.diff(bounds) < 0).any():
            raise damaged(file, "its arrays don't fit together", _AGAIN)
        if len(ids) and not 0 <= ids.min() <= ids.max() < count:
            raise damaged(file, f"it has numbers of captions beyond {count}", _AGAIN)
        if not np.isfinite(table.cosines).all():
            raise damaged(file, "it has cosines that are not finite", _AGAIN)
        return table
