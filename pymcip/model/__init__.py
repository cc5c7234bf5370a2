"""CLIP models: loading, embedding, fingerprints, and which parameters belong to which tower."""

from pymcip.model.appended import AppendedClip, fp32_on_cpu
from pymcip.model.clip import (
    ClipModel,
    evaluation_mode,
    is_convolutional,
    plain_state,
    weights_fingerprint,
)
from pymcip.model.loading import has_bf16, load, load_configured

__all__ = [
    "AppendedClip",
    "ClipModel",
    "evaluation_mode",
    "fp32_on_cpu",
    "has_bf16",
    "is_convolutional",
    "load",
    "load_configured",
    "plain_state",
    "weights_fingerprint",
]
