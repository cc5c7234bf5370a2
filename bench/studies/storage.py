"""One embedding against two: bytes, build time, latency and recall of faiss indexes over N images.

Whoever wants good image search and good text search of an archive keeps two embeddings per image,
with an index each: that of an image model, for image queries, and CLIP's, for text queries. pymcip
trains one embedding for both. Here both systems hold the same N images:

* two: an index of the image space and one of the joint space. Image queries go to the first, text
  queries to the second, and combined ones (an image and a text) to both, whose lists are merged by
  reciprocal rank fusion (Cormack, Clarke and Büttcher, SIGIR 2009: the sum of 1 / (60 + rank)).
* one: an index of the joint space. Combined queries are one search with the mean of both vectors.
  With --appended R its vectors have R more dimensions, made for image search, which are zero in
  texts (`docs/kept.md`). The joint index of *two* has them too, though it would not need them: so
  its bytes and seconds are larger by R / 2D than those of two plain indexes.

For an image query, or a text query, both systems search one index of N rows of D numbers: the same
work, and the table shows how far the timings of the same work differ (for text even the index is the
same one). One embedding saves bytes, build time, and one of the searches of a combined query.

The embeddings are drawn (`studies.storage_space`), not a model's: they decide how hard the search
is, and say nothing on which system finds the better images. Recall is against an exact search of the
same system. Where an index has a knob (HNSW efSearch, IVF-PQ nprobe), it gets the smallest value that
reaches --recall on one half of the queries, for each kind of query its own, but for image queries
the same in both spaces; the other half is measured. Where no value reaches it, it gets the smallest
that comes within 0.005 of the best one's recall. The values are printed. faiss searches with one
thread for a single query.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pymcip.files import write_text
from pymcip.markdown import markdown_table
from pymcip.ops import topk
from pymcip.ops.arrays import torch_threads
from pymcip.ops.faiss_import import faiss_threads, import_faiss

sys.path.insert(0, str(Path(__file__).parents[1]))  # the harness is in bench/
from harness import Report, Rival, common_arguments, compare

from studies.storage_space import (
    BLOCK,
    AppendedSpace,
    Floats,
    Ids,
    Space,
    cluster_labels,
    generate,
    unit_rows,
)

WEIGHT = 2.0  # of the appended dimensions
SMALLEST = 2_000  # vectors: below, the lists of IVF-PQ can't be trained
FUSION = 60  # of reciprocal rank fusion
CLOSE = 0.005  # of recall, to the best that a knob reaches
TWO, ONE = "two embeddings", "one embedding"
SPACES = {TWO: ("image", "joint"), ONE: ("joint",)}
QUERIES = ("image", "text", "combined")
# Of which space an index is searched, with which query.
SEARCHES = (("image", "image"), ("joint", "image"), ("joint", "text"), ("joint", "combined"))

Search = Callable[[Floats, int], Ids]


@dataclass(frozen=True)
class Kind:
    """A kind of index, as `faiss.index_factory` takes it.

    `knob` trades time for recall in each search; None: the search is exact.
    """

    name: str
    factory: str
    knob: str | None = None
    values: tuple[int, ...] = ()  # of the knob, rising
    parameters: str = ""  # faiss's class that takes the knob

    def search(self, index: Any, value: int | None) -> Search:
        """A function of queries and k that gives ids."""
        chosen = None
        if self.knob is not None:
            chosen = getattr(import_faiss(), self.parameters)(**{self.knob: value})
        return lambda queries, k: index.search(queries, k, params=chosen)[1]


def _powers(first: int, last: int) -> tuple[int, ...]:
    return tuple(2**power for power in range(first, last + 1))


KINDS = {
    "flat": Kind("flat", "Flat"),
    "hnsw": Kind("HNSW", "HNSW32", "efSearch", _powers(4, 12), "SearchParametersHNSW"),
    "ivfpq": Kind(
        "IVF-PQ", "IVF{lists},PQ{bytes}np", "nprobe", _powers(0, 10), "SearchParametersIVF"
    ),
}


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = common_arguments(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.set_defaults(repetitions=200)
    add = parser.add_argument
    add("--vectors", type=int, default=1_000_000, help="images, N")
    add("--dimensions", type=int, default=512, help="D, a multiple of 8")
    add("--appended", type=int, default=0, metavar="R", help="dimensions, a multiple of 8")
    add("--queries", type=int, default=1024, help="of each kind; half are for tuning")
    add("--k", type=int, default=10)
    add("--recall", type=float, default=0.95, help="what knobs are set to reach")
    add("--indexes", nargs="+", choices=KINDS, default=list(KINDS))
    add("--seconds", type=float, default=15.0, help="per timed comparison")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=torch.get_num_threads())
    add("--work", type=Path, help="folder for vectors and indexes; they are removed")
    add("--out", type=Path, help="folder for storage.md, the tables")
    add("--note", default="", help="what else ran on the machine; goes into rows")
    options = parser.parse_args(words)
    if options.device != "cpu":
        parser.error(
            f"--device {options.device}: these indexes are searched on the CPU; leave it out"
        )
    if options.vectors < SMALLEST:
        parser.error(f"--vectors {options.vectors} is too few; allowed: at least {SMALLEST}")
    if options.dimensions < 8 or options.dimensions % 8:
        parser.error(f"--dimensions {options.dimensions}: IVF-PQ needs a multiple of 8")
    if options.appended < 0 or options.appended % 8:
        parser.error(f"--appended {options.appended}: IVF-PQ needs a multiple of 8, or 0")
    if not 2 <= options.queries <= options.vectors:
        parser.error(f"--queries {options.queries}; allowed: 2 to --vectors, {options.vectors}")
    for name in ("k", "threads", "repetitions"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}; allowed: at least 1")
    return options


def main(words: Sequence[str] | None = None) -> None:
    options = arguments(words)
    import_faiss()
    if options.work is not None:
        options.work.mkdir(parents=True, exist_ok=True)
    with (
        torch_threads(options.threads),
        faiss_threads(options.threads),
        tempfile.TemporaryDirectory(prefix="storage_", dir=options.work) as work,
    ):
        _run(options, Path(work))


def _run(options: argparse.Namespace, work: Path) -> None:
    packages = ("faiss-cpu", "faiss-gpu")
    report = Report(
        "storage", device="cpu", dtype="float32", packages=packages, store=options.store
    )
    labels = cluster_labels(options.vectors, options.seed)
    first = 3 * options.seed
    spaces: dict[str, Space | AppendedSpace] = {"image": Space(options.dimensions, labels, first)}
    spaces["joint"] = joint = Space(options.dimensions, labels, first + 1)
    if options.appended:
        own = Space(options.appended, labels, first + 2)
        spaces["joint"] = AppendedSpace(joint, own, WEIGHT)
    banks = {
        name: generate(space, work / f"{name}.npy", options.threads)
        for name, space in spaces.items()
    }
    asked = ask(spaces, banks, options)
    found = {
        KINDS[name].name: measure(KINDS[name], banks, asked, report, work, options)
        for name in dict.fromkeys(options.indexes)
    }
    text = tables(found, options)
    print("\n" + text)
    if options.out is not None:
        write_text(options.out / "storage.md", text)
    case = {name: getattr(options, name) for name in ("vectors", "dimensions", "appended", "k")}
    report.finish(
        summary={"bench": "storage", "case": case, "note": options.note, "indexes": found}
    )


def ask(
    spaces: Mapping[str, Space | AppendedSpace],
    banks: Mapping[str, Floats],
    options: argparse.Namespace,
) -> dict[tuple[str, str], tuple[Floats, Ids]]:
    """By `SEARCHES`: the queries [Q, D], and their exact answers [Q, k]."""
    generator = np.random.default_rng([options.seed, 7])
    ids = generator.choice(options.vectors, options.queries, replace=False)
    queries: dict[tuple[str, str], Floats] = {}
    for name, space in spaces.items():
        images = banks[name][ids]
        image, text = space.image_queries(ids, images), space.text_queries(ids, images)
        own = {"image": image, "text": text, "combined": unit_rows(image + text)}
        queries |= {(name, kind): rows for kind, rows in own.items()}
    return {
        place: (queries[place], topk(queries[place], banks[place[0]], options.k)[0])
        for place in SEARCHES
    }


def measure(
    kind: Kind,
    banks: Mapping[str, Floats],
    asked: Mapping[tuple[str, str], tuple[Floats, Ids]],
    report: Report,
    work: Path,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Build, store and search one kind of index for both systems; rows go to the report."""
    case: dict[str, Any] = {"N": options.vectors, "D": options.dimensions, "index": kind.name}
    if options.appended:
        case["appended"] = options.appended
    built = {
        name: build(kind, images, work / f"{name}.index", options) for name, images in banks.items()
    }
    storage = {}
    for system, names in SPACES.items():
        sizes, seconds = zip(*(built[name][1:] for name in names), strict=True)
        storage[system] = {"bytes": sum(sizes), "build_seconds": sum(seconds)}
        report.record({"case": case, "rival": system, "note": options.note, **storage[system]})
    half = options.queries // 2
    knobs: dict[str, int | None] = {}
    for space, query in SEARCHES:
        rows, wanted = asked[space, query]
        value = tune(kind, built[space][0], rows[:half], wanted[:half], options.recall)
        knobs[query] = value if value is None else max(value, knobs.get(query) or 0)
    search = {
        (space, query): kind.search(built[space][0], knobs[query]) for space, query in SEARCHES
    }
    measured = {place: (rows[half:], wanted[half:]) for place, (rows, wanted) in asked.items()}
    figures: dict[str, Any] = {"storage": storage, "knob": kind.knob, "values": knobs}
    figures["queries"] = {}
    for query in QUERIES:
        rivals, shares = systems(query, search, measured, options.k)
        timings = compare(
            rivals,
            repetitions=options.repetitions,
            warmup=2,
            seconds=options.seconds,
            least=5,
        )
        report.add(
            case | {"query": query},
            timings,
            work=1,
            unit="queries",
            accuracy=f"recall@{options.k}",
            notes={"note": options.note, "knob": kind.knob, "values": knobs},
        )
        figures["queries"][query] = {
            timing.rival: {
                "seconds": {f"p{at}": timing.quantile(at / 100) for at in (20, 50, 80)},
                "recall": shares[timing.rival],
            }
            for timing in timings
        }
    return figures


def build(
    kind: Kind, images: Floats, path: Path, options: argparse.Namespace
) -> tuple[Any, int, float]:
    """An index of all images, the bytes of its file, and the seconds that it took."""
    faiss = import_faiss()
    count, dimensions = images.shape
    form = kind.factory.format(lists=lists(count), bytes=dimensions // 8)
    index = faiss.index_factory(dimensions, form, faiss.METRIC_INNER_PRODUCT)
    start = time.perf_counter()
    if not index.is_trained:
        # faiss warns below 39 rows per centroid, which small runs don't have.
        index.cp.min_points_per_centroid = index.pq.cp.min_points_per_centroid = 1
        size = min(count, max(40 * lists(count), 256 * 256))  # lists; codes
        chosen = np.random.default_rng([options.seed, 6]).choice(count, size, replace=False)
        index.train(images[np.sort(chosen)])
    for first in range(0, count, BLOCK):
        index.add(images[first : first + BLOCK])
    seconds = time.perf_counter() - start
    faiss.write_index(index, str(path))
    size = path.stat().st_size
    path.unlink()
    print(f"{kind.name}, {path.stem} space: {size / 1e9:.3f} GB, built in {seconds:.1f} s")
    return index, size, seconds


def lists(vectors: int) -> int:
    """Of IVF-PQ: 4 sqrt(N), and at least 40 rows each to train them."""
    return max(1, min(round(4 * math.sqrt(vectors)), vectors // 40))


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


def systems(
    query: str,
    search: Mapping[tuple[str, str], Search],
    asked: Mapping[tuple[str, str], tuple[Floats, Ids]],
    k: int,
) -> tuple[list[Rival], dict[str, float]]:
    """The systems that answer a kind of query, one query a turn, and the recall of each."""
    if query == "combined":
        by_image, by_text = search["image", "image"], search["joint", "text"]

        def both(images: Floats, texts: Floats, k: int) -> Ids:
            return fuse(by_image(images, k), by_text(texts, k), k)

        (images, first), (texts, second) = asked["image", "image"], asked["joint", "text"]
        ways: dict[str, tuple[Callable[..., Ids], tuple[Floats, ...], Ids]]
        ways = {TWO: (both, (images, texts), fuse(first, second, k))}
    else:
        space = "image" if query == "image" else "joint"
        rows, wanted = asked[space, query]
        ways = {TWO: (search[space, query], (rows,), wanted)}
    rows, wanted = asked["joint", query]
    ways[ONE] = (search["joint", query], (rows,), wanted)
    rivals, shares = [], {}
    for name, (answer, queries, wanted) in ways.items():
        shares[name] = recall(answer(*queries, k), wanted)
        rivals.append(rival(name, answer, queries, k, shares[name]))
    return rivals, shares


def rival(
    name: str, answer: Callable[..., Ids], queries: Sequence[Floats], k: int, found: float
) -> Rival:
    """Takes the next query at every turn."""
    turns = itertools.cycle(range(len(queries[0])))

    def run() -> Ids:
        row = next(turns)
        return answer(*(own[row : row + 1] for own in queries), k)

    return Rival(name, run, lambda _: {f"recall@{k}": found})


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


def tables(found: Mapping[str, Any], options: argparse.Namespace) -> str:
    """Markdown: what each system stores and builds, and how it answers."""
    stored = [
        [name, system.split()[0], f"{own['bytes'] / 1e6:.1f} MB", f"{own['build_seconds']:.1f} s"]
        for name, figures in found.items()
        for system, own in figures["storage"].items()
    ]
    answered = []
    for name, figures in found.items():
        for query, systems in figures["queries"].items():
            two, one = systems[TWO], systems[ONE]
            ratio = one["seconds"]["p50"] / two["seconds"]["p50"]
            answered.append(
                [name, query, _milliseconds(two), _milliseconds(one), f"{ratio:.2f}"]
                + [f"{100 * system['recall']:.1f}" for system in (two, one)]
            )
    knobs = [
        f"\n{name}, {figures['knob']}: "
        + ", ".join(f"{query} {value}" for query, value in figures["values"].items())
        + ".\n"
        for name, figures in found.items()
        if figures["knob"]
    ]
    appended = f", {options.appended} more appended in the one" if options.appended else ""
    heads = ["index", "query", "two", "one", "one / two", "recall two", "recall one"]
    return (
        f"{options.vectors:,} images, D = {options.dimensions}{appended}, fp32; "
        f"{options.threads} threads.\n\n"
        + markdown_table(["index", "embeddings", "bytes", "build"], "llrr", stored)
        + "\nMilliseconds per query, p50 (p20 to p80), of searches for one query; "
        + f"recall@{options.k} in percent.\n\n"
        + markdown_table(heads, "llrrrrr", answered)
        + "".join(knobs)
    )


def _milliseconds(own: Mapping[str, Any]) -> str:
    low, middle, high = (f"{1e3 * own['seconds'][at]:.3g}" for at in ("p20", "p50", "p80"))
    return f"{middle} ({low} to {high})"


if __name__ == "__main__":
    main()
