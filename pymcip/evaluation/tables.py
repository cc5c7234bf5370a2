"""Results as markdown tables: models side by side, on the user's data or on benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pymcip.benchmarks import paper
from pymcip.benchmarks.suite import Found
from pymcip.markdown import markdown_table

BENCHMARKS_OF_THE_MEAN = len(paper.BENCHMARKS)
_TITLES = {
    "i2i_map": "image-to-image mAP",
    "i2i_r1": "image-to-image R@1",
    "knn": "k-NN",
    "zero_shot": "zero-shot top-1",
    "zero_shot_top5": "zero-shot top-5",
    "t2i_map": "text-to-image mAP (class descriptions)",
}
_MEANINGS = {
    "i2i_map": "Every image ranks all images by how like it they are. 100: those of its own class come "
    "first, for every image.",
    "i2i_r1": "How often the image most like another one is of the same class.",
    "knn": "How often the images most like another one tell its class, by their vote.",
    "zero_shot": "How often the class name nearest to an image is its own. It measures whether images and "
    "texts still fit together.",
    "zero_shot_top5": "How often an image's own class name is among the five nearest.",
    "t2i_map": "The description of each class ranks all images. 100: those of the class come first.",
}


def metric_title(key: str) -> str:
    """Name a metric of `evaluate_model` in words."""
    if key in _TITLES:
        return _TITLES[key]
    way, rank = key.split("_r")
    return f"{'text-to-image' if way == 't2i' else 'image-to-text'} R@{rank}"


def metric_in_words(key: str) -> tuple[str, str]:
    """Name a metric of `evaluate_model`, and say in plain words what it measures."""
    if key in _MEANINGS:
        return metric_title(key), _MEANINGS[key]
    way, rank = key.split("_r")
    asked, own = (
        ("a caption", "its own image") if way == "t2i" else ("an image", "a caption of its own")
    )
    place = "first" if rank == "1" else f"among the first {rank}"
    return metric_title(key), f"How often {asked} finds {own} {place}."


def in_words(figures: Mapping[str, float], before: Mapping[str, float] | None = None) -> str:
    """Write figures in percent on one line, by their names in words.

    `before`: the same of another model, for "before -> now"; figures that it lacks are left out.
    """
    if before is None:
        return ", ".join(f"{metric_title(key)} {value:.1f}" for key, value in figures.items())
    return ", ".join(
        f"{metric_title(key)} {before[key]:.1f} -> {value:.1f}"
        for key, value in figures.items()
        if key in before
    )


def comparison_table(
    headings: Sequence[str], results: Sequence[Mapping[str, float]], notes: str = ""
) -> str:
    """Format results as a markdown table, one column each; of two also the difference."""
    heads = ["metric (%)", *headings] + (["difference"] if len(results) == 2 else [])
    rows = [
        [metric_title(key), *_cells([result[key] for result in results])] for key in results[-1]
    ]
    table = markdown_table(heads, "l" + "r" * (len(heads) - 1), rows)
    return table + (f"\n{notes}\n" if notes else "")


def suite_table(
    headings: Sequence[str],
    results: Sequence[Mapping[str, float]],
    found: Sequence[Found],
    missing: Mapping[str, str],
    reported: Mapping[str, Mapping[str, float]] | None = None,
) -> str:
    """Format the figures of one or two models as markdown: a row per benchmark, then the means.

    Means are over the benchmarks of the paper's table that every model has; a mean over fewer than
    the fourteen says so, and is not to be compared with the paper's. `reported` has columns of figures
    that others publish, by their headings; a column without one of them has no mean.
    """
    columns = [*results, *(reported or {}).values()]
    heads = ["benchmark", "", *headings]
    heads += ["difference"] if len(results) == 2 else []
    heads += list(reported or {})
    rows: list[list[str]] = []

    def add(name: str, metric: str, values: Sequence[float | None]) -> None:
        own, theirs = values[: len(results)], values[len(results) :]
        rows.append([name, metric, *_cells(own), *(_number(value, ".1f") for value in theirs)])

    remarks = []
    complete = []
    for item in found:
        benchmark = item.benchmark
        values = [column.get(benchmark.name) for column in columns]
        if all(value is None for value in values[: len(results)]):
            continue
        mark = ""
        if item.notes:
            remarks.append(f"\\* {benchmark.name}: {'; '.join(item.notes)}\n")
            mark = " \\*"
        if benchmark.name in paper.BENCHMARKS and None not in values[: len(results)]:
            complete.append(benchmark.name)
        add(benchmark.name + mark, f"{benchmark.group} {benchmark.metric}", values)
    if complete:
        means = [
            float(np.mean([column[name] for name in complete]))
            if all(name in column for name in complete)
            else None
            for column in columns
        ]
        whole = len(complete) == BENCHMARKS_OF_THE_MEAN
        title = "mean" if whole else f"mean of these {len(complete)} of {BENCHMARKS_OF_THE_MEAN}"
        add(title, "", means)
    text = markdown_table(heads, "ll" + "r" * (len(heads) - 2), rows)
    text += "".join(["\n", *remarks]) if remarks else ""
    return text + (f"\nNot measured: {', '.join(missing)}.\n" if missing else "")


def model_headings(models: Sequence[tuple[str, str | None]]) -> list[str]:
    """Name models, each given as (name, pretrained tag), as the tables' columns do."""
    return [name if tag is None else f"{name} ({tag})" for name, tag in models]


def reported_columns(models: Sequence[tuple[str, str | None]]) -> dict[str, dict[str, float]]:
    """Find the figures of these models that others publish, under headings for `suite_table`."""
    found = {
        f"{who}: {heading}": figures(*model)
        for heading, model in zip(model_headings(models), models, strict=True)
        for who, figures in (
            ("paper", paper.reported),
            ("open_clip", paper.published_by_open_clip),
        )
    }
    return {heading: figures for heading, figures in found.items() if figures}


def _cells(values: Sequence[float | None]) -> list[str]:
    """Format the values of the models; of two also their difference."""
    cells = [_number(value, ".2f") for value in values]
    if len(values) == 2:
        before, after = values
        change = None if before is None or after is None else after - before
        cells.append(_number(change, "+.2f"))
    return cells


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"
