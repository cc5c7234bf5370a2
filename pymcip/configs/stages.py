"""Options of the stages around training: which model runs, embed, mine, evaluate, export, check, demo."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pymcip.configs.options import (
    WORKERS,
    Config,
    DataOptions,
    Source,
    Sources,
    Workers,
    option,
    required,
)

SHARD = "i/n, i from 0 to n-1: do one of n shares of the work; n calls into the same folder do all"


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Config):
    """Which open_clip model, and where it runs. Shared by every stage that runs a model."""

    model: str = required(
        "what open_clip takes: a name (ViT-L-14-336), hf-hub:org/name, local-dir:/path; "
        "or the folder of a pymcip run"
    )
    pretrained: str | None = option(
        None,
        "open_clip's pretrained tag, a checkpoint's path, or MCIP-ViT-L-14-336 or "
        "MCIP-ViT-SO400M-14-SigLIP-384, those of MCIP's authors",
    )
    image_size: int | None = option(None, "pixels; default: the model's own", at_least=1)
    device: str | None = option(None, "cpu, cuda, cuda:1, …; default: a GPU if there is one")
    precision: Literal["fp32", "amp_bf16"] = option(
        "amp_bf16", "bf16 autocast (on a CPU without bf16: fp32), or plain fp32"
    )


@dataclass(frozen=True, kw_only=True)
class EmbedConfig(ModelOptions, DataOptions):
    """Options of `pymcip.embed`: images and captions into a clip-retrieval folder."""

    out: Source = required("folder to write: img_emb/, text_emb/, metadata/")
    images: Sources | None = option(None, "image sources: ImageFolder, CSV/TSV/parquet, tar shards")
    captions: Sources | None = option(None, "caption sources: text, TSV, parquet, tar shards")
    batch_size: int = option(64, "images (and 4x as many captions) per forward pass", at_least=1)
    part_size: int = option(100_000, "rows per part file", at_least=1)
    workers: Workers = option("auto", WORKERS, at_least=0)
    reduced_decoding: bool = option(
        False,
        "read JPEGs at a half, a quarter or an eighth of their size where that leaves twice the "
        "model's: faster; embeddings differ a little from open_clip's",
    )
    shard: str | None = option(None, SHARD)
    overwrite: bool = option(False, "replace what is in `out`")

    def problems(self) -> list[str]:
        problems = super().problems()
        if self.images is None and self.captions is None:
            problems.append("nothing to embed: give images=, captions=, or both")
        return problems


@dataclass(frozen=True, kw_only=True)
class MineConfig(Config):
    """Options of `pymcip.mine_captions`: an embedding folder into a caption table."""

    images: Source = required("embedding folder that holds img_emb/ (from `pymcip.embed`)")
    captions: Source | None = option(None, "the one that holds text_emb/; default: `images`")
    out: Source = required("folder to write: caption_table.npz, .parquet, sample.tsv, report.json")
    k: int = option(10, "captions per image, at most", at_least=1)
    threshold: float | Literal["auto"] = option(
        0.27,
        "lowest cosine of a pseudo-caption (0.27: OpenAI's CLIP), or auto",
        at_least=-1,
        at_most=1,
    )
    recall: float = option(
        1.0,
        "share of the pairs to find; 1: all of them. Less, such as 0.95, lets an approximate index "
        "(faiss) miss some, for corpora beyond 10^8 captions; the recall is measured and reported",
        more_than=0,
        at_most=1,
    )
    index: Source | None = option(
        None, "folder of the approximate index, to build or to use; default: one for this run"
    )
    backend: str = option("auto", "back end of the top-k op; see pymcip.ops.explain('topk')")
    threads: int | None = option(None, "CPU threads; default: all", at_least=1)
    seed: int = option(0, "seed of all samples, and of the approximate index")
    shard: str | None = option(None, SHARD)
    overwrite: bool = option(False, "replace what is in `out`")

    def problems(self) -> list[str]:
        problems = super().problems()
        if self.index is not None and self.recall == 1:
            problems.append("index is for approximate search: give recall too, such as 0.95")
        return problems


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(ModelOptions, DataOptions):
    """Options of `pymcip.evaluate`: on the user's own `data`, or a `suite` of public benchmarks."""

    data: Sources | None = option(
        None, "labelled images; captions (title, txt) are used where there are any"
    )
    suite: Literal["paper", "authors"] | None = option(
        None,
        "public benchmarks below data_root instead of data: paper, by the benchmarks' own "
        "protocols; authors, with the settings of the authors' scripts where they differ",
    )
    data_root: Source | None = option(None, "folder of the suite's data sets; see --list")
    data_paths: dict[str, Any] = option({}, "folders of single data sets: gpr1200=/data/gpr")
    benchmarks: tuple[str, ...] = option((), "only these of the suite; default: all that are there")
    out: Source | None = option(
        None, "folder for metrics.json, table.md and report.html; default: don't write"
    )
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
    duplicates: Literal["join", "keep"] = option(
        "join",
        "image files of equal content are one picture with all their captions, or each its own",
    )
    knn_k: int = option(21, "neighbours that vote", at_least=1)
    knn_vote: Literal["weighted", "majority"] = option(
        "weighted", "votes weigh exp(cos / knn_temperature), or one each"
    )
    knn_temperature: float | None = option(None, "default: 0.07; suite authors: 0.1", more_than=0)
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
        0,
        "pixels cut off the sides of ObjectNet's pictures; 2 takes their red border off",
        at_least=0,
    )
    allow_partial: bool = option(False, "measure incomplete benchmarks too, marked in the table")
    cache: Source | None = option(
        None, "a suite's embeddings, shared with train; default: embeddings/ in `out`, if given"
    )
    recall_at: tuple[int, ...] = option((1, 5, 10), "the k of text and image R@k", at_least=1)
    batch_size: int = option(64, "images per forward pass", at_least=1)
    workers: Workers = option("auto", WORKERS, at_least=0)
    resume: Literal["latest"] | None = option(None, "keep the embeddings that are in `out`")
    overwrite: bool = option(False, "replace what is in `out`")

    def problems(self) -> list[str]:
        problems = super().problems()
        if (self.data is None) == (self.suite is None):
            problems.append(
                "give data= (your own images) or suite= (public benchmarks below data_root=)"
                + ("" if self.data is None else ", not both")
            )
        if self.suite is not None:
            if self.data_root is None and not self.data_paths:
                problems.append("suite= needs data_root=, the folder that holds the data sets")
            if self.class_names is not None or self.knn_data is not None or self.columns:
                problems.append(
                    "class_names, columns and knn_data belong to data=; a suite brings its own"
                )
        if not self.recall_at:
            problems.append("recall_at=(): give ranks of 1 or more")
        return problems


@dataclass(frozen=True, kw_only=True)
class ExportConfig(ModelOptions):
    """Options of `pymcip.export`."""

    out: Source = required("folder to write: state_dict.pt, hub/, and what else is asked for")
    index: Source | None = option(
        None, "embedding folder whose images go into a faiss index (needs pymcip[faiss])"
    )
    onnx: bool = option(False, "write onnx/image.onnx and onnx/text.onnx too (needs pymcip[onnx])")
    overwrite: bool = option(False, "replace what is in `out`")


@dataclass(frozen=True, kw_only=True)
class CheckConfig(DataOptions):
    """Options of `pymcip.check`: what pymcip sees in a data source."""

    data: Sources = required("sources of images or of captions, as the other stages take them")
    out: Source | None = option(
        None, "folder for check.txt, skipped.tsv and thumbnails.png; default: don't write"
    )
    overwrite: bool = option(False, "replace what is in `out`")


@dataclass(frozen=True, kw_only=True)
class RunsConfig(Config):
    """Options of `pymcip runs`: run folders side by side."""

    folder: Source = required("folder below which the runs of train lie, however deep")


@dataclass(frozen=True, kw_only=True)
class DemoConfig(Config):
    """Options of `pymcip demo`: all stages on a small world of pictures."""

    out: Source = option(Path("runs/demo"), "folder to write: report.md, report.json, pictures")
    seeds: int = option(1, "how many seeds to run and average over", at_least=1)
    smoke: bool = option(False, "a tiny world: shows that everything runs, not the pattern")
    overwrite: bool = option(False, "replace what is in `out`")
