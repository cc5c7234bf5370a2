"""Errors that pymcip raises on purpose. Each message says what was received, what is allowed, and
the next step."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_UNSAFE = re.compile(r"weights_only|allow_pickle|pickle\.load|safe_globals|trust_remote_code", re.I)


def reason_of(error: BaseException | str, most: int = 300) -> str:
    """What another library says of an error, without its advice to load a file unsafely."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = text.rpartition("WeightsUnpickler error: ")[2]  # what torch puts its advice before
    sentences = re.split(r"(?<=[.!?])\s+", text)
    safe = " ".join(part for part in sentences if not _UNSAFE.search(part))
    if not safe:
        safe = "it holds more than plain tensors and arrays, which could run code when it is read"
    return (safe if len(safe) <= most else f"{safe[:most]} […]").rstrip(".")


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """The end of a message on an unknown word: the allowed one that is most like it, or ""."""
    close = difflib.get_close_matches(word, list(allowed), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


class PymcipError(Exception):
    """Base of every error that pymcip raises on purpose."""


class ConfigError(PymcipError, ValueError):
    """A configuration is wrong. All problems found are reported at once (`problems`)."""

    def __init__(self, problems: str | list[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        if len(self.problems) == 1:
            message = self.problems[0]
        else:
            lines = "\n".join(f"  - {problem}" for problem in self.problems)
            message = f"{len(self.problems)} problems with the configuration:\n{lines}"
        super().__init__(message)


class DataError(PymcipError, ValueError):
    """Input data are missing, empty, malformed or unsafe."""


class DecodeError(DataError):
    """One image can't be decoded (truncated, not an image, or a decompression bomb)."""


class StaleEmbeddingsError(DataError):
    """Embeddings or a run were made from another model, transform or data than asked for."""


class OutputExistsError(PymcipError, FileExistsError):
    """An output folder is not empty, and neither `overwrite` nor `resume` was given."""


class FolderInUseError(PymcipError, RuntimeError):
    """Another process writes to an output folder."""


class DamagedFileError(DataError):
    """A file that pymcip wrote is damaged."""


class ResourceError(PymcipError, OSError):
    """The machine is at its limits: disk, memory, open files, or a process that was ended."""


class BackendError(PymcipError, RuntimeError):
    """A back end was asked for by name and can't run here."""


class CheckpointError(PymcipError, RuntimeError):
    """A checkpoint is missing, damaged, or belongs to another run or model."""


class TrainingDivergedError(PymcipError, RuntimeError):
    """The loss was not finite for too many steps in a row."""


class MissingDependencyError(PymcipError, ImportError):
    """An optional package is needed; the message names the extra that installs it."""
