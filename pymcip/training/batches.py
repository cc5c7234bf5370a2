"""Augmented image batches whose content depends on seed, epoch and position alone.

Neither the number of workers nor a resume in mid-epoch changes a pixel, and the global random
generators are left as they were.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pymcip.data import ImageData
from pymcip.training.sampling import Indices
from pymcip.workers import load_batches


@contextlib.contextmanager
def random_state(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator, `random` and NumPy for a block; restore all three after it."""
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        random.setstate(before[1])
        np.random.set_state(before[2])  # noqa: NPY002


class AugmentedImages(Dataset[tuple[Tensor, int]]):
    """Item (epoch, position, row): image `row` under the augmentation of that place in the run.

    Images of `more` are numbered on from those of `data`.
    """

    def __init__(
        self,
        data: ImageData,
        transform: Callable[[Any], Tensor],
        seed: int,
        more: ImageData | None = None,
    ) -> None:
        self.data, self.transform, self.seed, self.more = data, transform, seed, more

    def __getitem__(self, item: tuple[int, int, int]) -> tuple[Tensor, int]:  # type: ignore[override]
        epoch, position, row = item
        behind = row - len(self.data)
        image = self.data.read(row) if self.more is None or behind < 0 else self.more.read(behind)
        key = np.random.SeedSequence([self.seed, epoch, position])
        with random_state(int(key.generate_state(1, np.uint64)[0] >> 1)):
            return self.transform(image), row


def image_batches(
    images: AugmentedImages,
    order: Indices,
    *,
    epoch: int,
    batch_size: int,
    first_batch: int,
    num_batches: int,
    workers: int,
    pin_memory: bool,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches `first_batch` … `num_batches - 1` of the epoch: pixels [B, 3, H, W], rows int64 [B]."""
    last = min(num_batches * batch_size, len(order))
    batches = [
        [(epoch, i, int(order[i])) for i in range(start, min(start + batch_size, last))]
        for start in range(first_batch * batch_size, last, batch_size)
    ]
    yield from load_batches(images, workers=workers, batch_sampler=batches, pin_memory=pin_memory)
