"""One frozen dataclass per stage. The command line is generated from them (`pymcip.cli`).

A config is checked as a whole when it is made: every problem is reported at once, before any work
starts. Only what needs no file and no torch is checked here; data and models are checked by the
stage that opens them, still before it does any work.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

from pymcip.errors import ConfigError

Method = Literal["gpr", "2sft", "mcip", "mcip+rea", "rea", "mcip+"]
Precision = Literal["fp32", "amp_bf16"]
Projector = Literal["keep", "lock", "discard"]
Continuation = Literal["linear", "none", "easy"]
Suite = Literal["paper", "authors"]
Source = str | os.PathLike[str]
Sources = Source | tuple[Source, ...]
ConfigType = TypeVar("ConfigType", bound="Config")
BUDGET = 0.02  # alignment_budget of mcip+, where no other is given


def option(default: Any, help: str) -> Any:
    """A dataclass field with the one-line help that docs and command line show."""
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


def required(help: str) -> Any:
    return field(metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base of the stage configs: construction checks everything and reports all problems."""

    AT_LEAST: ClassVar[dict[str, float]] = {}
    MORE_THAN: ClassVar[dict[str, float]] = {}

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        problems: list[str] = []
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if isinstance(value, list):
                value = tuple(value)
                object.__setattr__(self, item.name, value)
            problem = _type_problem(item.name, value, hints[item.name])
            if problem:
                problems.append(problem)
        if not problems:  # ranges are only meaningful for values of the right type
            for name, bound in self.AT_LEAST.items():
                problems += _range_problem(name, getattr(self, name), bound, strict=False)
            for name, bound in self.MORE_THAN.items():
                problems += _range_problem(name, getattr(self, name), bound, strict=True)
            problems += self.problems()
        if problems:
            raise ConfigError(problems)

    def problems(self) -> list[str]:
        """Problems that a type or a single range can't express; stages extend it."""
        return []

    @classmethod
    def make(
        cls: type[ConfigType], config: ConfigType | None, options: dict[str, Any]
    ) -> ConfigType:
        """A config from either a ready one (changed by `options`) or from options alone."""
        known = [item.name for item in dataclasses.fields(cls)]
        problems = [
            f"unknown option {name!r}; allowed: {', '.join(sorted(known))}"
            for name in options
            if name not in known
        ]
        if config is None:
            problems += [
                f"{item.name} is required: {item.metadata['help']}"
                for item in dataclasses.fields(cls)
                if item.default is dataclasses.MISSING
                and item.default_factory is dataclasses.MISSING
                and item.name not in options
            ]
        if problems:
            raise ConfigError(problems)
        return dataclasses.replace(config, **options) if config is not None else cls(**options)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; paths become strings."""

        def plain(value: Any) -> Any:
            if isinstance(value, os.PathLike):
                return os.fspath(value)
            if isinstance(value, (tuple, list)):
                return [plain(item) for item in value]
            if isinstance(value, dict):
                return {key: plain(item) for key, item in value.items()}
            return value

        return {item.name: plain(getattr(self, item.name)) for item in dataclasses.fields(self)}


def read_options(path: Path, name: str) -> dict[str, Any]:
    """Read a JSON file of options, such as a run's config.json; `name` is what to call it in errors.

    Raises:
        ConfigError: it can't be read, or holds no JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{name} {path} can't be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{name} {path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{name} {path} holds {type(values).__name__}; needed: a JSON object")
    return values


def _allowed_types(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(choice) for choice in get_args(hint))
    if get_args(hint) and get_origin(hint) is not tuple and get_origin(hint) is not dict:
        names = [_allowed_types(part) for part in get_args(hint)]
        return " or ".join(dict.fromkeys(names))
    if hint is type(None):
        return "None"
    if get_origin(hint) is tuple:
        return "a list of " + _allowed_types(get_args(hint)[0])
    origin = get_origin(hint) or hint
    return str(getattr(origin, "__name__", origin))


def _matches(value: Any, hint: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in arguments)
    if origin is tuple:
        return isinstance(value, tuple) and all(_matches(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict)
    if origin is os.PathLike:
        return isinstance(value, os.PathLike)
    if arguments:  # a union
        return any(_matches(value, part) for part in arguments)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _type_problem(name: str, value: Any, hint: Any) -> str | None:
    if _matches(value, hint):
        return None
    return f"{name}={value!r} is not allowed; allowed: {_allowed_types(hint)}"


def _range_problem(name: str, value: Any, bound: float, *, strict: bool) -> list[str]:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return []  # None or a word such as "auto"
    if (value > bound) if strict else (value >= bound):
        return []
    return [f"{name}={value!r} is not allowed; it must be {'>' if strict else '>='} {bound:g}"]


def _template_problems(name: str, templates: tuple[str, ...]) -> list[str]:
    if templates and all("{}" in template for template in templates):
        return []
    return [f"{name}={templates!r}: each must hold {{}} for the class name"]


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Config):
    """Which open_clip model, and where it runs. Shared by every stage that runs a model."""

    model: str = required(
        "what open_clip takes: a name (ViT-L-14-336), hf-hub:org/name, local-dir:/path; "
        "or the folder of a pymcip run"
    )
    pretrained: str | None = option(None, "open_clip's pretrained tag or a checkpoint's path")
    image_size: int | None = option(None, "input size in pixels; default: the model's own")
    device: str | None = option(None, "cpu, cuda, cuda:1, …; default: a GPU if there is one")
    precision: Precision = option(
        "amp_bf16", "bf16 autocast (on a CPU without bf16: fp32), or plain fp32"
    )

    AT_LEAST: ClassVar[dict[str, float]] = {"image_size": 1}


@dataclass(frozen=True, kw_only=True)
class EmbedConfig(ModelOptions):
    """Options of `pymcip.embed`: images and captions into a clip-retrieval folder."""

    out: Source = required("folder to write: img_emb/, text_emb/, metadata/")
    images: Sources | None = option(None, "image sources: ImageFolder, CSV/TSV/parquet, tar shards")
    captions: Sources | None = option(None, "caption sources: text, TSV, parquet, tar shards")
    batch_size: int = option(64, "images (and 4x as many captions) per forward pass")
    part_size: int = option(100_000, "rows per part file")
    workers: int = option(0, "decoding processes; 0 decodes in the main process")
    overwrite: bool = option(False, "replace what is in `out`")

    AT_LEAST: ClassVar[dict[str, float]] = {
        **ModelOptions.AT_LEAST, "batch_size": 1, "part_size": 1, "workers": 0,
    }  # fmt: skip

    def problems(self) -> list[str]:
        if self.images is None and self.captions is None:
            return ["nothing to embed: give images=, captions=, or both"]
        return []


@dataclass(frozen=True, kw_only=True)
class MineConfig(Config):
    """Options of `pymcip.mine_captions`: an embedding folder into a caption table."""

    images: Source = required("embedding folder that holds img_emb/ (from `pymcip.embed`)")
    captions: Source | None = option(
        None, "embedding folder that holds text_emb/; default: the same as `images`"
    )
    out: Source = required("folder to write: caption_table.npz, .parquet, sample.tsv, report.json")
    k: int = option(10, "captions per image, at most")
    threshold: float | Literal["auto"] = option(
        0.27, "lowest cosine of a pseudo-caption (0.27: OpenAI's CLIP), or auto"
    )
    recall: float = option(
        1.0,
        "share of the pairs to find; 1: all of them. Less, such as 0.95, lets an approximate index "
        "(faiss) miss some, for corpora beyond 10^8 captions; the recall is measured and reported",
    )
    index: Source | None = option(
        None, "folder of the approximate index, to build or to use; default: one for this run"
    )
    backend: str = option("auto", "back end of the top-k op; see pymcip.ops.explain('topk')")
    threads: int | None = option(None, "CPU threads; default: all")
    seed: int = option(0, "seed of all samples, and of the approximate index")
    overwrite: bool = option(False, "replace what is in `out`")

    AT_LEAST: ClassVar[dict[str, float]] = {"k": 1, "threads": 1}

    def problems(self) -> list[str]:
        problems = []
        if isinstance(self.threshold, (int, float)) and not -1 <= self.threshold <= 1:
            problems.append(
                f"threshold={self.threshold!r} is not a cosine; allowed: -1 to 1, or 'auto'"
            )
        if not 0 < self.recall <= 1:
            problems.append(f"recall={self.recall!r} is not a share; allowed: above 0, at most 1")
        if self.index is not None and self.recall == 1:
            problems.append("index is for approximate search: give recall too, such as 0.95")
        return problems


@dataclass(frozen=True, kw_only=True)
class TrainConfig(ModelOptions):
    """Options of `pymcip.train`."""

    train_data: Sources = required("labelled image sources; each source's labels are its own")
    out: Source = required("run folder to write")
    method: Method = option("mcip", "gpr, 2sft, mcip, mcip+rea, rea or mcip+")
    captions: Sources | None = option(None, "caption corpus to mine pseudo-captions from")
    val_data: Sources | None = option(None, "labelled images, evaluated after every epoch")
    val_class_names: Source | None = option(
        None, "TSV label<TAB>name[<TAB>description] of val_data's classes, as for evaluate"
    )
    train_weights: tuple[float, ...] | None = option(
        None, "one weight per source of train_data: expected share of its images per epoch"
    )
    class_balanced: bool = option(False, "draw classes uniformly instead of images")

    epochs: int = option(3, "passes over the training images (image stage)")
    batch_size: int = option(64, "images per step and device")
    lr: float = option(1e-5, "peak learning rate of the image tower")
    wd: float = option(0.05, "weight decay (not on norms, biases and scalars)")
    beta1: float = option(0.9, "AdamW beta1")
    beta2: float = option(0.98, "AdamW beta2")
    eps: float = option(1e-6, "AdamW epsilon")
    warmup: int = option(100, "steps of linear warm-up; cosine decay to 0 follows")
    grad_clip_norm: float | None = option(1.0, "clip the gradient's norm; None: don't")
    accum_freq: int = option(1, "micro-batches per optimizer step")
    grad_checkpointing: bool = option(False, "recompute activations to save memory")
    workers: int = option(0, "decoding processes; 0 decodes in the main process")
    seed: int = option(0, "seed of everything random")
    aug_cfg: dict[str, Any] = option(
        {},
        "open_clip's augmentation (AugmentationCfg): scale=(0.5,1.0) use_timm=True color_jitter=0.2",
    )

    projector: Projector = option(
        "keep", "image projector: keep (train it), lock, or discard (gpr, 2sft: drop it)"
    )
    unlock_layers: int | None = option(
        None, "train only the last n layer groups of the image tower; default: all"
    )
    freeze_bn_stats: bool = option(False, "keep batch-norm statistics as they are")

    scale: float = option(30.0, "s of ArcMargin")
    margin: float = option(0.3, "m of ArcMargin, radians")
    caption_scale: float = option(30.0, "s of MCArcMargin")
    caption_margin: float = option(0.0, "m of MCArcMargin, radians")
    continuation: Continuation = option("linear", "what happens where theta + m > pi")
    lambda_class: float = option(0.5, "weight of ArcMargin in mcip")
    lambda_caption: float = option(0.5, "weight of MCArcMargin in mcip")
    lr_classes: float | None = option(
        None,
        "learning rate of the class matrix; default: 10 x lr, too slow for a short run at a low lr: then "
        "0.01 to 0.03",
    )
    class_init: Literal["mean", "random"] = option(
        "mean", "class rows start at the class's mean embedding, or at random"
    )
    threshold: float | Literal["auto"] = option(0.27, "lowest cosine of a pseudo-caption, or auto")
    k: int = option(10, "pseudo-captions per image, at most")
    caption_noise: float = option(
        0.0, "share of the pseudo-captions that random ones of the corpus replace (for studies)"
    )
    negatives: Literal["mined", "bank"] | int = option(
        "mined", "caption rows beside an image's own: mined by any image, whole bank, or a sample"
    )
    mine_model: str | None = option(
        None, "model that mines the pseudo-captions; default: `model` before training"
    )
    mine_pretrained: str | None = option(None, "that model's pretrained tag or checkpoint")
    cache: Source | None = option(
        None, "folder for embeddings, shared between runs; default: embeddings/ in `out`"
    )
    loss_chunk: int = option(8192, "columns of the class or caption matrix handled at a time (CPU)")
    loss_delta: float = option(
        0.0, "share of a row's caption softmax mass that its gradient may leave out; 0: none"
    )

    alignment_budget: float | None = option(
        None,
        "share of its alignment, measured on the probe, that the exported model may lose; "
        f"default: no budget; of mcip+ {BUDGET}",
    )
    probe_data: Sources | None = option(
        None,
        "images of the probe, not trained on, best with captions or labels: then right answers are "
        "counted; default: made from training images",
    )
    probe_captions: Sources | None = option(
        None,
        "captions of the probe; default: the captions of `probe_data`, or a sample of `captions`, "
        "which distillation leaves out",
    )
    probe_class_names: Source | None = option(
        None, "TSV label<TAB>name: the probe asks for these names instead of captions"
    )
    distill: float = option(
        0.0, "weight of staying near the untrained model's distribution over captions; 0: none"
    )
    distill_temperature: float = option(
        3.0, "temperature of these distributions; higher: captions far from the image count more"
    )
    distill_captions: int = option(8192, "captions drawn from the corpus per step for it")
    distill_data: Sources | None = option(
        None, "generic images without labels to distill on too; default: none"
    )
    mixtures: float = option(
        0.0, "mixtures of training images to distill on too, per training image"
    )

    rea_data: Sources | None = option(
        None, "image-caption pairs for re-alignment; default: train_data with its pseudo-captions"
    )
    rea_k: int | None = option(
        None, "pseudo-captions per image that re-alignment shows, the nearest; default: all of them"
    )
    rea_class_names: Source | None = option(
        None,
        "TSV label<TAB>name of train_data's classes: re-alignment shows an image with its class's name "
        "every other time",
    )
    rea_templates: tuple[str, ...] = option(
        ("a photo of a {}.", "{}"), "prompts for these names; {} stands for the name"
    )
    rea_epochs: int = option(2, "passes of the re-alignment (text) stage")
    rea_batch_size: int = option(256, "pairs per step of re-alignment")
    rea_lr: float = option(1e-5, "peak learning rate of the text tower")
    rea_warmup: int = option(50, "warm-up steps of re-alignment")

    save_steps: int = option(500, "steps between checkpoints (one is also written every epoch)")
    log_steps: int = option(20, "steps between lines of metrics.jsonl")
    resume: Literal["latest"] | None = option(None, "go on with the run in `out`")
    overwrite: bool = option(False, "replace what is in `out`")
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = option(
        (), "also log to these (imported only then)"
    )

    AT_LEAST: ClassVar[dict[str, float]] = {
        **ModelOptions.AT_LEAST,
        "epochs": 1, "batch_size": 1, "wd": 0, "warmup": 0, "accum_freq": 1, "workers": 0,
        "unlock_layers": 0, "margin": 0, "caption_margin": 0, "lambda_class": 0,
        "lambda_caption": 0, "lr_classes": 0, "k": 1, "caption_noise": 0, "negatives": 1,
        "loss_chunk": 1, "loss_delta": 0,
        "rea_k": 1, "rea_epochs": 1, "rea_batch_size": 2, "rea_warmup": 0, "save_steps": 1, "log_steps": 1,
        "seed": 0, "beta1": 0, "beta2": 0,
        "alignment_budget": 0, "distill": 0, "distill_captions": 2, "mixtures": 0,
    }  # fmt: skip
    MORE_THAN: ClassVar[dict[str, float]] = {
        "lr": 0, "rea_lr": 0, "scale": 0, "caption_scale": 0, "eps": 0, "grad_clip_norm": 0,
        "distill_temperature": 0,
    }  # fmt: skip

    @property
    def budget(self) -> float | None:
        """The share of its alignment that may be lost; None: any."""
        of_method = BUDGET if self.method == "mcip+" else None
        return of_method if self.alignment_budget is None else self.alignment_budget

    @property
    def trains_images(self) -> bool:
        return self.method != "rea"

    @property
    def uses_captions_for_images(self) -> bool:
        return self.method in ("mcip", "mcip+rea", "mcip+")

    @property
    def compares_with_captions(self) -> bool:
        """Whether the image stage needs the captions embedded by the model that it trains."""
        return self.uses_captions_for_images or (self.trains_images and self.distill > 0)

    @property
    def realigns(self) -> bool:
        return self.method in ("2sft", "mcip+rea", "rea", "mcip+")

    @property
    def needs_captions(self) -> bool:
        return self.uses_captions_for_images or (self.realigns and self.rea_data is None)

    def problems(self) -> list[str]:
        problems = []
        if self.needs_captions and self.captions is None:
            problems.append(
                f"method={self.method!r} needs captions=: a text file, TSV, parquet or tar shards"
                + (
                    ""
                    if self.uses_captions_for_images
                    else "; or rea_data= with image-caption pairs"
                )
            )
        if self.projector == "discard" and self.method not in ("gpr", "2sft"):
            problems.append(
                f"projector='discard' is not allowed with method={self.method!r}, whose captions "
                "live in the joint space; allowed: keep, lock; or method gpr or 2sft"
            )
        if self.overwrite and self.resume:
            problems.append("overwrite=True and resume='latest' exclude each other; give one")
        if self.beta1 >= 1 or self.beta2 >= 1:
            problems.append(f"beta1={self.beta1}, beta2={self.beta2}: each must be below 1")
        if isinstance(self.threshold, (int, float)) and not -1 <= self.threshold <= 1:
            problems.append(
                f"threshold={self.threshold!r} is not a cosine; allowed: -1 to 1, 'auto'"
            )
        if self.caption_noise > 1:
            problems.append(f"caption_noise={self.caption_noise}: a share, at most 1")
        if self.loss_delta >= 1:
            problems.append(f"loss_delta={self.loss_delta}: a share of a whole, below 1")
        sources = self.train_data if isinstance(self.train_data, tuple) else (self.train_data,)
        if not sources:
            problems.append("train_data is empty; give at least one source")
        if self.train_weights is not None:
            if len(self.train_weights) != len(sources):
                problems.append(
                    f"train_weights has {len(self.train_weights)} values for {len(sources)} sources "
                    "of train_data; give one per source"
                )
            if any(weight <= 0 for weight in self.train_weights):
                problems.append(f"train_weights={self.train_weights}: each must be above 0")
        problems += self._realignment_problems()
        problems += self._budget_problems()
        problems += self._distillation_problems()
        if self.uses_captions_for_images and self.lambda_class + self.lambda_caption == 0:
            problems.append("lambda_class and lambda_caption are both 0; nothing would be trained")
        return problems

    def _realignment_problems(self) -> list[str]:
        problems = []
        if self.rea_class_names is not None and self.rea_data is not None:
            problems.append(
                "rea_class_names are those of train_data, and rea_data takes its place; give one of them"
            )
        return problems + _template_problems("rea_templates", self.rea_templates)

    def _distillation_problems(self) -> list[str]:
        problems = []
        if self.distill > 0 and self.trains_images:
            if self.captions is None and not self.needs_captions:
                problems.append("distill needs captions=: distributions over them are what is kept")
            if self.projector == "discard":
                problems.append(
                    "distill and projector='discard' exclude each other: without the projector there "
                    "is no joint space to keep; allowed: keep, lock"
                )
        if self.distill == 0 and self.distill_data is not None:
            problems.append("distill_data is for distillation; give distill too, such as 1")
        if self.distill == 0 and self.mixtures > 0:
            problems.append("mixtures are for distillation; give distill too, such as 1")
        return problems

    def _budget_problems(self) -> list[str]:
        probe = ("probe_data", "probe_captions", "probe_class_names")
        given = [name for name in probe if getattr(self, name) is not None]
        problems = []
        if "probe_captions" in given and "probe_class_names" in given:
            problems.append("probe_captions and probe_class_names exclude each other; give one")
        if self.budget is None:
            problems += [f"{name} is for a budget; give alignment_budget too" for name in given]
            return problems
        if self.budget > 1:
            problems.append(
                f"alignment_budget={self.budget}: a share, 0 to 1 (0.02: lose 2 % at most; 1: no budget)"
            )
        if self.projector == "discard":
            problems.append(
                "alignment_budget is not allowed with projector='discard', which gives up the joint "
                "space; allowed: keep, lock"
            )
        if self.captions is None and not self.needs_captions and not given:
            problems.append(
                f"alignment_budget={self.budget} is measured with texts; give captions=, probe_captions= "
                "or probe_class_names=, or probe_data= with captions"
            )
        return problems


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
    knn_k: int = option(21, "neighbours that vote")
    knn_vote: Literal["weighted", "majority"] = option(
        "weighted", "votes weigh exp(cos / knn_temperature), or one each"
    )
    knn_temperature: float | None = option(None, "default: 0.07; of the suite authors 0.1")
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
    objectnet_border: int = option(2, "pixels cut off each side of ObjectNet's pictures")
    allow_partial: bool = option(False, "measure incomplete benchmarks too, marked in the table")
    cache: Source | None = option(
        None, "a suite's embeddings, shared with train; default: embeddings/ in `out`, if given"
    )
    recall_at: tuple[int, ...] = option((1, 5, 10), "the k of text-to-image and image-to-text R@k")
    batch_size: int = option(64, "images per forward pass")
    workers: int = option(0, "decoding processes; 0 decodes in the main process")
    resume: Literal["latest"] | None = option(None, "keep the embeddings that are in `out`")
    overwrite: bool = option(False, "replace what is in `out`")

    AT_LEAST: ClassVar[dict[str, float]] = {
        **ModelOptions.AT_LEAST, "knn_k": 1, "batch_size": 1, "workers": 0, "objectnet_border": 0,
    }  # fmt: skip
    MORE_THAN: ClassVar[dict[str, float]] = {"knn_temperature": 0}

    def problems(self) -> list[str]:
        problems = []
        if (self.data is None) == (self.suite is None):
            problems.append(
                "give data= (your own images) or suite= (public benchmarks below data_root=)"
                + ("" if self.data is None else ", not both")
            )
        if self.suite is not None and self.data_root is None and not self.data_paths:
            problems.append("suite= needs data_root=, the folder that holds the data sets")
        if self.overwrite and self.resume:
            problems.append("overwrite=True and resume='latest' exclude each other; give one")
        own = ("class_names", "knn_data")
        if self.suite is not None and any(getattr(self, name) is not None for name in own):
            problems.append("class_names and knn_data belong to data=; a suite brings its own")
        problems += _template_problems("templates", self.templates)
        if not self.recall_at or any(k < 1 for k in self.recall_at):
            problems.append(f"recall_at={self.recall_at!r}: give ranks of 1 or more")
        return problems


@dataclass(frozen=True, kw_only=True)
class ExportConfig(ModelOptions):
    """Options of `pymcip.export`."""

    out: Source = required("folder to write: state_dict.pt, hub/, and index.faiss if asked for")
    index: Source | None = option(
        None, "embedding folder whose images go into a faiss index (needs pymcip[faiss])"
    )
    overwrite: bool = option(False, "replace what is in `out`")


@dataclass(frozen=True, kw_only=True)
class DemoConfig(Config):
    """Options of `pymcip demo`."""

    out: Source = option(Path("runs/demo"), "folder to write: report.md, report.json, pictures")
    seeds: int = option(1, "how many seeds to run and average over")
    smoke: bool = option(False, "a tiny world: shows that everything runs, not the pattern")
    overwrite: bool = option(False, "replace what is in `out`")

    AT_LEAST: ClassVar[dict[str, float]] = {"seeds": 1}


ImageMetric = Literal["i2i_map", "i2i_r1", "knn"]
TextMetric = Literal[
    "zero_shot", "zero_shot_top5", "t2i_map",
    "t2i_r1", "t2i_r5", "t2i_r10", "i2t_r1", "i2t_r5", "i2t_r10",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SweepConfig(Config):
    """Options of `pymcip.sweep`. `SWEPT` names those that hold values to try."""

    method: tuple[Method, ...] = option((), "methods to try")
    threshold: tuple[float | Literal["auto"], ...] = option((), "lowest cosines to try, or auto")
    lambda_caption: tuple[float, ...] = option(
        (), "weights of MCArcMargin to try, 0 to 1; lambda_class is the rest to 1"
    )
    margin: tuple[float, ...] = option((), "m of ArcMargin to try, radians")
    scale: tuple[float, ...] = option((), "s of ArcMargin to try")
    caption_margin: tuple[float, ...] = option((), "m of MCArcMargin to try, radians")
    caption_scale: tuple[float, ...] = option((), "s of MCArcMargin to try")
    k: tuple[int, ...] = option((), "pseudo-captions per image to try")
    caption_noise: tuple[float, ...] = option((), "shares of random pseudo-captions to try")
    lr: tuple[float, ...] = option((), "learning rates of the image tower to try")
    epochs: tuple[int, ...] = option((), "passes over the training images to try")

    grid: Literal["axes", "product"] = option(
        "axes", "each option alone, the others as they are; or all combinations"
    )
    seeds: int = option(1, "how many seeds to run; tables give mean and deviation")
    train: Source | None = option(
        None, "JSON file of train's options, such as a run's config.json; default: the demo's"
    )
    data: Sources | None = option(
        None, "images to evaluate on, with `train`; default: its val_data and val_class_names"
    )
    class_names: Source | None = option(None, "TSV of class names of `data`, as for evaluate")
    templates: tuple[str, ...] = option(
        ("a photo of a {}.", "{}"), "zero-shot prompts, with `train`; {} stands for the class name"
    )
    alignment_data: Sources | None = option(
        None, "other images to take the text metrics from, such as of another domain, with `train`"
    )
    alignment_class_names: Source | None = option(None, "TSV of class names of `alignment_data`")
    retrieval: ImageMetric = option("i2i_map", "what image search is measured by")
    alignment: tuple[TextMetric, ...] = option(
        (),
        "what text search is measured by, the mean of several; "
        "default: those of t2i_r5 and zero_shot that the data allow",
    )
    smoke: bool = option(False, "the demo's tiny world: shows that everything runs")
    out: Source = option(Path("runs/sweep"), "folder to write: table.md, sweep.json, plots, runs")
    resume: Literal["latest"] | None = option(
        None, "go on with the sweep in `out`: finished runs are taken as they are"
    )
    overwrite: bool = option(False, "replace what is in `out`")

    SWEPT: ClassVar[tuple[str, ...]] = (
        "method", "threshold", "lambda_caption", "margin", "scale", "caption_margin",
        "caption_scale", "k", "caption_noise", "lr", "epochs",
    )  # fmt: skip
    AT_LEAST: ClassVar[dict[str, float]] = {"seeds": 1}

    @property
    def axes(self) -> dict[str, tuple[Any, ...]]:
        """The options that are swept, each with its distinct values in the order given."""
        values = {name: tuple(dict.fromkeys(getattr(self, name))) for name in self.SWEPT}
        return {name: tried for name, tried in values.items() if tried}

    def problems(self) -> list[str]:
        problems = []
        if not self.axes:
            flags = ", ".join(name.replace("_", "-") for name in self.SWEPT)
            problems.append(f"nothing is swept; give values for at least one of {flags}")
        for name, values in self.axes.items():
            for value in values:
                try:
                    TrainConfig(model="", train_data="", out="", captions="", **{name: value})
                except ConfigError as error:
                    problems += error.problems
        problems += [
            f"lambda_caption={value}: a share of the two losses, at most 1"
            for value in self.lambda_caption
            if value > 1
        ]
        if self.train is None:
            problems += [
                f"{name} is for your own data: give `train` too, a JSON file of train's options"
                for name in ("data", "class_names", "alignment_data", "alignment_class_names")
                if getattr(self, name) is not None
            ]
        elif self.smoke:
            problems.append("smoke is a size of the demo's world; it excludes `train`")
        if self.class_names is not None and self.data is None:
            problems.append("class_names are those of `data`; give `data` too")
        if self.alignment_class_names is not None and self.alignment_data is None:
            problems.append("alignment_class_names are those of alignment_data; give that too")
        problems += _template_problems("templates", self.templates)
        if self.overwrite and self.resume:
            problems.append("overwrite=True and resume='latest' exclude each other; give one")
        return problems
