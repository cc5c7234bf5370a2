"""Approximate top-k of inner products, with its recall measured: for banks beyond 10^8 rows.

An exact search of N queries in a bank of M rows takes N M D products. `ApproximateIndex` is faiss's
inverted file of product-quantised rows (IVF-PQ; extra `[faiss]`): rows are divided into lists by
their nearest centroid, rotated at random, and stored as codes of D / 8 bytes beside an id of 8. A
search goes through the `nprobe` lists nearest to a query, and ranks the best by their codes anew, by
the scores of the rows themselves (`pymcip.ops.canonical`), as `pymcip.ops.topk` does. So scores are
exact, and only rows can be missing: for a random sample of the queries `topk` computes the exact
answer, and the result says which share of it was found.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from pymcip.errors import ConfigError, DataError, OutputExistsError
from pymcip.files import atomic_path, read_json, write_json
from pymcip.ops.arrays import Array, MatrixParts, Progress, as_numpy, check_finite, check_matrix
from pymcip.ops.canonical import canonical_scores, first_k
from pymcip.ops.faiss_import import faiss_threads, import_faiss
from pymcip.ops.packed_bank import PackedBank
from pymcip.ops.recall import count_hits, estimate_recall, least_reaching, split_sample
from pymcip.ops.topk import topk

Bank: TypeAlias = Any  # an Array or a PackedBank, or a list of such: the parts of one bank

ROWS_PER_CENTROID = 39  # needed to train one; faiss's figure
SMALLEST_BANK = 256 * ROWS_PER_CENTROID  # a code's byte has 256 values
GRAPH_LISTS = 1 << 13  # from so many on, the nearest centroids are found by a graph (HNSW)
TARGET = 0.95  # recall, unless the caller says otherwise
_VERSION = 1
_CODED_ROWS = 1 << 16  # that train the codes
_BYTES = 16 << 20  # of a block of rows in fp32
_QUERIES = 256  # at a time

_log = logging.getLogger("pymcip.ops.approximate")


@dataclass(frozen=True)
class ApproximateResult:
    """What a search found, and how much of the exact answer that is.

    Attributes:
        ids: int64 [N, k], by canonical score descending, then id ascending; -1 where there is none.
        scores: float32 [N, k], canonical (see `pymcip.ops.canonical`); -inf where there is none.
        recall, recall_error, recall_interval: see `pymcip.ops.recall`; recall is NaN if no query was
            sampled.
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

    Attributes:
        rows, columns: M and D of the bank.
        lists: how many lists the rows are divided into.
        code_bytes: bytes of each row's code; its id takes 8 more.
    """

    def __init__(self, index: Any, about: dict[str, Any]) -> None:
        """Use `ApproximateIndex.build` or `ApproximateIndex.load`."""
        self._index, self._about = index, about
        self.rows, self.columns = int(about["rows"]), int(about["columns"])
        self.lists, self.code_bytes = int(about["lists"]), int(about["code_bytes"])

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
            train_rows: rows sampled to train the lists, in memory as fp32; default 40 per list.
            seed: of the sample and of k-means.
            threads: CPU threads; default: torch's number.
            progress: called with the rows added and to add; with 0 added before training.

        Raises:
            MissingDependencyError: faiss is not installed.
            DataError: the bank is too small to train on, or holds rows that are not finite.
            ConfigError: an option is wrong.
        """
        faiss = import_faiss()
        parts = _parts(bank)
        count, columns = parts.shape
        report = progress or (lambda done, total: None)
        if count < SMALLEST_BANK:
            raise DataError(
                f"a bank of {count} rows is too small to train an approximate index: it needs "
                f"{SMALLEST_BANK} (256 centroids x {ROWS_PER_CENTROID} rows); search it exactly "
                "with pymcip.ops.topk"
            )
        most = count // ROWS_PER_CENTROID
        lists = min(round(4 * math.sqrt(count)), most) if lists is None else lists
        divisors = [n for n in range(1, columns + 1) if columns % n == 0]
        if code_bytes is None:
            code_bytes = min(divisors, key=lambda n: (abs(math.log(8 * n / columns)), n))
        train_rows = 40 * lists if train_rows is None else train_rows
        _refuse(
            lists=(1 <= lists <= most, lists, f"1 to {most} for {count} rows"),
            code_bytes=(code_bytes in divisors, code_bytes, f"divisors of {columns}"),
            train_rows=(train_rows >= lists, train_rows, f"at least {lists}"),
        )
        report(0, count)
        graph = "_HNSW32" if lists >= GRAPH_LISTS else ""
        index = faiss.index_factory(
            columns, f"RR,IVF{lists}{graph},PQ{code_bytes}x8", faiss.METRIC_INNER_PRODUCT
        )
        means = faiss.extract_index_ivf(index).cp
        means.seed = seed
        means.min_points_per_centroid = 1  # fewer than 39 are the caller's choice: no warning
        means.max_points_per_centroid = -(-train_rows // lists)
        size = min(count, max(train_rows, _CODED_ROWS))
        sample = _fp32(parts[np.sort(np.random.default_rng(seed).choice(count, size, False))])
        with faiss_threads(threads or torch.get_num_threads()):
            with np.errstate(over="ignore", invalid="ignore"):  # others are refused below
                index.train(sample[np.isfinite(np.einsum("ij,ij->i", sample, sample))])
            del sample
            for first, block in parts.blocks(max(1, _BYTES // (4 * columns))):
                check_finite("ApproximateIndex", "the bank", block, first)
                index.add(_fp32(block))
                report(first + len(block), count)
        about = {"version": _VERSION, "rows": count, "columns": columns, "lists": lists}
        return cls(index, {**about, "code_bytes": code_bytes, "bank": _fingerprint(parts)})

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
            return cls(index, about)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise DataError(
                f"{path} can't be read as an approximate index: {str(error).splitlines()[0]}. "
                "Build it again with pymcip.ops.ApproximateIndex.build"
            ) from error

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
                costs M D products; and as many again to choose nprobe. 0 measures nothing.
            population: of how many queries these are a random sample themselves; default: of none
                but these. Error and interval of the recall are for them.
            backend: of `pymcip.ops.topk`, for the exact answers.
            seed: of the samples.
            threads: CPU threads; default: torch's number.
            progress: called with the queries finished and to finish, the samples among them.

        Raises:
            ConfigError, DataError: an option or the data are wrong; the bank is another one.
        """
        parts, count = _parts(bank), len(queries)
        topk(queries, parts.parts[0][:0], k, threshold, backend=backend)  # for its checks
        least = int(nprobe is None)
        _refuse(
            recall=(recall is None or 0 < recall <= 1, recall, "above 0, at most 1"),
            nprobe=(nprobe is None or 1 <= nprobe <= self.lists, nprobe, f"1 to {self.lists}"),
            rerank=(rerank >= 1, rerank, "at least 1"),
            sample=(sample >= least, sample, f"at least {least}{', or 0 with nprobe' * least}"),
            population=(
                population is None or population >= count, population,
                f"at least the {count} queries themselves",
            ),
        )  # fmt: skip
        if recall is not None and nprobe is not None:
            raise ConfigError("recall and nprobe exclude each other; give one")
        if parts.shape != (self.rows, self.columns) or _fingerprint(parts) != self._about["bank"]:
            raise DataError(
                f"the index was built from another bank ({self.rows} x {self.columns}) than the "
                f"one given ({' x '.join(map(str, parts.shape))}); give that one, or build an "
                "index of this one"
            )
        threads = threads or torch.get_num_threads()
        candidates = min(self.rows, max(100, rerank * k))
        floor = -np.inf if threshold is None else float(np.float32(threshold))
        measured, tuned = split_sample(count, sample, nprobe is None, seed)
        total, done = len(measured) + len(tuned) + count, 0

        def report(finished: int = 0) -> None:
            nonlocal done
            done += finished
            if progress is not None:
                progress(done, total)

        def exact(rows: np.ndarray) -> np.ndarray:
            ids, _ = topk(
                queries[rows], bank, k, threshold, backend=backend, threads=threads,
                progress=lambda *_: report(),
            )  # fmt: skip
            report(len(rows))
            return as_numpy(ids)

        def found(asked: Array, nprobe: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for first in range(0, len(asked), _QUERIES):
                rows = _fp32(asked[first : first + _QUERIES])
                with faiss_threads(threads):  # not while the caller has control
                    answer = self._best(rows, parts, k, floor, nprobe, candidates)
                yield answer

        if nprobe is None and not count:
            nprobe = 1
        if nprobe is None:
            due, sampled = exact(tuned), queries[tuned]

            def measure(nprobe: int) -> float:
                ids = np.concatenate([ids for ids, _ in found(sampled, nprobe)])
                report()
                return estimate_recall(*count_hits(ids, due), len(due))[0]

            nprobe, reached = least_reaching(measure, self.lists, recall or TARGET)
            if math.isnan(reached):  # the threshold admits nothing of the sample
                nprobe = max(1, self.lists // 16)
            elif reached < (recall or TARGET):
                _log.warning(
                    "a recall of %.3f was asked for; all %d lists give %.3f: raise rerank=, or "
                    "build the index with more code_bytes (now %d)",
                    recall or TARGET, self.lists, reached, self.code_bytes,
                )  # fmt: skip
        ids = np.full((count, k), -1, dtype=np.int64)
        scores = np.full((count, k), -np.inf, dtype=np.float32)
        for first, block in zip(range(0, count, _QUERIES), found(queries, nprobe), strict=True):
            part = slice(first, first + len(block[0]))
            ids[part], scores[part] = block
            report(len(block[0]))
        share = math.nan, math.nan, (0.0, 1.0)
        if len(measured):
            share = estimate_recall(
                *count_hits(ids[measured], exact(measured)), population or count
            )
        answer: list[Array] = [ids, scores]
        if isinstance(queries, torch.Tensor):
            answer = [torch.from_numpy(part).to(queries.device) for part in answer]
        return ApproximateResult(answer[0], answer[1], *share, len(measured), nprobe, candidates)

    def _best(
        self,
        rows: np.ndarray,
        parts: MatrixParts,
        k: int,
        threshold: float,
        nprobe: int,
        candidates: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids and canonical scores [n, k] of the best for a block of queries (fp32)."""
        faiss = import_faiss()
        lists = faiss.SearchParametersIVF(nprobe=nprobe)
        options = faiss.SearchParametersPreTransform(index_params=lists)
        listed = self._index.search(rows, candidates, params=options)[1]
        step = max(1, _BYTES // (4 * self.columns * candidates))
        found = []
        for first in range(0, len(rows), step):
            ids = listed[first : first + step]
            wanted, places = np.unique(ids, return_inverse=True)  # ascending: for memory maps
            taken = _fp32(parts[np.maximum(wanted, 0)])
            scores = canonical_scores(rows[first : first + step], taken, places.reshape(ids.shape))
            found.append(first_k(ids, scores, k, threshold))
        ids, scores = (np.concatenate(column) for column in zip(*found, strict=True))
        return ids, scores


def _parts(bank: Bank) -> MatrixParts:
    given = bank if isinstance(bank, (list, tuple)) else [bank]
    parts = [part.rows if isinstance(part, PackedBank) else part for part in given]
    for part in parts:
        check_matrix("ApproximateIndex", "bank", part)
    return MatrixParts(parts)


def _fingerprint(parts: MatrixParts) -> str:
    """SHA-256 of some rows, by which a bank is recognised."""
    ids = np.linspace(0, len(parts) - 1, min(len(parts), 64)).astype(np.int64)
    return hashlib.sha256(_fp32(parts[ids]).tobytes()).hexdigest()


def _fp32(rows: Array) -> np.ndarray:
    return np.require(as_numpy(rows), np.float32, ["C", "A"])


def _refuse(**given: tuple[bool, Any, str]) -> None:
    """Raise for all arguments that are not right; each: whether it is, its value, what is allowed."""
    problems = [
        f"{name}={value!r} is not allowed; allowed: {allowed}"
        for name, (right, value, allowed) in given.items()
        if not right
    ]
    if problems:
        raise ConfigError(problems)
