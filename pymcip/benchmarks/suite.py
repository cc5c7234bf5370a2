"""A suite of benchmarks: find the data, check all of it, then embed each image once and measure."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pymcip.benchmarks import paper
from pymcip.benchmarks.contract import (
    AbsentError,
    Benchmark,
    Data,
    DataSet,
    Labelled,
    QuerySet,
    SuiteOptions,
)
from pymcip.data import Captions, ImageData
from pymcip.data.sources import some
from pymcip.embedding import EmbeddingCache
from pymcip.errors import DataError
from pymcip.metrics import prompt_ensemble

BENCHMARKS_OF_THE_MEAN = len(paper.BENCHMARKS)

_log = logging.getLogger("pymcip.benchmarks")


@dataclass(frozen=True)
class Found:
    """A benchmark whose data are there and complete."""

    benchmark: Benchmark
    data: Data
    database: Labelled | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        return self.data.notes + (() if self.database is None else self.database.notes)

    @property
    def images(self) -> int:
        """Number of images that are evaluated: queries of their own and a database included."""
        queries = len(self.data.queries) if isinstance(self.data, QuerySet) else 0
        return len(self.data.images) + queries + (len(self.database.images) if self.database else 0)


@dataclass(frozen=True)
class SuiteScores:
    """What one model reached.

    `scores[benchmark]` holds percentages, the benchmark's own figure first; `failed[benchmark]` says
    why one could not be measured though its data were there.
    """

    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def figures(self) -> dict[str, float]:
        return {name: next(iter(values.values())) for name, values in self.scores.items()}


def find_suite(
    benchmarks: Iterable[Benchmark],
    root: Path | None,
    paths: Mapping[str, str],
    options: SuiteOptions,
) -> tuple[list[Found], dict[str, str]]:
    """Read the layouts of all benchmarks; nothing is embedded.

    Returns:
        Those that can be measured, and why the others can't, by name: where to get their data.

    Raises:
        DataError: data are there but not what they must be; all such problems in one message.
        MissingDependencyError: reading a layout takes a package that is not installed.
    """
    read: dict[str, Data | DataError] = {}

    def get(data_set: DataSet) -> Data:
        if data_set.name not in read:
            try:
                read[data_set.name] = data_set.load(root, paths, options)
            except DataError as error:
                read[data_set.name] = error
        known = read[data_set.name]
        if isinstance(known, DataError):
            raise known
        return known

    found: list[Found] = []
    missing: dict[str, str] = {}
    broken: dict[str, None] = {}  # an ordered set: one data set may serve several benchmarks
    for benchmark in benchmarks:
        votes = benchmark.database if options.knn_database == "train" else None
        try:
            data = get(benchmark.data)
            database = None if votes is None else get(votes)
            assert database is None or isinstance(database, Labelled)
            found.append(Found(benchmark, data, database))
        except AbsentError as error:
            missing[benchmark.name] = str(error)
            if votes is not None and not isinstance(read[benchmark.data.name], DataError):
                missing[benchmark.name] += (
                    "\nor let the other images of the evaluated set vote: knn_database='self'"
                )
        except DataError as error:
            broken[str(error)] = None
    if broken:
        raise DataError(
            f"{len(broken)} of the benchmarks' data sets can't be used:\n"
            + "\n".join(f"  - {message}" for message in broken)
            + "\nMend them, or choose the others with benchmarks="
        )
    return found, missing


class CachedEmbedder:
    """Unit vectors from an embedding cache: what is in it already is not embedded again.

    Vectors went through float16, as all embedding folders hold it, whether just made or read.
    """

    def __init__(self, cache: EmbeddingCache) -> None:
        self.cache = cache
        self._classifiers: dict[tuple[tuple[str, ...], tuple[str, ...]], Tensor] = {}

    def images(self, data: ImageData) -> Tensor:
        """Return float32 [N, D] on the model's device.

        Raises:
            DataError: an image can't be decoded; all of them are embedded nevertheless.
        """
        folder = self.cache.images(data)
        skipped = folder.skipped
        if skipped:
            raise DataError(
                f"{len(skipped)} of {len(data)} images can't be decoded: "
                f"{some((item['reason'] for item in skipped[:6]), len(skipped))}. Replace these files; "
                "a benchmark without them is another one"
            )
        return self._tensor(folder.vectors("img"))

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Return float32 [M, D] on the model's device; equal texts are encoded once."""
        distinct = list(dict.fromkeys(texts))
        vectors = self._tensor(self.cache.captions(Captions(distinct)).vectors("text"))
        row = {text: number for number, text in enumerate(distinct)}
        return vectors[[row[text] for text in texts]]

    def classifier(self, names: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Return float32 [C, D]: encode every template, normalise, mean, normalise."""
        key = tuple(names), tuple(templates)
        if key not in self._classifiers:
            prompts = [template.replace("{}", name) for name in names for template in templates]
            self._classifiers[key] = prompt_ensemble(self.texts(prompts), len(templates))
        return self._classifiers[key]

    def _tensor(self, vectors: np.ndarray) -> Tensor:
        return torch.from_numpy(np.array(vectors, np.float32)).to(self.cache.clip.device)


def measure_suite(
    found: Sequence[Found], cache: EmbeddingCache, options: SuiteOptions
) -> SuiteScores:
    """Measure one model; a benchmark whose images can't all be decoded fails alone."""
    embed = CachedEmbedder(cache)
    result = SuiteScores()
    for item in found:
        name = item.benchmark.name
        _log.info("%s: %d images", name, item.images)
        try:
            result.scores[name] = item.benchmark.measure(item.data, item.database, embed, options)
        except DataError as error:
            _log.error("%s is not measured: %s", name, error)
            result.failed[name] = str(error)
            continue
        _log.info("%s: %.2f", name, result.figures[name])
    return result


def suite_table(
    headings: Sequence[str],
    results: Sequence[Mapping[str, float]],
    found: Sequence[Found],
    missing: Mapping[str, str],
    reported: Mapping[str, Mapping[str, float]] | None = None,
) -> str:
    """Format the figures of one or two models as markdown: a row per benchmark, then the means.

    Means are over the benchmarks of the paper's table that every model has; a mean over fewer than
    the fourteen says so, and is not to be compared with the paper's. `reported` has columns of the
    paper's own figures, by their headings.
    """
    columns = [*results, *(reported or {}).values()]
    heads = ["benchmark", "", *headings]
    heads += ["difference"] if len(results) == 2 else []
    heads += list(reported or {})
    lines = [
        "| " + " | ".join(head.replace("|", "\\|") for head in heads) + " |",
        "|---|---|" + "---:|" * (len(heads) - 2),
    ]

    def add(name: str, metric: str, values: Sequence[float | None]) -> None:
        own, theirs = values[: len(results)], values[len(results) :]
        cells = ["" if value is None else f"{value:.2f}" for value in own]
        if len(own) == 2:
            both = own[0] is not None and own[1] is not None
            cells.append(f"{own[1] - own[0]:+.2f}" if both else "")  # type: ignore[operator]
        cells += ["" if value is None else f"{value:.1f}" for value in theirs]
        lines.append("| " + " | ".join([name, metric, *cells]) + " |")

    remarks = []
    complete = []
    for item in found:
        benchmark = item.benchmark
        values = [column.get(benchmark.name) for column in columns]
        if all(value is None for value in values[: len(results)]):
            continue
        mark = ""
        if item.notes:
            remarks.append(f"{benchmark.name}: {'; '.join(item.notes)}")
            mark = " \\*"
        if benchmark.name in paper.BENCHMARKS and None not in values:
            complete.append(benchmark.name)
        add(benchmark.name + mark, f"{benchmark.group} {benchmark.metric}", values)
    if complete:
        means = [float(np.mean([column[name] for name in complete])) for column in columns]
        whole = len(complete) == BENCHMARKS_OF_THE_MEAN
        title = "mean" if whole else f"mean of these {len(complete)} of {BENCHMARKS_OF_THE_MEAN}"
        add(title, "", means)
    text = "\n".join(lines) + "\n"
    if remarks:
        text += "\n" + "\n".join(f"\\* {remark}" for remark in remarks) + "\n"
    if missing:
        text += f"\nNot measured: {', '.join(missing)}.\n"
    return text
