"""The report of a run: its data and settings, what it mined, and its results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from pymcip.configs import TrainSettings
from pymcip.data.tally import LeftOut
from pymcip.embedding import EmbeddingFolder
from pymcip.evaluation import metric_title
from pymcip.evaluation.report import LeftOuts, Model, Named, Thumbnails, picture_of, write_report
from pymcip.mining import CaptionTable
from pymcip.mining.table import Float32
from pymcip.pages import chart
from pymcip.training.inputs import Inputs
from pymcip.training.logs import read_metrics
from pymcip.training.loop import LOSS_WORDS
from pymcip.training.result import TrainResult
from pymcip.training.validation import Validation

FIGURES = ("i2i_map", "knn", "zero_shot", "t2i_r5")  # that are drawn epoch by epoch
DIRECTIONS = {"image_to_text": "images to texts", "text_to_image": "texts to images"}
PAIRS = 6  # of the best and of the worst pseudo-captions
CANDIDATES = 1000  # pairs that these are chosen from


def report_run(
    result: TrainResult,
    config: TrainSettings,
    reasons: Mapping[str, str],
    inputs: Inputs,
    embedded: EmbeddingFolder,
    validation: Validation | None,
) -> Path:
    """Write report.html into the folder of a run that is finished.

    Args:
        result: of the run; it may not be written yet.
        config: its settings; `reasons` of those that were chosen for it, by their names.
        inputs: its data.
        embedded: the embeddings of its training images.
        validation: its evaluations; None: there were none.

    Raises:
        ResourceError: the disk is full.
    """
    thumbnails = Thumbnails(result.seconds)
    models: list[Model] = []
    data: Named | None = None
    unmeasured: list[LeftOut] = []
    if validation is not None:
        after = "after" if result.hub is not None else "after, not exported"
        now = validation.measured
        if validation.before:
            models.append(Model("before", validation.before, validation.found_before))
        models.append(Model(after, validation.metrics, None if now is None else now.examples))
        if now is not None:
            data, unmeasured = Named(validation.data, now.names), now.left_out
    skipped = [LeftOut(item["key"], item["reason"]) for item in embedded.skipped]
    listed = str(embedded.path / "skipped.tsv")
    kinds = [
        LeftOuts("things among the training images", [*inputs.images.left_out, *skipped], listed),
        LeftOuts("things among the images that measure the run", _others(unmeasured, inputs)),
    ]
    if inputs.captions is not None:
        kinds.append(LeftOuts("captions", inputs.captions.left_out))
    return write_report(
        result.out,
        f"pymcip train: {result.out.name}",
        models,
        data,
        kinds,
        thumbnails,
        lead=list(_lead(result, config, inputs, validation)),
        remarks=[] if validation is None else validation.remarks,
        budget=list(budget_in_words(result.alignment)),
        charts=list(_charts(read_metrics(result.out / "metrics.jsonl"))),
        mined=_mined(result.out / "mined", inputs, embedded, thumbnails),
        settings=settings_rows(config, reasons),
    )


def _others(unmeasured: Sequence[LeftOut], inputs: Inputs) -> list[LeftOut]:
    """What is not in the training images' list, as held-out classes share their source."""
    said = {item.key for item in inputs.images.left_out} if inputs.held_out else set()
    return [item for item in unmeasured if item.key not in said]


def _lead(
    result: TrainResult, config: TrainSettings, inputs: Inputs, validation: Validation | None
) -> Iterator[str]:
    model = config.model if config.pretrained is None else f"{config.model} ({config.pretrained})"
    captions = "" if inputs.captions is None else f" and {len(inputs.captions):,} captions"
    took = timedelta(seconds=round(result.seconds))
    yield (
        f"{model}, fine-tuned by the method {config.method} on {len(inputs.images):,} images of "
        f"{inputs.images.num_classes:,} classes{captions}: {result.steps:,} steps in {took}."
    )
    if validation is None:
        yield (
            "The run was not measured: it had no val_data, and no classes were held out. Give one of "
            "the two to see whether search gets better."
        )
    else:
        what = "classes that were held out of training" if inputs.held_out else "val_data"
        counts = None if validation.measured is None else validation.measured.counts
        images = len(validation.data) if counts is None else counts["images"]
        yield (
            f"Measured on {images:,} images of {validation.data.num_classes:,} "
            f"{'' if inputs.held_out else 'classes, '}{what}."
        )
    if config.extra_dims and inputs.held_out:
        yield (
            "What is exported was fitted once more after these figures, to the held-out classes too."
        )
    if result.hub is None:
        yield "Nothing was exported: no weights keep the budget."


def budget_in_words(found: Mapping[str, Any] | None) -> Iterator[str]:
    """Say what of the alignment is kept, in sentences; `found` is `TrainResult.alignment`."""
    if found is None:
        return
    probe = found["probe"]
    yield (
        f"At most {100 * found['budget']:.3g} % of the untrained model's alignment of images and texts may be "
        f"lost. It was asked {probe['images']:,} images and {probe['captions']:,} texts "
        f"({probe['source']})."
    )
    if found["respected"]:
        yield (
            f"Kept: {found['kept']:.4f}, with a standard error of {found['standard_error']:.4f} "
            f"(images to texts {found['image_to_text']:.4f}, texts to images "
            f"{found['text_to_image']:.4f}). The weights are {100 * found['coefficient']:.0f} % of the way from "
            f"the untrained to the tuned ones, which keep {found['kept_tuned']:.4f}."
        )
    else:
        yield (
            f"No weights between the untrained and the tuned ones keep it; the tuned ones keep "
            f"{found['kept_tuned']:.4f}."
        )


def _charts(records: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The losses of each stage, the figures and the alignment, over the steps."""

    def drawn(title: str, curves: dict[str, list[tuple[float, float]]]) -> Iterator[dict[str, Any]]:
        curves = {name: curve for name, curve in curves.items() if len(curve) > 1}
        if curves:
            yield {"title": title, "drawing": chart(curves), "names": list(curves)}

    for stage in ("image", "text"):
        steps = [line for line in records if line.get("stage") == stage and "loss" in line]
        parts = {name: words for name, words in LOSS_WORDS.items() if any(name in s for s in steps)}
        names = {"loss": "loss", **(parts if len(parts) > 1 else {})}
        curves = {
            words: [
                (line["global_step"], line[name])
                for line in steps
                if np.isfinite(line.get(name, np.nan))
            ]
            for name, words in names.items()
        }
        yield from drawn(f"Loss on {stage}s", curves)
    for title, kind, known in (
        ("Figures, in percent", "evaluation", {name: metric_title(name) for name in FIGURES}),
        ("Share of the alignment that is kept", "alignment", DIRECTIONS),
    ):
        lines = [line for line in records if kind in line]
        yield from drawn(
            title,
            {
                words: [(line["global_step"], line[kind][n]) for line in lines if n in line[kind]]
                for n, words in known.items()
            },
        )


def _mined(
    folder: Path, inputs: Inputs, embedded: EmbeddingFolder, thumbnails: Thumbnails
) -> dict[str, Any] | None:
    """How many images have pseudo-captions, and the nearest and farthest of the pairs."""
    texts = inputs.captions
    if not folder.is_dir() or texts is None:
        return None
    table = CaptionTable.load(folder)
    counts = table.counts()
    images = Named(inputs.images, inputs.images.class_names)
    rows = embedded.rows("img")

    def pairs(cosines: Float32) -> list[dict[str, Any]]:
        """The lowest, each image and each caption once."""
        lowest = (
            np.argpartition(cosines, CANDIDATES)[:CANDIDATES] if len(cosines) > CANDIDATES else ...
        )
        order = np.arange(len(cosines))[lowest]
        order = order[np.argsort(cosines[order], kind="stable")]
        owners = np.searchsorted(table.indptr, order, side="right") - 1
        used: tuple[set[int], set[int]] = set(), set()
        found: list[dict[str, Any]] = []
        for pair, owner in zip(order.tolist(), owners.tolist(), strict=True):
            caption = int(table.ids[pair])
            if owner in used[0] or caption in used[1] or len(found) == PAIRS:
                continue
            used[0].add(owner)
            used[1].add(caption)
            found.append(
                {
                    "picture": picture_of(images, int(rows[owner]), thumbnails),
                    "cosine": float(table.cosines[pair]),
                    "caption": texts[caption],
                }
            )
        return found

    without = int((counts == 0).sum())
    return {
        "lines": [
            f"{len(table) - without:,} of {len(table):,} images have pseudo-captions, "
            f"{len(table.ids) / max(1, len(table) - without):.1f} each, of {table.num_captions:,} captions; "
            f"{len(np.unique(table.ids)):,} of these are used. Cosines go from "
            f"{table.cosines.min():.3f} to {table.cosines.max():.3f}. More in {folder.name}/sample.tsv."
        ],
        "pairs": [
            ("Nearest", pairs(-table.cosines)),
            ("Farthest that were taken", pairs(table.cosines)),
        ],
    }


def settings_rows(
    config: TrainSettings, reasons: Mapping[str, str]
) -> list[tuple[str, list[dict[str, str]]]]:
    """What was chosen or given, and why; then the defaults: each a title and rows of name, value, why."""
    changed, usual = [], []
    for item in fields(config):
        value = getattr(config, item.name)
        shown = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        row = {"name": item.name, "value": shown, "why": item.metadata.get("help", "")}
        default = item.default if item.default_factory is MISSING else item.default_factory()
        if item.name in reasons:
            changed.append({**row, "why": f"chosen: {reasons[item.name]}"})
        elif value != default:
            changed.append({**row, "why": f"given: {row['why']}"})
        else:
            usual.append(row)
    return [("Given, or chosen for this run", changed), ("Defaults", usual)]
