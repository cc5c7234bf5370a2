"""Caption corpora on disk: text, TSV, CSV, parquet, JSON and tar shards, each distinct caption once."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute

from pymcip.configs import Source, Sources
from pymcip.data import shards
from pymcip.data.annotations import TABLES, has_captions, read_annotations
from pymcip.data.json_annotations import captions_of, parse
from pymcip.data.sources import as_list, find, folder_files, some, suffix
from pymcip.data.tally import LeftOut, Tally
from pymcip.errors import DataError
from pymcip.progress import progress

SUFFIXES = (*TABLES, ".tar")
_JSON = (".json", ".jsonl")
_LINES_AT_A_TIME = 100_000
# Files that are no captions, though they lie in a folder of captions, by their names.
_DOCUMENTS = re.compile(
    r"(read.?me|licen[cs]e|copying|notice|changelog|changes|authors|citation|contributing|sources"
    r"|requirements|nshards|dataset_type|classnames|zeroshot_classification_templates)([-_. ].*)?",
    re.IGNORECASE,
)

_log = logging.getLogger("pymcip.data")


class Captions:
    """Distinct captions, in the order of their first occurrence. Made by `load_captions`.

    Attributes:
        duplicates: how many rows were left out because the same text was there before.
        left_out: what else was left out, and why.
    """

    def __init__(
        self,
        texts: Iterable[str] | pa.Array,
        duplicates: int = 0,
        left_out: Iterable[LeftOut] = (),
    ) -> None:
        column = texts if isinstance(texts, pa.Array) else pa.array(texts, pa.large_string())
        self._column = column
        self.duplicates = duplicates
        self.left_out = list(left_out)

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, index: int) -> str:
        return str(self._column[int(index)].as_py())

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _LINES_AT_A_TIME):
            yield from self.slice(start, start + _LINES_AT_A_TIME)

    def __repr__(self) -> str:
        return f"Captions({len(self)} texts, {self.duplicates} duplicates left out)"

    @property
    def texts(self) -> list[str]:
        """All captions as a new list; a corpus of many millions is better read by `slice`."""
        return self.slice(0, len(self))

    def slice(self, start: int, stop: int) -> list[str]:
        """Return the captions start to stop-1."""
        texts: list[str] = self._column.slice(start, max(0, stop - start)).to_pylist()
        return texts

    def fingerprint(self) -> str:
        """Identify the texts and their order, as SHA-256 in hex."""
        digest = hashlib.sha256()
        for start in range(0, len(self), _LINES_AT_A_TIME):
            digest.update(json.dumps(self.slice(start, start + _LINES_AT_A_TIME)).encode())
        return digest.hexdigest()


def load_captions(sources: Sources | list[Source]) -> Captions:
    """Read all captions of one source or of several; exact duplicates are one row.

    A source is a file, a pattern (`{000000..000078}.tar`, `*.tsv`) or a folder of such files:

    - text, TSV, CSV, parquet or JSON; `docs/data.md` says which layouts are recognised and how. The
      log says what each file was read as;
    - tar shards with `txt` members, a caption per line (else the json's caption). In a folder, a shard
      that has a parquet file of the same name beside it (img2dataset's output) is not opened: the
      parquet file holds its captions, those of images that could not be downloaded included.

    In a folder, JSON is read only where there is nothing else, and files named as documents
    (README, LICENSE) are left out. Text files may be compressed (`.gz`, `.zst`, `.bz2`). White space
    around a caption is dropped, and so are blank captions.

    Raises:
        DataError: nothing is there, a file can't be read or has no such column, it can't be said for
            sure what it holds, or there is no caption at all.
    """
    listed = as_list(sources)
    tally = Tally()
    files = [path for source in listed for path in _files(source, tally)]
    columns = [
        chunk
        for path in progress(files, description="reading captions", unit="file")
        for chunk in _read(path, tally)
    ]
    merged = pa.chunked_array(columns, pa.large_string())
    trimmed = pa.compute.utf8_trim_whitespace(merged)
    kept = trimmed.filter(pa.compute.greater(pa.compute.binary_length(trimmed), 0))
    distinct = pa.compute.unique(kept)
    tally.report(some(listed))
    if not len(distinct):
        raise DataError(f"{some(listed)}: there is not one caption; expected text, a line each")
    duplicates, blank = len(kept) - len(distinct), len(merged) - len(kept)
    if duplicates or blank:
        _log.info(
            "%s: %d captions, %d duplicates and %d blank ones left out",
            some(listed), len(distinct), duplicates, blank,
        )  # fmt: skip
    return Captions(distinct, duplicates, tally.items)


def _files(source: Source, tally: Tally) -> list[Path]:
    files: list[Path] = []
    for path in find(source):
        if path.is_dir():
            files += _of_folder(path, tally)
        elif suffix(path) in SUFFIXES:
            files.append(path)
        else:
            raise DataError(
                f"{path} is no caption file; allowed: {', '.join(SUFFIXES)}, the text ones also "
                "with .gz, .zst or .bz2"
            )
    return files


def _of_folder(folder: Path, tally: Tally) -> list[Path]:
    """List the files of a folder that hold captions; count the others that could."""
    found = []
    for path in folder_files(folder, SUFFIXES):
        if _DOCUMENTS.fullmatch(path.name.split(".")[0]):
            tally.add(str(path), "a document by its name, no captions")
        else:
            found.append(path)
    if any(suffix(path) not in _JSON for path in found):
        for path in found:
            if suffix(path) in _JSON and not path.stem.endswith("_stats"):
                tally.add(str(path), "JSON beside other files of captions; give it by its name")
        found = [path for path in found if suffix(path) not in _JSON]
    tables = {path.stem for path in found if suffix(path) == ".parquet" and has_captions(path)}
    found = [path for path in found if suffix(path) != ".tar" or path.stem not in tables]
    if not found:
        raise DataError(
            f"the folder {folder} holds no captions; expected files of the kinds "
            f"{', '.join(SUFFIXES)}"
        )
    return found


def _read(path: Path, tally: Tally) -> list[pa.Array]:
    if suffix(path) == ".tar":
        return [pa.array(_shard_captions(path, tally), pa.large_string())]
    annotations = read_annotations(path)
    tally.items += annotations.left_out
    return [chunk.flatten() for chunk in annotations.captions.chunks]


def _shard_captions(path: Path, tally: Tally) -> Iterator[str]:
    keys = without = 0
    with path.open("rb") as handle:
        for _, sample in shards.read_index(path, tally):
            captions = sample_captions(path, handle, sample)
            keys, without = keys + 1, without + (not captions)
            yield from captions
    if without:
        tally.notes.append(f"{path}: {without} of {keys} keys have no caption")


def sample_captions(path: Path, handle: io.BufferedReader, sample: shards.Sample) -> list[str]:
    """Return the captions of a sample of a shard: the lines of its txt, or else those of its json."""
    described = {}
    if "json" in sample:
        where = f"{path}/{sample['json'].name}"
        value = parse(shards.read_text(path, handle, sample["json"]), where)
        described = value if isinstance(value, dict) else {}
    if "txt" in sample:
        return caption_lines(
            shards.read_text(path, handle, sample["txt"]), described.get("caption")
        )
    return captions_of(described, f"{path}/{sample['json'].name}") if described else []


def caption_lines(text: str, whole: object = None) -> list[str]:
    """Split a txt beside an image: a caption per line, as CLIP_benchmark writes them.

    A line break within a caption is written as a backslash and n there. img2dataset writes one caption,
    which may have several lines: it is in the json too (`whole`).
    """
    if isinstance(whole, str) and whole.strip() == text.strip():
        return [text.strip()] if text.strip() else []
    lines = (line.replace("\\n", "\n").strip() for line in text.split("\n"))
    return [line for line in lines if line]
