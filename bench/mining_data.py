"""The embedding folder that the bench of mining works on: drawn rows that resemble a model's."""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch

CAPTIONS_PER_CLUSTER = 600


class Spectrum:
    """Unit rows like those of a model: clusters, a mean that all share, a spectrum that decays.

    A caption has a cosine of about 0.65 with its cluster's centre, an image one of 0.42, so that of
    an image and a caption of its cluster is around 0.3. Blocks are drawn on their own, each from
    its number: any order and any number of threads give the same rows.
    """

    # Stream (0 would be the centres' own: seeds [0, 0, 0] and 0 are one), own, noise.
    KINDS: ClassVar = {"img": (2, 0.42, 0.85), "text": (1, 0.65, 0.7)}

    def __init__(self, dim: int, clusters: int, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        self.dim, self.seed = dim, seed
        self.centres = _unit(generator.standard_normal((clusters, dim), np.float32))
        self.mean = 0.3 * _unit(generator.standard_normal((1, dim), np.float32))
        self.spectrum = (1 + np.arange(dim, dtype=np.float32) / 64) ** np.float32(-0.5)

    def rows(self, kind: str, block: int, count: int) -> np.ndarray:
        """fp16 [count, D]: the block's rows."""
        number, own, noise = self.KINDS[kind]
        generator = np.random.default_rng([self.seed, number, block])
        rows = generator.standard_normal((count, self.dim), np.float32)
        rows *= self.spectrum
        rows *= noise / _norms(rows)
        rows += np.float32(own) * self.centres[generator.integers(0, len(self.centres), count)]
        rows += self.mean
        rows /= _norms(rows)
        return torch.from_numpy(rows).half().numpy()


def _norms(rows: np.ndarray) -> np.ndarray:
    return np.sqrt(np.einsum("ij,ij->i", rows, rows))[:, None]


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / _norms(rows)


def generate(folder: Path, options: argparse.Namespace) -> float:
    """Write the embedding folder, unless it is there; seconds."""
    start = time.perf_counter()
    spectrum = Spectrum(options.dim, max(1, options.captions // CAPTIONS_PER_CLUSTER))
    layout = {"img": (options.images, "metadata"), "text": (options.captions, "text_metadata")}
    jobs = []
    for kind, (count, metadata) in layout.items():
        (folder / f"{kind}_emb").mkdir(parents=True, exist_ok=True)
        (folder / metadata).mkdir(exist_ok=True)
        for part, first in enumerate(range(0, count, options.part_rows)):
            jobs.append((kind, metadata, part, first, min(options.part_rows, count - first)))

    def write(job: tuple[str, str, int, int, int]) -> None:
        kind, metadata, part, first, count = job
        described = folder / metadata / f"metadata_{part}.parquet"
        if described.is_file():
            return
        np.save(folder / f"{kind}_emb" / f"{kind}_emb_{part}.npy", spectrum.rows(kind, part, count))
        names = [
            f"number {row} of the things that one could say" for row in range(first, first + count)
        ]
        column = "image_path" if kind == "img" else "caption"
        pa.parquet.write_table(
            pa.table({"index": range(first, first + count), column: names}), described
        )

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, jobs))
    return time.perf_counter() - start
