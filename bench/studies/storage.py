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
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pymcip.files import write_text
from pymcip.ops import topk
from pymcip.ops.faiss_import import faiss_threads, import_faiss

sys.path.insert(0, str(Path(__file__).parents[1]))  # the harness is in bench/
from harness import Report, common_arguments, compare

from studies.storage_search import (
    AT_ONCE,
    KINDS,
    ONE,
    QUERIES,
    SEARCHES,
    TWO,
    Asked,
    Kind,
    build,
    lists,
    recall,
    systems,
    tune,
)
from studies.storage_space import (
    AppendedSpace,
    Floats,
    Space,
    cluster_labels,
    describe,
    generate,
    unit_rows,
)
from studies.storage_tables import tables

WEIGHT = 2.0  # of the appended dimensions
SMALLEST = 2_000  # vectors: below, the lists of IVF-PQ can't be trained


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = common_arguments(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.set_defaults(repetitions=200)
    parser.add_argument("--vectors", type=int, default=1_000_000, help="images, N")
    parser.add_argument("--dimensions", type=int, default=512, help="D, a multiple of 8")
    parser.add_argument(
        "--appended", type=int, default=0, metavar="R", help="dimensions, a multiple of 8"
    )
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
    if options.appended < 0 or options.appended % 8:
        parser.error(f"--appended {options.appended}: IVF-PQ needs a multiple of 8, or 0")
    if not 2 <= options.queries <= options.vectors:
        parser.error(f"--queries {options.queries}; allowed: 2 to --vectors, {options.vectors}")
    for name in ("batch", "k", "threads", "repetitions"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}; allowed: at least 1")
    options.indexes = list(dict.fromkeys(options.indexes))
    options.batch = min(options.batch, options.queries - options.queries // 2)
    return options


@contextlib.contextmanager
def place(options: argparse.Namespace) -> Iterator[Path]:
    """A folder with room for the vectors of both spaces and two indexes, removed at the end."""
    row = 4 * (options.dimensions + options.appended)
    needed = 2 * options.vectors * (2 * row + 8 * options.links + 100)
    if options.work is not None:
        options.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="storage_", dir=options.work) as work:
        free = shutil.disk_usage(work).free
        if free < 1.1 * needed:
            raise SystemExit(
                f"{work} has {free / 1e9:.1f} GB free; {1.1 * needed / 1e9:.1f} GB are needed; give "
                "another folder with --work, or fewer --vectors"
            )
        yield Path(work)


def ask(
    spaces: Mapping[str, Space | AppendedSpace],
    banks: Mapping[str, Floats],
    options: argparse.Namespace,
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
        own["combined"] = unit_rows(own["image"] + own["text"])
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
    if options.appended:
        case["appended"] = options.appended
    built = {}
    for name, images in banks.items():
        built[name] = index = build(kind, images, work / f"{name}.index", options)
        seconds = index.train_seconds + index.add_seconds
        print(f"{kind.name}, {name} space: {index.bytes / 1e9:.3f} GB, built in {seconds:.1f} s")
    faiss = import_faiss()
    indexes = {name: faiss.read_index(str(own.path)) for name, own in built.items()}
    storage = {}
    for system, names in ((TWO, ("image", "joint")), (ONE, ("joint",))):
        own = [built[name] for name in names]
        storage[system] = {
            "bytes": sum(each.bytes for each in own),
            "build_seconds": sum(each.train_seconds + each.add_seconds for each in own),
            "train_seconds": sum(each.train_seconds for each in own),
        }
        report.record({"case": case, "rival": system, "note": options.note, **storage[system]})
    for each in built.values():
        each.path.unlink()

    knobs: dict[str, int | None] = {}
    measured = {}
    for space, query in SEARCHES:
        tuning, measured[space, query] = asked[space, query].halves()
        value = tune(kind, indexes[space], tuning.queries, tuning.wanted, options.recall)
        knobs[query] = value if value is None else max(value, knobs.get(query) or 0)
    search = {
        (space, query): kind.search(indexes[space], knobs[query]) for space, query in SEARCHES
    }
    figures: dict[str, Any] = {
        "storage": storage,
        "knob": kind.knob,
        "values": knobs,
        "queries": {},
    }
    by_texts_knob = None
    if knobs["combined"] != knobs["text"]:
        by_texts_knob = kind.search(indexes["joint"], knobs["text"])
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
    case = {
        name: getattr(options, name)
        for name in ("vectors", "dimensions", "appended", "queries", "k")
    }
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


if __name__ == "__main__":
    main()
