"""Digests of what files hold: by them data are recognised, whatever their names and times say.

One hash for all, SHA-256: recent processors have instructions for it. Files are read once, several
at a time. Digests of large sets are kept in the user's cache folder (`$XDG_CACHE_HOME/pymcip`, else
`~/.cache/pymcip`) and used again while a file's path, size, times and inode stay the same; a program
can't set the time of a file's last change (ctime) back.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from pymcip.errors import DamagedFileError
from pymcip.files import read_npz, write_npz
from pymcip.progress import progress

KEPT_FROM = 1 << 28  # bytes of a set whose digests are kept
SETTLED = 2 * 10**9  # ns: a file that changed later than that may change again at the same time
MOST_KEPT = 1 << 21  # digests of files below one folder, 72 bytes each
_BLOCK = 1 << 20
FILES_AT_A_TIME, FILES_WAITING = 64, 65_536
_INT64 = 2**63 - 1
_FIELDS = {"states": ("int64", 2), "digests": ("uint8", 2)}
_UNREAD = bytes(32)  # stands for the digest of a file that can't be read

Digests: TypeAlias = npt.NDArray[np.uint8]
State: TypeAlias = tuple[int, ...]  # checksum of the path, size, times of change, inode


def digest_of(content: bytes | memoryview) -> bytes:
    """SHA-256 of bytes, 32 bytes."""
    return hashlib.sha256(content).digest()


def file_digest(path: str | os.PathLike[str]) -> bytes:
    """SHA-256 of a file's bytes, 32 bytes; zeros where it can't be read."""
    return _read(os.path.abspath(path))[1]  # noqa: PTH100


def picture_digest(digest: bytes, crop: bytes = b"") -> str:
    """What a picture is known by, 32 hex digits: of its file's digest and the box it is cut to."""
    return (digest_of(digest + crop) if crop else digest).hex()[:32]


def file_digests(paths: Sequence[str | os.PathLike[str]]) -> Digests:
    """SHA-256 of what each file holds: uint8 [N, 32]; zeros where it can't be read."""
    count = len(paths)
    digests, states = np.empty((count, 32), np.uint8), np.empty((count, 5), np.int64)
    if not count:
        return digests
    kept = _kept_at(_common_path(paths))
    known = _known(kept)

    def read_group(first: int) -> list[tuple[State, bytes]]:
        group = range(first, min(first + FILES_AT_A_TIME, count))
        return [_of(os.path.abspath(paths[i]), known) for i in group]  # noqa: PTH100

    with (
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
        progress(total=count, description="reading files", unit="file") as bar,
    ):
        for start in range(0, count, FILES_WAITING):
            firsts = range(start, min(start + FILES_WAITING, count), FILES_AT_A_TIME)
            for first, found in zip(firsts, pool.map(read_group, firsts), strict=True):
                place = slice(first, first + len(found))
                states[place] = [state for state, _ in found]
                joined = b"".join(digest for _, digest in found)
                digests[place] = np.frombuffer(joined, np.uint8).reshape(-1, 32)
                bar.update(len(found))
    if states[:, 1].sum() >= KEPT_FROM:
        _keep(kept, known, states, digests)
    return digests


def _common_path(paths: Sequence[str | os.PathLike[str]]) -> str:
    """As `os.path.commonpath` of the absolute paths, which would hold them all at once."""
    common = os.path.abspath(paths[0])  # noqa: PTH100
    for path in paths:
        name = os.path.abspath(path)  # noqa: PTH100
        if not name.startswith(common) or name[len(common) :][:1] not in ("", os.sep):
            common = os.path.commonpath([common, name])
    return common


def digest_of_files(paths: Sequence[str | os.PathLike[str]]) -> str:
    """SHA-256 in hex of what the files hold, in their order; a file that can't be read counts too."""
    return digest_of(file_digests(paths).tobytes()).hex()


def file_states(paths: Sequence[str | os.PathLike[str]]) -> list[State] | None:
    """By what it is noticed that files change: path, size, times, inode.

    None: a file is not there, or has changed so lately that it may change again at the same time.
    """
    latest = time.time_ns() - SETTLED
    try:
        states = [_state(name, os.stat(name)) for name in map(os.path.abspath, paths)]  # noqa: PTH116
    except OSError:
        return None
    return states if all(max(state[2:4]) < latest for state in states) else None


def _of(name: str, known: dict[State, bytes]) -> tuple[State, bytes]:
    """State and digest of a file: that which is known of this state, if any."""
    if known:
        with contextlib.suppress(OSError):
            state = _state(name, os.stat(name))  # noqa: PTH116 (many files)
            if state in known:
                return state, known[state]
    return _read(name)


def _read(name: str) -> tuple[State, bytes]:
    digest = hashlib.sha256()
    try:
        descriptor = os.open(name, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # a FIFO would wait
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise OSError
            while block := os.read(descriptor, _BLOCK):
                digest.update(block)
        finally:
            os.close(descriptor)
    except OSError:
        return (0, 0, 0, 0, 0), _UNREAD
    return _state(name, status), digest.digest()


def _state(name: str, status: os.stat_result) -> State:
    checksum = zlib.crc32(os.fsencode(name))
    inode = status.st_ino & _INT64  # some file systems use all 64 bits
    return checksum, status.st_size, status.st_mtime_ns, status.st_ctime_ns, inode


def _kept_at(folder: str) -> Path:
    """The file that keeps the digests of files below a folder."""
    return cache_folder("digests") / f"{digest_of(os.fsencode(folder)).hex()[:32]}.npz"


def cache_folder(name: str) -> Path:
    """A folder of the user's cache folder."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    return base / "pymcip" / name


def _known(kept: Path) -> dict[State, bytes]:
    """The digests of files that were in these states."""
    if not kept.is_file():
        return {}
    try:
        arrays = read_npz(kept, _FIELDS)
    except DamagedFileError:
        return {}
    states, digests = arrays["states"], arrays["digests"]
    if states.shape[1:] != (5,) or digests.shape != (len(states), 32):
        return {}
    return {
        tuple(state): digest.tobytes()
        for state, digest in zip(states.tolist(), digests, strict=True)
    }


def _keep(
    kept: Path, known: dict[State, bytes], states: npt.NDArray[np.int64], digests: Digests
) -> None:
    """Add the digests of files that have not changed recently; a failure to write is ignored."""
    latest = time.time_ns() - SETTLED
    settled = (states[:, 2:4].max(axis=1) < latest) & digests.any(axis=1)
    rows = [row for row in np.flatnonzero(settled) if tuple(states[row].tolist()) not in known]
    rows = rows[-MOST_KEPT:]
    if not rows:
        return
    before = list(known)[max(0, len(known) + len(rows) - MOST_KEPT) :]
    old = np.frombuffer(b"".join(known[state] for state in before), np.uint8)
    with contextlib.suppress(OSError):
        write_npz(
            kept,
            states=np.concatenate([np.array(before, np.int64).reshape(-1, 5), states[rows]]),
            digests=np.concatenate([old.reshape(-1, 32), digests[rows]]),
        )
