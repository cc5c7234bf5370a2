"""Figures of a study, as PNG and SVG. Matplotlib is imported late, and its global state left alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pymcip.errors import MissingDependencyError
from pymcip.files import atomic_path

BARS = "bars: deviation over seeds of the difference to the base"
LABEL_SIZE = 8.0  # points
LOGARITHMIC = 20.0  # values that span more than this factor are drawn on a logarithmic axis

Box = tuple[float, float, float, float]  # left, bottom, right, top


@dataclass(frozen=True)
class Mark:
    """A point of the front's figure; points of one `group` share a colour.

    A `chosen` one was picked by a run itself, on its probe: a star.
    """

    label: str
    x: float
    y: float
    x_error: float
    y_error: float
    group: str
    front: bool
    chosen: bool = False


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
    colours = ["black", *(f"C{groups.index(mark.group) % 10}" for mark in marks[1:])]
    for number, (mark, colour) in enumerate(zip(marks, colours, strict=True)):
        axes.errorbar(
            mark.x,
            mark.y,
            xerr=mark.x_error or None,
            yerr=mark.y_error or None,
            color=colour,
            marker="s" if number == 0 else "*" if mark.chosen else "o",
            markersize=12 if mark.chosen else None,
            markerfacecolor=colour if mark.front else "white",
            elinewidth=0.8,
            linestyle="none",
            zorder=3,
        )
    axes.margins(0.12)
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    # What the front's points dominate lies under and left of them: from the frame's left edge, along
    # the second quality of the next point on the right, to its lower edge.
    front = sorted((mark.x, -mark.y) for mark in marks if mark.front)
    axes.step(
        [left, *(x for x, _ in front), front[-1][0]],
        [-front[0][1], *(-y for _, y in front), bottom],
        where="pre",
        color="grey",
        linewidth=1,
        label="Pareto front",
        zorder=2,
    )
    axes.set(xlim=(left, right), ylim=(bottom, top))
    axes.set_xlabel(x_title)
    axes.set_ylabel(y_title)
    _legend(axes, any(mark.x_error or mark.y_error for mark in marks))
    _label(figure, axes, marks, colours)
    _save(figure, out)


def _label(figure: Any, axes: Any, marks: Sequence[Mark], colours: Sequence[str]) -> None:
    """Write each mark's label beside it, where it covers least of other marks, labels, the frame."""
    figure.draw_without_rendering()  # only now is it known where the marks are
    points = 72 / figure.dpi
    places = [axes.transData.transform((mark.x, mark.y)) * points for mark in marks]
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in places]
    left, bottom, right, top = (edge * points for edge in axes.bbox.extents)
    far = 1e4  # labels end at the frame, too
    taken += [(left - far, -far, left, far), (right, -far, right + far, far)]
    taken += [(-far, bottom - far, far, bottom), (-far, top, far, top + far)]
    for mark, colour, (x, y) in zip(marks, colours, places, strict=True):
        width, height = 0.6 * LABEL_SIZE * len(mark.label), 1.1 * LABEL_SIZE
        boxes = [
            (x + over, y + up, x + over + width, y + up + height)
            for up in (4, -4 - height, -height / 2, 4 + height, -4 - 2 * height)
            for over in (5, -5 - width)
        ]
        best = min(boxes, key=lambda box: sum(_overlap(box, other) for other in taken))
        taken.append(best)
        axes.annotate(
            mark.label,
            (mark.x, mark.y),
            xytext=(best[0] - x, best[1] - y + 0.2 * height),
            textcoords="offset points",
            fontsize=LABEL_SIZE,
            color=colour,
            zorder=4,
        )


def _overlap(one: Box, other: Box) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height)


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
