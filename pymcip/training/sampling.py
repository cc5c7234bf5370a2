"""Which images an epoch shows, in which order: a pure function of seed and epoch.

Nothing has to be remembered to resume in mid-epoch but the number of steps already taken.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


def random_generator(*key: int) -> np.random.Generator:
    """An independent generator per key, e.g. (seed, stage, epoch)."""
    return np.random.default_rng(np.random.SeedSequence(list(key)))


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
    sources = np.unique(source_ids)
    if source_weights is None:
        shares = {source: float((source_ids == source).mean()) for source in sources}
    else:
        total = sum(source_weights[source] for source in sources)
        shares = {source: source_weights[source] / total for source in sources}
    groups: list[Indices] = []
    probabilities: list[float] = []
    for source in sources:
        rows = np.flatnonzero(source_ids == source)
        if not class_balanced:
            groups.append(rows)
            probabilities.append(shares[source])
            continue
        rows = rows[np.argsort(labels[rows], kind="stable")]
        parts = np.split(rows, np.flatnonzero(np.diff(labels[rows])) + 1)
        groups += parts
        probabilities += [shares[source] / len(parts)] * len(parts)
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
