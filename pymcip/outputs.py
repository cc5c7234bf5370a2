"""Output folders of the stages: new or empty, or resumed, or with what pymcip wrote removed."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from pymcip.configs import Config
from pymcip.data.sources import find, some
from pymcip.errors import DataError, OutputExistsError
from pymcip.folders import hold, holds_files, manifest, remove_written, written_files

_log = logging.getLogger("pymcip.files")


@contextlib.contextmanager
def output_folder(
    config: Any,
    *,
    resume: bool | Callable[[], bool] = False,
    read: Iterable[Path] = (),
    also: Iterable[Config] = (),
    shared: bool = False,
) -> Iterator[Path]:
    """Make and hold `config.out` while the block runs; see `pymcip.folders.hold`.

    With `config.overwrite` the files that pymcip wrote there are removed first, and no others.

    Args:
        config: with `out` and `overwrite`.
        resume: keep what is in it; or a function that says so, which is asked when there is
            something in it: another process may just have begun.
        read: files that the stage reads, as its indexes have found them.
        also: configs of other stages that are run from this one, whose inputs count too.
        shared: other processes may share it, see `pymcip.folders.hold`.

    Raises:
        OutputExistsError: it is a file; or it is not empty, and neither overwritten nor resumed; or
            it holds nothing that pymcip wrote; or one of the files to remove is read.
        FolderInUseError: another process writes to it.
    """
    out = Path(config.out)
    if out.exists() and not out.is_dir():
        raise OutputExistsError(f"{out} is a file; give a folder that is new or empty.")
    filled = holds_files(out)
    resume = resume() if callable(resume) else resume
    if filled and not resume:
        if not config.overwrite:
            raise OutputExistsError(
                f"the output folder {out} is not empty; give a new one, or overwrite=True to "
                'replace it, or resume="latest" to continue the run in it.'
            )
        _refuse_inputs(out, [config, *also], read)
        if not manifest(out):
            raise OutputExistsError(
                f"{out} holds {some(sorted(path.name for path in out.iterdir()))}, which pymcip did "
                "not write; overwrite removes only what it wrote. Give another folder, or remove "
                "them yourself"
            )
    out.mkdir(parents=True, exist_ok=True)
    with hold(out, wait=shared, shared=shared):
        if config.overwrite and not resume:
            others = remove_written(out)
            if others:
                _log.warning("%s: left as they are, not written by pymcip: %s", out, some(others))
        yield out


def _refuse_inputs(out: Path, configs: Iterable[Config], read: Iterable[Path]) -> None:
    """Refuse to remove a file that is read, by whatever name or link, or a folder of such."""
    identities = {_identity(path) for path in written_files(out)} - {None}
    for source, path in _inputs(configs):
        if path.resolve().is_relative_to(out.resolve()) or _identity(path) in identities:
            raise _is_read(source, out)
    for path in read if identities else ():
        if _identity(path) in identities:
            raise _is_read(path, out)


def _is_read(source: object, out: Path) -> OutputExistsError:
    return OutputExistsError(
        f"overwrite would remove {source}, which is read from the output folder {out}; give another "
        "output folder"
    )


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(path)  # noqa: PTH116 (many files)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _inputs(configs: Iterable[Config]) -> Iterator[tuple[str, Path]]:
    """Every text or path among the options that names something on the disk, and what it names."""
    for config in configs:
        for item in fields(config):
            value = getattr(config, item.name)
            values = value.values() if isinstance(value, dict) else (value,)
            for one in values:
                for source in one if isinstance(one, tuple) else (one,):
                    if item.name == "out" or not isinstance(source, (str, os.PathLike)):
                        continue
                    text = os.fspath(source).removeprefix("local-dir:")
                    with contextlib.suppress(DataError, OSError, ValueError):
                        for path in find(text) if text else []:
                            yield text, path
