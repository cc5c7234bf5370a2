"""One embedding against two: bytes, build time, latency and recall of faiss indexes over N images.

Whoever wants good image search and good text search of an archive keeps two embeddings per image,
with an index each: that of an image model, for image queries, and CLIP's, for text queries. pymcip
trains one embedding for both. Here both systems hold the same N images:

* two: an index of the image space and one of the joint space. Image queries go to the first, text
  queries to the second, and combined ones (an image and a text) to both, whose lists are merged by
  reciprocal rank fusion (Cormack, Clarke and Büttcher, SIGIR 2009: the sum of 1 / (60 + rank)).
* one: an index of the joint space. Combined queries are one search with the mean of both vectors.

For an image query, or a text query, both systems search one index of N rows of D numbers: the same
work, and the tables show how far the timings of the same work differ (for text even the index is
the same one). One embedding saves bytes, build time, and one of the searches of a combined query.

The embeddings are drawn (`Space`), not a model's: they decide how hard the search is, and say
nothing on which system finds the better images. Recall is against an exact search of the same
system. Where an index has a knob (HNSW efSearch, IVF-PQ nprobe), it gets the smallest value that
reaches --recall on one half of the queries, for each kind of query its own, but for image queries
the same in both spaces; the other half is measured. Where no value reaches it, it gets the smallest
that comes within 0.005 of the best one's recall. The mean of an image and a text vector lies nearer
to images than a text does, so that a combined search of one index may do with a smaller value than
the search by text that the other system needs. How much smaller depends on the data, and these are
drawn: the same search with the texts' value stands beside it. The values are printed.

faiss searches with one thread for a single query. Batches are of 256 because faiss 1.15's flat
index multiplies matrices only where queries x D >= 128,000, and is 20 times slower below that.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import itertools
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from harness import Report, Rival, common_arguments, compare

from pymcip.errors import MissingDependencyError
from pymcip.files import atomic_path, write_text
from pymcip.ops import topk
from pymcip.ops.faiss_import import faiss_threads, import_faiss
from pymcip.progress import progress

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

BLOCK = 50_000  # rows that are drawn, and added to an index, at a time
SMALLEST = 2_000  # vectors: below, the lists of IVF-PQ can't be trained
FUSION = 60  # of reciprocal rank fusion
CLOSE = 0.005  # of recall, to the best that a knob reaches
SAMPLE = 20_000  # rows whose spectrum and cosines are printed


# --------------------------------------------------------------------------------------------------
# The images, and what is asked


class Space:
    """One embedding space of images in clusters, whose vectors resemble those of a CLIP model.

    An image is the unit vector along MEAN m + CLUSTER c + OWN e. m is the direction that all images
    share, c that of its cluster (the images of one thing: 10 to 50), e its own; c and e are
    Gaussian with eigenvalues falling like 1 / (i + OFFSET), in a random basis. Two images then have
    a cosine around 0.5, and two of a cluster around 0.78. An image query is another photograph of
    the same thing, at a cosine around 0.9 from its image. A text query has a mean direction of its
    own, a part of its cluster's and its image's directions, and much that no image has: cosines
    around 0.17 with any image and 0.3 with its own, and a gap of 0.8 between the means of images
    and texts (0.82 for CLIP on MS-COCO: Liang et al., Mind the Gap, NeurIPS 2022).

    Every block is drawn from its number, so that any order gives the same rows.

    Args:
        dimensions: D.
        labels: int64 [N], the images' clusters.
        seed: spaces with different seeds have nothing in common but the clusters.
    """

    OFFSET = 6.0
    MEAN, CLUSTER, OWN = math.sqrt(0.5), math.sqrt(0.28), math.sqrt(0.22)
    KEPT = 0.5  # of an image's own direction, in an image query
    TEXT_MEAN, TEXT_CLUSTER, TEXT_IMAGE, TEXT_OWN = 0.75, 0.2, 0.2, 0.6
    BETWEEN = 0.33  # cosine of the mean directions of images and texts

    def __init__(self, dimensions: int, labels: Ids, seed: int) -> None:
        self.labels, self.seed = labels, seed
        generator = np.random.default_rng([seed, 0])
        eigenvalues = 1 / (np.arange(dimensions) + self.OFFSET)
        basis, _ = np.linalg.qr(generator.standard_normal((dimensions, dimensions)))
        deviations = np.sqrt(eigenvalues / eigenvalues.sum())
        self._draw = (deviations[:, None] * basis.T).astype(np.float32)
        means, _ = np.linalg.qr(generator.standard_normal((dimensions, 2)))
        self.mean = means[:, 0].astype(np.float32)
        text_mean = self.BETWEEN * means[:, 0] + math.sqrt(1 - self.BETWEEN**2) * means[:, 1]
        self.text_mean = text_mean.astype(np.float32)
        self.centres = self._directions(generator, int(labels.max()) + 1)

    def _directions(self, generator: np.random.Generator, count: int) -> Floats:
        rows = generator.standard_normal((count, len(self._draw)), np.float32)
        return rows @ self._draw

    def _known(self, ids: Ids | slice) -> Floats:
        return self.MEAN * self.mean + self.CLUSTER * self.centres[self.labels[ids]]

    def images(self, block: int) -> Floats:
        """The block's rows, unit vectors."""
        ids = slice(block * BLOCK, min((block + 1) * BLOCK, len(self.labels)))
        generator = np.random.default_rng([self.seed, 1, block])
        own = self._directions(generator, ids.stop - ids.start)
        return _unit(self._known(ids) + self.OWN * own)

    def image_queries(self, ids: Ids, images: Floats) -> Floats:
        """Unit vectors [Q, D]: other photographs of what `images`, the rows `ids`, show."""
        own = self._directions(np.random.default_rng([self.seed, 2]), len(ids))
        known = self._known(ids)
        other = math.sqrt(1 - self.KEPT**2) * self.OWN * own
        return _unit(known + self.KEPT * (images - known) + other)

    def text_queries(self, ids: Ids, images: Floats) -> Floats:
        """Unit vectors [Q, D]: texts on `images`, the rows `ids`."""
        own = self._directions(np.random.default_rng([self.seed, 3]), len(ids))
        described = self.TEXT_CLUSTER * self.centres[self.labels[ids]]
        described += self.TEXT_IMAGE * (images - self._known(ids))
        return _unit(self.TEXT_MEAN * self.text_mean + described + self.TEXT_OWN * own)


def _unit(rows: Floats) -> Floats:
    rows /= np.sqrt(np.einsum("ij,ij->i", rows, rows))[:, None]
    return rows


def cluster_labels(count: int, seed: int) -> Ids:
    """int64 [N]: clusters of 10 to 50 images, in no order."""
    generator = np.random.default_rng([seed, 4])
    sizes = generator.integers(10, 51, count // 10 + 1)
    labels = np.repeat(np.arange(len(sizes)), sizes)[:count]
    return generator.permutation(labels)


def generate(space: Space, path: Path, threads: int) -> Floats:
    """Write all rows of a space as fp32, and give them as a memory map."""
    count, dimensions = len(space.labels), len(space.mean)
    shape = (count, dimensions)
    rows = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)

    def write(block: int) -> None:
        rows[block * BLOCK : (block + 1) * BLOCK] = space.images(block)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(write, range(-(-count // BLOCK))))
    rows.flush()
    return np.load(path, mmap_mode="r")


def describe(space: Space, images: Floats, ids: Ids, asked: Mapping[str, Floats]) -> dict[str, Any]:
    """What the drawn vectors are like: ranks of the covariance and quantiles of cosines."""
    generator = np.random.default_rng([space.seed, 5])
    chosen = np.sort(generator.choice(len(images), min(SAMPLE, len(images)), replace=False))
    rows = images[chosen]
    values = np.linalg.eigvalsh(np.cov(rows, rowvar=False, dtype=np.float64))[::-1]
    shares = np.maximum(values, 0) / values.sum()
    entropy = -float((shares * np.log(np.maximum(shares, 1e-300))).sum())
    order = np.argsort(space.labels[chosen], kind="stable")
    mates = np.flatnonzero(np.diff(space.labels[chosen][order]) == 0)
    pairs = {
        "two images": (rows[:-1], rows[1:]),
        "two of a cluster": (rows[order[mates]], rows[order[mates + 1]]),
    }
    for kind, queries in asked.items():
        pairs[f"{kind} query, its image"] = (queries, images[ids])
        pairs[f"{kind} query, any image"] = (queries[:-1], images[ids[1:]])
    return {
        "effective_rank": math.exp(entropy),
        "participation_ratio": 1 / float((shares**2).sum()),
        "components_for_90_percent": int((np.cumsum(shares) < 0.9).sum()) + 1,
        "cosines": {
            name: np.quantile((left * right).sum(axis=1), (0.05, 0.5, 0.95)).tolist()
            for name, (left, right) in pairs.items()
            if len(left)
        },
    }


# --------------------------------------------------------------------------------------------------
# Indexes


@dataclass(frozen=True)
class Kind:
    """A kind of index. `knob` trades time for recall in each search; None: the search is exact."""

    name: str
    make: Callable[[Any, argparse.Namespace], Any]
    knob: str | None = None
    values: tuple[int, ...] = ()
    parameters: str = ""  # faiss's class that takes the knob

    def search(self, index: Any, value: int | None) -> Callable[[Floats, int], Ids]:
        """A function of queries and k that gives ids."""
        if self.knob is None:
            return lambda queries, k: index.search(queries, k)[1]
        chosen = getattr(import_faiss(), self.parameters)(**{self.knob: value})
        return lambda queries, k: index.search(queries, k, params=chosen)[1]


def _flat(faiss: Any, options: argparse.Namespace) -> Any:
    return faiss.IndexFlatIP(options.dimensions)


def _hnsw(faiss: Any, options: argparse.Namespace) -> Any:
    index = faiss.IndexHNSWFlat(options.dimensions, options.links, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = options.ef_construction
    return index


def _ivfpq(faiss: Any, options: argparse.Namespace) -> Any:
    dimensions = options.dimensions
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
    index = kind.make(faiss, options)
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


def load(path: Path) -> tuple[Any, int | None]:
    """The index, and the bytes of memory that it takes (None where the system doesn't say)."""
    before = _resident()
    index = import_faiss().read_index(str(path))
    after = _resident()
    return index, None if before is None or after is None else max(0, after - before)


def _resident() -> int | None:
    try:
        with contextlib.suppress(AttributeError):  # not glibc: freed memory may seem in use
            ctypes.CDLL(None).malloc_trim(0)
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), None)


# --------------------------------------------------------------------------------------------------
# Searches


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


# --------------------------------------------------------------------------------------------------
# The run


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = common_arguments(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.set_defaults(repetitions=200)
    parser.add_argument("--vectors", type=int, default=1_000_000, help="images, N")
    parser.add_argument("--dimensions", type=int, default=512, help="D, a multiple of 8")
    parser.add_argument(
        "--queries", type=int, default=1024, help="of each kind; half are for tuning"
    )
    parser.add_argument("--batch", type=int, default=256, help="queries per search, besides 1")
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--recall", type=float, default=0.95, help="what knobs are set to reach")
    parser.add_argument("--indexes", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--links", type=int, default=32, help="HNSW's M")
    parser.add_argument("--ef-construction", type=int, default=40, help="HNSW's; faiss's default")
    parser.add_argument("--seconds", type=float, default=15.0, help="per timed comparison")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--work", type=Path, help="folder for vectors and indexes; they are removed"
    )
    parser.add_argument("--out", type=Path, help="folder for storage.md, the tables")
    parser.add_argument("--plot", action="store_true", help="and storage.png (needs matplotlib)")
    parser.add_argument("--note", default="", help="what else ran on the machine; goes into rows")
    options = parser.parse_args(words)
    if options.device != "cpu":
        parser.error(
            f"--device {options.device}: these indexes are searched on the CPU; leave it out"
        )
    if options.vectors < SMALLEST:
        parser.error(f"--vectors {options.vectors} is too few; allowed: at least {SMALLEST}")
    if options.dimensions < 8 or options.dimensions % 8:
        parser.error(f"--dimensions {options.dimensions}: IVF-PQ needs a multiple of 8")
    if not 2 <= options.queries <= options.vectors:
        parser.error(f"--queries {options.queries}; allowed: 2 to --vectors, {options.vectors}")
    if options.plot and options.out is None:
        parser.error("--plot needs a folder to write to; give --out FOLDER")
    for name in ("batch", "k", "threads", "repetitions"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}; allowed: at least 1")
    options.indexes = list(dict.fromkeys(options.indexes))
    options.batch = min(options.batch, options.queries - options.queries // 2)
    return options


@contextlib.contextmanager
def place(options: argparse.Namespace) -> Iterator[Path]:
    """A folder with room for the vectors of both spaces and two indexes, removed at the end."""
    row = 4 * options.dimensions
    needed = 2 * options.vectors * (2 * row + 8 * options.links + 100)
    if options.work is not None:
        options.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench_storage_", dir=options.work) as work:
        free = shutil.disk_usage(work).free
        if free < 1.1 * needed:
            raise SystemExit(
                f"{work} has {free / 1e9:.1f} GB free; {1.1 * needed / 1e9:.1f} GB are needed; give "
                "another folder with --work, or fewer --vectors"
            )
        yield Path(work)


def ask(
    spaces: Mapping[str, Space], banks: Mapping[str, Floats], options: argparse.Namespace
) -> tuple[dict[tuple[str, str], Asked], dict[str, Any]]:
    """The queries with their exact answers, and what the spaces are like."""
    generator = np.random.default_rng([options.seed, 7])
    ids = generator.choice(options.vectors, options.queries, replace=False)
    queries: dict[tuple[str, str], Floats] = {}
    drawn = {}
    for name, space in spaces.items():
        images = banks[name][ids]
        own = {
            "image": space.image_queries(ids, images),
            "text": space.text_queries(ids, images),
        }
        drawn[name] = describe(space, banks[name], ids, own)
        own["combined"] = _unit(own["image"] + own["text"])
        queries |= {(name, kind): rows for kind, rows in own.items()}
    asked = {}
    for name, kind in SEARCHES:
        wanted, _ = topk(queries[name, kind], banks[name], options.k, threads=options.threads)
        asked[name, kind] = Asked(queries[name, kind], wanted)
    return asked, drawn


def measure(
    kind: Kind,
    banks: Mapping[str, Floats],
    asked: Mapping[tuple[str, str], Asked],
    report: Report,
    work: Path,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Build, store and search one kind of index for both systems; rows go to the report."""
    case = {"N": options.vectors, "D": options.dimensions, "index": kind.name}
    built = {}
    for name, images in banks.items():
        built[name] = build(kind, images, work / f"{name}.index", options)
        own = built[name]
        seconds = own.train_seconds + own.add_seconds
        print(f"{kind.name}, {name} space: {own.bytes / 1e9:.3f} GB, built in {seconds:.1f} s")
    loaded = {name: load(own.path) for name, own in built.items()}
    storage = {}
    for system, names in ((TWO, ("image", "joint")), (ONE, ("joint",))):
        memory = [loaded[name][1] for name in names]
        storage[system] = {
            "bytes": sum(built[name].bytes for name in names),
            "build_seconds": sum(
                built[name].train_seconds + built[name].add_seconds for name in names
            ),
            "train_seconds": sum(built[name].train_seconds for name in names),
            "memory_bytes": None if None in memory else sum(size or 0 for size in memory),
        }
        report.record({"case": case, "rival": system, "note": options.note, **storage[system]})
    for own in built.values():
        own.path.unlink()

    knobs: dict[str, int | None] = {}
    measured = {}
    for space, query in SEARCHES:
        tuning, measured[space, query] = asked[space, query].halves()
        value = tune(kind, loaded[space][0], tuning.queries, tuning.wanted, options.recall)
        knobs[query] = value if value is None else max(value, knobs.get(query) or 0)
    search = {
        (space, query): kind.search(loaded[space][0], knobs[query]) for space, query in SEARCHES
    }
    figures: dict[str, Any] = {
        "storage": storage,
        "knob": kind.knob,
        "values": knobs,
        "queries": {},
    }
    by_texts_knob = None
    if knobs["combined"] != knobs["text"]:
        by_texts_knob = kind.search(loaded["joint"][0], knobs["text"])
    faiss = import_faiss()
    with ThreadPoolExecutor(1, initializer=faiss.omp_set_num_threads, initargs=(1,)) as pool:
        for query in QUERIES:
            helper = pool if options.threads > 1 else None
            rivals = systems(query, search, measured, helper, by_texts_knob)
            shares = {
                own.name: recall(own.answer(*own.queries, options.k), own.wanted) for own in rivals
            }
            for batch in dict.fromkeys((1, options.batch)):
                # A batch keeps all threads busy by itself.
                chosen = [own for own in rivals if batch == 1 or own.name != AT_ONCE]
                timings = compare(
                    [own.rival(options.k, batch, shares[own.name]) for own in chosen],
                    repetitions=options.repetitions,
                    warmup=2,
                    seconds=options.seconds,
                    least=5,
                )
                report.add(
                    case | {"query": query, "batch": batch},
                    timings,
                    work=batch,
                    unit="queries",
                    accuracy=f"recall@{options.k}",
                    notes={"note": options.note, "knob": kind.knob, "values": knobs},
                )
                figures["queries"].setdefault(query, {})[f"batch {batch}"] = {
                    timing.rival: {
                        "seconds": {f"p{at}": timing.quantile(at / 100) for at in (20, 50, 80)},
                        "recall": shares[timing.rival],
                    }
                    for timing in timings
                }
    return figures


def main(words: Sequence[str] | None = None) -> None:
    options = arguments(words)
    import_faiss()
    if options.plot:
        _import_figure()
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        with faiss_threads(options.threads), place(options) as work:
            _run(options, work)
    finally:
        torch.set_num_threads(before)


def _run(options: argparse.Namespace, work: Path) -> None:
    start = time.perf_counter()
    report = Report(
        "storage",
        device="cpu",
        dtype="float32",
        packages=("faiss-cpu", "faiss-gpu"),
        store=options.store,
    )
    labels = cluster_labels(options.vectors, options.seed)
    spaces, banks = {}, {}
    for number, name in enumerate(("image", "joint")):
        spaces[name] = Space(options.dimensions, labels, 2 * options.seed + number)
        banks[name] = generate(spaces[name], work / f"{name}.npy", options.threads)
    asked, drawn = ask(spaces, banks, options)
    print(f"vectors and exact answers in {time.perf_counter() - start:.1f} s")
    for name, figures in drawn.items():
        print(f"{name} space: effective rank {figures['effective_rank']:.0f}", end=", ")
        print(f"participation ratio {figures['participation_ratio']:.0f}", end=", ")
        print(f"90 % of the variance in {figures['components_for_90_percent']} components")
        for pair, (low, middle, high) in figures["cosines"].items():
            print(f"  cosine of {pair}: {middle:.2f} ({low:.2f} to {high:.2f}, 5 % to 95 %)")
    found = {
        KINDS[name].name: measure(KINDS[name], banks, asked, report, work, options)
        for name in options.indexes
    }
    text = tables(found, options)
    print("\n" + text)
    if options.out is not None:
        write_text(options.out / "storage.md", text)
    if options.plot:
        plot(found, options.out / "storage.png", options)
    case = {name: getattr(options, name) for name in ("vectors", "dimensions", "queries", "k")}
    case |= {"links": options.links, "ef_construction": options.ef_construction}
    report.finish(
        summary={
            "bench": "storage",
            "case": case | {"lists": lists(options.vectors), "seed": options.seed},
            "threads": options.threads,
            "note": options.note,
            "seconds": time.perf_counter() - start,
            "spaces": drawn,
            "indexes": found,
        },
    )


# --------------------------------------------------------------------------------------------------
# Tables and picture


def tables(found: Mapping[str, Any], options: argparse.Namespace) -> str:
    """Markdown: what each system stores and builds, and how it answers."""
    lines = [
        f"{options.vectors:,} images, D = {options.dimensions}, fp32; {options.threads} threads.",
        "",
        "| index | embeddings | bytes | per image | in memory | build |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for name, figures in found.items():
        for system, label in ((TWO, "two"), (ONE, "one")):
            own = figures["storage"][system]
            memory = "" if own["memory_bytes"] is None else _size(own["memory_bytes"])
            lines.append(
                f"| {name} | {label} | {_size(own['bytes'])} | "
                f"{own['bytes'] / options.vectors:.0f} | {memory} | {own['build_seconds']:.1f} s |"
            )
    lines += [
        "",
        f"Milliseconds per query: p50 (p20 to p80) of searches for one query, and of batches of "
        f"{options.batch}; recall@{options.k} in percent.",
        "",
        "| index | query | two | one | one / two | two, batch | one, batch | one / two | recall two | "
        "recall one |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, figures in found.items():
        for query, batches in figures["queries"].items():
            lines.append(_row(name, query, batches, TWO, ONE, options))
            if TEXTS in batches["batch 1"]:
                shown = f"{query}, {figures['knob']} {figures['values']['text']} for one"
                lines.append(_row(name, shown, batches, TWO, TEXTS, options))
            if AT_ONCE in batches["batch 1"]:
                shown = f"{query}, two indexes at once"
                lines.append(_row(name, shown, batches, AT_ONCE, ONE, options))
    for name, figures in found.items():
        if figures["knob"]:
            values = ", ".join(f"{query} {value}" for query, value in figures["values"].items())
            lines += ["", f"{name}, {figures['knob']}: {values}."]
    return "\n".join(lines) + "\n"


def _row(
    name: str,
    shown: str,
    batches: Mapping[str, Any],
    two: str,
    one: str,
    options: argparse.Namespace,
) -> str:
    """A line of the table of queries; rivals that take no batches leave their cells empty."""
    cells = [name, shown]
    for size in (1, options.batch):
        part = batches[f"batch {size}"]
        if two in part:
            first, second = part[two]["seconds"], part[one]["seconds"]
            cells += [_milliseconds(first, size), _milliseconds(second, size)]
            cells.append(f"{second['p50'] / first['p50']:.2f}")
        else:
            cells += ["", "", ""]
    cells += [f"{100 * batches['batch 1'][system]['recall']:.1f}" for system in (two, one)]
    return f"| {' | '.join(cells)} |"


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _milliseconds(seconds: Mapping[str, float], size: int) -> str:
    low, middle, high = (f"{1e3 * seconds[at] / size:.3g}" for at in ("p20", "p50", "p80"))
    return f"{middle} ({low} to {high})"


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def _import_figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            f"--plot: matplotlib can't be imported ({error}); run: pip install matplotlib, or leave "
            "--plot out"
        ) from error
    return Figure


def plot(found: Mapping[str, Any], path: Path, options: argparse.Namespace) -> None:
    """Bars of both systems for each index: bytes, build, a combined query. A PNG.

    Of a combined query, one embedding's search has the knob that text queries need.
    """

    def milliseconds(own: Mapping[str, Any], system: str) -> float:
        timed = own["queries"]["combined"]["batch 1"]
        return 1e3 * timed[TEXTS if system == ONE and TEXTS in timed else system]["seconds"]["p50"]

    figure = _import_figure()(figsize=(9, 2.8), layout="constrained")
    panels = {
        "index, bytes per image": lambda own, system: (
            own["storage"][system]["bytes"] / options.vectors
        ),
        "build, seconds": lambda own, system: own["storage"][system]["build_seconds"],
        "combined query, p50 ms": milliseconds,
    }
    places = np.arange(len(found))
    for axes, (title, value) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for shift, system in ((-0.2, TWO), (0.2, ONE)):
            heights = [value(own, system) for own in found.values()]
            bars = axes.bar(places + shift, heights, 0.4, label=system)
            axes.bar_label(bars, [_rounded(height) for height in heights], fontsize=7)
        axes.set_yscale("log")
        axes.margins(y=0.15)
        axes.set_xticks(places, list(found))
        axes.set_title(title, fontsize=9)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


if __name__ == "__main__":
    main()
