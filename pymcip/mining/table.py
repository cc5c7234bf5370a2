"""The table of pseudo-captions: which captions each image has, in memory and on disk."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet

from pymcip.configs import Source
from pymcip.errors import DataError
from pymcip.files import atomic_path

TABLE = "caption_table"

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
        counts = self.counts(images)
        indptr = bounds_of(counts)
        places = np.arange(indptr[-1]) + np.repeat(self.indptr[images] - indptr[:-1], counts)
        return CaptionLists(indptr, self.ids[places])


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

    def save(self, folder: Source) -> None:
        """Write caption_table.npz, and caption_table.parquet (image, caption, cosine)."""
        images = np.repeat(np.arange(len(self)), self.counts())
        pairs = pa.table({"image": images, "caption": self.ids, "cosine": self.cosines})
        with atomic_path(Path(folder) / f"{TABLE}.parquet") as temporary:
            pa.parquet.write_table(pairs, temporary)
        file = Path(folder) / f"{TABLE}.npz"
        with atomic_path(file) as temporary, temporary.open("wb") as handle:
            np.savez(handle, **asdict(self))

    @classmethod
    def load(cls, path: Source) -> CaptionTable:
        """Read a table from its folder or its .npz file.

        Raises:
            DataError: there is none, or it is damaged.
        """
        file = Path(path)
        if file.is_dir():
            file = file / f"{TABLE}.npz"
        try:
            with np.load(file, allow_pickle=False) as arrays:
                values = {name: arrays[name] for name in ("indptr", "ids", "cosines")}
                table = cls(**values, num_captions=int(arrays["num_captions"]))
        except (OSError, KeyError, ValueError, EOFError) as error:
            raise DataError(
                f"{file} can't be read as a caption table: {error}. Mine it again with "
                "pymcip.mine_captions"
            ) from error
        if not len(table.ids) == len(table.cosines) == table.indptr[-1]:
            raise DataError(f"{file} is damaged: its arrays don't fit together. Mine it again")
        return table
