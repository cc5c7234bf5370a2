"""Pages of HTML that hold all that they show: style, pictures and curves; from `templates/`.

Every text is escaped by Jinja2, but for what is `Markup` already.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

Points = Sequence[tuple[float, float]]
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 460, 180, 46, 20, 8  # of a chart, in its own units
MOST_POINTS = 300  # of a curve; of more the means of neighbours are drawn

_environment = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def filled(template: str, **values: Any) -> str:
    """Fill in a template, a file of `templates/`; bytes of file names that are not UTF-8 are escaped."""
    text = _environment.get_template(template).render(values)
    return text.encode("utf-8", "backslashreplace").decode()


def data_uri(jpeg: bytes) -> str:
    """An address that holds a JPEG itself."""
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"


def chart(curves: Mapping[str, Points]) -> Markup:
    """Draw curves over steps as SVG, with the values at both ends of each axis.

    Args:
        curves: by name, each of points (x, y) with rising x, all finite, one point or more.
    """
    points = [point for curve in curves.values() for point in curve]
    xs, ys = zip(*points, strict=True)
    first, last, low, high = min(xs), max(xs), min(ys), max(ys)
    across, up = (last - first) or 1.0, (high - low) or 1.0

    def place(x: float, y: float) -> str:
        right = LEFT + (WIDTH - LEFT - 8) * (x - first) / across
        return f"{right:.1f},{TOP + (HEIGHT - TOP - BOTTOM) * (high - y) / up:.1f}"

    drawn = [
        {"name": name, "points": [place(*point) for point in _thinned(curve)]}
        for name, curve in curves.items()
    ]
    return Markup(
        filled(
            "chart.svg", curves=drawn, first=f"{first:g}", last=f"{last:g}", low=f"{low:.3g}",
            high=f"{high:.3g}", width=WIDTH, height=HEIGHT, left=LEFT, bottom=BOTTOM, top=TOP,
        )
    )  # fmt: skip


def _thinned(curve: Points) -> Points:
    size = -(-len(curve) // MOST_POINTS)
    groups = [curve[start : start + size] for start in range(0, len(curve), size)]
    return [
        (sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group))
        for group in groups
    ]
