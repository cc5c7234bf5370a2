"""What a model finds, to look at beside its figures: the images nearest to some queries, the classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pymcip.benchmarks.contract import Labelled
from pymcip.benchmarks.embedder import CachedEmbedder
from pymcip.data import ImageData
from pymcip.metrics.inputs import Int64
from pymcip.ops import topk

QUERIES, TEXTS, NEAREST = 12, 4, 5


@dataclass(frozen=True)
class Ranking:
    """A query, a row of the data or a text, with the rows nearest to it and which of them are right."""

    query: int | str
    rows: list[int]
    hits: list[bool]


@dataclass(frozen=True)
class Examples:
    """Queries drawn without looking at the model, so that two models have the same.

    Attributes:
        pictures: each with the nearest other pictures; right are those of its class.
        texts: captions, of which the own picture is right, or else names of the pictures' classes.
        classes: of each class its number, its pictures and their mean AP in percent.
    """

    pictures: list[Ranking]
    texts: list[Ranking]
    classes: list[tuple[int, int, float]]

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Examples:
        """Make them from what `asdict` returns, also after it was written as JSON."""
        pictures, texts = (
            [Ranking(**ranking) for ranking in values[name]] for name in ("pictures", "texts")
        )
        return cls(pictures, texts, [tuple(one) for one in values["classes"]])


def drawn_queries(labels: Int64) -> Int64:
    """Draw query rows from as many classes as possible, each with two images or more."""
    order = np.random.default_rng(0).permutation(len(labels))
    alone = np.bincount(labels)[labels[order]] < 2
    order = order[~alone]
    _, firsts = np.unique(labels[order], return_index=True)
    others = np.delete(order, firsts)
    return np.concatenate([order[np.sort(firsts)], others])[:QUERIES]


def by_pictures(classes: Labelled, chosen: Int64, embed: CachedEmbedder) -> list[Ranking]:
    """Search by some pictures of `classes` (its rows `chosen`) among its others."""
    vectors = embed.images(classes.images, classes.rows)
    queries = embed.queries(classes.images, classes.rows)[chosen]
    found = topk(queries, vectors, min(NEAREST + 1, len(vectors)))[0].cpu().numpy()
    others = [row[row != own][:NEAREST] for row, own in zip(found, chosen, strict=True)]
    return [
        _ranking(int(_rows(classes)[own]), row, classes, classes.labels[row] == classes.labels[own])
        for row, own in zip(others, chosen, strict=True)
    ]


def by_names(classes: Labelled, chosen: Int64, embed: CachedEmbedder) -> list[Ranking]:
    """Search by the names of some pictures' classes, in its templates."""
    asked = list(dict.fromkeys(classes.labels[chosen].tolist()))[:TEXTS]
    queries = embed.classifier(classes.names, classes.templates)[asked]
    found = _nearest(queries, embed.images(classes.images, classes.rows))
    return [
        _ranking(classes.names[label], row, classes, classes.labels[row] == label)
        for label, row in zip(asked, found, strict=True)
    ]


def by_captions(
    images: ImageData, rows: Int64, texts: Sequence[str], owners: Int64, embed: CachedEmbedder
) -> list[Ranking]:
    """Search by a few of `texts`, each a caption of the picture `rows[owner]`, among these pictures."""
    chosen = np.random.default_rng(0).permutation(len(texts))[:TEXTS]
    found = _nearest(embed.texts(texts)[chosen.tolist()], embed.images(images, rows))
    return [
        Ranking(texts[text], rows[row].tolist(), (row == owners[text]).tolist())
        for text, row in zip(chosen, found, strict=True)
    ]


def _nearest(queries: Tensor, vectors: Tensor) -> np.ndarray:
    with torch.inference_mode():
        return topk(queries, vectors, min(NEAREST, len(vectors)))[0].cpu().numpy()


def _rows(classes: Labelled) -> Int64:
    return np.arange(len(classes.labels)) if classes.rows is None else classes.rows


def _ranking(query: int | str, found: Int64, classes: Labelled, hits: np.ndarray) -> Ranking:
    return Ranking(query, _rows(classes)[found].tolist(), hits.tolist())
