"""Search in an index that `build_index` has written, by texts, pictures or both.

    index.json               the model, its fingerprint, the sources of images, and which folder
                             holds the embeddings
    embeddings-…/            an embedding folder (clip-retrieval's layout), skipped.tsv included

The search is exact, `pymcip.ops.topk` over the memory-mapped parts; or, where the index was built with
a `recall` below 1 and no filter is given, by an `ApproximateIndex` with exact scores.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from pymcip.configs import Source
from pymcip.data.decode import decode, to_rgb
from pymcip.data.loading import transformed
from pymcip.data.sources import some
from pymcip.embedding import EmbeddingFolder
from pymcip.errors import ConfigError, DataError, DecodeError, StaleEmbeddingsError
from pymcip.files import read_json
from pymcip.model import ClipModel, load
from pymcip.ops import ApproximateIndex, topk
from pymcip.ops.arrays import MatrixParts
from pymcip.search.approximate import FOLDER, nearest

ABOUT = "index.json"
FILTERS = {"label": "label", "path": "image_path"}  # what `where` may name, and its column
_AGAIN = "Build the index again with overwrite=True"

Picture = Source | Image.Image | int


@dataclass(frozen=True)
class Hit:
    """An image that was found.

    Attributes:
        path: its file, or its shard's path and the member's name.
        label: its class; None without.
        captions: the texts that come with it.
        score: its inner product with the query.
        row: its row in the index.
    """

    path: str
    label: str | None
    captions: tuple[str, ...]
    score: float
    row: int


class Index:
    """An index of images, opened for searching.

    A later `build_index` does not change an opened index: open it again to see what is new.

    Args:
        folder: what `pymcip.build_index` has written.
        clip: its model; default: loaded as the index names it.
        device: where the model is loaded to; default: a GPU if there is one.

    Raises:
        DataError: there is no index, or it is not finished or damaged.
        MissingDependencyError: it was built with a `recall` below 1, and faiss is not installed.
        StaleEmbeddingsError: it was made by another model.
        ConfigError, CheckpointError: its model can't be loaded.
    """

    def __init__(
        self, folder: Source, *, clip: ClipModel | None = None, device: str | None = None
    ) -> None:
        self.folder = Path(folder)
        about = read_about(self.folder)
        if about["embeddings"] is None:
            raise DataError(f"{folder} is not finished; run pymcip index again, which continues it")
        self.sources: list[str] = about["images"]
        self.embeddings = EmbeddingFolder(self.folder / about["embeddings"])
        self._vectors = MatrixParts(self.embeddings.parts("img"))
        self.approximate: dict[str, Any] | None = about[
            "approximate"
        ]  # recall, nprobe; None: exact
        if self.approximate is not None:
            self._approximate = ApproximateIndex.load(self.embeddings.path / FOLDER)
        metadata = self.embeddings.metadata("img")
        columns = ["image_path", "label", "captions", "content", "index"]
        # One chunk each: to take a few rows of several, Arrow goes through them all.
        self._metadata = metadata.select(columns).combine_chunks()
        options = {name: about[name] for name in ("pretrained", "image_size", "precision")}
        self.clip = clip or load(about["model"], device=device, **options)
        same = replace(self.clip, precision=about["precision"])  # bf16 or fp32 does not matter
        if same.fingerprint() != about["model_fingerprint"]:
            raise StaleEmbeddingsError(
                f"{folder} was made by {about['model']} [{about['model_fingerprint'][:8]}], which is "
                f"not {self.clip.name} [{same.fingerprint()[:8]}] as it is now. Give the model it was "
                "made by, or build the index again with overwrite=True"
            )

    def __len__(self) -> int:
        return len(self._vectors)

    def search(
        self,
        text: str | Sequence[str] | None = None,
        image: Picture | Sequence[Picture] | None = None,
        *,
        weight: float = 0.5,
        without: str | Picture | Sequence[str | Picture] = (),
        k: int = 12,
        where: dict[str, Any] | None = None,
        strength: float | None = None,
    ) -> list[Hit]:
        """Find the k images with the largest inner products with one query, largest first.

        A single text or picture is the query as it is. Otherwise all vectors are made unit; texts
        and pictures have their means, made unit again; and the query is (1 - weight) times the one
        plus weight times the other, made unit: p. With n, the unit mean of what to go away from, it
        is 2 p - n, made unit.

        Args:
            text: what to look for.
            image: pictures to look for the like of: paths, PIL images, or rows of the index (int).
            weight: of `image` beside `text`, 0 to 1; it counts only where both are given.
            without: what to go away from: texts as str, pictures as Path, PIL image or row.
            k: results, at most.
            where: only images whose "label" or "path" is one of these: {"label": ["cat", "dog"]}.
            strength: of a model's appended dimensions in picture queries, 0 (the joint model alone)
                to 1; default: by its gate. See `AppendedClip.as_queries`.

        Raises:
            ConfigError: an argument is not allowed; `where` names what is not in the index.
            DecodeError, DataError: a picture can't be read.
        """
        for name, value in (("weight", weight), ("strength", 0 if strength is None else strength)):
            if (
                isinstance(value, bool)
                or not isinstance(value, (int, float))
                or not 0 <= value <= 1
            ):
                raise ConfigError(f"{name}={value!r} is not allowed; allowed: a number from 0 to 1")
        away = _listed("without", without)
        texts, pictures = _listed("text", text), _listed("image", image)
        if not texts and not pictures:
            raise ConfigError("nothing to look for: give text=, image=, or both")
        query = self._query(texts, pictures, away, float(weight), strength)
        found, scores = self._nearest(query.numpy(), k, self._allowed(where))
        return [
            Hit(item["image_path"], item["label"], tuple(item["captions"]), score, row)
            for item, score, row in zip(
                self.describe(found), scores.tolist(), found.tolist(), strict=True
            )
        ]

    def describe(self, rows: npt.ArrayLike) -> list[dict[str, Any]]:
        """Return what the index knows of rows (int [n]): image_path, label, captions, content, index."""
        described: list[dict[str, Any]] = self._metadata.take(
            pa.array(np.asarray(rows, np.int64))
        ).to_pylist()
        return described

    def same_images(self, other: Index) -> bool:
        """Whether another index holds the same images in the same rows."""
        columns = ["image_path", "content"]
        return bool(self._metadata.select(columns).equals(other._metadata.select(columns)))

    def _query(
        self,
        texts: list[Any],
        pictures: list[Any],
        away: list[Any],
        weight: float,
        strength: float | None,
    ) -> Tensor:
        """The query, float32 [D]."""
        kinds = [self._embed_texts(texts), self._embed_pictures(pictures, strength)]
        given = torch.cat(kinds)
        if len(given) == 1 and not away:
            return given[0]
        if texts and pictures:
            wanted = (1 - weight) * _mean(kinds[0]) + weight * _mean(kinds[1])
        else:
            wanted = _mean(given)
        if away:
            others = [item for item in away if isinstance(item, str)]
            like = [item for item in away if not isinstance(item, str)]
            avoided = torch.cat([self._embed_texts(others), self._embed_pictures(like, strength)])
            wanted = 2 * normalize(wanted, dim=0) - _mean(avoided)
        return normalize(wanted, dim=0)

    def _embed_texts(self, texts: list[Any]) -> Tensor:
        for text in texts:
            if not isinstance(text, str) or not text.strip():
                raise ConfigError(
                    f"text={text!r} is not allowed; allowed: a text that is not empty"
                )
        return self.clip.encode_texts(texts)

    def _embed_pictures(self, pictures: list[Any], strength: float | None) -> Tensor:
        vectors = [torch.empty(0, self.clip.embed_dim), *map(self._embed_picture, pictures)]
        return self.clip.as_queries(torch.cat(vectors), strength)

    def _embed_picture(self, picture: Any) -> Tensor:
        """The vector of a picture as the index stores it: float32 [1, D]."""
        if isinstance(picture, int):
            if isinstance(picture, bool) or not 0 <= picture < len(self):
                raise ConfigError(
                    f"image={picture!r} is not allowed; the index has the rows 0 to {len(self) - 1}"
                )
            return torch.from_numpy(self._vectors[np.array([picture])].astype(np.float32))
        pixels = transformed(_opened(picture), self.clip.preprocess_val, "the picture")
        return self.clip.encode_images(pixels[None])

    def _allowed(self, where: dict[str, Any] | None) -> npt.NDArray[np.int64] | None:
        """The rows, ascending, that a filter admits; None: all."""
        if not where:
            return None
        admitted: Any = True
        for name, given in where.items():
            if name not in FILTERS:
                raise ConfigError(f"where={{{name!r}: …}} is not allowed; allowed: {some(FILTERS)}")
            values = [str(value) for value in _listed(f"where[{name!r}]", given)]
            if not values:
                raise ConfigError(f"where={{{name!r}: []}} is empty; give one {name} or several")
            column = self._metadata[FILTERS[name]]
            there = pa.compute.drop_null(pa.compute.unique(column)).to_pylist()
            unknown = [value for value in values if value not in set(there)]
            if unknown:
                raise ConfigError(
                    f"no image has the {name} {some(map(repr, unknown))}; there are "
                    f"{some(there) or 'none at all'}"
                )
            fits = pa.compute.is_in(column, value_set=pa.array(values, pa.string()))
            admitted = pa.compute.and_(fits, admitted)
        return np.flatnonzero(admitted.to_numpy())

    def _nearest(
        self, query: npt.NDArray[np.float32], k: int, rows: npt.NDArray[np.int64] | None
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Rows and scores of the best k of `rows`, one part of them in memory at a time."""
        most = min(k, len(self)) if isinstance(k, int) else k  # topk refuses what is no number
        if rows is None and self.approximate is not None and isinstance(most, int) and most > 0:
            nprobe = self.approximate["nprobe"]
            return nearest(self._approximate, query, self._vectors.parts, most, nprobe)
        if rows is None:
            ids, scores = topk(query[None], self._vectors.parts, most)
            return ids[0], scores[0]
        found, values = [], []
        for first, last in itertools.pairwise(self._vectors.starts):
            chosen = rows[(rows >= first) & (rows < last)]
            ids, scores = topk(query[None], self._vectors[chosen], most)
            there = ids[0] >= 0
            found.append(chosen[ids[0][there]])
            values.append(scores[0][there])
        row, score = np.concatenate(found), np.concatenate(values)
        best = np.lexsort((row, -score))[:most]
        return row[best], score[best]


def read_about(folder: Path) -> dict[str, Any]:
    """Read what an index is made of.

    Raises:
        DataError: there is no index, or its file is damaged.
    """
    if not (folder / ABOUT).is_file():
        raise DataError(f"{folder} is no index: there is no {ABOUT} in it. Make one: pymcip index")
    fields = {
        "images": list, "model": str, "pretrained": (str, type(None)), "image_size": (int, type(None)),
        "precision": str, "model_fingerprint": str, "embeddings": (str, type(None)),
        "approximate": (dict, type(None)),
    }  # fmt: skip
    about: dict[str, Any] = read_json(folder / ABOUT, fields, _AGAIN)
    return about


def _listed(name: str, given: Any) -> list[Any]:
    """One value or several as a list."""
    if given is None:
        return []
    if isinstance(given, (str, os.PathLike, Image.Image, int)):
        return [given]
    if isinstance(given, (list, tuple)):
        return list(given)
    raise ConfigError(f"{name}={given!r} is not allowed; allowed: one value, or a list of them")


def _opened(picture: Any) -> Image.Image:
    if isinstance(picture, Image.Image):
        try:
            return to_rgb(picture)
        except (OSError, ValueError) as error:  # also where its file is damaged
            raise DecodeError(f"the PIL image can't be converted to RGB: {error}") from error
    if not isinstance(picture, (str, os.PathLike)):
        raise ConfigError(
            f"image={picture!r} is not allowed; allowed: a path, a PIL image or a row"
        )
    try:
        return decode(Path(picture).read_bytes(), str(picture))
    except OSError as error:
        raise DataError(f"the picture {picture} can't be read: {error.strerror}") from error


def _mean(vectors: Tensor) -> Tensor:
    """The unit mean [D] of vectors [N, D] that are made unit before."""
    return normalize(normalize(vectors, dim=1).mean(dim=0), dim=0)
