"""Load any model that open_clip knows, and refuse what open_clip would let pass in silence."""

from __future__ import annotations

import difflib
import logging
import re
from pathlib import Path
from typing import Any

import open_clip
import torch

from pymcip.configs import ModelOptions
from pymcip.distributed import own_device
from pymcip.errors import CheckpointError, ConfigError, PymcipError, reason_of
from pymcip.model.appended import with_appended
from pymcip.model.clip import ClipModel, is_convolutional
from pymcip.model.hub_config import check_config, without_requests
from pymcip.ops.arrays import check_device

HUB_FOLDER = Path("exported") / "hub"  # inside a run folder
# Checkpoints of MCIP's authors: "MCIP-" and the model's name; files of this name with .pth
PUBLISHED = ("MCIP-ViT-L-14-336", "MCIP-ViT-SO400M-14-SigLIP-384")
PUBLISHED_AT = "https://visual-computing.com/files/MCIP"  # by github.com/Visual-Computing/MCIP
PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")  # of a pretrained tag

# open_clip reports through the root logger what pymcip's own messages already say.
_log = logging.getLogger("pymcip.model")


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies in bf16, or oneDNN's emulation by AVX-512 is of use.

    A CPU without either takes many times longer in bf16 than in fp32.
    """
    return device.type != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _device(device: str | None) -> torch.device:
    """The named device; without a name a GPU, if torch sees one. Each of several processes has its own."""
    device = own_device(device)
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_device("", device)
    return torch.device(device)


def _resolve_name(model: str) -> str:
    """The name open_clip knows: a run folder or a hub-style folder becomes `local-dir:…`."""
    if ":" not in model and Path(model).is_dir():
        for folder in (Path(model) / HUB_FOLDER, Path(model) / "hub", Path(model)):
            if (folder / "open_clip_config.json").is_file():
                return f"local-dir:{folder}"
        raise ConfigError(
            f"model={model!r} is a folder without {HUB_FOLDER}/open_clip_config.json; give a "
            "finished pymcip run, a hub-style folder, or a name that open_clip knows"
        )
    plain = model.replace("/", "-")  # ViT-B/32, as open_clip takes it too
    return plain if plain in open_clip.list_models() else model


def _on_the_hub(name: str) -> str:
    """What may be meant by a name with one slash, as Hugging Face's hub has them; or ""."""
    of_openai = re.fullmatch(r"openai/clip-vit-(base|large)-patch(\d+)(?:-(336))?", name)
    if of_openai is not None:  # in the format of transformers there, and in open_clip's own list
        size, patch, pixels = of_openai.groups()
        own = "-".join(filter(None, ("ViT", size[0].upper(), patch, pixels)))
        return f"; did you mean model={own!r} with pretrained='openai'?"
    return f"; did you mean 'hf-hub:{name}'?" if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else ""


def _is_published(pretrained: str | None) -> bool:
    return pretrained is not None and Path(pretrained).name.removesuffix(".pth") in PUBLISHED


def _published_file(name: str, pretrained: str) -> str:
    """The file of a checkpoint of MCIP's authors, given by its name or its path."""
    title = Path(pretrained).name.removesuffix(".pth")
    model = title.removeprefix("MCIP-")
    if name.removesuffix("-quickgelu") != model:
        raise ConfigError(
            f"pretrained={pretrained!r} does not go with model={name!r}; allowed: {model}"
        )
    path = Path(pretrained).with_name(f"{title}.pth")
    if not path.is_file():
        raise ConfigError(
            f"pretrained={pretrained!r}: there is no file {path}, and pymcip does not download it. "
            f"Get it from its authors ({PUBLISHED_AT}/{title}.pth), and give its path"
        )
    return str(path)


def _preprocessing(name: str) -> dict[str, Any]:
    """What all pretrained tags of a model say alike of images' preprocessing, for a file of weights.

    By itself open_clip takes OpenAI's for a file, also for models such as SigLIP that have another.
    """
    tags = open_clip.list_pretrained_tags_by_model(name)
    configs = [open_clip.get_pretrained_cfg(name, tag) for tag in tags]
    alike = {}
    for key in PREPROCESSING:
        values = {config.get(key) for config in configs}
        if len(values) == 1 and None not in values:
            alike[f"image_{key}"] = values.pop()
    return alike


def _check_source(name: str, pretrained: str | None) -> bool:
    """Refuse what can't be loaded, before anything is; returns whether QuickGELU must be forced."""
    if name in ("local-dir:", "hf-hub:"):
        raise ConfigError(f"model={name!r} names nothing after the colon; give a folder or a repo")
    schema, identifier = open_clip.factory.parse_model_name(name)
    if schema == "local-dir" and not (Path(identifier) / "open_clip_config.json").is_file():
        raise ConfigError(
            f"model={name!r}: there is no open_clip_config.json in {identifier}; a hub-style "
            "folder holds that file and open_clip_model.safetensors"
        )
    if schema is not None:
        if pretrained:
            raise ConfigError(
                f"pretrained={pretrained!r} does not go with model={name!r}, which names its own "
                "weights; leave pretrained out"
            )
        return False
    if open_clip.get_model_config(name) is None:
        close = difflib.get_close_matches(name, open_clip.list_models(), n=6, cutoff=0.5)
        raise ConfigError(
            f"model={name!r} is not known to open_clip {open_clip.__version__}; allowed: "
            f"hf-hub:…, local-dir:…, a run folder, or a name such as {', '.join(close or ['ViT-B-32'])}"
            + _on_the_hub(name)
        )
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained == "random":
        return False
    if pretrained is None:
        raise ConfigError(
            f"model={name!r} without pretrained= would start from random weights; give a tag "
            f"({', '.join(tags) or 'there is none for this model'}), a checkpoint's path, or "
            "pretrained='random' if that is meant"
        )
    if Path(pretrained).is_file():
        quick = f"{name}-quickgelu"
        if quick in open_clip.list_models():
            if _is_published(pretrained):
                return True  # the one of OpenAI's
            _log.warning(
                "%s is loaded into %s, which has GELU; weights that descend from OpenAI's need "
                "QuickGELU, which can't be seen in a file: model=%r",
                pretrained, name, quick,
            )  # fmt: skip
        return False
    tag = open_clip.get_pretrained_cfg(name, pretrained)
    if not tag:
        raise ConfigError(
            f"pretrained={pretrained!r} is neither a file nor a tag of {name}; allowed: "
            f"{', '.join(tags) or 'a checkpoint path'}"
        )
    return bool(tag.get("quick_gelu", False))


def load(
    model: str,
    pretrained: str | None = None,
    *,
    image_size: int | None = None,
    device: str | None = None,
    precision: str = "amp_bf16",
) -> ClipModel:
    """Load a model the way open_clip does, and refuse what open_clip would let pass in silence.

    Args:
        model: an open_clip name, `hf-hub:…`, `local-dir:…`, or the folder of a pymcip run.
        pretrained: open_clip's tag or a checkpoint's path (read with `weights_only=True`), with the
            preprocessing that the model's tags have in common; `"random"` for random weights. A path
            may be the name of a checkpoint of MCIP's authors, with or without ".pth": it is read from
            this folder, with QuickGELU if it descends from OpenAI's weights.
        image_size: input size in pixels, if not the model's own.
        device: torch's name of a device; default: a GPU if there is one.
        precision: `"amp_bf16"` (bf16 autocast; fp32 on a CPU that would emulate bf16, see
            `has_bf16`) or `"fp32"`. Weights are fp32 in both.

    Returns:
        A `ClipModel`, in evaluation mode.

    Raises:
        ConfigError: unknown model or tag; no weights named; a checkpoint of MCIP's authors is of another
            model or not there; the config of a folder names files that
            are not on this machine.
        MissingDependencyError: the model's text side needs transformers.
        CheckpointError: the checkpoint is damaged or of another model.
    """
    name = _resolve_name(model)
    chosen = _device(device)
    if pretrained is not None and _is_published(pretrained):
        pretrained = _published_file(name, pretrained)
    try:
        quick_gelu = _check_source(name, pretrained)
        from_file = pretrained is not None and Path(pretrained).is_file()
        config = open_clip.get_model_config(name)
        check_config(name, config)
        with without_requests(name, config):
            module, _, preprocess_val = open_clip.create_model_and_transforms(
                name,
                pretrained=None if pretrained == "random" else pretrained,
                precision="fp32",
                device=chosen,
                force_quick_gelu=quick_gelu,
                force_image_size=image_size,
                pretrained_text=False,
                require_pretrained=pretrained != "random",
                weights_only=True,
                **(_preprocessing(name) if from_file else {}),
            )
            tokenizer = open_clip.get_tokenizer(name)
    except PymcipError:
        raise
    except Exception as error:  # open_clip, torch, pickle, safetensors, the hub: no common base
        raise CheckpointError(
            f"open_clip can't load model={model!r}, pretrained={pretrained!r}: "
            f"{type(error).__name__}: {reason_of(error, 600)}.\nWeights must be an undamaged plain state "
            "dict of just this architecture; check that the name and the file belong together."
        ) from error
    module.eval()
    if precision == "amp_bf16" and not has_bf16(chosen):
        _log.info("this CPU has no bf16 instructions and would emulate them: fp32, not amp_bf16")
        precision = "fp32"
    vision = dict(config["vision_cfg"])
    if image_size is not None:
        vision["image_size"] = image_size
    if "timm_model_name" in vision:
        vision["timm_model_pretrained"] = False
    config = {**config, "vision_cfg": vision, "text_cfg": dict(config["text_cfg"])}
    if quick_gelu:
        config["quick_gelu"] = True
    if is_convolutional(module):
        module.visual.to(memory_format=torch.channels_last)
    clip = ClipModel(
        name, module, preprocess_val, tokenizer,
        model_cfg=config, preprocess_cfg=dict(module.visual.preprocess_cfg),
        device=chosen, precision=precision,
    )  # fmt: skip
    schema, folder = open_clip.factory.parse_model_name(name)
    return with_appended(clip, Path(folder)) if schema == "local-dir" else clip


def load_configured(config: ModelOptions) -> ClipModel:
    """Load the model that a stage's config names; raises what `load` raises."""
    names = ("model", "pretrained", "image_size", "device", "precision")
    return load(**{name: getattr(config, name) for name in names})
