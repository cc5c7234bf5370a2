"""The demo's tables and report: means over seeds, and whether they show the paper's pattern."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pymcip.demo.recipe import BASE
from pymcip.demo.sprites import CREDIT
from pymcip.markdown import markdown_table

SHOWN = "before-and-after"  # folder of the page of base and mcip
METHODS = ("base", "appended", "gpr", "2sft", "mcip", "mcip+rea", "mcip+")
METRICS = {
    "i2i_map": "I2I mAP",
    "knn": "k-NN",
    "zero_shot": "zero-shot",
    "t2i_r5": "T2I R@5",
}
PAPER_NAMES = {
    "base": "base",
    "appended": "+ appended dimensions",
    "gpr": "+ GPR-FT",
    "2sft": "+ GPR-FT + Re-A",
    "mcip": "+ MCIP",
    "mcip+rea": "+ MCIP + Re-A",
    "mcip+": "+ MCIP, alignment kept",
}
Table = dict[str, dict[str, float]]  # by method and metric, percent


def mean_table(tables: Sequence[Table]) -> Table:
    """The mean of several seeds' tables, cell by cell."""
    return {
        method: {
            metric: round(float(np.mean([table[method][metric] for table in tables])), 2)
            for metric in METRICS
        }
        for method in METHODS
    }


def check_pattern(table: Table) -> dict[str, bool]:
    """Which parts of the paper's pattern a table shows; all differences are in points."""

    def gain(method: str, metric: str) -> float:
        return table[method][metric] - table["base"][metric]

    lost = -gain("gpr", "t2i_r5")
    won_back = table["2sft"]["t2i_r5"] - table["gpr"]["t2i_r5"]
    text_search = ("zero_shot", "t2i_r5")
    return {
        "appended: at least 98 % of gpr's I2I gain": (
            gain("appended", "i2i_map") >= 0.98 * gain("gpr", "i2i_map")
        ),
        "appended: zero-shot and T2I R@5 as the base's": not any(
            gain("appended", metric) for metric in text_search
        ),
        "gpr: I2I mAP at least 8 points over the base": gain("gpr", "i2i_map") >= 8,
        "gpr: T2I R@5 at least 3 points under the base": lost >= 3,
        "mcip: at least 80 % of gpr's I2I gain": (
            gain("mcip", "i2i_map") >= 0.8 * gain("gpr", "i2i_map")
        ),
        "mcip: T2I R@5 at most 0.5 points under the base": gain("mcip", "t2i_r5") >= -0.5,
        "mcip: zero-shot at most 0.5 points under the base": gain("mcip", "zero_shot") >= -0.5,
        "2sft: at least half of gpr's T2I loss is won back": won_back >= 0.5 * lost,
        "mcip+: at least 95 % of gpr's I2I gain": (
            gain("mcip+", "i2i_map") >= 0.95 * gain("gpr", "i2i_map")
        ),
        "mcip+: T2I R@5 not under the base": gain("mcip+", "t2i_r5") >= 0,
        "mcip+: zero-shot not under the base": gain("mcip+", "zero_shot") >= 0,
    }


def format_table(table: Table) -> str:
    """The counterpart of the paper's table in markdown: values, and differences to the base."""

    def cell(method: str, metric: str) -> str:
        value = table[method][metric]
        change = "" if method == "base" else f" ({value - table['base'][metric]:+.1f})"
        return f"{value:.1f}{change}"

    return markdown_table(
        ["model", *METRICS.values()],
        "l" + "r" * len(METRICS),
        [
            [f"{PAPER_NAMES[method]} (`{method}`)", *(cell(method, metric) for metric in row)]
            for method, row in table.items()
        ],
    )


def page_commands(folder: Path) -> str:
    """The commands that open a page on a seed's test scenes: before, and after with appended dimensions."""
    images = shlex.quote(str(folder / "world" / "test-*.tar"))
    models = {"before": BASE, "after": str(folder / "runs" / "appended")}
    before, after = (shlex.quote(str(folder / f"{name}.index")) for name in models)
    lines = [
        f"pymcip index {images} --model {shlex.quote(model)} --out {out}\n"
        for model, out in zip(models.values(), (before, after), strict=True)
    ]
    return "".join(lines) + f"pymcip serve {after} --baseline {before}\n"


def format_report(document: dict[str, Any], markdown: str, commands: str) -> str:
    """report.md: the table, the pattern, and what was run, from the values of report.json."""
    world = document["recipe"]["world"]
    count = len(document["seeds"])
    pattern = "".join(
        f"- {'yes' if holds else '**no**'}: {text}\n" for text, holds in document["pattern"].items()
    )
    base = document["base_model"]
    kept = document["alignment"]
    coefficients = ", ".join(
        f"{one['coefficient']:.2f}" if one["respected"] else "none, the base stays" for one in kept
    )
    return f"""# pymcip demo

Mean over {count} seed{"s" if count > 1 else ""}, in percent, with the difference to the base.

{markdown}
I2I mAP: full ranking of the test scenes, a scene is right if its main emoji is exactly the query's.
k-NN: k = 21, weighted vote of the other scenes. Zero-shot: the scene's emoji among the names of
the {world["test_classes"]} test classes. T2I R@5: a scene's caption finds it among the first five.

## The pattern: the paper's, and what `appended` and `mcip+` promise

{pattern}
## What was run

- Training: {world["train_classes"]} emoji x {world["train_images"]} scenes, labelled with the exact
  emoji; {world["captions"]:,} captions of other scenes, aligned with no image.
- Test: {world["test_classes"]} other emoji x {world["test_images"]} scenes, each with a caption.
- `mcip+`: exports the weights farthest from the base, on the line to the tuned ones, that give at
  least {100 * (1 - kept[0]["budget"]):g} % of the base's right answers on a probe: {kept[0]["probe"]["images"]:,} other scenes
  of emoji that are in no training scene and no test class; an image chooses among their names, a
  name among images. How far on the line, seed by seed: {coefficients}.
- Base model: a CLIP trained by `{base["command"]}` on {base["pairs"]:,} drawn pairs, none of them
  of the training or test scenes. It has met the test emoji under their names in other scenes, as a
  CLIP trained on the web has met most things; fine-tuning meets none of them.
- {document["seconds"]:.0f} seconds in all. Every setting is in `report.json`.

## See it

These commands index the first seed's test scenes and open a page to search them, before and after fine-tuning:

```
{commands}```

[Random test scenes with their nearest others, before and after `mcip`]({SHOWN}/report.html), for a browser.

{CREDIT}
"""
