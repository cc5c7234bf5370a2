"""Pseudo-captions replaced by random ones, to study how many of them have to be right."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np

from pymcip.errors import DataError
from pymcip.mining import CaptionTable
from pymcip.training.sampling import Stream, random_generator

_log = logging.getLogger("pymcip.training")


def noisy_captions(table: CaptionTable, share: float, seed: int) -> CaptionTable:
    """Replace a share of the pairs' captions by random ones of the corpus.

    round(share * nnz) pairs of the nnz are drawn uniformly. Each gets a caption that is drawn
    uniformly from those that were not mined for its image and that no other pair of the image gets.
    Both draws depend on the seed and not on the share, so that the pairs replaced at one share are,
    with their new captions, among those replaced at a larger one. The cosine of a replaced pair is
    NaN; an image keeps its number of captions. A share of 0 returns `table` itself.

    Raises:
        DataError: an image has more than half of the corpus, which leaves too few others.
    """
    if share == 0:
        return table
    counts = table.counts()
    largest = int(counts.max(initial=0))
    if 2 * largest > table.num_captions:
        raise DataError(
            f"caption_noise={share} needs as many other captions as an image has pseudo-captions, "
            f"but one has {largest} of the corpus' {table.num_captions}; give a larger corpus, a "
            "higher threshold, or a smaller k"
        )
    generator = random_generator(seed, Stream.CAPTION_NOISE)
    pairs = len(table.ids)
    replaced = generator.permutation(pairs)[: round(share * pairs)]
    drawn = np.empty_like(table.ids)
    for image in range(len(table)):
        own = np.sort(table[image][0])
        others = generator.choice(table.num_captions - len(own), len(own), replace=False)
        # The n-th caption that is not an own one: own captions below it push it up one by one.
        pushed = np.searchsorted(own - np.arange(len(own)), others, side="right")
        drawn[table.indptr[image] : table.indptr[image + 1]] = others + pushed
    ids, cosines = table.ids.copy(), table.cosines.copy()
    ids[replaced], cosines[replaced] = drawn[replaced], np.nan
    _log.info("caption_noise: %d of %d pseudo-captions replaced at random", len(replaced), pairs)
    return replace(table, ids=ids, cosines=cosines)
