"""Approximate top-k of inner products, with its recall measured: for banks beyond 10^8 rows.

An exact search of N queries in a bank of M rows costs N M D products. `ApproximateIndex` looks at
a small part of the bank, as compressed codes, and scores what looks best exactly:

1. The bank's rows are divided into lists by their nearest centroid (IVF; spherical k-means).
2. In its list a row is stored as a product-quantised code of what is left after subtracting the
   centroid, rotated at random so that each part of it holds as much (PQ; D / 8 bytes beside an id
   of 8). A trained rotation (OPQ) took 6 times as long to build and found no more.
3. A search goes through the `nprobe` lists nearest to the query, takes the best by their codes, and
   ranks those by canonical scores of the rows themselves, as `pymcip.ops.topk` does.
4. For a random sample of the queries `pymcip.ops.topk` computes the exact answer, and the result
   tells which share of it was found.

So scores are exact, and only rows can be missing. faiss (extra `[faiss]`) does 2 and the first half
of 3; assigning rows to lists, the bulk of building, is `topk` with k = 1.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from pymcip.errors import BackendError, ConfigError, DataError, OutputExistsError
from pymcip.files import atomic_path, read_json, write_json
from pymcip.ops.arrays import Array, Progress, check_matrix
from pymcip.ops.canonical import canonical_scores
from pymcip.ops.faiss_import import faiss_threads, import_faiss
from pymcip.ops.packed_bank import PackedBank
from pymcip.ops.topk import topk

Bank: TypeAlias = Any  # an Array or a PackedBank, or a list of such: the parts of one bank

CENTROIDS = 256  # of a sub-quantiser: 8 bits
ROWS_PER_CENTROID = 39  # needed to train one; faiss's figure
SMALLEST_BANK = CENTROIDS * ROWS_PER_CENTROID
TARGET = 0.95  # recall, unless the caller says otherwise
CONFIDENCE = 1.959964  # standard errors of a 95 % interval

_VERSION = 1
_ITERATIONS = 10  # of k-means
_CODED_ROWS = 1 << 16  # that train the codes
_BYTES = 16 << 20  # of a block of rows in fp32
_QUERIES = 256  # at a time
_FINGERPRINT_ROWS = 64

_log = logging.getLogger("pymcip.ops.approximate")


@dataclass(frozen=True)
class ApproximateResult:
    """What a search found, and how much of the exact answer that is.

    Attributes:
        ids: int64 [N, k], by canonical score descending, then id ascending; -1 where there is none.
        scores: float32 [N, k], canonical (see `pymcip.ops.canonical`); -inf where there is none.
        recall: of all pairs in the exact answers for the sampled queries (k and threshold applied),
            the share that was found; NaN if those answers are empty, or none was asked for.
        recall_error: its standard error, queries being the units sampled.
        recall_interval: 95 % interval (Wilson's, with as many trials as the standard error tells).
        recall_queries: how many queries were sampled.
        nprobe: lists searched per query.
        candidates: rows per query that were scored exactly, at most.
    """

    ids: Array
    scores: Array
    recall: float
    recall_error: float
    recall_interval: tuple[float, float]
    recall_queries: int
    nprobe: int
    candidates: int


class ApproximateIndex:
    """An inverted file of product-quantised rows (faiss's IVF-PQ). Made by `build` or `load`.

    It doesn't hold the rows: `search` takes the bank that it was built from.
    """

    def __init__(self, index: Any, about: dict[str, Any]) -> None:
        """For `build` and `load`."""
        self._index = index
        self._about = about

    @property
    def rows(self) -> int:
        """M, of the bank."""
        return int(self._about["rows"])

    @property
    def columns(self) -> int:
        """D."""
        return int(self._about["columns"])

    @property
    def lists(self) -> int:
        """Lists that the rows are divided into."""
        return int(self._about["lists"])

    @property
    def code_bytes(self) -> int:
        """Of each row's code; its id takes 8 more."""
        return int(self._about["code_bytes"])

    @classmethod
    def build(
        cls,
        bank: Bank,
        *,
        lists: int | None = None,
        code_bytes: int | None = None,
        train_rows: int | None = None,
        seed: int = 0,
        threads: int | None = None,
        progress: Progress | None = None,
    ) -> ApproximateIndex:
        """Train an index on a sample of the bank's rows and add all of them, block by block.

        Args:
            bank: what `pymcip.ops.topk` takes, or a list of such parts (memory maps, usually); at
                least 9984 rows.
            lists: default 4 sqrt(M), and at most M / 39.
            code_bytes: a divisor of D; default: the one nearest to D / 8.
            train_rows: rows sampled to train the lists, in memory as fp16; default 40 per list.
            seed: of the sample and of k-means.
            threads: CPU threads; default: torch's number.
            progress: called with the rows added and to add; with 0 added while training.

        Raises:
            MissingDependencyError: faiss is not installed.
            DataError: the bank is too small to train on, or holds rows that are not finite.
            ConfigError: an option is wrong.
        """
        faiss = import_faiss()
        parts = _Parts(bank)
        count, columns = parts.rows, parts.columns
        if count < SMALLEST_BANK:
            raise DataError(
                f"a bank of {count} rows is too small to train an approximate index: it needs "
                f"{SMALLEST_BANK} ({CENTROIDS} centroids x {ROWS_PER_CENTROID} rows); search it "
                "exactly with pymcip.ops.topk"
            )
        if lists is None:
            lists = min(round(4 * math.sqrt(count)), count // ROWS_PER_CENTROID)
        if code_bytes is None:
            code_bytes = min(
                (n for n in range(1, columns + 1) if columns % n == 0),
                key=lambda n: (abs(math.log(8 * n / columns)), n),
            )
        if train_rows is None:
            train_rows = 40 * lists
        _check_sizes(count, columns, lists, code_bytes, train_rows)
        threads = threads or torch.get_num_threads()
        generator = np.random.default_rng(seed)

        def waiting() -> None:
            if progress is not None:
                progress(0, count)

        waiting()
        with faiss_threads(threads):
            directions = _directions(parts, train_rows, generator)
            centroids = _spherical_means(directions, lists, generator, threads, waiting)
            del directions
            chosen = generator.choice(count, min(count, _CODED_ROWS), replace=False)
            rows = parts.take(chosen)
            _check_finite(rows, chosen)
            rows -= centroids[_nearest(rows, centroids, threads)]
            rotation = faiss.RandomRotationMatrix(columns, columns)
            rotation.init(seed)
            waiting()
            quantizer = faiss.IndexFlatIP(columns)
            quantizer.add(rotation.apply(centroids))
            coded = faiss.IndexIVFPQ(
                quantizer, columns, lists, code_bytes, 8, faiss.METRIC_INNER_PRODUCT
            )
            coded.pq.train(rotation.apply(rows))
            coded.is_trained = True
            del rows
            searched = _packed(centroids, threads)
            done = 0
            for block in parts.blocks():
                _check_finite(block, range(done, done + len(block)))
                nearest = _nearest(block, searched, threads)
                rotated = rotation.apply(block)
                coded.add_core(len(block), faiss.swig_ptr(rotated), None, faiss.swig_ptr(nearest))
                done += len(block)
                if progress is not None:
                    progress(done, count)
        index = faiss.IndexPreTransform(rotation, coded)
        about = {
            "version": _VERSION,
            "rows": count,
            "columns": columns,
            "lists": lists,
            "code_bytes": code_bytes,
            "bank": parts.fingerprint(),
        }
        return cls(index, about)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the folder `path`: index.faiss and index.json, complete or not at all.

        Raises:
            OutputExistsError: `path` is there and holds something other than such an index.
        """
        path = Path(path)
        if path.exists() and not (path / "index.json").is_file():
            raise OutputExistsError(
                f"{path} is there and holds no index that could be replaced; give a new folder"
            )
        with atomic_path(path) as temporary:
            temporary.mkdir()
            import_faiss().write_index(self._index, str(temporary / "index.faiss"))
            write_json(temporary / "index.json", self._about)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, memory_map: bool = False) -> ApproximateIndex:
        """Read an index that `save` wrote.

        Args:
            path: its folder.
            memory_map: leave the codes on disk, and read of them what searches touch.

        Raises:
            MissingDependencyError: faiss is not installed.
            DataError: there is no index, or it is damaged or of another version.
        """
        faiss = import_faiss()
        path = Path(path)
        try:
            about = read_json(path / "index.json")
            if about["version"] != _VERSION:
                raise ValueError(f"its version is {about['version']}, not {_VERSION}")
            flags = (faiss.IO_FLAG_MMAP,) if memory_map else ()
            index = faiss.read_index(str(path / "index.faiss"), *flags)
            if (index.ntotal, index.d) != (about["rows"], about["columns"]):
                raise ValueError("its files don't belong together")
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise DataError(
                f"{path} can't be read as an approximate index: {str(error).splitlines()[0]}. "
                "Build it again with pymcip.ops.ApproximateIndex.build"
            ) from error
        return cls(index, about)

    def search(
        self,
        queries: Array,
        bank: Bank,
        k: int,
        threshold: float | None = None,
        *,
        recall: float | None = None,
        nprobe: int | None = None,
        rerank: int = 30,
        sample: int = 256,
        population: int | None = None,
        backend: str = "auto",
        seed: int = 0,
        threads: int | None = None,
        progress: Progress | None = None,
    ) -> ApproximateResult:
        """The k best rows for each query among those looked at, and the recall of that.

        Args:
            queries: as for `pymcip.ops.topk`; the results are of their kind and on their device.
            bank: the one that the index was built from.
            k: places per query.
            threshold: lowest score admitted (inclusive); None admits all.
            recall: the share of the exact answer that should be found; nprobe is chosen for it, on
                a sample of queries of its own. Default 0.95, unless `nprobe` is given.
            nprobe: lists to search per query.
            rerank: candidates that are scored exactly, per place asked for (at least 100 in all).
            sample: queries whose exact answer is computed to measure the recall, each of which
                costs M D products; and as many again to choose nprobe. 0 measures nothing: recall is NaN.
            population: of how many queries these are a random sample themselves; default: of none
                but these. Error and interval of the recall are for them.
            backend: of `pymcip.ops.topk`, for the exact answers.
            seed: of the samples.
            threads: CPU threads; default: torch's number.
            progress: called with the queries finished and to finish, the samples among them.

        Raises:
            ConfigError, DataError: an option or the data are wrong; the bank is another one.
        """
        parts = _Parts(bank)
        topk(queries, parts.parts[0][:0], k, threshold, backend=backend)  # for its checks
        self._check_search(parts, recall, nprobe, rerank, sample)
        if population is not None and population < len(queries):
            raise ConfigError(
                f"population={population!r} is not allowed; allowed: at least the {len(queries)} "
                "queries themselves"
            )
        threads = threads or torch.get_num_threads()
        count = len(queries)
        candidates = min(self.rows, max(100, rerank * k))
        floor = -np.inf if threshold is None else float(np.float32(threshold))
        order = np.random.default_rng(seed).permutation(count)
        measured = np.sort(order[:sample])
        tuned = measured[:0]
        if nprobe is None:  # on other queries, lest chance be taken for recall, if there are any
            tuned = np.sort(order[sample : 2 * sample])
            if len(tuned) < min(sample, 32):
                tuned, measured = np.sort(order[::2]), np.sort(order[1::2] if count > 1 else order)
        total, done = len(measured) + len(tuned) + count, 0

        def report(finished: int) -> None:
            nonlocal done
            done += finished
            if progress is not None:
                progress(done, total)

        def waiting(*_: int) -> None:
            report(0)

        def exact(rows: np.ndarray) -> np.ndarray:
            ids, _ = topk(
                queries[_index(rows, queries)], parts.given, k, threshold, backend=backend,
                threads=threads, progress=waiting,
            )  # fmt: skip
            report(len(rows))
            return ids.cpu().numpy() if isinstance(ids, torch.Tensor) else ids

        def found(asked: Array, nprobe: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for first in range(0, len(asked), _QUERIES):
                rows = _fp32(asked[first : first + _QUERIES])
                with faiss_threads(threads):  # not while the caller has control
                    answer = self._rows(rows, parts, k, floor, nprobe, candidates)
                yield answer

        if nprobe is None:
            due, sampled = exact(tuned), queries[_index(tuned, queries)]

            def measure(nprobe: int) -> float:
                ids = np.concatenate([ids for ids, _ in found(sampled, nprobe)])
                waiting()
                return _estimate(*_hits(ids, due), len(due))[0]

            nprobe = self._choose(measure, recall or TARGET) if count else 1
        ids = np.full((count, k), -1, dtype=np.int64)
        scores = np.full((count, k), -np.inf, dtype=np.float32)
        first = 0
        for block_ids, block_scores in found(queries, nprobe):
            last = first + len(block_ids)
            ids[first:last], scores[first:last] = block_ids, block_scores
            report(last - first)
            first = last
        share, error, interval = math.nan, math.nan, (0.0, 1.0)
        if len(measured):
            hits = _hits(ids[measured], exact(measured))
            share, error, interval = _estimate(*hits, population or count)
        return ApproximateResult(
            ids=_like(queries, ids),
            scores=_like(queries, scores),
            recall=share,
            recall_error=error,
            recall_interval=interval,
            recall_queries=len(measured),
            nprobe=nprobe,
            candidates=candidates,
        )

    def _check_search(
        self, parts: _Parts, recall: float | None, nprobe: int | None, rerank: int, sample: int
    ) -> None:
        problems = []
        if recall is not None and nprobe is not None:
            problems.append("recall and nprobe exclude each other; give one")
        if recall is not None and not 0 < recall <= 1:
            problems.append(f"recall={recall!r} is not allowed; allowed: above 0, at most 1")
        if nprobe is not None and not 1 <= nprobe <= self.lists:
            problems.append(f"nprobe={nprobe!r} is not allowed; allowed: 1 to {self.lists}")
        if rerank < 1:
            problems.append(f"rerank={rerank!r} is not allowed; allowed: at least 1")
        if sample < (nprobe is None):
            least = "1, or 0 with nprobe given" if nprobe is None else "0"
            problems.append(f"sample={sample!r} is not allowed; allowed: at least {least}")
        if problems:
            raise ConfigError(problems)
        shape, own = (parts.rows, parts.columns), (self.rows, self.columns)
        if shape != own or parts.fingerprint() != self._about["bank"]:
            raise DataError(
                f"the index was built from another bank ({own[0]} x {own[1]}) than the one given "
                f"({shape[0]} x {shape[1]}); give that one, or build an index of this one"
            )

    def _rows(
        self,
        rows: np.ndarray,
        parts: _Parts,
        k: int,
        threshold: float,
        nprobe: int,
        candidates: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids and canonical scores [n, k] of the best for a block of queries (fp32)."""
        faiss = import_faiss()
        options = faiss.SearchParametersPreTransform(
            index_params=faiss.SearchParametersIVF(nprobe=nprobe)
        )
        listed = self._index.search(rows, candidates, params=options)[1]
        found_ids = np.full((len(rows), k), -1, dtype=np.int64)
        found_scores = np.full((len(rows), k), -np.inf, dtype=np.float32)
        step = max(1, _BYTES // (4 * self.columns * candidates))
        for first in range(0, len(rows), step):
            ids = listed[first : first + step]
            wanted, places = np.unique(ids, return_inverse=True)  # ascending: for memory maps
            taken = parts.take(np.maximum(wanted, 0))
            scores = canonical_scores(rows[first : first + step], taken, places.reshape(ids.shape))
            reached = (ids >= 0) & (scores >= threshold)
            ids = np.where(reached, ids, -1)
            scores = np.where(reached, scores, np.float32(-np.inf))
            order = np.lexsort((ids, -scores), axis=-1)[:, :k]
            part = np.s_[first : first + step, : order.shape[1]]
            found_ids[part] = np.take_along_axis(ids, order, axis=1)
            found_scores[part] = np.take_along_axis(scores, order, axis=1)
        return found_ids, found_scores

    def _choose(self, measure: Callable[[int], float], target: float) -> int:
        """The least nprobe, within an eighth, whose recall on the sample reaches the target."""
        below, nprobe = 0, 1
        while not (share := measure(nprobe)) >= target:
            if math.isnan(share):
                return max(1, self.lists // 16)  # the threshold admits nothing of the sample
            if nprobe == self.lists:
                _log.warning(
                    "a recall of %.3f was asked for; all %d lists give %.3f: raise rerank=, or "
                    "build the index with more code_bytes (now %d)",
                    target, self.lists, share, self.code_bytes,
                )  # fmt: skip
                return nprobe
            below, nprobe = nprobe, min(2 * nprobe, self.lists)
        while nprobe - below > max(1, nprobe // 8):
            middle = (below + nprobe) // 2
            if measure(middle) >= target:
                nprobe = middle
            else:
                below = middle
        return nprobe


class _Parts:
    """The rows of a bank that may lie in several parts; values are given as fp32, exactly."""

    def __init__(self, bank: Bank) -> None:
        self.given = list(bank) if isinstance(bank, (list, tuple)) else [bank]
        self.parts: list[Array] = [
            part.rows if isinstance(part, PackedBank) else part for part in self.given
        ]
        for part in self.parts:
            check_matrix("ApproximateIndex", "bank", part)
        if len({part.shape[1] for part in self.parts}) != 1:
            raise ConfigError(
                f"the bank has {len(self.parts)} parts, {[part.shape[1] for part in self.parts]} "
                "columns wide; allowed: at least one part, all of one width"
            )
        self.columns = int(self.parts[0].shape[1])
        self.bounds = np.cumsum([0, *(len(part) for part in self.parts)])
        self.rows = int(self.bounds[-1])

    def take(self, ids: np.ndarray) -> np.ndarray:
        """Rows by their numbers in the whole bank: fp32 [n, D], a copy."""
        taken = np.empty((len(ids), self.columns), dtype=np.float32)
        owners = np.searchsorted(self.bounds, ids, side="right") - 1
        for owner in np.unique(owners):
            places = np.flatnonzero(owners == owner)
            rows = ids[places] - self.bounds[owner]
            part = self.parts[owner]
            taken[places] = _fp32(part[_index(rows, part)])
        return taken

    def blocks(self) -> Iterator[np.ndarray]:
        """All rows in their order."""
        step = max(1, _BYTES // (4 * self.columns))
        for part in self.parts:
            for start in range(0, len(part), step):
                yield _fp32(part[start : start + step])

    def fingerprint(self) -> str:
        """SHA-256 of some rows: another bank has another one."""
        ids = np.linspace(0, self.rows - 1, min(self.rows, _FINGERPRINT_ROWS)).astype(np.int64)
        return hashlib.sha256(self.take(ids).tobytes()).hexdigest()


def _fp32(rows: Array) -> np.ndarray:
    if isinstance(rows, torch.Tensor):
        return rows.detach().to("cpu", torch.float32).contiguous().numpy()
    return np.require(rows, np.float32, ["C", "A"])


def _like(queries: Array, found: np.ndarray) -> Array:
    return (
        torch.from_numpy(found).to(queries.device) if isinstance(queries, torch.Tensor) else found
    )


def _index(rows: np.ndarray, matrix: Array) -> Any:
    return rows if isinstance(matrix, np.ndarray) else torch.from_numpy(rows).to(matrix.device)


def _check_sizes(count: int, columns: int, lists: int, code_bytes: int, train_rows: int) -> None:
    problems = []
    if not 1 <= lists <= count // ROWS_PER_CENTROID:
        problems.append(
            f"lists={lists!r} is not allowed with {count} rows; allowed: 1 to "
            f"{count // ROWS_PER_CENTROID} ({ROWS_PER_CENTROID} rows each)"
        )
    if code_bytes < 1 or columns % code_bytes:
        problems.append(f"code_bytes={code_bytes!r} is not allowed; allowed: divisors of {columns}")
    if train_rows < lists:
        problems.append(f"train_rows={train_rows!r} is not allowed; allowed: at least {lists}")
    if problems:
        raise ConfigError(problems)


def _check_finite(block: np.ndarray, numbers: Sequence[int] | np.ndarray) -> None:
    with np.errstate(over="ignore", invalid="ignore"):
        bad = np.flatnonzero(~np.isfinite(np.einsum("ij,ij->i", block, block)))
    if len(bad):
        raise DataError(
            f"row {numbers[bad[0]]} of the bank holds NaN or infinity, or its norm overflows "
            "float32; only finite rows can be ranked. Embed that item again, or drop the row"
        )


def _directions(parts: _Parts, count: int, generator: np.random.Generator) -> np.ndarray:
    """Some of the bank's rows, at length 1: fp16 [n, D]."""
    chosen = np.sort(generator.choice(parts.rows, min(parts.rows, count), replace=False))
    directions = np.empty((len(chosen), parts.columns), dtype=np.float16)
    step = max(1, _BYTES // (4 * parts.columns))
    for first in range(0, len(chosen), step):
        rows = parts.take(chosen[first : first + step])
        _check_finite(rows, chosen[first : first + step])
        directions[first : first + step] = _unit(rows)
    return directions


def _spherical_means(
    directions: np.ndarray,
    lists: int,
    generator: np.random.Generator,
    threads: int,
    waiting: Callable[[], None],
) -> np.ndarray:
    """Centroids of length 1, fp32 [lists, D]: k-means by inner product."""
    chosen = generator.choice(len(directions), lists, replace=False)
    centroids = directions[np.sort(chosen)].astype(np.float32)
    for _ in range(_ITERATIONS):
        nearest = torch.from_numpy(_nearest(directions, centroids, threads, waiting))
        sums = torch.zeros(centroids.shape)
        step = max(1, _BYTES // (4 * centroids.shape[1]))
        for start in range(0, len(directions), step):
            rows = torch.from_numpy(directions[start : start + step]).float()
            sums.index_add_(0, nearest[start : start + step], rows)
        centroids = _unit(sums.numpy())
        empty = np.flatnonzero(np.bincount(nearest.numpy(), minlength=lists) == 0)
        replacing = generator.choice(len(directions), len(empty), replace=False)
        centroids[empty] = directions[replacing]
    return centroids


def _unit(rows: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1)


def _packed(centroids: np.ndarray, threads: int) -> np.ndarray | PackedBank:
    """To be searched by many blocks, each of which would have them packed anew."""
    try:
        return PackedBank.pack(centroids, threads=threads)
    except BackendError:  # nothing here searches packed banks
        return centroids


def _nearest(
    rows: np.ndarray,
    centroids: np.ndarray | PackedBank,
    threads: int,
    waiting: Callable[[], None] | None = None,
) -> np.ndarray:
    """The number of each row's centroid, int64 [n]."""
    progress = None if waiting is None else lambda *_: waiting()
    ids = topk(rows, centroids, 1, threads=threads, progress=progress)[0]
    return np.ascontiguousarray(ids[:, 0])


def _hits(found: np.ndarray, due: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each query how many of the ids due were found, and how many were due."""
    hits = [
        int(np.isin(wanted[wanted >= 0], own).sum()) for wanted, own in zip(due, found, strict=True)
    ]
    return np.array(hits, dtype=np.int64), (due >= 0).sum(axis=1)


def _estimate(
    hits: np.ndarray, due: np.ndarray, population: int
) -> tuple[float, float, tuple[float, float]]:
    """Recall, its standard error and its 95 % interval, from a sample of `population` queries.

    A ratio of two means, of hits and of ids due, over queries drawn without replacement; its
    variance by linearisation. The interval is Wilson's for as many trials as would have this
    standard error; where it is 0 (all or nothing found) each query counts as one trial.
    """
    count = len(hits)
    if not due.sum():
        return math.nan, math.nan, (0.0, 1.0)
    share = float(hits.sum() / due.sum())
    if count == population:  # nothing is left to chance
        return share, 0.0, (share, share)
    variance = 0.0
    trials = float((due > 0).sum())
    if count > 1:
        residuals = hits - share * due
        variance = float((residuals**2).sum()) / (count * (count - 1) * float(due.mean()) ** 2)
        variance *= 1 - count / population
    if variance > 0 and 0 < share < 1:
        trials = min(share * (1 - share) / variance, float(due.sum()))
    ratio = CONFIDENCE**2 / trials
    centre = (share + ratio / 2) / (1 + ratio)
    half = math.sqrt(ratio * share * (1 - share) + ratio**2 / 4) / (1 + ratio)
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    # Exactly so by the formula, and to a rounding by its evaluation.
    return share, math.sqrt(variance), (low if share > 0 else 0.0, high if share < 1 else 1.0)
