"""The table of a sweep: means and deviations over seeds, the Pareto front, and both as markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pymcip.configs import SweepConfig
from pymcip.demo.report import METRICS
from pymcip.errors import DataError
from pymcip.evaluation import markdown_table
from pymcip.studies.points import Point, label

TEXT_METRICS = ("t2i_r5", "zero_shot")  # what alignment is the mean of, by default
KEPT = ("coefficient", "kept")  # what a run with an alignment budget has chosen on its probe
Found = Mapping[
    str, dict[str, float]
]  # metrics by what they are of: "data", maybe "alignment_data"


def pareto_front(points: npt.ArrayLike) -> list[int]:
    """Indices, ascending, of the points that no other point dominates; larger is better.

    A point dominates another if it is at least as good in both qualities and better in one. Equal
    points don't dominate each other: either all of them are on the front, or none. A point with a
    quality that is NaN was not measured; it is not on the front and dominates nothing.

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


class Qualities:
    """What a sweep compares: one metric of image search, and the mean of metrics of text search.

    Raises:
        DataError: a metric that `config` asks for is not among those of the `base` model.
    """

    def __init__(self, config: SweepConfig, base: Found) -> None:
        images, texts = base["data"], base.get("alignment_data", base["data"])
        if config.retrieval not in images:
            raise DataError(
                f"retrieval={config.retrieval!r} was not measured on the data; measured: "
                f"{', '.join(images)}"
            )
        wanted: Sequence[str] = config.alignment or [name for name in TEXT_METRICS if name in texts]
        missing = [name for name in wanted if name not in texts]
        if missing or not wanted:
            raise DataError(
                f"alignment can't be measured by {', '.join(missing or TEXT_METRICS)}: the data need "
                f"class_names, or captions for t2i and i2t; measured: {', '.join(texts)}"
            )
        self.retrieval: str = config.retrieval
        self.alignment = {name: title(name) for name in wanted}
        self.mean_of = " and ".join(self.alignment.values())
        several = len(self.alignment) > 1
        # By column of the table; the parts of a mean have columns of their own.
        self.titles = {"retrieval": title(config.retrieval), "alignment": self.mean_of}
        self.axes = {  # of the figures
            "retrieval": f"image search: {title(config.retrieval)} (%)",
            "alignment": f"text search: {self.mean_of} (%){', mean' if several else ''}",
        }
        if several:
            self.titles |= {"alignment": "alignment", **self.alignment}

    def values(self, found: Found) -> dict[str, float]:
        """One model's values, in percent, by the columns of `titles`."""
        texts = found.get("alignment_data", found["data"])
        values = {"retrieval": found["data"][self.retrieval]}
        values["alignment"] = float(np.mean([texts[name] for name in self.alignment]))
        return values | {name: texts[name] for name in self.titles if name not in values}

    def in_words(self, found: Found) -> str:
        """One model's values on a line of the log."""
        return ", ".join(f"{self.titles[name]} {v:.1f}" for name, v in self.values(found).items())


def title(metric: str) -> str:
    """A metric's name for people."""
    names = {**METRICS, "zero_shot_top5": "zero-shot top-5", "t2i_map": "T2I mAP"}
    return names.get(metric, metric.upper().replace("_R", " R@"))


def sweep_rows(
    axes: int, points: Sequence[Point], records: Sequence[dict[str, Any]], qualities: Qualities
) -> list[dict[str, Any]]:
    """The rows that `SweepResult.table` describes; a point that failed with one seed has failed."""
    bases = [qualities.values(record["base"]) for record in records]
    rows: list[dict[str, Any]] = [{"point": "base", "settings": {}, **_summary(bases, bases)}]
    for number, point in enumerate(points):
        each = [record["points"][number] for record in records]
        rows.append({"point": label(point.settings, axes), "settings": point.settings})
        failed = [i for i, one in enumerate(each) if "error" in one]
        if failed:
            message = " ".join(each[failed[0]]["error"].split())
            rows[-1]["error"] = f"seed {records[failed[0]]['seed']}: {message}"
            continue
        rows[-1] |= _summary([qualities.values(one["metrics"]) for one in each], bases)
        for name in ("threshold", "captions_per_image", *KEPT):
            if all(name in one for one in each):
                rows[-1][name] = round(float(np.mean([one[name] for one in each])), 4)
    done = [row for row in rows if "error" not in row]
    front = pareto_front(
        [[row[name]["mean"] for name in ("alignment", "retrieval")] for row in done]
    )
    for number, row in enumerate(done):
        row["front"] = number in front
    return rows


def _summary(values: list[dict[str, float]], bases: list[dict[str, float]]) -> dict[str, Any]:
    """By quality: mean and deviation over the seeds, of the value and of its gain over the base."""
    found: dict[str, dict[str, float | None]] = {name: {} for name in values[0]}
    for name, figures in found.items():
        value = np.array([one[name] for one in values])
        gain = value - np.array([base[name] for base in bases])
        for kind, each in {"": value, "gain_": gain}.items():
            figures[kind.rstrip("_") or "mean"] = round(float(each.mean()), 4)
            spread = round(float(each.std(ddof=1)), 4) if len(each) > 1 else None
            figures[f"{kind}deviation"] = spread
    return found


def sweep_markdown(
    axes: Sequence[str], rows: Sequence[dict[str, Any]], qualities: Qualities, seeds: int
) -> str:
    """The table for people, with notes on what it says."""
    counted, chosen = {"threshold", "k"} & set(axes), any("kept" in row for row in rows)
    heads = [axes[0].replace("_", " ") if len(axes) == 1 else "settings"]
    heads += qualities.titles.values()
    heads += ["captions per image"] * bool(counted) + ["chosen, kept"] * chosen + ["front"]
    lines = []
    for row in rows:
        name, cells = row["point"], []
        if row["settings"].get("threshold") == "auto" and "threshold" in row:
            name += f" ({row['threshold']:.3f})"
        if "error" in row:
            reason = row["error"] if len(row["error"]) <= 120 else row["error"][:119] + "…"
            lines.append([name, f"failed: {reason}", *[""] * (len(heads) - 2)])
            continue
        for quality in qualities.titles:
            value, gain = (
                f"{row[quality][mean]:{sign}.1f}"
                + ("" if row[quality][spread] is None else f" ± {row[quality][spread]:.1f}")
                for mean, spread, sign in (
                    ("mean", "deviation", ""),
                    ("gain", "gain_deviation", "+"),
                )
            )
            cells.append(value if row is rows[0] else f"{value} ({gain})")
        if counted:
            cells.append(f"{row['captions_per_image']:.1f}" if "captions_per_image" in row else "")
        if chosen:
            kept = "kept" in row
            cells.append(f"{row['coefficient']:.2f}, {100 * row['kept']:.1f}" if kept else "")
        lines.append([name, *cells, "yes" if row["front"] else ""])
    spread = "s ± their standard deviation" if seeds > 1 else ""
    notes = (
        f"Percent, means over {seeds} seed{spread}; "
        "in brackets the difference to the base (the model before training). "
    )
    if len(qualities.alignment) > 1:
        notes += f"Alignment: mean of {qualities.mean_of}. "
    if chosen:
        notes += (
            "Chosen: how far the exported weights are on the line from the base (0) to the tuned "
            "ones (1), found on the probe; kept: the share of its alignment that they keep there, "
            "in percent. "
        )
    notes += "Front: no other row is better in one quality and as good in the other.\n"
    align = "l" + "r" * (len(heads) - 2) + "c"
    return f"{markdown_table(heads, align, lines)}\n{notes}"
