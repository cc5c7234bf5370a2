"""Mining images block by block: each finished block is a file, so that a run can be continued."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path

import numpy as np

from pymcip.files import damaged, read_npz, write_npz
from pymcip.mining.search import Search
from pymcip.mining.table import CaptionTable, Float32, Int64, bounds_of
from pymcip.ops.arrays import MatrixParts
from pymcip.progress import progress

_AGAIN = "Remove it and mine again"

_log = logging.getLogger("pymcip.mining")


def mine_blocks(
    images: MatrixParts, captions: int, search: Search, k: int, folder: Path | None, rows: int
) -> CaptionTable:
    """Search the captions of all images, and keep each finished block in a file.

    Blocks are of one size, to a row. A file is named after the rows of its block.

    Args:
        images: unit rows [N, D].
        captions: how many captions there are.
        search: finds the captions of a block.
        k: captions per image, at most.
        folder: of the blocks' files; blocks found there are read. None keeps nothing.
        rows: images per block, at most.

    Raises:
        DamagedFileError: the file of a block is damaged.
    """
    count = -(-len(images) // rows)
    bounds = [len(images) * number // count for number in range(count + 1)]
    places = list(itertools.pairwise(bounds))
    files = [None if folder is None else folder / f"images_{a}_{b}.npz" for a, b in places]
    finished = [file is not None and file.is_file() for file in files]
    ready = sum(b - a for (a, b), done in zip(places, finished, strict=True) if done)
    if ready:
        _log.info("%d of %d images were mined before; mining the others", ready, len(images))
    found = []
    with progress(
        total=len(images) * captions,
        initial=ready * captions,
        description="mining",
        unit="cosine",
        unit_scale=True,
    ) as bar:
        for (first, last), file, done in zip(places, files, finished, strict=True):
            if file is not None and done:
                found.append(_present(*_read_block(file, (last - first, k), captions)))
                continue
            start, work = bar.n, (last - first) * captions

            def report(done: int, total: int) -> None:
                bar.update(start + work * done // max(1, total) - bar.n)  # noqa: B023

            ids, cosines = search(images[first:last], report)
            report(1, 1)
            if file is not None:
                write_npz(file, ids=ids, cosines=cosines)
            found.append(_present(ids, cosines))
    counts, all_ids, all_cosines = (np.concatenate(column) for column in zip(*found, strict=True))
    return CaptionTable(bounds_of(counts), all_ids, all_cosines, captions)


def _present(ids: Int64, cosines: Float32) -> tuple[Int64, Int64, Float32]:
    """How many captions each image of a block has, and their ids and cosines in one row."""
    there = ids >= 0
    return there.sum(axis=1), ids[there], cosines[there]


def _read_block(file: Path, shape: tuple[int, int], captions: int) -> tuple[Int64, Float32]:
    stored = read_npz(file, {"ids": ("int64", 2), "cosines": ("float32", 2)}, _AGAIN)
    ids, cosines = stored["ids"], stored["cosines"]
    if not ids.shape == cosines.shape == shape:
        raise damaged(file, f"it holds {ids.shape}, not {shape}", _AGAIN)
    if ids.size and not -1 <= ids.min() <= ids.max() < captions:
        raise damaged(file, f"it has numbers of captions beyond {captions}", _AGAIN)
    return ids, cosines
