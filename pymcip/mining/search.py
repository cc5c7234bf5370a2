"""Searching captions, exactly or with an approximate index, task by task.

A task is a block of images and a range of the captions. Each finished one is a file, so that a run
can be continued, by any number of processes.
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
from pymcip.folders import record_files
from pymcip.mining.table import CaptionTable, Float32, Int64, bounds_of
from pymcip.ops import ApproximateIndex, topk
from pymcip.ops.arrays import MatrixParts, Progress, as_numpy, dtype_name
from pymcip.ops.canonical import first_k
from pymcip.ops.dispatch import backends
from pymcip.ops.topk_cpu import pass_queries
from pymcip.parts import Shard
from pymcip.progress import progress

GPU_BLOCK_ROWS = 1 << 17
BANK_ROWS = (
    1 << 24
)  # captions of a task, at most: 26 GB of 768 columns in fp16, which stay in memory
RECALL_ROWS = 256  # images whose exact captions an approximate search is compared with

_AGAIN = "Remove it and mine again"

_log = logging.getLogger("pymcip.mining")
Range: TypeAlias = tuple[int, int]  # first and last + 1
# Of a block of images [rows, D] and a range of captions: ids and cosines [rows, k], -1 and -inf where
# there are fewer. The callback is called with the work done and the work to do.
Search: TypeAlias = Callable[[Matrix, Range, Progress], tuple[Int64, Float32]]


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

    def search(images: Matrix, bank: Range, report: Progress) -> tuple[Int64, Float32]:
        queries: Any = images
        if device.type != "cpu":
            queries = torch.from_numpy(np.array(images)).to(device)
        found, cosines = topk(
            queries, captions.pieces(*bank), k, threshold,
            backend=backend, threads=threads, progress=report,
        )  # fmt: skip
        ids = as_numpy(found)
        return np.where(ids < 0, ids, ids + bank[0]), as_numpy(cosines)

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

    def search(images: Matrix, _: Range, report: Progress) -> tuple[Int64, Float32]:
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


class Tasks:
    """The grid of tasks that images and captions are cut into, and what was found by those done.

    Args:
        images: unit rows [N, D].
        captions: how many captions there are.
        k: captions per image, at most.
        folder: of the tasks' files; those found there are done. None keeps all in memory.
        rows: images per block, at most. Blocks are of one size, to a row.
        bank_rows: captions per range, likewise.

    A file is named after its images and captions.
    """

    def __init__(
        self,
        images: MatrixParts,
        captions: int,
        k: int,
        folder: Path | None,
        rows: int,
        bank_rows: int,
    ) -> None:
        self.images, self.captions, self.k, self.folder = images, captions, k, folder
        self._blocks, self._banks = _cut(len(images), rows), _cut(captions, bank_rows)
        # In this order one range of the captions after the other is read, and stays in memory.
        self._all = [(block, bank) for bank in self._banks for block in self._blocks]
        self._memory: dict[str, tuple[Int64, Float32]] = {}

    def __len__(self) -> int:
        return len(self._all)

    def missing(self) -> int:
        """How many tasks are not done."""
        return sum(not self._is_done(task) for task in self._all)

    def do(self, search: Search, shard: Shard) -> None:
        """Do those of a shard's tasks that are not done; the shard's are neighbours."""
        number, count = shard
        own = self._all[len(self) * number // count : len(self) * (number + 1) // count]
        open_tasks = [task for task in own if not self._is_done(task)]
        ready = len(own) - len(open_tasks)
        if ready:
            _log.info("%d of %d tasks were done before; doing the others", ready, len(own))
        if self.folder is not None:
            record_files(self.folder / _name(task) for task in self._all)
        with progress(
            total=sum(map(_work, own)),
            initial=sum(map(_work, own)) - sum(map(_work, open_tasks)),
            description="mining",
            unit="cosine",
            unit_scale=True,
        ) as bar:
            for task in open_tasks:
                (first, last), bank = task
                start, work = bar.n, _work(task)

                def report(done: int, total: int) -> None:
                    bar.update(start + work * done // max(1, total) - bar.n)  # noqa: B023

                found = search(self.images[first:last], bank, report)
                report(1, 1)
                if self.folder is None:
                    self._memory[_name(task)] = found
                else:
                    write_npz(self.folder / _name(task), ids=found[0], cosines=found[1])

    def table(self) -> CaptionTable:
        """Merge what all tasks have found: by cosine descending, then by id ascending.

        Raises:
            DamagedFileError: the file of a task is damaged.
        """
        found = []
        for block in self._blocks:
            parts = [self._read((block, bank)) for bank in self._banks]
            ids, cosines = (np.concatenate(column, axis=1) for column in zip(*parts, strict=True))
            ids, cosines = first_k(ids, cosines, self.k)
            there = ids >= 0
            found.append((there.sum(axis=1), ids[there], cosines[there]))
        counts, ids, cosines = (np.concatenate(column) for column in zip(*found, strict=True))
        return CaptionTable(bounds_of(counts), ids, cosines, self.captions)

    def _is_done(self, task: tuple[Range, Range]) -> bool:
        if self.folder is None:
            return _name(task) in self._memory
        return (self.folder / _name(task)).is_file()

    def _read(self, task: tuple[Range, Range]) -> tuple[Int64, Float32]:
        if self.folder is None:
            return self._memory[_name(task)]
        file, ((first, last), bank) = self.folder / _name(task), task
        stored = read_npz(file, {"ids": ("int64", 2), "cosines": ("float32", 2)}, _AGAIN)
        ids, cosines = stored["ids"], stored["cosines"]
        if not ids.shape == cosines.shape == (last - first, self.k):
            raise damaged(file, f"it holds {ids.shape}, not {(last - first, self.k)}", _AGAIN)
        if ids.size and not (ids.min() >= -1 and ids.max() < bank[1]):
            raise damaged(file, f"it has numbers of captions beyond {bank[1]}", _AGAIN)
        return ids, cosines


def _cut(count: int, rows: int) -> list[Range]:
    """Cut rows into as few ranges as needed, all of one size, to a row."""
    pieces = -(-count // rows)
    bounds = [count * number // pieces for number in range(pieces + 1)]
    return list(itertools.pairwise(bounds))


def _name(task: tuple[Range, Range]) -> str:
    (first, last), (start, end) = task
    return f"images_{first}_{last}_captions_{start}_{end}.npz"


def _work(task: tuple[Range, Range]) -> int:
    """How many cosines a task computes."""
    (first, last), (start, end) = task
    return (last - first) * (end - start)
