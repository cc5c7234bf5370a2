"""Options of the stage that writes weights and an index for use without pymcip."""

from __future__ import annotations

from dataclasses import dataclass

from pymcip.configs.model import ModelOptions
from pymcip.configs.options import Source, option, required


@dataclass(frozen=True, kw_only=True)
class ExportConfig(ModelOptions):
    """Options of `pymcip.export`."""

    out: Source = required("folder to write: state_dict.pt, hub/, and index.faiss if asked for")
    index: Source | None = option(
        None, "embedding folder whose images go into a faiss index (needs pymcip[faiss])"
    )
    overwrite: bool = option(False, "replace what is in `out`")
