"""Output folders in use: one process writes to a folder at a time, or several that share a run.

`hold` takes the lock of a folder, `.pymcip-lock`. While it is held, `pymcip.files` lists every file
that it writes below the folder in `.pymcip-files`: only these are removed by `overwrite`.
Processes that share a run hold the folder together; each writes files of its own.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # not on Windows: the text in the lock decides alone
    fcntl = None  # type: ignore[assignment]

from pymcip.errors import FolderInUseError

LOCK, MANIFEST = ".pymcip-lock", ".pymcip-files"
WAIT = 0.5  # seconds between two looks at a lock
_TEMPORARY = re.compile(r"\..*\.[0-9a-f]{32}\.tmp")

_log = logging.getLogger("pymcip.files")
_guard = threading.Lock()  # of the two below
_holders: dict[Path, int] = {}  # the thread that holds a folder
_listed: dict[Path, set[str]] = {}  # what the manifest of a held folder lists


def temporary_name(target: Path) -> Path:
    """Return a name beside `target` that no other thread, process or host chooses."""
    return target.with_name(f".{target.name[:32]}.{uuid.uuid4().hex}.tmp")


def is_ours(name: str) -> bool:
    """Whether a file name is a lock's, a manifest's, or of a file that a killed process began."""
    return name in (LOCK, MANIFEST) or _TEMPORARY.fullmatch(name) is not None


def holds_files(folder: Path) -> bool:
    """Whether a folder holds more than what `is_ours` names; False if there is none."""
    return folder.is_dir() and not all(is_ours(entry.name) for entry in folder.iterdir())


@contextlib.contextmanager
def hold(folder: Path, *, wait: bool = False, shared: bool = False) -> Iterator[None]:
    """Keep other threads, processes and hosts from writing to a folder while the block runs.

    The lock is the kernel's, so that it ends with its process; where a file system has none, the
    host and the process that the file names decide. What killed processes began is removed. A
    folder that this thread holds already stays held.

    Args:
        folder: exists.
        wait: wait for another one to end; else refuse.
        shared: other processes may hold it too, if they share it. Nothing is removed then.

    Raises:
        FolderInUseError: another one holds it.
    """
    folder = Path(os.path.abspath(folder))  # noqa: PTH100 (links stay as they are)
    me = threading.get_ident()
    if _holders.get(folder) == me:
        yield
        return
    descriptor = _take(folder, me, wait, shared)
    try:
        if not shared:
            _sweep(folder)
        with _guard:
            _listed[folder] = set(manifest(folder))
        yield
    finally:
        with _guard:
            _listed.pop(folder, None)
            _holders.pop(folder, None)
        if not shared or _is_last(descriptor):
            (folder / LOCK).unlink(missing_ok=True)
        os.close(descriptor)


def _is_last(descriptor: int) -> bool:
    """Whether no other process shares the lock of an open file; True where there are no locks."""
    if fcntl is not None:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return False
        except OSError:  # a file system without locks
            pass
    return True


def _take(folder: Path, me: int, wait: bool, shared: bool) -> int:
    """Take the lock; returns its open file."""
    announced = False
    while True:
        with _guard:
            # A look at the file of a lock that this process holds would end the lock.
            taken = folder in _holders
            descriptor, holder = (None, _self()) if taken else _try_lock(folder / LOCK, shared)
            if descriptor is not None:
                _holders[folder] = me
                return descriptor
        who = "another process, which has just begun"
        if holder:
            who = (
                f"process {holder.get('pid')} on {holder.get('host')}, since {holder.get('since')}"
            )
        if not wait:
            raise FolderInUseError(
                f"{folder} is in use by {who}; wait until it ends, or give another folder. If there "
                f"is no such process any more, remove {folder / LOCK}"
            )
        if not announced:
            _log.info("waiting for %s, which writes to %s", who, folder)
            announced = True
        time.sleep(WAIT)


def _self() -> dict[str, Any]:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": since}


def _try_lock(path: Path, shared: bool) -> tuple[int | None, dict[str, Any]]:
    """The locked file, open; or None and who holds it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
    try:
        holder = json.loads(os.read(descriptor, 4096) or b"{}")
        holder = holder if isinstance(holder, dict) else {}
    except ValueError:
        holder = {}
    together = shared and bool(holder.get("shared"))
    free = not holder or together or _has_ended(holder)
    if fcntl is not None:
        try:
            fcntl.lockf(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            free = True
        except (BlockingIOError, PermissionError):
            free = False
        except OSError:  # a file system without locks
            pass
    try:
        if free and os.fstat(descriptor).st_ino != path.stat().st_ino:
            free = False  # removed by the one before while it was opened here
    except OSError:
        free = False
    if not free:
        os.close(descriptor)
        return None, holder
    if holder and not together:
        _log.info("%s: process %s ended and left its lock", path.parent, holder.get("pid"))
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps({**_self(), "shared": shared}).encode(), 0)
    return descriptor, holder


def _has_ended(holder: dict[str, Any]) -> bool:
    """Whether the process that a lock names is one of this host that runs no more."""
    if holder.get("host") != socket.gethostname() or not isinstance(holder.get("pid"), int):
        return False
    try:
        os.kill(holder["pid"], 0)
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:
        pass
    return False


def _sweep(folder: Path) -> None:
    """Remove what killed processes left below a folder that is held, but not in folders in use."""
    for parent, children, names in os.walk(folder):
        for name in [*children, *names]:
            path = Path(parent, name)
            if _TEMPORARY.fullmatch(name) is None:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        children[:] = [
            name
            for name in children
            if _TEMPORARY.fullmatch(name) is None and not Path(parent, name, LOCK).exists()
        ]


# --- what was written ----------------------------------------------------------------------------


def record_files(paths: Iterable[Path]) -> None:
    """List files in the manifests of the folders above them that are held. Before they are written.

    Processes that share a folder list all its files at once, at their start: lines that several
    append at the same time can be lost on a network disk.
    """
    absolute = [Path(os.path.abspath(path)) for path in paths]  # noqa: PTH100
    with _guard:
        for folder, known in _listed.items():
            below = (path for path in absolute if path.is_relative_to(folder))
            names = dict.fromkeys(path.relative_to(folder).as_posix() for path in below)
            new = [name for name in names if name not in known]
            known.update(new)
            lines = (json.dumps(name).encode() + b"\n" for name in new)  # may hold line ends
            if new:
                with (folder / MANIFEST).open("ab") as handle:
                    handle.write(b"".join(lines))


def manifest(folder: Path) -> list[str]:
    """Return the names below a folder that pymcip has written, as far as they can be read."""
    try:
        lines = (folder / MANIFEST).read_bytes().splitlines()
    except FileNotFoundError:
        return []
    names = []
    for line in lines:
        try:
            name = json.loads(line)
        except ValueError:  # the one being written when a process was killed
            continue
        if isinstance(name, str) and not Path(name).is_absolute() and ".." not in Path(name).parts:
            names.append(name)
    return names


def written_files(folder: Path) -> list[Path]:
    """Return the files below a folder that its manifest lists, none of them behind a link."""
    real = folder.resolve()
    found = (folder / name for name in dict.fromkeys(manifest(folder)))
    return [
        path
        for path in found
        if (path.is_symlink() or path.is_file())
        and path.parent.resolve() == real / path.parent.relative_to(folder)
    ]


def remove_written(folder: Path) -> list[str]:
    """Remove what the manifest of a held folder lists; returns names of what else is in it."""
    parents: set[Path] = set()
    for path in written_files(folder):
        path.unlink(missing_ok=True)
        parents.update(parent for parent in path.parents if parent.is_relative_to(folder))
    for parent in sorted(parents - {folder}, key=lambda path: len(path.parts), reverse=True):
        with contextlib.suppress(OSError):  # it holds something else
            left = list(parent.iterdir())
            if all(path.name in (LOCK, MANIFEST) for path in left):
                for path in left:
                    path.unlink(missing_ok=True)
            parent.rmdir()
    with _guard:
        (folder / MANIFEST).unlink(missing_ok=True)
        _listed.get(Path(os.path.abspath(folder)), set()).clear()  # noqa: PTH100
    return sorted(entry.name for entry in folder.iterdir() if not is_ours(entry.name))
