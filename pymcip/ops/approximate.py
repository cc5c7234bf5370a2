"""Approximate top-k of inner products, with its recall measured: for banks beyond 10^8 rows.

`ApproximateIndex` is faiss's inverted file of product-quantised rows (IVF-PQ; extra `[faiss]`): rows
are rotated at random, divided into lists by their nearest centroid, and held in memory as codes of
D / 8 bytes, 4 bits for 4 numbers (faiss's fast scan). A search goes through the `nprobe` lists
nearest to a query, and ranks the rows that are best by their codes again, by their canonical scores
(`pymcip.ops.canonical`). So scores are exact, and only rows can be missing: for a random sample of
the queries `topk` computes the exact answer, and the result says what share of it was found.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pymcip.contents import file_digest
from pymcip.errors import ConfigError, DataError, OutputExistsError
from pymcip.files import atomic_path, read_json, write_json
from pymcip.ops.arrays import Array, Progress, as_numpy, check_finite, dense_fp32
from pymcip.ops.canonical import canonical_scores, first_k
from pymcip.ops.faiss_import import faiss_threads, import_faiss
from pymcip.ops.packed_bank import Bank, plain_parts
from pymcip.ops.recall import ApproximateResult, choose_effort, recall_of, split_sample
from pymcip.ops.topk import topk

RERANK = 30  # candidates that are scored exactly, per place asked for; and at least 100 in all
GRAPH_LISTS = 1 << 13  # from so many on, the nearest centroids are found by a graph (HNSW)
_VERSION = 2  # of the files
_LIST_ROWS = 39  # least rows per list, as faiss wants it
LEAST_ROWS = 256 * _LIST_ROWS  # of a bank; fewer are soon searched exactly
_CODED_ROWS = 1 << 16  # that train the codes
_BYTES = 32 << 20  # of a block of rows in fp32


class ApproximateIndex:
    """An inverted file of product-quantised rows (faiss's IVF-PQ). Made by `build` or `load`.

    It doesn't hold the rows: `search` takes the bank that it was built from.

    Attributes: `rows` and `columns` of the bank, `lists` that its rows are divided into, and
    `code_bytes` of each row.
    """

    def __init__(self, index: Any, bank: str) -> None:
        """Use `ApproximateIndex.build` or `ApproximateIndex.load`."""
        self._index, self._bank = index, bank  # `bank`: its fingerprint
        self.rows, self.columns = int(index.ntotal), int(index.d)
        ivf = import_faiss().extract_index_ivf(index)
        self.lists, self.code_bytes = int(ivf.nlist), int(ivf.code_size)

    @classmethod
    def build(
        cls,
        bank: Bank,
        *,
        lists: int | None = None,
        seed: int = 0,
        threads: int | None = None,
        progress: Progress | None = None,
    ) -> ApproximateIndex:
        """Train an index on a sample of the bank's rows and add all of them, block by block.

        Args:
            bank: what `pymcip.ops.topk` takes, usually a list of memory maps; at least 9984 rows.
            lists: default 4 sqrt(M), at most M / 39; each is trained by 40 rows in memory.
            seed: of the sample and of k-means.
            threads: CPU threads; default: torch's number.
            progress: called with the rows added and to add; with 0 added before training.

        Raises:
            MissingDependencyError: faiss is not installed.
            DataError: the bank is too small to train on, or holds rows that are not finite.
            ConfigError: `lists` or the bank is not allowed.
        """
        faiss = import_faiss()
        parts = plain_parts("ApproximateIndex", bank)
        count, columns = parts.shape
        report = progress or (lambda done, total: None)
        most = count // _LIST_ROWS
        if count < LEAST_ROWS:
            raise DataError(
                f"a bank of {count} rows is too small to train an approximate index: it needs "
                f"{LEAST_ROWS} rows; search it exactly with pymcip.ops.topk"
            )
        lists = min(round(4 * math.sqrt(count)), most) if lists is None else lists
        if not 1 <= lists <= most:
            raise ConfigError(f"lists={lists} is not allowed; allowed: 1 to {most}")
        report(0, count)
        codes = 2 * -(-columns // 8)  # of 4 bits each
        graph = "_HNSW32" if lists >= GRAPH_LISTS else ""
        form = f"RR{4 * codes},IVF{lists}{graph},PQ{codes}x4fs"
        index = faiss.index_factory(columns, form, faiss.METRIC_INNER_PRODUCT)
        means = faiss.extract_index_ivf(index).cp
        means.seed, means.max_points_per_centroid = seed, _LIST_ROWS + 1
        size = min(count, max((_LIST_ROWS + 1) * lists, _CODED_ROWS))
        sample = dense_fp32(parts[np.sort(np.random.default_rng(seed).choice(count, size, False))])
        with faiss_threads(threads or torch.get_num_threads()):
            index.train(sample[np.isfinite(sample).all(1)])  # others are refused below
            del sample
            for first, block in parts.blocks(max(1, _BYTES // (4 * columns))):
                check_finite("ApproximateIndex", "the bank", block, first)
                index.add(dense_fp32(block))
                report(first + len(block), count)
        return cls(index, parts.fingerprint())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the folder `path`: index.faiss and index.json, complete or not at all.

        Raises:
            OutputExistsError: `path` is there and holds no such index.
        """
        path = Path(path)
        if path.exists() and not (path / "index.json").is_file():
            raise OutputExistsError(f"{path} is there and holds no index; give a new folder")
        with atomic_path(path, owned=()) as temporary:
            temporary.mkdir()
            import_faiss().write_index(self._index, str(temporary / "index.faiss"))
            digest = file_digest(temporary / "index.faiss").hex()
            about = {"version": _VERSION, "bank": self._bank, "sha256": digest}
            write_json(temporary / "index.json", about)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ApproximateIndex:
        """Read an index that `save` wrote into memory: D / 8 + 8 bytes a row.

        Raises:
            MissingDependencyError: faiss is not installed.
            DataError: there is no index, or it is damaged or of another version.
        """
        faiss = import_faiss()
        try:
            about = read_json(Path(path) / "index.json", {"bank": str, "sha256": str})
            if about["version"] != _VERSION:
                raise ValueError(f"its version is {about['version']}, not {_VERSION}")
            if file_digest(Path(path) / "index.faiss").hex() != about["sha256"]:  # faiss may crash
                raise ValueError("index.faiss has another checksum than when it was written")
            index = faiss.read_index(str(Path(path) / "index.faiss"))
            return cls(index, about["bank"])
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
        rerank: int = RERANK,
        sample: int = 256,
        population: int | None = None,
        backend: str = "auto",
        seed: int = 0,
        threads: int | None = None,
        progress: Progress | None = None,
    ) -> ApproximateResult:
        """The k best rows for each query among those looked at, and the recall of that.

        Args:
            queries: as for `topk`, which gives the exact answers.
            bank: the one that the index was built from.
            k: as for `topk`.
            threshold: as for `topk`.
            recall: the share of the exact answer that should be found; nprobe is chosen for it, on
                a sample of queries of its own. Default 0.95, unless `nprobe` is given.
            nprobe: lists to search per query.
            rerank: candidates that are scored exactly, per place asked for; at least 100 in all.
            sample: queries whose exact answer is computed to measure the recall, each of which
                costs M D products; and as many again to choose nprobe. 0 measures nothing.
            population: of how many queries these are a random sample themselves, if of more than
                these. Error and interval of the recall are for them.
            backend: of the exact answers, as for `topk`.
            seed: of the samples.
            threads: as for `topk`.
            progress: called with the queries finished and to finish, the samples among them.

        Raises:
            ConfigError, DataError: an option or the data are wrong; the bank is another one.
        """
        faiss, count = import_faiss(), len(queries)
        parts = plain_parts("ApproximateIndex", bank)
        topk(queries, parts.parts[0][:0], k, threshold, backend=backend)  # for its checks
        if recall is not None and nprobe is not None:
            raise ConfigError("recall and nprobe exclude each other; give one")
        least = "at least 1, or 0 with nprobe" if nprobe is None else "at least 0"
        for name, value, right, allowed in (
            ("recall", recall, recall is None or 0 < recall <= 1, "above 0, at most 1"),
            ("nprobe", nprobe, nprobe is None or 1 <= nprobe <= self.lists, f"1 to {self.lists}"),
            ("rerank", rerank, rerank >= 1, "at least 1"),
            ("sample", sample, sample >= (nprobe is None), least),
            ("population", population, (population or count) >= count, f"at least the {count}"),
        ):
            if not right:
                raise ConfigError(f"{name}={value!r} is not allowed; allowed: {allowed}")
        if parts.shape != (self.rows, self.columns) or parts.fingerprint() != self._bank:
            raise DataError(
                f"the index was built from another bank ({self.rows} x {self.columns}); give that "
                "one, or build an index of the one given"
            )
        threads = threads or torch.get_num_threads()
        floor = -np.inf if threshold is None else float(np.float32(threshold))
        candidates = min(self.rows, max(100, rerank * k))
        step = max(1, min(256, _BYTES // (4 * self.columns * candidates)))  # queries at a time
        measured, tuned = split_sample(count, sample, nprobe is None, seed)
        total, done = len(measured) + len(tuned) + count, 0

        def advance(queries: int) -> None:
            nonlocal done
            done += queries
            if progress is not None:
                progress(done, total)

        def exact(rows: np.ndarray) -> np.ndarray:
            if not len(rows):  # no pass over the bank
                return np.empty((0, k), dtype=np.int64)
            ids, _ = topk(
                queries[rows], bank, k, threshold, backend=backend, threads=threads,
                progress=lambda *_: advance(0),
            )  # fmt: skip
            advance(len(rows))
            return as_numpy(ids)

        def found(asked: Array, nprobe: int, progressing: bool = True) -> list[np.ndarray]:
            lists = faiss.SearchParametersIVF(nprobe=nprobe)
            options = faiss.SearchParametersPreTransform(index_params=lists)
            ids = np.empty((len(asked), k), dtype=np.int64)
            scores = np.empty((len(asked), k), dtype=np.float32)
            for first in range(0, len(asked), step):
                part = slice(first, first + step)
                rows = dense_fp32(asked[part])
                with faiss_threads(threads):  # not while the caller has control
                    listed = self._index.search(rows, candidates, params=options)[1]
                # Rows are read in order, for memory maps.
                wanted, places = np.unique(listed, return_inverse=True)
                taken = dense_fp32(parts[np.maximum(wanted, 0)])
                exactly = canonical_scores(rows, taken, places.reshape(listed.shape))
                ids[part], scores[part] = first_k(listed, exactly, k, floor)
                advance(len(rows) if progressing else 0)
            return [ids, scores]

        if nprobe is None:
            due, sampled = exact(tuned), queries[tuned]

            def measure(effort: int) -> float:
                return recall_of(found(sampled, effort, False)[0], due, len(due))[0]

            nprobe = choose_effort(measure, self.lists, recall or 0.95)
        answer: list[Array] = found(queries, nprobe)
        share = recall_of(answer[0][measured], exact(measured), population or count)
        if isinstance(queries, torch.Tensor):
            answer = [torch.from_numpy(part).to(queries.device) for part in answer]
        return ApproximateResult(answer[0], answer[1], *share, len(measured), nprobe, candidates)
