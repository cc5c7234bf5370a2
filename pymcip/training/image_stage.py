"""The image stage: trains the image tower (gpr, mcip), and stays near the untrained model.

A stage says what its batches are and how a step's gradients come about; `loop.fit` does the rest.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from pymcip.configs import TrainSettings
from pymcip.data import ImageData
from pymcip.distributed import broadcast, is_first, rows_of, share, world
from pymcip.losses import ArcMargin, MCArcMargin
from pymcip.mining import CaptionLists, CaptionTable
from pymcip.model import ClipModel, is_convolutional
from pymcip.model.depthwise import speed_up_depthwise
from pymcip.model.towers import (
    fixed_statistics,
    image_parameters,
    image_tower_to_train_mode,
    training_batch_norms,
    unlock_image_tower,
)
from pymcip.ops import order_bank
from pymcip.ops.arrays import ChosenRows, MatrixParts
from pymcip.training.batches import (
    AugmentedImages,
    image_batches,
    reduced_transform,
    train_transform,
)
from pymcip.training.distillation import Distillation
from pymcip.training.optim import make_optimizer, parameter_groups
from pymcip.training.replicas import check_steps, gather, replicated, shard_of, total
from pymcip.training.sampling import Stream, epoch_order, random_generator, seed_micro_batch
from pymcip.training.sharding import divided

Bank: TypeAlias = np.ndarray | MatrixParts | ChosenRows

_log = logging.getLogger("pymcip.training")


def caption_bank(
    table: CaptionTable, vectors: np.ndarray | MatrixParts, negatives: str | int, seed: int
) -> tuple[Bank, CaptionLists]:
    """The caption rows that MCArcMargin runs over, not read yet, and every image's positives among them.

    `negatives`: "mined" or "batch" (rows that are a pseudo-caption of some image), "bank" (all of
    `vectors`), or n: the mined rows and a sample of the others, n rows in all (or more, if more are mined).
    """
    if negatives == "bank":
        return vectors, CaptionLists(table.indptr, table.ids)
    rows = np.unique(table.ids)
    if isinstance(negatives, int) and negatives > len(rows):
        others = np.setdiff1d(np.arange(len(vectors)), rows, assume_unique=True)
        extra = min(negatives - len(rows), len(others))
        drawn = random_generator(seed, Stream.NEGATIVES).choice(others, extra, replace=False)
        rows = np.sort(np.concatenate([rows, drawn]))
    return ChosenRows(vectors, rows), CaptionLists(table.indptr, np.searchsorted(rows, table.ids))


def order_caption_bank(
    bank: Bank, positives: CaptionLists, seed: int, device: torch.device
) -> tuple[Bank, CaptionLists]:
    """Order a bank by its clusters, so that whole cells of it can be left out of a step.

    `loss_delta` bounds what is left out (`pymcip.ops.margin_softmax`). Of several processes the first one
    finds the order.
    """
    order = broadcast(order_bank(bank, seed=seed, device=device) if is_first() else None)
    return ChosenRows(bank, order), CaptionLists(positives.indptr, order.argsort()[positives.ids])


def class_means(labels: np.ndarray, num_classes: int, vectors: np.ndarray) -> Tensor:
    """[C, D]: normalised mean of the unit embeddings [N, D] of each class's images."""
    rows = torch.from_numpy(np.asarray(vectors, dtype=np.float32))
    sums = torch.zeros(num_classes, rows.shape[1])
    return nn.functional.normalize(sums.index_add_(0, torch.from_numpy(labels), rows), dim=1)


def image_features(clip: ClipModel, pixels: Tensor, mixed: Tensor) -> tuple[Tensor, Tensor]:
    """Features of images and of their mixtures: in one pass, if they don't change each other's.

    Where batch norms take statistics of the batch, mixtures stay out of them.
    """
    if not len(mixed):
        return clip.image_features(pixels), mixed
    visual: nn.Module = clip.model.visual  # type: ignore[assignment]
    if norms := training_batch_norms(visual):
        features = clip.image_features(pixels)
        with fixed_statistics(norms):
            return features, clip.image_features(mixed)
    features = clip.image_features(torch.cat([pixels, mixed]))
    return features[: len(pixels)], features[len(pixels) :]


class ImageStage:
    """gpr: ArcMargin on class labels. mcip: ArcMargin and MCArcMargin on pseudo-captions.

    Args:
        clip: the model; its image tower is unlocked as `config` says.
        data: the N training images.
        config: the options of the run.
        class_rows: [C, D], the class matrix at the start; None: random rows, as `class_init` says.
        bank: [M, D], the caption rows of MCArcMargin, of which each process reads its own; None: no such
            loss.
        positives: the images' pseudo-captions among them.
        distillation: what is kept of the untrained model; None: nothing.
    """

    name = "image"

    def __init__(
        self,
        clip: ClipModel,
        data: ImageData,
        config: TrainSettings,
        *,
        class_rows: Tensor | None,
        bank: Bank | None = None,
        positives: CaptionLists | None = None,
        distillation: Distillation | None = None,
    ) -> None:
        self.data, self.config, self.positives = data, config, positives
        self.distillation = distillation
        self.place = (0, 0)  # epoch and step of the micro-batches given out last
        self.epochs, self.warmup = config.epochs, config.warmup
        self.samples_per_step = config.batch_size * config.accum_freq
        self.steps_per_epoch = max(1, len(data) // self.samples_per_step)
        check_steps(len(data), config.accum_freq, batch_size=config.batch_size)
        unlock_image_tower(clip, projector=config.projector, unlock_layers=config.unlock_layers)
        self.clip = clip = divided(clip, config, "image")
        # The margin losses multiply in what the model runs in; the class rows stay fp32.
        compute = "auto" if clip.precision == "amp_bf16" else "float32"
        if compute == "auto" and clip.device.type == "cpu":
            compute = "bfloat16"
        own = rows_of(data.num_classes)
        classes = ArcMargin(
            own.stop - own.start,
            clip.embed_dim,
            shard=shard_of(own),
            scale=config.scale,
            margin=config.margin,
            continuation=config.continuation,
            chunk=config.loss_chunk,
            compute=compute,
        )
        generator = torch.Generator().manual_seed(config.seed)
        shape = data.num_classes, clip.embed_dim
        if class_rows is None and config.class_init == "xavier":
            start = nn.init.xavier_uniform_(torch.empty(shape), generator=generator)
        else:
            start = torch.randn(shape, generator=generator) if class_rows is None else class_rows
            start = nn.functional.normalize(start, dim=1)
        with torch.no_grad():
            classes.weight.copy_(start[own])
        self.classes = classes.to(clip.device)
        self.heads = nn.ModuleDict({"classes": self.classes})
        self.captions: MCArcMargin | None = None
        if bank is not None:
            own = rows_of(len(bank))
            self.captions = MCArcMargin(
                torch.from_numpy(np.require(bank[own], requirements="W")).to(clip.device),
                shard=shard_of(own),
                scale=config.caption_scale,
                margin=config.caption_margin,
                continuation=config.continuation,
                positives=config.positives,
                repel=config.repel,
                chunk=config.loss_chunk,
                compute=compute,
                delta=config.loss_delta,
            )
        tower = parameter_groups(
            image_parameters(clip.model), lr=config.lr, wd=config.wd, exempt=config.wd_exempt
        )
        matrix = {
            "params": [self.classes.weight],
            "weight_decay": 0.0 if config.wd_exempt else config.wd,
            "peak_lr": config.lr_classes,
        }
        self.optimizer: torch.optim.Optimizer = make_optimizer([*tower, matrix], config)
        self.convolutional = is_convolutional(clip.model)
        if clip.device.type == "cpu" and clip.precision == "amp_bf16":
            speed_up_depthwise(clip.model)
        self.weights = {"arc_margin": 1.0}  # of the losses
        if bank is not None:
            self.weights["arc_margin"] = config.lambda_class
            self.weights["caption_margin"] = config.lambda_caption
        generic = None
        if distillation is not None:
            generic = distillation.generic
            for name in ("distill", "distill_mixtures", "distill_data"):
                self.weights[name] = distillation.weight
            if distillation.rate > 0 and not distillation.extra(config.batch_size):
                _log.warning(
                    "%g mixtures or generic images per training image, times batch_size=%d, rounds to "
                    "none; raise mixtures or batch_size to have any",
                    distillation.rate, config.batch_size,
                )  # fmt: skip
        transform = train_transform(clip, config.train_size, config.aug_cfg, config.train_resize)
        if config.reduced_decoding:
            transform, least = reduced_transform(transform)
            data = data.reduced(least)
            generic = None if generic is None else generic.reduced(least)
        self.images = AugmentedImages(data, transform, config.seed, generic)
        self.features = replicated(partial(image_features, clip), clip.model)

    def train_mode(self) -> None:
        """Put the image tower into train mode, the rest of the model into evaluation mode."""
        image_tower_to_train_mode(self.clip.model, self.config.freeze_bn_stats)

    def steps(self, epoch: int, first_step: int) -> Iterator[list[Any]]:
        """Yield each remaining step's micro-batches: pixels [B, 3, H, W] and rows int64 [B].

        Those of other processes have None in place of the pixels.
        """
        config, accumulate = self.config, self.config.accum_freq
        own = share(accumulate)
        order = epoch_order(
            self.data.labels,
            self.data.source_ids,
            generator=random_generator(config.seed, Stream.IMAGE_ORDER, epoch),
            class_balanced=config.class_balanced,
            source_weights=config.train_weights,
        )
        batch_size = config.batch_size
        if self.distillation is not None and self.distillation.generic is not None:
            shown = order[: self.steps_per_epoch * accumulate * batch_size]
            order = self.distillation.order_with_generic(shown, batch_size, epoch)
            batch_size += self.distillation.extra(batch_size)
        batches = image_batches(
            self.images,
            order,
            epoch=epoch,
            batch_size=batch_size,
            numbers=[
                step * accumulate + number
                for step in range(first_step, self.steps_per_epoch)
                for number in own
            ],
            workers=config.workers,
            pin_memory=self.clip.device.type == "cuda",
        )
        for step in range(first_step, self.steps_per_epoch):
            self.place = (epoch, step)
            starts = range(step * accumulate * batch_size, len(order), batch_size)[:accumulate]
            yield [  # fewer, if there are so few images
                next(batches)
                if number in own
                else (None, torch.from_numpy(order[start : start + batch_size]))
                for number, start in enumerate(starts)
            ]

    def backward(self, micro_batches: list[tuple[Tensor | None, Tensor]]) -> dict[str, Tensor]:
        """Mean losses over the whole step, whichever way it is cut into micro-batches.

        ArcMargin is averaged over all images, MCArcMargin over those that have pseudo-captions (or as
        `caption_mean` says), the terms of distillation each over its own images. Rows beyond `data` are
        generic images.

        Of W processes each runs its share of the micro-batches. The margin losses of W micro-batches, one
        of each process, are found together, by all of them; what distillation adds is each one's own.
        """
        device, distillation = self.clip.device, self.distillation
        all_rows = [rows.numpy() for _, rows in micro_batches]
        trained = [rows[rows < len(self.data)] for rows in all_rows]
        images_in_step = sum(map(len, trained))
        captioned, columns = 0, None
        if self.positives is not None:
            captioned = max(1, sum(int((self.positives.counts(r) > 0).sum()) for r in trained))
            if self.config.caption_mean == "all":
                captioned = images_in_step
            if self.config.negatives == "batch":
                own = np.unique(self.positives.take(np.concatenate(trained)).ids)
                columns = torch.from_numpy(own).to(device)
        extra_in_step = 0
        if distillation is not None:
            extra_in_step = max(1, sum(distillation.extra(len(rows)) for rows in trained))
            drawn = distillation.captions.vectors(*self.place, device)
        totals: dict[str, Tensor] = {}
        turns = list(
            zip(*(share(len(micro_batches), rank) for rank in range(world())), strict=True)
        )
        for number, together in zip(share(len(micro_batches)), turns, strict=True):
            seed_micro_batch(self.config.seed, Stream.IMAGE_DROPOUT, *self.place, number)
            rows, own = all_rows[number], trained[number]
            shown = np.concatenate([trained[i] for i in together])
            loaded = micro_batches[number][0]
            assert loaded is not None
            pixels = loaded.to(device, non_blocking=True)
            mixed = pixels[:0]
            if distillation is not None and distillation.generic is None:
                mixed = distillation.mixed(pixels, *self.place, number)
            if self.convolutional:
                pixels, mixed = (
                    images.contiguous(memory_format=torch.channels_last)
                    for images in (pixels, mixed)
                )
            last = together == turns[-1]
            all_features, mixed_features = self.features(pixels, mixed, last=last)
            features = all_features[: len(own)]
            gathered = gather(features)
            labels = torch.from_numpy(self.data.labels[shown]).to(device)
            parts = {"arc_margin": self.classes(gathered, labels).sum() / images_in_step}
            if self.captions is not None and self.positives is not None:
                lists = self.positives.take(shown)
                indptr = torch.from_numpy(lists.indptr).to(device)
                indices = torch.from_numpy(lists.ids).to(device)
                parts["caption_margin"] = features.new_zeros(())
                if columns is None or len(columns):  # some image of the step has a pseudo-caption
                    losses = self.captions(gathered, indptr, indices, columns=columns)
                    parts["caption_margin"] = losses.sum() / captioned
            if distillation is not None:
                known = distillation.cached(rows, device)
                divergence = distillation.sum(features, known[: len(own)], drawn)
                parts["distill"] = divergence / images_in_step
                if len(mixed):
                    taught = distillation.taught(mixed)
                    divergence = distillation.sum(mixed_features, taught, drawn)
                    parts["distill_mixtures"] = divergence / extra_in_step
                elif len(rows) > len(own):
                    generic = all_features[len(own) : len(rows)]
                    divergence = distillation.sum(generic, known[len(own) :], drawn)
                    parts["distill_data"] = divergence / extra_in_step
            weighted = (self.weights[name] * part for name, part in parts.items())
            loss = sum(weighted, torch.zeros((), device=device))
            loss.backward()  # type: ignore[no-untyped-call]
            for name, value in {"loss": loss, **parts}.items():
                totals[name] = totals.get(name, 0) + value.detach()
        local = [name for name in totals if name.startswith("distill")]
        if local and world() > 1:
            sums = total(torch.stack([totals[name] for name in local]))
            for name, value in zip(local, sums, strict=True):
                totals["loss"] = totals["loss"] + self.weights[name] * (value - totals[name])
                totals[name] = value
        return totals
