"""Approximate search in an index of many images: how it is prepared, and how much it finds."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pymcip.embedding import EmbeddingFolder
from pymcip.model import ClipModel
from pymcip.ops import ApproximateIndex
from pymcip.ops.approximate import LEAST_ROWS
from pymcip.ops.arrays import MatrixParts

FOLDER = "approximate"  # in the embedding folder
QUERIES, RESULTS = 512, 12  # by which effort and recall are found, a half of the queries for each
RERANK = 120  # as for `ApproximateIndex.search`: for one query more of them cost little

_log = logging.getLogger("pymcip.search")


def prepare_approximate(
    folder: EmbeddingFolder, clip: ClipModel, recall: float
) -> dict[str, Any] | None:
    """Build the approximate index of an embedding folder if it is not there, and choose its effort.

    The effort is the smallest that finds `recall` of the exact 12 best results of pictures (a sample of
    the folder's own) and of texts (of its captions, else of its labels).

    Args:
        folder: the embeddings.
        clip: their model.
        recall: above 0, below 1.

    Returns:
        `nprobe`, the effort, and `recall`, measured on other queries, by "pictures" and "texts"; None
        where the folder has fewer images than such an index takes, and is searched exactly.

    Raises:
        MissingDependencyError: faiss is not installed.
        DataError: the index that is there is damaged.
    """
    parts = folder.parts("img")
    rows = MatrixParts(parts)
    if len(rows) < LEAST_ROWS:
        _log.info("%d images are searched exactly; approximate search takes %d", len(rows), LEAST_ROWS)  # fmt: skip
        return None
    path = folder.path / FOLDER
    if path.is_dir():
        index = ApproximateIndex.load(path)
    else:
        _log.info("building an approximate index of %d images", len(rows))
        index = ApproximateIndex.build(parts)
        index.save(path)
    drawing = np.random.default_rng(0)
    chosen = drawing.choice(len(rows), min(QUERIES, len(rows)), replace=False)
    queries = {"pictures": rows[chosen].astype(np.float32)}
    if texts := _texts(folder):
        taken = drawing.choice(len(texts), min(QUERIES, len(texts)), replace=False)
        queries["texts"] = clip.encode_texts([texts[i] for i in taken]).numpy()
    else:
        _log.warning("there are no captions and no labels, so the recall of texts is not measured")
    half = {kind: max(1, len(vectors) // 2) for kind, vectors in queries.items()}
    nprobe = max(
        index.search(
            vectors[: half[kind]], parts, RESULTS, recall=recall, rerank=RERANK, sample=half[kind]
        ).nprobe
        for kind, vectors in queries.items()
    )
    found: dict[str, Any] = {"nprobe": nprobe, "recall": {}}
    for kind, vectors in queries.items():
        asked = vectors[half[kind] :] if len(vectors) > 1 else vectors
        result = index.search(
            asked, parts, RESULTS, nprobe=nprobe, rerank=RERANK, sample=len(asked)
        )
        found["recall"][kind] = round(float(result.recall), 4)
        _log.info(
            "%s: %.1f %% of the exact %d best results are found; %.1f %% were asked for",
            kind, 100 * result.recall, RESULTS, 100 * recall,
        )  # fmt: skip
    return found


def nearest(
    index: ApproximateIndex,
    query: npt.NDArray[np.float32],
    parts: Sequence[Any],
    k: int,
    nprobe: int,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Rows int64 and scores float32 of k near rows of one query [D], best first.

    Where `nprobe` lists hold fewer than k rows, more are searched.
    """
    while True:
        found = index.search(query[None], parts, k, nprobe=nprobe, rerank=RERANK, sample=0)
        there = found.ids[0] >= 0
        if there.sum() == min(k, index.rows) or nprobe == index.lists:
            return found.ids[0][there], found.scores[0][there]
        nprobe = min(2 * nprobe, index.lists)


def _texts(folder: EmbeddingFolder) -> list[str]:
    """The distinct captions of a folder's images, or labels where there are none."""
    metadata = folder.metadata("img")
    for column in ("caption", "label"):
        texts = sorted(metadata[column].drop_null().unique().to_pylist())
        if len(texts) > 1:
            return texts
    return []
