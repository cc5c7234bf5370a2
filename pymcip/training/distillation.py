"""Distillation of the untrained model's distributions over captions, so that training keeps them.

For an image with unit embedding f0 by the untrained model and f by the one in training, and a random
sample T of unit captions of the corpus (the text tower is locked, so both models share them):

    p0 = softmax(s T f0 / t),    p = softmax(s T f / t),    loss = t^2 KL(p0 || p)

with KL(p0 || p) = sum p0 (log p0 - log p), s the model's own exp(logit_scale), at most 100 as in CLIP
(arXiv 2103.00020), and t a temperature: above 1 the captions that the image is far from count too,
and t^2 keeps the size of the gradients (arXiv 1503.02531). This is learning without forgetting
(arXiv 1606.09282) where captions stand for the old task's classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pymcip.configs import TrainSettings
from pymcip.data import ImageData
from pymcip.embedding import EmbeddingCache, EmbeddingFolder
from pymcip.errors import DataError
from pymcip.model import ClipModel, evaluation_mode
from pymcip.model.towers import copied_tower
from pymcip.ops.arrays import MatrixParts
from pymcip.training.mixtures import mixtures
from pymcip.training.sampling import Indices, Stream, random_generator

GENERIC_RATE = 1 / 8  # generic images per training image, at least

Matrix = npt.NDArray[np.floating]


def caption_divergence(
    features: Tensor, original: Tensor, captions: Tensor, scale: float
) -> Tensor:
    """KL(p0 || p) of every image, fp32 [B]; see the module.

    Args:
        features: unit rows [B, D] of the model in training; only they get a gradient.
        original: unit rows [B, D] of the untrained model.
        captions: unit rows [M, D].
        scale: s.
    """
    captions = captions.detach()
    now = torch.log_softmax(scale * features @ captions.T, dim=1)
    before = torch.log_softmax(scale * original.detach() @ captions.T, dim=1)
    return (before.exp() * (before - now)).sum(dim=1)


def frozen_copy(clip: ClipModel) -> ClipModel:
    """Return the same model with a copy of its image tower that training will not change.

    The text side is shared; the copy is for images.
    """
    copied = copied_tower(clip, "image")
    copied.model.visual.eval().requires_grad_(False)  # type: ignore[union-attr,operator]
    return copied


class CaptionSample:
    """Random rows of caption embeddings on the disk; no others are read.

    `parts`: float [n, D] each, as `EmbeddingFolder.parts` gives them. `left_out`: numbers of rows that
    are never drawn.

    Raises:
        DataError: fewer than two rows are left.
    """

    def __init__(
        self, parts: Sequence[Matrix], count: int, seed: int, left_out: Indices | None = None
    ) -> None:
        self.captions, self.count, self.seed = MatrixParts(parts), count, seed
        total = len(self.captions)
        self.rows: Indices | None = None  # all
        if left_out is not None:
            self.rows = np.setdiff1d(np.arange(total, dtype=np.int64), left_out)
        self.available = total if self.rows is None else len(self.rows)
        if self.available < 2:
            raise DataError(
                f"distillation has {self.available} of {total} captions, as the probe keeps the "
                "others; give a larger corpus, or captions of the probe's own (probe_captions)"
            )

    def drawn(self, epoch: int, step: int) -> Indices:
        """Return the rows of one step, ascending: a function of seed, epoch and step alone."""
        generator = random_generator(self.seed, Stream.DISTILLED_CAPTIONS, epoch, step)
        size = min(self.count, self.available)
        drawn = np.sort(generator.choice(self.available, size, replace=False, shuffle=False))
        return drawn if self.rows is None else self.rows[drawn]

    def vectors(self, epoch: int, step: int, device: torch.device) -> Tensor:
        """Return the embeddings of these rows, fp32 [M, D] on `device`."""
        return torch.from_numpy(self.captions[self.drawn(epoch, step)]).to(device).float()


class Distillation:
    """The untrained model's distributions over captions, kept in the image stage.

    They are kept on the training images and, at `rate`, on mixtures of them or on generic images.

    Args:
        teacher: the untrained model; runs on mixtures only.
        captions: what to draw the captions from.
        vectors: float [N, D], the untrained model's embeddings of the training images.
        weight: of each of the terms.
        rate: mixtures per training image; with `generic`, images of it per training image.
        seed: of the mixtures and of the order of the generic images.
        generic: images without labels that are drawn instead of mixtures.
        generic_vectors: float [G, D], the untrained model's embeddings of them.
        temperature: t.
    """

    def __init__(
        self,
        teacher: ClipModel,
        captions: CaptionSample,
        vectors: Matrix,
        *,
        weight: float,
        rate: float,
        seed: int,
        generic: ImageData | None = None,
        generic_vectors: Matrix | None = None,
        temperature: float = 1.0,
    ) -> None:
        self.teacher, self.captions, self.generic = teacher, captions, generic
        self.weight, self.seed, self.temperature = weight, seed, temperature
        self.num_images = len(vectors)
        self.known = MatrixParts([x for x in (vectors, generic_vectors) if x is not None])
        self.rate = rate if generic is None else max(rate, GENERIC_RATE)
        self.scale = teacher.logit_scale

    @classmethod
    def start(
        cls,
        config: TrainSettings,
        cache: EmbeddingCache,
        images: EmbeddingFolder,
        captions: EmbeddingFolder,
        *,
        generic: ImageData | None = None,
        left_out: Indices | None = None,
    ) -> Distillation:
        """Take from the untrained model, which `cache` embeds by, what is to be kept.

        `images` and `captions`: its embeddings of the training images and of the corpus. `generic`:
        images without labels, those that can't be decoded included. `left_out`: captions of the probe.
        """
        teacher, generic_vectors = cache.clip, None
        if generic is not None:
            embedded = cache.images(generic)
            generic, generic_vectors = generic.select(embedded.rows("img")), embedded.vectors("img")
        elif config.mixtures > 0:
            teacher = frozen_copy(teacher)
        return cls(
            teacher,
            CaptionSample(captions.parts("text"), config.distill_captions, config.seed, left_out),
            images.vectors("img"),
            weight=config.distill, rate=config.mixtures, seed=config.seed,
            generic=generic, generic_vectors=generic_vectors,
            temperature=config.distill_temperature,
        )  # fmt: skip

    def extra(self, images: int) -> int:
        """Return how many mixtures or generic images go with a micro-batch of `images`."""
        return round(self.rate * images)

    def order_with_generic(self, order: Indices, batch_size: int, epoch: int) -> Indices:
        """Add each batch's generic images to its end, numbered on from the N training images."""
        assert self.generic is not None
        batches = np.split(order, range(batch_size, len(order), batch_size))
        counts = [self.extra(len(batch)) for batch in batches]
        generator = random_generator(self.seed, Stream.GENERIC_IMAGES, epoch)
        rounds = -(-sum(counts) // len(self.generic))
        drawn = [generator.permutation(len(self.generic)) for _ in range(rounds)]
        behind = self.num_images + np.concatenate([*drawn, order[:0]])
        parts = np.split(behind, np.cumsum(counts))
        return np.concatenate([x for pair in zip(batches, parts, strict=False) for x in pair])

    def mixed(self, pixels: Tensor, epoch: int, step: int, micro_batch: int) -> Tensor:
        """Return the micro-batch's mixtures [n, 3, H, W] of its `pixels` [B, 3, H, W]."""
        generator = random_generator(self.seed, Stream.DISTILLED_MIXTURES, epoch, step, micro_batch)
        described = self.teacher.preprocess_cfg
        count = self.extra(len(pixels))
        return mixtures(pixels, count, generator, described["mean"], described["std"])

    def cached(self, rows: npt.NDArray[np.int64], device: torch.device) -> Tensor:
        """Return the untrained model's unit embeddings of images, fp32 [B, D]."""
        vectors = torch.from_numpy(self.known[rows]).to(device).float()
        return nn.functional.normalize(vectors, dim=1)

    @torch.no_grad()
    def taught(self, pixels: Tensor) -> Tensor:
        """Return the untrained model's unit embeddings, fp32 [B, D], of images that are new."""
        with evaluation_mode(self.teacher.model.visual):  # type: ignore[arg-type]
            return self.teacher.image_features(pixels)

    def sum(self, features: Tensor, original: Tensor, captions: Tensor) -> Tensor:
        """Return the sum of the images' losses."""
        scale = self.scale / self.temperature
        return self.temperature**2 * caption_divergence(features, original, captions, scale).sum()
