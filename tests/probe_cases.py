"""Texts, images and models for the tests of the alignment probe, and its definition of accuracy."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import torch

from pymcip.model import ClipModel

THINGS = ["red square", "green square", "dog", "city at night", "wooden box", "tree", "cup", "car"]
TEXTS = [f"a photo of a {thing}, number {number}" for number in range(16) for thing in THINGS]


def perturbed(clip: ClipModel, amount: float, seed: int = 0) -> ClipModel:
    """The same model, its weights moved by `amount` of their own spread."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in clip.model.named_parameters():
            if name != "logit_scale":
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += amount * parameter.std(correction=0) * noise
    return clip


def random_pixels(count: int, size: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(7))


@functools.cache
def subsets(count: int, size: int) -> np.ndarray:
    """Every set of `size` of the numbers below `count`: int64 [sets, size]."""
    sets = list(itertools.combinations(range(count), size))
    return np.array(sets, dtype=np.int64).reshape(len(sets), size)


def drawn_accuracy(similarities: np.ndarray, right: np.ndarray, candidates: int) -> float:
    """The definition in fp64, all sets of candidates tried one by one."""
    shares = []
    for row, own in zip(similarities.astype(np.float64), right, strict=True):
        wrong = row[~own]
        others = wrong[subsets(len(wrong), min(candidates - 1, len(wrong)))]
        wins = [(one > others).all(axis=1) for one in row[own]]
        if wins:
            shares.append(np.mean(wins))
    return float(np.mean(shares))
