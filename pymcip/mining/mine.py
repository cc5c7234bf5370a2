"""Pseudo-captions: for each image its k nearest captions with a cosine of at least a threshold.

The search is exact: `pymcip.ops.topk` over the parts of the caption embeddings as they lie on the
disk, a block of images at a time. Equal cosines are ordered by caption id. A cosine is the inner
product of two stored rows, rounded to fp32 once; rows stored as float16 have unit norm up to 3e-4.

With `recall` below 1 the blocks are searched for by a `pymcip.ops.ApproximateIndex`, for corpora
that are too large for that: cosines are exact too, but captions may be missing, and how many are
is measured on a sample of the images.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pymcip.configs import MineConfig, Source
from pymcip.embedding import EmbeddingFolder, Matrix
from pymcip.errors import DataError, StaleEmbeddingsError
from pymcip.files import damaged, read_json, write_json, write_text
from pymcip.mining.given import save_sources
from pymcip.mining.report import (
    auto_threshold,
    describe_table,
    explain_nothing,
    report_table,
    sample_lines,
    sample_rows,
)
from pymcip.mining.search import (
    RECALL_ROWS,
    approximate_search,
    exact_search,
    images_per_block,
    mine_blocks,
    search_device,
)
from pymcip.mining.table import CaptionTable
from pymcip.ops.arrays import MatrixParts, dtype_name
from pymcip.ops.faiss_import import import_faiss
from pymcip.outputs import output_folder

MOST_WITHOUT = 0.5  # of the images may have no caption without a warning
AGAIN = "Give overwrite=True to mine again"  # what to do about damage

_log = logging.getLogger("pymcip.mining")


@dataclass(frozen=True)
class MineResult:
    """What `mine_captions` found; `report` is also in report.json, `markdown` is its gist for people."""

    table: CaptionTable
    threshold: float
    report: dict[str, Any] = field(repr=False)
    out: Path

    @property
    def markdown(self) -> str:
        """How many images have captions, how many captions are used, and the cosines."""
        return report_table(self.report)


def mine_captions(config: MineConfig | None = None, /, **options: Any) -> MineResult:
    """Mine the pseudo-captions of embedded images; see `MineConfig` for the options.

    Writes into `out`: caption_table.npz and .parquet, report.json, and sample.tsv (some images with
    their captions, to look at), and sources.npz (what `train` compares with its data). An interrupted run that is started again mines
    the blocks of images that are missing; a finished one is opened.

    Raises:
        ConfigError: an option is wrong.
        DataError: an embedding folder is missing or incomplete, or no caption of any image reaches
            the threshold.
        StaleEmbeddingsError: `out` was mined from other embeddings or with other options.
        OutputExistsError: `out` holds something else.
        FolderInUseError: another process writes to `out`.
        BackendError: the back end can't run here.
        MissingDependencyError: `recall` is below 1, and faiss is not installed.
    """
    config = MineConfig.make(config, options)
    if config.recall < 1:
        import_faiss()
    images = EmbeddingFolder(config.images)
    captions = images if config.captions is None else EmbeddingFolder(config.captions)
    for folder, made_from in (
        (images, images.fingerprint("img")),
        (captions, captions.fingerprint("text")),
    ):
        if "joint_dim" in made_from:
            raise DataError(
                f"{folder.path} was embedded with appended dimensions, which captions don't have; "
                "embed with the model that the run started from"
            )
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
    resume = (out / "mine.json").is_file() and not config.overwrite
    with output_folder(config, resume=resume):
        return _mine(config, out, resume, settings, images, captions)


def _mine(
    config: MineConfig,
    out: Path,
    resume: bool,
    settings: dict[str, Any],
    images: EmbeddingFolder,
    captions: EmbeddingFolder,
) -> MineResult:
    """Mine into a folder that is held, or read what was mined there."""
    image_parts, caption_parts = images.parts("img"), captions.parts("text")
    block_rows = _block_rows(config.k, caption_parts, config.backend)
    if resume:
        stored: dict[str, Any] = {"recall": 1.0, "index": None, "block_rows": block_rows}
        stored |= read_json(out / "mine.json", {}, AGAIN)
        _check_settings(out, stored, settings)
        block_rows = stored["block_rows"]
        if not isinstance(block_rows, int) or block_rows < 1:
            raise damaged(out / "mine.json", f"'block_rows' is {block_rows!r}", AGAIN)
    write_json(out / "mine.json", {**settings, "block_rows": block_rows})
    blocks = out / "blocks"
    if (out / "report.json").is_file():  # written last
        shutil.rmtree(blocks, ignore_errors=True)  # of a run that was killed while removing them
        report = read_json(out / "report.json", {"threshold": float, "images": int}, AGAIN)
        return MineResult(CaptionTable.load(out), report["threshold"], report, out)
    names = ("k", "threshold", "recall", "index", "backend", "threads", "seed")
    chosen: dict[str, Any] = {name: getattr(config, name) for name in names}
    table, report = mine_table(
        image_parts, caption_parts, **chosen, blocks=blocks, block_rows=block_rows
    )
    report["captions_cut"] = captions.captions_cut  # at the model's context
    table.save(out)
    save_sources(out, images, captions)
    write_text(out / "sample.tsv", sample_lines(table, images, captions, config.seed))
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
        index: folder of the approximate index, which is built if there is none; default: in `blocks`.
        backend: of the op; see `pymcip.ops.explain("topk")`.
        threads: CPU threads; default: torch's number.
        seed: of the samples of random pairs and of images, and of the index.
        blocks: folder that keeps finished blocks of images, for a run that is started again with
            the same arguments; None keeps nothing.
        block_rows: images per block, at most; default: see `images_per_block`. The result doesn't
            depend on it.

    Returns:
        The table of N images, and a report: `images`, `captions`, `k`, `threshold`,
        `threshold_from`, `random_pairs` (an `AutoThreshold`, whichever threshold is used),
        `images_by_captions` (how many images have 0, 1, … k captions), `pairs`, `captions_used`,
        `cosines` (of the pairs: lowest, mean, highest, histogram), `recall` (1, or measured; None
        if nothing could be measured) and `approximate` (None, or how `recall` was measured).

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
            lowest, random_pairs.median, random_pairs.value,
        )  # fmt: skip
    images, captions = MatrixParts(image_parts), MatrixParts(caption_parts)
    measured: dict[str, Any] = {"recall": 1.0}
    if recall < 1:
        folder = Path(index) if index is not None else None if blocks is None else blocks / "index"
        search, measured = approximate_search(
            captions, k, lowest,
            recall=recall, sampled=sample_rows(images, 2 * RECALL_ROWS, np.random.default_rng(seed)),
            population=len(images), folder=folder,
            measured_file=None if blocks is None else blocks / "approximate.json",
            backend=backend, threads=threads, seed=seed,
        )  # fmt: skip
    else:
        search = exact_search(captions, k, lowest, backend=backend, threads=threads)
    rows = block_rows or _block_rows(k, caption_parts, backend)
    table = mine_blocks(images, len(captions), search, k, blocks, rows)
    if not len(table.ids):
        raise DataError(explain_nothing(images, captions, lowest, random_pairs, backend))
    report = describe_table(table, k, lowest, random_pairs, given=not isinstance(threshold, str))
    report["recall"] = measured["recall"]
    report["approximate"] = measured if recall < 1 else None
    counts = table.counts()
    _log.info(
        "%d of %d images have captions with a cosine of at least %.3f: %.1f each",
        int((counts > 0).sum()), len(table), lowest, counts[counts > 0].mean(),
    )  # fmt: skip
    without = float((counts == 0).mean())
    if without > MOST_WITHOUT:
        _log.warning(
            "%.0f %% of the images have no pseudo-caption, so these teach nothing about texts. Give a "
            "lower threshold (now %.3f; threshold='auto' takes %.3f), or captions that are closer to "
            "the images",
            100 * without, lowest, random_pairs.value,
        )  # fmt: skip
    return table, report


def _check_parts(image_parts: Sequence[Matrix], caption_parts: Sequence[Matrix]) -> None:
    widths = {part.shape[1] for part in (*image_parts, *caption_parts)}
    if len(widths) > 1:
        raise DataError(
            f"the embeddings are {' and '.join(map(str, sorted(widths)))} wide; images and "
            "captions must be embedded with one model"
        )
    for what, parts in (("images", image_parts), ("captions", caption_parts)):
        if not sum(len(part) for part in parts):
            raise DataError(f"there are no embedded {what} to mine; embed some with pymcip.embed")


def _block_rows(k: int, caption_parts: Sequence[Matrix], backend: str) -> int:
    device = search_device(backend, dtype_name(caption_parts[0]))
    return images_per_block(k, caption_parts[0].shape[1], device)


def _check_settings(out: Path, stored: dict[str, Any], settings: dict[str, Any]) -> None:
    differing = [name for name in settings if stored.get(name) != settings[name]]
    if differing:
        long = ("images", "captions")
        shown = ", ".join(
            name if name in long else f"{name} ({stored.get(name)}, now {settings[name]})"
            for name in differing
        )
        raise StaleEmbeddingsError(
            f"{out} was mined with another {shown}; mine into another folder, or give "
            "overwrite=True to replace it"
        )
