"""Mixtures of images, and other views of one."""

from __future__ import annotations

import numpy as np
import torch

from pymcip.training.mixtures import mixtures, other_views

GREY = {"mean": (0.48, 0.46, 0.41), "std": (0.27, 0.26, 0.28)}


def normalised(images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(GREY[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    return (images - mean) / std


def shown(pixels: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(GREY[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    return pixels * std + mean


def test_mixtures_depend_on_the_generator_alone() -> None:
    pixels = normalised(torch.rand(5, 3, 20, 24, generator=torch.Generator().manual_seed(0)))
    before = pixels.clone()
    state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    one = mixtures(pixels, 9, np.random.default_rng(3), **GREY)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert np.array_equal(np.random.get_state()[1], state[1])  # noqa: NPY002
    assert torch.equal(pixels, before)
    assert one.shape == (9, 3, 20, 24)
    assert torch.equal(one, mixtures(pixels, 9, np.random.default_rng(3), **GREY))
    assert not torch.equal(one, mixtures(pixels, 9, np.random.default_rng(4), **GREY))
    assert shown(one).min() >= -1e-6
    assert shown(one).max() <= 1 + 1e-6
    assert mixtures(pixels, 0, np.random.default_rng(3), **GREY).shape == (0, 3, 20, 24)


def test_rectangles_are_pasted_and_colours_changed() -> None:
    """Of plain mid-grey images only the brightness can change: what differs in it was pasted."""
    pixels = normalised(torch.full((2, 3, 40, 40), 0.5))
    made = shown(mixtures(pixels, 600, np.random.default_rng(0), **GREY))
    corner = made[:, :, :1, :1]
    inner = ((made - corner).abs() > 1e-4).all(1)
    areas = inner.float().mean((1, 2))
    areas = torch.minimum(areas, 1 - areas)  # the corner itself may lie in the rectangle
    pasted = areas > 0
    # 4 of 10 are pasted; of those, both parts keep their colours (0.4 * 0.4) and look the same
    assert abs(float(pasted.float().mean()) - 0.4 * (1 - 0.16)) < 0.05
    assert areas[pasted].min() >= 0.29**2
    assert areas[pasted].max() <= 0.5
    grey = (made[:, 0, 0, 0] - 0.5).abs() < 1e-4
    assert 0.15 < float(grey.float().mean()) < 0.4


def test_other_views_show_the_same() -> None:
    """A plain image stays plain, of a left half and a right half both are seen, all drawn anew."""
    plain = torch.full((200, 3, 20, 30), 0.5)
    made = other_views(plain, np.random.default_rng(0))
    assert made.shape == plain.shape
    assert (made - made[:, :1, :1, :1]).abs().max() < 1e-6
    values = made[:, 0, 0, 0]
    assert len(values.unique()) == 200
    # 0.5 * uniform(0.8, 1.2) + normal(0, 0.15): mean 0.5, deviation 0.161; four standard errors
    assert abs(float(values.mean()) - 0.5) < 4 * 0.161 / 200**0.5
    assert abs(float(values.std()) - 0.161) < 4 * 0.161 / 400**0.5
    halves = torch.zeros(200, 3, 20, 30)
    halves[..., 15:] = 1.0
    made = other_views(halves, np.random.default_rng(1))
    left, right = made[..., 0].mean((1, 2)), made[..., -1].mean((1, 2))
    flipped = (left > right).float().mean()
    assert (left - right).abs().min() > 0.79  # contrast of 0.8 at least
    assert abs(float(flipped) - 0.5) < 4 * 0.5 / 200**0.5
    assert torch.equal(made, other_views(halves, np.random.default_rng(1)))
