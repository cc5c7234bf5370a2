"""Pseudo-captions: for each image its k nearest captions with a cosine of at least a threshold.

The search is exact: `pymcip.ops.topk` over the parts of the caption embeddings as they lie on the
disk, a block of images at a time. Equal cosines are ordered by caption id. A cosine is the inner
product of two stored rows, rounded to fp32 once; rows stored as float16 have unit norm up to 3e-4.

With `recall` below 1 the blocks are searched for by a `pymcip.ops.ApproximateIndex`, for corpora
that are too large for that: cosines are exact too, but captions may be missing, and how many are
is measured on a sample of the images.

Several processes do the tasks of one table, see `pymcip.parts`: it is the same to the bit.
"""

from __future__ import annotations

import functools
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pymcip.configs import MineConfig, Source
from pymcip.distributed import barrier, joined
from pymcip.embedding import EmbeddingFolder, Matrix
from pymcip.errors import ConfigError, DataError, StaleEmbeddingsError
from pymcip.files import damaged, read_json, write_json, write_text
from pymcip.folders import hold
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
    BANK_ROWS,
    RECALL_ROWS,
    Tasks,
    approximate_search,
    exact_search,
    images_per_block,
    search_device,
)
from pymcip.mining.table import CaptionTable
from pymcip.ops.arrays import MatrixParts, dtype_name
from pymcip.ops.faiss_import import import_faiss
from pymcip.outputs import output_folder
from pymcip.parts import WHOLE, Shard, own_shard, refuse_overwrite

MOST_WITHOUT = 0.5  # of the images may have no caption without a warning
TASKS = "blocks"  # folder of the tasks' files, until all are done
AGAIN = "Give overwrite=True to mine again"  # what to do about damage

_log = logging.getLogger("pymcip.mining")


@dataclass(frozen=True)
class MineResult:
    """What `mine_captions` found; `report` is also in report.json, `markdown` has its main figures.

    `missing`: how many tasks other shards have still to do; until then there is no table, and the
    report is empty.
    """

    threshold: float
    report: dict[str, Any] = field(repr=False)
    out: Path
    missing: int = 0

    @functools.cached_property
    def table(self) -> CaptionTable:
        """The table in `out`.

        Raises:
            DataError: it is not complete.
        """
        if self.missing:
            raise DataError(
                f"{self.out} has no table yet: {self.missing} of its tasks are not done. Start the "
                "shards that do them, or run the same command without shard"
            )
        return CaptionTable.load(self.out)

    @property
    def markdown(self) -> str:
        """How many images have captions, how many captions are used, and the cosines."""
        if self.missing:
            return f"{self.missing} tasks are not done yet; other shards have to do them."
        return report_table(self.report)


def mine_captions(config: MineConfig | None = None, /, **options: Any) -> MineResult:
    """Mine the pseudo-captions of embedded images; see `MineConfig` for the options.

    Writes into `out`: caption_table.npz and .parquet, report.json, and sample.tsv (some images with
    their captions, to look at), and sources.npz (what `train` compares with its data). An interrupted
    run that is started again does the tasks that are missing; a finished one is opened. Processes of
    torchrun, or calls with `shard`, share the tasks; who finds all of them done writes the table.

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
    with joined():
        return _mine(config, own_shard(config.shard))


def _mine(config: MineConfig, shard: Shard) -> MineResult:
    """Do a shard's tasks, wait for the others of torchrun, and finish."""
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
    if shard[1] > 1 and config.recall < 1:
        raise ConfigError(
            f"recall={config.recall} with {shard[1]} processes: one process builds and asks an "
            "approximate index. Start one, without shard; or give recall=1, which they can share"
        )
    refuse_overwrite(config, shard)

    def there() -> bool:
        return (out / "mine.json").is_file() and not config.overwrite

    with output_folder(config, resume=there, shared=shard[1] > 1):
        mining = _opened(config, out, there(), settings, images, captions, shard)
        if not (out / "report.json").is_file():  # written last
            mining.tasks.do(mining.search, shard)
    barrier()
    with hold(out, wait=True):
        return _finished(config, out, mining, images, captions)


def _opened(
    config: MineConfig,
    out: Path,
    resume: bool,
    settings: dict[str, Any],
    images: EmbeddingFolder,
    captions: EmbeddingFolder,
    shard: Shard,
) -> _Mining:
    """Prepare mining in a folder that is held: new, or with the settings that it was begun with."""
    image_parts, caption_parts = images.parts("img"), captions.parts("text")
    _check_parts(image_parts, caption_parts)
    grid = _grid(config.k, image_parts, caption_parts, config.backend, shard)
    if resume:
        stored: dict[str, Any] = {"recall": 1.0, "index": None, **grid}
        stored |= read_json(out / "mine.json", {}, AGAIN)
        _check_settings(out, stored, settings)
        for name in grid:
            grid[name] = stored[name]
            if not isinstance(grid[name], int) or grid[name] < 1:
                raise damaged(out / "mine.json", f"{name!r} is {grid[name]!r}", AGAIN)
    write_json(out / "mine.json", {**settings, **grid})
    names = ("k", "threshold", "recall", "index", "backend", "threads", "seed")
    chosen: dict[str, Any] = {name: getattr(config, name) for name in names}
    return _Mining(image_parts, caption_parts, **chosen, folder=out / TASKS, grid=grid)


def _finished(
    config: MineConfig,
    out: Path,
    mining: _Mining,
    images: EmbeddingFolder,
    captions: EmbeddingFolder,
) -> MineResult:
    """Write the table if all tasks are done and no other process has; the folder is held."""
    if not (out / "report.json").is_file():
        missing = mining.tasks.missing()
        if missing:
            _log.info("%d of %d tasks are not done: other shards'", missing, len(mining.tasks))
            return MineResult(mining.lowest, {}, out, missing)
        table, report = mining.measured()
        report["captions_cut"] = captions.captions_cut  # at the model's context
        table.save(out)
        save_sources(out, images, captions)
        write_text(out / "sample.tsv", sample_lines(table, images, captions, config.seed))
        write_json(out / "report.json", report)
    shutil.rmtree(out / TASKS, ignore_errors=True)
    report = read_json(out / "report.json", {"threshold": float, "images": int}, AGAIN)
    return MineResult(report["threshold"], report, out)


class _Mining:
    """Tasks and how to do them; `folder`: of the tasks' files and of the index, or None."""

    def __init__(
        self,
        image_parts: Sequence[Matrix],
        caption_parts: Sequence[Matrix],
        *,
        k: int,
        threshold: float | str,
        recall: float,
        index: Source | None,
        backend: str,
        threads: int | None,
        seed: int,
        folder: Path | None,
        grid: dict[str, int],
    ) -> None:
        self.backend = backend
        self.given = not isinstance(threshold, str)
        self.random_pairs = auto_threshold(image_parts, caption_parts, seed=seed)
        self.lowest = self.random_pairs.value if isinstance(threshold, str) else float(threshold)
        if self.lowest <= self.random_pairs.median:
            _log.warning(
                "threshold %.3f is not above the median cosine of random pairs (%.3f): most captions "
                "pass it whether they fit or not; threshold='auto' would take %.3f",
                self.lowest, self.random_pairs.median, self.random_pairs.value,
            )  # fmt: skip
        images, self.captions = MatrixParts(image_parts), MatrixParts(caption_parts)
        bank_rows = grid["bank_rows"]
        self.approximate: dict[str, Any] | None = None
        if recall < 1:
            kept = Path(index) if index is not None else folder and folder / "index"
            sampled = sample_rows(images, 2 * RECALL_ROWS, np.random.default_rng(seed))
            self.search, self.approximate = approximate_search(
                self.captions, k, self.lowest,
                recall=recall, sampled=sampled, population=len(images), folder=kept,
                measured_file=folder and folder / "approximate.json",
                backend=backend, threads=threads, seed=seed,
            )  # fmt: skip
            bank_rows = len(self.captions)  # the index knows them all
        else:
            self.search = exact_search(
                self.captions, k, self.lowest, backend=backend, threads=threads
            )
        self.tasks = Tasks(images, len(self.captions), k, folder, grid["block_rows"], bank_rows)

    def measured(self) -> tuple[CaptionTable, dict[str, Any]]:
        """The table of all tasks, and the report of `mine_table`."""
        table, lowest, pairs = self.tasks.table(), self.lowest, self.random_pairs
        if not len(table.ids):
            raise DataError(
                explain_nothing(self.tasks.images, self.captions, lowest, pairs, self.backend)
            )
        report = describe_table(table, self.tasks.k, lowest, pairs, given=self.given)
        report["recall"] = 1.0 if self.approximate is None else self.approximate["recall"]
        report["approximate"] = self.approximate
        counts = table.counts()
        _log.info(
            "%d of %d images have captions with a cosine of at least %.3f: %.1f each",
            int((counts > 0).sum()), len(table), lowest, counts[counts > 0].mean(),
        )  # fmt: skip
        without = float((counts == 0).mean())
        if without > MOST_WITHOUT:
            _log.warning(
                "%.0f %% of the images have no pseudo-caption, so these teach nothing about texts. "
                "Give a lower threshold (now %.3f; threshold='auto' takes %.3f), or captions that are "
                "closer to the images",
                100 * without, lowest, pairs.value,
            )  # fmt: skip
        return table, report


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
    block_rows: int | None = None,
    bank_rows: int | None = None,
) -> tuple[CaptionTable, dict[str, Any]]:
    """Mine the k nearest captions of each image, those with a cosine of at least `threshold`.

    Args:
        image_parts: float16 or float32 [n, D] each, unit rows; N in all.
        caption_parts: likewise [m, D]; M in all.
        k: captions per image, at most.
        threshold: lowest cosine, inclusive, compared in fp32; or "auto", see `auto_threshold`.
        recall: share of the pairs to find. 1: all, by exact search; less: about this share, by an
            approximate index (faiss).
        index: folder of the approximate index, which is built if there is none; default: kept
            nowhere.
        backend: of the op; see `pymcip.ops.explain("topk")`.
        threads: CPU threads; default: torch's number.
        seed: of the samples of random pairs and of images, and of the index.
        block_rows: images per task, at most; default: see `images_per_block`. The result doesn't
            depend on it.
        bank_rows: captions per task, likewise.

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
    grid = _grid(k, image_parts, caption_parts, backend, WHOLE)
    grid |= {"block_rows": block_rows} if block_rows is not None else {}
    grid |= {"bank_rows": bank_rows} if bank_rows is not None else {}
    mining = _Mining(
        image_parts, caption_parts,
        k=k, threshold=threshold, recall=recall, index=index, backend=backend, threads=threads,
        seed=seed, folder=None, grid=grid,
    )  # fmt: skip
    mining.tasks.do(mining.search, WHOLE)
    return mining.measured()


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


def _grid(
    k: int,
    image_parts: Sequence[Matrix],
    caption_parts: Sequence[Matrix],
    backend: str,
    shard: Shard,
) -> dict[str, int]:
    """Rows of a task, so that every process has one."""
    device = search_device(backend, dtype_name(caption_parts[0]))
    most = images_per_block(k, caption_parts[0].shape[1], device)
    banks = -(-sum(map(len, caption_parts)) // BANK_ROWS)
    blocks = -(-shard[1] // banks)
    each = -(-sum(map(len, image_parts)) // blocks)
    return {"block_rows": max(1, min(most, each)), "bank_rows": BANK_ROWS}


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
