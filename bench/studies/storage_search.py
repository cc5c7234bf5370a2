"""The indexes of faiss that the study of storage compares, and how two of them answer one query."""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from harness import Rival

from pymcip.ops.faiss_import import import_faiss
from pymcip.progress import progress
from studies.storage_space import BLOCK, Floats, Ids

FUSION = 60  # of reciprocal rank fusion
CLOSE = 0.005  # of recall, to the best that a knob reaches


@dataclass(frozen=True)
class Kind:
    """A kind of index. `knob` trades time for recall in each search; None: the search is exact."""

    name: str
    make: Callable[[Any, int, argparse.Namespace], Any]  # of faiss, the width, the options
    knob: str | None = None
    values: tuple[int, ...] = ()
    parameters: str = ""  # faiss's class that takes the knob

    def search(self, index: Any, value: int | None) -> Callable[[Floats, int], Ids]:
        """A function of queries and k that gives ids."""
        if self.knob is None:
            return lambda queries, k: index.search(queries, k)[1]
        chosen = getattr(import_faiss(), self.parameters)(**{self.knob: value})
        return lambda queries, k: index.search(queries, k, params=chosen)[1]


def _flat(faiss: Any, dimensions: int, options: argparse.Namespace) -> Any:
    return faiss.IndexFlatIP(dimensions)


def _hnsw(faiss: Any, dimensions: int, options: argparse.Namespace) -> Any:
    index = faiss.IndexHNSWFlat(dimensions, options.links, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = options.ef_construction
    return index


def _ivfpq(faiss: Any, dimensions: int, options: argparse.Namespace) -> Any:
    quantizer = faiss.IndexFlatIP(dimensions)
    index = faiss.IndexIVFPQ(
        quantizer, dimensions, lists(options.vectors), dimensions // 8, 8,
        faiss.METRIC_INNER_PRODUCT,
    )  # fmt: skip
    # faiss warns below 39 rows per centroid, which small runs don't have.
    index.cp.min_points_per_centroid = index.pq.cp.min_points_per_centroid = 1
    return index


def lists(vectors: int) -> int:
    """Of IVF-PQ: 4 sqrt(N), and at least 40 rows each to train them."""
    return max(1, min(round(4 * math.sqrt(vectors)), vectors // 40))


def _doublings(first: int, last: int) -> tuple[int, ...]:
    return tuple(2**power for power in range(first.bit_length() - 1, last.bit_length()))


KINDS = {
    "flat": Kind("flat", _flat),
    "hnsw": Kind("HNSW", _hnsw, "efSearch", _doublings(16, 4096), "SearchParametersHNSW"),
    "ivfpq": Kind("IVF-PQ", _ivfpq, "nprobe", _doublings(1, 1024), "SearchParametersIVF"),
}


@dataclass(frozen=True)
class Built:
    """An index on the disk: bytes of its file, seconds of training and of adding all rows."""

    path: Path
    bytes: int
    train_seconds: float
    add_seconds: float


def build(kind: Kind, images: Floats, path: Path, options: argparse.Namespace) -> Built:
    """Make an index of all images, write it and let go of it."""
    faiss = import_faiss()
    generator = np.random.default_rng([options.seed, 6])
    index = kind.make(faiss, images.shape[1], options)
    start = time.perf_counter()
    if not index.is_trained:
        size = min(len(images), max(40 * lists(len(images)), 256 * 256))  # lists; codes
        index.train(images[np.sort(generator.choice(len(images), size, replace=False))])
    trained = time.perf_counter()
    with progress(total=len(images), description=f"building {path.stem}", unit="rows") as bar:
        for first in range(0, len(images), BLOCK):
            index.add(images[first : first + BLOCK])
            bar.update(min(BLOCK, len(images) - first))
    added = time.perf_counter()
    faiss.write_index(index, str(path))
    return Built(path, path.stat().st_size, trained - start, added - trained)


def fuse(first: Ids, second: Ids, k: int) -> Ids:
    """Reciprocal rank fusion of two lists per query, ids [N, k']; [N, k], ties to the lower id.

    Places that hold -1 are empty, before and after.
    """
    fused = np.full((len(first), k), -1, dtype=np.int64)
    for row, pair in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
        scores: dict[int, float] = {}
        for ids in pair:
            for rank, found in enumerate(ids, 1):
                if found >= 0:
                    scores[found] = scores.get(found, 0.0) + 1 / (FUSION + rank)
        best = sorted(scores, key=lambda found: (-scores[found], found))[:k]
        fused[row, : len(best)] = best
    return fused


def recall(found: Ids, wanted: Ids) -> float:
    """Share of the wanted ids, [N, k] without -1, that are among those found for their query."""
    return float((wanted[:, :, None] == found[:, None, :]).any(axis=2).mean())


def tune(kind: Kind, index: Any, queries: Floats, wanted: Ids, goal: float) -> int | None:
    """The knob's smallest value that reaches the goal, or comes near the best; see the module."""
    if kind.knob is None:
        return None
    most = index.nlist if kind.knob == "nprobe" else math.inf
    reached: dict[int, float] = {}
    for value in kind.values:
        value = int(min(value, most))
        reached[value] = recall(kind.search(index, value)(queries, wanted.shape[1]), wanted)
        if reached[value] >= goal:
            return value
    best = max(reached.values())
    return next(value for value, got in reached.items() if got >= best - CLOSE)


@dataclass(frozen=True)
class Asked:
    """Queries of one kind in one space, [Q, D], and their exact nearest images, [Q, k]."""

    queries: Floats
    wanted: Ids

    def halves(self) -> tuple[Asked, Asked]:
        """Those to tune with, and those to measure."""
        half = len(self.queries) // 2
        parts = (slice(0, half), slice(half, None))
        first, second = (Asked(self.queries[part], self.wanted[part]) for part in parts)
        return first, second


Search = Callable[[Floats, int], Ids]
# Of which space an index is searched, with which query.
SEARCHES = (("image", "image"), ("joint", "image"), ("joint", "text"), ("joint", "combined"))
QUERIES = ("image", "text", "combined")
TWO, ONE = "two embeddings", "one embedding"
AT_ONCE = "two embeddings, at once"  # a thread for each index
TEXTS = "one embedding, texts' knob"


@dataclass(frozen=True)
class System:
    """One rival: how it answers queries, which arrays it takes, the exact answer."""

    name: str
    answer: Callable[..., Ids]
    queries: tuple[Floats, ...]
    wanted: Ids

    def rival(self, k: int, batch: int, found: float) -> Rival:
        """Takes the next `batch` queries at every turn."""
        starts = range(0, len(self.wanted) - batch + 1, batch)
        turns = itertools.cycle(
            [tuple(own[start : start + batch] for own in self.queries) for start in starts]
        )
        return Rival(
            self.name, lambda: self.answer(*next(turns), k), lambda _: {f"recall@{k}": found}
        )


def systems(
    query: str,
    search: Mapping[tuple[str, str], Search],
    asked: Mapping[tuple[str, str], Asked],
    pool: ThreadPoolExecutor | None = None,
    by_texts_knob: Search | None = None,
) -> list[System]:
    """The rivals that answer a kind of query.

    Args:
        query: one of `QUERIES`.
        search, asked: by `SEARCHES`.
        pool: for a rival that searches two indexes at once.
        by_texts_knob: the joint index's search with the knob of text queries, where that differs
            from the knob of combined ones.
    """
    if query != "combined":
        places = {TWO: ("image" if query == "image" else "joint", query), ONE: ("joint", query)}
        return [
            System(name, search[place], (asked[place].queries,), asked[place].wanted)
            for name, place in places.items()
        ]
    image, text, both = asked["image", "image"], asked["joint", "text"], asked["joint", "combined"]
    by_image, by_text = search["image", "image"], search["joint", "text"]

    def in_turn(images: Floats, texts: Floats, k: int) -> Ids:
        return fuse(by_image(images, k), by_text(texts, k), k)

    def at_once(images: Floats, texts: Floats, k: int) -> Ids:
        assert pool is not None
        other = pool.submit(by_image, images, k)
        found = by_text(texts, k)
        return fuse(other.result(), found, k)

    queries = (image.queries, text.queries)
    wanted = fuse(image.wanted, text.wanted, image.wanted.shape[1])
    rivals = [
        System(TWO, in_turn, queries, wanted),
        System(ONE, search["joint", "combined"], (both.queries,), both.wanted),
    ]
    if by_texts_knob is not None:
        rivals.append(System(TEXTS, by_texts_knob, (both.queries,), both.wanted))
    if pool is not None:
        rivals.append(System(AT_ONCE, at_once, queries, wanted))
    return rivals
