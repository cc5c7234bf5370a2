"""Which parameters of an open_clip model belong to what, and how they are locked or dropped."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import open_clip
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pymcip.errors import ConfigError
from pymcip.model.clip import ClipModel

LOGIT_PARAMETERS = ("logit_scale", "logit_bias")


def image_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters of the image tower and its projector."""
    return ((name, p) for name, p in model.named_parameters() if name.startswith("visual."))


def text_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters of the text tower and its projector, without temperature and bias."""
    return (
        (name, p)
        for name, p in model.named_parameters()
        if not name.startswith("visual.") and name not in LOGIT_PARAMETERS
    )


def copied_tower(clip: ClipModel, part: Literal["image", "text"]) -> ClipModel:
    """Return the same model with a copy of one tower, and of its projector; the rest is shared."""
    model = clip.model
    if part == "text":
        shared: list[Any] = [model.visual]
    else:
        shared = [child for name, child in model.named_children() if name != "visual"]
        shared += [*model.parameters(recurse=False), *model.buffers(recurse=False)]
    return replace(clip, model=copy.deepcopy(model, {id(child): child for child in shared}))


def image_projector(model: nn.Module) -> list[nn.Parameter]:
    """Parameters of the map from the image tower's width to the joint space; may be empty."""
    visual = model.visual
    if isinstance(getattr(visual, "proj", None), nn.Parameter):  # ViT
        return [visual.proj]  # type: ignore[union-attr,list-item]
    if hasattr(visual, "trunk"):  # timm: `head` holds the projection alone
        return list(visual.head.parameters())  # type: ignore[union-attr]
    if hasattr(visual, "attnpool"):  # ResNet: the output map of the attention pooling
        return list(visual.attnpool.c_proj.parameters())  # type: ignore[union-attr]
    return []


def unlock_image_tower(clip: ClipModel, *, projector: str, unlock_layers: int | None) -> None:
    """Let gradients into the image tower only, or into its last groups (open_clip's `lock`).

    Args:
        clip: the model, changed in place.
        projector: "keep" trains the projector too; "lock" and "discard" leave it as it is.
        unlock_layers: number of the last groups to train; None: all.

    Raises:
        ConfigError: this image tower does not allow it, or nothing would be trained.
    """
    model = clip.model
    model.requires_grad_(False)
    model.visual.requires_grad_(True)  # type: ignore[union-attr,operator]
    if unlock_layers is not None:
        try:
            model.visual.lock(unlocked_groups=unlock_layers)  # type: ignore[union-attr,operator]
        except (AssertionError, TypeError, RuntimeError) as error:
            raise ConfigError(
                f"unlock_layers={unlock_layers} can't be done with the image tower of {clip.name} "
                f"({error}); allowed for it: None (train all of it)"
            ) from error
    if projector in ("lock", "discard"):
        parameters = image_projector(model)
        if not parameters:
            raise ConfigError(
                f"projector={projector!r}: the image tower of {clip.name} has no projector of its "
                "own; allowed for it: keep"
            )
        for parameter in parameters:
            parameter.requires_grad_(False)
    if not any(p.requires_grad for _, p in image_parameters(model)):
        raise ConfigError(
            f"unlock_layers={unlock_layers} with projector={projector!r} leaves nothing to train"
        )


def image_tower_to_train_mode(model: nn.Module, freeze_bn_stats: bool) -> None:
    """Train mode for the image tower; batch norms that are locked keep their statistics."""
    model.eval()
    model.visual.train()  # type: ignore[union-attr,operator]
    for layer in training_batch_norms(model):
        locked = layer.weight is not None and not layer.weight.requires_grad
        if freeze_bn_stats or locked:
            layer.eval()


def training_batch_norms(model: nn.Module) -> list[nn.Module]:
    """The batch norms that take statistics of the batch, and change their running ones by them."""
    return [layer for layer in model.modules() if isinstance(layer, _BatchNorm) and layer.training]


@contextmanager
def fixed_statistics(layers: list[nn.Module]) -> Iterator[None]:
    """Let these batch norms use their running statistics inside the block, unchanged."""
    for layer in layers:
        layer.eval()
    try:
        yield
    finally:
        for layer in layers:
            layer.train()


def set_patch_dropout(clip: ClipModel, share: float) -> None:
    """Let the image tower leave out this share of its patches, while it is in train mode (FLIP).

    Args:
        clip: the model, changed in place; its weights stay, and what it does in evaluation mode.
        share: at least 0 and below 1; 0: change nothing.

    Raises:
        ConfigError: the image tower is no ViT of open_clip's or timm's.
    """
    if share == 0:
        return
    visual: Any = clip.model.visual
    trunk: Any = getattr(visual, "trunk", None)
    if hasattr(visual, "patch_dropout"):
        visual.patch_dropout = open_clip.transformer.PatchDropout(share).train(visual.training)
    elif hasattr(trunk, "patch_drop") and hasattr(trunk, "num_prefix_tokens"):
        from timm.layers import PatchDropout

        dropout = PatchDropout(share, num_prefix_tokens=trunk.num_prefix_tokens)
        trunk.patch_drop = dropout.train(trunk.training)
    else:
        raise ConfigError(
            f"patch_dropout={share} is for ViTs, and the image tower of {clip.name} is none that can "
            "leave out patches; allowed for it: 0"
        )


def unlock_text_tower(clip: ClipModel, unlock_layers: int | None) -> None:
    """Let gradients into the text tower and its projector only, or into its last groups.

    Args:
        clip: the model, changed in place.
        unlock_layers: number of the last groups to train, as open_clip's `lock_text_tower` counts them
            (the projection, the last block with the last norm, the blocks before it, one each, and the
            embeddings); None: all.

    Raises:
        ConfigError: open_clip can't divide this text tower.
    """
    clip.model.requires_grad_(False)
    parameters = [parameter for _, parameter in text_parameters(clip.model)]
    for parameter in parameters:
        parameter.requires_grad_(True)
    if unlock_layers is None:
        return
    clip.model.lock_text_tower(unlock_layers)  # type: ignore[operator]
    if not any(parameter.requires_grad for parameter in parameters):
        raise ConfigError(
            f"rea_unlock_layers={unlock_layers} can't be done with the text tower of {clip.name}; "
            "allowed for it: None (train all of it)"
        )


def discard_projector(clip: ClipModel, seed: int) -> None:
    """Make the image tower's own features the embedding (the older image-only GPR-FT).

    The projector becomes a locked identity, so the model stays one that open_clip can load: its
    `embed_dim` is the image tower's width. The text side gets a random projection (of `seed`) to that
    width and is meaningless until re-alignment has trained it. `clip` is changed in place.

    Raises:
        ConfigError: a tower does not end in a linear projection.
    """
    problem = (
        "projector='discard' needs {} tower that ends in a linear projection; that of "
        f"{clip.name} does not. Allowed for it: keep, lock"
    )
    visual: Any = clip.model.visual
    proj = getattr(visual, "proj", None)
    head = getattr(getattr(visual, "head", None), "proj", None)
    if isinstance(proj, nn.Parameter):
        width = proj.shape[0]
        visual.proj = nn.Parameter(torch.eye(width, device=proj.device))
        visual.output_dim = width
    elif isinstance(head, nn.Linear):
        width = head.in_features
        visual.head.proj = _linear_like(head, torch.eye(width))
    else:
        raise ConfigError(problem.format("an image"))
    text: Any = getattr(clip.model, "text", clip.model)
    projection = getattr(text, "text_projection", None)
    generator = torch.Generator().manual_seed(seed)
    if isinstance(projection, nn.Parameter):
        rows = projection.shape[0]
        fresh = torch.randn(rows, width, generator=generator) * rows**-0.5
        text.text_projection = nn.Parameter(fresh.to(projection.device))
    elif isinstance(projection, nn.Linear):
        rows = projection.in_features
        fresh = torch.randn(width, rows, generator=generator) * rows**-0.5
        text.text_projection = _linear_like(projection, fresh)
    else:
        raise ConfigError(problem.format("a text"))
    clip.model_cfg = {**clip.model_cfg, "embed_dim": width}


def _linear_like(layer: nn.Linear, weight: Tensor) -> nn.Linear:
    """A layer with these weights [out, in] in place of `layer`; its bias, if that has one, is 0."""
    fresh = nn.Linear(weight.shape[1], weight.shape[0], bias=layer.bias is not None)
    with torch.no_grad():
        fresh.weight.copy_(weight)
        if fresh.bias is not None:
            fresh.bias.zero_()
    return fresh.to(layer.weight.device)
