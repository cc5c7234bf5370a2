"""Tables of the study of storage: one embedding against two."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import Any

from pymcip.markdown import markdown_table
from studies.storage_search import AT_ONCE, ONE, TEXTS, TWO


def tables(found: Mapping[str, Any], options: argparse.Namespace) -> str:
    """Markdown: what each system stores and builds, and how it answers."""
    appended = f", {options.appended} more appended in the one" if options.appended else ""
    stored = [
        _stored(name, label, figures["storage"][system], options.vectors)
        for name, figures in found.items()
        for system, label in ((TWO, "two"), (ONE, "one"))
    ]
    heads = ["index", "query", "two", "one", "one / two", "two, batch", "one, batch", "one / two"]
    heads += ["recall two", "recall one"]
    answered = [row for name, figures in found.items() for row in _rows(name, figures, options)]
    knobs = [
        f"\n{name}, {figures['knob']}: "
        + ", ".join(f"{query} {value}" for query, value in figures["values"].items())
        + ".\n"
        for name, figures in found.items()
        if figures["knob"]
    ]
    return (
        f"{options.vectors:,} images, D = {options.dimensions}{appended}, fp32; "
        f"{options.threads} threads.\n\n"
        + markdown_table(["index", "embeddings", "bytes", "per image", "build"], "llrrr", stored)
        + "\n"
        "Milliseconds per query: p50 (p20 to p80) of searches for one query, and of batches of "
        f"{options.batch}; recall@{options.k} in percent.\n\n"
        + markdown_table(heads, "llrrrrrrrr", answered)
        + "".join(knobs)
    )


def _stored(name: str, label: str, own: Mapping[str, Any], vectors: int) -> list[str]:
    per_image, seconds = own["bytes"] / vectors, own["build_seconds"]
    return [name, label, _size(own["bytes"]), f"{per_image:.0f}", f"{seconds:.1f} s"]


def _rows(
    name: str, figures: Mapping[str, Any], options: argparse.Namespace
) -> Iterator[list[str]]:
    """Lines of the table of queries; rivals that take no batches leave their cells empty."""
    for query, batches in figures["queries"].items():
        shown = {(TWO, ONE): query}
        if TEXTS in batches["batch 1"]:
            knob = f"{figures['knob']} {figures['values']['text']}"
            shown[TWO, TEXTS] = f"{query}, {knob} for one"
        if AT_ONCE in batches["batch 1"]:
            shown[AT_ONCE, ONE] = f"{query}, two indexes at once"
        for (two, one), title in shown.items():
            cells = [name, title]
            for size in (1, options.batch):
                part = batches[f"batch {size}"]
                if two not in part:
                    cells += ["", "", ""]
                    continue
                first, second = part[two]["seconds"], part[one]["seconds"]
                cells += [_milliseconds(first, size), _milliseconds(second, size)]
                cells.append(f"{second['p50'] / first['p50']:.2f}")
            for system in (two, one):
                cells.append(f"{100 * batches['batch 1'][system]['recall']:.1f}")
            yield cells


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _milliseconds(seconds: Mapping[str, float], size: int) -> str:
    low, middle, high = (f"{1e3 * seconds[at] / size:.3g}" for at in ("p20", "p50", "p80"))
    return f"{middle} ({low} to {high})"
