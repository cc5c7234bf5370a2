"""`pymcip demo`: compose a world, mine, fine-tune in five ways, and measure each against the base.

Everything goes through the package's public functions, as a user would call them. The second stage
of `2sft` starts from the finished `gpr` run, that of `mcip+rea` from the finished `mcip` run: the
first stages are the same, so they are trained once.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from pymcip.configs import DemoConfig
from pymcip.data import ImageData, load_images
from pymcip.demo.world import (
    BASE_FOLDER,
    CREDIT,
    PROBE_NAMES,
    TEMPLATES,
    TRAIN_NAMES,
    World,
    WorldConfig,
    load_sprites,
    probe_paths,
    write_probe,
    write_world,
)
from pymcip.embedding import embed
from pymcip.evaluation import evaluate
from pymcip.files import atomic_path, prepare_output, read_json, write_json, write_text
from pymcip.training import train

_log = logging.getLogger("pymcip.demo")

METHODS = ("base", "gpr", "2sft", "mcip", "mcip+rea", "mcip+")
METRICS = {
    "i2i_map": "I2I mAP",
    "knn": "k-NN",
    "zero_shot": "zero-shot",
    "t2i_r5": "T2I R@5",
}
PAPER_NAMES = {
    "base": "base",
    "gpr": "+ GPR-FT",
    "2sft": "+ GPR-FT + Re-A",
    "mcip": "+ MCIP",
    "mcip+rea": "+ MCIP + Re-A",
    "mcip+": "+ MCIP, alignment kept",
}
NEIGHBOURS = 6
Table = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Recipe:
    """Sizes and hyper-parameters of a demo run; those of `train` have its names.

    `train` is for every method, `rea` for re-alignment, `plus` for `mcip+`, over both.
    """

    world: WorldConfig = dataclasses.field(default_factory=WorldConfig)
    train: dict[str, Any] = dataclasses.field(
        default_factory=lambda: {
            "epochs": 3,
            "batch_size": 128,
            "lr": 8e-4,
            "wd": 0.02,
            "warmup": 14,
            "scale": 50.0,
            "margin": 0.6,
            "caption_scale": 16.0,
            "lambda_class": 0.4,
            "lambda_caption": 0.6,
            "k": 10,
            "threshold": 0.4,  # nearly every image has ten captions above it
        }
    )
    rea: dict[str, Any] = dataclasses.field(
        default_factory=lambda: {"rea_epochs": 4, "rea_lr": 1e-3, "rea_warmup": 20}
    )
    plus: dict[str, Any] = dataclasses.field(
        default_factory=lambda: {
            "margin": 0.9,
            "lambda_class": 0.52,
            "lambda_caption": 0.48,
            "k": 30,
            "rea_k": 10,
            "rea_epochs": 6,
            "rea_lr": 2e-4,
            "rea_warmup": 10,
            "rea_templates": ("a picture of a {}",),
        }
    )
    queries: int = 8


SMOKE = Recipe(
    world=WorldConfig(
        train_classes=8, train_images=4, test_classes=6, test_images=3, captions=200, shard_size=20
    ),
    train={"epochs": 1, "batch_size": 16, "lr": 1e-4, "warmup": 1, "k": 3, "threshold": -1.0},
    rea={"rea_epochs": 1, "rea_batch_size": 16, "rea_lr": 1e-4, "rea_warmup": 1},
    plus={"alignment_budget": 0.999},
    queries=2,
)


@dataclass(frozen=True)
class DemoResult:
    """What `run_demo` measured.

    `table[method][metric]` is in percent, the mean over `seeds`; `markdown` is the same for people.
    `pattern` says which parts of the paper's pattern hold. `seconds` is the whole run's wall time.
    """

    out: Path
    seeds: list[int]
    table: Table
    seconds: float
    pattern: dict[str, bool]
    markdown: str


def run_demo(config: DemoConfig | None = None, /, **options: Any) -> DemoResult:
    """Run the demo and write report.md, report.json and retrieval.png into `out`.

    Takes the fields of `DemoConfig` as keywords, or a ready config. Each seed has a folder of its
    own below `out`, with its world, its runs and its evaluations.

    Raises:
        MissingDependencyError: the pictures or their names are not installed.
        OutputExistsError: `out` is not empty, and `overwrite` was not given.
    """
    config = DemoConfig.make(config, options)
    recipe = SMOKE if config.smoke else Recipe()
    started = time.perf_counter()
    load_sprites()  # before anything is written: it tells what is not installed
    out = prepare_output(config.out, overwrite=config.overwrite)
    tables = []
    seeds = list(range(config.seeds))
    for seed in seeds:
        _log.info("seed %d of %d", seed + 1, len(seeds))
        tables.append(_run_seed(seed, out / f"seed{seed}", recipe, draw_to=out / "retrieval.png"))
    table = mean_table(tables)
    pattern = check_pattern(table)
    seconds = round(time.perf_counter() - started, 1)
    markdown = format_table(table)
    kept = [read_json(out / f"seed{seed}" / "runs" / "mcip+" / "alignment.json") for seed in seeds]
    document = {
        "seeds": seeds,
        "table": table,
        "per_seed": tables,
        "pattern": pattern,
        "alignment": kept,
        "seconds": seconds,
        "recipe": dataclasses.asdict(recipe),
        "base_model": json.loads((BASE_FOLDER / "pretrain.json").read_text(encoding="utf-8")),
        "credit": CREDIT,
    }
    write_json(out / "report.json", document)
    write_text(out / "report.md", _report(document, markdown))
    return DemoResult(out, seeds, table, seconds, pattern, markdown)


def prepare_world(config: WorldConfig, folder: Path) -> World:
    """Compose a world in `folder`, or open the one that is there if it is of the same config."""
    described = folder / "world.json"  # written last
    settings = json.loads(json.dumps(dataclasses.asdict(config)))
    if not described.is_file() or read_json(described) != settings:
        described.unlink(missing_ok=True)
        world = write_world(config, folder)
        write_json(described, settings)
        return world
    probe = probe_paths(config, folder)
    if probe and not all(
        path.is_file() for path in (*probe, folder / PROBE_NAMES)
    ):  # a world of an earlier version
        write_probe(config, folder)
    return World(
        train=tuple(sorted(folder.glob("train-*.tar"))),
        test=tuple(sorted(folder.glob("test-*.tar"))),
        probe=probe,
        captions=folder / "captions.txt",
        train_names=folder / TRAIN_NAMES,
        test_names=folder / "test_names.tsv",
        probe_names=folder / PROBE_NAMES,
    )


def train_source(world: World) -> str:
    """`train_data` of a world: one source, so that its shards share their labels."""
    return str(world.train[0].parent / "train-*.tar")


def probe_options(folder: Path) -> dict[str, str]:
    """Options of `train` for the probe of the world in `folder`: what is neither trained on nor tested."""
    return {
        "probe_data": str(folder / "probe-*.tar"),
        "probe_class_names": str(folder / PROBE_NAMES),
    }


def plus_options(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Options of `mcip+` in the world in `folder`, over those of `recipe.train` and `recipe.rea`."""
    names = {"rea_class_names": str(folder / TRAIN_NAMES)}
    return {**recipe.plus, **probe_options(folder), **names}


def evaluation_options(world: World) -> dict[str, Any]:
    """Options of `pymcip.evaluate` that measure a model on a world's test scenes."""
    return {
        "data": str(world.test[0].parent / "test-*.tar"),
        "class_names": world.test_names,
        "templates": TEMPLATES,
        "batch_size": 256,
    }


def _run_seed(seed: int, folder: Path, recipe: Recipe, draw_to: Path) -> Table:
    """One seed's scenes, trainings and evaluations; the first seed also draws the picture."""
    clock = time.perf_counter()

    def tell(text: str) -> None:
        nonlocal clock
        now = time.perf_counter()
        _log.info("%s (%.0f s)", text, now - clock)
        clock = now

    world = prepare_world(dataclasses.replace(recipe.world, seed=seed), folder / "world")
    tell("composed the scenes and the caption corpus")
    base = f"local-dir:{BASE_FOLDER}"
    models = {"base": base}
    table = {"base": _measure(base, world)}
    tell("base: " + _in_words(table["base"]))

    def run(method: str, stage: str, **options: Any) -> None:
        result = train(
            train_data=train_source(world),
            out=folder / "runs" / method,
            method=stage,
            cache=folder / "embeddings",
            seed=seed,
            save_steps=1_000_000,
            **options,
        )
        if result.interrupted:
            raise KeyboardInterrupt(result.interrupted)
        models[method] = str(result.out)
        tell(f"{method}: trained")
        if result.hub is None:
            _log.warning(
                "%s exports nothing, as no weights keep its budget: the base stays", method
            )
            models[method] = base
        table[method] = _measure(models[method], world)
        tell(f"{method}: {_in_words(table[method])}")

    captions = {"captions": str(world.captions)}
    realign = {**captions, **recipe.train, **recipe.rea, "mine_model": base}
    run("gpr", "gpr", model=base, **recipe.train)
    run("2sft", "rea", model=models["gpr"], **realign)
    run("mcip", "mcip", model=base, **captions, **recipe.train)
    run("mcip+rea", "rea", model=models["mcip"], **realign)
    plus = {**recipe.train, **recipe.rea, **plus_options(recipe, folder / "world")}
    run("mcip+", "mcip+", model=base, **captions, **plus)
    if seed == 0:
        shown = {"before": base, "after MCIP": models["mcip"]}
        _draw_neighbours(shown, world, folder / "test", recipe.queries, draw_to)
        tell(f"drew {draw_to.name}")
    return {method: table[method] for method in METHODS}


def _measure(model: str, world: World) -> dict[str, float]:
    found = evaluate(model=model, **evaluation_options(world)).metrics
    return {name: round(found[name], 2) for name in METRICS}


def _in_words(row: dict[str, float]) -> str:
    return ", ".join(f"{METRICS[name]} {value:.1f}" for name, value in row.items())


# --- tables -------------------------------------------------------------------------------


def mean_table(tables: Sequence[Table]) -> Table:
    """The mean of several seeds' tables, cell by cell."""
    return {
        method: {
            metric: round(float(np.mean([table[method][metric] for table in tables])), 2)
            for metric in METRICS
        }
        for method in METHODS
    }


def check_pattern(table: Table) -> dict[str, bool]:
    """Which parts of the paper's pattern a table shows; all differences are in points."""

    def gain(method: str, metric: str) -> float:
        return table[method][metric] - table["base"][metric]

    lost = -gain("gpr", "t2i_r5")
    won_back = table["2sft"]["t2i_r5"] - table["gpr"]["t2i_r5"]
    return {
        "gpr: I2I mAP at least 8 points over the base": gain("gpr", "i2i_map") >= 8,
        "gpr: T2I R@5 at least 3 points under the base": lost >= 3,
        "mcip: at least 80 % of gpr's I2I gain": (
            gain("mcip", "i2i_map") >= 0.8 * gain("gpr", "i2i_map")
        ),
        "mcip: T2I R@5 at most 0.5 points under the base": gain("mcip", "t2i_r5") >= -0.5,
        "mcip: zero-shot at most 0.5 points under the base": gain("mcip", "zero_shot") >= -0.5,
        "2sft: at least half of gpr's T2I loss is won back": won_back >= 0.5 * lost,
        "mcip+: at least 95 % of gpr's I2I gain": (
            gain("mcip+", "i2i_map") >= 0.95 * gain("gpr", "i2i_map")
        ),
        "mcip+: T2I R@5 not under the base": gain("mcip+", "t2i_r5") >= 0,
        "mcip+: zero-shot not under the base": gain("mcip+", "zero_shot") >= 0,
    }


def format_table(table: Table) -> str:
    """The counterpart of the paper's table in markdown: values, and differences to the base."""
    lines = [
        "| model | " + " | ".join(METRICS.values()) + " |",
        "|---|" + "---:|" * len(METRICS),
    ]
    for method, row in table.items():
        cells = []
        for metric, value in row.items():
            change = value - table["base"][metric]
            cells.append(f"{value:.1f}" + ("" if method == "base" else f" ({change:+.1f})"))
        lines.append(f"| {PAPER_NAMES[method]} (`{method}`) | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _report(document: dict[str, Any], markdown: str) -> str:
    world = document["recipe"]["world"]
    count = len(document["seeds"])
    pattern = "".join(
        f"- {'yes' if holds else '**no**'}: {text}\n" for text, holds in document["pattern"].items()
    )
    base = document["base_model"]
    kept = document["alignment"]
    coefficients = ", ".join(
        f"{one['coefficient']:.2f}" if one["respected"] else "none, the base stays" for one in kept
    )
    return f"""# pymcip demo

Mean over {count} seed{"s" if count > 1 else ""}, in percent, with the difference to the base.

{markdown}
I2I mAP: full ranking of the test scenes, a scene is right if its main emoji is exactly the query's.
k-NN: k = 21, weighted vote of the other scenes. Zero-shot: the scene's emoji among the names of
the {world["test_classes"]} test classes. T2I R@5: a scene's caption finds it among the first five.

## The pattern: the paper's, and what `mcip+` promises

{pattern}
## What was run

- Training: {world["train_classes"]} emoji x {world["train_images"]} scenes, labelled with the exact
  emoji; {world["captions"]:,} captions of other scenes, aligned with no image.
- Test: {world["test_classes"]} other emoji x {world["test_images"]} scenes, each with a caption.
- `mcip+`: exports the weights farthest from the base, on the line to the tuned ones, that give at
  least {100 * (1 - kept[0]["budget"]):g} % of the base's right answers on a probe: {kept[0]["probe"]["images"]:,} other scenes
  of emoji that are in no training scene and no test class; an image chooses among their names, a
  name among images. How far on the line, seed by seed: {coefficients}.
- Base model: a CLIP trained by `{base["command"]}` on {base["pairs"]:,} drawn pairs, none of them
  of the training or test scenes. It has met the test emoji under their names in other scenes, as a
  CLIP trained on the web has met most things; fine-tuning meets none of them.
- {document["seconds"]:.0f} seconds in all. Every setting is in `report.json`.

![Random test scenes and their nearest others, before and after](retrieval.png)

{CREDIT}
"""


# --- picture ------------------------------------------------------------------------------


def _draw_neighbours(
    models: dict[str, str], world: World, folder: Path, queries: int, out: Path
) -> None:
    """Random test scenes, each with its nearest others under each model; right ones are framed."""
    sources = evaluation_options(world)["data"]
    data = load_images(sources)
    chosen = np.random.default_rng(0).choice(len(data), min(queries, len(data)), replace=False)
    found = {}
    for number, (heading, model) in enumerate(models.items()):
        vectors = embed(
            model=model, images=sources, out=folder / str(number), batch_size=256
        ).vectors("img")
        unit = vectors.astype(np.float32)
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
