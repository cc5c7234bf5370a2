"""Webdataset tar shards, read in place: an index of member offsets, nothing is ever extracted."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pymcip.errors import DataError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")


@dataclass(frozen=True, slots=True)
class Member:
    """A file inside a shard: where its bytes are."""

    name: str
    offset: int
    size: int


Sample = dict[str, Member]  # extension in lower case -> member


def split_name(name: str) -> tuple[str, str] | None:
    """Split a member's name into key and extension by webdataset's rule: at the first dot.

    The dot is the first of the base name, so `a.b/000.seg.png` is (`a.b/000`, `seg.png`). Hidden
    files and names without a dot have no key.
    """
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    return (folder + slash + stem, extension.lower()) if stem and dot else None


def read_index(shard: Path) -> Iterator[tuple[str, Sample]]:
    """Yield (key, sample) for each key of a shard, in the order of their first members.

    Folders, links, hidden files and `__…__` members are passed over.

    Raises:
        DataError: the file is no plain tar, is cut short or damaged, holds a member with an
            absolute name or with `..` in it, or holds a name twice.
    """
    samples: dict[str, Sample] = {}
    try:
        with tarfile.open(shard, "r:") as archive:
            while (info := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # it would keep every header
                _check_name(shard, info.name)
                parts = split_name(info.name)
                if parts is None or not info.isreg() or info.name.startswith("__"):
                    continue
                key, extension = parts
                sample = samples.setdefault(key, {})
                if extension in sample or info.issparse():
                    trouble = "is sparse" if info.issparse() else "is there twice"
                    raise DataError(
                        f"{shard}: member {info.name} {trouble}; each name must be there once in a "
                        "shard, and plainly. Write the shard again"
                    )
                sample[extension] = Member(info.name, info.offset_data, info.size)
            _check_end(shard, archive.offset)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(
            f"{shard} can't be read as a tar shard: {error}. It must be an uncompressed tar "
            "(unpack .tar.gz first); if it is cut short, download or write it again"
        ) from error
    yield from samples.items()


def _check_name(shard: Path, name: str) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise DataError(
            f"{shard}: member {name!r} points outside of the shard; names must be relative and "
            "without '..'. The shard is refused as a whole: get it from a source you trust"
        )


def _check_end(shard: Path, offset: int) -> None:
    """Refuse a damaged header, which tarfile takes for the end of the archive."""
    with shard.open("rb") as handle:
        handle.seek(offset)
        if any(handle.read(tarfile.BLOCKSIZE)):
            raise tarfile.ReadError(f"damaged header at byte {offset}")


def read_text(shard: Path, handle: io.BufferedReader, member: Member) -> str:
    """Read a small member as UTF-8 text; `handle` is the open shard."""
    handle.seek(member.offset)
    try:
        return handle.read(member.size).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{shard}/{member.name} is not UTF-8 text: {error}") from error
