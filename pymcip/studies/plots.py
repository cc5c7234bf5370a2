"""Figures of a study, as PNG and SVG. Matplotlib is imported late, and its global state left alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pymcip.errors import MissingDependencyError
from pymcip.files import atomic_path

BARS = "bars: deviation over seeds of the difference to the base"
LOGARITHMIC = 20.0  # values that span more than this factor are drawn on a logarithmic axis


@dataclass(frozen=True)
class Mark:
    """A point of the front's figure; points of one `group` share a colour."""

    label: str
    x: float
    y: float
    x_error: float
    y_error: float
    group: str
    front: bool


@dataclass(frozen=True)
class Curve:
    """A curve over a swept number: `points` are (value, difference to the base, deviation)."""

    label: str
    points: list[tuple[float, float, float]]
    dashed: bool
    group: str


def require_matplotlib() -> None:
    """Raise MissingDependencyError if there is no matplotlib to draw with."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"the plots of a sweep need matplotlib ({error}); install it with "
            'pip install "pymcip[plots]"'
        ) from error


def draw_front(marks: Sequence[Mark], x_title: str, y_title: str, out: Path) -> None:
    """Draw all points with their errors and the Pareto front as a step line; marks[0] is the base."""
    figure, axes = _figure()
    groups = list(dict.fromkeys(mark.group for mark in marks[1:]))
    for number, mark in enumerate(marks):
        colour = "black" if number == 0 else f"C{groups.index(mark.group) % 10}"
        axes.errorbar(
            mark.x,
            mark.y,
            xerr=mark.x_error or None,
            yerr=mark.y_error or None,
            color=colour,
            marker="s" if number == 0 else "o",
            markerfacecolor=colour if mark.front else "white",
            elinewidth=0.8,
            linestyle="none",
            zorder=3,
        )
        axes.annotate(
            mark.label,
            (mark.x, mark.y),
            xytext=(5, 5 if number % 2 else -12),
            textcoords="offset points",
            fontsize=8,
            color=colour,
            zorder=4,
        )
    # Between two points of the front the second quality is that of the right one, up to the left one.
    front = sorted((mark.x, -mark.y) for mark in marks if mark.front)
    axes.step(
        [x for x, _ in front],
        [-y for _, y in front],
        where="pre",
        color="grey",
        linewidth=1,
        label="Pareto front",
        zorder=2,
    )
    axes.margins(0.12)
    axes.set_xlabel(x_title)
    axes.set_ylabel(y_title)
    _legend(axes, any(mark.x_error or mark.y_error for mark in marks))
    _save(figure, out)


def draw_curves(curves: Sequence[Curve], x_title: str, out: Path) -> None:
    """Draw the differences to the base over the values of one option."""
    figure, axes = _figure()
    groups = list(dict.fromkeys(curve.group for curve in curves))
    for number, curve in enumerate(curves):
        several = len(groups) > 1
        axes.errorbar(
            [value for value, _, _ in curve.points],
            [gain for _, gain, _ in curve.points],
            yerr=[error for _, _, error in curve.points],
            color=f"C{(groups.index(curve.group) if several else number) % 10}",
            linestyle="--" if curve.dashed else "-",
            marker="o",
            markersize=4,
            capsize=2,
            label=curve.label,
        )
    axes.axhline(0.0, color="black", linewidth=0.8)
    values = [value for curve in curves for value, _, _ in curve.points]
    if min(values) > 0 and max(values) / min(values) > LOGARITHMIC:
        axes.set_xscale("log")
    axes.set_xlabel(x_title)
    axes.set_ylabel("difference to the base, points")
    _legend(axes, any(error for curve in curves for _, _, error in curve.points))
    _save(figure, out)


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.3, linewidth=0.5)
    return figure, axes


def _legend(axes: Any, has_errors: bool) -> None:
    title = BARS if has_errors else None
    axes.legend(fontsize=8, loc="best", title=title, title_fontsize=7)


def _save(figure: Any, out: Path) -> None:
    """Write OUT.png and OUT.svg; the same figure gives the same bytes."""
    import matplotlib as mpl

    with mpl.rc_context({"svg.hashsalt": "pymcip", "svg.fonttype": "none"}):
        for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            with atomic_path(out.with_suffix(f".{kind}")) as temporary:
                figure.savefig(temporary, format=kind, dpi=150, metadata=metadata)
