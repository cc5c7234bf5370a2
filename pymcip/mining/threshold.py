"""The automatic threshold: from which cosine on a caption is taken to describe an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pymcip.embedding import Matrix
from pymcip.mining.table import Float32
from pymcip.ops.arrays import MatrixParts

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
    are used because some random pairs do match, and must not raise the bar.

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
