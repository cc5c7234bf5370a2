"""Models in the format of Hugging Face's transformers: a folder that `CLIPModel` and `CLIPProcessor` load."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import QuickGELU, TextTransformer, VisionTransformer
from PIL import Image
from torch import Tensor, nn

from pymcip.errors import CheckpointError, ConfigError, MissingDependencyError
from pymcip.files import atomic_path
from pymcip.model import AppendedClip, ClipModel, fp32_on_cpu

SAME = 0.99999  # cosine to open_clip's vector, at least
PIXEL = 0.1  # how far a normalised pixel may be off: both round to 255 steps after resizing
TEXTS = "a photo of a cat", "Red, green; blue!", "two dogs' toys on a beach " * 20
PARTS = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",  # spelt so in transformers
    "visual.transformer.resblocks": "vision_model.encoder.layers",
    "visual.ln_post": "vision_model.post_layernorm",
    "visual.proj": "visual_projection.weight",
    "token_embedding": "text_model.embeddings.token_embedding",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "transformer.resblocks": "text_model.encoder.layers",
    "ln_final": "text_model.final_layer_norm",
    "text_projection": "text_projection.weight",
}
BLOCK = "ResidualAttentionBlock"
LAYERS = {
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".attn.": ".self_attn.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}

_log = logging.getLogger("pymcip.exporting")


def import_transformers() -> Any:
    """The module transformers.

    Raises:
        MissingDependencyError: it can't be imported.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError(
            f'transformers can\'t be imported ({error}); run: pip install "pymcip[transformers]"'
        ) from error
    return transformers


def check_transformers(clip: ClipModel) -> None:
    """Refuse a model that transformers' `CLIPModel` and `CLIPProcessor` can't be made of.

    Raises:
        ConfigError: see above.
    """
    reason = _obstacle(clip)
    if reason is not None:
        raise ConfigError(
            f"transformers=True: {clip.name} can't be written for transformers: {reason}. Allowed: "
            "models of open_clip's own ViT and text tower, such as ViT-B-32 and ViT-L-14, without "
            "appended dimensions; for other models use onnx=True"
        )


def write_transformers(clip: ClipModel, folder: str | os.PathLike[str]) -> Path:
    """Write a folder for `CLIPModel.from_pretrained` and `CLIPProcessor.from_pretrained`.

    It is loaded and compared with open_clip before it is put in place: vectors of random pixels and
    of texts, the pixels of a picture, and tokens up to the end of the text (what comes after it, here
    more ends and in open_clip zeros, changes no vector).

    Args:
        clip: the model; it is not changed. Weights are written as fp32.
        folder: made if missing, replaced whole if there.

    Returns:
        The folder.

    Raises:
        MissingDependencyError: transformers is not installed.
        ConfigError: the model has no counterpart in transformers.
        CheckpointError: transformers finds other vectors, pixels or tokens.
    """
    transformers = import_transformers()
    check_transformers(clip)
    with atomic_path(folder) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers' own parts
        model = transformers.CLIPModel(transformers.CLIPConfig(**_config(clip)))
        model.load_state_dict(_renamed(clip.model.state_dict()))
        model.save_pretrained(temporary)
        processor = transformers.CLIPProcessor(
            transformers.CLIPImageProcessor(**_preprocessing(clip)), _tokenizer(clip, transformers)
        )
        processor.save_pretrained(temporary)
        processor.image_processor.save_pretrained(temporary)  # where transformers 4 looks for it
        _compare(clip, temporary, transformers)
    return Path(folder)


def _obstacle(clip: ClipModel) -> str | None:
    """Why the model has no counterpart; None if it may have one."""
    model: Any = clip.model
    if isinstance(clip, AppendedClip):
        return "it has appended dimensions, which CLIPModel has no place for"
    visual, text = model.visual, getattr(model, "text", model)
    if not isinstance(visual, VisionTransformer):
        return f"its image tower is a {type(visual).__name__}, not open_clip's VisionTransformer"
    if type(model) is not open_clip.CLIP and not isinstance(text, TextTransformer):
        return f"its text tower is a {type(text).__name__}, not open_clip's TextTransformer"
    tokenizer: Any = clip.tokenizer
    checks = [
        ("pool_type of the image tower", visual.pool_type, "tok"),
        (
            "pool_type of the texts",
            getattr(text, "text_pool_type", None) or text.pool_type,
            "argmax",
        ),
        ("blocks of the image tower", _blocks(visual), BLOCK),
        ("blocks of the texts", _blocks(text), BLOCK),
        ("causal mask", text.attn_mask is not None, True),
        ("tokenizer", type(tokenizer).__name__, SimpleTokenizer.__name__),
        ("reduction_mask", getattr(tokenizer, "reduction_fn", None), None),
        ("square images", len({*visual.image_size}), 1),
        ("square patches", len({*visual.patch_size}), 1),
    ]
    for name, found, allowed in checks:
        if found != allowed:
            return f"{name} is {found!r}, and CLIPModel has {allowed!r}"
    if clip.preprocess_cfg.get("resize_mode") == "longest":
        return "its images are padded (resize_mode='longest'), and CLIPProcessor cuts them"
    transformers = import_transformers()
    with torch.device("meta"):  # no memory
        wanted = transformers.CLIPModel(transformers.CLIPConfig(**_config(clip))).state_dict()
    names = sorted(_renamed(model.state_dict()).keys() ^ wanted.keys())
    return f"these weights are not in both: {', '.join(names[:4])}" if names else None


def _blocks(tower: Any) -> str:
    return type(tower.transformer.resblocks[0]).__name__


def _config(clip: ClipModel) -> dict[str, Any]:
    """The fields of `CLIPConfig`."""
    model: Any = clip.model
    visual, text = model.visual, getattr(model, "text", model)
    tokenizer: Any = clip.tokenizer
    return {
        "projection_dim": clip.embed_dim,
        "vision_config": {
            **_tower(visual.transformer, visual.ln_post),
            "projection_dim": clip.embed_dim,
            "image_size": visual.image_size[0],
            "patch_size": visual.patch_size[0],
        },
        "text_config": {
            **_tower(text.transformer, text.ln_final),
            "projection_dim": clip.embed_dim,
            "vocab_size": text.token_embedding.num_embeddings,
            "max_position_embeddings": len(text.positional_embedding),
            "bos_token_id": tokenizer.sot_token_id,
            "eos_token_id": tokenizer.eot_token_id,
            "pad_token_id": tokenizer.eot_token_id,
        },
    }


def _tower(transformer: Any, norm: Any) -> dict[str, Any]:
    block = transformer.resblocks[0]
    if isinstance(block.mlp.gelu, QuickGELU):
        activation = "quick_gelu"
    else:
        activation = {"none": "gelu", "tanh": "gelu_pytorch_tanh"}[block.mlp.gelu.approximate]
    return {
        "hidden_size": block.attn.embed_dim,
        "intermediate_size": block.mlp.c_fc.out_features,
        "num_hidden_layers": len(transformer.resblocks),
        "num_attention_heads": block.attn.num_heads,
        "hidden_act": activation,
        "layer_norm_eps": norm.eps,
    }


def _renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights by transformers' names; a name that has no counterpart stays."""
    state: dict[str, Tensor] = {}
    for name, value in weights.items():
        name = name.removeprefix("text.")
        part = next((part for part in PARTS if name == part or name.startswith(f"{part}.")), None)
        if part is not None:
            name = PARTS[part] + name.removeprefix(part)
        for ours, theirs in LAYERS.items():
            name = name.replace(ours, theirs)
        if name in ("visual_projection.weight", "text_projection.weight"):  # x W there, W x here
            value = value.T
        if ".in_proj_" in name:  # one matrix there, three here
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                state[name.replace("in_proj_", f"{part}_proj.")] = rows
        else:
            state[name] = value.reshape(()) if name == "logit_scale" else value
    return state


def _preprocessing(clip: ClipModel) -> dict[str, Any]:
    """The arguments of `CLIPImageProcessor`."""
    cfg, side = clip.preprocess_cfg, clip.image_size
    square = {"height": side, "width": side}
    squash = cfg.get("resize_mode") == "squash"
    bilinear = cfg.get("interpolation") == "bilinear"
    return {
        "size": square if squash else {"shortest_edge": side},
        "do_center_crop": not squash,
        "crop_size": square,
        "resample": Image.Resampling.BILINEAR if bilinear else Image.Resampling.BICUBIC,
        "image_mean": list(cfg["mean"]),
        "image_std": list(cfg["std"]),
    }


def _tokenizer(clip: ClipModel, transformers: Any) -> Any:
    tokenizer: Any = clip.tokenizer
    vocabulary = dict(tokenizer.encoder)
    for ours, theirs in (
        ("<start_of_text>", "<|startoftext|>"),
        ("<end_of_text>", "<|endoftext|>"),
    ):
        vocabulary[theirs] = vocabulary.pop(ours)
    return transformers.CLIPTokenizer(
        vocab=vocabulary,
        merges=list(tokenizer.bpe_ranks),
        model_max_length=clip.context_length,
    )


@torch.no_grad()
def _compare(clip: ClipModel, folder: Path, transformers: Any) -> None:
    """Load the folder, and refuse it where it differs from open_clip."""
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    processor = transformers.CLIPProcessor.from_pretrained(folder)
    clip, side = fp32_on_cpu(clip), clip.image_size
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (8, 12, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize((3 * side, 2 * side), Image.Resampling.BICUBIC)
    inputs = processor(
        text=list(TEXTS), images=picture, padding="max_length", truncation=True, return_tensors="pt"
    )
    ours, theirs = clip.tokenizer(list(TEXTS)), inputs["input_ids"]
    inside = torch.arange(ours.shape[1]) <= ours.argmax(dim=1, keepdim=True)
    same_tokens = ours.shape == theirs.shape and torch.equal(ours[inside], theirs[inside])
    pixels = clip.preprocess_val(picture)
    off = float((inputs["pixel_values"][0] - pixels).abs().max())
    noise = torch.randn(3, *pixels.shape, generator=torch.Generator().manual_seed(0))
    found = model(input_ids=theirs, pixel_values=noise)
    cosines = {
        "images": nn.functional.cosine_similarity(found.image_embeds, clip.image_features(noise)),
        "texts": nn.functional.cosine_similarity(found.text_embeds, clip.text_features(ours)),
    }
    smallest = {name: float(values.min()) for name, values in cosines.items()}
    if not (same_tokens and off < PIXEL and min(smallest.values()) > SAME):
        raise CheckpointError(
            f"{clip.name}: transformers differs from open_clip (cosines of images "
            f"{smallest['images']:.6f}, of texts {smallest['texts']:.6f}, allowed: above {SAME}; "
            f"pixels {off:.3f} apart, allowed: below {PIXEL}; tokens "
            f"{'the same' if same_tokens else 'differ'}). Nothing was written; export without transformers"
        )
    _log.info(
        "transformers' vectors have a cosine of %.6f (images) and %.6f (texts) to open_clip's",
        smallest["images"],
        smallest["texts"],
    )
