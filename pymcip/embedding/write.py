"""Embed images and captions into a folder laid out as clip-retrieval's; see `embedding.folder`.

`embed` is the stage with its options; `embed_images` and `embed_captions` take a loaded model and
indexed data. A part is complete or absent: its metadata file is renamed into place last. An
interrupted run is continued with the parts that are missing; a folder of another model, transform
or data is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet

from pymcip.configs import EmbedConfig, Source
from pymcip.contents import file_digest
from pymcip.data import Captions, ImageData, load_captions, load_images
from pymcip.data.loading import Skipped, iterate_batches
from pymcip.data.sources import some
from pymcip.embedding.folder import (
    CHECKSUM,
    METADATA,
    WHAT,
    EmbeddingFolder,
    Kind,
    Matrix,
    read_fingerprint,
    replace_left_out,
    replace_skipped,
)
from pymcip.errors import DataError, DecodeError, StaleEmbeddingsError
from pymcip.files import atomic_path, write_json
from pymcip.folders import hold
from pymcip.model import ClipModel, load_configured
from pymcip.model.clip import warn_of_cut
from pymcip.ops.arrays import MatrixParts
from pymcip.outputs import output_folder
from pymcip.progress import progress

PART_SIZE = 100_000
CAPTIONS_PER_IMAGE = 4  # captions per forward pass, in multiples of the images' batch size

_log = logging.getLogger("pymcip.embedding")
# Of a part: unit rows float16 [n, D], their metadata, and the images that have no row.
Part: TypeAlias = tuple[Matrix, pa.Table, list[Skipped]]
# From the indices of a part (int64, ascending) and a callback for the number of items done.
MakePart: TypeAlias = Callable[[npt.NDArray[np.int64], Callable[[int], Any]], Part]


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
        FolderInUseError: another process writes to `out`.
    """
    config = EmbedConfig.make(config, options)
    out = Path(config.out)
    images = None if config.images is None else load_images(config.images, labelled=False)
    captions = None if config.captions is None else load_captions(config.captions)
    clip = load_configured(config)
    ours = any((out / f"{kind}_fingerprint.json").is_file() for kind in METADATA)
    read = [] if images is None else images.files()
    size, part_size = config.batch_size, config.part_size
    with output_folder(config, resume=ours and not config.overwrite, read=read):
        if images is not None:
            embed_images(
                clip, images, out, batch_size=size, part_size=part_size, workers=config.workers
            )
        if captions is not None:
            size *= CAPTIONS_PER_IMAGE
            embed_captions(clip, captions, out, batch_size=size, part_size=part_size)
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
    known: Sequence[EmbeddingFolder] = (),
) -> EmbeddingFolder:
    """Embed all images of `data` that can be decoded; the others are listed in skipped.tsv.

    What was left out when the sources were indexed is listed there too, with the index -1.

    Args:
        clip: the model; its `preprocess_val` is the transform.
        data: N images.
        out: the folder; complete parts in it are kept.
        batch_size: images per forward pass.
        part_size: images per part file, skipped ones counted.
        workers: decoding processes; 0 decodes in this one.
        fingerprint_of_model: `clip.fingerprint("image")`, if the caller has computed it already.
        known: folders of the same model, finished or not: an image whose content is there is not
            embedded again.

    Raises:
        DataError: not one image can be decoded, or an embedding is not finite.
        StaleEmbeddingsError: the folder was made from another model, transform or data.
    """

    stored = [part for folder in known for part in folder.complete_parts("img")]

    def make_part(indices: npt.NDArray[np.int64], advance: Callable[[int], Any]) -> Part:
        vectors = np.zeros((len(indices), clip.embed_dim), np.float16)
        contents: npt.NDArray[Any] = np.full(len(indices), None)
        if stored:
            digests = np.array([_digest(data, int(index)) for index in indices], object)
            rows = _rows_of(digests, stored)
            there = rows >= 0
            vectors[there] = MatrixParts([part for part, _ in stored])[rows[there]]
            contents[there] = digests[there]
            advance(int(there.sum()))
        skipped: list[Skipped] = []
        missing = indices[contents == None]  # noqa: E711 (of each element)
        for batch in iterate_batches(
            data, missing, clip.preprocess_val, batch_size=batch_size, workers=workers
        ):
            if len(batch.indices):
                features = clip.encode_images(batch.images).numpy()
                _check_finite(features, lambda row: data.key(int(batch.indices[row])))  # noqa: B023
                vectors[batch.indices - indices[0]] = features
                contents[batch.indices - indices[0]] = batch.contents
            skipped += batch.skipped
            advance(len(batch.indices) + len(batch.skipped))
        kept = contents != None  # noqa: E711
        rows = indices[kept]
        titles = [list(data.titles(row)) for row in rows]
        labels = [data.class_names[label] if label >= 0 else None for label in data.labels[rows]]
        described = {
            "index": pa.array(rows, pa.int64()),
            "image_path": pa.array([data.key(row) for row in rows], pa.string()),
            "label": pa.array(labels, pa.string()),
            "caption": pa.array([next(iter(texts), None) for texts in titles], pa.string()),
            "captions": pa.array(titles, pa.list_(pa.string())),
            "content": pa.array(contents[kept], pa.string()),
        }
        return vectors[kept], pa.table(described), skipped

    folder = _write_parts("img", clip, data, Path(out), part_size, make_part, fingerprint_of_model)
    if data.left_out:
        with hold(folder.path, wait=True):
            replace_left_out(folder.path, data.left_out)
    skipped, listed = folder.skipped, folder.path / "skipped.tsv"
    if len(skipped) == len(data):
        reasons = some((item["reason"] for item in skipped[:6]), len(skipped))
        raise DataError(f"not one of {len(data)} images can be decoded: {reasons}. See {listed}")
    if skipped:
        _log.warning(
            "%d of %d images can't be decoded and are left out; they are listed in %s",
            len(skipped), len(data), listed,
        )  # fmt: skip
    return folder


def embed_captions(
    clip: ClipModel,
    captions: Captions,
    out: Source,
    *,
    batch_size: int = 256,
    part_size: int = PART_SIZE,
    fingerprint_of_model: str | None = None,
) -> EmbeddingFolder:
    """Embed all captions.

    Args:
        clip: the model.
        captions: N texts.
        out: the folder; complete parts in it are kept.
        batch_size: captions per forward pass.
        part_size: captions per part file.
        fingerprint_of_model: `clip.fingerprint("text")`, if the caller has computed it already.

    Raises:
        DataError: an embedding is not finite.
        StaleEmbeddingsError: the folder was made from another model, tokenizer or corpus.
    """

    def make_part(indices: npt.NDArray[np.int64], advance: Callable[[int], Any]) -> Part:
        texts = captions.slice(int(indices[0]), int(indices[-1]) + 1)
        vectors = np.empty((len(texts), clip.embed_dim), np.float16)
        cut = np.zeros(len(texts), bool)
        for start in range(0, len(texts), batch_size):
            chunk = texts[start : start + batch_size]
            encoded, cut[start : start + len(chunk)] = clip.encode_and_count(chunk)
            features = encoded.numpy()
            _check_finite(features, lambda row: repr(chunk[row]))  # noqa: B023
            vectors[start : start + len(chunk)] = features
            advance(len(chunk))
        described = {"index": indices, "caption": pa.array(texts, pa.string()), "cut": cut}
        return vectors, pa.table(described), []

    folder = _write_parts(
        "text", clip, captions, Path(out), part_size, make_part, fingerprint_of_model
    )
    warn_of_cut(folder.captions_cut, len(captions), clip.context_length)
    return folder


def _digest(data: ImageData, index: int) -> str:
    try:
        return data.digest(index)
    except DecodeError:  # it is skipped, with its reason, where it is to be decoded
        return ""


def _rows_of(
    contents: npt.NDArray[Any], stored: Sequence[tuple[Matrix, pa.Table]]
) -> npt.NDArray[np.int64]:
    """The row of each content over all stored parts, int64; -1 where it is not there."""
    chunks = [chunk for _, table in stored for chunk in table["content"].chunks]
    column = pa.chunked_array(chunks, pa.string())
    found = pa.compute.index_in(pa.array(contents, pa.string()), value_set=column)
    return pa.compute.fill_null(found, -1).to_numpy().astype(np.int64)


def _check_finite(features: Matrix, describe: Callable[[int], str]) -> None:
    finite = np.isfinite(features).all(axis=1)
    if not finite.all():
        raise DataError(
            f"the model gives an embedding that is not finite for "
            f"{describe(int(finite.argmin()))}; its weights are damaged, "
            "or the precision is too low (try precision='fp32')"
        )


def _write_parts(
    kind: Kind,
    clip: ClipModel,
    data: ImageData | Captions,
    folder: Path,
    part_size: int,
    make_part: MakePart,
    fingerprint_of_model: str | None,
) -> EmbeddingFolder:
    """Make and write the parts that are missing: indices p * part_size and up form part p."""
    total, parts = len(data), -(-len(data) // part_size)
    part_of_model = "image" if kind == "img" else "text"
    made_from = {
        "model": clip.name,
        "model_fingerprint": fingerprint_of_model or clip.fingerprint(part_of_model),
        "precision": clip.precision,
        "transform": clip.transform if kind == "img" else type(clip.tokenizer).__name__,
        "data": data.fingerprint(),
        "part_size": part_size,
        "rows": total,
        "parts": parts,
    }
    if clip.embed_dim != clip.joint_dim:
        made_from["joint_dim"] = clip.joint_dim
    names = [f"{number:0{len(str(parts - 1))}}" for number in range(parts)]
    files = [
        (
            folder / f"{kind}_emb" / f"{kind}_emb_{name}.npy",
            folder / METADATA[kind] / f"metadata_{name}.parquet",
        )
        for name in names
    ]

    def missing_parts() -> list[int]:
        _check_fresh(folder, kind, made_from)
        return [p for p in range(parts) if not all(file.is_file() for file in files[p])]

    if not missing_parts():
        return EmbeddingFolder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with hold(folder, wait=True):
        missing = missing_parts()  # another process may have made some
        if not (folder / f"{kind}_fingerprint.json").is_file():
            write_json(folder / f"{kind}_fingerprint.json", made_from)
        with progress(
            total=total,
            initial=missing[0] * part_size if missing else total,
            description=f"embedding {WHAT[kind]}",
            unit=WHAT[kind][:-1],
        ) as bar:
            for number in missing:
                indices = np.arange(number * part_size, min(total, (number + 1) * part_size))
                vectors, metadata, skipped = make_part(indices, bar.update)
                with atomic_path(files[number][0]) as temporary:
                    with temporary.open("wb") as handle:
                        np.save(handle, vectors)
                    checksum = file_digest(temporary).hex()
                if kind == "img":
                    replace_skipped(folder, int(indices[0]), int(indices[-1]), skipped)
                metadata = metadata.replace_schema_metadata({CHECKSUM: checksum})
                with atomic_path(files[number][1]) as temporary:
                    pa.parquet.write_table(metadata, temporary, write_page_checksum=True)
    return EmbeddingFolder(folder)


def _check_fresh(folder: Path, kind: Kind, made_from: dict[str, Any]) -> None:
    """Compare what the embeddings in a folder were made from, if there are any."""
    path = folder / f"{kind}_fingerprint.json"
    if not path.is_file():
        if any((folder / f"{kind}_emb").glob("*.npy")):
            raise StaleEmbeddingsError(
                f"{folder}/{kind}_emb holds embeddings without {path.name}: what they were made "
                "from is not known. Embed into another folder, or give overwrite=True"
            )
        return
    stored = read_fingerprint(path)
    names = {
        "model_fingerprint": "model",
        "precision": "precision",
        "transform": "transform" if kind == "img" else "tokenizer",
        "data": WHAT[kind],
        "part_size": "part_size",
    }
    differing = [name for name in names if stored.get(name) != made_from[name]]
    same_name = stored.get("model") == made_from["model"]
    if same_name and ("transform" in differing or "precision" in differing):
        differing.remove("model_fingerprint")  # it covers transform and precision, which differ
    if differing:
        shown = "; ".join(
            f"{names[name]}: {_shown(stored, name)}, now {_shown(made_from, name)}"
            for name in differing
        )
        raise StaleEmbeddingsError(
            f"{folder}/{kind}_emb was made with another {', '.join(names[n] for n in differing)} "
            f"({shown}). Embed into another folder, or give overwrite=True to replace this one"
        )


def _shown(made_from: dict[str, Any], name: str) -> str:
    value = str(made_from.get(name))
    if name == "model_fingerprint":
        return f"{made_from.get('model')} [{value[:8]}]"
    if name == "data":
        return f"{made_from.get('rows')} rows [{value[:8]}]"
    return " ".join(value.split())
