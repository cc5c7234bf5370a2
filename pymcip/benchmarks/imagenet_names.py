"""ImageNet's class ids, class names and prompts, from timm's and open_clip's lists."""

from __future__ import annotations

import functools
from importlib import resources

from pymcip.errors import MissingDependencyError


@functools.cache
def synsets(name: str = "imagenet_synsets.txt") -> tuple[str, ...]:
    """Return synset ids in sorted order, ImageNet's 1,000 or those of another list of timm's.

    Raises:
        MissingDependencyError: timm, which open_clip needs, has no such list.
    """
    try:
        text = resources.files("timm.data").joinpath("_info", name).read_text(encoding="utf-8")
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise MissingDependencyError(
            f"timm has no list {name} ({error}); install one that has: pip install 'timm>=1.0'"
        ) from error
    return tuple(text.split())


@functools.cache
def imagenet_names() -> tuple[str, ...]:
    """Return what prompts call ImageNet's 1,000 classes, as OpenAI's CLIP does."""
    import open_clip

    return tuple(open_clip.IMAGENET_CLASSNAMES)


@functools.cache
def imagenet_templates() -> tuple[str, ...]:
    """Return OpenAI's 80 prompts for ImageNet, with `{}` for the name."""
    import open_clip

    return tuple(template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES)
