"""Retrieval, k-NN and zero-shot metrics: pure functions of arrays, all in percent.

Common to all of them: embeddings [N, D] of any real type are L2-normalised in fp32, scores are
fp32 inner products, and rankings order by (score descending, index ascending). Where the first of
a ranking suffice they are `pymcip.ops.topk`'s, the same on every device; full rankings are made in
chunks of queries, so that memory stays bounded (a few hundred MB) for any number of rows. NumPy
arrays and tensors are taken; tensors are worked on where they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pymcip.errors import ConfigError, DataError
from pymcip.ops import topk

if TYPE_CHECKING:
    from pymcip.model import ClipModel

Array = npt.ArrayLike | Tensor

KNN_TEMPERATURE = 0.07  # of the weighted vote, as in DINO (arXiv 2104.14294)
_SCORES_AT_ONCE = 1 << 22


def full_ranking_map(embeddings: Array, labels: Array) -> float:
    """Measure image-to-image mAP over the full ranking, as GPR1200 defines it.

    Every image is a query and ranks all N images. The query itself is in the ranking and counts as
    relevant. AP = (1 / n_rel) * sum over hits of (hit number / 1-based rank), the step form.

    Args:
        embeddings: float [N, D], N >= 1.
        labels: int [N]; images with equal labels are relevant for each other.

    Returns:
        Mean AP over the N queries, percent.

    Raises:
        DataError: wrong shapes, values that are not finite, or negative labels.

    Source: Schall et al., GPR1200 (MMM 2022). Not comparable with mAP variants that leave the
    query out or that stop at rank k.
    """
    vectors = _unit(embeddings, "embeddings")
    classes = _labels(labels, "labels", vectors)
    _rows_match(vectors, "embeddings", classes, "labels")
    total = 0.0
    with _plain_fp32(vectors.device):
        for rows in _chunks(len(vectors), len(vectors)):
            relevant = classes[rows, None] == classes[None, :]
            total += float(_average_precision(vectors[rows] @ vectors.T, relevant).sum())
    return 100 * total / len(vectors)


def nearest_other_recall(embeddings: Array, labels: Array) -> float:
    """Measure R@1, all against all: how often the nearest *other* image has the query's label.

    The diagonal is masked, so an exact duplicate of the query may be its nearest neighbour. An
    image whose class has no other image can't be hit and counts as a miss.

    Args:
        embeddings: float [N, D], N >= 2.
        labels: int [N].

    Returns:
        Percent of the N images.

    Raises:
        DataError: wrong shapes, fewer than two images, values that are not finite.
    """
    vectors = _unit(embeddings, "embeddings")
    classes = _labels(labels, "labels", vectors)
    _rows_match(vectors, "embeddings", classes, "labels")
    if len(vectors) < 2:
        raise DataError(
            "R@1 needs at least 2 images (each ranks the others), got 1; give more images"
        )
    nearest, _ = _nearest_others(vectors, 1)
    return 100 * int((classes[nearest[:, 0]] == classes).sum()) / len(vectors)


def knn_classify(
    bank: Array,
    bank_labels: Array,
    queries: Array,
    k: int = 21,
    vote: Literal["weighted", "majority"] = "weighted",
    *,
    leave_one_out: bool = False,
) -> npt.NDArray[np.int64]:
    """Label each query by the vote of its k nearest bank rows.

    Args:
        bank: float [M, D].
        bank_labels: int [M], any values >= 0.
        queries: float [N, D].
        k: neighbours that vote; all of them where the bank has fewer.
        vote: `"weighted"` sums exp(cos / 0.07) by class in fp32 (DINO), ties go to the lower
            label; `"majority"` counts, ties go to the larger summed cosine, then the lower label.
        leave_one_out: the queries are the bank's own rows, in order, and no row votes for itself.

    Returns:
        int64 [N], values of `bank_labels`.

    Raises:
        ConfigError: k < 1 or an unknown vote.
        DataError: wrong shapes, an empty bank, values that are not finite.
    """
    if vote not in ("weighted", "majority"):
        raise ConfigError(f"vote={vote!r} is not allowed; allowed: 'weighted', 'majority'")
    if k < 1:
        raise ConfigError(f"k={k} is not allowed; it must be >= 1")
    known = _unit(bank, "bank")
    asked = _unit(queries, "queries").to(known.device)
    classes = _labels(bank_labels, "bank_labels", known)
    _rows_match(known, "bank", classes, "bank_labels")
    _widths_match(known, "bank", asked, "queries")
    if leave_one_out and len(asked) != len(known):
        raise DataError(
            f"leave_one_out needs the bank's own rows as queries, got {len(asked)} queries for "
            f"{len(known)} bank rows; give the same embeddings, or leave_one_out=False"
        )
    if leave_one_out and len(known) < 2:
        raise DataError("leave_one_out with one image leaves nobody to vote; give more images")
    count = min(k, len(known) - leave_one_out)
    values, compact = torch.unique(classes, return_inverse=True)
    if leave_one_out:
        neighbours, cosines = _nearest_others(known, count)
    else:
        neighbours, cosines = topk(asked, known, count)
    answers = torch.empty(len(asked), dtype=torch.int64, device=known.device)
    for rows in _chunks(len(asked), len(values)):
        voters = compact[neighbours[rows]]
        ballots = torch.zeros(len(voters), len(values), device=known.device)
        if vote == "weighted":
            ballots.scatter_add_(1, voters, torch.exp(cosines[rows] / KNN_TEMPERATURE))
            winners = ballots.argmax(dim=1)
        else:
            ballots.scatter_add_(1, voters, torch.ones_like(cosines[rows]))
            similarity = torch.zeros_like(ballots).scatter_add_(1, voters, cosines[rows])
            leading = ballots == ballots.max(dim=1, keepdim=True).values
            winners = similarity.masked_fill(~leading, -torch.inf).argmax(dim=1)
        answers[rows] = values[winners]
    return answers.cpu().numpy()


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
    if not names:
        raise ConfigError("zero-shot needs at least one class name, got none")
    if not templates or any("{}" not in template for template in templates):
        raise ConfigError(
            f"templates={list(templates)!r}: give at least one, each with {{}} for the class name"
        )
    step = max(1, batch_size // len(templates))
    parts = []
    for start in range(0, len(names), step):
        group = names[start : start + step]
        prompts = [template.replace("{}", name) for name in group for template in templates]
        features = nn.functional.normalize(clip.encode_texts(prompts, batch_size), dim=-1)
        parts.append(features.view(len(group), len(templates), -1).mean(dim=1))
    return nn.functional.normalize(torch.cat(parts), dim=-1)


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
    vectors = _unit(images, "images")
    classes = _unit(classifier, "classifier").to(vectors.device)
    targets = _labels(labels, "labels", vectors)
    _rows_match(vectors, "images", targets, "labels")
    _widths_match(vectors, "images", classes, "classifier")
    if int(targets.max()) >= len(classes):
        raise DataError(
            f"labels go up to {int(targets.max())}, but the classifier has {len(classes)} rows; "
            "give one row per class, in the order of the labels"
        )
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
    images = _unit(image_emb, "image_emb")
    texts = _unit(text_emb, "text_emb").to(images.device)
    owners = _labels(text_to_image, "text_to_image", images)
    _rows_match(texts, "text_emb", owners, "text_to_image")
    _widths_match(images, "image_emb", texts, "text_emb")
    if int(owners.max()) >= len(images):
        raise DataError(
            f"text_to_image names image row {int(owners.max())} of {len(images)} images"
        )
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
    images = _unit(image_emb, "image_emb")
    texts = _unit(class_text_emb, "class_text_emb").to(images.device)
    classes = _labels(labels, "labels", images)
    _rows_match(images, "image_emb", classes, "labels")
    _widths_match(images, "image_emb", texts, "class_text_emb")
    if int(classes.max()) >= len(texts):
        raise DataError(
            f"labels go up to {int(classes.max())}, but there are {len(texts)} class texts; give "
            "one per class, in the order of the labels"
        )
    present = torch.unique(classes)
    total = 0.0
    with _plain_fp32(images.device):
        for rows in _chunks(len(present), len(images)):
            relevant = present[rows, None] == classes[None, :]
            total += float(_average_precision(texts[present[rows]] @ images.T, relevant).sum())
    return 100 * total / len(present)


def _average_precision(scores: Tensor, relevant: Tensor) -> Tensor:
    """Compute each row's step AP, float64 [Q], of scores [Q, N]; each has a relevant column."""
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices
    rows, ranks = relevant.gather(1, order).nonzero(as_tuple=True)
    counts = relevant.sum(dim=1)
    before = counts.cumsum(0) - counts  # hits of the earlier rows, as `rows` lists them
    hit_numbers = torch.arange(1, len(rows) + 1, device=rows.device) - before[rows]
    precision = hit_numbers.double() / (ranks + 1)
    sums = torch.zeros(len(scores), dtype=torch.float64, device=scores.device)
    return sums.index_add_(0, rows, precision) / counts


def _nearest_others(vectors: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the k nearest other rows of each row [N, D], and their scores; 1 <= k < N."""
    found, scores = topk(vectors, vectors, k + 1)
    itself = found == torch.arange(len(vectors), device=vectors.device)[:, None]
    itself[:, k] |= ~itself.any(dim=1)  # k + 1 rows that are its equals may all come before it
    return found[~itself].view(-1, k), scores[~itself].view(-1, k)


def _chunks(queries: int, columns: int) -> Iterator[slice]:
    step = max(1, _SCORES_AT_ONCE // max(1, columns))
    for start in range(0, queries, step):
        yield slice(start, min(start + step, queries))


@contextlib.contextmanager
def _plain_fp32(device: torch.device) -> Iterator[None]:
    """Rank in fp32 whatever the caller has set: no autocast, no TF32 or bf16 matmul, no graph."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _tensor(values: Any) -> Tensor:
    if isinstance(values, Tensor):
        return values.detach()
    array = np.asarray(values)
    if array.dtype == np.float16 or not array.flags.writeable or not array.flags.c_contiguous:
        array = np.array(array, dtype=np.float32 if array.dtype == np.float16 else None, order="C")
    return torch.from_numpy(array)


def _unit(values: Any, name: str) -> Tensor:
    """Make unit fp32 rows [N, D]; a zero row stays zero."""
    tensor = _tensor(values)
    if tensor.ndim != 2 or 0 in tensor.shape:
        raise DataError(
            f"{name} has shape {tuple(tensor.shape)}; needed: [rows, dimensions], neither is 0"
        )
    if tensor.dtype.is_complex or tensor.dtype == torch.bool:
        raise DataError(f"{name} has dtype {tensor.dtype}; needed: real numbers")
    rows = tensor.float()
    if not bool(torch.isfinite(rows).all()):
        bad = int((~torch.isfinite(rows)).any(dim=1).sum())
        raise DataError(
            f"{name} has NaN or infinite values in {bad} of {len(rows)} rows; embed them again"
        )
    return nn.functional.normalize(rows, dim=-1)


def _labels(values: Any, name: str, like: Tensor) -> Tensor:
    """Make int64 [N], all >= 0, where `like` is."""
    tensor = _tensor(values)
    if tensor.ndim != 1 or tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        raise DataError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}; needed: integers [rows]")
    tensor = tensor.to(device=like.device, dtype=torch.int64)
    if len(tensor) and int(tensor.min()) < 0:
        raise DataError(
            f"{name} has negative values (unlabelled rows?); leave those rows out first"
        )
    return tensor


def _rows_match(vectors: Tensor, name: str, others: Tensor, other_name: str) -> None:
    if len(vectors) != len(others):
        raise DataError(
            f"{name} has {len(vectors)} rows, {other_name} has {len(others)}; give one per row"
        )


def _widths_match(first: Tensor, name: str, second: Tensor, other_name: str) -> None:
    if first.shape[1] != second.shape[1]:
        raise DataError(
            f"{name} has {first.shape[1]} dimensions, {other_name} has {second.shape[1]}; "
            "both must come from the same model"
        )
