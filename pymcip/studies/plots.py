"""Figures of a sweep, as PNG and SVG; matplotlib is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pymcip.errors import MissingDependencyError
from pymcip.files import atomic_path
from pymcip.studies.points import label

LOGARITHMIC = 20.0  # values that span more than this factor are drawn on a logarithmic axis


def require_matplotlib() -> None:
    """Raise MissingDependencyError if there is no matplotlib to draw with."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"the plots of a sweep need matplotlib ({error}); install it with "
            'pip install "pymcip[plots]"'
        ) from error


def draw_front(rows: Sequence[dict[str, Any]], titles: Mapping[str, str], out: Path) -> None:
    """Draw retrieval over alignment, with errors, labels and the Pareto front as a step line.

    rows[0] is the base: a square. Stars are runs that chose their weights on a probe themselves.
    Points of one method, or else those that set the same options, share a colour.
    """
    figure, axes = _figure(titles["alignment"], titles["retrieval"])
    groups = [str(row["settings"].get("method", ", ".join(row["settings"]))) for row in rows]
    order = list(dict.fromkeys(groups[1:]))
    for number, (row, group) in enumerate(zip(rows, groups, strict=True)):
        colour = f"C{order.index(group) % 10}" if number else "black"
        marker = "s" if number == 0 else "*" if "coefficient" in row else "o"
        place, errors = (
            [row[quality][name] for quality in ("alignment", "retrieval")]
            for name in ("mean", "gain_deviation")
        )
        axes.errorbar(
            *place, *reversed(errors), fmt=marker, color=colour, elinewidth=0.8, zorder=3,
            markersize=12 if marker == "*" else None,
            markerfacecolor=colour if row["front"] else "white",
        )  # fmt: skip
        axes.annotate(
            row["point"], place, (5, 4), textcoords="offset points", fontsize=8, color=colour
        )
    axes.margins(0.12)
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    # What the front's points dominate lies under and left of them: the steps go from the frame's
    # left edge, along the second quality of the next point on the right, to its lower edge.
    front = [(row["alignment"]["mean"], row["retrieval"]["mean"]) for row in rows if row["front"]]
    across, up = zip(*sorted(front, key=lambda point: (point[0], -point[1])), strict=True)
    path = [left, *across, across[-1]], [up[0], *up, bottom]
    axes.step(*path, where="pre", color="grey", linewidth=1, label="Pareto front")
    axes.set(xlim=(left, right), ylim=(bottom, top))
    _save(figure, rows, out)


def draw_curves(
    rows: Sequence[dict[str, Any]], axis: str, titles: Mapping[str, str], out: Path
) -> None:
    """Draw differences to the base over an option's values; nothing if they are no numbers."""
    curves: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    for row in rows:
        value = row["settings"].get(axis)
        value = row.get("threshold") if value == "auto" else value
        if isinstance(value, (int, float)):
            others = label({name: one for name, one in row["settings"].items() if name != axis}, 0)
            for quality in titles:
                point = value, row[quality]["gain"], row[quality]["gain_deviation"] or 0.0
                curves.setdefault((others, quality), []).append(point)
    if all(len(points) < 2 for points in curves.values()):
        return
    figure, axes = _figure(axis.replace("_", " "), "difference to the base, points")
    groups = list(dict.fromkeys(others for others, _ in curves))
    for number, ((others, quality), points) in enumerate(curves.items()):
        values, gains, errors = zip(*sorted(points), strict=True)
        colour = f"C{(groups.index(others) if len(groups) > 1 else number) % 10}"
        style = "o--" if quality == "alignment" else "o-"
        name = f"{titles[quality].split(' (%)')[0]} {others}".strip()
        look = {"color": colour, "fmt": style, "markersize": 4, "capsize": 2, "label": name}
        axes.errorbar(values, gains, errors, **look)
    axes.axhline(0.0, color="black", linewidth=0.8)
    tried = [value for points in curves.values() for value, _, _ in points]
    if min(tried) > 0 and max(tried) / min(tried) > LOGARITHMIC:
        axes.set_xscale("log")
    _save(figure, rows, out)


def _figure(x_title: str, y_title: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.add_subplot(xlabel=x_title, ylabel=y_title)
    axes.grid(alpha=0.3, linewidth=0.5)
    return figure, axes


def _save(figure: Any, rows: Sequence[dict[str, Any]], out: Path) -> None:
    """Write OUT.png and OUT.svg with a legend; the same figure gives the same bytes."""
    import matplotlib as mpl

    several = any(
        row[quality]["deviation"] for row in rows for quality in ("retrieval", "alignment")
    )
    title = "bars: deviation over seeds of the difference to the base" if several else None
    figure.axes[0].legend(fontsize=8, loc="best", title=title, title_fontsize=7)
    with mpl.rc_context({"svg.hashsalt": "pymcip", "svg.fonttype": "none"}):
        for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            with atomic_path(out.with_suffix(f".{kind}")) as temporary:
                figure.savefig(temporary, format=kind, dpi=150, metadata=metadata)
