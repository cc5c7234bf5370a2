"""Where the images of one source lie: in files of their own, or inside tar shards.

A store holds names, sizes and offsets in arrays (tens of bytes per image), so it takes millions of
images and can be sent to worker processes. Bytes are read one image at a time.
"""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pymcip.contents import Digests, digest_of, digest_of_files, file_digests
from pymcip.data.columns import lists_in
from pymcip.data.compact import Names
from pymcip.data.labels import plain
from pymcip.data.sources import some
from pymcip.data.walk import States, as_states, state_of
from pymcip.errors import DataError, DecodeError
from pymcip.progress import progress

Int64: TypeAlias = npt.NDArray[np.int64]
Opened = TypeVar("Opened")


class Store(ABC):
    """Where the images of one source lie; rows are counted from 0."""

    _sizes: Int64  # bytes of each image file
    _titles: pa.ChunkedArray | None  # lists of the captions that come with each

    @abstractmethod
    def key(self, row: int) -> str:
        """Path of the image, or its shard's path and the member's name."""

    @abstractmethod
    def read(self, row: int) -> bytes:
        """The image file's bytes.

        Raises:
            DataError: it is gone or has shrunk since it was indexed.
            DecodeError: it can't be opened or read (no permission, a damaged disk).
        """

    @abstractmethod
    def files(self) -> Iterable[Path]:
        """The files that hold the images."""

    @abstractmethod
    def fingerprint(self) -> list[Any]:
        """What `json_pieces` takes, which changes whenever the images do; the first call reads the files."""

    def titles(self, row: int) -> tuple[str, ...]:
        """Captions that come with the image; may be none."""
        return () if self._titles is None else tuple(self._titles[row].as_py())

    def digest(self, row: int) -> bytes:
        """The digest of the image file's bytes, as `fingerprint` has found it; else as `read`."""
        return digest_of(self.read(row))

    def size(self, row: int) -> int:
        """How many bytes the image file has."""
        return int(self._sizes[row])


class PackedStore(Store, Generic[Opened]):
    """Images inside larger files, of which a few parts are open at a time; may be sent to processes.

    Args:
        paths: the files.
        titles: the captions of each image, large_list<large_string> [N], or None.
    """

    MOST_OPEN: int
    _digest = ""  # of all files, once it is known

    def __init__(self, paths: list[Path], titles: pa.ChunkedArray | None) -> None:
        self._paths, self._titles = paths, titles
        self._open: dict[int, Opened] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    @abstractmethod
    def _opened(self, number: int) -> Opened:
        """Open a part."""

    def _part(self, number: int) -> Opened:
        """Give an open part; the one that has been open longest is given up where there are too many."""
        with self._lock:
            if number not in self._open:
                if len(self._open) >= self.MOST_OPEN:
                    self._open.pop(next(iter(self._open)))
                self._open[number] = self._opened(number)
            return self._open[number]

    def files(self) -> list[Path]:
        return self._paths

    def content(self) -> tuple[list[str], str]:
        """The names of the files and a digest of their bytes."""
        self._digest = self._digest or digest_of_files(self._paths)
        return [path.name for path in self._paths], self._digest


class FileStore(Store):
    """Images as files below a folder.

    Args:
        kind: goes into the fingerprint.
        base: the folder.
        names: of the files, below it or absolute.
        titles: the captions of each, or None.
        states: uint64 [N, 3] of the files, where the caller has them; default: they are asked for.
    """

    _digests: Digests | None = None  # of the files, once they are known

    def __init__(
        self,
        kind: str,
        base: Path,
        names: Names,
        titles: pa.ChunkedArray | None,
        states: States | None = None,
    ) -> None:
        self._kind = kind
        self._base = base
        self._names = names
        self._titles = titles
        states = states_of(kind, base, names) if states is None else states
        self._sizes = states[:, 2].astype(np.int64)

    def __len__(self) -> int:
        return len(self._names)

    def path(self, row: int) -> str:
        """The file of an image."""
        return os.path.join(self._base, self._names[row])  # noqa: PTH118

    def key(self, row: int) -> str:
        return plain(self.path(row))

    def read(self, row: int) -> bytes:
        try:
            return Path(self.path(row)).read_bytes()
        except FileNotFoundError as error:
            raise DataError(f"{self.key(row)} can't be read any more: {error}") from error
        except OSError as error:
            raise DecodeError(f"{self.key(row)} can't be opened: {error.strerror}") from error

    def digest(self, row: int) -> bytes:
        if self._digests is not None and self._digests[row].any():
            return self._digests[row].tobytes()
        return super().digest(row)

    def files(self) -> Iterable[Path]:
        return map(Path, _Files(self))

    def fingerprint(self) -> list[Any]:
        if self._digests is None:
            self._digests = file_digests(_Files(self))
        titles = None if self._titles is None else lists_in(self._titles)
        return [self._kind, iter(self._names), titles, digest_of(self._digests.data).hex()]


class _Files(Sequence[str]):
    """The paths of a store's files, made when they are asked for."""

    def __init__(self, store: FileStore) -> None:
        self._store = store

    def __len__(self) -> int:
        return len(self._store)

    def __getitem__(self, row: Any) -> Any:
        return self._store.path(row)


def states_of(kind: str, base: Path, names: Names) -> States:
    """Return the state of every file, uint64 [N, 3]; see `pymcip.data.walk.state_of`.

    Raises:
        DataError: some are missing or no regular files.
    """
    states = array("Q")
    missing = []
    folder = str(base)
    for name in progress(names, description="checking image files", unit="file"):
        path = os.path.join(folder, name)  # noqa: PTH118  a million times
        try:
            states.extend(state_of(path))
        except (OSError, ValueError):  # ValueError: a null byte in the name
            missing.append(plain(path))
    if missing:
        raise DataError(
            f"{len(missing)} of {len(names)} images of {base} are not there: {some(missing)}"
            + (
                ". A table's filepath is relative to the table's folder, or absolute"
                if kind == "table"
                else ""
            )
        )
    return as_states(states)


class _Descriptor:
    """A file open for reading until nothing refers to it: safe to drop while a thread reads."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class ShardStore(PackedStore[_Descriptor]):
    """Images inside tar shards, read by offset; the shards stay as they are.

    Args:
        paths: of the shards.
        ends: int64 [S], how many images there are up to the end of each.
        names: of the images' members.
        offsets, sizes: int64 [N], where their bytes are.
        titles: the captions of each, or None.
    """

    MOST_OPEN = 64

    def __init__(
        self,
        paths: list[Path],
        ends: Int64,
        names: Names,
        offsets: Int64,
        sizes: Int64,
        titles: pa.ChunkedArray | None,
    ) -> None:
        super().__init__(paths, titles)
        self._ends, self._names, self._offsets, self._sizes = ends, names, offsets, sizes

    def _opened(self, number: int) -> _Descriptor:
        return _Descriptor(self._paths[number])

    def key(self, row: int) -> str:
        return f"{self._paths[self._shard(row)]}/{self._names[row]}"

    def _shard(self, row: int) -> int:
        return int(np.searchsorted(self._ends, row, side="right"))

    def read(self, row: int) -> bytes:
        size, offset = int(self._sizes[row]), int(self._offsets[row])
        try:
            content = os.pread(self._part(self._shard(row)).number, size, offset)
        except FileNotFoundError as error:
            raise DataError(f"{self.key(row)} can't be read any more: {error}") from error
        except OSError as error:
            raise DecodeError(f"{self.key(row)} can't be read: {error.strerror}") from error
        if len(content) < size:
            raise DataError(f"{self.key(row)}: the shard has been cut short since it was indexed")
        return content

    def fingerprint(self) -> list[Any]:
        return ["shards", *self.content()]
