"""The alignment probe: how much of the original model's text-image knowledge a tuned one keeps.

The probe holds images and texts that training does not use. Tasks are made of them: an image and a
few texts to choose from, or a text and a few images. What a model keeps is the ratio of its accuracy
to the original's, 1 for the original, in the worse of the two directions.

Where the probe's images have captions, or labels that `probe_class_names` names, the right answers
are known: accuracy is the expected share of right answers over all sets of candidates with one right
answer among them. A model may keep more than 1 then. There are 64 candidates, or all names; where the
original is right less than half of the time, half as many, and so on, down to 8: a ratio of two small
counts would be noise.

Otherwise the original model's own probabilities of the answers, p0, take the place of labels: its
softmax over the candidates for *another view* of the image (a crop, flip, contrast and brightness),
while both models answer for the first view. A model's expected accuracy on a task is p0 of the
answer that it gives, the original's p0 of its own; both are averaged over all tasks. The other view
is there because no model is to judge its own answers: from the same view, the original's would be
the likeliest by definition, and every change a loss. An answer that changes where the original is
undecided, or does not say the same of both views, costs little, one where it is sure costs much;
where training taught the model better than the original knew, that costs too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pymcip.errors import DataError
from pymcip.evaluation import TEMPLATES
from pymcip.metrics import zero_shot_classifier
from pymcip.model import ClipModel
from pymcip.training.mixtures import other_views
from pymcip.training.sampling import Indices, Stream, random_generator

CANDIDATES = 8  # texts or images to choose from in a task that p0 judges, or that is hard
TASKS = 200  # sets of them
KNOWN_CANDIDATES = 64  # where the right one is known, at most: the mean over all sets
EASY = 0.5  # accuracy of the original in a task that is not too hard for it
BATCH = 64
PAIRS = 1024  # of a query and a right answer, judged at a time


@dataclass(frozen=True)
class Kept:
    """Shares of the original's accuracy that a model keeps, from 0 on, in both directions.

    The errors are standard errors of these shares for other images (or texts) of the same kind.
    """

    image_to_text: float
    text_to_image: float
    image_to_text_error: float = 0.0
    text_to_image_error: float = 0.0

    @property
    def alignment(self) -> float:
        """The one number that a budget is about: both directions keep it, so the smaller one."""
        return min(self.image_to_text, self.text_to_image)

    @property
    def error(self) -> float:
        """Standard error of `alignment`, that of the worse direction."""
        text_is_worse = self.image_to_text <= self.text_to_image
        return self.image_to_text_error if text_is_worse else self.text_to_image_error


class AlignmentProbe:
    """Images and texts, and the original model's answers to the tasks made of them.

    Args:
        original: the model before training. Its precision, device and evaluation mode are used.
        pixels: [n, 3, H, W], n >= 2, under its evaluation transform; kept as float16.
        texts: captions, at least 2; or the names of classes, which then form one task.
        seed: of the choice of candidates and of the other views.
        names: `texts` are class names, put into the templates of zero-shot classification.
        vectors: unit embeddings [len(texts), D] of `texts` by the original, if there are any: they
            stand for any model whose text tower is the original's.
        right: for each image the places of its right texts in `texts`; None: they are not known, and
            the original's probabilities take their place.

    Raises:
        DataError: the original gives no right answer, so that there is nothing to keep.
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
        right: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.pixels, self.texts, self.names = pixels.half(), list(texts), names
        self.features = self._images(original)
        self.vectors = self._embedded(original) if vectors is None else vectors.float()
        similarities = self.features @ self.vectors.T  # in `measure`'s order: the same bits
        self.image_to_text: Truth | Beliefs
        self.text_to_image: Truth | Beliefs
        if right is None:
            count = len(self.texts)
            text_tasks = (
                [np.arange(count)] if names else _candidates(count, seed, Stream.PROBE_TEXT_TASKS)
            )
            image_tasks = _candidates(len(pixels), seed, Stream.PROBE_IMAGE_TASKS)
            generator = random_generator(seed, Stream.PROBE_VIEWS)
            logits = original.logit_scale * (self._images(original, generator) @ self.vectors.T)
            self.image_to_text = Beliefs(similarities, logits, text_tasks)
            self.text_to_image = Beliefs(similarities.T, logits.T, image_tasks)
            return
        mask = torch.zeros(similarities.shape, dtype=torch.bool)
        for image, own in enumerate(right):
            mask[image, list(own)] = True
        self.image_to_text = Truth(
            similarities, mask, len(self.texts) if names else KNOWN_CANDIDATES, alike=not names
        )
        self.text_to_image = Truth(similarities.T, mask.T, KNOWN_CANDIDATES, alike=not names)

    def measure(self, clip: ClipModel, *, images: bool = True, texts: bool = False) -> Kept:
        """What `clip` keeps of the original's accuracy.

        Args:
            clip: a model with the original's tokenizer and transform, in any state of training.
            images: embed the images anew, by its image tower; else the original's embeddings serve.
            texts: likewise the texts, by its text tower.
        """
        features = self._images(clip) if images else self.features
        vectors = self._embedded(clip) if texts else self.vectors
        similarities = features @ vectors.T
        to_text, to_text_error = self.image_to_text.kept(similarities)
        to_image, to_image_error = self.text_to_image.kept(similarities.T)
        return Kept(to_text, to_image, to_text_error, to_image_error)

    def _images(self, clip: ClipModel, views: np.random.Generator | None = None) -> Tensor:
        """Embeddings of the images or, with the generator `views`, of other views of them."""
        parts = (part.float() for part in self.pixels.split(BATCH))
        if views is not None:
            parts = (other_views(part, views) for part in parts)
        return torch.cat([clip.encode_images(part) for part in parts])

    def _embedded(self, clip: ClipModel) -> Tensor:
        if self.names:
            return zero_shot_classifier(clip, self.texts, TEMPLATES)
        return clip.encode_texts(self.texts)


class Beliefs:
    """One direction's tasks, judged by the original's probabilities: rows are queries.

    `similarities` [Q, C] over all candidates decide the original's answers; `logits` [Q, C], of the
    other views, what it believes. A task is a set of columns.
    """

    def __init__(self, similarities: Tensor, logits: Tensor, tasks: list[Indices]) -> None:
        self.tasks = tasks
        self._shares = [logits[:, task].softmax(1) for task in tasks]
        self._own = self._given(similarities)

    def kept(self, similarities: Tensor) -> tuple[float, float]:
        """Mean p0 of the answers over mean p0 of the original's, and its standard error."""
        return ratio_of_sums(self._given(similarities), self._own)

    def _given(self, similarities: Tensor) -> Tensor:
        """Sum over all tasks of p0 of the answers, float64 [Q]."""
        given = torch.zeros(len(similarities), dtype=torch.float64)
        for task, share in zip(self.tasks, self._shares, strict=True):
            answers = similarities[:, task].argmax(1, keepdim=True)
            given += share.gather(1, answers).double()[:, 0]
        return given


class Truth:
    """One direction's tasks, judged by the right answers: bool [Q, C], rows are queries.

    `candidates`: how many at most; halved until the original's accuracy is `EASY`, or `CANDIDATES` are
    left. `alike`: queries with the same right answers show the same, and count as one observation.
    """

    def __init__(
        self, similarities: Tensor, right: Tensor, candidates: int, *, alike: bool = False
    ) -> None:
        self._right, self.candidates = right, candidates
        self._own = right_answers(similarities, right, candidates)
        while self.accuracy < EASY and self.candidates > CANDIDATES:
            self.candidates = max(CANDIDATES, self.candidates // 2)
            self._own = right_answers(similarities, right, self.candidates)
        if not self.accuracy:
            raise DataError(
                "the original model gives no right answer to the probe's tasks, so there is no "
                "alignment to keep; give probe_data that it knows, or leave out their captions or "
                "class names and give probe_captions, or no alignment_budget"
            )
        self.groups: Tensor | None = None
        if alike:
            asked = right[right.any(1)]
            self.groups = torch.unique(asked, dim=0, return_inverse=True)[1]

    @property
    def accuracy(self) -> float:
        """The share of right answers that the original gives."""
        return float(self._own.mean())

    def kept(self, similarities: Tensor) -> tuple[float, float]:
        """Right answers over the original's, and the standard error of this ratio."""
        found = right_answers(similarities, self._right, self.candidates)
        return ratio_of_sums(found, self._own, self.groups)


def ratio_of_sums(found: Tensor, own: Tensor, groups: Tensor | None = None) -> tuple[float, float]:
    """Sum of `found` over sum of `own`, and the standard error of this ratio.

    The error is the linearised one of a ratio estimator with clusters (Cochran, Sampling Techniques,
    1977, chapters 6 and 9A): both are of the same queries, so what they share cancels.

    Args:
        found: float64 [Q], of each query.
        own: likewise.
        groups: int64 [Q], which cluster each query is of; default: each is its own.
    """
    total = own.sum()
    ratio = found.sum() / total
    rests = found - ratio * own
    if groups is not None:
        rests = torch.zeros(int(groups.max()) + 1, dtype=rests.dtype).index_add_(0, groups, rests)
    count = len(rests)
    error = (rests.square().sum() * count / max(1, count - 1)).sqrt() / total
    return float(ratio), float(error)


def right_answers(similarities: Tensor, right: Tensor, candidates: int) -> Tensor:
    """Each query's chance of a right answer over random sets of candidates, float64 [asked].

    A set holds one of the query's right candidates and `candidates` - 1 of its wrong ones (all, if
    there are fewer); the answer is the most similar one, in a tie a wrong one. Of N wrong candidates,
    g at least as similar as the right one, sets of k have none of the g with the probability
    C(N - g, k) / C(N, k): the mean over all sets, without drawing any.

    Args:
        similarities: float [Q, C] of queries to candidates.
        right: bool [Q, C]. For a query with several right ones it is their mean; one without any is
            left out.
        candidates: at least 1.
    """
    queries, answers = right.nonzero(as_tuple=True)
    above = torch.cat(
        [
            # `not more similar` instead of `as similar`: a NaN is no right answer
            (~(similarities[q, a][:, None] > similarities[q]) & ~right[q]).sum(1)
            for q, a in zip(queries.split(PAIRS), answers.split(PAIRS), strict=True)
        ]
    ).double()
    wrong = (~right).sum(1)[queries].double()
    others = wrong.clamp(max=candidates - 1)

    def log_factorial(number: Tensor) -> Tensor:
        return torch.lgamma(number.clamp(min=0) + 1)

    logarithm = (log_factorial(wrong - above) - log_factorial(wrong)) - (
        log_factorial(wrong - above - others) - log_factorial(wrong - others)
    )
    chances = torch.where(above > wrong - others, 0.0, logarithm.exp())
    counts = right.sum(1)
    sums = torch.zeros(len(right), dtype=torch.float64).index_add_(0, queries, chances)
    asked = counts > 0
    return sums[asked] / counts[asked]


def _candidates(count: int, seed: int, stream: Stream) -> list[Indices]:
    """Sets of candidates, drawn without repetition; a single one where there are few."""
    if count <= CANDIDATES:
        return [np.arange(count)]
    generator = random_generator(seed, stream)
    return [generator.choice(count, CANDIDATES, replace=False) for _ in range(TASKS)]
