"""Files that are complete or absent: everything is written to a temporary name and renamed."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pymcip.errors import OutputExistsError

TEMPORARY_SUFFIX = ".tmp"


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success sync it and rename it to `path`.

    Works for files and folders. If the block raises (a full disk included), the temporary one is
    removed and whatever stood at `path` before is untouched.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        yield temporary
        if temporary.is_dir():
            if target.exists():
                shutil.rmtree(target)
        else:
            with open(temporary, "rb") as handle:
                os.fsync(handle.fileno())
        os.replace(temporary, target)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def fingerprint(value: Any) -> str:
    """SHA-256 (hex) of a value's canonical JSON: equal values, equal fingerprints."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode("utf-8")).hexdigest()


def file_fingerprint(path: str | os.PathLike[str]) -> list[Any]:
    """What identifies a data file without reading it: name, size in bytes, modification time (ns)."""
    path = Path(path)
    status = path.stat()
    return [path.name, status.st_size, status.st_mtime_ns]


def prepare_output(
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    resume: bool = False,
    inputs: Iterable[Any] = (),
) -> Path:
    """Make the output folder; refuse one that holds anything unless told what to do with it.

    Args:
        out: the folder.
        overwrite: remove what is in it.
        resume: keep what is in it.
        inputs: what the caller reads (paths, tuples of them; None and names that are no paths are
            passed over): none of it may lie in a folder that is overwritten.

    Raises:
        OutputExistsError: `out` is a file, is not empty, or holds one of the inputs.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise OutputExistsError(f"{out} is a file; give a folder that is new or empty.")
    if out.is_dir() and any(out.iterdir()):
        if overwrite:
            nested = (item if isinstance(item, tuple) else (item,) for item in inputs)
            for source in itertools.chain.from_iterable(nested):
                path = Path(os.fspath(source or "").removeprefix("local-dir:"))
                if source and path.exists() and path.resolve().is_relative_to(out.resolve()):
                    raise OutputExistsError(
                        f"overwrite would remove {source}, which is read from the output folder "
                        f"{out}; give another output folder"
                    )
            shutil.rmtree(out)
        elif not resume:
            raise OutputExistsError(
                f"the output folder {out} is not empty; give a new one, or overwrite=True to "
                'replace it, or resume="latest" to go on with the run in it.'
            )
    out.mkdir(parents=True, exist_ok=True)
    return out
