"""Figures of a sweep, as PNG and SVG; matplotlib is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pymcip.configs import SweepConfig
from pymcip.demo.points import label
from pymcip.errors import MissingDependencyError
from pymcip.files import atomic_path
from pymcip.studies.tables import titles


def require_matplotlib() -> None:
    """Raise MissingDependencyError if there is no matplotlib to draw with."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"the plots of a sweep need matplotlib ({error}); install it with "
            'pip install "pymcip[plots]"'
        ) from error


def draw_front(config: SweepConfig, rows: Sequence[dict[str, Any]], out: Path) -> None:
    """Draw retrieval over alignment, a point per row, and the Pareto front as a step line.

    Points of one method, or else of one swept option, share a colour; the base has its own.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        group = row["settings"].get("method", ", ".join(row["settings"]))
        groups.setdefault(str(group), []).append(row)
    names = titles(config)
    x_title = f"text search: {names['alignment']} (%)"
    with _figure(out, x_title, f"image search: {names['retrieval']} (%)") as axes:
        for group in groups.values():
            x, y, x_error, y_error = (
                [row[quality][name] for row in group]
                for name in ("mean", "gain_deviation")
                for quality in ("alignment", "retrieval")
            )
            errors = {"xerr": x_error, "yerr": y_error} if x_error[0] is not None else {}
            axes.errorbar(x, y, fmt="o", **errors)
            for row, *place in zip(group, x, y, strict=True):
                axes.annotate(row["point"], place, (5, 4), textcoords="offset points", fontsize=8)
        front = [
            (row["alignment"]["mean"], row["retrieval"]["mean"]) for row in rows if row["front"]
        ]
        axes.step(*zip(*sorted(front), strict=True), color="grey", label="Pareto front")


def draw_curves(config: SweepConfig, rows: Sequence[dict[str, Any]], axis: str, out: Path) -> None:
    """Draw differences to the base over an option's values; nothing if they are no numbers."""
    names = titles(config)
    curves: dict[str, list[tuple[float, float, float]]] = {}
    for row in rows:
        value = row["settings"].get(axis)
        value = row.get("threshold") if value == "auto" else value
        if isinstance(value, (int, float)):
            others = {name: one for name, one in row["settings"].items() if name != axis}
            curve = label(others, 0) if config.grid == "product" else ""
            for quality in ("retrieval", "alignment"):
                point = value, row[quality]["gain"], row[quality]["gain_deviation"] or 0.0
                curves.setdefault(f"{names[quality]} {curve}".strip(), []).append(point)
    if all(len(points) < 2 for points in curves.values()):
        return
    with _figure(out, axis.replace("_", " "), "difference to the base, points") as axes:
        for name, points in curves.items():
            values, gains, errors = zip(*sorted(points), strict=True)
            axes.errorbar(values, gains, errors, fmt="o-", capsize=2, label=name)
        tried = [value for points in curves.values() for value, _, _ in points]
        if min(tried) > 0 and max(tried) > 20 * min(tried):
            axes.set_xscale("log")


@contextmanager
def _figure(out: Path, x_title: str, y_title: str) -> Iterator[Any]:
    """Draw on the axes in the block, then write OUT.png and OUT.svg; equal figures, equal bytes."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.add_subplot(xlabel=x_title, ylabel=y_title)
    axes.grid(alpha=0.3)
    yield axes
    axes.legend(title="bars: deviation over seeds of the difference to the base")
    with mpl.rc_context({"svg.hashsalt": "pymcip", "svg.fonttype": "none"}):
        for kind, metadata in (("png", None), ("svg", {"Date": None})):
            with atomic_path(out.with_suffix(f".{kind}")) as temporary:
                figure.savefig(temporary, format=kind, dpi=150, metadata=metadata)
