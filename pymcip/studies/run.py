"""`pymcip sweep`: train at each of several settings, and show image search against text search.

Every run is a run folder of `pymcip.train`, measured by `pymcip.evaluate`; by default on the demo's
world and with its recipe.
"""

from __future__ import annotations

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
from pymcip.demo.points import Changes, Point, label, measured, study_points, trained
from pymcip.demo.recipe import DEMO, SMOKE
from pymcip.demo.sprites import load_sprites
from pymcip.demo.world import World, prepare_world
from pymcip.errors import ConfigError, PymcipError
from pymcip.files import read_json, write_json, write_text
from pymcip.outputs import output_folder
from pymcip.studies.plots import draw_curves, draw_front, require_matplotlib
from pymcip.studies.tables import KEPT, qualities, sweep_markdown, sweep_rows, with_alignment
from pymcip.training.inputs import open_inputs
from pymcip.training.result import read_begun

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
    out, resume = Path(config.out), config.resume is not None
    read, settings = _settings(config, study)
    begun = read_begun(out, "sweep", {"settings": dict}) if resume else None
    names = [
        f"{part}.{name}"
        for part, own in settings.items()
        for name, value in own.items()
        if begun is not None and dict(begun["settings"].get(part) or {}).get(name) != value
    ]
    if names:
        raise ConfigError(
            f"resume='latest': the sweep in {out} has other settings ({', '.join(names)}); give "
            "the same ones, or another folder"
        )
    seeds = [study.base.seed + number for number in range(config.seeds)]
    with output_folder(config, resume=resume, read=read, also=[study.base]):
        write_json(out / "config.json", {"sweep": config.to_dict(), "settings": settings})
        try:
            records = [_run_seed(config, seed) for seed in seeds]
        except KeyboardInterrupt:
            _log.warning("interrupted; resume='latest' continues with what is missing in %s", out)
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
        draw_front(config, done, out / "front")
        for axis in config.axes:
            draw_curves(config, done, axis, out / f"by_{axis}")
        front = [row["point"] for row in done if row["front"]]
        return SweepResult(out, seeds, table, front, failed, seconds, markdown)


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
        recipe = SMOKE if config.smoke else DEMO
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
    options |= {"out": "", "first_stage": None, "resume": None, "overwrite": False, "holdout": 0.0}
    try:
        base = TrainConfig.make(None, options)
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
        "workers": base.workers,
    }
    return _Study(base, evaluation, {}, {})


def _settings(config: SweepConfig, study: _Study) -> tuple[list[Path], dict[str, Any]]:
    """The files that the runs of the user's own data read, and all that a sweep must keep, by parts."""
    read: list[Path] = []
    inputs: dict[str, str] = {}
    options = study.base.to_dict()
    if config.train is None:
        options["model"] = "the demo's"  # wherever it is installed
    else:
        opened = open_inputs(study.base)
        with columns_named(study.base.columns):
            data = load_images(study.evaluation["data"], labelled=False)
        read = [*opened.files(), *data.files()]
        inputs = {**opened.fingerprints(study.base), "data": data.fingerprint()}
        if study.evaluation["class_names"] is not None:
            inputs["class_names"] = digest_of_files([study.evaluation["class_names"]])
    parts = {**asdict(study), "train": options, "inputs": inputs}
    del parts["base"]
    settings: dict[str, Any] = json.loads(json.dumps(parts, default=str))
    return read, settings


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
    result = read_json(run / "result.json", {"seconds": float})
    figures = {"seconds": round(result["seconds"], 1)}
    if result.get("alignment") is not None:
        figures |= {name: result["alignment"][name] for name in KEPT}
    mined = run / "mined" / "report.json"
    if point.config.needs_captions and mined.is_file():
        report = read_json(mined, {"threshold": float, "pairs": int, "images": int})
        figures["threshold"] = report["threshold"]
        figures["captions_per_image"] = report["pairs"] / report["images"]
    return figures
