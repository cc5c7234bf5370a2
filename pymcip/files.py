"""Files that are complete or absent, and reading them back with checks.

Everything is written to a temporary name and renamed. The same content gives the same bytes.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pymcip.errors import DamagedFileError, ResourceError, reason_of
from pymcip.folders import record_files, temporary_name

_AGAIN = "Remove it and run the same command again"
_WHOLE = (str, int, float, dict)  # are made JSON as a whole
PIECE = 65_536  # items of a list at a time


@contextlib.contextmanager
def atomic_path(
    path: str | os.PathLike[str], owned: Collection[str] | None = None
) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success sync it and rename it to `path`.

    Works for files and folders. If the block raises (a full disk included), the temporary one is
    removed and whatever stood at `path` before is untouched. A folder takes the place of another
    one at once: there is no moment without either.

    Args:
        path: the file or folder.
        owned: names of the files in a folder that are removed if the new folder lacks them, while
            others are kept in it; None: all are removed.

    Raises:
        ResourceError: the disk is full, or there are too many open files.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(target)
    try:
        yield temporary
        written = [temporary]
        if temporary.is_dir():
            written = [file for file in temporary.rglob("*") if file.is_file()]
        for file in written:
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        record_files(target / file.relative_to(temporary) for file in written)
        if temporary.is_dir() and target.exists():
            _exchange(temporary, target)
            if owned is not None:
                _keep_others(temporary, target, owned)
        else:
            os.replace(temporary, target)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except Exception as error:
        limit = _limit(error, target)
        if limit is None or isinstance(error, ResourceError):
            raise
        raise limit from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def _limit(error: Exception, target: Path) -> ResourceError | None:
    """The error to raise where the machine is at its limit; None where it is not."""
    number, text = getattr(error, "errno", None), str(error)
    if number == errno.EMFILE or "Too many open files" in text:
        return ResourceError(
            errno.EMFILE,
            "Too many open files; allow more (ulimit -n 4096) or use fewer workers, then run the same command again",
            str(target),
        )
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text or "os error 28" in text:
        return ResourceError(
            errno.ENOSPC,
            "No space left on device; what was there is whole. Free some space, then run the "
            "same command again (train and evaluate: with resume='latest')",
            str(target),
        )
    return None


def _exchange(one: Path, other: Path) -> None:
    """Let two folders change places, at once where the system can."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if rename and rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return
    aside = temporary_name(other).with_suffix(".old")  # not removed if the process ends here
    other.rename(aside)
    one.rename(other)
    aside.rename(one)


def _keep_others(old: Path, new: Path, owned: Collection[str]) -> None:
    """Move the files of `old` that `new` lacks there, but for those that pymcip wrote."""
    for file in list(old.rglob("*")):
        name = file.relative_to(old)
        goes = name.as_posix() in owned or (new / name).exists()
        if goes or (file.is_dir() and not file.is_symlink()):
            continue
        (new / name).parent.mkdir(parents=True, exist_ok=True)
        file.rename(new / name)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_npz(path: str | os.PathLike[str], **arrays: npt.ArrayLike) -> None:
    """Write arrays as `numpy.savez` does, but without the time: equal arrays, equal bytes."""
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as handle:
                np.lib.format.write_array(handle, np.asanyarray(array), allow_pickle=False)


def read_system_file(path: str) -> str:
    """The text of a file such as /proc/cpuinfo; "" where there is none."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""


# --- reading back --------------------------------------------------------------------------------


def damaged(
    path: str | os.PathLike[str], problem: Exception | str, advice: str = _AGAIN
) -> DamagedFileError:
    """Make the error for a file of pymcip's own that can't be what was written."""
    unread = isinstance(problem, OSError)  # missing, no permission, a damaged disk
    what = "can't be read" if unread else "is damaged"
    return DamagedFileError(f"{path} {what}: {reason_of(problem)}. {advice}")


def read_json(
    path: str | os.PathLike[str], fields: Mapping[str, Any] | None = None, advice: str = _AGAIN
) -> Any:
    """Read a JSON file that pymcip wrote.

    Args:
        path: the file.
        fields: it must be an object with these fields, each of a type (or a tuple of types).
        advice: what to do if it is damaged.

    Raises:
        DamagedFileError: it can't be read as that.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, error, advice) from error
    if fields is not None:
        if not isinstance(value, dict):
            raise damaged(path, f"it holds a {type(value).__name__}, not an object", advice)
        for name, kind in fields.items():
            if name not in value:
                raise damaged(path, f"it has no {name!r}", advice)
            kinds = kind if isinstance(kind, tuple) else (kind,)
            right = isinstance(value[name], (*kinds, int) if float in kinds else kinds)
            if not right or (isinstance(value[name], bool) and bool not in kinds):
                raise damaged(path, f"{name!r} is {str(value[name])[:60]!r}", advice)
    return value


def read_npz(
    path: str | os.PathLike[str], fields: Mapping[str, tuple[str, int]], advice: str = _AGAIN
) -> dict[str, np.ndarray]:
    """Read the arrays of an .npz file that pymcip wrote; checksums of the file are compared.

    `fields`: dtype and number of axes of each array.

    Raises:
        DamagedFileError: it can't be read, or holds something else.
    """
    try:
        with Path(path).open("rb") as handle, np.load(handle, allow_pickle=False) as stored:
            arrays = {name: np.asarray(stored[name]) for name in fields}
    except Exception as error:  # what a damaged file raises is not bounded by a list
        raise damaged(path, error, advice) from error
    for name, (dtype, axes) in fields.items():
        array = arrays[name]
        if array.dtype != np.dtype(dtype) or array.ndim != axes:
            raise damaged(path, f"{name} is {array.dtype} {list(array.shape)}", advice)
    return arrays


def fingerprint(value: Any) -> str:
    """SHA-256 (hex) of a value's canonical JSON: equal values, equal fingerprints; see `json_pieces`."""
    digest = hashlib.sha256()
    for piece in json_pieces(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False):
        digest.update(piece.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def json_pieces(value: Any, **options: Any) -> Iterator[str]:
    """Yield what `json.dumps` makes of a value, piece by piece, so that it may be larger than the memory.

    Arrays and iterators stand for lists; they may hold such, but not in a dict.
    """
    if value is None or isinstance(value, _WHOLE):
        yield json.dumps(value, **options)
        return
    comma = options.get("separators", (", ",))[0]
    parts: Iterable[Any] = [value]
    if isinstance(value, np.ndarray):
        parts = (value[start : start + PIECE].tolist() for start in range(0, len(value), PIECE))
    items, before = chain.from_iterable(parts), "["
    while block := list(islice(items, PIECE)):
        if all(item is None or isinstance(item, _WHOLE) for item in block):
            yield before + json.dumps(block, **options)[1:-1]
        else:
            for item in block:
                yield before
                yield from json_pieces(item, **options)
                before = comma
        before = comma
    yield "]" if before == comma else "[]"
