"""`pymcip runs`: the runs below a folder in one table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from pymcip.configs import RunsConfig
from pymcip.errors import DataError
from pymcip.evaluation import metric_title
from pymcip.files import read_json
from pymcip.markdown import markdown_table
from pymcip.training.result import INPUTS, REQUIRED, RESULT, RESUMABLE

FIGURES = ("i2i_map", "knn", "zero_shot", "t2i_r5")  # of the table, where they were measured
_AGAIN = "Remove the run's folder, or train it again with overwrite=True"


@dataclass(frozen=True)
class RunsResult:
    """The runs below a folder, by their paths below it.

    Attributes:
        runs: of each run its `settings` that differ between the runs, `before`, `metrics` and
            `seconds`; of one that is not finished the settings alone.
        markdown: the same as a table; all figures are in each run's result.json.
    """

    runs: dict[str, dict[str, Any]]
    markdown: str


def compare_runs(config: RunsConfig | None = None, /, **options: Any) -> RunsResult:
    """Compare the runs below `folder`, however deep: settings that differ, figures, time.

    Raises:
        DataError: there is no run.
        DamagedFileError: a file of a run can't be read.
    """
    config = RunsConfig.make(config, options)
    folder = Path(config.folder)
    paths = sorted(path.parent for path in folder.rglob(INPUTS))
    if not paths:
        raise DataError(
            f"there is no run below {folder}: none of its folders holds {INPUTS}, which pymcip train "
            "writes. Give the folder in which the run folders lie"
        )
    settings = [read_json(path / "config.json", {}, _AGAIN) for path in paths]
    names = dict.fromkeys(name for one in settings for name in one if name not in RESUMABLE)
    differing = [name for name in names if len({str(one.get(name)) for one in settings}) > 1]
    runs: dict[str, dict[str, Any]] = {}
    for path, own in zip(paths, settings, strict=True):
        run: dict[str, Any] = {"settings": {name: own.get(name) for name in ("method", *differing)}}
        if (path / RESULT).is_file():
            found: dict[str, Any] = read_json(path / RESULT, REQUIRED, _AGAIN)
            run |= {name: found[name] for name in ("before", "metrics", "seconds")}
        runs[str(path.relative_to(folder))] = run
    return RunsResult(runs, _table(runs))


def _table(runs: Mapping[str, Mapping[str, Any]]) -> str:
    figures = [
        name for name in FIGURES if any(name in run.get("metrics", {}) for run in runs.values())
    ]
    heads = ["run", "method", "settings that differ", *map(metric_title, figures), "time"]
    rows = []
    for name, run in runs.items():
        own = dict(run["settings"])
        method = own.pop("method")
        took = str(timedelta(seconds=round(run["seconds"]))) if "seconds" in run else "not finished"
        rows.append(
            [
                name, str(method), " ".join(f"{key}={value}" for key, value in own.items()),
                *(_change(run, figure) for figure in figures), took,
            ]
        )  # fmt: skip
    return markdown_table(heads, "lll" + "r" * (len(figures) + 1), rows)


def _change(run: Mapping[str, Any], figure: str) -> str:
    """The figure of a run in percent before and after it, if it was measured."""
    if figure not in run.get("metrics", {}):
        return ""
    before = run["before"].get(figure)
    after = f"{run['metrics'][figure]:.1f}"
    return after if before is None else f"{before:.1f} -> {after}"
