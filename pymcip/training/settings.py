"""Settings that fit by themselves: what stands for "auto", by the model and the number of images."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pymcip.configs import TrainConfig, TrainSettings
from pymcip.data import ImageData
from pymcip.errors import ConfigError
from pymcip.model import ClipModel, is_convolutional
from pymcip.training.batches import reduced_transform, train_transform

PAPER_LR, PAPER_PARAMETERS, EXPONENT = 1e-5, 3e8, 0.8
PAPER_THRESHOLD = 0.27
SMALL_SET, LARGE_SET = 10_000, 100_000  # images
STEPS, FEWEST_EPOCHS, MOST_EPOCHS = 250, 3, 30
WARMUP = 0.1  # of the steps
CLASS_TRAVEL, FASTEST_CLASSES = 1.0, 1e-2
CROP = 5 / 7  # of the model's own size: 160 of 224
GRID = 32  # pixels; the stride of a convolutional tower's last layer


def fit_settings(
    config: TrainConfig, clip: ClipModel, images: ImageData
) -> tuple[TrainSettings, dict[str, str]]:
    """Choose what `config` leaves open ("auto"); give each choice's reason too, by its name.

    The learning rate falls with the tower's size: 1e-5 for the paper's ViT-L (3e8 parameters), and
    3e-4 for a tower of 4e6, above which icons gained little (`docs/results.md`). A convolutional tower
    is trained on crops smaller than what it searches with (FixRes, arXiv 1906.06423), which take half
    the time.

    Args:
        config: the options of the run.
        clip: the model before training.
        images: those that it is trained on.

    Raises:
        ConfigError: more dimensions would be appended than the embedding has; the image tower doesn't take crops of `train_size` pixels, or `aug_cfg` can't be applied.
    """
    taken: dict[str, Any] = {}
    reasons: dict[str, str] = {}

    def choose(name: str, value: Any, reason: str) -> Any:
        if getattr(config, name) == "auto":
            taken[name], reasons[name] = value, reason
        return taken.get(name, getattr(config, name))

    width = clip.embed_dim
    if config.appended_dims != "auto" and config.appended_dims > width:
        raise ConfigError(
            f"appended_dims={config.appended_dims} is not allowed with {clip.name}, whose embedding has "
            f"{width}; allowed: 1 to {width}"
        )
    visual: nn.Module = clip.model.visual  # type: ignore[assignment]
    parameters = sum(value.numel() for value in visual.parameters())
    count = len(images)
    if config.pretrained == "openai" and config.caption_table is None:
        choose("threshold", PAPER_THRESHOLD, "the paper's, for OpenAI's weights")
    batch = 32 if count < SMALL_SET else 64 if count < LARGE_SET else 128
    batch = choose("batch_size", batch, f"{count} images")
    per_epoch = max(1, count // (batch * config.accum_freq))
    epochs = min(max(round(STEPS / per_epoch), FEWEST_EPOCHS), MOST_EPOCHS)
    why = f"of {per_epoch} steps each; {STEPS} steps or more, and {FEWEST_EPOCHS} epochs"
    steps = per_epoch * choose("epochs", epochs, why)
    choose("warmup", round(WARMUP * steps), f"{WARMUP:.0%} of {steps} steps")
    lr = _rounded(PAPER_LR * (PAPER_PARAMETERS / parameters) ** EXPONENT)
    lr = choose("lr", lr, f"an image tower of {parameters / 1e6:.1f} million parameters")
    rate = max(10 * lr, min(FASTEST_CLASSES, CLASS_TRAVEL / steps))
    choose("lr_classes", _rounded(rate), f"a class matrix that can turn within {steps} steps")
    size, why = clip.image_size, "the model's own"
    if is_convolutional(clip.model) and not any("pos" in n for n, _ in visual.named_parameters()):
        size, why = max(GRID, round(size * CROP / GRID) * GRID), "a convolutional tower"
    choose("train_size", size, why)
    settings = TrainSettings(**{**vars(config), **taken})
    check_train_size(clip, settings.train_size)
    transform = train_transform(clip, settings.train_size, config.aug_cfg, config.train_resize)
    if config.reduced_decoding:
        reduced_transform(transform)
    return settings, reasons


def check_train_size(clip: ClipModel, size: int) -> None:
    """Refuse crops that the image tower doesn't take.

    Raises:
        ConfigError: most towers with positional embeddings take images of their own size alone.
    """
    if size == clip.image_size:
        return
    try:
        clip.encode_images(torch.zeros(1, 3, size, size))
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"train_size={size} can't be used with {clip.name} ({str(error).splitlines()[0]}); "
            f"allowed for it: {clip.image_size}, or leave train_size out"
        ) from error


def _rounded(rate: float) -> float:
    return float(f"{rate:.1e}")
