"""The dimensions that are appended for image search: their head, and the gate of queries."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pymcip.configs import TrainSettings
from pymcip.data import ImageData
from pymcip.embedding import EmbeddingCache
from pymcip.losses import ArcMargin
from pymcip.metrics import full_ranking_map
from pymcip.model.appended import Gate, joined, with_strength
from pymcip.ops.arrays import MatrixParts
from pymcip.training.image_stage import class_means
from pymcip.training.optim import cosine_with_warmup
from pymcip.training.sampling import Stream, random_generator

WEIGHTS = 1.0, 1.5, 2.0, 3.0, 5.0  # of the appended dimensions beside the joint embedding
WEIGHT = 2.0  # where no classes are held out to choose one
STEPS, BATCH = 300, 256  # of the head; more steps where three passes over the images take more
RATE, WARMUP = 1e-2, 20
NOISE = 0.5  # norm of what is added to the features, beside their own of 1
PROTOTYPES, SAMPLE = 16_384, 4096  # at most, of the gate and for its quantiles
QUANTILES = 0.01, 0.25

_log = logging.getLogger("pymcip.training")


def fit_appended(
    config: TrainSettings, joint: EmbeddingCache, tuned: EmbeddingCache, data: Sequence[ImageData]
) -> tuple[Tensor, Gate]:
    """Make the head of the tuned tower's dimensions, and the gate of queries.

    Args:
        config: the options of the run; `extra_dims` is r.
        joint: embeds by the model whose D dimensions come first.
        tuned: embeds by the tuned image tower.
        data: labelled training images; the classes of each are its own.

    Returns:
        The head, float32 [r, D], and the gate.
    """
    labels, folders, classes = [], [], 0
    for images in data:
        folders.append((joint.images(images), tuned.images(images)))
        labels.append(images.labels[folders[-1][0].rows("img")] + classes)
        classes += images.num_classes
    of_all = np.concatenate(labels)
    features = MatrixParts([part for _, folder in folders for part in folder.parts("img")])
    head = fit_head(features, of_all, config.extra_dims, config.seed, tuned.clip.device)
    vectors = np.concatenate([folder.vectors("img") for folder, _ in folders])
    gate = fit_gate(vectors, of_all, config.seed)
    _log.info(
        "%d dimensions appended, of %d images in %d classes; a picture query uses half of them at a "
        "cosine of %.3f to the nearest class",
        config.extra_dims, len(of_all), classes, gate.centre,
    )  # fmt: skip
    return head, gate


def choose_weight(
    joint: EmbeddingCache, tuned: EmbeddingCache, held_out: ImageData, head: Tensor, gate: Gate
) -> float:
    """Choose the weight with the best image search among classes that training has not seen.

    Args:
        joint, tuned: as for `fit_appended`.
        held_out: labelled images of such classes.
        head, gate: what `fit_appended` made of the others.
    """
    folder = joint.images(held_out)
    x, features = (
        torch.from_numpy(each.vectors("img").astype(np.float32)).to(head.device)
        for each in (folder, tuned.images(held_out))
    )
    labels = torch.from_numpy(held_out.labels[folder.rows("img")]).to(head.device)
    found, strength = {}, gate.strength(x)
    for weight in WEIGHTS:
        vectors = joined(x, features, head, weight)
        queries = with_strength(vectors, strength, len(head))
        found[weight] = full_ranking_map(vectors, labels, queries=queries)
    best = max(WEIGHTS, key=found.__getitem__)
    _log.info(
        "weight %g, by the image-to-image mAP among classes that were held out: %s",
        best, ", ".join(f"{weight:g}: {value:.1f}" for weight, value in found.items()),
    )  # fmt: skip
    return best


def fit_head(
    features: MatrixParts,
    labels: npt.NDArray[np.int64],
    dims: int,
    seed: int,
    device: torch.device,
) -> Tensor:
    """Train a linear map of unit features [N, D] to `dims` dimensions by ArcMargin.

    Noise on the features stands for other pictures of the same things.

    Returns:
        float32 [dims, D].
    """
    drawing = random_generator(seed, Stream.APPENDED_HEAD)
    columns = features.shape[1]
    first = drawing.standard_normal((dims, columns)) / math.sqrt(columns)
    head = nn.Parameter(torch.from_numpy(first).float().to(device))
    classes = int(labels.max()) + 1
    margin = ArcMargin(classes, dims).to(device)
    with torch.no_grad():
        means = class_means(labels, classes, features[np.arange(len(labels))])
        margin.weight.copy_(means.to(device) @ head.T)
    steps = max(STEPS, -(-3 * len(labels) // BATCH))
    optimizer = torch.optim.AdamW([head, margin.weight], lr=RATE, weight_decay=0.05)
    for step in range(steps):
        share = cosine_with_warmup(step, warmup=WARMUP, total=steps)
        optimizer.param_groups[0]["lr"] = RATE * share
        rows = drawing.integers(0, len(labels), BATCH)
        noise = drawing.standard_normal((len(rows), columns)) * (NOISE / math.sqrt(columns))
        x = torch.from_numpy(features[rows].astype(np.float32) + noise.astype(np.float32))
        targets = torch.from_numpy(labels[rows]).to(device)
        loss = margin(x.to(device) @ head.T, targets).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return head.detach()


def fit_gate(joint: npt.NDArray[np.float16], labels: npt.NDArray[np.int64], seed: int) -> Gate:
    """Find which joint embeddings are of the training domain, from the training images alone.

    New classes of the domain must pass. So each image is compared with the classes that are not its
    own, and the gate opens between two low quantiles of these cosines: a quarter of the way it is half
    open, at the higher one to 95 %.
    """
    classes = int(labels.max()) + 1
    drawing = random_generator(seed, Stream.APPENDED_GATE)
    means = class_means(labels, classes, joint).numpy()
    kept = np.sort(drawing.permutation(classes)[:PROTOTYPES])
    rows = np.sort(drawing.permutation(len(labels))[:SAMPLE])
    cosines = joint[rows].astype(np.float32) @ means[kept].T
    cosines[labels[rows][:, None] == kept] = -1.0
    low, high = np.quantile(cosines.max(axis=1), QUANTILES)
    width = max(float(high - low) / 4, 0.01)
    return Gate(torch.from_numpy(means[kept]), float(low) + width, width)
