"""`pymcip sweep`: train at each of several settings, and show image search against text search.

Every run is a run folder of `pymcip.train`, measured by `pymcip.evaluate`; by default on the demo's
world and with its recipe. A two-stage method goes on from the finished run of its first stage, as in
the demo.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pymcip.configs import SweepConfig, TrainConfig, read_options
from pymcip.demo.run import (
    SMOKE,
    Recipe,
    evaluation_options,
    plus_options,
    prepare_world,
    train_source,
)
from pymcip.demo.world import BASE_FOLDER, load_sprites
from pymcip.errors import ConfigError, DataError, PymcipError
from pymcip.evaluation import evaluate
from pymcip.files import prepare_output, read_json, write_json, write_text
from pymcip.studies.front import pareto_front
from pymcip.studies.plots import Curve, Mark, draw_curves, draw_front, require_matplotlib
from pymcip.studies.points import (
    NO_CHANGES,
    Changes,
    Point,
    first_stage,
    label,
    make_point,
    second_stage,
    study_points,
)
from pymcip.training import train

TEXT_METRICS = ("t2i_r5", "zero_shot")  # what alignment is the mean of, by default
MODEL_OPTIONS = ("image_size", "device", "precision")
KEPT = ("coefficient", "kept")  # what a run with an alignment budget has chosen on its probe
NO_CHECKPOINTS = 1_000_000  # save_steps of runs that are short: a checkpoint an epoch is enough
TITLES = {"i2i_map": "I2I mAP", "i2i_r1": "I2I R@1", "knn": "k-NN", "zero_shot": "zero-shot",
          "zero_shot_top5": "zero-shot top-5", "t2i_map": "T2I mAP"}  # fmt: skip

_log = logging.getLogger("pymcip.studies")
Metrics = dict[str, float]
Evaluations = dict[str, dict[str, Any]]  # "data", maybe "alignment_data": options of evaluate


@dataclass(frozen=True)
class SweepResult:
    """What `sweep` measured.

    `table` has the base (the model before training) and then a row per point: `point`, `settings`,
    `front` (Pareto-optimal), and by quality (`retrieval`, `alignment`, and each text metric that
    alignment is the mean of) its mean over `seeds` in percent, `deviation` (sample standard deviation;
    None for one seed), `gain` over the base and `gain_deviation`; or `error` instead of these.
    `front` are the points on the Pareto front, `failed` those without a result and why. `markdown`
    is the table for people; `seconds` the wall time of this call.
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

    Takes the fields of `SweepConfig` as keywords, or a ready config. Retrieval is one metric of
    image search, alignment the mean of metrics of text search, both in percent.

    Writes into `out`: table.md; sweep.json (all numbers, of every seed); front.png and .svg
    (retrieval over alignment, with the Pareto front); for each swept number by_NAME.png and .svg (both
    over its values); and seedS/runs/, the run folders, whose checkpoints are removed when they are
    finished. Seed s trains with the seed of `train` + s, or on the demo's world s.

    A run that fails (no caption reaches the threshold; the loss diverges) is a row with its message,
    and the sweep goes on. With `resume="latest"` a sweep that was stopped goes on, also with other
    values, options or more seeds: runs that are there are not trained again.

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
    study: _Study = _DemoStudy(config) if config.train is None else _OwnStudy(config)
    points = study_points(config, study.base, study.changes)
    out = _prepare(config, study)
    seeds = [study.base.seed + number for number in range(config.seeds)]
    runs = len({point.run for point in points})
    _log.info("%d points, %d runs, %d seeds", len(points), runs, len(seeds))
    try:
        records = [_run_seed(config, study, points, out, seed) for seed in seeds]
    except KeyboardInterrupt:
        _log.warning("interrupted; resume='latest' goes on with what is missing in %s", out)
        raise
    names = _qualities(config, records[0]["base"])
    table = _rows(config, points, records, names)
    seconds = round(time.perf_counter() - started, 1)
    markdown = _markdown(config, table, names, len(seeds))
    document = {
        "swept": {name: list(values) for name, values in config.axes.items()},
        "grid": config.grid,
        "seeds": seeds,
        "qualities": names,
        "table": table,
        "per_seed": records,
        "settings": study.settings(),
        "seconds": seconds,
    }
    write_json(out / "sweep.json", document)
    write_text(out / "table.md", markdown)
    failed = {row["point"]: row["error"] for row in table if "error" in row}
    if len(failed) == len(points):
        name, message = next(iter(failed.items()))
        raise PymcipError(
            f"none of the {len(points)} points of the sweep could be trained; {name}: {message}"
        )
    _draw(config, table, names, out)
    front = [row["point"] for row in table if row.get("front")]
    return SweepResult(out, seeds, table, front, failed, seconds, markdown)


# --- what is studied ----------------------------------------------------------------------


@dataclass(frozen=True)
class _Seed:
    """Where one seed's runs go, what they have in common, and what they are measured on."""

    folder: Path
    base: TrainConfig
    evaluations: Evaluations
    base_metrics: Path
    changes: Changes


class _Study:
    """The data and the recipe that the swept options are changes of.

    `changes`: what a method has in place of the recipe's options.
    """

    base: TrainConfig
    changes: Changes = NO_CHANGES

    def seed(self, seed: int, out: Path) -> _Seed:
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """What runs in one folder must have in common, as plain JSON values."""
        raise NotImplementedError


class _DemoStudy(_Study):
    """The demo's worlds, a new one for every seed."""

    def __init__(self, config: SweepConfig) -> None:
        load_sprites()  # before anything is written: it tells what is not installed
        self.recipe = SMOKE if config.smoke else Recipe()
        self.base = TrainConfig(
            model=f"local-dir:{BASE_FOLDER}",
            train_data="train-*.tar",  # of the seed's world, as the captions are
            captions="captions.txt",
            out="",
            save_steps=NO_CHECKPOINTS,
            **self.recipe.train,
            **self.recipe.rea,
        )
        self.changes = self._changes(Path())

    def _changes(self, world: Path) -> Changes:
        return {"mcip+": plus_options(self.recipe, world)}

    def seed(self, seed: int, out: Path) -> _Seed:
        folder = out / f"seed{seed}"
        settings = dataclasses.replace(self.recipe.world, seed=seed)
        world = prepare_world(settings, folder / "world")
        base = dataclasses.replace(
            self.base,
            train_data=train_source(world),
            captions=str(world.captions),
            cache=folder / "embeddings",
            seed=seed,
        )
        evaluations = {"data": evaluation_options(world)}
        changes = self._changes(folder / "world")
        return _Seed(folder, base, evaluations, folder / "metrics" / "base.json", changes)

    def settings(self) -> dict[str, Any]:
        world = {**dataclasses.asdict(self.recipe.world), "seed": None}
        train = {**self.base.to_dict(), "model": "the demo's"}  # wherever it is installed
        return {"train": train, "changes": _plain(self.changes), "world": _plain(world)}


class _OwnStudy(_Study):
    """The user's data and options of `train`; the same data for every seed."""

    def __init__(self, config: SweepConfig) -> None:
        assert config.train is not None
        options = read_options(Path(config.train), "train:")
        validation = options.pop("val_data", None), options.pop("val_class_names", None)
        for name in ("out", "resume", "overwrite"):
            options.pop(name, None)
        data, names = validation if config.data is None else (config.data, config.class_names)
        if isinstance(data, list):
            data = tuple(data)
        problems = []
        if data is None:
            problems.append("give `data`, labelled images to measure the runs on")
        try:
            self.base = TrainConfig.make(None, {**options, "out": ""})
        except ConfigError as error:
            problems += [f"{config.train}: {problem}" for problem in error.problems]
        if problems:
            raise ConfigError(problems)
        given = {"workers": self.base.workers, "templates": config.templates}
        self.evaluations = {"data": {"data": data, "class_names": names, **given}}
        if config.alignment_data is not None:
            self.evaluations["alignment_data"] = {
                "data": config.alignment_data,
                "class_names": config.alignment_class_names,
                **given,
            }

    def seed(self, seed: int, out: Path) -> _Seed:
        cache = self.base.cache or out / "embeddings"
        base = dataclasses.replace(self.base, seed=seed, cache=cache)
        folder = out / f"seed{seed}"
        return _Seed(folder, base, self.evaluations, out / "base.json", self.changes)

    def settings(self) -> dict[str, Any]:
        return {"train": self.base.to_dict(), "evaluations": _plain(self.evaluations)}


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def _prepare(config: SweepConfig, study: _Study) -> Path:
    """Make `out`; a sweep that is resumed must be of the same data and recipe."""
    out, settings = Path(config.out), study.settings()
    described = out / "config.json"
    if config.resume and described.is_file():
        before = read_json(described)["settings"]
        if before != settings:
            names = [
                f"{part}.{name}"
                for part in settings
                for name in settings[part]
                if before.get(part, {}).get(name) != settings[part][name]
            ]
            raise ConfigError(
                f"resume='latest': the sweep in {out} has other settings ({', '.join(names)}); give "
                "the same ones, or another folder"
            )
    elif config.resume and out.is_dir() and any(out.iterdir()):
        raise ConfigError(
            f"resume='latest': {out} holds files but no config.json, so it is no sweep; give the "
            "folder of a sweep, or one that is new or empty"
        )
    base = study.base
    prepare_output(
        out,
        overwrite=config.overwrite,
        resume=config.resume is not None,
        inputs=(
            *(config.train, config.data, config.class_names, config.alignment_data),
            *(base.model, base.pretrained, base.train_data, base.captions, base.rea_data),
            *(base.cache, config.alignment_class_names, base.mine_model, base.mine_pretrained),
        ),
    )
    write_json(described, {"sweep": config.to_dict(), "settings": settings})
    return out


# --- runs ---------------------------------------------------------------------------------


def _run_seed(
    config: SweepConfig, study: _Study, points: list[Point], out: Path, seed: int
) -> dict[str, Any]:
    """Train and measure all points with one seed: {"seed", "base", "points": one record each}."""
    prepared = study.seed(seed, out)
    base = prepared.base
    untrained = {"model": base.model, "pretrained": base.pretrained}
    untrained |= {name: getattr(base, name) for name in MODEL_OPTIONS}
    found = _measured(untrained, prepared.evaluations, prepared.base_metrics)
    names = _qualities(config, found)
    _log.info("seed %d: base: %s", seed, _in_words(_values(found, names), names))
    failed: dict[str, PymcipError] = {}
    records = []
    for number, point in enumerate(points, start=1):
        clock = time.perf_counter()
        name = f"seed {seed}, {number} of {len(points)}: {label(point.settings, 0)}"
        try:
            record = _run_point(prepared, point, failed)
            text = _in_words(_values(record["metrics"], names), names)
        except PymcipError as error:
            record = {"error": str(error)}
            text = f"failed: {error}"
        _log.info("%s: %s (%.0f s)", name, text, time.perf_counter() - clock)
        records.append({"settings": point.settings, "run": point.run, **record})
    return {"seed": seed, "base": found, "points": records}


def _run_point(prepared: _Seed, point: Point, failed: dict[str, PymcipError]) -> dict[str, Any]:
    folder = _trained(prepared, point, failed)
    model = {"model": str(folder)}
    model |= {name: getattr(point.config, name) for name in MODEL_OPTIONS}
    file = prepared.folder / "metrics" / f"{point.run}.json"
    record: dict[str, Any] = {"metrics": _measured(model, prepared.evaluations, file)}
    result = read_json(folder / "result.json")
    record["seconds"] = round(result["seconds"], 1)
    if result.get("alignment") is not None:
        record |= {name: result["alignment"][name] for name in KEPT}
    mined = folder / "mined" / "report.json"
    if point.config.needs_captions and mined.is_file():
        report = read_json(mined)
        record["threshold"] = report["threshold"]
        record["captions_per_image"] = report["pairs"] / report["images"]
    return record


def _trained(prepared: _Seed, point: Point, failed: dict[str, PymcipError]) -> Path:
    """The finished run folder of a point, trained now if there is none; `failed` by run name."""
    folder = prepared.folder / "runs" / point.run
    if not (folder / "result.json").is_file():  # written last
        if point.run in failed:
            raise failed[point.run]
        # with the seed's data
        config = make_point(prepared.base, point.settings, prepared.changes).config
        config = dataclasses.replace(config, out=folder, resume="latest")
        try:
            first = first_stage(prepared.base, point, prepared.changes)
            if first is not None:
                config = second_stage(config, str(_trained(prepared, first, failed)))
            result = train(config)
        except PymcipError as error:
            failed[point.run] = error
            raise
        if result.interrupted:
            raise KeyboardInterrupt(result.interrupted)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return folder


def _measured(model: dict[str, Any], evaluations: Evaluations, file: Path) -> dict[str, Metrics]:
    """Metrics by what they were measured on; from `file`, if they are there."""
    if not file.is_file():
        found = {key: evaluate(**model, **options).metrics for key, options in evaluations.items()}
        write_json(file, found)
    measured: dict[str, Metrics] = read_json(file)
    return measured


# --- tables -------------------------------------------------------------------------------


def _qualities(config: SweepConfig, base: dict[str, Metrics]) -> dict[str, list[str]]:
    """The metrics that `retrieval` and `alignment` are the mean of."""
    images, texts = base["data"], base.get("alignment_data", base["data"])
    if config.retrieval not in images:
        raise DataError(
            f"retrieval={config.retrieval!r} was not measured on the data; measured: "
            f"{', '.join(images)}"
        )
    wanted: tuple[str, ...] = config.alignment or tuple(
        name for name in TEXT_METRICS if name in texts
    )
    missing = [name for name in wanted if name not in texts]
    if missing or not wanted:
        raise DataError(
            f"alignment can't be measured by {', '.join(missing or TEXT_METRICS)}: the data need "
            f"class_names, or captions for t2i and i2t; measured: {', '.join(texts)}"
        )
    return {"retrieval": [config.retrieval], "alignment": list(dict.fromkeys(wanted))}


def _values(found: dict[str, Metrics], names: dict[str, list[str]]) -> Metrics:
    """One model's qualities, and the text metrics beside their mean if there are several."""
    images, texts = found["data"], found.get("alignment_data", found["data"])
    values = {
        "retrieval": images[names["retrieval"][0]],
        "alignment": float(np.mean([texts[name] for name in names["alignment"]])),
    }
    if len(names["alignment"]) > 1:
        values |= {name: texts[name] for name in names["alignment"]}
    return values


def _title(quality: str, names: dict[str, list[str]]) -> str:
    if quality == "alignment" and len(names["alignment"]) > 1:
        return "alignment"
    name = names[quality][0] if quality in names else quality
    if name in TITLES:
        return TITLES[name]
    way, rank = name.split("_r")
    return f"{way.upper()} R@{rank}"


def _in_words(values: Metrics, names: dict[str, list[str]]) -> str:
    return ", ".join(f"{_title(name, names)} {value:.1f}" for name, value in values.items())


def _rows(
    config: SweepConfig,
    points: list[Point],
    records: list[dict[str, Any]],
    names: dict[str, list[str]],
) -> list[dict[str, Any]]:
    """The rows that `SweepResult.table` describes; a point that failed with one seed has failed."""
    bases = [_values(record["base"], names) for record in records]
    rows: list[dict[str, Any]] = [{"point": "base", "settings": {}, **_summary(bases, bases)}]
    for number, point in enumerate(points):
        per_seed = [record["points"][number] for record in records]
        row: dict[str, Any] = {
            "point": label(point.settings, len(config.axes)),
            "settings": point.settings,
        }
        errors = [
            f"seed {record['seed']}: {one['error']}"
            for record, one in zip(records, per_seed, strict=True)
            if "error" in one
        ]
        if errors:
            rows.append({**row, "error": " ".join(errors[0].split())})
            continue
        row |= _summary([_values(one["metrics"], names) for one in per_seed], bases)
        for name in ("threshold", "captions_per_image", *KEPT):
            if all(name in one for one in per_seed):
                row[name] = round(float(np.mean([one[name] for one in per_seed])), 4)
        rows.append(row)
    pairs = [
        [row[name]["mean"] if name in row else np.nan for name in ("alignment", "retrieval")]
        for row in rows
    ]
    front = pareto_front(pairs)
    return [row if "error" in row else {**row, "front": i in front} for i, row in enumerate(rows)]


def _summary(values: list[Metrics], bases: list[Metrics]) -> dict[str, dict[str, float | None]]:
    """By quality: mean and deviation over the seeds, of the value and of its gain over the base."""
    found: dict[str, dict[str, float | None]] = {}
    for name in values[0]:
        value = np.array([one[name] for one in values])
        gain = value - np.array([base[name] for base in bases])
        found[name] = {
            "mean": round(float(value.mean()), 4),
            "deviation": _deviation(value),
            "gain": round(float(gain.mean()), 4),
            "gain_deviation": _deviation(gain),
        }
    return found


def _deviation(values: npt.NDArray[np.float64]) -> float | None:
    return round(float(values.std(ddof=1)), 4) if len(values) > 1 else None


def _markdown(
    config: SweepConfig, table: list[dict[str, Any]], names: dict[str, list[str]], seeds: int
) -> str:
    qualities = ["retrieval", "alignment"]
    qualities += names["alignment"] if len(names["alignment"]) > 1 else []
    counted = {"threshold", "k"} & config.axes.keys()
    heads = [next(iter(config.axes)).replace("_", " ") if len(config.axes) == 1 else "settings"]
    heads += [_title(name, names) for name in qualities]
    chosen = any("coefficient" in row for row in table)
    heads += (["captions per image"] if counted else []) + (["chosen, kept"] if chosen else [])
    heads += ["front"]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 2) + ":---:|"]
    for row in table:
        name = row["point"]
        if row["settings"].get("threshold") == "auto" and "threshold" in row:
            name += f" ({row['threshold']:.3f})"
        if "error" in row:
            reason = row["error"].replace("|", "\\|")
            reason = reason if len(reason) <= 120 else reason[:119] + "…"
            cells = [f"failed: {reason}", *[""] * (len(heads) - 2)]
        else:
            cells = [_cell(row[quality], row["point"] == "base") for quality in qualities]
            if counted:
                cells.append(
                    f"{row['captions_per_image']:.1f}" if "captions_per_image" in row else ""
                )
            if chosen:
                cells.append(
                    f"{row['coefficient']:.2f}, {100 * row['kept']:.1f}" if "kept" in row else ""
                )
            cells.append("yes" if row["front"] else "")
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines) + "\n\n" + _notes(names, seeds, chosen) + "\n"


def _cell(quality: dict[str, float | None], is_base: bool) -> str:
    def number(value: float | None, deviation: float | None, sign: str = "") -> str:
        return f"{value:{sign}.1f}" + ("" if deviation is None else f" ± {deviation:.1f}")

    text = number(quality["mean"], quality["deviation"])
    if is_base:
        return text
    return f"{text} ({number(quality['gain'], quality['gain_deviation'], '+')})"


def _notes(names: dict[str, list[str]], seeds: int, chosen: bool) -> str:
    spread = " ± their standard deviation" if seeds > 1 else ""
    text = f"Percent, means over {seeds} seed{'s' if seeds > 1 else ''}{spread}; "
    text += "in brackets the difference to the base (the model before training). "
    if len(names["alignment"]) > 1:
        parts = " and ".join(_title(name, {}) for name in names["alignment"])
        text += f"Alignment: mean of {parts}. "
    if chosen:
        text += (
            "Chosen: how far the exported weights are on the line from the base (0) to the tuned ones "
            "(1), found on the probe; kept: the share of its alignment that they keep there, in percent. "
        )
    return text + "Front: no other row is better in one quality and as good in the other."


# --- plots --------------------------------------------------------------------------------


def _draw(
    config: SweepConfig, table: list[dict[str, Any]], names: dict[str, list[str]], out: Path
) -> None:
    """Draw front.png, and by_NAME.png for each swept number, both as SVG too."""
    done = [row for row in table if "error" not in row]
    titles = {
        "retrieval": f"image search: {_title('retrieval', names)} (%)",
        "alignment": "text search: "
        + " and ".join(_title(name, {}) for name in names["alignment"])
        + (" (%), mean" if len(names["alignment"]) > 1 else " (%)"),
    }
    draw_front(
        [
            Mark(
                label=row["point"],
                x=row["alignment"]["mean"],
                y=row["retrieval"]["mean"],
                x_error=row["alignment"]["gain_deviation"] or 0.0,
                y_error=row["retrieval"]["gain_deviation"] or 0.0,
                group=_group(row["settings"]),
                front=row["front"],
                chosen="coefficient" in row,
            )
            for row in done
        ],
        titles["alignment"],
        titles["retrieval"],
        out / "front",
    )
    for axis in config.axes:
        curves: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
        for row in done:
            value = row["settings"].get(axis)
            if value == "auto":
                value = row.get("threshold")
            if not isinstance(value, (int, float)):
                continue
            others = {name: one for name, one in row["settings"].items() if name != axis}
            for quality in ("retrieval", "alignment"):
                curves.setdefault((label(others, 0), quality), []).append(
                    (value, row[quality]["gain"], row[quality]["gain_deviation"] or 0.0)
                )
        if not any(len(values) > 1 for values in curves.values()):
            continue
        drawn = [
            Curve(
                label=" ".join(filter(None, [titles[quality].split(" (%)")[0], others])),
                points=sorted(values),
                dashed=quality == "alignment",
                group=others,
            )
            for (others, quality), values in curves.items()
        ]
        draw_curves(drawn, axis.replace("_", " "), out / f"by_{axis}")


def _group(settings: dict[str, Any]) -> str:
    """Points of one colour: those of one method, or else those that set the same options."""
    return str(settings.get("method", ", ".join(settings)))
