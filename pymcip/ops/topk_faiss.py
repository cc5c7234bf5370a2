"""topk by faiss, for those who want it: `backend="faiss"` (extra `[faiss]`, or `[faiss-gpu]`).

faiss's own exhaustive search of blocks of the bank; of each only an fp32 copy is made, and where
the bank is fp32 already and contiguous, none. `exact=True` certifies:

    faiss's scores s' are fp32 sums of fp32 products in an unknown order. Whatever the order, and
    with fused multiply-adds or not, |s' - <q,c>| <= gamma_D |q||c|, gamma_D = D u / (1 - D u),
    u = 2^-24 (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1). The canonical
    score is off by at most u |q||c| for its rounding to fp32 and D 2^-53 |q||c| for its fp64 sum,
    together below 2 u |q||c|. Underflow adds at most 2^-126 to each product and each sum, and as
    much per element of the other row where subnormal inputs count as zero. So with C = max |c|

        |s' - canonical| <= margin(q) = (gamma_D + 2 u) |q| C + 2^-126 (2 D + sqrt(D) (|q| + C))

    A list of the K > k best by s', the last of them s'_K, is complete if s'_K + margin lies below
    max(threshold, canonical score of the k-th of the list): a row left out can neither displace
    that one nor tie with it. Queries whose list is not complete are searched again, block by
    block, for all rows with s' >= that maximum - margin; of a block that has too many of them,
    all rows are taken.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from pymcip.errors import MissingDependencyError
from pymcip.ops.arrays import Array, Progress
from pymcip.ops.canonical import canonical_matrix, canonical_scores

UNIT_ROUNDOFF = 2.0**-24
SMALLEST_NORMAL = 2.0**-126
LARGEST = 1e38  # of |q||c|: above it a partial sum might overflow, and nothing is certain

# Extra memory stays below 64 MiB: beside these there are a block of the bank, see `bank_bytes`, and
# faiss's own blocks of scores, 16 MiB.
_QUERY_BYTES = 8 << 20  # of a block of queries as fp32
_LIST_BYTES = 12 << 20  # of the lists of a block of queries: of the block, of all, and sorted
_QUERIES = 4096
_FLOP = 1e11  # of one call of faiss: what passes between two reports of the progress
_AGAIN_ROWS = 2048  # bank rows at a time in the second search
_AGAIN_LIST = 128
_AGAIN_QUERIES = 64  # queries for which all rows of such a block are taken at a time

_INSTALL = 'run: pip install "pymcip[faiss]", or "pymcip[faiss-gpu]" for GPUs (one of them)'


def import_faiss() -> Any:
    """The module.

    Raises:
        MissingDependencyError: it can't be imported.
    """
    try:
        with warnings.catch_warnings():  # of SWIG's types under Python 3.12 and later
            warnings.simplefilter("ignore", DeprecationWarning)
            import faiss
    except ImportError as error:
        raise MissingDependencyError(f"faiss can't be imported ({error}); {_INSTALL}") from error
    return faiss


def probe_faiss() -> str | None:
    try:
        import_faiss()
    except MissingDependencyError as error:
        return str(error)
    return None


def limits_faiss(device: str, **facts: Any) -> str | None:
    """Why the faiss installed here can't search on this kind of device; None if it can."""
    faiss = import_faiss()
    if device == "cuda" and not (hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus()):
        return (
            "the faiss installed here runs on CPUs only; run: pip uninstall faiss-cpu, then: pip "
            'install "pymcip[faiss-gpu]"; or move the queries to the CPU'
        )
    return None


@contextlib.contextmanager
def faiss_threads(threads: int) -> Iterator[None]:
    """Have faiss use so many threads; its setting is the process's, and is put back."""
    faiss = import_faiss()
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(threads)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def topk_faiss(
    queries: Array,
    bank: Array,
    k: int,
    threshold: float,
    *,
    exact: bool,
    threads: int,
    progress: Progress | None,
) -> tuple[np.ndarray, np.ndarray]:
    """See `pymcip.ops.topk`. exact=False: faiss's own fp32 scores, and its choice among ties."""
    count, bank_count = len(queries), len(bank)
    ids = np.full((count, k), -1, dtype=np.int64)
    scores = np.full((count, k), -np.inf, dtype=np.float32)
    if not count or not bank_count:
        return ids, scores
    on_gpu = isinstance(queries, torch.Tensor) and queries.is_cuda
    search = _Gpu(queries.device) if on_gpu else _Cpu()
    width = min(bank_count, search.widest, k + 16 + k // 8 if exact else k)
    height = _clamp(_QUERIES, _QUERY_BYTES, 4 * queries.shape[1])
    height = min(height, count, _clamp(_QUERIES, _LIST_BYTES, 36 * width))
    largest, done = 0.0, 0
    with faiss_threads(threads):
        for first in range(0, count, height):
            asked = queries[first : first + height]
            rows = search.rows(asked)
            found = _Lists(len(rows), width)
            for start, block in _blocks(bank, search, len(rows)):
                if exact and not first:
                    largest = max(largest, float(search.norms(block).max()))
                found.add(*search.nearest(rows, block, min(width, len(block))), start)
                done += len(rows) * len(block)
                if progress is not None:
                    progress(done, count * bank_count)
            values, places = found.sorted()
            if exact:
                norms = search.norms(rows)

                def waiting(done: int = done) -> None:
                    if progress is not None:
                        progress(done, count * bank_count)

                result = _certified(
                    search, asked, rows, bank, k, threshold, values, places,
                    _margins(norms, largest, queries.shape[1]), waiting,
                )  # fmt: skip
            else:
                result = _reaching(places, values + np.float32(0), k, threshold)
            part = np.s_[first : first + height, : result[0].shape[1]]
            ids[part], scores[part] = result
    return ids, scores


def _certified(
    search: _Cpu | _Gpu,
    asked: Array,
    rows: Any,
    bank: Array,
    k: int,
    threshold: float,
    values: np.ndarray,
    places: np.ndarray,
    margins: np.ndarray,
    waiting: Callable[[], None],
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and canonical scores of the best for `asked`, from lists of faiss's (descending)."""
    wide = values.astype(np.float64)
    width = wide.shape[1]
    kth = wide[:, k - 1] if width >= k else np.full(len(wide), -np.inf)
    with np.errstate(invalid="ignore"):  # where a margin is infinite, because a score may be
        out = wide + margins[:, None] < np.maximum(kth - margins, threshold)[:, None]
        columns = int((~out).sum(axis=1).max())  # lists descend: these come first
        listed = np.where(out, -1, places)[:, :columns]
        ids = np.full((len(rows), k), -1, dtype=np.int64)
        scores = np.full((len(rows), k), -np.inf, dtype=np.float32)
        _merge(ids, scores, np.arange(len(rows)), *_ranked(asked, bank, listed, k, threshold))
        bar = np.maximum(scores[:, -1], threshold).astype(np.float64)
        unsure = np.flatnonzero(~(wide[:, -1] + margins < bar))
        if width < len(bank) and len(unsure):
            ids[unsure], scores[unsure] = _search_again(
                search, _take(asked, unsure), _take(rows, unsure), bank, k, threshold,
                bar[unsure], margins[unsure], waiting,
            )  # fmt: skip
    return ids, scores


def _search_again(
    search: _Cpu | _Gpu,
    asked: Array,
    rows: Any,
    bank: Array,
    k: int,
    threshold: float,
    bar: np.ndarray,
    margins: np.ndarray,
    waiting: Callable[[], None],
) -> tuple[np.ndarray, np.ndarray]:
    """The same from the whole bank; the k-th score, if there are k, is known to reach `bar`."""
    ids = np.full((len(asked), k), -1, dtype=np.int64)
    scores = np.full((len(asked), k), -np.inf, dtype=np.float32)
    for start in range(0, len(bank), _AGAIN_ROWS):
        block = bank[start : start + _AGAIN_ROWS]
        width = min(_AGAIN_LIST, len(block))
        values, places = search.nearest(rows, search.rows(block), width)
        reach = np.maximum(bar, scores[:, -1]) - margins
        wide = values.astype(np.float64)
        few = wide[:, -1] < reach if width < len(block) else np.isfinite(margins)
        near = few[:, None] & (wide >= reach[:, None])
        some = np.flatnonzero(near.any(axis=1))
        if len(some):
            columns = int(near.sum(axis=1).max())
            listed = np.where(near[some], places[some] + start, -1)[:, :columns]
            _merge(ids, scores, some, *_ranked(_take(asked, some), bank, listed, k, threshold))
        all_rows = np.flatnonzero(~few)
        for first in range(0, len(all_rows), _AGAIN_QUERIES):
            chosen = all_rows[first : first + _AGAIN_QUERIES]
            exact = _host(canonical_matrix(_take(asked, chosen), block))
            listed = np.broadcast_to(np.arange(start, start + len(block)), exact.shape)
            _merge(ids, scores, chosen, *_reaching(listed, exact, k, threshold))
        waiting()
    return ids, scores


def _ranked(
    asked: Array, bank: Array, ids: np.ndarray, k: int, threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """The first k of the ids listed whose canonical scores reach the threshold."""
    return _reaching(ids, _host(canonical_scores(asked, bank, ids)), k, threshold)


def _reaching(
    ids: np.ndarray, scores: np.ndarray, k: int, threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """The first k of those that reach the threshold."""
    reached = (ids >= 0) & (scores >= threshold)
    return _best(np.where(reached, ids, -1), np.where(reached, scores, np.float32(-np.inf)), k)


def _best(ids: np.ndarray, scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The first k of each row by score descending, then id ascending; id -1 has score -inf."""
    order = np.lexsort((ids, -scores), axis=-1)[:, :k]
    return np.take_along_axis(ids, order, axis=1), np.take_along_axis(scores, order, axis=1)


def _merge(
    ids: np.ndarray,
    scores: np.ndarray,
    rows: np.ndarray,
    more_ids: np.ndarray,
    more_scores: np.ndarray,
) -> None:
    ids[rows], scores[rows] = _best(
        np.concatenate([ids[rows], more_ids], axis=1),
        np.concatenate([scores[rows], more_scores], axis=1),
        ids.shape[1],
    )


def _margins(norms: np.ndarray, largest: float, columns: int) -> np.ndarray:
    """The bound of the module's text, infinite where a sum might overflow."""
    gamma = columns * UNIT_ROUNDOFF / (1 - columns * UNIT_ROUNDOFF)
    underflow = SMALLEST_NORMAL * (2 * columns + columns**0.5 * (norms + largest))
    margins = (gamma + 2 * UNIT_ROUNDOFF) * norms * largest + underflow
    return np.where(norms * largest < LARGEST, margins, np.inf)


def _blocks(bank: Array, search: _Cpu | _Gpu, count: int) -> Iterator[tuple[int, Any]]:
    """First row and fp32 rows of each block of the bank."""
    height = _clamp(len(bank), search.bank_bytes(bank), 4 * bank.shape[1])
    if search.as_it_is(bank):  # no copy
        height = max(height, int(_FLOP / (2 * count * bank.shape[1])))
    for start in range(0, len(bank), height):
        yield start, search.rows(bank[start : start + height])


class _Lists:
    """faiss's heaps: the best so far of several queries."""

    def __init__(self, count: int, width: int) -> None:
        self._heaps = import_faiss().ResultHeap(count, width, keep_max=True)

    def add(self, scores: np.ndarray, ids: np.ndarray, start: int) -> None:
        self._heaps.add_result(scores, np.where(ids < 0, -1, ids + start))

    def sorted(self) -> tuple[np.ndarray, np.ndarray]:
        """Scores, descending, and ids; -1 where there is none."""
        self._heaps.finalize()
        return self._heaps.D, self._heaps.I


class _Cpu:
    """faiss on NumPy arrays."""

    widest = 1 << 62

    def __init__(self) -> None:
        self._faiss = import_faiss()

    def as_it_is(self, matrix: Array) -> bool:
        """Whether `rows` makes no copy."""
        if isinstance(matrix, torch.Tensor):
            return matrix.dtype == torch.float32 and matrix.is_contiguous()
        return bool(
            matrix.dtype == np.float32 and matrix.flags.c_contiguous and matrix.flags.aligned
        )

    def bank_bytes(self, bank: Array) -> int:
        """Of a block of the bank as fp32."""
        return 16 << 20

    def rows(self, matrix: Array) -> Any:
        if isinstance(matrix, torch.Tensor):
            return matrix.detach().to("cpu", torch.float32).contiguous().numpy()
        return np.require(matrix, np.float32, ["C", "A"])

    def norms(self, rows: Any) -> np.ndarray:
        """fp64, rounded up: the fp32 sums are off by gamma_D and what underflow takes."""
        squares = np.einsum("ij,ij->i", rows, rows).astype(np.float64)
        columns = rows.shape[1]
        more = 1 + 2 * columns * UNIT_ROUNDOFF
        return np.sqrt(squares * more + columns * SMALLEST_NORMAL) * (1 + UNIT_ROUNDOFF)

    def nearest(self, rows: Any, block: Any, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores, descending, and ids of the best rows of a block, on the host."""
        metric = self._faiss.METRIC_INNER_PRODUCT
        scores, ids = self._faiss.knn(rows, block, width, metric=metric)
        return scores, ids


class _Gpu:
    """faiss on a GPU's torch tensors, in torch's stream."""

    widest = 2048  # of the lists that its kernels select

    def __init__(self, device: torch.device) -> None:
        faiss = self._faiss = import_faiss()
        self._device = torch.device("cuda", device.index or 0)
        self._resources = faiss.StandardGpuResources()
        self._resources.setTempMemory(1 << 28)  # instead of 1.5 GiB
        stream = torch.cuda.current_stream(self._device).cuda_stream
        self._resources.setDefaultStream(
            self._device.index, faiss.cast_integer_to_cudastream_t(stream)
        )

    def as_it_is(self, matrix: Array) -> bool:
        return (
            isinstance(matrix, torch.Tensor)
            and matrix.is_cuda
            and matrix.dtype == torch.float32
            and matrix.is_contiguous()
        )

    def bank_bytes(self, bank: Array) -> int:
        on_gpu = isinstance(bank, torch.Tensor) and bank.is_cuda
        return 256 << 20 if on_gpu else 32 << 20  # which passes through host memory

    def rows(self, matrix: Array) -> Any:
        if not isinstance(matrix, torch.Tensor):
            # A copy: torch warns about read-only arrays, such as memory maps, that it would share.
            matrix = torch.from_numpy(np.array(matrix, dtype=np.float32, order="C"))
        return matrix.detach().to(self._device, torch.float32).contiguous()

    def norms(self, rows: Any) -> np.ndarray:
        norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
        return norms.cpu().numpy() * (1 + UNIT_ROUNDOFF)

    def nearest(self, rows: Any, block: Any, width: int) -> tuple[np.ndarray, np.ndarray]:
        faiss = self._faiss
        scores = torch.empty(len(rows), width, device=self._device)
        ids = torch.empty(len(rows), width, dtype=torch.int64, device=self._device)
        task = faiss.GpuDistanceParams()
        task.metric = faiss.METRIC_INNER_PRODUCT
        task.k, task.dims, task.device = width, rows.shape[1], self._device.index
        task.vectors = faiss.cast_integer_to_float_ptr(block.data_ptr())
        task.vectorType, task.vectorsRowMajor = faiss.DistanceDataType_F32, True
        task.numVectors = len(block)
        task.queries = faiss.cast_integer_to_float_ptr(rows.data_ptr())
        task.queryType, task.queriesRowMajor = faiss.DistanceDataType_F32, True
        task.numQueries = len(rows)
        task.outDistances = faiss.cast_integer_to_float_ptr(scores.data_ptr())
        task.outIndices = faiss.cast_integer_to_idx_t_ptr(ids.data_ptr())
        task.outIndicesType = faiss.IndicesDataType_I64
        faiss.bfKnn(self._resources, task)
        return scores.cpu().numpy(), ids.cpu().numpy()


def _host(values: Any) -> np.ndarray:
    return values.cpu().numpy() if isinstance(values, torch.Tensor) else values


def _take(matrix: Array, rows: np.ndarray) -> Array:
    if isinstance(matrix, torch.Tensor):
        return matrix[torch.from_numpy(rows).to(matrix.device)]
    return matrix[rows]


def _clamp(most: int, budget: int, each: int) -> int:
    return max(1, min(most, budget // each))
