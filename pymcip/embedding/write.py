"""Embed images and captions into a folder laid out as clip-retrieval's; see `embedding.folder`.

`embed` is the stage with its options; `embed_images` and `embed_captions` take a loaded model and
indexed data. Both write part by part, and keep complete parts that are there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pymcip.configs import EmbedConfig, Source
from pymcip.data import Captions, ImageData, load_captions, load_images
from pymcip.data.loading import Skipped, iterate_batches
from pymcip.data.sources import some
from pymcip.embedding.folder import METADATA, EmbeddingFolder, Matrix
from pymcip.embedding.parts import Part, write_parts
from pymcip.errors import DataError
from pymcip.files import prepare_output
from pymcip.model import ClipModel, load_configured

PART_SIZE = 100_000
CAPTIONS_PER_IMAGE = 4  # captions per forward pass, in multiples of the images' batch size

_log = logging.getLogger("pymcip.embedding")


def embed(config: EmbedConfig | None = None, /, **options: Any) -> EmbeddingFolder:
    """Embed images, captions or both into one folder; see `EmbedConfig` for the options.

    Complete parts that are there already are kept, if they were made with the same model and data.

    Returns:
        The folder, opened.

    Raises:
        ConfigError: an option is wrong, or the model is not known.
        DataError: a source is missing, empty or unsafe; or not one image could be decoded.
        StaleEmbeddingsError: `out` holds embeddings of another model, transform or data.
        OutputExistsError: `out` holds something else.
    """
    config = EmbedConfig.make(config, options)
    out = Path(config.out)
    images = None if config.images is None else load_images(config.images, labelled=False)
    captions = None if config.captions is None else load_captions(config.captions)
    clip = load_configured(config)
    ours = any((out / f"{kind}_fingerprint.json").is_file() for kind in METADATA)
    prepare_output(
        out,
        overwrite=config.overwrite,
        resume=ours and not config.overwrite,
        inputs=(config.model, config.pretrained, config.images, config.captions),
    )
    if images is not None:
        embed_images(
            clip,
            images,
            out,
            batch_size=config.batch_size,
            part_size=config.part_size,
            workers=config.workers,
        )
    if captions is not None:
        embed_captions(
            clip,
            captions,
            out,
            batch_size=CAPTIONS_PER_IMAGE * config.batch_size,
            part_size=config.part_size,
        )
    return EmbeddingFolder(out)


def embed_images(
    clip: ClipModel,
    data: ImageData,
    out: Source,
    *,
    batch_size: int = 64,
    part_size: int = PART_SIZE,
    workers: int = 0,
    fingerprint_of_model: str | None = None,
) -> EmbeddingFolder:
    """Embed all images of `data` that can be decoded; the others are listed in skipped.tsv.

    Args:
        clip: the model; its `preprocess_val` is the transform.
        data: N images.
        out: the folder; complete parts in it are kept.
        batch_size: images per forward pass.
        part_size: images per part file, skipped ones counted.
        workers: decoding processes; 0 decodes in this one.
        fingerprint_of_model: `clip.fingerprint("image")`, if the caller has computed it already.

    Raises:
        DataError: not one image can be decoded, or an embedding is not finite.
        StaleEmbeddingsError: the folder was made from another model, transform or data.
    """
    folder = Path(out)
    made_from = {
        "model": clip.name,
        "model_fingerprint": fingerprint_of_model or clip.fingerprint("image"),
        "precision": clip.precision,
        "transform": clip.transform,
        "data": data.fingerprint(),
    }

    def make_part(indices: npt.NDArray[np.int64], advance: Callable[[int], Any]) -> Part:
        vectors = np.empty((len(indices), clip.embed_dim), np.float16)
        rows: list[int] = []
        skipped: list[Skipped] = []
        for batch in iterate_batches(
            data, indices, clip.preprocess_val, batch_size=batch_size, workers=workers
        ):
            if len(batch.indices):
                features = clip.encode_images(batch.images).numpy()
                _check_finite(features, lambda row: data.key(int(batch.indices[row])))  # noqa: B023
                vectors[len(rows) : len(rows) + len(features)] = features
                rows += batch.indices.tolist()
            skipped += batch.skipped
            advance(len(batch.indices) + len(batch.skipped))
        return Part(vectors[: len(rows)], _image_metadata(data, rows), skipped)

    opened = write_parts(folder, "img", made_from, len(data), part_size, make_part)
    skipped = opened.skipped
    if len(skipped) == len(data):
        raise DataError(
            f"not one of {len(data)} images can be decoded: "
            f"{some((item['reason'] for item in skipped[:6]), len(skipped))}. See "
            f"{folder / 'skipped.tsv'}"
        )
    if skipped:
        _log.warning(
            "%d of %d images can't be decoded and are left out; they are listed in %s",
            len(skipped),
            len(data),
            folder / "skipped.tsv",
        )
    return opened


def embed_captions(
    clip: ClipModel,
    captions: Captions,
    out: Source,
    *,
    batch_size: int = 256,
    part_size: int = PART_SIZE,
    fingerprint_of_model: str | None = None,
) -> EmbeddingFolder:
    """Embed all captions; complete parts that are in the folder already are kept.

    Args:
        clip: the model.
        captions: N texts.
        out: the folder.
        batch_size: captions per forward pass.
        part_size: captions per part file.
        fingerprint_of_model: `clip.fingerprint("text")`, if the caller has computed it already.

    Raises:
        DataError: an embedding is not finite.
        StaleEmbeddingsError: the folder was made from another model, tokenizer or corpus.
    """
    folder = Path(out)
    made_from = {
        "model": clip.name,
        "model_fingerprint": fingerprint_of_model or clip.fingerprint("text"),
        "precision": clip.precision,
        "transform": type(clip.tokenizer).__name__,
        "data": captions.fingerprint(),
    }

    def make_part(indices: npt.NDArray[np.int64], advance: Callable[[int], Any]) -> Part:
        texts = captions.slice(int(indices[0]), int(indices[-1]) + 1)
        vectors = np.empty((len(texts), clip.embed_dim), np.float16)
        for start in range(0, len(texts), batch_size):
            chunk = texts[start : start + batch_size]
            features = clip.encode_texts(chunk, batch_size=batch_size).numpy()
            _check_finite(features, lambda row: repr(chunk[row]))  # noqa: B023
            vectors[start : start + len(chunk)] = features
            advance(len(chunk))
        metadata = pa.table({"index": indices, "caption": pa.array(texts, pa.string())})
        return Part(vectors, metadata, [])

    return write_parts(folder, "text", made_from, len(captions), part_size, make_part)


def _check_finite(features: Matrix, describe: Callable[[int], str]) -> None:
    finite = np.isfinite(features).all(axis=1)
    if not finite.all():
        raise DataError(
            f"the model gives an embedding that is not finite for "
            f"{describe(int(finite.argmin()))}; its weights are damaged, "
            "or the precision is too low (try precision='fp32')"
        )


def _image_metadata(data: ImageData, rows: list[int]) -> pa.Table:
    labels = data.labels[np.array(rows, np.int64)]
    return pa.table(
        {
            "index": pa.array(rows, pa.int64()),
            "image_path": pa.array([data.key(row) for row in rows], pa.string()),
            "label": pa.array(
                [data.class_names[label] if label >= 0 else None for label in labels], pa.string()
            ),
            "caption": pa.array([next(iter(data.titles(row)), None) for row in rows], pa.string()),
        }
    )
