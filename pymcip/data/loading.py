"""Batches of decoded, transformed images, in order, with what could not be decoded left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

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
    """Indices int64 [B] into the data, their images float32 [B, 3, H, W], and what was skipped."""

    indices: npt.NDArray[np.int64]
    images: Tensor
    skipped: list[Skipped]


class DecodedImages(Dataset[tuple[int, Tensor | Skipped]]):
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

    def __getitem__(self, position: int) -> tuple[int, Tensor | Skipped]:
        index = int(self.indices[position])
        try:
            image = self.data.read(index)
        except DecodeError as error:
            return index, Skipped(index, self.data.key(index), str(error))
        return index, self.transform(image)


def collate(items: Sequence[tuple[int, Tensor | Skipped]]) -> Batch:
    """Make one batch of the items of `DecodedImages`."""
    kept = [(index, image) for index, image in items if isinstance(image, Tensor)]
    images = torch.stack([image for _, image in kept]) if kept else torch.empty(0, 3, 0, 0)
    return Batch(
        np.array([index for index, _ in kept], np.int64),
        images,
        [item for _, item in items if isinstance(item, Skipped)],
    )


def iterate_batches(
    data: ImageData,
    indices: npt.ArrayLike,
    transform: Callable[[Any], Tensor],
    *,
    batch_size: int,
    workers: int = 0,
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
