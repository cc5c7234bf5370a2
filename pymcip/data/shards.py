"""Webdataset tar shards, read in place: an index of member offsets, nothing is ever extracted."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pymcip.data.decode import image_suffixes
from pymcip.data.labels import plain
from pymcip.data.tally import Tally
from pymcip.errors import DataError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")  # the first to be taken, if a key has several
_SCANNED = 1 << 20  # bytes that are looked at together, after the end of an archive
_NO_KEY = "no key and extension in its name (hidden, __…__, or without a dot)"
_DOTTED = (
    "a dot in the key, which webdataset takes to end at the first dot, beside members of that key; "
    "write such names without dots"
)


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


def read_index(shard: Path, tally: Tally | None = None) -> Iterator[tuple[str, Sample]]:
    """Yield (key, sample) for each key of a shard, in the order of their first members.

    Folders are skipped; links, hidden files and `__…__` members are left out. Archives that were
    concatenated are read as one. If all members of a key have several dots in
    their names (IMG_2023.01.02.jpg, .cls), the key ends at the last dot.

    Args:
        shard: the tar file.
        tally: counts what is left out.

    Raises:
        DataError: the file is no plain tar, is cut short or damaged, holds a member with an
            absolute name or with `..` in it, or holds a name twice.
    """
    tally = Tally() if tally is None else tally
    samples: dict[str, Sample] = {}
    try:
        for info in _members(shard):
            _check_name(shard, info.name)
            parts = split_name(info.name)
            if info.isdir():
                continue
            if not (info.isreg() or info.issparse()):
                tally.add(f"{shard}/{plain(info.name)}", "a link or a device in a shard")
                continue
            if parts is None or info.name.startswith("__"):
                tally.add(f"{shard}/{plain(info.name)}", _NO_KEY)
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
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{shard} can't be read as a tar shard: {error}. It must be an uncompressed tar "
            "(unpack .tar.gz first); if it is cut short, download or write it again"
        ) from error
    for key, sample in samples.items():
        yield from _by_last_dot(shard, key, sample, tally)


def image_of(sample: Sample) -> Member | None:
    """Return the member of a sample that is its image; None if there is none."""
    for extension in IMAGE_EXTENSIONS:
        if extension in sample:
            return sample[extension]
    known = image_suffixes()
    return next((sample[name] for name in sorted(sample) if f".{name}" in known), None)


def _members(shard: Path) -> Iterator[tarfile.TarInfo]:
    """Yield the members of all archives that a file holds, one after the other."""
    with shard.open("rb") as handle:
        start: int | None = 0
        while start is not None:
            handle.seek(start)
            with tarfile.open(fileobj=handle, mode="r:") as archive:
                while (info := archive.next()) is not None:
                    archive.members = []  # type: ignore[attr-defined]  # it would keep every header
                    yield info
                start = _next_archive(handle, archive.offset)


def _next_archive(handle: io.BufferedReader, offset: int) -> int | None:
    """Find where another archive begins after the end of one; None if nothing but zeros follows.

    Raises:
        tarfile.ReadError: there is no end, but a damaged header, which tarfile takes for one.
    """
    handle.seek(offset)
    if any(handle.read(tarfile.BLOCKSIZE)):
        raise tarfile.ReadError(f"damaged header at byte {offset}")
    position = offset + tarfile.BLOCKSIZE
    while block := handle.read(_SCANNED):
        rest = block.lstrip(b"\0")
        if rest:
            found = position + len(block) - len(rest)
            return found - (found - offset) % tarfile.BLOCKSIZE
        position += len(block)
    return None


def _by_last_dot(
    shard: Path, key: str, sample: Sample, tally: Tally
) -> Iterator[tuple[str, Sample]]:
    """Yield a key as it is, or split at the last dot of its members if all have more than one."""
    dotted = {name: member for name, member in sample.items() if "." in name}
    if len(dotted) == len(sample):
        found: dict[str, Sample] = {}
        for name, member in dotted.items():
            middle, _, extension = name.rpartition(".")
            found.setdefault(f"{key}.{middle}", {})[extension] = member
        yield from found.items()
        return
    if image_of(sample) is None:
        for name, member in dotted.items():
            if f".{name.rpartition('.')[2]}" in image_suffixes():
                tally.add(f"{shard}/{plain(member.name)}", _DOTTED)
    yield key, sample


def _check_name(shard: Path, name: str) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise DataError(
            f"{shard}: member {name!r} points outside of the shard; names must be relative and "
            "without '..'. The shard is refused as a whole: get it from a source you trust"
        )


def read_text(shard: Path, handle: io.BufferedReader, member: Member) -> str:
    """Read a small member as UTF-8 text; `handle` is the open shard."""
    handle.seek(member.offset)
    try:
        return handle.read(member.size).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{shard}/{plain(member.name)} is not UTF-8 text: {error}") from error
