"""An embedding folder on disk.

    img_emb/img_emb_0.npy            float16 [n, D], unit rows
    metadata/metadata_0.parquet      index, image_path, label, caption, content (digest of the file)
    text_emb/text_emb_0.npy          float16 [m, D], unit rows
    text_metadata/metadata_0.parquet index, caption, cut (longer than the model's context)
    img_fingerprint.json, text_fingerprint.json, skipped.tsv

clip-retrieval pairs images and captions row by row; here they are two corpora of different length,
so `metadata/` describes the images alone and the captions have a folder of their own. `index` is a
row's index in the `ImageData` or `Captions` it was made from: undecodable images have no row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet

from pymcip.configs import Source
from pymcip.data.loading import Skipped
from pymcip.data.sources import natural
from pymcip.data.tally import LeftOut
from pymcip.errors import DataError
from pymcip.files import file_fingerprint, read_json, write_text

Kind: TypeAlias = Literal["img", "text"]
Matrix: TypeAlias = npt.NDArray[Any]
METADATA: dict[Kind, str] = {"img": "metadata", "text": "text_metadata"}
WHAT: dict[Kind, str] = {"img": "images", "text": "captions"}


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

    def has(self, kind: Kind) -> bool:
        """Whether the folder holds embeddings of this kind ("img" or "text")."""
        return (self.path / f"{kind}_emb").is_dir()

    def _part_files(self, kind: Kind) -> list[Path]:
        return sorted((self.path / f"{kind}_emb").glob(f"{kind}_emb_*.npy"), key=natural)

    def _metadata_files(self, kind: Kind) -> list[Path]:
        folder = self.path / METADATA[kind]
        if kind == "text" and not folder.is_dir() and not self.fingerprint(kind):
            folder = self.path / METADATA["img"]  # clip-retrieval's own folders pair the two
        return sorted(folder.glob("metadata_*.parquet"), key=natural)

    def fingerprint(self, kind: Kind) -> dict[str, Any]:
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
                "run pymcip.embed again with the same options, which continues where it stopped"
            )
        return [_open_part(path) for path in files]

    def vectors(self, kind: Kind) -> Matrix:
        """Return all rows, float16 [N, D]: the memory map if there is one part, else in memory."""
        parts = self.parts(kind)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def has_metadata(self, kind: Kind) -> bool:
        """Whether the rows of this kind are described."""
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

    def contents(self) -> list[str]:
        """Return what identifies the content of each embedded image, in row order.

        It is the digest of the image file's bytes, or the image's path, where another program wrote
        the folder.
        """
        table = self.metadata("img")
        name = "content" if "content" in table.column_names else "image_path"
        if name not in table.column_names:
            return [str(row) for row in range(len(table))]
        return list(table[name].to_pylist())

    @property
    def captions_cut(self) -> int:
        """How many of the captions are longer than the model's context, and cut there."""
        files = self._metadata_files("text")
        known = [path for path in files if "cut" in pyarrow.parquet.read_schema(path).names]
        tables = (pyarrow.parquet.read_table(path, columns=["cut"]) for path in known)
        return sum(int(pa.compute.sum(table["cut"]).as_py() or 0) for table in tables)

    def captions(self) -> list[str]:
        """Return the embedded captions' texts, in row order."""
        table = self.metadata("text")
        if "caption" not in table.column_names:
            raise DataError(f"{self.path}: the metadata has no column caption, only {table.schema}")
        return list(table["caption"].to_pylist())

    @property
    def skipped(self) -> list[dict[str, Any]]:
        """Images that could not be decoded: index (in the data), key, reason."""
        return [asdict(item) for item in read_skipped(self.path) if item.index >= 0]


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


def read_skipped(folder: Path) -> list[Skipped]:
    """What skipped.tsv lists: images of all parts that could not be decoded, by index.

    Before them, with the index -1, what was left out when the sources were indexed.
    """
    path = folder / "skipped.tsv"
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    cells = (line.split("\t") for line in lines)
    return [Skipped(int(index), key, reason) for index, key, reason in cells]


def replace_skipped(folder: Path, first: int, last: int, skipped: Sequence[Skipped]) -> None:
    """Replace skipped.tsv's lines of images `first` to `last`; without any there is no file."""
    before = read_skipped(folder)
    others = [item for item in before if not first <= item.index <= last]
    if not skipped and len(others) == len(before):
        return
    lines = ["index\tkey\treason\n"]
    for item in sorted([*others, *skipped], key=lambda item: item.index):
        cells = (" ".join(text.split()) for text in (item.key, item.reason))
        lines.append("\t".join([str(item.index), *cells]) + "\n")
    write_text(folder / "skipped.tsv", "".join(lines))


def replace_left_out(folder: Path, left_out: Sequence[LeftOut]) -> None:
    """Replace skipped.tsv's lines of what was left out when the sources were indexed."""
    replace_skipped(folder, -1, -1, [Skipped(-1, item.key, item.reason) for item in left_out])
