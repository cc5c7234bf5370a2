"""Digests of what files hold: by them data are recognised, whatever their names and times say.

Files are read once, several at a time. Digests of large sets are kept in the user's cache folder
(`$XDG_CACHE_HOME/pymcip`, else `~/.cache/pymcip`) and used again while a file's size, times and inode
stay the same; a program can't set the time of a file's last change (ctime) back.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from pymcip.errors import DamagedFileError
from pymcip.files import read_npz, write_npz
from pymcip.progress import progress

KEPT_FROM = 1 << 28  # bytes of a set whose digests are kept
SETTLED = 2 * 10**9  # ns: a file that changed later than that may change again at the same time
_BLOCK = 1 << 20
_FILES_AT_A_TIME = 64
_FIELDS = {"states": ("int64", 2), "digests": ("uint8", 2)}

State = tuple[int, int, int, int]  # size, time of change of content and of anything, inode


def file_digest(path: str | os.PathLike[str]) -> bytes:
    """SHA-256 of a file's bytes, 32 bytes; of its error's name where it can't be read."""
    return _read(os.fspath(path))[1]


def picture_digest(content: bytes, crop: bytes = b"") -> str:
    """Digest (hex) of an image file's bytes and of the box it is cut to, by which pictures are known."""
    return hashlib.blake2b(content + crop, digest_size=16).hexdigest()


def file_digests(paths: Sequence[str | os.PathLike[str]]) -> str:
    """SHA-256 in hex of what the files hold, in their order; a file that can't be read counts too."""
    names = [os.fspath(path) for path in paths]
    kept, known = _kept(names)
    groups = [names[i : i + _FILES_AT_A_TIME] for i in range(0, len(names), _FILES_AT_A_TIME)]
    starts = range(0, len(names), _FILES_AT_A_TIME)
    found: list[tuple[State, bytes]] = []

    def work(start: int, group: list[str]) -> list[tuple[State, bytes]]:
        return [_of(name, known.get(start + i)) for i, name in enumerate(group)]

    with (
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
        progress(total=len(names), description="reading files", unit="file") as bar,
    ):
        for part in pool.map(work, starts, groups):
            found += part
            bar.update(len(part))
    if sum(state[0] for state, _ in found) >= KEPT_FROM:
        _keep(kept, found)
    return hashlib.sha256(b"".join(digest for _, digest in found)).hexdigest()


def _of(name: str, known: tuple[State, bytes] | None) -> tuple[State, bytes]:
    """State and digest of a file: those known, if its state is still the same."""
    if known is not None:
        try:
            if _state(os.stat(name)) == known[0]:  # noqa: PTH116 (many files)
                return known
        except OSError:
            pass
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
    except OSError as error:
        return (0, 0, 0, 0), hashlib.sha256(type(error).__name__.encode()).digest()
    return _state(status), digest.digest()


def _state(status: os.stat_result) -> State:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _kept(names: list[str]) -> tuple[Path, dict[int, tuple[State, bytes]]]:
    """The file that keeps the digests of these files, and what is in it, by place."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    key = hashlib.sha256(b"\0".join(os.fsencode(os.path.abspath(name)) for name in names))  # noqa: PTH100
    path = base / "pymcip" / "digests" / f"{key.hexdigest()[:32]}.npz"
    if not path.is_file():
        return path, {}
    try:
        arrays = read_npz(path, _FIELDS)
    except DamagedFileError:
        return path, {}
    states, digests = arrays["states"], arrays["digests"]
    if states.shape != (len(names), 4) or digests.shape != (len(names), 32):
        return path, {}
    rows = zip(states.tolist(), digests, strict=True)
    return path, {
        place: ((row[0], row[1], row[2], row[3]), digest.tobytes())
        for place, (row, digest) in enumerate(rows)
        if row[3]
    }


def _keep(path: Path, found: list[tuple[State, bytes]]) -> None:
    """Write what is known of files that have not changed of late; it is no loss if that fails."""
    latest = time.time_ns() - SETTLED
    settled = [state if max(state[1:3]) < latest else (0, 0, 0, 0) for state, _ in found]
    digests = np.frombuffer(b"".join(digest for _, digest in found), np.uint8)
    with contextlib.suppress(OSError):
        write_npz(path, states=np.array(settled, np.int64), digests=digests.reshape(-1, 32))
