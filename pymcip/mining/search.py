"""Searching captions, exactly or with an approximate index, block by block of images.

Each finished block is a file, so that a run can be continued.
"""

from __future__ import annotations

import itertools
import logging
import math
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from pymcip.embedding import Matrix
from pymcip.files import damaged, read_json, read_npz, write_json, write_npz
from pymcip.mining.table import CaptionTable, Float32, Int64, bounds_of
from pymcip.ops import ApproximateIndex, topk
from pymcip.ops.arrays import MatrixParts, Progress, as_numpy, dtype_name
from pymcip.ops.dispatch import backends
from pymcip.ops.topk_cpu import pass_queries
from pymcip.progress import progress

_AGAIN = "Remove it and mine again"
GPU_BLOCK_ROWS = 1 << 17
RECALL_ROWS = 256  # images whose exact captions an approximate search is compared with

_AGAIN = "Remove it and mine again"

_log = logging.getLogger("pymcip.mining")
# Of a block of images [rows, D]: ids and cosines [rows, k], -1 and -inf where there are fewer. The
# callback is called with the work done and the work to do.
Search: TypeAlias = Callable[[Matrix, Progress], tuple[Int64, Float32]]


def search_device(backend: str, dtype: str) -> torch.device:
    """The device that searches: the GPU, if there is one and the back end takes `dtype` there."""
    if torch.cuda.is_available():
        rows = [row for row in backends("topk") if backend in ("auto", row.name)]
        if any(row.obstacle("cuda", dtype) is None for row in rows):
            return torch.device("cuda")
    return torch.device("cpu")


def images_per_block(k: int, columns: int, device: torch.device) -> int:
    """Images per block: what a kill loses, and what all captions are read and rounded for once.

    On a CPU as many as one pass over the captions serves: 14,848 of 512 columns with k = 10, which
    take two cores with AMX three quarters of a minute with 12 million captions. A GPU takes seconds
    for far more.
    """
    return pass_queries(columns, k) if device.type == "cpu" else GPU_BLOCK_ROWS


def exact_search(
    captions: MatrixParts,
    k: int,
    threshold: float | None,
    *,
    backend: str = "auto",
    threads: int | None = None,
) -> Search:
    """A search that finds every one of the k nearest captions; see `pymcip.ops.topk`."""
    device = search_device(backend, dtype_name(captions.parts[0]))
    for part in captions.parts:
        if isinstance(part, np.memmap) and hasattr(mmap, "MADV_SEQUENTIAL"):
            # Reads ahead: a part that is not in memory takes half the time.
            part._mmap.madvise(mmap.MADV_SEQUENTIAL)  # type: ignore[attr-defined]

    def search(images: Matrix, report: Progress) -> tuple[Int64, Float32]:
        queries: Any = images
        if device.type != "cpu":
            queries = torch.from_numpy(np.array(images)).to(device)
        ids, cosines = topk(
            queries, captions.parts, k, threshold,
            backend=backend, threads=threads, progress=report,
        )  # fmt: skip
        return as_numpy(ids), as_numpy(cosines)

    return search


def approximate_search(
    captions: MatrixParts,
    k: int,
    threshold: float,
    *,
    recall: float,
    sampled: Matrix,
    population: int,
    folder: Path | None,
    measured_file: Path | None,
    backend: str = "auto",
    threads: int | None = None,
    seed: int = 0,
) -> tuple[Search, dict[str, Any]]:
    """A search that finds about `recall` of the pairs, and the recall measured on a sample.

    An interrupted run that is started again finds index and measurement in their files, and so
    searches with the same settings.

    Args:
        captions: unit rows [M, D].
        k, threshold, recall, threads, seed: as of `mine_table`.
        sampled: images [n, D] that recall is measured on.
        population: how many images there are in all.
        folder: of the index, which is built there if there is none; None keeps nothing.
        measured_file: JSON file of what was measured; None keeps nothing.
        backend: of the exact search that recall is compared with.

    Returns:
        The search; and `asked`, `recall`, `recall_error`, `recall_interval`, `recall_images`,
        `nprobe`, `lists`, `candidates`, as `mine_table` reports them.
    """
    if folder is not None and (folder / "index.json").is_file():
        index = ApproximateIndex.load(folder)
    else:
        index = _with_bar(
            "building the index",
            lambda report: ApproximateIndex.build(
                captions.parts, seed=seed, threads=threads, progress=report
            ),
        )
        if folder is not None:
            index.save(folder)
    if measured_file is not None and measured_file.is_file():
        measured = read_json(measured_file, {"nprobe": int, "lists": int, "recall_interval": list})
    else:
        found = _with_bar(
            "measuring recall",
            lambda report: index.search(
                sampled, captions.parts, k, threshold,
                recall=recall, sample=RECALL_ROWS, population=population,
                backend=backend, seed=seed, threads=threads, progress=report,
            ),
        )  # fmt: skip
        known = math.isfinite(found.recall)
        measured = {
            "asked": recall,
            "recall": found.recall if known else None,
            "recall_error": found.recall_error if known else None,
            "recall_interval": list(found.recall_interval),
            "recall_images": found.recall_queries,
            "nprobe": found.nprobe,
            "lists": index.lists,
            "candidates": found.candidates,
        }
        if measured_file is not None:
            write_json(measured_file, measured)
    if measured["recall"] is None:
        _log.warning(
            "recall can't be measured: none of %d images sampled has a caption over the threshold",
            len(sampled),
        )
    else:
        _log.info(
            "approximate search: recall %.3f (95 %% interval %.3f to %.3f, measured on %d images; "
            "%.3f was asked for), %d of %d lists",
            measured["recall"], *measured["recall_interval"], measured["recall_images"], recall,
            measured["nprobe"], measured["lists"],
        )  # fmt: skip

    def search(images: Matrix, report: Progress) -> tuple[Int64, Float32]:
        found = index.search(
            images, captions.parts, k, threshold,
            nprobe=measured["nprobe"], sample=0,
            backend=backend, threads=threads, progress=report,
        )  # fmt: skip
        return found.ids, found.scores

    return search, measured


def _with_bar(description: str, work: Callable[[Progress], Any]) -> Any:
    """What `work` returns; its argument moves a progress bar."""
    with progress(total=0, description=description, unit="row", unit_scale=True) as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return work(report)


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
