"""Progress of what takes long: a bar in a terminal, else a log line every 30 seconds."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 30.0  # between two log lines, and before the first one
_LINE = "{desc}: {n_fmt} of {total_fmt}, {rate_fmt}, {remaining} left"

_log = logging.getLogger("pymcip.progress")


def progress(
    iterable: Iterable[Any] | None = None,
    *,
    total: int | None = None,
    initial: int = 0,
    description: str = "",
    unit: str = "it",
    unit_scale: bool = False,
) -> Any:
    """A tqdm bar on stderr that appears after two seconds.

    If stderr is no terminal (a file, a batch system), the same is logged every 30 seconds in a line
    of its own: how much is done, how fast, and the time that is left.
    """
    how: dict[str, Any] = {"delay": 2.0, "dynamic_ncols": True}
    if not (sys.stderr is not None and sys.stderr.isatty()):
        how = {
            "delay": LINE_SECONDS, "mininterval": LINE_SECONDS, "miniters": 1, "leave": False,
            "bar_format": _LINE, "file": _Lines(),
        }  # fmt: skip
    return tqdm(
        iterable,
        total=total,
        initial=initial,
        desc=description,
        unit=unit,
        unit_scale=unit_scale,
        **how,
    )


class _Lines:
    """A file for tqdm: what would be drawn is logged, without what moves the cursor."""

    def write(self, text: str) -> None:
        if line := " ".join(text.split()):
            _log.info("%s", line)

    def flush(self) -> None:
        pass
