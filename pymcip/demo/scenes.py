"""Scenes of the demo: what is in them, drawn at random, and their pictures of 64 x 64 pixels.

A scene is one main emoji, rotated, scaled and sometimes tinted, on a coloured background with a
pattern, with up to three small emoji as clutter, one of which may cover a part of the main one.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from pymcip.demo.sprites import Sprites, load_sprites

IMAGE_SIZE = 64
MAX_CLUTTER = 3

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


# Pretraining's scenes are as above; those that are searched vary more in what no caption mentions.
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


def render(scenes: Scenes, seed: int, batch: int = 128) -> npt.NDArray[np.uint8]:
    """Draw the scenes: uint8 (B, 64, 64, 3). `seed` is for the pixel noise alone."""
    sprites = load_sprites()
    generator = np.random.default_rng([seed, 1])
    out = np.empty((len(scenes), IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    with torch.no_grad():
        for start in range(0, len(scenes), batch):
            rows = slice(start, start + batch)
            out[rows] = _render_part(scenes.part(rows), sprites, generator)
    return out
