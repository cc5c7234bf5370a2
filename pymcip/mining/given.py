"""The table of an earlier `mine` run as the pseudo-captions of a training run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pymcip.configs import Source
from pymcip.contents import digest_of_files
from pymcip.embedding import EmbeddingFolder
from pymcip.errors import DataError, StaleEmbeddingsError
from pymcip.files import read_npz, write_npz
from pymcip.mining.table import TABLE, CaptionTable

SOURCES = "sources.npz"  # of a table: what its rows and captions are
_FIELDS = {"images": ("S64", 1), "captions": ("S64", 0)}  # SHA-256 in hex
_AGAIN = "Mine it again with pymcip.mine_captions and overwrite=True"

_log = logging.getLogger("pymcip.mining")


def save_sources(folder: Path, images: EmbeddingFolder, captions: EmbeddingFolder) -> None:
    """Write what the table in `folder` was mined from; nothing, of another program's embeddings."""
    corpus = captions.fingerprint("text").get("data")
    if corpus is not None and images.fingerprint("img"):
        write_npz(
            folder / SOURCES,
            images=np.array(images.contents(), "S64"),
            captions=np.array(corpus, "S64"),
        )


@dataclass(frozen=True)
class GivenTable:
    """A table that was mined before.

    Attributes:
        path: its folder.
        table: of M images.
        images: bytes [M], digests of their content.
    """

    path: Path
    table: CaptionTable
    images: npt.NDArray[np.bytes_]

    @classmethod
    def open(cls, path: Source, corpus: str) -> GivenTable:
        """Open the folder of a `mine` run, or a run's `mined/`.

        Args:
            path: the folder.
            corpus: `Captions.fingerprint` of the captions that it is to be used with.

        Raises:
            DataError: there is no table, or another program embedded its images or captions.
            StaleEmbeddingsError: it is of other captions.
            DamagedFileError: it can't be read.
        """
        folder = Path(path)
        if not (folder / f"{TABLE}.npz").is_file():
            raise DataError(
                f"caption_table={str(folder)!r} holds no {TABLE}.npz; give the folder that pymcip mine "
                "wrote, and where it was interrupted, finish it first"
            )
        if not (folder / SOURCES).is_file():
            raise DataError(
                f"caption_table={str(folder)!r} holds no {SOURCES}, which says what it was mined from; "
                "mine again, from embeddings that pymcip embed wrote"
            )
        sources = read_npz(folder / SOURCES, _FIELDS, _AGAIN)
        if sources["captions"].item().decode() != corpus:
            raise StaleEmbeddingsError(
                f"caption_table={str(folder)!r} was mined from other captions than captions= names; give "
                "the ones it was mined from, or mine again"
            )
        table = CaptionTable.load(folder)
        if len(table) != len(sources["images"]):
            raise StaleEmbeddingsError(
                f"caption_table={str(folder)!r}: {TABLE}.npz is of {len(table)} images, {SOURCES} of "
                f"{len(sources['images'])}. {_AGAIN}"
            )
        return cls(folder, table, sources["images"])

    def files(self) -> list[Path]:
        """The files that it is read from."""
        return [self.path / f"{TABLE}.npz", self.path / SOURCES]

    def fingerprint(self) -> str:
        """SHA-256 in hex of its files."""
        return digest_of_files(self.files())

    def of(self, contents: Sequence[str], name: Callable[[int], str]) -> CaptionTable:
        """The table of N images, in their order; it may hold more.

        Args:
            contents: N digests of the images' content (`EmbeddingFolder.contents`).
            name: says which image one of them is.

        Raises:
            StaleEmbeddingsError: it lacks some, or none of the images has a caption.
        """
        wanted = np.array(contents, "S64")
        order = np.argsort(self.images)
        places = np.searchsorted(self.images, wanted, sorter=order)
        rows = order[np.minimum(places, len(order) - 1)]
        missing = np.flatnonzero(self.images[rows] != wanted)
        if len(missing):
            raise StaleEmbeddingsError(
                f"caption_table={str(self.path)!r} lacks {len(missing)} of {len(wanted)} training images "
                f"(first: {name(int(missing[0]))}); mine again, from embeddings of all of train_data"
            )
        lists = self.table.take(rows)
        if not len(lists.ids):
            raise StaleEmbeddingsError(
                f"caption_table={str(self.path)!r} has no caption for any training image; mine again "
                "with a lower threshold"
            )
        _log.info(
            "pseudo-captions from %s: %d pairs, %d of %d images have some",
            self.path, len(lists.ids), int((lists.counts() > 0).sum()), len(lists),
        )  # fmt: skip
        return lists
