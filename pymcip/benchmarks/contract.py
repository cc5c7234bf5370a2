"""What a public data set gives to a benchmark, and what a benchmark is.

A `DataSet` knows where its files lie and reads the public layout into one of three shapes:
`Labelled`, `QuerySet` or `Captioned`. A `Benchmark` is a protocol on a data set. Readers look at names,
lists and counts only: pixels are read when the images are embedded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pymcip.benchmarks.embedder import CachedEmbedder
from pymcip.data import ImageData
from pymcip.errors import DataError
from pymcip.metrics.inputs import Int64

Group = Literal["I2I", "k-NN", "zero-shot", "T2I"]
_log = logging.getLogger("pymcip.benchmarks")


class AbsentError(DataError):
    """A data set, or the part of it that is asked for, is not on the disk: nothing is broken."""


@dataclass(frozen=True)
class SuiteOptions:
    """What the paper leaves open. The defaults are those of the suite "paper".

    Attributes:
        knn_k: neighbours that vote.
        knn_vote: "weighted" (exp(cos / temperature), as DINO) or "majority".
        knn_temperature: of the weighted vote.
        knn_database: "train": the data set's training images vote (ImageNet-1k train for -Sketch
            and -A too); "self": the other images of the evaluated set.
        aircraft_database: FGVC-Aircraft's split that votes.
        instre: "iscen": the split and queries of gnd_instre.mat, trapezoidal mAP; "all": every image
            is a query and ranks all, relevant are those of its folder, full-ranking mAP.
        instre_crop: crop INSTRE's queries to their boxes.
        revisited_crop: crop ROxford's and RParis's queries to their boxes.
        revisited_difficulty: which mAP is the benchmark's figure.
        objectnet_border: pixels cut off each side of an ObjectNet picture: 2 take its red border off.
            Published figures (open_clip's, the paper's) are with it.
        allow_partial: take data sets that are not complete; the table marks them.
    """

    knn_k: int = 21
    knn_vote: Literal["weighted", "majority"] = "weighted"
    knn_temperature: float = 0.07
    knn_database: Literal["train", "self"] = "train"
    aircraft_database: Literal["trainval", "train"] = "trainval"
    instre: Literal["iscen", "all"] = "iscen"
    instre_crop: bool = False
    revisited_crop: bool = True
    revisited_difficulty: Literal["easy", "medium", "hard"] = "medium"
    objectnet_border: int = 0
    allow_partial: bool = False


@dataclass(frozen=True)
class Labelled:
    """Images with classes: for retrieval by class, k-NN and zero-shot.

    Attributes:
        images: the images.
        labels: int64 [N], the class of each, by the data set's own ids: never by the order in which
            folders happen to be listed.
        names: what prompts call class 0, 1, …; empty where there is no zero-shot.
        templates: prompts with `{}` for the name.
        candidates: the classes that zero-shot may answer (ImageNet-A: 200 of 1,000); None: all.
        notes: what a reader of the table must know, such as "partial: 10 of 12,000 images".
        rows: int64 [N], those of `images` that are measured; None: all.
        voters: the images that vote in k-NN, with labels of the same classes; None: the others of N.
        own_voters: int64 [N], which of the voters is the image itself, and doesn't vote for it; -1:
            none. None: no voter is.
    """

    images: ImageData
    labels: Int64
    names: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    candidates: tuple[int, ...] | None = None
    notes: tuple[str, ...] = ()
    rows: Int64 | None = None
    voters: Labelled | None = None
    own_voters: Int64 | None = None


@dataclass(frozen=True)
class QuerySet:
    """Queries against a database, with the relevant rows of each.

    `truth[q]` maps "ok" (INSTRE), or "easy", "hard" and "junk" (revisitop), to int64 rows of `images`.
    """

    images: ImageData
    queries: ImageData
    truth: tuple[dict[str, Int64], ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Captioned:
    """N images and M captions.

    Attributes:
        images: the images.
        captions: M texts.
        owners: int64 [M], which of the N images each caption belongs to.
        notes: as of `Labelled`.
        rows: int64 [N], those of `images` that are measured; None: all.
    """

    images: ImageData
    captions: tuple[str, ...]
    owners: Int64
    notes: tuple[str, ...] = ()
    rows: Int64 | None = None


Data = Labelled | QuerySet | Captioned


@dataclass(frozen=True)
class DataSet:
    """A public data set.

    Attributes:
        name: short and stable, such as "imagenet1k-val".
        title: as papers write it.
        folders: names looked for below the data root; the first that is there is taken.
        source: where to get it.
        layout: what the folder must look like, a line per file or folder.
        reader: reads a folder of this data set, as `read` says, which adds to its AbsentError where
            to get the data.
    """

    name: str
    title: str
    folders: tuple[str, ...]
    source: str
    layout: str
    reader: Callable[[DataSet, Path, SuiteOptions], Data]

    def read(self, folder: Path, options: SuiteOptions) -> Data:
        """Read a folder.

        Raises:
            AbsentError: this part of the data set is not there; the message says where to get it.
            DataError: what is there is not what it must be.
        """
        try:
            return self.reader(self, folder, options)
        except AbsentError as error:
            raise AbsentError(f"{self.title}: {error}. {self.how_to_get()}") from error

    def find(self, root: Path | None, paths: Mapping[str, str]) -> list[Path]:
        """List the folders that may hold it: `paths[name]`, or those of `folders` below `root`.

        Raises:
            AbsentError: there is none; the message says where to get it and what it must look like.
            DataError: `paths` names a folder that is not there.
        """
        if self.name in paths:
            given = Path(paths[self.name]).expanduser()
            if not given.is_dir():
                raise DataError(f"data_paths: {self.name}={given} is no folder")
            return [given]
        found = [] if root is None else [root / name for name in self.folders]
        there = [folder for folder in found if folder.is_dir()]
        if not there:
            where = "no data_root is given" if root is None else f"it is not below {root}"
            raise AbsentError(f"{self.title}: {where}. {self.how_to_get()}")
        return there

    def load(self, root: Path | None, paths: Mapping[str, str], options: SuiteOptions) -> Data:
        """Read it from the first of these folders that holds it; raises what `find` and `read` do."""
        absent: AbsentError | None = None
        for folder in self.find(root, paths):
            try:
                _log.info("reading %s in %s", self.title, folder)
                return self.read(folder, options)
            except AbsentError as error:  # another part of the set may lie in another folder
                absent = absent or error
        assert absent is not None
        raise absent

    def how_to_get(self) -> str:
        """Describe where to get the data and what the folder must look like."""
        lines = "\n".join(f"    {line}" for line in self.layout.strip().splitlines())
        return (
            f"Get it from {self.source}\nand lay it out below data_root in one of "
            f"{', '.join(f'{name}/' for name in self.folders)}:\n{lines}\n"
            f"or name its folder: data_paths={{'{self.name}': '/path'}}"
        )


@dataclass(frozen=True)
class Benchmark:
    """A protocol on a data set: one column of the table.

    `measure(data, embed, options)` returns percentages by name, the benchmark's own figure first.
    `database` is the data set whose images vote in k-NN.
    """

    name: str
    column: str
    group: Group
    metric: str
    data: DataSet
    measure: Callable[[Data, CachedEmbedder, SuiteOptions], dict[str, float]]
    database: DataSet | None = None

    @property
    def data_sets(self) -> tuple[DataSet, ...]:
        """The data sets that it needs."""
        return (self.data,) if self.database is None else (self.data, self.database)


def check_counts(
    title: str, found: Mapping[str, int], expected: Mapping[str, int], options: SuiteOptions
) -> tuple[str, ...]:
    """Compare numbers of things ("images", "classes", …) with what the public data set has.

    Returns:
        Notes for the table: none, or with `allow_partial` what is not complete.

    Raises:
        DataError: a number differs, and `allow_partial` was not given.
    """
    wrong = [
        f"{found.get(what, 0):,} of {number:,} {what}"
        for what, number in expected.items()
        if found.get(what, 0) != number
    ]
    if not wrong:
        return ()
    if not options.allow_partial:
        raise DataError(
            f"{title}: found {', '.join(wrong)}; figures of an incomplete set can't be compared with "
            "published ones. Complete it, or give allow_partial=True and have it marked in the table"
        )
    _log.warning("%s is not complete: %s", title, ", ".join(wrong))
    return (f"partial: {', '.join(wrong)}",)
