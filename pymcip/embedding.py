"""Embed images and captions into a folder laid out as clip-retrieval's, part by part.

    img_emb/img_emb_0.npy            float16 [n, D], unit rows
    metadata/metadata_0.parquet      index, image_path, label, caption: one line per row of img_emb
    text_emb/text_emb_0.npy          float16 [m, D], unit rows
    text_metadata/metadata_0.parquet index, caption: one line per row of text_emb
    img_fingerprint.json, text_fingerprint.json, skipped.tsv

clip-retrieval pairs images and captions row by row; here they are two corpora of different length,
so `metadata/` describes the images alone and the captions have a folder of their own. `index` is a
row's index in the `ImageData` or `Captions` it was made from: undecodable images have no row.

A part is complete or absent: its metadata file is renamed into place last. An interrupted run goes
on with the parts that are missing; a folder made from another model, transform or data is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet

from pymcip.configs import EmbedConfig, Source
from pymcip.data import Captions, ImageData, load_captions, load_images
from pymcip.data.loading import Skipped, iterate_batches
from pymcip.data.sources import natural, some
from pymcip.errors import DataError, StaleEmbeddingsError
from pymcip.files import (
    atomic_path,
    file_fingerprint,
    fingerprint,
    prepare_output,
    read_json,
    write_json,
    write_text,
)
from pymcip.model import ClipModel, load_configured
from pymcip.progress import progress

Kind = Literal["img", "text"]
PART_SIZE = 100_000
CACHE_PART_SIZE = 20_000  # what a kill while embedding can cost a run
CAPTIONS_PER_IMAGE = 4  # captions per forward pass, in multiples of the images' batch size
METADATA = {"img": "metadata", "text": "text_metadata"}
WHAT = {"img": "images", "text": "captions"}

_log = logging.getLogger("pymcip.embedding")
Matrix = npt.NDArray[Any]


class EmbeddingFolder:
    """Embeddings on disk, opened for reading: ours, or a folder that clip-retrieval wrote.

    Raises:
        DataError: there are no embeddings in the folder.
    """

    def __init__(self, path: Source) -> None:
        self.path = Path(path)
        if not any(self.has(kind) for kind in METADATA):
            raise DataError(
                f"{self.path} is no embedding folder: there is neither img_emb/ nor text_emb/ in "
                "it; write one with pymcip.embed"
            )

    def __repr__(self) -> str:
        held = [f"{WHAT[kind]} in {len(self._part_files(kind))} part(s)" for kind in METADATA]
        return f"EmbeddingFolder({str(self.path)!r}: {', '.join(held)})"

    def has(self, kind: str) -> bool:
        """Tell whether the folder holds embeddings of this kind ("img" or "text")."""
        return (self.path / f"{kind}_emb").is_dir()

    def _part_files(self, kind: str) -> list[Path]:
        return sorted((self.path / f"{kind}_emb").glob(f"{kind}_emb_*.npy"), key=natural)

    def _metadata_files(self, kind: str) -> list[Path]:
        folder = self.path / METADATA[kind]
        if kind == "text" and not folder.is_dir() and not self.fingerprint(kind):
            folder = self.path / METADATA["img"]  # clip-retrieval's own folders pair the two
        return sorted(folder.glob("metadata_*.parquet"), key=natural)

    def fingerprint(self, kind: str) -> dict[str, Any]:
        """Return what the embeddings were made from; empty if another program wrote them."""
        path = self.path / f"{kind}_fingerprint.json"
        return dict(read_json(path)) if path.is_file() else {}

    def identity(self, kind: Kind) -> list[Any]:
        """Return plain values that change whenever the embeddings do."""
        made_from = self.fingerprint(kind)
        if made_from:
            return [value for name, value in sorted(made_from.items()) if name != "model"]
        return [file_fingerprint(path) for path in self._part_files(kind)]

    def parts(self, kind: Kind) -> list[Matrix]:
        """Open the parts, each a memory-mapped float16 [n, D], in row order.

        Raises:
            DataError: there are none, one is missing, or one does not fit its metadata.
        """
        files = self._part_files(kind)
        wanted = int(self.fingerprint(kind).get("parts", len(files)))
        described = self._metadata_files(kind)
        complete = min(len(files), len(described)) if self.fingerprint(kind) else len(files)
        if not files or complete < wanted:
            raise DataError(
                f"{self.path} holds {complete} of {wanted} parts of {WHAT[kind]}; "
                "run pymcip.embed again with the same options, it goes on where it stopped"
            )
        return [_open_part(path) for path in files]

    def vectors(self, kind: Kind) -> Matrix:
        """Return all rows, float16 [N, D]: the memory map if there is one part, else in memory."""
        parts = self.parts(kind)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def has_metadata(self, kind: Kind) -> bool:
        """Tell whether the rows of this kind are described."""
        return bool(self._metadata_files(kind))

    def metadata(self, kind: Kind) -> pa.Table:
        """Return what describes the rows: `index`, `image_path`, `label`, `caption` if present.

        Raises:
            DataError: there is none, or it has another number of rows than the embeddings.
        """
        files = self._metadata_files(kind)
        if not files:
            raise DataError(f"{self.path} holds no metadata of {WHAT[kind]} (metadata_*.parquet)")
        table = pa.concat_tables(
            [pa.parquet.read_table(path) for path in files], promote_options="default"
        )
        rows = sum(len(part) for part in self.parts(kind))
        if len(table) != rows:
            raise DataError(
                f"{self.path}: {len(table)} rows of metadata for {rows} embeddings of "
                f"{WHAT[kind]}; the folder is damaged, embed into a new one"
            )
        return table

    def describe(self, kind: Kind, rows: npt.NDArray[np.int64]) -> list[dict[str, Any]]:
        """Return the metadata of some rows (ascending), holding one part of it at a time.

        Raises:
            DataError: as `metadata`.
        """
        files = self._metadata_files(kind)
        bounds = np.cumsum([0, *(pyarrow.parquet.read_metadata(path).num_rows for path in files)])
        if not files or bounds[-1] != sum(len(part) for part in self.parts(kind)):
            self.metadata(kind)  # refuses them
        described: list[dict[str, Any]] = []
        for path, first, last in zip(files, bounds, bounds[1:], strict=False):
            wanted = rows[(rows >= first) & (rows < last)] - first
            if len(wanted):
                described += pyarrow.parquet.read_table(path).take(wanted).to_pylist()
        return described

    def rows(self, kind: Kind) -> npt.NDArray[np.int64]:
        """Return the index, in the data, of each embedded row: int64 [N], ascending."""
        if self.has_metadata(kind):
            table = self.metadata(kind)
            if "index" in table.column_names:
                return table["index"].to_numpy().astype(np.int64)
        return np.arange(sum(len(part) for part in self.parts(kind)), dtype=np.int64)

    def captions(self) -> list[str]:
        """Return the embedded captions' texts, in row order."""
        table = self.metadata("text")
        if "caption" not in table.column_names:
            raise DataError(f"{self.path}: the metadata has no column caption, only {table.schema}")
        texts: list[str] = table["caption"].to_pylist()
        return texts

    @property
    def skipped(self) -> list[dict[str, Any]]:
        """Images that could not be decoded: index (in the data), key, reason."""
        return [
            {"index": item.index, "key": item.key, "reason": item.reason}
            for item in _read_skipped(self.path)
        ]


@dataclass
class _Part:
    """What one part consists of, before it is written."""

    vectors: Matrix  # float16 [n, D]
    metadata: pa.Table  # n rows
    skipped: list[Skipped]


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

    def make_part(indices: npt.NDArray[np.int64], advance: Callable[[int], Any]) -> _Part:
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
        return _Part(vectors[: len(rows)], _image_metadata(data, rows), skipped)

    opened = _write_parts(folder, "img", made_from, len(data), part_size, make_part)
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

    def make_part(indices: npt.NDArray[np.int64], advance: Callable[[int], Any]) -> _Part:
        texts = captions.slice(int(indices[0]), int(indices[-1]) + 1)
        vectors = np.empty((len(texts), clip.embed_dim), np.float16)
        for start in range(0, len(texts), batch_size):
            chunk = texts[start : start + batch_size]
            features = clip.encode_texts(chunk, batch_size=batch_size).numpy()
            _check_finite(features, lambda row: repr(chunk[row]))  # noqa: B023
            vectors[start : start + len(chunk)] = features
            advance(len(chunk))
        metadata = pa.table({"index": indices, "caption": pa.array(texts, pa.string())})
        return _Part(vectors, metadata, [])

    return _write_parts(folder, "text", made_from, len(captions), part_size, make_part)


class EmbeddingCache:
    """Embeddings of one model in a folder that runs share: what is in it is not embedded again.

    Each set of images or captions has a subfolder, named by what it was made from. The model's weights
    must not change while the cache is in use.
    """

    def __init__(
        self, clip: ClipModel, folder: Source, *, batch_size: int = 64, workers: int = 0
    ) -> None:
        self.clip = clip
        self.folder = Path(folder)
        self.batch_size = batch_size
        self.workers = workers
        self._fingerprints: dict[str, str] = {}

    def images(self, data: ImageData) -> EmbeddingFolder:
        """Return the embeddings of `data`; raises what `embed_images` raises."""
        return embed_images(
            self.clip,
            data,
            self._folder("images", "image", data),
            batch_size=self.batch_size,
            part_size=CACHE_PART_SIZE,
            workers=self.workers,
            fingerprint_of_model=self._fingerprint("image"),
        )

    def captions(self, captions: Captions) -> EmbeddingFolder:
        """Return the embeddings of `captions`; raises what `embed_captions` raises."""
        return embed_captions(
            self.clip,
            captions,
            self._folder("captions", "text", captions),
            batch_size=CAPTIONS_PER_IMAGE * self.batch_size,
            part_size=CACHE_PART_SIZE,
            fingerprint_of_model=self._fingerprint("text"),
        )

    def _folder(self, name: str, part: str, data: ImageData | Captions) -> Path:
        return (
            self.folder
            / f"{name}-{fingerprint([self._fingerprint(part), data.fingerprint()])[:16]}"
        )

    def _fingerprint(self, part: str) -> str:
        if part not in self._fingerprints:
            self._fingerprints[part] = self.clip.fingerprint(part)
        return self._fingerprints[part]


def _write_parts(
    folder: Path,
    kind: Kind,
    made_from: dict[str, Any],
    total: int,
    part_size: int,
    make_part: Callable[[npt.NDArray[np.int64], Callable[[int], Any]], _Part],
) -> EmbeddingFolder:
    """Make and write the parts that are missing: indices p * part_size and up form part p."""
    parts = -(-total // part_size)
    made_from = {**made_from, "part_size": part_size, "rows": total, "parts": parts}
    _check_fresh(folder, kind, made_from)
    width = len(str(parts - 1))
    with ExitStack() as stack:
        bar = None
        for number in range(parts):
            name = f"{number:0{width}}"
            vectors_file = folder / f"{kind}_emb" / f"{kind}_emb_{name}.npy"
            metadata_file = folder / METADATA[kind] / f"metadata_{name}.parquet"
            indices = np.arange(number * part_size, min(total, (number + 1) * part_size))
            if vectors_file.is_file() and metadata_file.is_file():
                continue
            if bar is None:
                bar = stack.enter_context(
                    progress(
                        total=total,
                        initial=int(indices[0]),
                        description=f"embedding {WHAT[kind]}",
                        unit=WHAT[kind][:-1],
                    )
                )
            part = make_part(indices, bar.update)
            with atomic_path(vectors_file) as temporary, temporary.open("wb") as handle:
                np.save(handle, part.vectors)
            if kind == "img":
                _write_skipped(folder, indices, part.skipped)
            with atomic_path(metadata_file) as temporary:
                pa.parquet.write_table(part.metadata, temporary)
    return EmbeddingFolder(folder)


def _check_fresh(folder: Path, kind: Kind, made_from: dict[str, Any]) -> None:
    """Write the fingerprint of a new folder; compare it with the one that is there."""
    path = folder / f"{kind}_fingerprint.json"
    if not path.is_file():
        if any((folder / f"{kind}_emb").glob("*.npy")):
            raise StaleEmbeddingsError(
                f"{folder}/{kind}_emb holds embeddings without {path.name}: what they were made "
                "from is not known. Embed into another folder, or give overwrite=True"
            )
        write_json(path, made_from)
        return
    stored = read_json(path)
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


def _open_part(path: Path) -> Matrix:
    try:
        part = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError) as error:
        raise DataError(f"{path} can't be read as a NumPy array: {error}") from error
    if part.ndim != 2 or part.dtype not in (np.float16, np.float32):
        raise DataError(
            f"{path} is {part.dtype} {list(part.shape)}; expected float16 (or float32) [rows, D]"
        )
    opened: Matrix = part
    return opened


def _check_finite(features: Matrix, describe: Callable[[int], str]) -> None:
    finite = np.isfinite(features).all(axis=1)
    if not finite.all():
        raise DataError(
            f"the model gives an embedding that is not finite for "
            f"{describe(int(finite.argmin()))}; its weights are damaged, or the precision is too low (try precision='fp32')"
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


def _read_skipped(folder: Path) -> list[Skipped]:
    path = folder / "skipped.tsv"
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    cells = (line.split("\t") for line in lines)
    return [Skipped(int(index), key, reason) for index, key, reason in cells]


def _write_skipped(folder: Path, indices: npt.NDArray[np.int64], skipped: list[Skipped]) -> None:
    """Replace the lines of one part; without any skipped image there is no file."""
    first, last = indices[0], indices[-1]
    others = [item for item in _read_skipped(folder) if not first <= item.index <= last]
    if not skipped and len(others) == len(_read_skipped(folder)):
        return
    merged = sorted([*others, *skipped], key=lambda item: item.index)
    write_text(folder / "skipped.tsv", "".join(_skipped_lines(merged)))


def _skipped_lines(items: list[Skipped]) -> Iterator[str]:
    yield "index\tkey\treason\n"
    for item in items:
        cells = (" ".join(text.split()) for text in (item.key, item.reason))
        yield "\t".join([str(item.index), *cells]) + "\n"
