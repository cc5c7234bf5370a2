"""The table of a sweep: means and deviations over seeds, the Pareto front, and both as markdown."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

import numpy as np
import numpy.typing as npt

from pymcip.configs import SweepConfig
from pymcip.demo.points import Point, label
from pymcip.demo.report import METRICS
from pymcip.errors import DataError
from pymcip.markdown import markdown_table

TITLES = {**METRICS, "i2i_r1": "I2I R@1", "zero_shot_top5": "zero-shot top-5", "t2i_map": "T2I mAP"}
TEXT_METRICS = ("t2i_r5", "zero_shot")  # what alignment is the mean of, by default
KEPT = {"coefficient": "chosen", "kept": "kept"}  # what a run with a budget says of its weights
DEVIATIONS = {"mean": "deviation", "gain": "gain_deviation"}
MORE = {"captions_per_image": "captions per image", **KEPT}


def pareto_front(points: npt.ArrayLike) -> list[int]:
    """Indices, ascending, of the points that no other point dominates; larger is better.

    A point dominates another if it is at least as good in both qualities and better in one: of
    equal points all are on the front, or none. One with a NaN was not measured and is left out.

    Args:
        points: [N, 2], float.

    Raises:
        ValueError: another shape.
    """
    values = np.asarray(points, dtype=np.float64)
    if values.size == 0:
        return []
    if values.ndim != 2 or values.shape[1] != 2:
        raise ValueError(f"points has the shape {values.shape}; allowed: [N, 2]")
    one, other = values[:, None], values[None, :]
    dominates = np.all(other >= one, axis=2) & np.any(other > one, axis=2)
    measured = ~np.isnan(values).any(axis=1)
    return np.flatnonzero(measured & ~dominates.any(axis=1)).tolist()  # type: ignore[no-any-return]


def with_alignment(config: SweepConfig, base: Mapping[str, float]) -> SweepConfig:
    """The sweep with its metrics of `alignment`, or else those that the base model has.

    Raises:
        DataError: a metric that it asks for was not measured of the base model.
    """
    wanted: Any = config.alignment or [name for name in TEXT_METRICS if name in base]
    missing = [name for name in wanted if name not in base]
    if missing or not wanted or config.retrieval not in base:
        raise DataError(
            f"alignment can't be measured by {', '.join(missing or TEXT_METRICS)}: the data need "
            f"labels, and class_names, or captions for t2i and i2t; measured: {', '.join(base)}"
        )
    return dataclasses.replace(config, alignment=tuple(wanted))


def qualities(config: SweepConfig, found: Mapping[str, float]) -> dict[str, float]:
    """One model's values in percent; the metrics that alignment is the mean of follow it."""
    parts: dict[str, float] = {name: found[name] for name in config.alignment}
    values = {"retrieval": found[config.retrieval], "alignment": fmean(parts.values())}
    return {**values, **parts} if len(parts) > 1 else values


def titles(config: SweepConfig) -> dict[str, str]:
    """What `retrieval` and `alignment` are, and each metric that alignment is the mean of."""
    parts: dict[str, str] = {
        name: TITLES.get(name, name.upper().replace("_R", " R@")) for name in config.alignment
    }
    alignment = " and ".join(parts.values())
    return {"retrieval": TITLES[config.retrieval], "alignment": alignment, **parts}


def sweep_rows(
    config: SweepConfig, points: Sequence[Point], records: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The rows that `SweepResult.table` describes; a point that failed with one seed has failed."""
    bases = [qualities(config, record["base"]) for record in records]
    rows: list[dict[str, Any]] = [{"point": "base", "settings": {}, **_summary(bases, bases)}]
    for number, point in enumerate(points):
        name = label(point.settings, len(config.axes))
        row: dict[str, Any] = {"point": name, "settings": point.settings}
        each = {record["seed"]: record["points"][number] for record in records}
        errors = [f"seed {seed}: {one['error']}" for seed, one in each.items() if "error" in one]
        if errors:
            row["error"] = " ".join(errors[0].split())
        else:
            row |= _summary([qualities(config, one["metrics"]) for one in each.values()], bases)
            for name in ("threshold", *MORE):
                if all(name in one for one in each.values()):
                    row[name] = round(fmean(one[name] for one in each.values()), 4)
        rows.append(row)
    done = [row for row in rows if "error" not in row]
    front = pareto_front([[row["retrieval"]["mean"], row["alignment"]["mean"]] for row in done])
    for number, row in enumerate(done):
        row["front"] = number in front
    return rows


def _summary(values: list[dict[str, float]], bases: list[dict[str, float]]) -> dict[str, Any]:
    """By quality: mean and deviation over the seeds, of the value and of its gain over the base."""
    found: dict[str, dict[str, float | None]] = {name: {} for name in values[0]}
    for name, figures in found.items():
        value = [one[name] for one in values]
        gain = [one - base[name] for one, base in zip(value, bases, strict=True)]
        for kind, each in (("mean", value), ("gain", gain)):
            figures[kind] = round(fmean(each), 4)
            figures[DEVIATIONS[kind]] = round(stdev(each), 4) if len(each) > 1 else None
    return found


def sweep_markdown(config: SweepConfig, rows: Sequence[dict[str, Any]]) -> str:
    """The table for people, with notes on what it says."""
    names = titles(config)
    heads = {name: names[name] for name in rows[0] if name in names}
    if len(config.alignment) > 1:
        heads["alignment"] = "alignment"
    more = {name: head for name, head in MORE.items() if any(name in row for row in rows)}
    lines = []
    for row in rows:
        name = row["point"]
        if row["settings"].get("threshold") == "auto" and "threshold" in row:
            name += f" ({row['threshold']:.3f})"
        if "error" in row:
            lines.append([name, f"failed: {row['error'][:120]}", *[""] * len(heads | more)])
            continue
        cells = [_cell(row[quality], change=row is not rows[0]) for quality in heads]
        cells += [f"{row[figure]:.3g}" if figure in row else "" for figure in more]
        lines.append([name, *cells, "yes" if row["front"] else ""])
    first = next(iter(config.axes)).replace("_", " ") if len(config.axes) == 1 else "settings"
    columns = [first, *heads.values(), *more.values(), "front"]
    return f"""{markdown_table(columns, "l" + "r" * (len(columns) - 2) + "c", lines)}
Percent, means over {config.seeds} seed{"s ± their standard deviation" if config.seeds > 1 else ""}; in brackets the \
difference to the base (the model before training). Alignment: mean of {names["alignment"]}. Chosen: how far the exported \
weights are on the line from the base (0) to the tuned ones (1), found on the probe; kept: the share of its alignment that \
they keep there. Front: no other row is better in one quality and as good in the other.
"""


def _cell(figures: dict[str, Any], *, change: bool) -> str:
    value, gain = (
        f"{figures[kind]:{form}}"
        + (f" ± {figures[spread]:.1f}" if figures[spread] is not None else "")
        for (kind, spread), form in zip(DEVIATIONS.items(), (".1f", "+.1f"), strict=True)
    )
    return f"{value} ({gain})" if change else value
