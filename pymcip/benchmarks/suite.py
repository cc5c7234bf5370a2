"""A suite of benchmarks: find the data, check all of it, then embed each image once and measure."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pymcip.benchmarks.contract import (
    AbsentError,
    Benchmark,
    Data,
    DataSet,
    Labelled,
    QuerySet,
    SuiteOptions,
)
from pymcip.benchmarks.embedder import CachedEmbedder
from pymcip.data import ImageData
from pymcip.embedding import EmbeddingCache
from pymcip.errors import DataError

_log = logging.getLogger("pymcip.benchmarks")


@dataclass(frozen=True)
class Found:
    """A benchmark whose data are there and complete."""

    benchmark: Benchmark
    data: Data

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the table must know about the data."""
        return self.data.notes + (self.voters.notes if self.voters else ())

    @property
    def sets(self) -> list[ImageData]:
        """The images that are evaluated: separate queries and voters included."""
        queries = [self.data.queries] if isinstance(self.data, QuerySet) else []
        return [self.data.images, *queries, *([self.voters.images] if self.voters else [])]

    @property
    def images(self) -> int:
        """Number of these images."""
        return sum(map(len, self.sets))

    @property
    def files(self) -> list[Path]:
        """The files that hold them."""
        return [path for images in self.sets for path in images.files()]

    @property
    def voters(self) -> Labelled | None:
        """The images that vote in k-NN, if they are a data set of their own."""
        return self.data.voters if isinstance(self.data, Labelled) else None


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
        """Each benchmark's own figure, in percent, by its name."""
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
            if votes is not None:
                voters = get(votes)
                assert isinstance(data, Labelled)
                assert isinstance(voters, Labelled)
                data = replace(data, voters=voters)
            found.append(Found(benchmark, data))
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
            + "\nCorrect them, or choose the others with benchmarks="
        )
    return found, missing


def measure_suite(
    found: Sequence[Found], cache: EmbeddingCache, options: SuiteOptions
) -> SuiteScores:
    """Measure one model; one benchmark whose images can't all be decoded does not stop the others."""
    embed = CachedEmbedder(cache)
    result = SuiteScores()
    for item in found:
        name = item.benchmark.name
        _log.info("%s: %d images", name, item.images)
        try:
            result.scores[name] = item.benchmark.measure(item.data, embed, options)
        except DataError as error:
            _log.error("%s is not measured: %s", name, error)
            result.failed[name] = str(error)
            continue
        _log.info("%s: %.2f", name, result.figures[name])
    return result
