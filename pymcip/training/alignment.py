"""The alignment probe: how much of the original model's text-image knowledge a tuned one keeps.

The probe holds images and texts that training does not use. Tasks are made of them: an image and a
few texts to choose from, or a text and a few images. The original model's own probabilities of
the answers, p0, take the place of labels. A model's expected accuracy on a task is p0 of the answer
that it gives, and the original's own is the largest p0; both are averaged over all tasks, and the
ratio of the two is what the model has kept: 1 for the original, never more for another. An answer
that changes where the original was undecided costs little, one where it was sure costs much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pymcip.config import TrainConfig
from pymcip.data import Captions, ImageData, load_captions, load_images
from pymcip.data.loading import iterate_batches
from pymcip.errors import DataError
from pymcip.evaluation import TEMPLATES, read_class_names
from pymcip.metrics import zero_shot_classifier
from pymcip.model import ClipModel
from pymcip.training.mixtures import mixtures
from pymcip.training.sampling import Indices, random_generator

CANDIDATES = 64  # texts or images to choose from in one task
TASKS = 100  # sets of candidates
MOST_CAPTIONS, FEWEST_CAPTIONS = 4096, 256
MOST_IMAGES, FEWEST_IMAGES = 1024, 32
EVALUATIONS_OF_SEARCH = 8
SHARE = 0.08  # of the work of training: what the probe's own may be
WORK_OF_STEP = 3  # a training step's, per image or text, in forward passes
PIXEL_BYTES = 10**9  # of memory for the probe's images
BATCH = 64
STREAM = 5  # of `random_generator`: (seed, STREAM, purpose)
ROWS, IMAGES, MIXTURES, TEXT_TASKS, IMAGE_TASKS = range(5)  # purposes


@dataclass(frozen=True)
class Kept:
    """Shares of the original's expected accuracy, 0 to 1: images choose texts, texts images."""

    image_to_text: float
    text_to_image: float

    @property
    def alignment(self) -> float:
        """The one number that a budget is about: image to text, as in zero-shot classification."""
        return self.image_to_text


@dataclass(frozen=True)
class ProbeSources:
    """What the user gave for the probe; None where it is made from the training data.

    `captions` are the probe's own or, with `from_corpus`, the corpus to take a sample from.
    """

    images: ImageData | None
    captions: Captions | None
    names: tuple[str, ...] | None
    from_corpus: bool

    @property
    def description(self) -> str:
        images = "mixtures of training images" if self.images is None else "probe_data"
        if self.names is not None:
            return f"{images}, probe_class_names"
        return f"{images}, {'a sample of captions' if self.from_corpus else 'probe_captions'}"


def has_probe(config: TrainConfig) -> bool:
    """Whether a run with these (resolved) options keeps a budget: losing all is no bound."""
    return config.alignment_budget is not None and config.alignment_budget < 1


def load_probe_sources(config: TrainConfig, corpus: Captions | None) -> ProbeSources | None:
    """Open what the options name, before any work is done; None for a run without a budget.

    Raises:
        DataError: a source can't be read, or there are too few texts to choose from.
    """
    if not has_probe(config):
        return None
    images = None
    if config.probe_data is not None:
        images = load_images(config.probe_data, labelled=False)
        if len(images) < 2:
            raise DataError("probe_data holds one image; the probe needs 2 at least, better 1000")
    if config.probe_class_names is not None:
        names = tuple(dict.fromkeys(read_class_names(config.probe_class_names).names))
        if len(names) < 2:
            raise DataError(
                f"probe_class_names={str(config.probe_class_names)!r} holds one name; the probe "
                "chooses between names, give 2 at least"
            )
        return ProbeSources(images, None, names, from_corpus=False)
    if config.probe_captions is not None:
        captions = load_captions(config.probe_captions)
        if len(captions) < 2:
            raise DataError(
                f"probe_captions={config.probe_captions!r} holds one caption; the probe chooses "
                "between captions, give 2 at least, better 4000"
            )
        return ProbeSources(images, captions, None, from_corpus=False)
    assert corpus is not None  # `TrainConfig.problems` sees to it
    if len(probe_rows(len(corpus), config.seed)) < 2:
        raise DataError(
            f"captions={config.captions!r} holds {len(corpus)} captions, too few to take the probe's "
            "from; give probe_captions or probe_class_names, or at least 4 captions"
        )
    return ProbeSources(images, corpus, None, from_corpus=True)


def probe_rows(num_captions: int, seed: int, *, part: bool = True) -> Indices:
    """Rows of the captions that the probe asks for, int64 in random order, at most 4096.

    `part`: they are of the corpus that is trained on, and distillation leaves them out: a quarter of
    it; of a small corpus 64, but never more than half.
    """
    count = max(num_captions // 4, min(CANDIDATES, num_captions // 2)) if part else num_captions
    generator = random_generator(seed, STREAM, ROWS)
    return generator.permutation(num_captions)[: min(MOST_CAPTIONS, count)].astype(np.int64)


def affordable(work: int, evaluations: int, *, fewest: int, most: int) -> int:
    """How many images (or texts) may be probed `evaluations` times.

    All of it is to cost at most `SHARE` of a training of `work` images (or texts), each of them
    counted once per epoch.
    """
    return max(fewest, min(most, int(SHARE * WORK_OF_STEP * work / evaluations)))


class AlignmentProbe:
    """Images and texts, and the original model's answers to the tasks made of them.

    Args:
        original: the model before training. Its precision, device and evaluation mode are used.
        pixels: [n, 3, H, W], n >= 2, under its evaluation transform; kept as float16.
        texts: captions, at least 2; or the names of classes, which then form one task.
        seed: of the choice of candidates.
        names: `texts` are class names, put into the templates of zero-shot classification.
        vectors: unit embeddings [len(texts), D] of `texts` by the original, if there are any: they
            stand for any model whose text tower is the original's.
    """

    def __init__(
        self,
        original: ClipModel,
        pixels: Tensor,
        texts: Sequence[str],
        *,
        seed: int,
        names: bool = False,
        vectors: Tensor | None = None,
    ) -> None:
        self.pixels, self.texts, self.names = pixels.half(), list(texts), names
        self._features = self._images(original)
        self._vectors = self._embedded(original) if vectors is None else vectors.float()
        count = len(self.texts)
        every = [np.arange(count)]
        self._text_tasks = every if names else _candidates(count, seed, TEXT_TASKS)
        self._image_tasks = _candidates(len(pixels), seed, IMAGE_TASKS)
        scale = float(original.model.logit_scale.detach().exp())  # type: ignore[union-attr,operator]
        logits = scale * (self._features @ self._vectors.T)  # in `measure`'s order: the same bits
        self._text_shares = [logits[:, task].softmax(1) for task in self._text_tasks]
        self._image_shares = [logits.T[:, task].softmax(1) for task in self._image_tasks]

    def measure(self, clip: ClipModel, *, images: bool = True, texts: bool = False) -> Kept:
        """What `clip` keeps of the original's expected accuracy.

        Args:
            clip: a model with the original's tokenizer and transform, in any state of training.
            images: embed the images anew, by its image tower; else the original's embeddings serve.
            texts: likewise the texts, by its text tower.
        """
        features = self._images(clip) if images else self._features
        vectors = self._embedded(clip) if texts else self._vectors
        similarities = features @ vectors.T
        return Kept(
            image_to_text=_kept(similarities, self._text_tasks, self._text_shares),
            text_to_image=_kept(similarities.T, self._image_tasks, self._image_shares),
        )

    def _images(self, clip: ClipModel) -> Tensor:
        return torch.cat([clip.encode_images(part.float()) for part in self.pixels.split(BATCH)])

    def _embedded(self, clip: ClipModel) -> Tensor:
        if self.names:
            return zero_shot_classifier(clip, self.texts, TEMPLATES)
        return clip.encode_texts(self.texts)


def _candidates(count: int, seed: int, purpose: int) -> list[Indices]:
    """Sets of candidates, drawn without repetition; a single one where there are few."""
    if count <= CANDIDATES:
        return [np.arange(count)]
    generator = random_generator(seed, STREAM, purpose)
    return [generator.choice(count, CANDIDATES, replace=False) for _ in range(TASKS)]


def _kept(similarities: Tensor, tasks: list[Indices], shares: list[Tensor]) -> float:
    """Mean p0 of the answers over mean largest p0, both over all queries and tasks."""
    given, best = 0.0, 0.0
    for task, share in zip(tasks, shares, strict=True):
        answers = similarities[:, task].argmax(1, keepdim=True)
        given += float(share.gather(1, answers).double().sum())
        best += float(share.amax(1).double().sum())
    return given / best


def probe_pixels(
    clip: ClipModel,
    images: ImageData | None,
    training: ImageData,
    count: int,
    seed: int,
    workers: int,
) -> Tensor:
    """Pixels [<= count, 3, H, W], float16, of the probe's images under the evaluation transform.

    A seeded sample of `images` (those that can't be decoded are left out), or mixtures of `training`
    images. As many as fit into a gigabyte of memory.

    Raises:
        DataError: fewer than two of the images can be decoded.
    """
    source = training if images is None else images
    rows = random_generator(seed, STREAM, IMAGES).permutation(len(source))
    if images is None:
        rows = np.resize(rows, count)  # repeated where there are fewer
    generator = random_generator(seed, STREAM, MIXTURES)
    mean, std = clip.preprocess_cfg["mean"], clip.preprocess_cfg["std"]
    parts: list[Tensor] = []
    for batch in iterate_batches(
        source, rows[:count], clip.preprocess_val, batch_size=BATCH, workers=workers
    ):
        pixels = batch.images
        if not len(pixels):
            continue
        if images is None:
            pixels = mixtures(pixels, len(pixels), generator, mean, std)
        parts.append(pixels.half())
        fitting = PIXEL_BYTES // (2 * pixels[0].numel())
        if sum(map(len, parts)) >= fitting:
            break
    found = sum(map(len, parts))
    if found < 2:
        raise DataError(
            f"{found} of {len(rows[:count])} images of the probe can be decoded; give other probe_data"
        )
    return torch.cat(parts)
