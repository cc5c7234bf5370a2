"""What a model's config asks for beside its weights: packages, code, files of other repositories."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import Any

from huggingface_hub import constants

from pymcip.errors import ConfigError, MissingDependencyError

_SOURCES = ("hf-hub:", "hf_hub:")


def check_config(name: str, config: Any) -> None:
    """Refuse what can't be or must not be made of a config, before a model is built.

    Args:
        name: the model's, as open_clip takes it.
        config: open_clip's `model_cfg`.

    Raises:
        ConfigError: it is no such config, or asks for code from elsewhere to be run.
        MissingDependencyError: its text side needs transformers, which is not installed.
    """
    if not isinstance(config, dict):
        raise ConfigError(f"model={name!r}: its config is a {type(config).__name__}, not an object")
    for part in ("text_cfg", "vision_cfg"):
        if not isinstance(config.get(part), dict):
            raise ConfigError(f"model={name!r}: its config has no object {part!r}")
    text = config["text_cfg"]
    if "trust_remote_code" in (text.get("tokenizer_kwargs") or {}):
        raise ConfigError(
            f"model={name!r}: its config asks for trust_remote_code, which runs code from the hub; "
            "that is never done. Take it out of tokenizer_kwargs"
        )
    siglip = ":" not in name and "siglip" in name.lower()
    asked = text.get("hf_model_name") or text.get("hf_tokenizer_name") or (siglip and name)
    if asked and importlib.util.find_spec("transformers") is None:
        raise MissingDependencyError(
            f"model={name!r} takes its tokenizer or text tower from Hugging Face ({asked}), which "
            "needs transformers: pip install transformers"
        )


@contextlib.contextmanager
def without_requests(name: str, config: dict[str, Any]) -> Iterator[None]:
    """Let nothing be fetched in the block where `name` is a folder, whatever its config says.

    Raises:
        ConfigError: a file of another repository is asked for, and not in Hugging Face's cache.
    """
    if not name.startswith("local-dir:"):
        yield
        return
    text, vision = config["text_cfg"], config["vision_cfg"]
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    except Exception as error:
        others = [text.get("hf_model_name"), str(vision.get("timm_model_name") or "")]
        named = [other for other in others[:1] if other]
        named += [other for other in others[1:] if other and other.startswith(_SOURCES)]
        if not named:
            raise
        raise ConfigError(
            f"model={name!r}: its open_clip_config.json names {' and '.join(named)}, which can't be "
            "read on this machine; the config of a folder never causes a download. If you want it, "
            "fetch it first: hf download NAME"
        ) from error
    finally:
        constants.HF_HUB_OFFLINE = before
