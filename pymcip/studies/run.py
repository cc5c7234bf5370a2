"""`pymcip sweep`: train at each of several settings, and show image search against text search.

Every run is a run folder of `pymcip.train`, measured by `pymcip.evaluate`; by default on the demo's
world and with its recipe.
"""

from __future__ import annotations

import itertools
import json
import logging
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pymcip.configs import SweepConfig, TrainConfig, read_options
from pymcip.contents import digest_of_files
from pymcip.data import load_images
from pymcip.data.column_names import columns_named
from pymcip.demo.points import (
    NO_CHANGES,
    Changes,
    Point,
    label,
    make_point,
    measured,
    trained,
)
from pymcip.demo.recipe import SMOKE, Recipe
from pymcip.demo.sprites import load_sprites
from pymcip.demo.world import World, prepare_world
from pymcip.errors import ConfigError, PymcipError
from pymcip.files import read_json, write_json, write_text
from pymcip.folders import holds_files
from pymcip.outputs import output_folder
from pymcip.studies.plots import draw_curves, draw_front, require_matplotlib
from pymcip.studies.tables import (
    KEPT,
    qualities,
    sweep_markdown,
    sweep_rows,
    titles,
    with_alignment,
)
from pymcip.training.inputs import open_inputs

_log = logging.getLogger("pymcip.studies")


@dataclass(frozen=True)
class SweepResult:
    """What `sweep` measured.

    `table` has the base (the model before training) and then a row per point: `point`, `settings`,
    `front` (Pareto-optimal), and by quality (`retrieval`, `alignment`, and each text metric that
    alignment is the mean of) its `mean` over `seeds` in percent, `deviation` (sample standard
    deviation; None for one seed), `gain` over the base and `gain_deviation`; or `error` instead.
    `failed` has the points without a result and why; `markdown` is the table for people.
    """

    out: Path
    seeds: list[int]
    table: list[dict[str, Any]]
    front: list[str]
    failed: dict[str, str]
    seconds: float
    markdown: str


def sweep(config: SweepConfig | None = None, /, **options: Any) -> SweepResult:
    """Train at every setting asked for, with every seed, and compare retrieval with alignment.

    Takes the fields of `SweepConfig` as keywords, or a ready config. Writes into `out`: table.md;
    sweep.json (all numbers, of every seed); front.png and .svg (image search over text search, with
    the Pareto front); for each swept number by_NAME.png and .svg (both over its values); and
    seedS/runs/, the run folders, without checkpoints. Seed s trains with the seed of `train` + s,
    or on the demo's world s. A run that fails (no caption reaches the threshold; the loss diverges)
    is a row with its message, and the sweep continues. `resume="latest"` continues a sweep, also
    with other values, options or more seeds: finished runs are not trained again.

    Raises:
        ConfigError: an option or a combination of settings is wrong; nothing was written.
        MissingDependencyError: matplotlib is missing, or the demo's pictures are.
        DataError: the data have no metric of the kind asked for.
        OutputExistsError: `out` holds something.
        PymcipError: not one run succeeded.
    """
    config = SweepConfig.make(config, options)
    require_matplotlib()
    started = time.perf_counter()
    study = _study(config)
    points = study_points(config, study.base, study.changes)
    read, inputs = _inputs(config, study)
    settings, resume = _settings(config, study, inputs)
    with output_folder(config, resume=resume, read=read, also=[study.base]):
        write_json(
            Path(config.out) / "config.json", {"sweep": config.to_dict(), "settings": settings}
        )
        return _run(config, study, points, settings, started)


def _run(
    config: SweepConfig,
    study: _Study,
    points: list[Point],
    settings: dict[str, Any],
    started: float,
) -> SweepResult:
    out = Path(config.out)
    seeds = [study.base.seed + number for number in range(config.seeds)]
    try:
        records = [_run_seed(config, seed) for seed in seeds]
    except KeyboardInterrupt:
        _log.warning("interrupted; resume='latest' goes on with what is missing in %s", out)
        raise
    config = with_alignment(config, records[0]["base"])
    table = sweep_rows(config, points, records)
    markdown = sweep_markdown(config, table)
    seconds = round(time.perf_counter() - started, 1)
    document = {
        "swept": {name: list(values) for name, values in config.axes.items()},
        "grid": config.grid,
        "seeds": seeds,
        "qualities": {"retrieval": [config.retrieval], "alignment": list(config.alignment)},
        "table": table,
        "per_seed": records,
        "settings": settings,
        "seconds": seconds,
    }
    write_json(out / "sweep.json", document)
    write_text(out / "table.md", markdown)
    failed = {row["point"]: row["error"] for row in table if "error" in row}
    if len(failed) == len(points):
        name, error = next(iter(failed.items()))
        raise PymcipError(f"none of the {len(points)} points could be trained; {name}: {error}")
    done = [row for row in table if "error" not in row]
    draw_front(done, titles(config), out / "front")
    for axis in config.axes:
        rows = done
        if config.grid == "axes":
            rows = [
                {**row, "settings": {axis: row["settings"][axis]}}
                for row in done
                if axis in row["settings"]
            ]
        draw_curves(rows, axis, titles(config), out / f"by_{axis}")
    front = [row["point"] for row in done if row["front"]]
    return SweepResult(out, seeds, table, front, failed, seconds, markdown)


def study_points(
    config: SweepConfig, base: TrainConfig, changes: Changes = NO_CHANGES
) -> list[Point]:
    """The points of a sweep around `base`, in the order of the options and of their values.

    Options that a point's method doesn't use are left out of it. Points of equal runs are one: `gpr` is
    trained once, whatever thresholds a product tries, and of options that are tried alone those that
    have the base's value share a point, which has them all in its settings.

    Raises:
        ConfigError: a combination is not allowed, or a swept option is used by no method.
    """
    axes = config.axes
    tried = [{name: value} for name, values in axes.items() for value in values]
    if config.grid == "product":
        products = itertools.product(*axes.values())
        tried = [dict(zip(axes, values, strict=True)) for values in products]
    points: dict[str, Point] = {}  # by what is trained
    for settings in tried:
        point = make_point(base, settings, changes)
        if not point.settings:
            continue
        same = points.setdefault(str(point.config), point)
        if config.grid == "axes":  # the base's own values, of several options, are one point
            both = {**same.settings, **point.settings}
            points[str(point.config)] = replace(same, settings=both)
    methods = (config.grid == "product" and axes.get("method")) or (base.method,)
    problems = [
        f"{name} is swept, but method {', '.join(dict.fromkeys(methods))} doesn't use it"
        for name in axes
        if all(name not in point.settings for point in points.values())
    ]
    if problems:
        raise ConfigError(problems)
    return list(points.values())


@dataclass(frozen=True)
class _Study:
    """What the swept options are changes of, and what the runs are measured on."""

    base: TrainConfig
    evaluation: dict[str, Any]  # options of evaluate
    changes: Changes  # by method: options in place of the base's
    world: dict[str, Any]  # sizes of the demo's worlds


def _study(config: SweepConfig, seed: int | None = None) -> _Study:
    """The study of one seed, whose demo world is composed now; without a seed, of all seeds."""
    folder = Path(config.out) / f"seed{seed}"
    if config.train is None:
        load_sprites()  # before anything is written: it says what is not installed
        recipe = SMOKE if config.smoke else Recipe()
        world, own = World(Path()), {}
        if seed is not None:
            world = prepare_world(replace(recipe.world, seed=seed), folder / "world")
            own = {"seed": seed, "cache": folder / "embeddings"}
        sizes = {**asdict(recipe.world), "seed": None}
        return _Study(recipe.config(world, **own), world.testing, recipe.changes(world), sizes)
    options = read_options(Path(config.train), "train:")
    data, names = options.pop("val_data", None), options.pop("val_class_names", None)
    if config.data is not None:
        data, names = config.data, config.class_names
    problems = [] if data is not None else ["give `data`, labelled images to measure the runs on"]
    try:
        base = TrainConfig.make(
            None, {**options, "out": "", "resume": None, "overwrite": False, "holdout": 0.0}
        )
    except ConfigError as error:
        problems += [f"{config.train}: {problem}" for problem in error.problems]
    if problems:
        raise ConfigError(problems)
    if seed is not None:
        base = replace(base, seed=seed, cache=base.cache or folder.parent / "embeddings")
    evaluation = {
        "data": data,
        "class_names": names,
        "templates": config.templates,
        "columns": base.columns,
    }
    return _Study(base, {**evaluation, "workers": base.workers}, {}, {})


def _inputs(config: SweepConfig, study: _Study) -> tuple[list[Path], dict[str, str]]:
    """The files that the runs of the user's own data read, and what identifies their content."""
    if config.train is None:
        return [], {}
    opened = open_inputs(study.base)
    with columns_named(study.evaluation["columns"]):
        data = load_images(study.evaluation["data"], labelled=False)
    found = {**opened.fingerprints(study.base), "data": data.fingerprint()}
    names = study.evaluation["class_names"]
    if names is not None:
        found["class_names"] = digest_of_files([names])
    return [*opened.files(), *data.files()], found


def _settings(
    config: SweepConfig, study: _Study, inputs: dict[str, str]
) -> tuple[dict[str, Any], bool]:
    """Describe the study, and whether it is resumed: it must be the same but for its points."""
    base, out = study.base, Path(config.out)
    described, resume = out / "config.json", config.resume is not None
    parts = {**asdict(study), "train": base.to_dict(), "inputs": inputs}
    del parts["base"]
    if config.train is None:
        parts["train"]["model"] = "the demo's"  # wherever it is installed
    settings: dict[str, Any] = json.loads(json.dumps(parts, default=str))
    if resume and described.is_file():
        before = read_json(described, {"settings": dict})["settings"]
        names = [
            f"{part}.{name}"
            for part, own in settings.items()
            for name, value in own.items()
            if dict(before.get(part) or {}).get(name) != value
        ]
        if names:
            raise ConfigError(
                f"resume='latest': the sweep in {out} has other settings ({', '.join(names)}); give "
                "the same ones, or another folder"
            )
    elif resume and holds_files(out):
        raise ConfigError(
            f"resume='latest': {out} holds files but no config.json, so it is no sweep; give the "
            "folder of a sweep, or one that is new or empty"
        )
    return settings, resume


def _run_seed(config: SweepConfig, seed: int) -> dict[str, Any]:
    """Train and measure all points with one seed: {"seed", "base", "points": one record each}."""
    study, folder = _study(config, seed), Path(config.out) / f"seed{seed}"
    metrics = folder / "metrics"
    base_file = folder.parent / "base.json" if config.train else metrics / "base.json"
    base = measured(study.base, study.evaluation, base_file)
    config = with_alignment(config, base)
    failed: dict[str, PymcipError] = {}
    records = []
    for point in study_points(config, study.base, study.changes):
        record: dict[str, Any] = {"settings": point.settings, "run": point.run}
        try:
            run = trained(point, folder / "runs", failed)
            model = replace(point.config, model=str(run), pretrained=None)
            record["metrics"] = measured(model, study.evaluation, metrics / f"{point.run}.json")
            record |= _figures(run, point)
            found: Any = qualities(config, record["metrics"])
        except PymcipError as error:
            found = record["error"] = str(error)
        _log.info("seed %d: %s: %s", seed, label(point.settings, 0), found)
        records.append(record)
    return {"seed": seed, "base": base, "points": records}


def _figures(run: Path, point: Point) -> dict[str, float]:
    """What a finished run says of itself."""
    result, mined = (
        read_json(run / "result.json", {"seconds": float}),
        run / "mined" / "report.json",
    )
    figures = {"seconds": round(result["seconds"], 1)}
    if result.get("alignment") is not None:
        figures |= {name: result["alignment"][name] for name in KEPT}
    if point.config.needs_captions and mined.is_file():
        report = read_json(mined, {"threshold": float, "pairs": int, "images": int})
        figures["threshold"] = report["threshold"]
        figures["captions_per_image"] = report["pairs"] / report["images"]
    return figures
