"""The embeddings that runs share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pymcip.configs import Source, Workers
from pymcip.data import Captions, ImageData
from pymcip.distributed import barrier
from pymcip.embedding.folder import EmbeddingFolder
from pymcip.embedding.write import CAPTIONS_PER_IMAGE, embed_captions, embed_images
from pymcip.files import fingerprint
from pymcip.model import ClipModel
from pymcip.parts import own_shard

CACHE_PART_SIZE = 20_000  # what a kill while embedding can cost a run


class EmbeddingCache:
    """Embeddings of one model in a folder that runs share: what is in it is not embedded again.

    Each set of images or captions has a subfolder, named by what it was made from. The model's
    weights must not change while the cache is in use. Processes of torchrun share the parts; all of them
    ask for the same sets in the same order. `weights`: `clip.weights` of "image" and "text", if the
    caller has them already.
    """

    def __init__(
        self,
        clip: ClipModel,
        folder: Source,
        *,
        batch_size: int = 64,
        workers: Workers = 0,
        weights: Mapping[str, str] | None = None,
    ) -> None:
        self.clip, self.folder = clip, Path(folder)
        self.batch_size, self.workers = batch_size, workers
        self._weights = weights or {}
        self._fingerprints: dict[str, str] = {}

    def images(self, data: ImageData) -> EmbeddingFolder:
        """Return the embeddings of `data`; raises what `embed_images` raises."""
        folder = embed_images(
            self.clip,
            data,
            self._folder("image", data),
            batch_size=self.batch_size,
            part_size=CACHE_PART_SIZE,
            workers=self.workers,
            fingerprint_of_model=self._fingerprint("image"),
            shard=own_shard(),
        )
        barrier()  # until the others' parts are there, if there are others
        return folder

    def captions(self, captions: Captions) -> EmbeddingFolder:
        """Return the embeddings of `captions`; raises what `embed_captions` raises."""
        folder = embed_captions(
            self.clip,
            captions,
            self._folder("text", captions),
            batch_size=CAPTIONS_PER_IMAGE * self.batch_size,
            part_size=CACHE_PART_SIZE,
            fingerprint_of_model=self._fingerprint("text"),
            shard=own_shard(),
        )
        barrier()  # until the others' parts are there, if there are others
        return folder

    def _folder(self, part: str, data: ImageData | Captions) -> Path:
        made_from = fingerprint([self._fingerprint(part), data.fingerprint()])
        return self.folder / f"{'images' if part == 'image' else 'captions'}-{made_from[:16]}"

    def _fingerprint(self, part: str) -> str:
        if part not in self._fingerprints:
            self._fingerprints[part] = self.clip.fingerprint(part, self._weights.get(part))
        return self._fingerprints[part]
