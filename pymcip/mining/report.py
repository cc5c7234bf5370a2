"""What mining reports: the automatic threshold, counts and cosines, why nothing was found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pymcip.embedding import EmbeddingFolder, Kind, Matrix
from pymcip.markdown import markdown_table
from pymcip.mining.search import exact_search
from pymcip.mining.table import CaptionTable, Float32, Int64
from pymcip.ops.arrays import MatrixParts

SAMPLED_IMAGES = 50  # in sample.tsv
HISTOGRAM_WIDTH = 0.01  # of a bin of the cosine histogram
SPREADS = 3.5  # the threshold lies this many spreads above the median, see `auto_threshold`
SAMPLE_ROWS = 1024  # images and captions that stand for all in the distribution of random pairs


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


def auto_threshold(
    image_parts: Sequence[Matrix], caption_parts: Sequence[Matrix], *, seed: int = 0
) -> AutoThreshold:
    """Derive a threshold from the model's own cosines between images and random captions.

    A caption is taken for a description of an image if its cosine stands out from those of
    captions that have nothing to do with the image: by SPREADS = 3.5 spreads above the median of
    random pairs (up to 1024 images x 1024 captions). Median and spread (median absolute deviation)
    are used because some random pairs do match, and must not raise the threshold.

    Why 3.5: with the random pairs usually reported of OpenAI's CLIP (around 0.15, deviation 0.03 to
    0.035) it gives 0.255 to 0.27, near the paper's 0.27; that was not measured here on OpenAI's
    weights. On the demo's base model, whose cosines spread far wider (0.16), it leaves three of
    four images a caption; 4 leaves one in a hundred. In a normal distribution 2 of 10,000 random
    pairs lie above.

    Args:
        image_parts: float16 or float32 [n, D] each, unit rows.
        caption_parts: likewise [m, D].
        seed: of the sample.
    """
    generator = np.random.default_rng(seed)
    images = sample_rows(MatrixParts(image_parts), SAMPLE_ROWS, generator)
    captions = sample_rows(MatrixParts(caption_parts), SAMPLE_ROWS, generator)
    cosines = (images @ captions.T).ravel()
    median = float(np.median(cosines))
    spread = 1.4826 * float(np.median(np.abs(cosines - median)))
    value = min(1.0, median + SPREADS * spread)
    above = float((cosines >= value).mean())
    mean, deviation = float(cosines.mean()), float(cosines.std())
    return AutoThreshold(value, median, spread, mean, deviation, above, len(cosines))


def sample_rows(matrix: MatrixParts, count: int, generator: np.random.Generator) -> Float32:
    """Draw rows without replacement (all, if there are fewer): float32 [count, D], in row order."""
    chosen = np.sort(generator.choice(len(matrix), min(count, len(matrix)), replace=False))
    return matrix[chosen].astype(np.float32)


def describe_table(
    table: CaptionTable, k: int, threshold: float, random_pairs: AutoThreshold, *, given: bool
) -> dict[str, Any]:
    """The report of `mine_table`, but for `recall` and `approximate`, as plain values."""
    first = int(np.floor(float(table.cosines.min()) / HISTOGRAM_WIDTH))
    bins = np.floor(table.cosines.astype(np.float64) / HISTOGRAM_WIDTH).astype(np.int64) - first
    counts = np.bincount(bins)
    edges = [round((first + number) * HISTOGRAM_WIDTH, 2) for number in range(len(counts) + 1)]
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
                {"from": edges[number], "to": edges[number + 1], "count": int(count)}
                for number, count in enumerate(counts)
            ],
        },
    }


def report_table(report: dict[str, Any]) -> str:
    """The main figures of a report as a markdown table."""
    images, without = report["images"], report["images_by_captions"][0]
    pairs, cosines = report["pairs"], report["cosines"]
    rows = [
        ["images", f"{images:,}"],
        ["images with captions", f"{images - without:,} ({1 - without / images:.0%})"],
        ["captions of each of these, mean", f"{pairs / max(1, images - without):.1f}"],
        ["captions of the corpus", f"{report['captions']:,}"],
        ["captions that an image has", f"{report['captions_used']:,}"],
        ["lowest cosine allowed", f"{report['threshold']:.3f} ({report['threshold_from']})"],
        ["cosines found", f"{cosines['lowest']:.3f} to {cosines['highest']:.3f}"],
        ["cosine of random pairs, median", f"{report['random_pairs']['median']:.3f}"],
    ]
    if report["recall"] is not None and report["recall"] < 1:
        rows.append(["share of the pairs that was found", f"{report['recall']:.3f}"])
    return markdown_table(["mining", ""], "lr", rows)


def sample_lines(
    table: CaptionTable, images: EmbeddingFolder, captions: EmbeddingFolder, seed: int
) -> str:
    """TSV text of image, label, cosine, caption: some images, those without captions included."""
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


def explain_nothing(
    images: MatrixParts,
    captions: MatrixParts,
    threshold: float,
    random_pairs: AutoThreshold,
    backend: str,
) -> str:
    """The error message if no caption reaches the threshold, with the best cosine of a sample."""
    sampled = sample_rows(images, SAMPLE_ROWS, np.random.default_rng(0))
    _, cosines = exact_search(captions, 1, None, backend=backend)(
        sampled, (0, len(captions)), lambda *_: None
    )
    best = float(cosines.max())
    advice = f"give threshold='auto' ({random_pairs.value:.3f} here)"
    if best < random_pairs.value:
        advice = (
            f"threshold='auto' would be {random_pairs.value:.3f} here, so the captions don't fit "
            "the images: give a lower threshold, or another corpus"
        )
    return (
        f"no caption of any image has a cosine of {threshold:.3f} or more; the best among "
        f"{len(sampled)} images is {best:.3f}. Cosines differ between models (the paper's 0.27 is "
        f"for OpenAI's CLIP); {advice}"
    )


def _described(folder: EmbeddingFolder, kind: Kind, rows: Int64) -> list[dict[str, Any]]:
    """Metadata of some rows; their numbers, where the folder has no names or texts."""
    column = "image_path" if kind == "img" else "caption"
    known = folder.describe(kind, rows) if folder.has_metadata(kind) else []
    if known and column in known[0]:
        return known
    return [{column: str(row)} for row in rows]
