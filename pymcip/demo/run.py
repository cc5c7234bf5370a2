"""`pymcip demo`: compose a world, mine, fine-tune in six ways, and measure each against the base.

Everything goes through the package's public functions, as a user would call them.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pymcip.configs import DemoConfig
from pymcip.demo.points import make_point, measured, trained
from pymcip.demo.recipe import BASE, BASE_FOLDER, DEMO, SMOKE, Recipe
from pymcip.demo.report import (
    METHODS,
    METRICS,
    SHOWN,
    Table,
    check_pattern,
    format_report,
    format_table,
    mean_table,
    page_commands,
)
from pymcip.demo.sprites import CREDIT, load_sprites
from pymcip.demo.world import prepare_world
from pymcip.evaluation import evaluate, in_words
from pymcip.files import read_json, write_json, write_text
from pymcip.model.loading import HUB_FOLDER
from pymcip.outputs import output_folder

_log = logging.getLogger("pymcip.demo")


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
    """Run the demo and write report.md, report.json and the page of mcip in `before-and-after/` into `out`.

    Takes the fields of `DemoConfig` as keywords, or a ready config. Each seed has a folder of its
    own below `out`, with its world, its runs and its evaluations.

    Raises:
        MissingDependencyError: the pictures or their names are not installed.
        OutputExistsError: `out` is not empty, and `overwrite` was not given.
    """
    config = DemoConfig.make(config, options)
    recipe = SMOKE if config.smoke else DEMO
    started = time.perf_counter()
    load_sprites()  # before anything is written: it says what is not installed
    with output_folder(config) as out:
        return _run(config, recipe, out, started)


def _run(config: DemoConfig, recipe: Recipe, out: Path, started: float) -> DemoResult:
    tables = []
    seeds = list(range(config.seeds))
    for seed in seeds:
        _log.info("seed %d of %d", seed + 1, len(seeds))
        tables.append(_run_seed(seed, out / f"seed{seed}", recipe, show_in=out / SHOWN))
    table = mean_table(tables)
    pattern = check_pattern(table)
    seconds = round(time.perf_counter() - started, 1)
    markdown = format_table(table)
    kept = [
        read_json(out / f"seed{seed}" / "runs" / "mcip+" / "alignment.json", {}) for seed in seeds
    ]
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
    commands = page_commands(out / "seed0")
    write_text(out / "report.md", format_report(document, markdown, commands))
    for page in out.rglob("report.html"):  # of base and mcip, and of each run
        text = page.read_text(encoding="utf-8")
        if CREDIT not in text:
            write_text(page, text.replace("</html>", f"<p class=quiet>{CREDIT}</p>\n</html>"))
    _log.info("to search the test scenes in the browser, before and after:\n%s", commands.rstrip())
    return DemoResult(out, seeds, table, seconds, pattern, markdown)


def _run_seed(seed: int, folder: Path, recipe: Recipe, show_in: Path) -> Table:
    """One seed's scenes, trainings and evaluations; of the first one also what base and mcip find."""
    world = prepare_world(dataclasses.replace(recipe.world, seed=seed), folder / "world")
    _log.info("composed the scenes and the caption corpus")
    base = recipe.config(world, cache=folder / "embeddings", seed=seed)
    models, table = {}, {}
    for method in METHODS:
        models[method] = BASE
        if method != "base":
            point = make_point(base, {"method": method}, recipe.changes(world))
            run = trained(point, folder / "runs", {})
            if (run / HUB_FOLDER).is_dir():
                models[method] = str(run)
            else:
                _log.warning("%s exports nothing, as no weights keep its budget", method)
        model = dataclasses.replace(base, model=models[method])
        found = measured(model, world.testing, folder / "metrics" / f"{method}.json")
        table[method] = {name: round(found[name], 2) for name in METRICS}
        _log.info("%s: %s", method, in_words(table[method]))
    if seed == 0:
        evaluate(model=models["mcip"], baseline=BASE, out=show_in, **world.testing)
    return table
