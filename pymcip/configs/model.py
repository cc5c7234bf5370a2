"""Which open_clip model runs, where, and in which precision: shared by several stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pymcip.configs.options import Config, option, required

Precision = Literal["fp32", "amp_bf16"]


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Config):
    """Which open_clip model, and where it runs. Shared by every stage that runs a model."""

    model: str = required(
        "what open_clip takes: a name (ViT-L-14-336), hf-hub:org/name, local-dir:/path; "
        "or the folder of a pymcip run"
    )
    pretrained: str | None = option(None, "open_clip's pretrained tag or a checkpoint's path")
    image_size: int | None = option(
        None, "input size in pixels; default: the model's own", at_least=1
    )
    device: str | None = option(None, "cpu, cuda, cuda:1, …; default: a GPU if there is one")
    precision: Precision = option(
        "amp_bf16", "bf16 autocast (on a CPU without bf16: fp32), or plain fp32"
    )
