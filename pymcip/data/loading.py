"""Batches of decoded, transformed images, in order, with what could not be decoded left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import Resize

from pymcip.configs import Workers
from pymcip.data.images import ImageData
from pymcip.errors import DecodeError
from pymcip.workers import load_batches


@dataclass(frozen=True, slots=True)
class Skipped:
    """An image that could not be decoded: its index in the data, its key, and why."""

    index: int
    key: str
    reason: str


class Batch(NamedTuple):
    """Images that could be decoded, and those that could not.

    Attributes:
        indices: int64 [B] into the data.
        images: float32 [B, 3, H, W].
        contents: B digests (hex) of the image files' bytes and crops: equal ones are one picture.
        skipped: what could not be decoded.
    """

    indices: npt.NDArray[np.int64]
    images: Tensor
    contents: list[str]
    skipped: list[Skipped]


@dataclass(frozen=True, slots=True)
class Decoded:
    """One image: its index in the data, its pixels, and the digest of its content."""

    index: int
    image: Tensor
    content: str


class DecodedImages(Dataset[Decoded | Skipped]):
    """The images at `indices`, transformed; a `Skipped` in place of one that can't be decoded.

    It is picklable if the transform is, so worker processes may be forked or spawned.
    """

    def __init__(
        self, data: ImageData, indices: npt.ArrayLike, transform: Callable[[Any], Tensor]
    ) -> None:
        self.data = data
        self.indices = np.asarray(indices, np.int64)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Decoded | Skipped:
        index = int(self.indices[position])
        try:
            image, content = self.data.read_with_digest(index)
            pixels = transformed(image, self.transform, self.data.key(index))
        except DecodeError as error:
            return Skipped(index, self.data.key(index), str(error))
        return Decoded(index, pixels, content)


def transformed(image: Image.Image, transform: Callable[[Any], Tensor], key: str) -> Tensor:
    """Transform an RGB image: float32 [3, H, W].

    Raises:
        DecodeError: it is so long that it has more pixels after the transform's resize than Pillow
            allows; or the transform fails on it.
    """
    side, most = shortest_side(transform), Image.MAX_IMAGE_PIXELS
    shorter, longer = sorted(image.size)
    if side is not None and most is not None and side * side * longer > most * shorter:
        raise DecodeError(
            f"{image.width} x {image.height} pixels become {side * side * longer // shorter} where the "
            f"shorter side is resized to {side}; more than {most} are refused (PIL.Image.MAX_IMAGE_PIXELS)"
        )
    try:
        return transform(image)
    except Exception as error:  # a transform may raise anything on a picture of odd size
        raise DecodeError(
            f"{key}: the transform fails ({type(error).__name__}: {error})"
        ) from error


def shortest_side(transform: Any) -> int | None:
    """Return to how many pixels a transform resizes the shorter side; None if it doesn't."""
    for step in getattr(transform, "transforms", [transform]):
        if isinstance(step, Resize) and isinstance(step.size, int):
            return step.size
    return None


def collate(items: Sequence[Decoded | Skipped]) -> Batch:
    """Make one batch of the items of `DecodedImages`."""
    kept = [item for item in items if isinstance(item, Decoded)]
    images = torch.stack([item.image for item in kept]) if kept else torch.empty(0, 3, 0, 0)
    return Batch(
        np.array([item.index for item in kept], np.int64),
        images,
        [item.content for item in kept],
        [item for item in items if isinstance(item, Skipped)],
    )


def iterate_batches(
    data: ImageData,
    indices: npt.ArrayLike,
    transform: Callable[[Any], Tensor],
    *,
    batch_size: int,
    workers: Workers = 0,
) -> Iterator[Batch]:
    """Yield the images at `indices`, in that order, `batch_size` at a time.

    A batch holds fewer images, maybe none, where some can't be decoded; it lists those.

    Args:
        data: where to read images.
        indices: int [M] into `data`.
        transform: PIL image (RGB) to float32 tensor [3, H, W].
        batch_size: images per batch, skipped ones counted.
        workers: decoding processes; 0 decodes in this one.

    Raises:
        DataError: a file is gone or has shrunk since it was indexed.
        ResourceError: a worker was ended by the system, or lacks shared memory or open files.
    """
    items = DecodedImages(data, indices, transform)
    yield from load_batches(items, workers=workers, collate=collate, batch_size=batch_size)
