"""Options of the stage that turns images and captions into embeddings."""

from __future__ import annotations

from dataclasses import dataclass

from pymcip.configs.model import ModelOptions
from pymcip.configs.options import Source, Sources, option, required


@dataclass(frozen=True, kw_only=True)
class EmbedConfig(ModelOptions):
    """Options of `pymcip.embed`: images and captions into a clip-retrieval folder."""

    out: Source = required("folder to write: img_emb/, text_emb/, metadata/")
    images: Sources | None = option(None, "image sources: ImageFolder, CSV/TSV/parquet, tar shards")
    captions: Sources | None = option(None, "caption sources: text, TSV, parquet, tar shards")
    batch_size: int = option(64, "images (and 4x as many captions) per forward pass", at_least=1)
    part_size: int = option(100_000, "rows per part file", at_least=1)
    workers: int = option(0, "decoding processes; 0 decodes in the main process", at_least=0)
    overwrite: bool = option(False, "replace what is in `out`")

    def problems(self) -> list[str]:
        if self.images is None and self.captions is None:
            return ["nothing to embed: give images=, captions=, or both"]
        return []
