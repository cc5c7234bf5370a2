"""pymcip: fine-tune CLIP models for image search without breaking text search (MCIP).

Stages, in the order in which data flows: `embed` -> `mine_captions` -> `train` -> `evaluate` ->
`export`; `build_index` makes an `Index` to search in. Each takes its options as keywords (or a ready config) and can be used alone.
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pymcip.checking import CheckResult, check
    from pymcip.configs import (
        CheckConfig,
        DemoConfig,
        EmbedConfig,
        EvaluateConfig,
        ExportConfig,
        IndexConfig,
        MineConfig,
        SweepConfig,
        TrainConfig,
    )
    from pymcip.embedding import EmbeddingFolder, embed
    from pymcip.evaluation import EvaluateResult, evaluate
    from pymcip.exporting import ExportResult, export
    from pymcip.mining import CaptionTable, MineResult, mine_captions
    from pymcip.model import ClipModel, load
    from pymcip.search import Hit, Index, IndexResult, build_index
    from pymcip.studies import SweepResult, sweep
    from pymcip.training.callbacks import Callbacks, TrainState
    from pymcip.training.result import TrainResult
    from pymcip.training.train import train

try:
    __version__ = metadata.version("pymcip")
except metadata.PackageNotFoundError:  # the bare source folder
    __version__ = "0+unknown"

_MODULES = {
    "checking": ["CheckResult", "check"],
    "configs": [
        "CheckConfig",
        "DemoConfig",
        "EmbedConfig",
        "EvaluateConfig",
        "ExportConfig",
        "IndexConfig",
        "MineConfig",
        "SweepConfig",
        "TrainConfig",
    ],
    "embedding": ["EmbeddingFolder", "embed"],
    "evaluation": ["EvaluateResult", "evaluate"],
    "exporting": ["ExportResult", "export"],
    "mining": ["CaptionTable", "MineResult", "mine_captions"],
    "model": ["ClipModel", "load"],
    "search": ["Hit", "Index", "IndexResult", "build_index"],
    "studies": ["SweepResult", "sweep"],
    "training": ["Callbacks", "TrainResult", "TrainState", "train"],
}
PARTS = ("losses", "metrics", "ops")  # modules that are public as a whole
_WHERE = {name: f"pymcip.{module}" for module, names in _MODULES.items() for name in names}

__all__ = [
    "Callbacks",
    "CaptionTable",
    "CheckConfig",
    "CheckResult",
    "ClipModel",
    "DemoConfig",
    "EmbedConfig",
    "EmbeddingFolder",
    "EvaluateConfig",
    "EvaluateResult",
    "ExportConfig",
    "ExportResult",
    "Hit",
    "Index",
    "IndexConfig",
    "IndexResult",
    "MineConfig",
    "MineResult",
    "SweepConfig",
    "SweepResult",
    "TrainConfig",
    "TrainResult",
    "TrainState",
    "__version__",
    "build_index",
    "check",
    "embed",
    "evaluate",
    "export",
    "load",
    "mine_captions",
    "sweep",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import a stage when it is first used: `import pymcip` stays quick and needs no torch."""
    if name in PARTS:
        return import_module(f"pymcip.{name}")
    if name not in _WHERE:
        raise AttributeError(f"module 'pymcip' has no attribute {name!r}")
    value = getattr(import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, *PARTS])
