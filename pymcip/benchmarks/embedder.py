"""Unit vectors of images and texts, each embedded once per model, from a cache on the disk."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pymcip.data import Captions, ImageData
from pymcip.data.sources import some
from pymcip.data.tally import LeftOut
from pymcip.embedding import EmbeddingCache, EmbeddingFolder
from pymcip.errors import DataError
from pymcip.metrics import expand_prompts, prompt_ensemble
from pymcip.metrics.inputs import Int64

_log = logging.getLogger("pymcip.benchmarks")


class CachedEmbedder:
    """Unit vectors from an embedding cache: what is in it already is not embedded again.

    Vectors went through float16, as all embedding folders hold it, whether just made or read.

    Attributes:
        texts_cut: how many of the texts so far were longer than the model's context.
    """

    def __init__(self, cache: EmbeddingCache) -> None:
        self.cache = cache
        self.texts_cut = 0
        self._folders: dict[ImageData, EmbeddingFolder] = {}
        self._classifiers: dict[tuple[tuple[str, ...], tuple[str, ...]], Tensor] = {}

    def decodable(self, data: ImageData) -> Int64:
        """Embed all images; return the rows that can be decoded, int64 [M], and log the others.

        Raises:
            DataError: not one image can be decoded.
        """
        skipped = self._folder(data).skipped
        for item in skipped:
            _log.warning("left out: %s", item["reason"])
        return _other_rows(data, [item["index"] for item in skipped])

    def undecodable(self, data: ImageData) -> list[LeftOut]:
        """Return the images that can't be decoded, and why."""
        return [LeftOut(item["key"], item["reason"]) for item in self._folder(data).skipped]

    def contents(self, data: ImageData) -> list[str]:
        """Return what identifies the content of each image that can be decoded: M digests."""
        return self._folder(data).contents()

    def images(self, data: ImageData, rows: Int64 | None = None) -> Tensor:
        """Return float32 [N, D] of all images, or of `rows` [N], on the model's device.

        Raises:
            DataError: one of the N can't be decoded; all images are embedded nevertheless.
        """
        folder = self._folder(data)
        skipped = folder.skipped
        lost = [item for item in skipped if rows is None or item["index"] in rows]
        if lost:
            raise DataError(
                f"{len(lost)} of {len(data)} images can't be decoded: "
                f"{some((item['reason'] for item in lost[:6]), len(lost))}. Replace these files; "
                "a benchmark without them is another one"
            )
        vectors = self._tensor(folder.vectors("img"))
        if rows is None:
            return vectors
        places = np.searchsorted(_other_rows(data, [item["index"] for item in skipped]), rows)
        return vectors[torch.from_numpy(places).to(vectors.device)]

    def queries(self, data: ImageData, rows: Int64 | None = None) -> Tensor:
        """Return float32 [N, D], what these images search with; raises what `images` does."""
        return self.cache.clip.as_queries(self.images(data, rows))

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Return float32 [M, D] on the model's device; equal texts are encoded once."""
        distinct = list(dict.fromkeys(texts))
        folder = self.cache.captions(Captions(distinct))
        self.texts_cut += folder.captions_cut
        vectors = self._tensor(folder.vectors("text"))
        row = {text: number for number, text in enumerate(distinct)}
        return vectors[[row[text] for text in texts]]

    def classifier(self, names: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Return float32 [C, D]: encode every template, normalise, mean, normalise."""
        key = tuple(names), tuple(templates)
        if key not in self._classifiers:
            prompts = self.texts(expand_prompts(names, templates))
            self._classifiers[key] = prompt_ensemble(prompts, len(templates))
        return self._classifiers[key]

    def _folder(self, data: ImageData) -> EmbeddingFolder:
        if data not in self._folders:
            self._folders[data] = self.cache.images(data)
        return self._folders[data]

    def _tensor(self, vectors: np.ndarray) -> Tensor:
        return torch.from_numpy(np.array(vectors, np.float32)).to(self.cache.clip.device)


def _other_rows(data: ImageData, skipped: Sequence[int]) -> Int64:
    return np.delete(np.arange(len(data)), np.array(skipped, np.int64))
