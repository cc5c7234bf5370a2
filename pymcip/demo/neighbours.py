"""The demo's picture: test scenes with their nearest others, before and after training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from pymcip.data import ImageData, load_images
from pymcip.demo.world import World
from pymcip.embedding import embed
from pymcip.files import atomic_path

NEIGHBOURS = 6


def draw_neighbours(
    models: dict[str, str], world: World, folder: Path, queries: int, out: Path
) -> None:
    """Draw `queries` random test scenes with their nearest others under each model, as a PNG.

    Those of the query's own class are framed. The embeddings go into `folder`.
    """
    sources = world.testing["data"]
    data = load_images(sources)
    chosen = np.random.default_rng(0).choice(len(data), min(queries, len(data)), replace=False)
    found = {}
    for number, (heading, model) in enumerate(models.items()):
        embedded = embed(model=model, images=sources, out=folder / str(number), batch_size=256)
        unit = embedded.vectors("img").astype(np.float32)
        scores = unit[chosen] @ unit.T
        scores[np.arange(len(chosen)), chosen] = -np.inf
        found[heading] = np.argsort(-scores, axis=1, kind="stable")[:, :NEIGHBOURS]
    picture = draw_grid(data, chosen, found)
    with atomic_path(out) as temporary:
        picture.save(temporary, "PNG")


def draw_grid(
    data: ImageData, chosen: npt.NDArray[np.int64], found: dict[str, npt.NDArray[np.int64]]
) -> Image.Image:
    """A row per query: the query, then per model its neighbours `found[model]` [queries, n]."""
    side, gap, top = 64, 6, 18
    cell = side + gap
    per_model = max(rows.shape[1] for rows in found.values())
    width = cell + len(found) * (per_model * cell + 2 * gap) + gap
    picture = Image.new("RGB", (width, top + len(chosen) * cell + gap), "white")
    pen = ImageDraw.Draw(picture)

    def put(row: int, left: int, line: int, frame: str | None) -> None:
        corner = top + line * cell + gap // 2
        if frame:
            pen.rectangle((left - 3, corner - 3, left + side + 2, corner + side + 2), fill=frame)
        picture.paste(data.read(row).resize((side, side)), (left, corner))

    pen.text((gap, 3), "query", fill="black")
    for line, query in enumerate(chosen.tolist()):
        put(query, gap, line, None)
    for block, (heading, rows) in enumerate(found.items()):
        left = gap + cell + block * (per_model * cell + 2 * gap) + 2 * gap
        pen.text((left, 3), heading, fill="black")
        for line, query in enumerate(chosen.tolist()):
            for place, row in enumerate(rows[line].tolist()):
                right = data.labels[row] == data.labels[query]
                put(row, left + place * cell, line, "green" if right else None)
    return picture
