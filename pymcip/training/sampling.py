"""What is drawn at random in a run: generators by purpose, and the order of an epoch's images.

Everything drawn is a pure function of the seed, the purpose and the place in the run (epoch, step),
so that a run resumed in mid-epoch needs to know nothing but the number of steps already taken.
"""

from __future__ import annotations

import random
from enum import Enum

import numpy as np
import torch
from numpy.typing import NDArray

Indices = NDArray[np.int64]


class Stream(Enum):
    """The purposes that random numbers are drawn for, each with generators of its own.

    The values are part of what a seed means: another value changes every run's results.
    """

    IMAGE_ORDER = (1,)
    TEXT_ORDER = (2,)
    NEGATIVES = (3,)
    CAPTION_NOISE = (4,)
    PROBE_CAPTIONS = (5, 0)
    PROBE_IMAGES = (5, 1)
    PROBE_MIXTURES = (5, 2)
    PROBE_TEXT_TASKS = (5, 3)
    PROBE_IMAGE_TASKS = (5, 4)
    PROBE_VIEWS = (5, 5)
    DISTILLED_CAPTIONS = (7,)
    DISTILLED_MIXTURES = (8,)
    GENERIC_IMAGES = (9,)
    APPENDED_GATE = (10, 1)
    HELD_OUT = (11,)
    IMAGE_DROPOUT = (12, 0)
    TEXT_DROPOUT = (12, 1)


def random_generator(seed: int, stream: Stream, *place: int) -> np.random.Generator:
    """A generator that depends on seed, purpose and place (such as epoch and step) alone."""
    return np.random.default_rng(np.random.SeedSequence([seed, *stream.value, *place]))


def seed_micro_batch(seed: int, stream: Stream, epoch: int, step: int, micro_batch: int) -> None:
    """Seed every generator that a tower may draw from (dropout), by the place in the run alone."""
    drawn = random_generator(seed, stream, epoch, step, micro_batch).integers(1 << 63, size=3)
    torch.manual_seed(int(drawn[0]))
    np.random.seed(int(drawn[1]) % 2**32)  # noqa: NPY002
    random.seed(int(drawn[2]))


def epoch_order(
    labels: Indices,
    source_ids: Indices,
    *,
    generator: np.random.Generator,
    class_balanced: bool = False,
    source_weights: tuple[float, ...] | None = None,
) -> Indices:
    """Row numbers [N] of one epoch over N images with `labels` and `source_ids` (int64 [N]).

    Plain: a permutation. With `source_weights`, sources get their weight's share of the N draws; with
    `class_balanced`, the classes of a source share its draws equally. Within a group images are
    drawn without repetition until all have been drawn, then again.
    """
    n = len(labels)
    if not class_balanced and source_weights is None:
        return generator.permutation(n)
    sources, sizes = np.unique(source_ids, return_counts=True)
    weights = sizes if source_weights is None else [source_weights[source] for source in sources]
    total = sum(weights)
    groups: list[Indices] = []
    probabilities: list[float] = []
    for source, weight in zip(sources, weights, strict=True):
        parts = [np.flatnonzero(source_ids == source)]
        if class_balanced:
            rows = parts[0][np.argsort(labels[parts[0]], kind="stable")]
            parts = np.split(rows, np.flatnonzero(np.diff(labels[rows])) + 1)
        groups += parts
        probabilities += [weight / total / len(parts)] * len(parts)
    counts = _whole_numbers(np.array(probabilities) * n, generator)
    drawn = [_draw(group, count, generator) for group, count in zip(groups, counts, strict=True)]
    return generator.permutation(np.concatenate(drawn))


def _whole_numbers(expected: NDArray[np.float64], generator: np.random.Generator) -> Indices:
    """Whole numbers that sum to round(sum(expected)), each within 1 of its expectation."""
    edges = np.concatenate([[0.0], np.cumsum(expected)])
    edges[-1] = round(edges[-1])
    offset = generator.random()
    marks = np.floor(edges + offset)
    marks[0], marks[-1] = 0, edges[-1]
    return np.maximum(np.diff(marks), 0).astype(np.int64)


def _draw(group: Indices, count: int, generator: np.random.Generator) -> Indices:
    rounds = -(-int(count) // len(group))
    draws = [generator.permutation(group) for _ in range(rounds)]
    return np.concatenate([*draws, group[:0]])[:count]
