"""The dimensions that are appended for image search: their head, and the gate of queries."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pymcip.configs import TrainSettings
from pymcip.data import ImageData
from pymcip.embedding import EmbeddingCache
from pymcip.metrics import full_ranking_map
from pymcip.model.appended import Gate, joined, linear_head, with_strength
from pymcip.ops.arrays import MatrixParts
from pymcip.training.image_stage import class_means
from pymcip.training.sampling import Stream, random_generator

WEIGHTS = 1.0, 1.5, 2.0, 3.0, 5.0  # of the appended dimensions beside the joint embedding
WEIGHT = 2.0  # where no classes are held out to choose one
SHAPES = (0.1, 0.0), (1.0, 0.25)  # shrinkage and power of the heads that are tried, see `fit_head`
LEAST = 1e-3  # variance within classes, in terms of that between them: of one image each it is 0
REST = 0.1  # of the covariance within classes, where there are fewer classes than dimensions
ROWS = 16_384  # that are read at a time
PROTOTYPES, SAMPLE = 16_384, 4096  # at most, of the gate and for its quantiles
QUANTILES = 0.01, 0.25

_log = logging.getLogger("pymcip.training")


def fit_appended(
    config: TrainSettings,
    joint: EmbeddingCache,
    tuned: EmbeddingCache,
    data: Sequence[ImageData],
    shapes: Sequence[tuple[float, float]],
) -> tuple[list[nn.Linear], Gate]:
    """Make heads of the tuned tower's dimensions, and the gate of queries.

    Args:
        config: the options of the run; `extra_dims` is r.
        joint: embeds by the model whose D dimensions come first.
        tuned: embeds by the tuned image tower.
        data: labelled training images; the classes of each are its own.
        shapes: shrinkage and power of each head, see `fit_head`.

    Returns:
        A head from D to r dimensions for each shape, and the gate.
    """
    labels, folders, classes = [], [], 0
    for images in data:
        folders.append((joint.images(images), tuned.images(images)))
        labels.append(images.labels[folders[-1][0].rows("img")] + classes)
        classes += images.num_classes
    of_all = np.concatenate(labels)
    features = MatrixParts([part for _, folder in folders for part in folder.parts("img")])
    covariances = class_covariances(features, of_all)
    heads = [
        fit_head(*covariances, config.extra_dims, *shape).to(tuned.clip.device) for shape in shapes
    ]
    vectors = np.concatenate([folder.vectors("img") for folder, _ in folders])
    gate = fit_gate(vectors, of_all, config.seed)
    _log.info(
        "%d dimensions appended, of %d images in %d classes; a picture query uses half of them at a "
        "cosine of %.3f to the nearest class",
        config.extra_dims, len(of_all), classes, gate.centre,
    )  # fmt: skip
    return heads, gate


def choose_head(
    joint: EmbeddingCache,
    tuned: EmbeddingCache,
    held_out: ImageData,
    heads: Sequence[nn.Linear],
    gate: Gate,
) -> tuple[int, float]:
    """Choose the head and the weight with the best image search among classes that training has not seen.

    Args:
        joint, tuned: as for `fit_appended`.
        held_out: labelled images of such classes.
        heads, gate: what `fit_appended` made of the others.

    Returns:
        The number of the head, and the weight.
    """
    device = tuned.clip.device
    folder = joint.images(held_out)
    x, features = (
        torch.from_numpy(each.vectors("img").astype(np.float32)).to(device)
        for each in (folder, tuned.images(held_out))
    )
    labels = torch.from_numpy(held_out.labels[folder.rows("img")]).to(device)
    found, strength = {}, gate.strength(x)
    for number, head in enumerate(heads):
        for weight in WEIGHTS:
            vectors = joined(x, features, head, weight)
            queries = with_strength(vectors, strength, head.out_features)
            found[number, weight] = full_ranking_map(vectors, labels, queries=queries)
    best = max(found, key=found.__getitem__)
    _log.info(
        "head %d and weight %g, by the image-to-image mAP among classes that were held out: %s",
        best[0] + 1, best[1],
        "; ".join(
            f"head {number + 1}: " + ", ".join(f"{w:g}: {found[number, w]:.1f}" for w in WEIGHTS)
            for number in range(len(heads))
        ),
    )  # fmt: skip
    return best


def class_covariances(
    features: MatrixParts, labels: npt.NDArray[np.int64]
) -> tuple[Tensor, Tensor, Tensor]:
    """Covariances within and between the classes of features [N, D].

    Returns:
        Both, float64 [D, D], and the mean of all rows, float64 [D].
    """
    count, columns = features.shape
    classes = torch.from_numpy(labels)
    sizes = torch.bincount(classes).double()
    sums = torch.zeros(len(sizes), columns, dtype=torch.float64)
    products = torch.zeros(columns, columns, dtype=torch.float64)
    for first in range(0, count, ROWS):
        rows = torch.from_numpy(features[first : first + ROWS].astype(np.float64))
        sums.index_add_(0, classes[first : first + ROWS], rows)
        products += rows.T @ rows
    mean = sums.sum(dim=0) / count
    between = torch.zeros_like(products)
    for some, size in zip(sums.split(ROWS), sizes.split(ROWS), strict=True):
        means = some / size.clamp(min=1)[:, None] - mean
        between += means.T @ (size[:, None] / count * means)
    return products / count - mean.outer(mean) - between, between, mean


def fit_head(
    within: Tensor, between: Tensor, mean: Tensor, dims: int, shrinkage: float, power: float
) -> nn.Linear:
    """Fit the linear map to `dims` dimensions that separates classes best (Fisher's discriminant analysis).

    Its rows are the directions in which classes differ most, measured by how much images of one class
    differ there; all of them weigh the same, or by how much classes differ.

    Args:
        within, between, mean: see `class_covariances`.
        dims: r; of more than D, D are made.
        shrinkage: what is added to the variance within classes in every direction, in terms of its mean.
        power: of a direction's ratio of variances that its dimension is multiplied by; 0: all the same.
    """
    eye = torch.eye(len(within), dtype=torch.float64)
    variance = torch.maximum(within.trace(), LEAST * between.trace()) / len(within)
    root = torch.linalg.cholesky(within + (shrinkage * variance + 1e-12) * eye)
    ratios = torch.linalg.solve_triangular(root, between + REST * within, upper=False)
    ratios = torch.linalg.solve_triangular(root, ratios.T, upper=False)
    values, directions = torch.linalg.eigh(ratios)
    values, directions = values[-dims:].flip(0), directions[:, -dims:].flip(1)
    scaled = directions * values.clamp(min=0) ** power
    weight = torch.linalg.solve_triangular(root.T, scaled, upper=True).T
    weight /= weight.norm()
    return linear_head(weight.float(), (-weight @ mean).float())


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
