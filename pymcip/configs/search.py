"""Options of search: making an index of images, and asking it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pymcip.configs.options import (
    WORKERS,
    Config,
    DataOptions,
    Source,
    Sources,
    Workers,
    option,
    required,
)
from pymcip.configs.stages import ModelOptions


@dataclass(frozen=True, kw_only=True)
class IndexConfig(ModelOptions, DataOptions):
    """Options of `pymcip.build_index`: a folder of images into a folder to search in."""

    images: Sources = required("image sources: ImageFolder, CSV/TSV/parquet, tar shards")
    out: Source = required("folder of the index; if it is there, it is brought up to date")
    batch_size: int = option(64, "images per forward pass", at_least=1)
    part_size: int = option(
        20_000, "rows per part file; a kill loses what is embedded of one", at_least=1
    )
    workers: Workers = option("auto", WORKERS, at_least=0)
    recall: float = option(
        1.0,
        "share of the exact results that a search finds; below 1 by an approximate index, for a million "
        "images and more (needs pymcip[faiss])",
        more_than=0,
        at_most=1,
    )
    overwrite: bool = option(False, "replace what is in `out`, whatever model it is of")


@dataclass(frozen=True, kw_only=True)
class SearchConfig(Config):
    """Options of `pymcip search`; see `pymcip.Index.search`."""

    index: Source = required("folder that pymcip index has written")
    text: tuple[str, ...] = option((), "what to look for; several texts are one query")
    image: tuple[Source, ...] = option((), "pictures to find similar images to")
    weight: float = option(
        0.5, "of pictures beside texts, where both are given: 0 to 1", at_least=0, at_most=1
    )
    without: tuple[str, ...] = option((), "texts that results should not be like")
    without_image: tuple[Source, ...] = option((), "pictures that results should not be like")
    k: int = option(12, "results, at most", at_least=1)
    label: tuple[str, ...] = option((), "only images of these labels")
    strength: float | None = option(
        None,
        "of appended dimensions in picture queries, 0 (the joint model alone) to 1; default: by the "
        "model's gate",
        at_least=0,
        at_most=1,
    )
    json: bool = option(False, "a line of JSON per result instead of a table")
    html: Source | None = option(None, "file for a page of thumbnails; it is replaced")
    model: str | None = option(None, "the index's model, where it lies elsewhere by now")
    pretrained: str | None = option(None, "the pretrained tag or checkpoint of `model`")
    device: str | None = option(None, "cpu, cuda, cuda:1, …; default: a GPU if there is one")

    def problems(self) -> list[str]:
        problems = super().problems()
        if not self.text and not self.image:
            problems.append("nothing to look for: give a text, --image, or both")
        return problems


@dataclass(frozen=True, kw_only=True)
class ServeConfig(Config):
    """Options of `pymcip serve`: a page to search an index with."""

    index: Source = required("folder that pymcip index has written")
    baseline: Source | None = option(
        None, "index of the same images by another model, shown beside the first"
    )
    host: str = option("127.0.0.1", "address to listen on; beyond this machine it takes a token")
    port: int = option(8000, "port to listen on; 0: a free one", at_least=0, at_most=65_535)
    token: str | None = option(
        None, "what every request must carry; default: none on this machine, else a random one"
    )
    device: str | None = option(None, "cpu, cuda, cuda:1, …; default: a GPU if there is one")

    def problems(self) -> list[str]:
        problems = super().problems()
        if self.token is not None and not re.fullmatch(r"[\w.~-]{8,200}", self.token, re.ASCII):
            problems.append("token= must be 8 to 200 letters, digits and . _ ~ -")
        return problems
