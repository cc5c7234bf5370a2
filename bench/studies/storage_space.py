"""Drawn embeddings of images, and of queries for them, that resemble those of a CLIP model."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

BLOCK = 50_000  # rows that are drawn, and added to an index, at a time


class Space:
    """One embedding space of images in clusters, whose vectors resemble those of a CLIP model.

    An image is the unit vector along MEAN m + CLUSTER c + OWN e. m is the direction that all images
    share, c that of its cluster (the images of one thing: 10 to 50), e its own; c and e are
    Gaussian with eigenvalues falling like 1 / (i + OFFSET), in a random basis. Two images then have
    a cosine around 0.5, and two of a cluster around 0.78. An image query is another photograph of
    the same thing, at a cosine around 0.9 from its image. A text query has a mean direction of its
    own, a part of its cluster's and its image's directions, and much that no image has: cosines
    around 0.17 with any image and 0.3 with its own, and a gap of 0.8 between the means of images
    and texts (0.82 for CLIP on MS-COCO: Liang et al., Mind the Gap, NeurIPS 2022).

    Every block is drawn from its number, so that any order gives the same rows.

    Args:
        dimensions: D.
        labels: int64 [N], the images' clusters.
        seed: spaces with different seeds have nothing in common but the clusters.
    """

    OFFSET = 6.0
    MEAN, CLUSTER, OWN = math.sqrt(0.5), math.sqrt(0.28), math.sqrt(0.22)
    KEPT = 0.5  # of an image's own direction, in an image query
    TEXT_MEAN, TEXT_CLUSTER, TEXT_IMAGE, TEXT_OWN = 0.75, 0.2, 0.2, 0.6
    BETWEEN = 0.33  # cosine of the mean directions of images and texts

    def __init__(self, dimensions: int, labels: Ids, seed: int) -> None:
        self.labels, self.seed, self.dimensions = labels, seed, dimensions
        generator = np.random.default_rng([seed, 0])
        eigenvalues = 1 / (np.arange(dimensions) + self.OFFSET)
        basis, _ = np.linalg.qr(generator.standard_normal((dimensions, dimensions)))
        deviations = np.sqrt(eigenvalues / eigenvalues.sum())
        self._draw = (deviations[:, None] * basis.T).astype(np.float32)
        means, _ = np.linalg.qr(generator.standard_normal((dimensions, 2)))
        self.mean = means[:, 0].astype(np.float32)
        text_mean = self.BETWEEN * means[:, 0] + math.sqrt(1 - self.BETWEEN**2) * means[:, 1]
        self.text_mean = text_mean.astype(np.float32)
        self.centres = self._directions(generator, int(labels.max()) + 1)

    def _directions(self, generator: np.random.Generator, count: int) -> Floats:
        rows = generator.standard_normal((count, len(self._draw)), np.float32)
        return rows @ self._draw

    def _known(self, ids: Ids | slice) -> Floats:
        return self.MEAN * self.mean + self.CLUSTER * self.centres[self.labels[ids]]

    def images(self, block: int) -> Floats:
        """The block's rows, unit vectors."""
        ids = slice(block * BLOCK, min((block + 1) * BLOCK, len(self.labels)))
        generator = np.random.default_rng([self.seed, 1, block])
        own = self._directions(generator, ids.stop - ids.start)
        return unit_rows(self._known(ids) + self.OWN * own)

    def image_queries(self, ids: Ids, images: Floats) -> Floats:
        """Unit vectors [Q, D]: other photographs of what `images`, the rows `ids`, show."""
        own = self._directions(np.random.default_rng([self.seed, 2]), len(ids))
        known = self._known(ids)
        other = math.sqrt(1 - self.KEPT**2) * self.OWN * own
        return unit_rows(known + self.KEPT * (images - known) + other)

    def text_queries(self, ids: Ids, images: Floats) -> Floats:
        """Unit vectors [Q, D]: texts on `images`, the rows `ids`."""
        own = self._directions(np.random.default_rng([self.seed, 3]), len(ids))
        described = self.TEXT_CLUSTER * self.centres[self.labels[ids]]
        described += self.TEXT_IMAGE * (images - self._known(ids))
        return unit_rows(self.TEXT_MEAN * self.text_mean + described + self.TEXT_OWN * own)


class AppendedSpace:
    """A joint space whose images have the dimensions of another one appended; texts have zeros there.

    See `pymcip.model.appended`. `weight`: of the appended dimensions beside the joint ones.
    """

    def __init__(self, joint: Space, appended: Space, weight: float) -> None:
        self.joint, self.appended, self.weight = joint, appended, weight
        self.labels, self.seed = joint.labels, joint.seed
        self.dimensions = joint.dimensions + appended.dimensions

    def _joined(self, joint: Floats, appended: Floats) -> Floats:
        return unit_rows(np.hstack([joint, self.weight * appended]))

    def images(self, block: int) -> Floats:
        """As those of `Space`, as the two others."""
        return self._joined(self.joint.images(block), self.appended.images(block))

    def image_queries(self, ids: Ids, images: Floats) -> Floats:
        """As those of `Space`."""
        first, last = self._parts(images)
        own = self.joint.image_queries(ids, first), self.appended.image_queries(ids, last)
        return self._joined(*own)

    def text_queries(self, ids: Ids, images: Floats) -> Floats:
        """As those of `Space`."""
        texts = self.joint.text_queries(ids, self._parts(images)[0])
        return np.pad(texts, [(0, 0), (0, self.appended.dimensions)])

    def _parts(self, images: Floats) -> tuple[Floats, Floats]:
        first, last = np.split(images, [self.joint.dimensions], axis=1)
        return unit_rows(first.copy()), unit_rows(last.copy())


def unit_rows(rows: Floats) -> Floats:
    """The rows, scaled to length 1 in place."""
    rows /= np.sqrt(np.einsum("ij,ij->i", rows, rows))[:, None]
    return rows


def cluster_labels(count: int, seed: int) -> Ids:
    """int64 [N]: clusters of 10 to 50 images, in no order."""
    generator = np.random.default_rng([seed, 4])
    sizes = generator.integers(10, 51, count // 10 + 1)
    labels = np.repeat(np.arange(len(sizes)), sizes)[:count]
    return generator.permutation(labels)


def generate(space: Space | AppendedSpace, path: Path, threads: int) -> Floats:
    """Write all rows of a space as fp32, and give them as a memory map."""
    count = len(space.labels)
    shape = (count, space.dimensions)
    rows = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)

    def write(block: int) -> None:
        rows[block * BLOCK : (block + 1) * BLOCK] = space.images(block)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(write, range(-(-count // BLOCK))))
    rows.flush()
    return np.load(path, mmap_mode="r")
