"""Progress bars: shown for what may take longer than two seconds, silent without a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress(
    iterable: Iterable[Any] | None = None,
    *,
    total: int | None = None,
    initial: int = 0,
    description: str = "",
    unit: str = "it",
    unit_scale: bool = False,
) -> Any:
    """A tqdm bar on stderr that appears after two seconds, and only if stdout is a terminal."""
    return tqdm(
        iterable,
        total=total,
        initial=initial,
        desc=description,
        unit=unit,
        unit_scale=unit_scale,
        delay=2.0,
        disable=not sys.stdout.isatty(),
        dynamic_ncols=True,
    )
