"""Options of the stage that fine-tunes a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pymcip.configs.options import WORKERS, DataOptions, Source, Sources, Workers, option, required
from pymcip.configs.recipes import read_recipe
from pymcip.configs.stages import ModelOptions

Method = Literal["appended", "gpr", "2sft", "mcip", "mcip+rea", "rea", "mcip+"]
Auto = Literal["auto"]  # chosen when the model and the data are known: `training.settings`
BUDGET = 0.02  # alignment_budget of mcip+, where no other is given
APPENDED_DIMS = 64  # of the method appended, likewise
# Of a two-stage method: the one that trains its first stage alone.
FIRST_STAGE: dict[str, Method] = {"2sft": "gpr", "mcip+rea": "mcip"}
OF_IMAGES = """margin scale lr lr_classes epochs batch_size warmup train_size unlock_layers freeze_bn_stats
    class_init class_balanced continuation aug_cfg appended_dims grad_clip_classes train_resize patch_dropout"""
OF_CAPTION_LOSS = """lambda_class lambda_caption caption_scale caption_margin positives negatives loss_delta
    repel caption_mean"""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(ModelOptions, DataOptions):
    """Options of `pymcip.train`."""

    GROUPS: ClassVar[dict[str, str]] = {
        "what matters most": """model pretrained train_data out method captions val_data epochs workers
            resume""",
        "data": """columns val_class_names train_weights class_balanced holdout aug_cfg train_size train_resize
            reduced_decoding image_size""",
        "model": "appended_dims projector unlock_layers freeze_bn_stats patch_dropout",
        "schedule": """batch_size lr lr_classes wd wd_exempt beta1 beta2 eps warmup lr_floor grad_clip_norm
            grad_clip_classes accum_freq""",
        "loss": """scale margin caption_scale caption_margin continuation lambda_class lambda_caption
            class_init positives negatives repel caption_mean loss_delta""",
        "pseudo-captions": "threshold k caption_table caption_noise mine_model mine_pretrained",
        "alignment": """alignment_budget probe_data probe_captions probe_class_names distill
            distill_temperature distill_captions distill_data mixtures""",
        "re-alignment": """first_stage rea_data rea_k rea_class_names rea_templates rea_epochs rea_batch_size
            rea_lr rea_warmup rea_unlock_layers rea_logit_scale""",
        "machine and run folder": """device sharding precision grad_checkpointing seed cache loss_chunk save_steps
            log_steps overwrite report_to""",
    }

    # What is read and written, and by which method
    train_data: Sources = required("labelled image sources; each source's labels are its own")
    out: Source = required("run folder to write")
    method: Method = option("appended", "appended, gpr, 2sft, mcip, mcip+rea, rea or mcip+")
    captions: Sources | None = option(None, "caption corpus to mine pseudo-captions from")
    val_data: Sources | None = option(
        None,
        "labelled images, evaluated before training and after every epoch; default: a share of the "
        "classes (holdout)",
    )
    val_class_names: Source | None = option(
        None, "TSV label<TAB>name[<TAB>description] of val_data's classes, as for evaluate"
    )
    train_weights: tuple[float, ...] | None = option(
        None, "expected share of an epoch's images, one per source of train_data", more_than=0
    )
    class_balanced: bool = option(False, "draw classes uniformly instead of images")

    holdout: float = option(
        0.1,
        "share of the classes that is kept out of training to measure the model where there is no "
        "val_data; 0: none",
        at_least=0,
        below=1,
    )

    appended_dims: int | Auto = option(
        "auto",
        "dimensions for image search, appended to the joint embedding, which stays as it was (with "
        "alignment_budget: keeps the budget); 0: the joint embedding alone. Default: "
        f"{APPENDED_DIMS} of method appended, else 0",
        at_least=0,
    )

    # The image stage, and what both stages share. For each "auto" the log says what was taken and why
    epochs: int | Auto = option("auto", "passes over the training images (image stage)", at_least=1)
    batch_size: int | Auto = option("auto", "images per step and device", at_least=1)
    train_size: int | Auto = option(
        "auto", "pixels of the training crops; search is at the model's own size", at_least=1
    )
    lr: float | Auto = option("auto", "peak learning rate of the image tower", more_than=0)
    wd: float = option(0.05, "weight decay", at_least=0)
    wd_exempt: bool = option(True, "no weight decay on norms, biases, scalars and class rows")
    beta1: float = option(0.9, "AdamW beta1", at_least=0, below=1)
    beta2: float = option(0.98, "AdamW beta2", at_least=0, below=1)
    eps: float = option(1e-6, "AdamW epsilon", more_than=0)
    warmup: int | Auto = option(
        "auto", "steps of linear warm-up; cosine decay to lr_floor follows", at_least=0
    )
    lr_floor: float = option(
        0.0, "share of the peak learning rates that the cosine ends at", at_least=0, at_most=1
    )
    grad_clip_norm: float | None = option(
        1.0, "clip the norm of the tower's gradient; None: don't", more_than=0
    )
    grad_clip_classes: float | None = option(
        None, "clip the norm of the class matrix's gradient, by itself; None: don't", more_than=0
    )
    accum_freq: int = option(1, "micro-batches per optimizer step", at_least=1)
    grad_checkpointing: bool = option(False, "recompute activations to save memory")
    sharding: Literal["none", "full"] = option(
        "none",
        "what each process of torchrun holds of the tower in training: none: all of it; full: a part of its "
        "weights, gradients and moments (FSDP2)",
    )
    workers: Workers = option("auto", WORKERS, at_least=0)
    seed: int = option(0, "seed of everything random", at_least=0)
    aug_cfg: dict[str, Any] = option(
        {}, "open_clip's AugmentationCfg: scale=(0.5,1.0) use_timm=True color_jitter=0.2"
    )

    train_resize: float | None = option(
        None,
        "resize training images to squares of this many times train_size, crop and flip at random; of "
        "aug_cfg color_jitter alone goes with it; default: open_clip's random crop",
        at_least=1,
    )

    reduced_decoding: bool = option(
        False,
        "read JPEGs for training at a half, a quarter or an eighth of their size where the random crop "
        "keeps twice train_size: faster for large ones; pixels differ a little",
    )

    # Which parts of the image tower are trained
    projector: Literal["keep", "lock", "discard"] = option(
        "keep", "image projector: keep (train it), lock, or discard (gpr, 2sft: drop it)"
    )
    unlock_layers: int | None = option(
        None,
        "train only the last n layer groups of the image tower (with appended dimensions the others run "
        "once for both parts; 0: no second pass); default: all",
        at_least=0,
    )
    freeze_bn_stats: bool = option(True, "keep batch-norm statistics as they are")
    patch_dropout: float = option(
        0.0, "share of a ViT's patches that it doesn't see in training (FLIP)", at_least=0, below=1
    )

    # Losses of the image stage and their pseudo-captions
    scale: float = option(30.0, "s of ArcMargin", more_than=0)
    margin: float = option(0.3, "m of ArcMargin, radians", at_least=0)
    caption_scale: float = option(30.0, "s of MCArcMargin", more_than=0)
    caption_margin: float = option(0.0, "m of MCArcMargin, radians", at_least=0)
    continuation: Literal["linear", "none", "easy"] = option("linear", "where theta + m > pi")
    lambda_class: float = option(0.5, "weight of ArcMargin in mcip", at_least=0)
    lambda_caption: float = option(0.5, "weight of MCArcMargin in mcip", at_least=0)
    lr_classes: float | Auto = option("auto", "learning rate of the class matrix", at_least=0)
    class_init: Literal["mean", "random", "xavier"] = option(
        "mean",
        "class rows start at the class's mean embedding, at random unit rows, or at Xavier's uniform "
        "ones, which are shorter where there are many classes, and so turn faster",
    )
    threshold: float | Auto = option(
        "auto",
        "lowest cosine of a pseudo-caption; auto: from the model's cosines",
        at_least=-1,
        at_most=1,
    )
    k: int = option(10, "pseudo-captions per image, at most", at_least=1)
    caption_table: Source | None = option(
        None,
        "folder of a mine run, whose table is taken instead of mining; it must be of these captions "
        "and of these images, or more",
    )
    caption_noise: float = option(
        0.0,
        "share of pseudo-captions that random ones replace (for studies)",
        at_least=0,
        at_most=1,
    )
    positives: Literal["apart", "compete"] = option(
        "apart", "an image's pseudo-captions: apart, or compete with each other (the authors' form)"
    )
    negatives: Literal["mined", "batch", "bank"] | int = option(
        "mined",
        "caption rows beside an image's own: of all images, of the step's images, of the corpus, or a "
        "sample",
        at_least=1,
    )
    repel: float = option(
        0.0,
        "with positives=compete: weight of -log p of the farthest caption that isn't the image's (0.1 in "
        "the authors' scripts)",
        at_least=0,
    )
    caption_mean: Literal["captioned", "all"] = option(
        "captioned",
        "MCArcMargin's mean is over the images that have pseudo-captions, or over all, the others as 0",
    )
    mine_model: str | None = option(
        None, "model that mines the pseudo-captions; default: `model` before training"
    )
    mine_pretrained: str | None = option(None, "that model's pretrained tag or checkpoint")
    cache: Source | None = option(
        None, "folder for embeddings, shared between runs; default: embeddings/ in `out`"
    )
    loss_chunk: int = option(8192, "columns of a matrix handled at a time (CPU)", at_least=1)
    loss_delta: float = option(
        0.0,
        "share of a row's caption softmax mass that its gradient may leave out",
        at_least=0,
        below=1,
    )

    # The alignment budget and its probe, and distillation
    alignment_budget: float | None = option(
        None,
        "share of its alignment, measured on the probe, that the exported model may lose; "
        f"0.02: 2 % at most; default: any; of mcip+ {BUDGET}",
        at_least=0,
        at_most=1,
    )
    probe_data: Sources | None = option(
        None,
        "images of the probe, not trained on, best with captions or labels; default: made of training images",
    )
    probe_captions: Sources | None = option(
        None, "captions of the probe; default: those of `probe_data`, or a sample of `captions`"
    )
    probe_class_names: Source | None = option(
        None, "TSV label<TAB>name: the probe asks for these names instead of captions"
    )
    distill: float = option(
        0.0, "weight of staying near the untrained model's distribution over captions", at_least=0
    )
    distill_temperature: float = option(3.0, "higher: captions far away count more", more_than=0)
    distill_captions: int = option(8192, "captions drawn per step for it", at_least=2)
    distill_data: Sources | None = option(
        None, "generic images without labels to distill on too; default: none"
    )
    mixtures: float = option(
        0.0, "mixtures of training images to distill on too, per training image", at_least=0
    )

    # Re-alignment, the text stage
    first_stage: Source | None = option(
        None,
        "2sft, mcip+rea: finished run of gpr, mcip with these options, to train no first stage again",
    )
    rea_data: Sources | None = option(
        None, "image-caption pairs for re-alignment; default: train_data with its pseudo-captions"
    )
    rea_k: int | None = option(
        None, "nearest pseudo-captions of an image that it shows; default: all", at_least=1
    )
    rea_class_names: Source | None = option(
        None, "TSV label<TAB>name of train_data's classes, shown with the images every other time"
    )
    rea_templates: tuple[str, ...] = option(
        ("a photo of a {}.", "{}"), "prompts for these names; {} stands for the name"
    )
    rea_epochs: int = option(2, "passes of the re-alignment (text) stage", at_least=1)
    rea_batch_size: int = option(256, "pairs per step of re-alignment", at_least=2)
    rea_lr: float = option(1e-5, "peak learning rate of the text tower", more_than=0)
    rea_warmup: int = option(50, "warm-up steps of re-alignment", at_least=0)
    rea_unlock_layers: int | None = option(
        None, "train only the last n layer groups of the text tower; default: all", at_least=1
    )
    rea_logit_scale: bool = option(False, "train CLIP's logit scale too, up to 100")

    # Checkpoints and logs
    save_steps: int = option(500, "steps between checkpoints; every epoch has one", at_least=1)
    log_steps: int = option(20, "steps between lines of metrics.jsonl", at_least=1)
    resume: Literal["latest"] | None = option(None, "continue the run in `out`")
    overwrite: bool = option(False, "replace what is in `out`")
    report_to: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = option(
        (), "also log to these (imported only then)"
    )

    @classmethod
    def make(cls, config: TrainConfig | None, options: dict[str, Any]) -> TrainConfig:  # type: ignore[override]
        """As for every stage; `recipe` among the options names settings that the others override."""
        own = dict(options)
        settings = read_recipe(own.pop("recipe"))["settings"] if "recipe" in own else {}
        return super().make(config, {**settings, **own})

    @property
    def budget(self) -> float | None:
        """The share of its alignment that may be lost; None: any."""
        of_method = BUDGET if self.method == "mcip+" else None
        return of_method if self.alignment_budget is None else self.alignment_budget

    @property
    def extra_dims(self) -> int:
        """How many dimensions are appended for image search, r; 0: none."""
        if self.appended_dims == "auto":
            return APPENDED_DIMS if self.method == "appended" else 0
        return self.appended_dims

    @property
    def trains_images(self) -> bool:
        """Whether there is an image stage.

        `appended` with `unlock_layers=0` has none: its head is fitted to the untrained tower.
        """
        return self.method != "rea" and not (self.method == "appended" and self.unlock_layers == 0)

    @property
    def uses_captions_for_images(self) -> bool:
        """Whether the image stage has a loss on pseudo-captions."""
        return self.method in ("mcip", "mcip+rea", "mcip+")

    @property
    def compares_with_captions(self) -> bool:
        """Whether the image stage needs the captions embedded by the model that it trains."""
        return self.uses_captions_for_images or (self.trains_images and self.distill > 0)

    @property
    def realigns(self) -> bool:
        """Whether there is a text stage."""
        return self.method in ("2sft", "mcip+rea", "rea", "mcip+")

    @property
    def needs_captions(self) -> bool:
        """Whether pseudo-captions are mined."""
        return self.uses_captions_for_images or (self.realigns and self.rea_data is None)

    @property
    def unused(self) -> set[str]:
        """Options that change nothing in a run of this method."""
        mined, realigned = self.GROUPS["pseudo-captions"], self.GROUPS["re-alignment"]
        with_captions = self.needs_captions or self.compares_with_captions
        used = {
            OF_IMAGES: self.trains_images,
            OF_CAPTION_LOSS: self.uses_captions_for_images,
            mined: self.needs_captions,
            realigned: self.realigns,
            "captions": with_captions or self.budget is not None,
        }
        return {name for names, is_used in used.items() if not is_used for name in names.split()}

    def problems(self) -> list[str]:
        sources = self.train_data if isinstance(self.train_data, tuple) else (self.train_data,)
        weights = self.train_weights
        pairs = "" if self.uses_captions_for_images else "; or rea_data= with image-caption pairs"
        found = {
            "first_stage= is for 2sft and mcip+rea without alignment_budget; leave it out to train both "
            "stages in this run": (
                self.first_stage is not None
                and (self.method not in FIRST_STAGE or self.budget is not None)
            ),
            f"method={self.method!r} needs captions=: a text file, TSV, parquet or tar shards{pairs}": (
                self.needs_captions and self.captions is None
            ),
            f"projector='discard' is not allowed with method={self.method!r}, whose captions live in the "
            "joint space; allowed: keep, lock; or method gpr or 2sft": (
                self.projector == "discard" and self.method not in ("appended", "gpr", "2sft")
            ),
            "train_data is empty; give at least one source": not sources,
            f"train_weights has {len(weights or ())} values for {len(sources)} sources of train_data; give "
            "one per source": weights is not None and len(weights) != len(sources),
            "rea_class_names are those of train_data, and rea_data takes its place; give one of them": (
                self.rea_class_names is not None and self.rea_data is not None
            ),
            f"repel={self.repel} is a term of the softmax in which an image's captions compete; give "
            "positives='compete' too": self.repel > 0 and self.positives != "compete",
            "lambda_class and lambda_caption are both 0; nothing would be trained": (
                self.uses_captions_for_images and self.lambda_class + self.lambda_caption == 0
            ),
        }
        if self.caption_table is not None:
            for name in ("threshold", "k", "mine_model"):
                value, default = getattr(self, name), type(self).__dataclass_fields__[name].default
                problem = (
                    f"caption_table was mined with {name} of its own; leave {name}={value!r} out"
                )
                found[problem] = value != default
        found |= self._appended_problems() | self._budget_problems() | self._distillation_problems()
        return super().problems() + [problem for problem, wrong in found.items() if wrong]

    def _appended_problems(self) -> dict[str, bool]:
        alone = self.method == "rea"
        more = "" if alone else ", or this method with alignment_budget="
        return {
            "method='appended' needs appended_dims of 1 or more; 0 is method='gpr'": (
                self.method == "appended" and self.appended_dims == 0
            ),
            f"appended_dims leaves the text side as it was, and method={self.method!r} trains it; allowed: "
            f"appended, mcip, mcip+{more}": (
                self.extra_dims > 0 and self.realigns and (alone or self.budget is None)
            ),
            "appended_dims is not allowed with projector='discard'; allowed: keep, lock": (
                self.extra_dims > 0 and self.projector == "discard"
            ),
        }

    def _budget_problems(self) -> dict[str, bool]:
        probe = ("probe_data", "probe_captions", "probe_class_names")
        given = [name for name in probe if getattr(self, name) is not None]
        problems = {
            "probe_captions and probe_class_names exclude each other; give one": (
                {"probe_captions", "probe_class_names"} <= set(given)
            )
        }
        if self.budget is None:
            needless = [f"{name} is for a budget; give alignment_budget too" for name in given]
            return problems | dict.fromkeys(needless, True)
        return {
            **problems,
            "alignment_budget is not allowed with projector='discard', which gives up the joint space; "
            "allowed: keep, lock": self.projector == "discard",
            f"alignment_budget={self.budget} is measured with texts; give captions=, probe_captions= or "
            "probe_class_names=, or probe_data= with captions": (
                self.captions is None and not self.needs_captions and not given
            ),
        }

    def _distillation_problems(self) -> dict[str, bool]:
        distilled = self.distill > 0 and self.trains_images
        return {
            "distill needs captions=: distributions over them are what is kept": (
                distilled and self.captions is None and not self.needs_captions
            ),
            "distill and projector='discard' exclude each other: without the projector there is no joint "
            "space to keep; allowed: keep, lock": distilled and self.projector == "discard",
            "distill_data and mixtures are for distillation; give distill too, such as 1": (
                self.distill == 0 and (self.distill_data is not None or self.mixtures > 0)
            ),
        }


@dataclass(frozen=True, kw_only=True)
class TrainSettings(TrainConfig):
    """A `TrainConfig` with nothing left to choose, but for `threshold`, which mining may find."""

    epochs: int = required("passes over the training images")
    batch_size: int = required("images per step")
    train_size: int = required("pixels of the training crops")
    lr: float = required("of the image tower")
    warmup: int = required("steps")
    lr_classes: float = required("of the class matrix")
