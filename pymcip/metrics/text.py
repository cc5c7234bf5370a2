"""Metrics between images and texts: zero-shot accuracy, R@k both ways, mAP of class descriptions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pymcip.errors import ConfigError
from pymcip.metrics.inputs import Array, as_labels, unit_pair
from pymcip.metrics.rankings import step_precisions
from pymcip.ops import topk

if TYPE_CHECKING:
    from pymcip.model import ClipModel


def zero_shot_classifier(
    clip: ClipModel, names: Sequence[str], templates: Sequence[str], *, batch_size: int = 256
) -> Tensor:
    """Make one unit vector per class: encode every template, normalise, mean, normalise.

    Args:
        clip: the model whose text tower encodes.
        names: C class names, in the order of the labels 0..C-1.
        templates: prompts with `{}` for the name, such as "a photo of a {}.".
        batch_size: prompts per forward pass.

    Returns:
        float32 [C, D] on the CPU.

    Raises:
        ConfigError: no names, no templates, or a template without `{}`.

    Source: Radford et al., CLIP (arXiv 2103.00020), prompt ensembling.
    """
    prompts = expand_prompts(names, templates)
    step = len(templates) * max(1, batch_size // len(templates))  # prompts of whole classes
    parts = [
        prompt_ensemble(
            clip.encode_texts(prompts[start : start + step], batch_size), len(templates)
        )
        for start in range(0, len(prompts), step)
    ]
    return torch.cat(parts)


def expand_prompts(names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Put every name into every template: C * T prompts, those of a name one after another.

    Args:
        names: C class names.
        templates: T prompts with `{}` for the name.

    Raises:
        ConfigError: no names, no templates, or a template without `{}`.
    """
    if not names:
        raise ConfigError("zero-shot needs at least one class name, got none")
    if not templates or any("{}" not in template for template in templates):
        raise ConfigError(
            f"templates={list(templates)!r}: give at least one, each with {{}} for the class name"
        )
    return [template.replace("{}", name) for name in names for template in templates]


def prompt_ensemble(vectors: Tensor, templates: int) -> Tensor:
    """Make one unit vector per class of float [C * templates, D]: normalise, mean, normalise."""
    unit = nn.functional.normalize(vectors, dim=-1)
    means = unit.view(-1, templates, unit.shape[-1]).mean(dim=1)
    return nn.functional.normalize(means, dim=-1)


def zero_shot_accuracy(
    images: Array, classifier: Array, labels: Array, top: Sequence[int] = (1, 5)
) -> dict[int, float]:
    """Measure the top-k accuracy of the nearest class vectors.

    Args:
        images: float [N, D].
        classifier: float [C, D], row c for label c (`zero_shot_classifier`).
        labels: int [N], 0 <= label < C.
        top: the k wanted. Where C < k every image is a hit.

    Returns:
        {k: percent of the N images whose class is among the first k}.

    Raises:
        DataError: wrong shapes, labels out of range, values that are not finite.
    """
    classes, vectors = unit_pair(classifier, "classifier", images, "images")
    targets = as_labels(labels, "labels", vectors, "images", of=(classes, "classifier"))
    first, _ = topk(vectors, classes, max([1, *top]))
    hits = first == targets[:, None]
    return {k: 100 * int(hits[:, : max(0, k)].sum()) / len(vectors) for k in top}


def cross_modal_recall(
    image_emb: Array, text_emb: Array, text_to_image: Array, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Measure text-to-image and image-to-text R@k, with any number of captions per image.

    T2I: each caption is a query against all images; a hit if its image is among the first k; mean
    over captions. I2T: each image that has a caption is a query against all captions; a hit if any
    of its own is among the first k; mean over those images. Images without a caption are
    distractors in T2I and no queries in I2T.

    Args:
        image_emb: float [N, D].
        text_emb: float [M, D].
        text_to_image: int [M], the image row that each caption belongs to.
        ks: the k wanted.

    Returns:
        {"t2i_r1": percent, ..., "i2t_r1": percent, ...}.

    Raises:
        DataError: wrong shapes, rows out of range, values that are not finite.

    Source: the COCO (Karpathy test) and Flickr30k retrieval protocol.
    """
    texts, images = unit_pair(text_emb, "text_emb", image_emb, "image_emb")
    owners = as_labels(text_to_image, "text_to_image", texts, "text_emb", of=(images, "image_emb"))
    described = torch.unique(owners)
    most = max([1, *ks])
    first, _ = topk(texts, images, most)
    t2i = first == owners[:, None]
    first, _ = topk(images[described], texts, most)
    i2t = (first >= 0) & (owners[first] == described[:, None])
    return {
        f"{way}_r{k}": 100 * int(hits[:, : max(0, k)].any(dim=1).sum()) / len(hits)
        for way, hits in (("t2i", t2i), ("i2t", i2t))
        for k in ks
    }


def class_text_map(image_emb: Array, labels: Array, class_text_emb: Array) -> float:
    """Measure text-to-image mAP with one text per class, such as a product's description.

    Each class's text ranks all N images; relevant are the images of the class. AP as in
    `full_ranking_map` (step form over the full ranking). Classes without images are left out.

    Args:
        image_emb: float [N, D].
        labels: int [N], 0 <= label < C.
        class_text_emb: float [C, D], row c for label c.

    Returns:
        Mean AP over the classes that have images, percent.

    Raises:
        DataError: wrong shapes, labels out of range, values that are not finite.
    """
    texts, images = unit_pair(class_text_emb, "class_text_emb", image_emb, "image_emb")
    classes = as_labels(labels, "labels", images, "image_emb", of=(texts, "class_text_emb"))
    present = torch.unique(classes)
    return 100 * float(step_precisions(texts[present], present, images, classes).mean())
