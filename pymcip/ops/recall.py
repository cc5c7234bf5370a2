"""Recall of an approximate search: measured on samples of the queries, and reached by more effort."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pymcip.ops.arrays import Array

_log = logging.getLogger("pymcip.ops.recall")


@dataclass(frozen=True)
class ApproximateResult:
    """What a search found, and how much of the exact answer that is.

    Attributes:
        ids: int64 [N, k], by score descending, then id ascending; -1 where there is none.
        scores: float32 [N, k], canonical; -inf where there is none.
        recall, recall_error, recall_interval: see `pymcip.ops.recall`; NaN, NaN and (0, 1) if no
            query was sampled.
        recall_queries: how many queries were sampled.
        nprobe: lists searched per query.
        candidates: rows per query that were scored exactly, at most.
    """

    ids: Array
    scores: Array
    recall: float
    recall_error: float
    recall_interval: tuple[float, float]
    recall_queries: int
    nprobe: int
    candidates: int


def estimate_recall(
    hits: np.ndarray, due: np.ndarray, population: int
) -> tuple[float, float, tuple[float, float]]:
    """Recall, its standard error and its 95 % interval, from a sample of `population` queries.

    A ratio of two means, over queries drawn without replacement; its variance by linearisation
    (Cochran, Sampling Techniques, section 6.4). The interval is Wilson's for as many trials as would
    have this standard error; where it is 0 (all or nothing found) each query counts as one trial.

    Args:
        hits: integers [n], how many rows of each query's exact answer were found.
        due: integers [n], how many rows that answer has.
        population: of how many queries these are a random sample.

    Returns:
        NaN, NaN and (0, 1) where nothing is due.
    """
    count = len(hits)
    if not due.sum():
        return math.nan, math.nan, (0.0, 1.0)
    share = float(hits.sum() / due.sum())
    if count == population:  # no sampling error
        return share, 0.0, (share, share)
    variance, trials = 0.0, float((due > 0).sum())
    if count > 1:
        residuals = hits - share * due
        variance = float((residuals**2).sum()) / (count * (count - 1) * float(due.mean()) ** 2)
        variance *= 1 - count / population
    if variance > 0 and 0 < share < 1:
        trials = min(share * (1 - share) / variance, float(due.sum()))
    ratio = 1.959964**2 / trials
    centre = (share + ratio / 2) / (1 + ratio)
    half = math.sqrt(ratio * share * (1 - share) + ratio**2 / 4) / (1 + ratio)
    # 0 and 1 are exactly so by the formula, and to a rounding by its evaluation.
    low = max(0.0, centre - half) if share > 0 else 0.0
    return share, math.sqrt(variance), (low, min(1.0, centre + half) if share < 1 else 1.0)


def recall_of(
    found: np.ndarray, due: np.ndarray, population: int
) -> tuple[float, float, tuple[float, float]]:
    """`estimate_recall` from the ids of approximate and exact answers, int64 [n, k], -1 for none."""
    hits = [np.isin(wanted[wanted >= 0], own).sum() for wanted, own in zip(due, found, strict=True)]
    return estimate_recall(np.array(hits, np.int64), (due >= 0).sum(axis=1), population)


def split_sample(count: int, sample: int, tuning: bool, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw queries to measure the recall on and, if `tuning`, others to choose the effort by.

    Returns:
        Two ascending arrays of at most `sample` of the numbers 0, …, count - 1 each. Where there
        are too few queries for both, each gets a half of all; a single query is in both.
    """
    order = np.random.default_rng(seed).permutation(count)
    measured, tuned = order[:sample], order[sample : 2 * sample] if tuning else order[:0]
    # Queries that the effort was chosen by would seem to have a higher recall than others.
    if tuning and len(tuned) < min(sample, 32):
        tuned, measured = order[::2], order[1::2] if count > 1 else order
    return np.sort(measured), np.sort(tuned)


def least_reaching(measure: Callable[[int], float], most: int, target: float) -> tuple[int, float]:
    """Find the least effort of 1, …, most, within an eighth, whose recall reaches a target.

    Args:
        measure: the recall at an effort; it rises with it.
        most: the largest effort.
        target: recall to reach.

    Returns:
        The effort and its recall; `most` if none reaches the target, and 1 and NaN if the recall
        is NaN.
    """
    below, effort = 0, 1
    while not (share := measure(effort)) >= target:
        if math.isnan(share) or effort == most:
            return effort, share
        below, effort = effort, min(2 * effort, most)
    while effort - below > max(1, effort // 8):
        middle = (below + effort) // 2
        if (found := measure(middle)) >= target:
            effort, share = middle, found
        else:
            below = middle
    return effort, share


def choose_effort(measure: Callable[[int], float], most: int, target: float) -> int:
    """The effort that `least_reaching` finds; a 16th of the most where there is nothing to find."""
    effort, reached = least_reaching(measure, most, target)
    if math.isnan(reached):
        return max(1, most // 16)
    if reached < target:
        _log.warning(
            "a recall of %.3f was asked for; the most that is found is %.3f", target, reached
        )
    return effort
