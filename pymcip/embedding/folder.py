"""An embedding folder on disk.

    img_emb/img_emb_0.npy            float16 [n, D], unit rows
    metadata/metadata_0.parquet      index, image_path, label, caption (the first), captions,
                                     content (digest of the file)
    text_emb/text_emb_0.npy          float16 [m, D], unit rows
    text_metadata/metadata_0.parquet index, caption, cut (longer than the model's context)
    img_fingerprint.json, text_fingerprint.json, skipped.tsv
    skipped/images_0_99999.tsv       the same of one part, until all parts are there

clip-retrieval pairs images and captions row by row; here they are two corpora of different length,
so `metadata/` describes the images alone and the captions have a folder of their own. `index` is a
row's index in the `ImageData` or `Captions` it was made from: undecodable images have no row.
"""

from __future__ import annotations

import logging
import re
import shutil
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
from pymcip.contents import digest_of_files, file_digests
from pymcip.data.loading import Skipped
from pymcip.data.sources import natural, some
from pymcip.data.tally import LeftOut
from pymcip.embedding.foreign import check_rows, normalised
from pymcip.errors import DataError, reason_of
from pymcip.files import damaged, read_json, write_text

Kind: TypeAlias = Literal["img", "text"]
Matrix: TypeAlias = npt.NDArray[Any]
METADATA: dict[Kind, str] = {"img": "metadata", "text": "text_metadata"}
WHAT: dict[Kind, str] = {"img": "images", "text": "captions"}
AGAIN = "Embed into a new folder"  # what to do about damage
SKIPPED, LISTS = "skipped.tsv", "skipped"  # lists of parts, until all parts are there
CHECKSUM = b"sha256"  # of a part's vectors: its name in the schema of the part's metadata

_log = logging.getLogger("pymcip.embedding")


class EmbeddingFolder:
    """Embeddings on disk, opened for reading: ours, or a folder that clip-retrieval wrote.

    Our own parts are compared with their checksums when they are first read (digests of large ones
    are kept, see `pymcip.contents`). What another program wrote is checked then: rows that are not unit are
    normalised in memory, with a warning, and if a column `index` does not number them, their
    positions do.

    Raises:
        DataError: there are no embeddings in the folder.
    """

    def __init__(self, path: Source) -> None:
        self.path = Path(path)
        self._checked: dict[Kind, list[Matrix]] = {}
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
        return read_fingerprint(path) if path.is_file() else {}

    def identity(self, kind: Kind) -> list[Any]:
        """Return plain values that change whenever the embeddings do."""
        made_from = self.fingerprint(kind)
        if made_from:
            return [value for name, value in sorted(made_from.items()) if name != "model"]
        files = self._part_files(kind)
        return [[path.name for path in files], digest_of_files(files)]

    def part_counts(self, kind: Kind) -> tuple[int, int]:
        """Return how many parts are complete, and how many there will be."""
        files = len(self._part_files(kind))
        made_from = self.fingerprint(kind)
        if not made_from:
            return files, files
        return min(files, len(self._metadata_files(kind))), int(made_from["parts"])

    def parts(self, kind: Kind) -> list[Matrix]:
        """Open the parts, each a memory-mapped float16 or float32 [n, D], in row order.

        Raises:
            DataError: there are none, one is missing or damaged, they are of several widths, or (of
                another program's) a row is not finite or zero.
        """
        if kind in self._checked:
            return self._checked[kind]
        files = self._part_files(kind)
        complete, wanted = self.part_counts(kind)
        if not files or complete < wanted:
            raise DataError(
                f"{self.path} holds {complete} of {wanted} parts of {WHAT[kind]}; "
                "run pymcip.embed again with the same options, which continues where it stopped"
            )
        parts = [_open_part(path) for path in files]
        for path, part in zip(files, parts, strict=True):
            if part.shape[1] != parts[0].shape[1]:
                raise DataError(
                    f"{path} is {part.shape[1]} wide, {files[0].name} is {parts[0].shape[1]}; all "
                    "parts must be of one model. Embed anew"
                )
        if self.fingerprint(kind):
            _check_sums(files, self._metadata_files(kind))
            self._checked[kind] = parts
            return parts
        numbers = [int(found[-1]) for path in files if (found := re.findall(r"\d+", path.stem))]
        first = min(numbers, default=0)
        if numbers != list(range(first, first + len(files))):
            raise DataError(
                f"{self.path}/{kind}_emb holds the parts {some(path.name for path in files)}: one is "
                "missing or there twice, so that rows and metadata would not fit. Complete it"
            )
        if check_rows(files, parts):
            parts = normalised(files, parts)
        self._checked[kind] = parts
        return parts

    def complete_parts(self, kind: Kind) -> list[tuple[Matrix, pa.Table]]:
        """Return the parts that are complete, with their metadata, also of an unfinished folder.

        Raises:
            DataError: a file can't be read or is damaged, or the two have different numbers of rows.
        """
        described = {path.stem.split("_")[-1]: path for path in self._metadata_files(kind)}
        found = []
        for path in self._part_files(kind):
            metadata = described.get(path.stem.split("_")[-1])
            if metadata is not None:
                found.append((_open_part(path), _read_table(metadata)))
                _check_sums([path], [metadata])
                if len(found[-1][0]) != len(found[-1][1]):
                    raise damaged(metadata, f"{path.name} has another number of rows", AGAIN)
        return found

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
        try:
            table = pa.concat_tables(list(map(_read_table, files)), promote_options="default")
        except pa.ArrowException as error:
            raise damaged(
                files[0].parent, f"its files don't fit together ({error})", AGAIN
            ) from error
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
        bounds = np.cumsum([0, *(_read_table(path, []).num_rows for path in files)])
        if not files or bounds[-1] != sum(len(part) for part in self.parts(kind)):
            self.metadata(kind)  # refuses them
        described: list[dict[str, Any]] = []
        for path, first, last in zip(files, bounds, bounds[1:], strict=False):
            wanted = rows[(rows >= first) & (rows < last)] - first
            if len(wanted):
                described += _read_table(path).take(wanted).to_pylist()
        return described

    def rows(self, kind: Kind) -> npt.NDArray[np.int64]:
        """Return the index, in the data, of each embedded row: int64 [N], ascending.

        In a folder of another program it may be in any order; without a number of its own for each
        row in the column `index`, it is the row's position.

        Raises:
            DataError: as `metadata`; or the column `index` of our own folder is damaged.
        """
        positions = np.arange(sum(len(part) for part in self.parts(kind)), dtype=np.int64)
        if not self.has_metadata(kind):
            return positions
        table = self.metadata(kind)
        made_from = self.fingerprint(kind)
        if "index" not in table.column_names:
            if made_from:
                raise damaged(self.path / METADATA[kind], "it has no column index", AGAIN)
            return positions
        column = table["index"]
        numbers = positions[:0]
        if pa.types.is_integer(column.type) and not column.null_count:
            numbers = column.to_numpy().astype(np.int64)
        numbered = len(numbers) == len(positions) and numbers.min(initial=0) >= 0
        if made_from:
            inside = numbers.max(initial=-1) < int(made_from["rows"])
            if not numbered or not inside or (np.diff(numbers) <= 0).any():
                raise damaged(
                    self.path / METADATA[kind], "its column index is not ascending", AGAIN
                )
            return numbers
        if numbered and len(np.unique(numbers)) == len(numbers):
            return numbers
        _log.warning(
            "%s: the column index of the metadata does not number the %d rows one by one (it may "
            "restart in each part); rows are numbered by their positions",
            self.path, len(positions),
        )  # fmt: skip
        return positions

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
    except Exception as error:  # what a damaged file raises is not bounded by a list
        raise DataError(f"{path} can't be read as a NumPy array: {reason_of(error)}") from error
    if part.ndim != 2 or part.dtype not in (np.float16, np.float32):
        raise DataError(
            f"{path} is {part.dtype} {list(part.shape)}; expected float16 (or float32) [rows, D]. "
            "Convert it with .astype('float32')"
        )
    if part.shape[1] == 0:
        raise DataError(f"{path} has no columns; embed anew")
    opened: Matrix = part
    return opened


def _check_sums(files: Sequence[Path], described: Sequence[Path]) -> None:
    """Compare parts with the checksums that their metadata hold."""
    for path, metadata, digest in zip(files, described, file_digests(files), strict=False):
        stored = (_read_table(metadata, []).schema.metadata or {}).get(CHECKSUM)
        if stored not in (None, digest.tobytes().hex().encode()):
            raise damaged(
                path,
                f"its checksum is another than {metadata.name} says",
                "Remove it and embed again, into the same folder: that part alone is made anew",
            )


def _read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    try:
        return pa.parquet.read_table(path, columns=columns, page_checksum_verification=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise damaged(path, error, AGAIN) from error


def read_fingerprint(path: Path) -> dict[str, Any]:
    """Read what the embeddings of a folder were made from.

    Raises:
        DamagedFileError: it can't be read.
    """
    fields = dict.fromkeys(("rows", "parts", "part_size"), int) | dict.fromkeys(
        ("model", "model_fingerprint", "precision", "transform", "data"), str
    )
    found: dict[str, Any] = read_json(path, fields, AGAIN)
    return found


def read_skipped(folder: Path) -> list[Skipped]:
    """What skipped.tsv lists: images of all parts that could not be decoded, by index.

    Before them, with the index -1, what was left out when the sources were indexed. A part made
    since skipped.tsv was written has a list of its own, which counts for its images.
    """
    try:
        lists = {path: _read_list(path) for path in (folder / LISTS).glob("images_*_*.tsv")}
    except FileNotFoundError:  # merged meanwhile: skipped.tsv is written before they are removed
        return read_skipped(folder)
    ranges = [tuple(map(int, path.stem.split("_")[1:])) for path in lists]
    items = [item for items in lists.values() for item in items]
    if (folder / SKIPPED).is_file():
        items += (
            item
            for item in _read_list(folder / SKIPPED)
            if not any(first <= item.index <= last for first, last in ranges)
        )
    return sorted(items, key=lambda item: item.index)


def write_part_list(folder: Path, first: int, last: int, skipped: Sequence[Skipped]) -> None:
    """Write the list of a part, of the images `first` to `last`."""
    _write_list(folder / part_list(first, last), skipped)


def part_list(first: int, last: int) -> str:
    """The name of a part's list."""
    return f"{LISTS}/images_{first}_{last}.tsv"


def merge_skipped(folder: Path, left_out: Sequence[LeftOut]) -> None:
    """Write skipped.tsv anew from the lists of all parts, in a folder that is held by one process.

    What was left out when the sources were indexed comes first. Without any there is no file.
    """
    found = [Skipped(-1, item.key, item.reason) for item in left_out]
    found += (item for item in read_skipped(folder) if item.index >= 0)
    if found or (folder / SKIPPED).is_file():
        _write_list(folder / SKIPPED, found)
    shutil.rmtree(folder / LISTS, ignore_errors=True)


def _write_list(path: Path, skipped: Sequence[Skipped]) -> None:
    lines = ["index\tkey\treason\n"]
    for item in skipped:
        cells = (" ".join(text.split()) for text in (item.key, item.reason))
        lines.append("\t".join([str(item.index), *cells]) + "\n")
    write_text(path, "".join(lines))


def _read_list(path: Path) -> list[Skipped]:
    try:
        lines = path.read_bytes().decode("utf-8", "surrogateescape").split("\n")[1:]
        cells = (line.split("\t") for line in lines if line)
        return [Skipped(int(index), key, reason) for index, key, reason in cells]
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise damaged(path, error, AGAIN) from error
