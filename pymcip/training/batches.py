"""Augmented image batches whose content depends on seed, epoch and position alone.

Neither the number of workers nor a resume in mid-epoch changes a pixel, and the global random
generators are left as they were.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.transforms.functional import pil_modes_mapping

from pymcip.configs import Workers
from pymcip.data import ImageData
from pymcip.data.decode import REDUCED_FROM
from pymcip.embedding.write import REDUCED
from pymcip.errors import ConfigError
from pymcip.model import ClipModel
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


def train_transform(
    clip: ClipModel, size: int, aug_cfg: dict[str, Any], resize: float | None = None
) -> Callable[[Any], Tensor]:
    """open_clip's transform of training images, to crops of `size` pixels; or that of `resize`.

    Args:
        clip: the model.
        size: pixels of a side.
        aug_cfg: open_clip's `AugmentationCfg` as a dict.
        resize: resize to squares of this many times `size`, whatever the image's proportions, crop and
            flip at random, and jitter the colours by `color_jitter` of `aug_cfg`, a number for
            brightness, contrast and saturation, or torchvision's three or four.

    Raises:
        ConfigError: open_clip doesn't know `aug_cfg`, or a part of it would be ignored.
    """
    transform = open_clip.transform
    allowed = {item.name for item in dataclasses.fields(transform.AugmentationCfg)}
    unknown = sorted(set(aug_cfg) - allowed)
    if unknown:
        raise ConfigError(
            f"aug_cfg has unknown keys {unknown}; allowed (open_clip's AugmentationCfg): "
            f"{', '.join(sorted(allowed))}"
        )
    described = transform.PreprocessCfg(**{**clip.preprocess_cfg, "size": size})
    if resize is not None:
        return _square_transform(described, size, aug_cfg, resize)
    # without timm, open_clip takes these in with no more than a warning and does not apply them
    ignored: list[str] = [name for name in ("ratio", "re_prob", "re_count") if name in aug_cfg]
    if "color_jitter" in aug_cfg and not aug_cfg.get("color_jitter_prob"):
        ignored.append("color_jitter")
    if ignored and not aug_cfg.get("use_timm"):
        raise ConfigError(
            f"aug_cfg: open_clip applies {', '.join(ignored)} only with use_timm=True; add it"
            + (", or color_jitter_prob" if "color_jitter" in ignored else "")
        )
    made: Callable[[Any], Tensor] = transform.image_transform_v2(
        described, is_train=True, aug_cfg=aug_cfg or None
    )
    return made


def _square_transform(
    described: open_clip.transform.PreprocessCfg, size: int, aug_cfg: dict[str, Any], resize: float
) -> Callable[[Any], Tensor]:
    if ignored := sorted(set(aug_cfg) - {"color_jitter"}):
        raise ConfigError(
            f"aug_cfg: {', '.join(ignored)} can't be applied with train_resize={resize}; allowed with "
            "it: color_jitter"
        )
    jitter = aug_cfg.get("color_jitter") or ()
    jitter = (jitter,) * 3 if isinstance(jitter, (int, float)) else tuple(jitter)
    side = int(size * resize)
    interpolation = transforms.InterpolationMode(described.interpolation)
    try:
        return transforms.Compose(
            [
                open_clip.transform.MaybeConvertMode(),
                transforms.Resize((side, side), interpolation=interpolation),
                transforms.RandomCrop(size),
                transforms.RandomHorizontalFlip(),
                *([transforms.ColorJitter(*jitter)] if jitter else []),
                open_clip.transform.MaybeToTensor(),
                transforms.Normalize(described.mean, described.std),
            ]
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"aug_cfg: color_jitter={aug_cfg['color_jitter']!r} is not allowed ({error}); allowed: a "
            "number such as 0.4, or torchvision's brightness, contrast, saturation and hue"
        ) from error


def reduced_transform(transform: Any) -> tuple[Callable[[Any], Tensor], int]:
    """Return a `train_transform` for images that are read at a part of their size, see `ImageData.reduced`.

    It draws the same crops of them.

    Returns:
        The transform, and the pixels that the shorter side of an image is to keep at least.

    Raises:
        ConfigError: there is none, as for timm's transforms.
    """
    steps = list(getattr(transform, "transforms", []))
    for place, step in enumerate(steps):
        if type(step) is transforms.Resize:
            steps[place] = _ReducedResize(step.size, step.interpolation)
            return transforms.Compose(steps), REDUCED * max(step.size)
        if type(step) is transforms.RandomResizedCrop:
            steps[place] = _ReducedCrop(step.size, step.scale, step.ratio, step.interpolation)
            # The shortest side of a crop, as a share of the image's shorter side.
            smallest = math.sqrt(step.scale[0] * step.ratio[0])
            return transforms.Compose(steps), math.ceil(REDUCED * max(step.size) / smallest)
    raise ConfigError(
        "reduced_decoding=True is not there for timm's augmentation; allowed: aug_cfg without use_timm, "
        "or reduced_decoding=False"
    )


class _ReducedCrop(transforms.RandomResizedCrop):
    """Draws a box of the whole image."""

    def forward(self, img: Any) -> Any:
        if REDUCED_FROM not in img.info:
            return super().forward(img)
        width, height = img.info[REDUCED_FROM][:2]
        whole = torch.empty(1).expand(1, height, width)
        box = self.get_params(whole, self.scale, self.ratio)
        return _of_whole(img, box, self.size, self.interpolation)


class _ReducedResize(transforms.Resize):
    """Resizes to a width and a height; of the last rows and columns, what lies in the whole image."""

    def forward(self, img: Any) -> Any:
        if REDUCED_FROM not in img.info:
            return super().forward(img)
        width, height = img.info[REDUCED_FROM][:2]
        return _of_whole(img, (0, 0, height, width), self.size, self.interpolation)


def _of_whole(
    image: Image.Image,
    box: tuple[int, int, int, int],
    size: Sequence[int],
    interpolation: transforms.InterpolationMode,
) -> Image.Image:
    """Resize what there is of a box (top, left, height, width) of the whole image to `size` (height, width)."""
    top, left, height, width = box
    whole_width, whole_height, across, down = image.info[REDUCED_FROM]
    x, right = (at * across / whole_width for at in (left, left + width))
    y, bottom = (at * down / whole_height for at in (top, top + height))
    first, above = int(x), int(y)  # pixels beyond the box don't reach into the result
    cut = image.crop((first, above, math.ceil(right), math.ceil(bottom)))
    part = (x - first, y - above, right - first, bottom - above)
    return cut.resize((size[1], size[0]), pil_modes_mapping[interpolation], part)


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
        number = row - len(self.data)  # in `more`
        image = self.data.read(row) if self.more is None or number < 0 else self.more.read(number)
        key = np.random.SeedSequence([self.seed, epoch, position])
        with random_state(int(key.generate_state(1, np.uint64)[0] >> 1)):
            return self.transform(image), row


def image_batches(
    images: AugmentedImages,
    order: Indices,
    *,
    epoch: int,
    batch_size: int,
    numbers: Iterable[int],
    workers: Workers,
    pin_memory: bool,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The epoch's batches with these numbers: pixels [B, 3, H, W], rows int64 [B].

    Batch n has the places n * batch_size and up of the order; those beyond its end are left out.
    """
    batches = [
        [(epoch, i, int(order[i])) for i in range(start, min(start + batch_size, len(order)))]
        for start in (number * batch_size for number in numbers)
        if start < len(order)
    ]
    yield from load_batches(images, workers=workers, batch_sampler=batches, pin_memory=pin_memory)
