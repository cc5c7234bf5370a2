"""Where the alignment probe's images and texts come from, and how many of them are affordable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pymcip.configs import TrainConfig, Workers
from pymcip.data import Captions, ImageData, load_captions, load_images
from pymcip.data.class_names import read_class_names
from pymcip.data.images import UNLABELLED
from pymcip.data.loading import iterate_batches
from pymcip.errors import DataError
from pymcip.model import ClipModel
from pymcip.training.mixtures import mixtures
from pymcip.training.sampling import Indices, Stream, random_generator

SMALLEST_TEXTS = 64  # held back of a small corpus
MOST_CAPTIONS = 4096
SHARE = 0.08  # of the work of training: what the probe's own may be
WORK_OF_STEP = 3  # a training step's, per image or text, in forward passes
PIXEL_BYTES = 10**9  # of memory for the probe's images
READ_BATCH = 64


@dataclass(frozen=True)
class ProbeSources:
    """What the user gave for the probe; None where it is made from the training data.

    `captions` are the probe's own or, with `from_corpus`, the corpus to take a sample from. `truth`:
    the images' right texts are known, as all of them have captions, or classes of which class c has
    the name `names[of_class[c]]`.
    """

    images: ImageData | None
    captions: Captions | None = None
    names: tuple[str, ...] | None = None
    from_corpus: bool = False
    truth: Literal["captions", "classes"] | None = None
    of_class: Indices | None = None

    @property
    def description(self) -> str:
        """What the probe is made of, in words."""
        if self.truth is not None:
            return f"probe_data with their own {self.truth}"
        images = "mixtures of training images" if self.images is None else "probe_data"
        if self.names is not None:
            return f"{images}, probe_class_names"
        return f"{images}, {'a sample of captions' if self.from_corpus else 'probe_captions'}"

    def held_back(self, seed: int) -> Indices | None:
        """The rows of the corpus that only the probe may use; None: it uses none."""
        if self.captions is None or not self.from_corpus:
            return None
        return probe_rows(len(self.captions), seed)

    def answers(self, rows: Indices) -> tuple[list[str], list[list[int]]]:
        """The texts to choose from, and which of them are right for each of the images `rows`.

        Equal captions are one text, right for all images that have it.
        """
        assert self.images is not None
        if self.truth == "classes":
            assert self.names is not None
            assert self.of_class is not None
            own = self.of_class[self.images.labels[rows]]
            return list(self.names), [[text] for text in own.tolist()]
        places: dict[str, int] = {}
        right = [
            [places.setdefault(title, len(places)) for title in self.images.titles(row)]
            for row in rows.tolist()
        ]
        return list(places), right


def load_probe_sources(config: TrainConfig, corpus: Captions | None) -> ProbeSources | None:
    """Open what the options name, before any work is done; None for a run without a budget.

    Raises:
        DataError: a source can't be read, or there are too few texts to choose from.
    """
    if config.budget is None or config.budget >= 1:  # losing all is no bound
        return None
    images = None
    if config.probe_data is not None:
        images = load_images(config.probe_data, labelled=False)
        if len(images) < 2:
            raise DataError("probe_data holds one image; the probe needs 2 at least, better 1000")
    if config.probe_class_names is not None:
        table = read_class_names(config.probe_class_names)
        names = tuple(dict.fromkeys(table.names))
        if len(names) < 2:
            raise DataError(
                f"probe_class_names={str(config.probe_class_names)!r} holds one name; the probe "
                "chooses between names, give 2 at least"
            )
        of_label = dict(zip(table.labels, map(names.index, table.names), strict=True))
        if images is None or UNLABELLED in images.labels or set(images.class_names) - set(of_label):
            return ProbeSources(images, names=names)
        of_class = np.array([of_label[label] for label in images.class_names], np.int64)
        return ProbeSources(images, names=names, truth="classes", of_class=of_class)
    if config.probe_captions is not None:
        captions = load_captions(config.probe_captions)
        if len(captions) < 2:
            raise DataError(
                f"probe_captions={config.probe_captions!r} holds one caption; the probe chooses "
                "between captions, give 2 at least, better 4000"
            )
        return ProbeSources(images, captions)
    if images is not None:
        titles = [images.titles(row) for row in range(len(images))]
        captioned = [row for row, own in enumerate(titles) if own]
        if len({title for own in titles for title in own}) > 1:
            return ProbeSources(images.select(captioned), truth="captions")
    if corpus is None:
        raise DataError(
            "the probe has no texts: the images of probe_data have no captions, or all the same one; "
            "give captions=, probe_captions= or probe_class_names=, or images with captions"
        )
    if len(probe_rows(len(corpus), config.seed)) < 2:
        raise DataError(
            f"captions={config.captions!r} holds {len(corpus)} captions, too few to take the probe's "
            "from; give probe_captions or probe_class_names, or at least 4 captions"
        )
    return ProbeSources(images, corpus, from_corpus=True)


def probe_rows(num_captions: int, seed: int, *, part: bool = True) -> Indices:
    """Rows of the captions that the probe asks for, int64 in random order, at most 4096.

    `part`: they are of the corpus that is trained on, and distillation leaves them out: a quarter of
    it; of a small corpus 64, but never more than half.
    """
    count = max(num_captions // 4, min(SMALLEST_TEXTS, num_captions // 2)) if part else num_captions
    generator = random_generator(seed, Stream.PROBE_CAPTIONS)
    return generator.permutation(num_captions)[: min(MOST_CAPTIONS, count)].astype(np.int64)


def affordable(work: int, evaluations: int, *, fewest: int, most: int) -> int:
    """How many images (or texts) may be probed `evaluations` times.

    All of it is to cost at most `SHARE` of a training of `work` images (or texts), each of them
    counted once per epoch.
    """
    return max(fewest, min(most, int(SHARE * WORK_OF_STEP * work / evaluations)))


def probe_pixels(
    clip: ClipModel,
    images: ImageData | None,
    training: ImageData,
    count: int,
    seed: int,
    workers: Workers,
) -> tuple[Tensor, Indices]:
    """Pixels [<= count, 3, H, W], float16, of the probe's images under the evaluation transform.

    Also int64 [<= count], which images of the source they are of. A seeded sample of `images` (those
    that can't be decoded are left out), or mixtures of `training` images. As many as fit into a
    gigabyte of memory.

    Raises:
        DataError: fewer than two of the images can be decoded.
    """
    source = training if images is None else images
    rows = random_generator(seed, Stream.PROBE_IMAGES).permutation(len(source))
    if images is None:
        rows = np.resize(rows, count)  # repeated where there are fewer
    generator = random_generator(seed, Stream.PROBE_MIXTURES)
    mean, std = clip.preprocess_cfg["mean"], clip.preprocess_cfg["std"]
    parts: list[Tensor] = []
    read: list[int] = []
    for batch in iterate_batches(
        source, rows[:count], clip.preprocess_val, batch_size=READ_BATCH, workers=workers
    ):
        pixels = batch.images
        if not len(pixels):
            continue
        if images is None:
            pixels = mixtures(pixels, len(pixels), generator, mean, std)
        parts.append(pixels.half())
        read += batch.indices.tolist()
        if len(read) >= PIXEL_BYTES // (2 * pixels[0].numel()):
            break
    if len(read) < 2:
        raise DataError(
            f"{len(read)} of {len(rows[:count])} images of the probe can be decoded; give other "
            "probe_data"
        )
    return torch.cat(parts), np.array(read)
