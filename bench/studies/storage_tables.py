"""Tables and a picture of the study of storage: one embedding against two."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pymcip.errors import MissingDependencyError
from pymcip.files import atomic_path
from studies.storage_search import AT_ONCE, ONE, TEXTS, TWO


def tables(found: Mapping[str, Any], options: argparse.Namespace) -> str:
    """Markdown: what each system stores and builds, and how it answers."""
    lines = [
        f"{options.vectors:,} images, D = {options.dimensions}"
        + (f", {options.appended} more appended in the one" if options.appended else "")
        + f", fp32; {options.threads} threads.",
        "",
        "| index | embeddings | bytes | per image | in memory | build |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for name, figures in found.items():
        for system, label in ((TWO, "two"), (ONE, "one")):
            own = figures["storage"][system]
            memory = "" if own["memory_bytes"] is None else _size(own["memory_bytes"])
            lines.append(
                f"| {name} | {label} | {_size(own['bytes'])} | "
                f"{own['bytes'] / options.vectors:.0f} | {memory} | {own['build_seconds']:.1f} s |"
            )
    lines += [
        "",
        f"Milliseconds per query: p50 (p20 to p80) of searches for one query, and of batches of "
        f"{options.batch}; recall@{options.k} in percent.",
        "",
        "| index | query | two | one | one / two | two, batch | one, batch | one / two | recall two | "
        "recall one |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, figures in found.items():
        for query, batches in figures["queries"].items():
            lines.append(_row(name, query, batches, TWO, ONE, options))
            if TEXTS in batches["batch 1"]:
                shown = f"{query}, {figures['knob']} {figures['values']['text']} for one"
                lines.append(_row(name, shown, batches, TWO, TEXTS, options))
            if AT_ONCE in batches["batch 1"]:
                shown = f"{query}, two indexes at once"
                lines.append(_row(name, shown, batches, AT_ONCE, ONE, options))
    for name, figures in found.items():
        if figures["knob"]:
            values = ", ".join(f"{query} {value}" for query, value in figures["values"].items())
            lines += ["", f"{name}, {figures['knob']}: {values}."]
    return "\n".join(lines) + "\n"


def _row(
    name: str,
    shown: str,
    batches: Mapping[str, Any],
    two: str,
    one: str,
    options: argparse.Namespace,
) -> str:
    """A line of the table of queries; rivals that take no batches leave their cells empty."""
    cells = [name, shown]
    for size in (1, options.batch):
        part = batches[f"batch {size}"]
        if two in part:
            first, second = part[two]["seconds"], part[one]["seconds"]
            cells += [_milliseconds(first, size), _milliseconds(second, size)]
            cells.append(f"{second['p50'] / first['p50']:.2f}")
        else:
            cells += ["", "", ""]
    cells += [f"{100 * batches['batch 1'][system]['recall']:.1f}" for system in (two, one)]
    return f"| {' | '.join(cells)} |"


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _milliseconds(seconds: Mapping[str, float], size: int) -> str:
    low, middle, high = (f"{1e3 * seconds[at] / size:.3g}" for at in ("p20", "p50", "p80"))
    return f"{middle} ({low} to {high})"


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def import_figure() -> Any:
    """Matplotlib's Figure; raises MissingDependencyError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            f"--plot: matplotlib can't be imported ({error}); run: pip install matplotlib, or leave "
            "--plot out"
        ) from error
    return Figure


def plot(found: Mapping[str, Any], path: Path, options: argparse.Namespace) -> None:
    """Bars of both systems for each index: bytes, build, a combined query. A PNG.

    Of a combined query, one embedding's search has the knob that text queries need.
    """

    def milliseconds(own: Mapping[str, Any], system: str) -> float:
        timed = own["queries"]["combined"]["batch 1"]
        return 1e3 * timed[TEXTS if system == ONE and TEXTS in timed else system]["seconds"]["p50"]

    figure = import_figure()(figsize=(9, 2.8), layout="constrained")
    panels = {
        "index, bytes per image": lambda own, system: (
            own["storage"][system]["bytes"] / options.vectors
        ),
        "build, seconds": lambda own, system: own["storage"][system]["build_seconds"],
        "combined query, p50 ms": milliseconds,
    }
    places = np.arange(len(found))
    for axes, (title, value) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for shift, system in ((-0.2, TWO), (0.2, ONE)):
            heights = [value(own, system) for own in found.values()]
            bars = axes.bar(places + shift, heights, 0.4, label=system)
            axes.bar_label(bars, [_rounded(height) for height in heights], fontsize=7)
        axes.set_yscale("log")
        axes.margins(y=0.15)
        axes.set_xticks(places, list(found))
        axes.set_title(title, fontsize=9)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
