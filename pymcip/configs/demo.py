"""Options of the demo, the whole way on a small world of pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pymcip.configs.options import Config, Source, option


@dataclass(frozen=True, kw_only=True)
class DemoConfig(Config):
    """Options of `pymcip demo`."""

    out: Source = option(Path("runs/demo"), "folder to write: report.md, report.json, pictures")
    seeds: int = option(1, "how many seeds to run and average over", at_least=1)
    smoke: bool = option(False, "a tiny world: shows that everything runs, not the pattern")
    overwrite: bool = option(False, "replace what is in `out`")
