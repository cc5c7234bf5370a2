"""How each kind of benchmark is measured: from a data set and its embeddings to percentages.

Every function has the form that `Benchmark.measure` asks for, and returns the benchmark's own figure
first. `pymcip.metrics` defines the metrics.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pymcip import metrics
from pymcip.benchmarks.contract import Captioned, Data, Labelled, QuerySet, SuiteOptions
from pymcip.benchmarks.embedder import CachedEmbedder

Scores = dict[str, float]

# GPR1200 joins six sources of 200 classes with 10 images each, in this order (MMM 2022).
GPR1200_PARTS = ("landmarks", "inaturalist", "sketch", "instre", "sop", "faces")
GPR1200_PART_SIZE = 2_000


def full_ranking(data: Data, embed: CachedEmbedder, options: SuiteOptions) -> Scores:
    """Measure mAP over the full ranking of all images, each a query that counts itself."""
    assert isinstance(data, Labelled)
    vectors = embed.images(data.images, data.rows)
    queries = embed.queries(data.images, data.rows)
    return {"map": metrics.full_ranking_map(vectors, data.labels, queries=queries)}


def gpr1200(data: Data, embed: CachedEmbedder, options: SuiteOptions) -> Scores:
    """Measure mAP over the full ranking, the query included, and its mean over each source."""
    assert isinstance(data, Labelled)
    precisions = metrics.full_ranking_ap(
        embed.images(data.images, data.rows),
        data.labels,
        queries=embed.queries(data.images, data.rows),
    )
    scores = {"map": float(np.mean(precisions))}
    if len(precisions) == len(GPR1200_PARTS) * GPR1200_PART_SIZE:
        parts = np.asarray(precisions).reshape(len(GPR1200_PARTS), -1).mean(axis=1)
        scores |= dict(zip(GPR1200_PARTS, map(float, parts), strict=True))
    return scores


def instre(data: Data, embed: CachedEmbedder, options: SuiteOptions) -> Scores:
    """Measure trapezoidal mAP of the queries, or with `instre="all"` the full ranking of all."""
    if isinstance(data, Labelled):
        return full_ranking(data, embed, options)
    assert isinstance(data, QuerySet)
    found = metrics.trapezoidal_retrieval(
        embed.queries(data.queries), embed.images(data.images), [each["ok"] for each in data.truth]
    )
    return {"map": found}


def revisited(data: Data, embed: CachedEmbedder, options: SuiteOptions) -> Scores:
    """Measure mAP and mP@k of revisitop, easy, medium and hard."""
    assert isinstance(data, QuerySet)
    found = metrics.revisited_retrieval(
        embed.queries(data.queries), embed.images(data.images), list(data.truth)
    )
    figure = f"{options.revisited_difficulty}_map"
    return {figure: found[figure], **found}


def nearest_other(data: Data, embed: CachedEmbedder, options: SuiteOptions) -> Scores:
    """Measure R@1, 2, 4 and 8, all against all."""
    assert isinstance(data, Labelled)
    vectors = embed.images(data.images, data.rows)
    queries = embed.queries(data.images, data.rows)
    found = metrics.recall_at_k(
        vectors, data.labels, ks=(1, 2, 4, 8), queries=queries, leave_one_out=True
    )
    return {f"r{k}": value for k, value in found.items()}


def knn(data: Data, embed: CachedEmbedder, options: SuiteOptions) -> Scores:
    """Measure the accuracy of k-NN: the data set's voters vote, or else its other images."""
    assert isinstance(data, Labelled)
    queries = embed.queries(data.images, data.rows)
    voters = data.voters or data
    answers = metrics.knn_classify(
        embed.images(voters.images, voters.rows),
        voters.labels,
        queries,
        options.knn_k,
        options.knn_vote,
        temperature=options.knn_temperature,
        leave_one_out=data.voters is None,
        own_rows=data.own_voters,
    )
    return {"top1": 100 * float(np.mean(answers == data.labels))}


def zero_shot(data: Data, embed: CachedEmbedder, options: SuiteOptions) -> Scores:
    """Measure top-1 and top-5 accuracy among the candidates' prompt ensembles."""
    assert isinstance(data, Labelled)
    classifier, labels = embed.classifier(data.names, data.templates), data.labels
    if data.candidates is not None:
        candidates = np.asarray(data.candidates)
        classifier = classifier[candidates.tolist()]
        row_of = np.full(len(data.names), -1)
        row_of[candidates] = np.arange(len(candidates))
        labels = row_of[labels]
    found = metrics.zero_shot_accuracy(embed.images(data.images, data.rows), classifier, labels)
    return {"top1": found[1], "top5": found[5]}


def descriptions(data: Data, embed: CachedEmbedder, options: SuiteOptions) -> Scores:
    """Measure mAP of the images for each class's description, which are the data set's names."""
    assert isinstance(data, Labelled)
    images = embed.images(data.images, data.rows)
    return {"map": metrics.class_text_map(images, data.labels, embed.texts(data.names))}


def text_to_image(data: Data, embed: CachedEmbedder, options: SuiteOptions) -> Scores:
    """Measure T2I and I2T R@1, 5 and 10; the figure is T2I R@5."""
    found = cross_modal(data, embed, (1, 5, 10))
    return {"t2i_r5": found["t2i_r5"], **found}


def cross_modal(data: Data, embed: CachedEmbedder, ks: Sequence[int]) -> Scores:
    """Measure T2I and I2T R@k of a captioned data set."""
    assert isinstance(data, Captioned)
    images = embed.images(data.images, data.rows)
    return metrics.cross_modal_recall(images, embed.texts(data.captions), data.owners, ks)
