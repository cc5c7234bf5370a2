"""Pseudo-captions: for each image its k nearest captions with a cosine of at least a threshold.

The search is exact: `pymcip.ops.topk` over the parts of the caption embeddings as they lie on the
disk, a block of images at a time. Equal cosines are ordered by caption id. A cosine is the inner
product of two stored rows, rounded to fp32 once; rows stored as float16 have unit norm up to 3e-4.

With `recall` below 1 the blocks are searched for by a `pymcip.ops.ApproximateIndex`, for corpora
that are too large for that: cosines are still exact, but captions may be missing, and how many are
is measured on a sample of the images.
"""

from __future__ import annotations

import itertools
import logging
import math
import mmap
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet
import torch

from pymcip.configs import MineConfig, Source
from pymcip.embedding import EmbeddingFolder, Kind
from pymcip.errors import DataError, StaleEmbeddingsError
from pymcip.files import atomic_path, prepare_output, read_json, write_json, write_text
from pymcip.ops import ApproximateIndex, topk
from pymcip.ops.dispatch import backends
from pymcip.ops.faiss_import import import_faiss
from pymcip.ops.topk_cpu import pass_queries
from pymcip.progress import progress

SPREADS = 3.5  # auto threshold: this many spreads above the median, see `auto_threshold`
GPU_BLOCK_ROWS = 1 << 17
RECALL_ROWS = 256  # images whose exact captions an approximate search is compared with
SAMPLE_ROWS = 1024  # images and captions that stand for all in the distribution of random pairs
SAMPLED_IMAGES = 50  # in sample.tsv
HISTOGRAM_WIDTH = 0.01  # of a bin of the cosine histogram
TABLE = "caption_table"

_log = logging.getLogger("pymcip.mining")
Matrix = npt.NDArray[Any]
Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
# Ids and cosines [rows, k] of a block of images, -1 and -inf where there are fewer; the callback is
# told the work done and the work to do.
Search: TypeAlias = Callable[[Matrix, Callable[[int, int], None]], tuple[Int64, Float32]]


@dataclass(frozen=True)
class CaptionTable:
    """The pseudo-captions of N images, as a compressed sparse table.

    The captions of image i are `ids[indptr[i]:indptr[i+1]]`, by descending cosine, then ascending
    id. Images are rows of img_emb, captions rows of text_emb.

    Attributes:
        indptr: int64 [N + 1].
        ids: int64 [nnz].
        cosines: float32 [nnz].
        num_captions: rows of the caption corpus.
    """

    indptr: Int64
    ids: Int64
    cosines: Float32
    num_captions: int

    def __len__(self) -> int:
        return len(self.indptr) - 1

    def __getitem__(self, image: int) -> tuple[Int64, Float32]:
        """Return the caption ids of one image and their cosines."""
        if not -len(self) <= image < len(self):
            message = f"image {image} is not in a table of {len(self)} images"
            raise IndexError(message)
        image %= len(self)
        place = slice(self.indptr[image], self.indptr[image + 1])
        return self.ids[place], self.cosines[place]

    def counts(self) -> Int64:
        """Return the number of captions of each image, int64 [N]."""
        return np.diff(self.indptr)

    def save(self, folder: Source) -> None:
        """Write caption_table.npz, and caption_table.parquet (image, caption, cosine)."""
        with atomic_path(Path(folder) / f"{TABLE}.parquet") as temporary:
            images = np.repeat(np.arange(len(self)), self.counts())
            pa.parquet.write_table(
                pa.table({"image": images, "caption": self.ids, "cosine": self.cosines}), temporary
            )
        with (
            atomic_path(Path(folder) / f"{TABLE}.npz") as temporary,
            temporary.open("wb") as handle,
        ):
            np.savez(handle, **asdict(self))

    @classmethod
    def load(cls, path: Source) -> CaptionTable:
        """Read a table from its folder or its .npz file.

        Raises:
            DataError: there is none, or it is damaged.
        """
        file = Path(path)
        if file.is_dir():
            file = file / f"{TABLE}.npz"
        try:
            with np.load(file, allow_pickle=False) as arrays:
                table = cls(
                    arrays["indptr"], arrays["ids"], arrays["cosines"], int(arrays["num_captions"])
                )
        except (OSError, KeyError, ValueError, EOFError) as error:
            raise DataError(
                f"{file} can't be read as a caption table: {error}. Mine it again with "
                "pymcip.mine_captions"
            ) from error
        if not len(table.ids) == len(table.cosines) == table.indptr[-1]:
            raise DataError(f"{file} is damaged: its arrays don't fit together. Mine it again")
        return table


@dataclass(frozen=True)
class AutoThreshold:
    """Cosines of random (image, caption) pairs, and the threshold derived from them.

    Attributes:
        value: median + SPREADS * spread, at most 1.
        median, mean, deviation: of the pairs' cosines.
        spread: 1.4826 * median absolute deviation (the standard deviation, were they normal).
        above: share of the pairs at or above `value`.
        pairs: how many pairs were measured.
    """

    value: float
    median: float
    spread: float
    mean: float
    deviation: float
    above: float
    pairs: int


@dataclass(frozen=True)
class MineResult:
    """What `mine_captions` found; `report` is also in report.json."""

    table: CaptionTable
    threshold: float
    report: dict[str, Any]
    out: Path


def auto_threshold(
    image_parts: Sequence[Matrix], caption_parts: Sequence[Matrix], *, seed: int = 0
) -> AutoThreshold:
    """Derive a threshold from the model's own cosines between images and random captions.

    A caption is taken for a description of an image if its cosine stands out from those of
    captions that have nothing to do with the image: by SPREADS = 3.5 spreads above the median of
    random pairs (up to 1024 images x 1024 captions). Median and spread (median absolute deviation)
    are used because some random pairs do match, and must not raise the bar.

    Why 3.5: with the random pairs usually told of OpenAI's CLIP (around 0.15, deviation 0.03 to
    0.035) it gives 0.255 to 0.27, near the paper's 0.27; that was not measured here on OpenAI's
    weights. On the demo's base model, whose cosines spread far wider (0.16), it leaves three of four
    images a caption; 4 leaves one in a hundred. In a normal distribution 2 of 10,000 random pairs
    lie above.

    Args:
        image_parts: float16 or float32 [n, D] each, unit rows.
        caption_parts: likewise [m, D].
        seed: of the sample.
    """
    generator = np.random.default_rng(seed)
    images = _sample_rows(image_parts, SAMPLE_ROWS, generator)
    captions = _sample_rows(caption_parts, SAMPLE_ROWS, generator)
    cosines = (images @ captions.T).ravel()
    median = float(np.median(cosines))
    spread = 1.4826 * float(np.median(np.abs(cosines - median)))
    value = min(1.0, median + SPREADS * spread)
    return AutoThreshold(
        value=value,
        median=median,
        spread=spread,
        mean=float(cosines.mean()),
        deviation=float(cosines.std()),
        above=float((cosines >= value).mean()),
        pairs=len(cosines),
    )


def mine_captions(config: MineConfig | None = None, /, **options: Any) -> MineResult:
    """Mine the pseudo-captions of embedded images; see `MineConfig` for the options.

    Writes into `out`: caption_table.npz and .parquet, report.json, and sample.tsv (some images with
    their captions, to look at). An interrupted run goes on with the blocks of images that are
    missing, and so loses a block at most; a finished one is opened.

    Raises:
        ConfigError: an option is wrong.
        DataError: an embedding folder is missing or incomplete, or no caption of any image reaches
            the threshold.
        StaleEmbeddingsError: `out` was mined from other embeddings or with other options.
        OutputExistsError: `out` holds something else.
        BackendError: the back end can't run here.
        MissingDependencyError: `recall` is below 1, and faiss is not installed.
    """
    config = MineConfig.make(config, options)
    if config.recall < 1:
        import_faiss()
    images = EmbeddingFolder(config.images)
    captions = images if config.captions is None else EmbeddingFolder(config.captions)
    image_parts, caption_parts = images.parts("img"), captions.parts("text")
    out = Path(config.out)
    settings = {
        "images": images.identity("img"),
        "captions": captions.identity("text"),
        "k": config.k,
        "threshold": config.threshold,
        "recall": config.recall,
        "index": None if config.index is None else str(config.index),
        "seed": config.seed,
    }
    ours = (out / "mine.json").is_file()
    prepare_output(
        out,
        overwrite=config.overwrite,
        resume=ours and not config.overwrite,
        inputs=(config.images, config.captions, config.index),
    )
    device = _device(config.backend, str(caption_parts[0].dtype))
    block_rows = _block_rows(config.k, caption_parts[0].shape[1], device)
    if ours and not config.overwrite:
        stored = {"recall": 1.0, "index": None, **read_json(out / "mine.json")}
        _check_settings(out, stored, settings)
        block_rows = stored.get("block_rows", block_rows)
    write_json(out / "mine.json", {**settings, "block_rows": block_rows})
    blocks = out / "blocks"
    if (out / "report.json").is_file():  # written last
        shutil.rmtree(blocks, ignore_errors=True)  # of a run that was killed while removing them
        report = read_json(out / "report.json")
        return MineResult(CaptionTable.load(out), report["threshold"], report, out)
    table, report = mine_table(
        image_parts,
        caption_parts,
        k=config.k,
        threshold=config.threshold,
        recall=config.recall,
        index=config.index,
        backend=config.backend,
        threads=config.threads,
        seed=config.seed,
        blocks=blocks,
        block_rows=block_rows,
    )
    table.save(out)
    write_text(out / "sample.tsv", _sample(table, images, captions, config.seed))
    write_json(out / "report.json", report)
    shutil.rmtree(blocks)
    return MineResult(table, report["threshold"], report, out)


def mine_table(
    image_parts: Sequence[Matrix],
    caption_parts: Sequence[Matrix],
    *,
    k: int,
    threshold: float | str,
    recall: float = 1.0,
    index: Source | None = None,
    backend: str = "auto",
    threads: int | None = None,
    seed: int = 0,
    blocks: Path | None = None,
    block_rows: int | None = None,
) -> tuple[CaptionTable, dict[str, Any]]:
    """Mine the k nearest captions of each image, those with a cosine of at least `threshold`.

    Args:
        image_parts: float16 or float32 [n, D] each, unit rows; N in all.
        caption_parts: likewise [m, D]; M in all.
        k: captions per image, at most.
        threshold: lowest cosine, inclusive, compared in fp32; or "auto", see `auto_threshold`.
        recall: share of the pairs to find. 1: all, by exact search; less: about this share, by an
            approximate index (faiss).
        index: folder of the approximate index, which is built there if there is none; default: in
            `blocks`.
        backend: of the op; see `pymcip.ops.explain("topk")`.
        threads: CPU threads; default: torch's number.
        seed: of the samples of random pairs and of images, and of the index.
        blocks: folder that keeps finished blocks of images, for a run that is started again with
            the same arguments; None keeps nothing.
        block_rows: images per block, at most; default: see `_block_rows`. The result doesn't depend
            on it. Blocks of another size than those in `blocks` are mined anew.

    Returns:
        The table of N images, and a report: `images`, `captions`, `k`, `threshold`,
        `threshold_from`, `random_pairs` (an `AutoThreshold`, whichever threshold is used),
        `images_by_captions` (how many images have 0, 1, … k captions), `pairs`, `captions_used`,
        `cosines` (of the pairs: lowest, mean, highest, histogram), `recall` (1, or measured; None if
        nothing could be measured) and `approximate` (None, or how `recall` was measured).

    Raises:
        DataError: there are no rows, widths differ, or not one caption reaches the threshold.
        BackendError: the back end can't run here.
        MissingDependencyError: `recall` is below 1, and faiss is not installed.
    """
    _check_parts(image_parts, caption_parts)
    random_pairs = auto_threshold(image_parts, caption_parts, seed=seed)
    lowest = random_pairs.value if isinstance(threshold, str) else float(threshold)
    if lowest <= random_pairs.median:
        _log.warning(
            "threshold %.3f is not above the median cosine of random pairs (%.3f): most captions "
            "pass it whether they fit or not; threshold='auto' would take %.3f",
            lowest,
            random_pairs.median,
            random_pairs.value,
        )
    images = sum(len(part) for part in image_parts)
    measured: dict[str, Any] | None = None
    if recall < 1:
        sampled = _sample_rows(image_parts, 2 * RECALL_ROWS, np.random.default_rng(seed))
        search, measured = _approximate_search(
            caption_parts, k, lowest, recall, index, backend, threads, seed, blocks, sampled, images
        )
    else:
        search = _exact_search(caption_parts, k, lowest, backend, threads)
    if block_rows is None:
        device = _device(backend, str(caption_parts[0].dtype))
        block_rows = _block_rows(k, caption_parts[0].shape[1], device)
    found = _mine_blocks(
        image_parts, sum(len(part) for part in caption_parts), search, k, blocks, block_rows
    )
    counts, ids, cosines = (np.concatenate(column) for column in zip(*found, strict=True))
    del found
    table = CaptionTable(
        indptr=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        ids=ids,
        cosines=cosines,
        num_captions=sum(len(part) for part in caption_parts),
    )
    if not len(table.ids):
        raise DataError(_nothing_found(image_parts, caption_parts, lowest, random_pairs, backend))
    report = _report(table, k, lowest, random_pairs, given=not isinstance(threshold, str))
    report["recall"] = 1.0 if measured is None else measured["recall"]
    report["approximate"] = measured
    _log.info(
        "%d of %d images have captions with a cosine of at least %.3f: %.1f each",
        int((counts > 0).sum()),
        len(table),
        lowest,
        counts[counts > 0].mean(),
    )
    return table, report


def _check_parts(image_parts: Sequence[Matrix], caption_parts: Sequence[Matrix]) -> None:
    widths = {part.shape[1] for part in (*image_parts, *caption_parts)}
    if len(widths) > 1:
        raise DataError(
            f"the embeddings are {' and '.join(map(str, sorted(widths)))} wide; images and captions "
            "must be embedded with one model"
        )
    for what, parts in (("images", image_parts), ("captions", caption_parts)):
        if not sum(len(part) for part in parts):
            raise DataError(f"there are no embedded {what} to mine; embed some with pymcip.embed")


def _block_rows(k: int, columns: int, device: torch.device) -> int:
    """Images per block: what a kill loses, and what all captions are read and rounded for once.

    On a CPU as many as one pass over the captions serves: 14,848 of 512 columns with k = 10, which
    take two cores with AMX three quarters of a minute with 12 million captions. A GPU takes seconds
    for far more.
    """
    if device.type != "cpu":
        return GPU_BLOCK_ROWS
    return pass_queries(columns, k)


def _mine_blocks(
    image_parts: Sequence[Matrix],
    captions: int,
    search: Search,
    k: int,
    blocks: Path | None,
    block_rows: int,
) -> list[tuple[Int64, Int64, Float32]]:
    """What `search` finds for each block of images; those whose files are in `blocks` are read.

    Blocks are of one size, to a row. A file is named after the rows of its block.

    Returns:
        Of each block how many captions each image has, and all their ids and cosines.
    """
    images = sum(len(part) for part in image_parts)
    count = -(-images // block_rows)
    bounds = [images * number // count for number in range(count + 1)]
    places = list(itertools.pairwise(bounds))
    files = [None if blocks is None else blocks / f"images_{a}_{b}.npz" for a, b in places]
    finished = [file is not None and file.is_file() for file in files]
    ready = sum(b - a for (a, b), done in zip(places, finished, strict=True) if done)
    if ready:
        _log.info("%d of %d images were mined before; going on with the others", ready, images)
    found = []
    with progress(
        total=images * captions,
        initial=ready * captions,
        description="mining",
        unit="cosine",
        unit_scale=True,
    ) as bar:
        for (first, last), file, done in zip(places, files, finished, strict=True):
            if file is not None and done:
                found.append(_filled(*_read_block(file, last - first, k)))
                continue
            work, counted = (last - first) * captions, 0

            def report(done: int, total: int) -> None:
                nonlocal counted
                now = work * done // max(1, total)  # noqa: B023
                bar.update(now - counted)
                counted = now

            ids, cosines = search(_rows(image_parts, first, last), report)
            report(1, 1)
            if file is not None:
                with atomic_path(file) as temporary, temporary.open("wb") as handle:
                    np.savez(handle, ids=ids, cosines=cosines)
            found.append(_filled(ids, cosines))
    return found


def _filled(ids: Int64, cosines: Float32) -> tuple[Int64, Int64, Float32]:
    there = ids >= 0
    return there.sum(axis=1), ids[there], cosines[there]


def _read_block(file: Path, rows: int, k: int) -> tuple[Int64, Float32]:
    try:
        with np.load(file, allow_pickle=False) as stored:
            ids, cosines = stored["ids"], stored["cosines"]
        if ids.shape == cosines.shape == (rows, k):
            return ids, cosines
        problem = f"it holds {ids.shape}, not {(rows, k)}"
    except (OSError, KeyError, ValueError, EOFError) as error:
        problem = str(error)
    raise DataError(f"{file} is damaged: {problem}. Remove it and mine again")


def _rows(parts: Sequence[Matrix], first: int, last: int) -> Matrix:
    """Rows first, ..., last - 1 of all parts: a view where one part holds them."""
    firsts = np.cumsum([0, *(len(part) for part in parts)]).tolist()
    pieces = [
        part[max(0, first - own) : last - own]
        for part, own in zip(parts, firsts, strict=False)
        if own < last and own + len(part) > first
    ]
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def _exact_search(
    caption_parts: Sequence[Matrix],
    k: int,
    threshold: float | None,
    backend: str,
    threads: int | None,
) -> Search:
    device = _device(backend, str(caption_parts[0].dtype))
    for part in caption_parts:
        if isinstance(part, np.memmap) and hasattr(mmap, "MADV_SEQUENTIAL"):
            # Reads ahead: a part that is not in memory takes half the time.
            part._mmap.madvise(mmap.MADV_SEQUENTIAL)  # type: ignore[attr-defined]

    def search(images: Matrix, report: Callable[[int, int], None]) -> tuple[Int64, Float32]:
        queries: Any = images
        if device.type != "cpu":
            queries = torch.from_numpy(np.array(images)).to(device)
        ids, cosines = topk(
            queries,
            list(caption_parts),
            k,
            threshold,
            backend=backend,
            threads=threads,
            progress=report,
        )
        return np.asarray(_host(ids)), np.asarray(_host(cosines))

    return search


def _approximate_search(
    caption_parts: Sequence[Matrix],
    k: int,
    threshold: float,
    recall: float,
    index: Source | None,
    backend: str,
    threads: int | None,
    seed: int,
    blocks: Path | None,
    sampled: Matrix,
    images: int,
) -> tuple[Search, dict[str, Any]]:
    """A search that finds about `recall` of the pairs, and what it found of a sample of the images.

    The index and what the sample told are kept, so that a run that goes on searches alike.
    """
    captions = list(caption_parts)
    kept = Path(index) if index is not None else None if blocks is None else blocks / "index"
    built = _open_index(kept, captions, seed, threads)
    told = None if blocks is None else blocks / "approximate.json"
    if told is not None and told.is_file():
        measured = read_json(told)
    else:
        found = _with_bar(
            "measuring recall",
            lambda report: built.search(
                sampled,
                captions,
                k,
                threshold,
                recall=recall,
                sample=RECALL_ROWS,
                population=images,
                backend=backend,
                seed=seed,
                threads=threads,
                progress=report,
            ),
        )
        known = math.isfinite(found.recall)
        measured = {
            "asked": recall,
            "recall": found.recall if known else None,
            "recall_error": found.recall_error if known else None,
            "recall_interval": list(found.recall_interval),
            "recall_images": found.recall_queries,
            "nprobe": found.nprobe,
            "lists": built.lists,
            "candidates": found.candidates,
        }
        if told is not None:
            write_json(told, measured)
    if measured["recall"] is None:
        _log.warning(
            "recall can't be measured: none of %d images sampled has a caption over the threshold",
            len(sampled),
        )
    else:
        _log.info(
            "approximate search: recall %.3f (95 %% interval %.3f to %.3f, measured on %d images; "
            "%.3f was asked for), %d of %d lists",
            measured["recall"],
            *measured["recall_interval"],
            measured["recall_images"],
            recall,
            measured["nprobe"],
            measured["lists"],
        )

    def search(images: Matrix, report: Callable[[int, int], None]) -> tuple[Int64, Float32]:
        found = built.search(
            images,
            captions,
            k,
            threshold,
            nprobe=measured["nprobe"],
            sample=0,
            backend=backend,
            threads=threads,
            progress=report,
        )
        return found.ids, found.scores

    return search, measured


def _open_index(
    folder: Path | None, captions: list[Matrix], seed: int, threads: int | None
) -> ApproximateIndex:
    if folder is not None and (folder / "index.json").is_file():
        return ApproximateIndex.load(folder, memory_map=True)
    built: ApproximateIndex = _with_bar(
        "building the index",
        lambda report: ApproximateIndex.build(
            captions, seed=seed, threads=threads, progress=report
        ),
    )
    if folder is not None:
        built.save(folder)
    return built


def _with_bar(description: str, work: Callable[[Callable[[int, int], None]], Any]) -> Any:
    """What `work` gives, which is handed a callback for the work done and the work to do."""
    with progress(total=0, description=description, unit="row", unit_scale=True) as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return work(report)


def _host(values: Any) -> Any:
    return values.cpu() if isinstance(values, torch.Tensor) else values


def _device(backend: str, dtype: str) -> torch.device:
    """Choose the GPU, if there is one and the back end takes it there."""
    if torch.cuda.is_available():
        rows = [row for row in backends("topk") if backend in ("auto", row.name)]
        if any(row.obstacle("cuda", dtype) is None for row in rows):
            return torch.device("cuda")
    return torch.device("cpu")


def _sample_rows(parts: Sequence[Matrix], count: int, generator: np.random.Generator) -> Float32:
    """Draw rows without replacement (all, if there are fewer): float32 [count, D]."""
    bounds = np.cumsum([0, *(len(part) for part in parts)])
    chosen = np.sort(generator.choice(bounds[-1], min(count, int(bounds[-1])), replace=False))
    drawn = [
        part[chosen[(chosen >= first) & (chosen < first + len(part))] - first]
        for first, part in zip(bounds[:-1], parts, strict=True)
    ]
    return np.concatenate(drawn).astype(np.float32)


def _nothing_found(
    image_parts: Sequence[Matrix],
    caption_parts: Sequence[Matrix],
    threshold: float,
    random_pairs: AutoThreshold,
    backend: str,
) -> str:
    images = _sample_rows(image_parts, SAMPLE_ROWS, np.random.default_rng(0))
    _, cosines = _exact_search(caption_parts, 1, None, backend, None)(images, lambda *_: None)
    best = float(cosines.max())
    advice = f"give threshold='auto' ({random_pairs.value:.3f} here)"
    if best < random_pairs.value:
        advice = (
            f"threshold='auto' would be {random_pairs.value:.3f} here, so the captions don't fit the "
            "images: give a lower threshold, or another corpus"
        )
    return (
        f"no caption of any image has a cosine of {threshold:.3f} or more; the best among "
        f"{len(images)} images is {best:.3f}. Cosines differ between models (the paper's 0.27 is "
        f"for OpenAI's CLIP); {advice}"
    )


def _report(
    table: CaptionTable, k: int, threshold: float, random_pairs: AutoThreshold, *, given: bool
) -> dict[str, Any]:
    first = int(np.floor(float(table.cosines.min()) / HISTOGRAM_WIDTH))
    bins = np.floor(table.cosines.astype(np.float64) / HISTOGRAM_WIDTH).astype(np.int64) - first
    numbers = np.bincount(bins)
    return {
        "images": len(table),
        "captions": table.num_captions,
        "k": k,
        "threshold": threshold,
        "threshold_from": "given" if given else "auto",
        "random_pairs": asdict(random_pairs),
        "images_by_captions": np.bincount(table.counts(), minlength=k + 1).tolist(),
        "pairs": len(table.ids),
        "captions_used": len(np.unique(table.ids)),
        "cosines": {
            "lowest": float(table.cosines.min()),
            "mean": float(table.cosines.mean(dtype=np.float64)),
            "highest": float(table.cosines.max()),
            "histogram": [
                {
                    "from": round((first + number) * HISTOGRAM_WIDTH, 2),
                    "to": round((first + number + 1) * HISTOGRAM_WIDTH, 2),
                    "count": int(count),
                }
                for number, count in enumerate(numbers)
            ],
        },
    }


def _sample(
    table: CaptionTable, images: EmbeddingFolder, captions: EmbeddingFolder, seed: int
) -> str:
    """Lines image, label, cosine, caption of some images, those without captions among them."""
    generator = np.random.default_rng(seed)
    chosen = np.sort(generator.choice(len(table), min(SAMPLED_IMAGES, len(table)), replace=False))
    described = _described(images, "img", chosen)
    wanted = np.unique(np.concatenate([table[int(row)][0] for row in chosen]))
    texts = dict(zip(wanted.tolist(), _described(captions, "text", wanted), strict=True))
    lines = ["image\tlabel\tcosine\tcaption"]
    for row, image in zip(chosen, described, strict=True):
        ids, cosines = table[int(row)]
        name, label = image["image_path"], image.get("label")
        found = [
            (f"{cosine:.4f}", texts[int(caption)]["caption"])
            for caption, cosine in zip(ids, cosines, strict=True)
        ]
        for cosine, text in found or [("", "")]:
            cells = (name, "" if label is None else label, cosine, text)
            lines.append("\t".join(" ".join(str(cell).split()) for cell in cells))
    return "\n".join(lines) + "\n"


def _described(folder: EmbeddingFolder, kind: Kind, rows: Int64) -> list[dict[str, Any]]:
    """Give some rows' metadata; row numbers stand for names and texts that the folder lacks."""
    column = "image_path" if kind == "img" else "caption"
    known = folder.describe(kind, rows) if folder.has_metadata(kind) else []
    if known and column in known[0]:
        return known
    return [{column: str(row)} for row in rows]


def _check_settings(out: Path, stored: dict[str, Any], settings: dict[str, Any]) -> None:
    differing = [name for name in settings if stored.get(name) != settings[name]]
    if differing:
        shown = ", ".join(
            name
            if name in ("images", "captions")
            else f"{name} ({stored.get(name)}, now {settings[name]})"
            for name in differing
        )
        raise StaleEmbeddingsError(
            f"{out} was mined with another {shown}; mine into another folder, or give "
            "overwrite=True to replace it"
        )
