"""Embed images and captions into a folder laid out as clip-retrieval's; see `embedding.folder`.

`embed` is the stage with its options; `embed_images` and `embed_captions` take a loaded model and
indexed data. A part is complete or absent: its metadata file is renamed into place last. An
interrupted run is continued with the parts that are missing; a folder of another model, transform
or data is refused.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet

from pymcip.configs import EmbedConfig, Source, Workers
from pymcip.contents import file_digest
from pymcip.data import Captions, ImageData, load_captions, load_images
from pymcip.data.column_names import columns_named
from pymcip.data.loading import Skipped, iterate_batches, shortest_side
from pymcip.data.sources import some
from pymcip.distributed import barrier, joined
from pymcip.embedding.folder import (
    CHECKSUM,
    LISTS,
    METADATA,
    SKIPPED,
    WHAT,
    EmbeddingFolder,
    Kind,
    Matrix,
    merge_skipped,
    part_list,
    read_fingerprint,
    write_part_list,
)
from pymcip.errors import ConfigError, DataError, DecodeError, StaleEmbeddingsError
from pymcip.files import atomic_path, write_json
from pymcip.folders import hold, record_files
from pymcip.model import ClipModel, load_configured
from pymcip.model.clip import warn_of_cut
from pymcip.ops.arrays import MatrixParts
from pymcip.outputs import output_folder
from pymcip.parts import WHOLE, Shard, own_shard, refuse_overwrite
from pymcip.progress import progress

PART_SIZE = 100_000
REDUCED = 2  # times the model's size is what `reduced_decoding` leaves of the shorter side
CAPTIONS_PER_IMAGE = 4  # captions per forward pass, in multiples of the images' batch size

_log = logging.getLogger("pymcip.embedding")
# Of a part: unit rows float16 [n, D], their metadata, and the images that have no row.
Part: TypeAlias = tuple[Matrix, pa.Table, list[Skipped]]
# From the indices of a part (int64, ascending) and a callback for the number of items done.
MakePart: TypeAlias = Callable[[npt.NDArray[np.int64], Callable[[int], Any]], Part]


def embed(config: EmbedConfig | None = None, /, **options: Any) -> EmbeddingFolder:
    """Embed images, captions or both into one folder; see `EmbedConfig` for the options.

    Complete parts that are there already are kept, if they were made with the same model and data.
    Processes of torchrun, or calls with `shard`, share the parts; the folder is the same to the byte.

    Returns:
        The folder, opened; `part_counts` says whether parts of other shards are missing.

    Raises:
        ConfigError: an option is wrong, or the model is not known.
        DataError: a source is missing, empty or unsafe; or not one image could be decoded.
        StaleEmbeddingsError: `out` holds embeddings of another model, transform or data.
        OutputExistsError: `out` holds something else.
        FolderInUseError: another process writes to `out`.
    """
    config = EmbedConfig.make(config, options)
    with joined(config.device):
        return _embed(config, own_shard(config.shard))


def _embed(config: EmbedConfig, shard: Shard) -> EmbeddingFolder:
    """Embed a shard's parts, and wait for the others of torchrun."""
    refuse_overwrite(config, shard)
    out = Path(config.out)
    with columns_named(config.columns):
        images = None if config.images is None else load_images(config.images, labelled=False)
        captions = None if config.captions is None else load_captions(config.captions)
    clip = load_configured(config)
    if config.reduced_decoding and images is not None:
        images = images.reduced(REDUCED * _side(clip))
    read = () if images is None else images.files()
    size, part_size = config.batch_size, config.part_size

    def ours() -> bool:
        there = any((out / f"{kind}_fingerprint.json").is_file() for kind in METADATA)
        return there and not config.overwrite

    with output_folder(config, resume=ours, read=read, shared=shard[1] > 1):
        pass  # it is ours, and empty where it has to be; the parts hold it again
    if images is not None:
        embed_images(
            clip, images, out,
            batch_size=size, part_size=part_size, workers=config.workers, shard=shard,
        )  # fmt: skip
    if captions is not None:
        size *= CAPTIONS_PER_IMAGE
        embed_captions(clip, captions, out, batch_size=size, part_size=part_size, shard=shard)
    barrier()
    return EmbeddingFolder(out)


def embed_images(
    clip: ClipModel,
    data: ImageData,
    out: Source,
    *,
    batch_size: int = 64,
    part_size: int = PART_SIZE,
    workers: Workers = 0,
    fingerprint_of_model: str | None = None,
    shard: Shard = WHOLE,
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
        shard: (i, n) makes the parts p with p % n == i alone; see `pymcip.parts`.
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

    folder = _write_parts(
        "img", clip, data, Path(out), part_size, make_part, fingerprint_of_model, shard
    )
    complete, parts = folder.part_counts("img")
    if complete < parts:
        return folder
    if data.left_out or (folder.path / LISTS).is_dir():
        with hold(folder.path, wait=True):
            merge_skipped(folder.path, data.left_out)
    skipped, listed = folder.skipped, folder.path / SKIPPED
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
    shard: Shard = WHOLE,
) -> EmbeddingFolder:
    """Embed all captions.

    Args:
        clip: the model.
        captions: N texts.
        out: the folder; complete parts in it are kept.
        batch_size: captions per forward pass.
        part_size: captions per part file.
        fingerprint_of_model: `clip.fingerprint("text")`, if the caller has computed it already.
        shard: as of `embed_images`.

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
        "text", clip, captions, Path(out), part_size, make_part, fingerprint_of_model, shard
    )
    complete, parts = folder.part_counts("text")
    if complete == parts:
        warn_of_cut(folder.captions_cut, len(captions), clip.context_length)
    return folder


def _side(clip: ClipModel) -> int:
    """To how many pixels the model's transform resizes the shorter side."""
    side = shortest_side(clip.preprocess_val)
    if side is None:
        raise ConfigError(
            f"reduced_decoding needs a transform that resizes the shorter side of an image; the one of "
            f"{clip.name} is {' '.join(clip.transform.split())}. Leave reduced_decoding out"
        )
    return side


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
    shard: Shard,
) -> EmbeddingFolder:
    """Make and write a shard's missing parts: indices p * part_size and up form part p."""
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
    bounds = [(p * part_size, min(total, (p + 1) * part_size)) for p in range(parts)]
    number, count = shard

    def missing_parts() -> list[int]:
        _check_fresh(folder, kind, made_from)
        own = range(number, parts, count)
        return [p for p in own if not all(file.is_file() for file in files[p])]

    fingerprint = folder / f"{kind}_fingerprint.json"
    begun = fingerprint.is_file() and (folder / METADATA[kind]).is_dir()  # the last that is made
    if not missing_parts() and begun:
        return EmbeddingFolder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with hold(folder, wait=True, shared=count > 1):
        missing = missing_parts()  # another process may have made some
        lists = [folder / part_list(first, last - 1) for first, last in bounds]
        record_files([*itertools.chain(*files), *lists, fingerprint, folder / SKIPPED])
        if not fingerprint.is_file():
            write_json(fingerprint, made_from)
        for path in (folder / f"{kind}_emb", folder / METADATA[kind]):
            path.mkdir(exist_ok=True)
        rows = [last - first for first, last in bounds[number::count]]
        with progress(
            total=sum(rows),
            initial=sum(rows) - sum(bounds[p][1] - bounds[p][0] for p in missing),
            description=f"embedding {WHAT[kind]}",
            unit=WHAT[kind][:-1],
        ) as bar:
            for p in missing:
                first, last = bounds[p]
                vectors, metadata, skipped = make_part(np.arange(first, last), bar.update)
                with atomic_path(files[p][0]) as temporary:
                    with temporary.open("wb") as handle:
                        np.save(handle, vectors)
                    checksum = file_digest(temporary).hex()
                if kind == "img":
                    write_part_list(folder, first, last - 1, skipped)
                metadata = metadata.replace_schema_metadata({CHECKSUM: checksum})
                with atomic_path(files[p][1]) as temporary:
                    pa.parquet.write_table(metadata, temporary, write_page_checksum=True)
    return EmbeddingFolder(folder)


def _check_fresh(folder: Path, kind: Kind, made_from: dict[str, Any]) -> None:
    """Compare what the embeddings in a folder were made from, if there are any."""
    path = folder / f"{kind}_fingerprint.json"
    there = any((folder / f"{kind}_emb").glob("*.npy"))  # first: it is written before any of them
    if not path.is_file():
        if there:
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
