"""The text stage: re-aligns the text tower (rea) with an image tower that stays as it is."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pymcip.configs import TrainSettings
from pymcip.data import Captions, ImageData
from pymcip.data.class_names import ClassTexts
from pymcip.distributed import share
from pymcip.embedding import EmbeddingFolder
from pymcip.errors import DataError
from pymcip.losses import info_nce
from pymcip.metrics import expand_prompts
from pymcip.mining import CaptionLists, CaptionTable, bounds_of
from pymcip.model import ClipModel
from pymcip.model.clip import MAX_LOGIT_SCALE
from pymcip.model.towers import text_parameters, unlock_text_tower
from pymcip.training.optim import make_optimizer, parameter_groups
from pymcip.training.replicas import check_steps, gather, replicated
from pymcip.training.sampling import Stream, random_generator, seed_micro_batch
from pymcip.training.sharding import divided

NAME_SHARE = 0.5  # of the texts of re-alignment, where classes have names


@dataclass
class Pairs:
    """Image-caption pairs for re-alignment: per image the texts that it may be shown with.

    Attributes:
        vectors: float [N, D], unit embeddings of the images by the locked image tower.
        captions: of the N images, as numbers in `texts`.
        texts: captions and prompts, each once.
        names: int64 [N, T], the numbers in `texts` of each image's class name in T prompts.
        pictures: int64 [N], a number per picture: images of equal content have the same, and are no
            negatives of each other. None: all are different.
    """

    vectors: Tensor
    captions: CaptionLists
    texts: list[str]
    names: np.ndarray | None = None
    pictures: np.ndarray | None = None


def image_text_pairs(
    config: TrainSettings,
    data: ImageData,
    embedded: EmbeddingFolder,
    *,
    captions: Captions | None = None,
    table: CaptionTable | None = None,
    class_texts: ClassTexts | None = None,
) -> Pairs:
    """Pair every embedded image with its texts: its own captions (titles), and those given here.

    Args:
        config: options `rea_k` and `rea_templates`.
        data: the images.
        embedded: their embeddings by the image tower as it is now.
        captions: the corpus, for `table`.
        table: pseudo-captions of the images, whose rows are those of `data`.
        class_texts: names of the classes of `data`.

    Raises:
        DataError: no image has a text.
    """
    rows = embedded.rows("img")
    number: dict[str, int] = {}  # of each text, in order
    ids: list[int] = []
    counts = []
    for row in rows.tolist():
        own = list(data.titles(row))
        if table is not None and captions is not None:
            own += [captions[int(i)] for i in table[row][0][: config.rea_k]]
        own = list(dict.fromkeys(own))
        counts.append(len(own))
        ids += [number.setdefault(text, len(number)) for text in own]
    names = None
    if class_texts is not None:
        prompts = expand_prompts(class_texts.texts, config.rea_templates)
        of_name = np.array([number.setdefault(prompt, len(number)) for prompt in prompts])
        of_class = class_texts.of_class[data.labels[rows]]
        names = of_name.reshape(-1, len(config.rea_templates))[of_class]
    if not ids and names is None:
        raise DataError("re-alignment found no image with a caption; lower threshold")
    return Pairs(
        vectors=torch.from_numpy(np.array(embedded.vectors("img"))),
        captions=CaptionLists(bounds_of(counts), np.array(ids, dtype=np.int64)),
        texts=list(number),
        names=names,
        pictures=np.unique(embedded.contents(), return_inverse=True)[1],
    )


class TextStage:
    """rea: InfoNCE between locked, cached image embeddings and the text tower.

    Every epoch shows each image once, with one of its captions drawn at random; where classes have
    names, with a prompt of its class's name instead half of the time (always, if it has no caption).
    """

    name = "text"

    def __init__(self, clip: ClipModel, pairs: Pairs, config: TrainSettings) -> None:
        self.config, self.pairs = config, pairs
        self.epochs, self.warmup = config.rea_epochs, config.rea_warmup
        self.samples_per_step = config.rea_batch_size * config.accum_freq
        self.rows = np.flatnonzero((pairs.captions.counts() > 0) | (pairs.names is not None))
        self.place = (0, 0)  # epoch and step of the micro-batches given out last
        self.steps_per_epoch = max(1, len(self.rows) // self.samples_per_step)
        check_steps(len(self.rows), config.accum_freq, rea_batch_size=config.rea_batch_size)
        unlock_text_tower(clip, config.rea_unlock_layers)
        self.clip = clip = divided(clip, config, "text")
        # Made before the scale is unlocked: every process finds the whole gradient of that.
        self.features = replicated(clip.text_features, clip.model)
        trained = [*text_parameters(clip.model)]
        if config.rea_logit_scale:
            scale: nn.Parameter = clip.model.logit_scale.requires_grad_()  # type: ignore
            trained.append(("logit_scale", scale))
        groups = parameter_groups(trained, lr=config.rea_lr, wd=config.wd, exempt=config.wd_exempt)
        self.optimizer: torch.optim.Optimizer = make_optimizer(groups, config)
        self.heads = nn.ModuleDict()

    def _scale(self) -> float | Tensor:
        """CLIP's scale, at most 100; a trained one as open_clip's trainer keeps it, from 1."""
        if not self.config.rea_logit_scale:
            return self.clip.logit_scale
        stored: Tensor = self.clip.model.logit_scale  # type: ignore[assignment]
        with torch.no_grad():
            stored.clamp_(0, math.log(MAX_LOGIT_SCALE))
        return stored.exp()

    def train_mode(self) -> None:
        """Put all but the image tower into train mode."""
        self.clip.model.train()
        self.clip.model.visual.eval()  # type: ignore[union-attr,operator]

    def steps(self, epoch: int, first_step: int) -> Iterator[list[Any]]:
        """Yield each remaining step's micro-batches: numbers of images and of texts, int64 [B]."""
        generator = random_generator(self.config.seed, Stream.TEXT_ORDER, epoch)
        rows = generator.permutation(self.rows)
        captions = self._choose_texts(rows, generator)
        size, step_size = self.config.rea_batch_size, self.samples_per_step
        for step in range(first_step, self.steps_per_epoch):
            self.place = (epoch, step)
            starts = range(step * step_size, min((step + 1) * step_size, len(rows)), size)
            yield [(rows[i : i + size], captions[i : i + size]) for i in starts]

    def _choose_texts(self, rows: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Choose at random the numbers of the texts that these images are shown with."""
        pairs = self.pairs
        starts, counts = pairs.captions.indptr[rows], pairs.captions.counts(rows)
        places = starts + (generator.random(len(rows)) * counts).astype(np.int64)
        if pairs.names is None:
            return pairs.captions.ids[places]
        prompts = generator.integers(0, pairs.names.shape[1], len(rows))
        drawn = pairs.names[rows, prompts]
        captioned = (counts > 0) & (generator.random(len(rows)) >= NAME_SHARE)
        drawn[captioned] = pairs.captions.ids[places[captioned]]
        return drawn

    def backward(self, micro_batches: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, Tensor]:
        """The loss of the whole step: with several micro-batches all of it acts as negatives.

        Text features are first computed without a graph; each micro-batch is then run again with the
        gradient that the loss of the whole step has at its features (open_clip's accumulation). Of
        several processes each runs its share of the micro-batches; all find the whole loss.
        """
        device = self.clip.device
        rows = np.concatenate([rows for rows, _ in micro_batches])
        captions = np.concatenate([captions for _, captions in micro_batches])
        images = self.pairs.vectors[torch.from_numpy(rows)].to(device, torch.float32)
        pictures = rows if self.pairs.pictures is None else self.pairs.pictures[rows]
        ids = torch.from_numpy(pictures).to(device), torch.from_numpy(captions).to(device)
        scale, own = self._scale(), share(len(micro_batches))
        if len(micro_batches) == 1:
            loss = info_nce(images, self._features(0, captions, last=True), scale, *ids)
            loss.backward()  # type: ignore[no-untyped-call]
            return {"loss": loss.detach()}
        with torch.no_grad():
            parts = [self._features(i, micro_batches[i][1], last=True) for i in own]
            features = gather(torch.cat(parts))
        features.requires_grad_()
        loss = info_nce(images, features, scale, *ids)
        loss.backward()  # type: ignore[no-untyped-call]
        assert features.grad is not None
        slopes = features.grad.split([len(part) for _, part in micro_batches])
        for i in own:
            again = self._features(i, micro_batches[i][1], last=i == own[-1])
            (again * slopes[i]).sum().backward()  # type: ignore[no-untyped-call]
        return {"loss": loss.detach()}

    def _features(self, number: int, captions: np.ndarray, *, last: bool) -> Tensor:
        """The features of a micro-batch's texts, with the same dropout whenever they are made."""
        seed_micro_batch(self.config.seed, Stream.TEXT_DROPOUT, *self.place, number)
        tokens = self.clip.tokenizer([self.pairs.texts[i] for i in captions])
        features: Tensor = self.features(tokens.to(self.clip.device), last=last)
        return features
