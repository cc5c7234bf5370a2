"""Mixtures of images, which stand in for images of other domains, and other views of one image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from pymcip.training.sampling import Indices

SIDE = (0.25, 0.8)  # of a crop, as a share of the image's
RECTANGLE = (0.3, 0.7)  # of what is pasted
WEIGHT = (0.3, 0.7)  # of the first image in a blend
FLIPPED, RECOLOURED, INVERTED = 0.5, 0.6, 0.1  # how often
BLENDED, PASTED = 0.4, 0.4
VIEW = (0.7, 0.95)  # of the crop of another view, as a share of the image's side
CONTRAST, BRIGHTNESS = (0.8, 1.2), 0.15  # of another view: a factor, and a shift's deviation


def mixtures(
    pixels: Tensor,
    count: int,
    generator: np.random.Generator,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """Make images that are unlike those given, yet have the statistics of photographs.

    Each is made of two of the images, drawn at random (maybe the same one twice): a crop of each,
    resized back, maybe flipped; its colours maybe mapped by a random affine map of RGB, maybe
    inverted. Of four in ten the two are blended; of four in ten a rectangle of the second is pasted
    into the first; the others are the first alone.

    Args:
        pixels: float [B, 3, H, W], normalised by `mean` and `std`; any device.
        count: how many to make.
        generator: the only source of randomness: its state and the arguments decide the result.
        mean: of the three channels.
        std: likewise.

    Returns:
        Tensor [count, 3, H, W] like `pixels`, normalised the same way.
    """
    if count == 0:
        return pixels[:0]
    height, width = pixels.shape[2:]
    first, second = generator.integers(0, len(pixels), (2, count))
    shift, scale = (pixels.new_tensor(values).view(1, 3, 1, 1) for values in (mean, std))
    one = _recoloured(_cropped(pixels, first, generator) * scale + shift, generator)
    other = _recoloured(_cropped(pixels, second, generator) * scale + shift, generator)
    kind = generator.random(count)
    share = np.where(kind < BLENDED, generator.uniform(*WEIGHT, count), 1.0)
    keep = torch.from_numpy(share).to(one).view(-1, 1, 1, 1).expand(-1, 1, height, width).clone()
    sides = generator.uniform(*RECTANGLE, (count, 2))
    place = generator.random((count, 2))
    for i in np.flatnonzero((kind >= BLENDED) & (kind < BLENDED + PASTED)):
        (top, bottom), (left, right) = (
            _span(sides[i, axis], place[i, axis], (height, width)[axis]) for axis in range(2)
        )
        keep[i, :, top:bottom, left:right] = 0
    return (keep * one + (1 - keep) * other - shift) / scale


def other_views(pixels: Tensor, generator: np.random.Generator) -> Tensor:
    """Make another view of each image [B, 3, H, W], normalised: the same, seen a little differently.

    A crop of 70 to 95 % of the sides, resized back, maybe flipped, of 80 to 120 % of the contrast
    and slightly brighter or darker. All randomness is of `generator`.
    """
    views = _cropped(pixels, np.arange(len(pixels)), generator, VIEW)
    contrast = generator.uniform(*CONTRAST, (len(pixels), 1, 1, 1))
    brightness = generator.normal(0, BRIGHTNESS, (len(pixels), 1, 1, 1))
    return views * torch.from_numpy(contrast).to(views) + torch.from_numpy(brightness).to(views)


def _cropped(
    pixels: Tensor,
    rows: Indices,
    generator: np.random.Generator,
    sides: tuple[float, float] = SIDE,
) -> Tensor:
    """A crop of each of the rows' images, at the size of the whole, maybe flipped."""
    height, width = pixels.shape[2:]
    side = generator.uniform(*sides, len(rows))
    place = generator.random((len(rows), 2))
    flipped = generator.random(len(rows)) < FLIPPED
    crops = []
    for i, row in enumerate(rows.tolist()):
        top, bottom = _span(side[i], place[i, 0], height)
        left, right = _span(side[i], place[i, 1], width)
        crop = nn.functional.interpolate(
            pixels[row : row + 1, :, top:bottom, left:right],
            (height, width),
            mode="bilinear",
            antialias=True,
            align_corners=False,
        )
        crops.append(crop.flip(3) if flipped[i] else crop)
    return torch.cat(crops)


def _span(share: float, place: float, length: int) -> tuple[int, int]:
    """Begin and end of `share` of `length` pixels, put at `place` (0: first, 1: last possible)."""
    size = max(1, int(share * length))
    start = int(place * (length - size + 1))
    return start, start + size


def _recoloured(images: Tensor, generator: np.random.Generator) -> Tensor:
    """RGB in 0 to 1 [N, 3, H, W] under a random affine map around mid-grey, or as they are."""
    count = len(images)
    matrices = np.eye(3) * generator.uniform(0.3, 1.0, (count, 1, 1))
    matrices = matrices + generator.normal(0, 0.35, (count, 3, 3))
    brightness = generator.normal(0, 0.1, count)
    changed = generator.random(count) < RECOLOURED
    matrices[~changed], brightness[~changed] = np.eye(3), 0.0
    inverted = generator.random(count) < INVERTED
    matrices[inverted] *= -1
    brightness[inverted] *= -1  # 1 - (M (x - 0.5) + 0.5 + b) = -M (x - 0.5) + 0.5 - b
    mapped = torch.einsum("noc,nchw->nohw", torch.from_numpy(matrices).to(images), images - 0.5)
    return (mapped + torch.from_numpy(brightness + 0.5).to(images).view(-1, 1, 1, 1)).clamp(0, 1)
