"""Options of the stage that measures image search and text search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pymcip.configs.model import ModelOptions
from pymcip.configs.options import Source, Sources, option, resume_problems, template_problems

Suite = Literal["paper", "authors"]


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(ModelOptions):
    """Options of `pymcip.evaluate`: on the user's own `data`, or a `suite` of public benchmarks."""

    data: Sources | None = option(
        None, "labelled images; captions (title, txt) are used where there are any"
    )
    suite: Suite | None = option(
        None,
        "public benchmarks below data_root instead of data: paper, by the benchmarks' own "
        "protocols; authors, with the settings of the authors' scripts where they differ",
    )
    data_root: Source | None = option(None, "folder of the suite's data sets; see --list")
    data_paths: dict[str, Any] = option(
        {}, "folders of single data sets, such as gpr1200=/data/gpr"
    )
    benchmarks: tuple[str, ...] = option((), "only these of the suite; default: all that are there")
    out: Source | None = option(None, "folder for metrics.json and table.md; default: don't write")
    baseline: str | None = option(
        None, "model to put beside it in the same table (before/after); takes what `model` takes"
    )
    baseline_pretrained: str | None = option(None, "the baseline's pretrained tag or checkpoint")
    class_names: Source | None = option(
        None, "TSV label<TAB>name[<TAB>description]; default: the data's own class names"
    )
    templates: tuple[str, ...] = option(
        ("a photo of a {}.", "{}"), "zero-shot prompts; {} stands for the class name"
    )
    knn_data: Sources | None = option(
        None, "labelled images to vote in k-NN; default: the other images of `data`"
    )
    knn_k: int = option(21, "neighbours that vote", at_least=1)
    knn_vote: Literal["weighted", "majority"] = option(
        "weighted", "votes weigh exp(cos / knn_temperature), or one each"
    )
    knn_temperature: float | None = option(
        None, "default: 0.07; of the suite authors 0.1", more_than=0
    )
    knn_database: Literal["train", "self"] = option(
        "train", "who votes in a suite's k-NN: training images, or the other images of the set"
    )
    instre: Literal["iscen", "all"] | None = option(
        None, "INSTRE by gnd_instre.mat, or all images against all; default: iscen; authors: all"
    )
    instre_crop: bool = option(False, "crop INSTRE's queries to their boxes")
    revisited_crop: bool | None = option(
        None, "crop the queries of ROxford and RParis; default: yes; authors: no"
    )
    revisited_difficulty: Literal["easy", "medium", "hard"] = option(
        "medium", "which mAP of ROxford and RParis is their figure; all are in metrics.json"
    )
    objectnet_border: int = option(
        2, "pixels cut off each side of ObjectNet's pictures", at_least=0
    )
    allow_partial: bool = option(False, "measure incomplete benchmarks too, marked in the table")
    cache: Source | None = option(
        None, "a suite's embeddings, shared with train; default: embeddings/ in `out`, if given"
    )
    recall_at: tuple[int, ...] = option((1, 5, 10), "the k of text-to-image and image-to-text R@k")
    batch_size: int = option(64, "images per forward pass", at_least=1)
    workers: int = option(0, "decoding processes; 0 decodes in the main process", at_least=0)
    resume: Literal["latest"] | None = option(None, "keep the embeddings that are in `out`")
    overwrite: bool = option(False, "replace what is in `out`")

    def problems(self) -> list[str]:
        problems = []
        if (self.data is None) == (self.suite is None):
            problems.append(
                "give data= (your own images) or suite= (public benchmarks below data_root=)"
                + ("" if self.data is None else ", not both")
            )
        if self.suite is not None and self.data_root is None and not self.data_paths:
            problems.append("suite= needs data_root=, the folder that holds the data sets")
        problems += resume_problems(self.overwrite, self.resume)
        own = ("class_names", "knn_data")
        if self.suite is not None and any(getattr(self, name) is not None for name in own):
            problems.append("class_names and knn_data belong to data=; a suite brings its own")
        problems += template_problems("templates", self.templates)
        if not self.recall_at or any(k < 1 for k in self.recall_at):
            problems.append(f"recall_at={self.recall_at!r}: give ranks of 1 or more")
        return problems
