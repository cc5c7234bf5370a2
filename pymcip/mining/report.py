"""What mining reports: counts and cosines, a sample to look at, and why nothing was found."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from pymcip.embedding import EmbeddingFolder, Kind
from pymcip.mining.search import exact_search
from pymcip.mining.table import CaptionTable, Int64
from pymcip.mining.threshold import SAMPLE_ROWS, AutoThreshold, sample_rows
from pymcip.ops.arrays import MatrixParts

SAMPLED_IMAGES = 50  # in sample.tsv
HISTOGRAM_WIDTH = 0.01  # of a bin of the cosine histogram


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
    _, cosines = exact_search(captions, 1, None, backend=backend)(sampled, lambda *_: None)
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
