"""`pymcip.train`: the methods of MCIP (arXiv 2409.01936), and `mcip+`, on one training loop.

| method     | trains                                | loss                             |
|------------|---------------------------------------|----------------------------------|
| `gpr`      | image tower                           | ArcMargin on class labels        |
| `mcip`     | image tower                           | + MCArcMargin on pseudo-captions |
| `rea`      | text tower, on cached image embeddings| InfoNCE, both directions         |
| `2sft`     | `gpr`, then `rea`                     |                                  |
| `mcip+rea` | `mcip`, then `rea`                    |                                  |
| `mcip+`    | the same, within `alignment_budget`   |                                  |

With `distill`, every stage on images also stays near the untrained model's distribution over captions.
"""

from __future__ import annotations

import json
import logging
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pymcip.configs import TrainConfig
from pymcip.data import Captions, ImageData, load_captions, load_images
from pymcip.embedding import EmbeddingCache
from pymcip.errors import CheckpointError, ConfigError, DataError
from pymcip.evaluation import ClassNames, ClassTexts, evaluate_model, name_texts, read_class_names
from pymcip.exporting import write_export
from pymcip.files import TEMPORARY_SUFFIX, prepare_output, read_json, write_json
from pymcip.mining import CaptionTable, mine_captions
from pymcip.model import ClipModel, load, load_configured, plain_state
from pymcip.model.towers import discard_projector
from pymcip.training.alignment import (
    EVALUATIONS_OF_SEARCH,
    FEWEST_CAPTIONS,
    FEWEST_GIVEN,
    FEWEST_IMAGES,
    MOST_CAPTIONS,
    MOST_IMAGES,
    AlignmentProbe,
    Kept,
    ProbeSources,
    affordable,
    load_probe_sources,
    probe_pixels,
    probe_rows,
)
from pymcip.training.checkpoints import (
    Position,
    checkpoint_files,
    load_checkpoint,
    mark_best,
    position_of,
    remove_leftovers,
)
from pymcip.training.distillation import CaptionSample, Distillation, frozen_copy
from pymcip.training.interpolation import interpolated, largest_coefficient
from pymcip.training.logs import MetricsLog, forget_after, log_file
from pymcip.training.loop import Interruption, Run, fit, restore
from pymcip.training.noise import noisy_captions
from pymcip.training.stages import (
    ImageStage,
    Pairs,
    Stage,
    TextStage,
    caption_bank,
    order_caption_bank,
)

__all__ = ["TrainResult", "train"]

EMBED_BATCH = 64
# Options that may differ when a run is resumed: they don't change what is computed.
RESUMABLE = (
    "out",
    "resume",
    "overwrite",
    "workers",
    "save_steps",
    "log_steps",
    "report_to",
    "cache",
    "device",
)

RESULT_PATHS = ("out", "checkpoint", "best_checkpoint", "state_dict", "hub")  # relative to `out`

_log = logging.getLogger("pymcip.training")


@dataclass(frozen=True)
class TrainResult:
    """What `train` returns, and writes as `result.json`.

    `metrics`: last evaluation on `val_data` in percent, of the exported model if there is one;
    `before`: the same before training (both {} without `val_data`). `interrupted`: "SIGINT" or
    "SIGTERM" if the run stopped early with a checkpoint, else None; `hub` and `state_dict` are None
    then. `best_checkpoint`: of the epoch with the best metrics on `val_data`.

    `alignment`, of a run with `alignment_budget` (None without, or if interrupted; also written as
    `alignment.json`):

    - `budget`; `respected`: whether there is a model that keeps it. If not, nothing is exported:
      `hub` and `state_dict` are None, and `checkpoint` holds the tuned model.
    - `coefficient`: how far the exported model is on the line from the original weights (0) to the
      tuned ones (1).
    - `kept`: what it keeps of the original's alignment, the smaller of `image_to_text` and
      `text_to_image` (all None if nothing is exported): 0 to 1, or more where the probe's right
      answers are known and it gives more of them. `standard_error`: of `kept`, for other images (or
      texts) like the probe's: a probe of few can't tell a small loss. `kept_tuned`: of the tuned model,
      `kept_by_epoch`: while it was trained.
    - `probe`: how many `images` and `captions` were asked for, and their `source`.
    - `tried`: [coefficient, kept] in the order of the search; `seconds`: spent on all probing.
    """

    out: Path
    method: str
    metrics: dict[str, float]
    before: dict[str, float]
    checkpoint: Path
    best_checkpoint: Path | None
    state_dict: Path | None
    hub: Path | None
    steps: int
    skipped_steps: int
    seconds: float
    interrupted: str | None
    alignment: dict[str, Any] | None = None


def train(config: TrainConfig | None = None, /, **options: Any) -> TrainResult:
    """Fine-tune an open_clip model for image search; `pymcip.TrainConfig` lists the options.

    Writes a run folder: `config.json`, `out.log`, `metrics.jsonl`, `embeddings/` and `mined/` (the
    pseudo-captions), `checkpoints/`, `exported/` (plain open_clip weights), `result.json`;
    with a budget `alignment.json`.

    With `alignment_budget` the tuned weights are drawn back towards the original ones as far as the
    budget asks for (`TrainResult.alignment`); if nothing keeps it, nothing is exported.

    With `resume="latest"` a run that was killed goes on from its last checkpoint, on the CPU to the
    same bits as if it had not been.

    Raises:
        ConfigError, DataError: something is wrong with options or data; nothing was written.
        OutputExistsError: `out` holds something.
        StaleEmbeddingsError: the embeddings in `out` or `cache` are of other data or another model.
        CheckpointError: a checkpoint is damaged or of another run or model.
        TrainingDivergedError: ten steps in a row without a finite loss.
    """
    config = TrainConfig.make(config, options)
    data = load_images(config.train_data)
    captions = load_captions(config.captions) if config.captions is not None else None
    validation = load_images(config.val_data) if config.val_data is not None else None
    names = read_class_names(config.val_class_names) if config.val_class_names else None
    pair_data = (
        load_images(config.rea_data, labelled=False) if config.rea_data is not None else None
    )
    if config.realigns and pair_data is not None and not _has_titles(pair_data):
        raise DataError(
            f"rea_data={config.rea_data!r} has images but no captions; give a title column, .txt "
            "members or json with a caption, or leave rea_data out to use pseudo-captions"
        )
    class_texts = None
    if config.realigns and config.rea_class_names is not None:
        class_texts = name_texts(data, read_class_names(config.rea_class_names))
    generic = (
        load_images(config.distill_data, labelled=False)
        if config.distill_data is not None
        else None
    )
    probe_sources = load_probe_sources(config, captions)
    clip = load_configured(config, config.aug_cfg)
    if config.resume:
        finished = _check_resumable(config)
        if finished is not None:
            return finished
    out = prepare_output(
        config.out,
        overwrite=config.overwrite,
        resume=config.resume is not None,
        inputs=(
            (config.model, config.pretrained, config.mine_model, config.mine_pretrained),
            *(config.train_data, config.captions, config.rea_data, config.cache),
            *(config.val_data, config.val_class_names),
            *(config.probe_data, config.probe_captions, config.probe_class_names),
            (config.distill_data, config.rea_class_names),
        ),
    )
    write_json(out / "config.json", config.to_dict())
    (out / "checkpoints").mkdir(exist_ok=True)
    remove_leftovers(out / "checkpoints")
    trainer = _Trainer(config, out, clip, data, captions, validation, names, pair_data)
    trainer.probe_sources, trainer.generic = probe_sources, generic
    trainer.class_texts = class_texts
    with Interruption().installed() as interruption, log_file(out / "out.log"):
        return trainer.run(interruption)


def _check_resumable(config: TrainConfig) -> TrainResult | None:
    """Refuse to resume another run; return the result of one that is already finished."""
    out = Path(config.out)
    if not (out / "config.json").is_file():
        if out.is_dir() and not all(p.name.endswith(TEMPORARY_SUFFIX) for p in out.iterdir()):
            raise ConfigError(
                f"resume='latest': {out} holds files but no config.json, so it is no pymcip run; "
                "give the folder of a run, or one that is new or empty"
            )
        return None
    younger = {item.name: item.default for item in fields(config)}  # than the run: not in its file
    before, now = {**younger, **read_json(out / "config.json")}, config.to_dict()
    changed = [
        f"{name}: was {before.get(name)!r}, now {now[name]!r}"
        for name in now
        if name not in RESUMABLE and before.get(name) != now[name]
    ]
    if changed:
        raise ConfigError(
            f"resume='latest': the run in {out} was started with other options: {'; '.join(changed)}. "
            "Give the same ones, or another folder"
        )
    if not (out / "result.json").is_file():
        return None
    _log.info("the run in %s is finished; nothing to resume", out)
    values: dict[str, Any] = read_json(out / "result.json")
    values |= {name: out / values[name] for name in RESULT_PATHS if values[name] is not None}
    return TrainResult(**values)


def _has_titles(data: ImageData) -> bool:
    return any(data.titles(i) for i in range(len(data)))


class _Trainer:
    """One call of `train`: embed, mine, the stages in order, export."""

    def __init__(
        self,
        config: TrainConfig,
        out: Path,
        clip: ClipModel,
        data: ImageData,
        captions: Captions | None,
        validation: ImageData | None,
        names: ClassNames | None,
        pair_data: ImageData | None,
    ) -> None:
        self.config, self.out, self.clip = config, out, clip
        self.captions, self.pair_data = captions, pair_data
        self.validation, self.names = validation, names
        self.all_data = data
        self.metrics: dict[str, float] = {}
        self.before: dict[str, float] = {}
        self.generic: ImageData | None = None
        self.class_texts: ClassTexts | None = None
        self.distillation: Distillation | None = None
        self.probe_sources: ProbeSources | None = None
        self.probe: AlignmentProbe | None = None
        self.original: dict[str, Tensor] = {}  # its weights, of a run with a budget
        self.probe_seconds = 0.0

    def run(self, interruption: Interruption) -> TrainResult:
        started = time.perf_counter()
        config = self.config
        self._embed_and_mine()
        if config.trains_images:
            self._remember_original()
        if self.probe_sources is not None:
            with self._probing():
                self.original = plain_state(self.clip.model)
                self.probe = self._make_probe(self.probe_sources)
        if config.grad_checkpointing:
            self.clip.model.set_grad_checkpointing(True)  # type: ignore[operator]
        if config.projector == "discard":
            discard_projector(self.clip, config.seed)
        files = checkpoint_files(self.out / "checkpoints")
        state = load_checkpoint(files[-1]) if config.resume and files else None
        position = Position() if state is None else position_of(state)
        if state is not None:
            self._load_weights(state["model"], files[-1])
            _log.info("resuming from %s", files[-1])
        else:
            _seed_everything(config.seed)
        self.metrics = forget_after(self.out / "metrics.jsonl", position)
        with MetricsLog(self.out, config.report_to, config.to_dict()) as log:
            run = Run(
                self.clip, config, self.out, log, interruption, position, self._end_of_epoch,
                checkpoint=files[-1] if state is not None else None,
            )  # fmt: skip
            if self.validation is not None:
                self._evaluate_before(run)
            names = (["image"] if config.trains_images else []) + (
                ["text"] if config.realigns else []
            )
            while position.stage < len(names) and not interruption.requested:
                stage = (
                    self._image_stage() if names[position.stage] == "image" else self._text_stage()
                )
                if state is not None:
                    restore(state, stage)
                    state = None
                fit(run, stage)
                if not interruption.requested:
                    position.stage, position.epoch, position.step = position.stage + 1, 0, 0
                    run.save(None)
        assert run.checkpoint is not None
        best = self.out / "checkpoints" / "best.pt"
        exported = alignment = None
        if not interruption.requested:
            if self.probe is not None:
                with self._probing():
                    alignment = self._keep_alignment(self.probe)
                alignment["seconds"] = self.probe_seconds
                write_json(self.out / "alignment.json", alignment)
                if self.validation is not None and 0 < alignment["coefficient"] < 1:
                    self.metrics = self._evaluate()
            if alignment is None or alignment["respected"]:
                exported = write_export(self.clip, self.out / "exported")
        result = TrainResult(
            out=self.out,
            method=config.method,
            metrics=self.metrics,
            before=self.before,
            checkpoint=run.checkpoint,
            best_checkpoint=best if best.exists() else None,
            state_dict=exported.state_dict if exported else None,
            hub=exported.hub if exported else None,
            steps=position.global_step,
            skipped_steps=position.skipped_steps,
            seconds=time.perf_counter() - started,
            interrupted=interruption.requested,
            alignment=alignment,
        )
        if not interruption.requested:
            plain = {
                name: str(value.relative_to(self.out)) if isinstance(value, Path) else value
                for name, value in asdict(result).items()
            }
            write_json(self.out / "result.json", plain)
        return result

    # --- data -------------------------------------------------------------------------------

    def _embed_and_mine(self) -> None:
        """Embed training images (undecodable ones are dropped here) and mine their captions."""
        config = self.config
        miner = self.clip
        if config.mine_model is not None:
            miner = load(
                config.mine_model,
                config.mine_pretrained,
                image_size=config.image_size,
                device=config.device,
                precision=config.precision,
            )
        cache = self._cache(miner)
        self.embedded = cache.images(self.all_data)
        rows = self.embedded.rows("img")
        self.data = self.all_data.select(rows)
        empty = np.setdiff1d(np.arange(self.data.num_classes), self.data.labels)
        if len(empty):
            names = [self.data.class_names[i] for i in empty[:5]]
            raise DataError(
                f"{len(empty)} classes have no image that can be decoded (first: {names}); see "
                f"{self.embedded.path / 'skipped.tsv'}, and mend or remove them"
            )
        self.table: CaptionTable | None = None
        if not config.needs_captions:
            return
        assert self.captions is not None
        self.caption_vectors = cache.captions(self.captions)
        mined = mine_captions(
            images=self.embedded.path,
            captions=self.caption_vectors.path,
            out=self.out / "mined",
            k=config.k,
            threshold=config.threshold,
            seed=config.seed,
        )
        self.table = mined.table
        if config.caption_noise > 0:  # mined/ keeps what was mined
            self.table = noisy_captions(self.table, config.caption_noise, config.seed)

    def _remember_original(self) -> None:
        """Take from the untrained model, which `clip` still is here, what the image stage needs."""
        config = self.config
        own = self._cache(self.clip)
        embedded_by_it = config.needs_captions and config.mine_model is None  # else by the miner
        if config.compares_with_captions and not embedded_by_it:
            assert self.captions is not None  # `TrainConfig.problems` sees to it
            self.caption_vectors = own.captions(self.captions)
        if config.distill == 0:
            return
        assert self.captions is not None
        embedded = self.embedded if config.mine_model is None else own.images(self.data)
        generic_vectors = None
        if self.generic is not None:
            embedded_generic = own.images(self.generic)
            self.generic = self.generic.select(embedded_generic.rows("img"))
            generic_vectors = embedded_generic.vectors("img")
        left_out = None
        if self.probe_sources is not None and self.probe_sources.from_corpus:
            left_out = probe_rows(len(self.captions), config.seed)
        parts = self.caption_vectors.parts("text")
        mixes = config.mixtures > 0 and self.generic is None
        self.distillation = Distillation(
            frozen_copy(self.clip) if mixes else self.clip,
            CaptionSample(parts, config.distill_captions, config.seed, left_out),
            embedded.vectors("img"),
            weight=config.distill,
            rate=config.mixtures,
            seed=config.seed,
            generic=self.generic,
            generic_vectors=generic_vectors,
            temperature=config.distill_temperature,
        )

    def _cache(self, clip: ClipModel) -> EmbeddingCache:
        """Open the cache for a model whose weights stay as they are while it is in use."""
        folder = self.config.cache if self.config.cache is not None else self.out / "embeddings"
        return EmbeddingCache(clip, folder, workers=self.config.workers)

    # --- stages -----------------------------------------------------------------------------

    def _image_stage(self) -> Stage:
        config = self.config
        bank = positives = None
        if config.uses_captions_for_images:
            assert self.table is not None
            vectors = self.caption_vectors.vectors("text")
            bank, positives = caption_bank(self.table, vectors, config.negatives, config.seed)
            if config.loss_delta > 0:
                bank, positives = order_caption_bank(bank, positives, config.seed, self.clip.device)
        return ImageStage(
            self.clip,
            self.data,
            config,
            class_rows=self._class_means() if config.class_init == "mean" else None,
            bank=bank,
            positives=positives,
            distillation=self.distillation,
        )

    def _class_means(self) -> Tensor:
        """[C, D]: mean of the unit embeddings of every class's images, by the untrained tower."""
        embedded = self.embedded
        if self.config.projector == "discard" or self.config.mine_model is not None:
            embedded = self._cache(self._untrained()).images(self.data)
        vectors = torch.from_numpy(np.asarray(embedded.vectors("img"), dtype=np.float32))
        sums = torch.zeros(self.data.num_classes, vectors.shape[1])
        return nn.functional.normalize(
            sums.index_add_(0, torch.from_numpy(self.data.labels), vectors), dim=1
        )

    def _untrained(self) -> ClipModel:
        """The model as it was before training (a resumed run has trained weights in `clip`)."""
        config = self.config
        clip = load_configured(config)
        if config.projector == "discard":
            discard_projector(clip, config.seed)
        return clip

    def _text_stage(self) -> Stage:
        """Pairs of training images (embedded anew, by the tower as it is now) and their texts."""
        data = self.data if self.pair_data is None else self.pair_data
        embedded = self._cache(self.clip).images(data)
        rows = embedded.rows("img")
        number: dict[str, int] = {}  # of each text, in order
        ids: list[int] = []
        counts = []
        for row in rows.tolist():
            own = list(data.titles(row))
            if self.pair_data is None and self.table is not None and self.captions is not None:
                own += [self.captions[int(i)] for i in self.table[row][0][: self.config.rea_k]]
            own = list(dict.fromkeys(own))
            counts.append(len(own))
            ids += [number.setdefault(text, len(number)) for text in own]
        names = None
        if self.class_texts is not None:
            of_name = [
                [
                    number.setdefault(template.replace("{}", name), len(number))
                    for template in self.config.rea_templates
                ]
                for name in self.class_texts.texts
            ]
            names = np.array(of_name)[self.class_texts.of_class[data.labels[rows]]]
        if not ids and names is None:
            raise DataError("re-alignment found no image with a caption; lower threshold")
        pairs = Pairs(
            vectors=torch.from_numpy(np.array(embedded.vectors("img"))),
            indptr=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            ids=np.array(ids, dtype=np.int64),
            texts=list(number),
            names=names,
        )
        return TextStage(self.clip, pairs, self.config)

    def _load_weights(self, state: dict[str, Tensor], path: Path) -> None:
        try:
            self.clip.model.load_state_dict(state, strict=True)
        except RuntimeError as error:
            raise CheckpointError(
                f"{path} holds another model than {self.config.model!r}: {str(error)[:300]}\n"
                "Resume with the model that the run was started with."
            ) from error

    # --- evaluation -------------------------------------------------------------------------

    def _evaluate(self) -> dict[str, float]:
        assert self.validation is not None
        config = self.config
        return evaluate_model(
            self.clip,
            self.validation,
            class_names=self.names,
            batch_size=EMBED_BATCH,
            workers=config.workers,
        )

    def _evaluate_before(self, run: Run) -> None:
        before = self.out / "before.json"
        if not before.is_file():
            if run.position.global_step > 0:
                return  # the untrained model is gone; a killed run lost its first evaluation
            write_json(before, self._evaluate())
        self.before = read_json(before)
        if run.position.global_step == 0:
            run.log.write({"evaluation": self.before, "global_step": 0})

    def _end_of_epoch(self, run: Run, stage: Stage) -> None:
        if self.validation is not None:
            self._evaluate_epoch(run, stage)
        if self.probe is not None:
            self._probe_epoch(run, stage, self.probe)

    def _evaluate_epoch(self, run: Run, stage: Stage) -> None:
        self.metrics = self._evaluate()
        position = run.position
        run.log.write(
            {
                "evaluation": self.metrics,
                "stage": stage.name,
                "epoch": position.epoch,
                "global_step": position.global_step,
            }
        )
        score = _score(self.metrics)
        _log.info("epoch %d: %s (score %.2f)", position.epoch + 1, self.metrics, score)
        if score > position.best_score and run.checkpoint is not None:
            position.best_score = score
            mark_best(run.checkpoints, run.checkpoint)

    # --- alignment --------------------------------------------------------------------------

    @contextmanager
    def _probing(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.probe_seconds += time.perf_counter() - started

    def _make_probe(self, sources: ProbeSources) -> AlignmentProbe:
        """The probe with the original's answers: `clip` has its weights still."""
        config = self.config
        image_epochs = config.epochs * config.trains_images
        text_epochs = config.rea_epochs * config.realigns
        evaluations = image_epochs + text_epochs + EVALUATIONS_OF_SEARCH
        images = affordable(
            len(self.data) * (image_epochs or text_epochs),
            evaluations,
            fewest=FEWEST_IMAGES if sources.images is None else FEWEST_GIVEN,
            most=MOST_IMAGES,
        )
        pixels, images_read = probe_pixels(
            self.clip, sources.images, self.data, images, config.seed, config.workers
        )
        if sources.truth is not None:
            texts, right = sources.answers(images_read)
            named = sources.names is not None
            return AlignmentProbe(
                self.clip, pixels, texts, seed=config.seed, names=named, right=right
            )
        if sources.names is not None:
            return AlignmentProbe(self.clip, pixels, sources.names, seed=config.seed, names=True)
        assert sources.captions is not None
        # Where the text tower stays as it is, and the corpus is embedded by it already.
        free = sources.from_corpus and config.compares_with_captions and not config.realigns
        most = affordable(
            len(self.data) * (text_epochs or image_epochs),
            text_epochs + EVALUATIONS_OF_SEARCH if config.realigns else 1,
            fewest=FEWEST_CAPTIONS,
            most=MOST_CAPTIONS,
        )
        rows = probe_rows(len(sources.captions), config.seed, part=sources.from_corpus)
        rows = rows[: MOST_CAPTIONS if free else most]
        vectors = None
        if free:
            vectors = torch.from_numpy(np.array(self.caption_vectors.vectors("text")[rows]))
        texts = [sources.captions[row] for row in rows]
        return AlignmentProbe(self.clip, pixels, texts, seed=config.seed, vectors=vectors)

    def _measure_kept(self, probe: AlignmentProbe, *, texts: bool) -> Kept:
        return probe.measure(self.clip, images=self.config.trains_images, texts=texts)

    def _probe_epoch(self, run: Run, stage: Stage, probe: AlignmentProbe) -> None:
        with self._probing():
            kept = self._measure_kept(probe, texts=stage.name == "text")
        position = run.position
        run.log.write(
            {
                "alignment": asdict(kept),
                "stage": stage.name,
                "epoch": position.epoch,
                "global_step": position.global_step,
            }
        )
        _log.info("epoch %d keeps %.4f of its alignment", position.epoch + 1, kept.alignment)

    def _keep_alignment(self, probe: AlignmentProbe) -> dict[str, Any]:
        """Draw the model back until it keeps the budget; what `TrainResult.alignment` says."""
        config, model = self.config, self.clip.model
        assert config.budget is not None
        tuned = plain_state(model)
        measured: dict[float, Kept] = {}

        def kept(coefficient: float) -> float:
            model.load_state_dict(interpolated(self.original, tuned, coefficient))
            measured[coefficient] = self._measure_kept(probe, texts=config.realigns)
            return measured[coefficient].alignment

        search = largest_coefficient(kept, 1 - config.budget, evaluations=EVALUATIONS_OF_SEARCH)
        respected = search.coefficient > 0
        found = measured[search.coefficient] if respected else None
        model.load_state_dict(interpolated(self.original, tuned, search.coefficient))
        lines = (self.out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        if found is not None:
            _log.info(
                "coefficient %.4f keeps %.4f of its alignment, standard error %.4f (tuned: %.4f)",
                search.coefficient, search.kept, found.error, search.tried[0][1],
            )  # fmt: skip
        else:
            _log.warning(
                "nothing is exported: no model between the original and the tuned one keeps the "
                "alignment_budget of %g (tuned: %.4f kept; coefficient %.4f: %.4f). Lower lr, train "
                "fewer epochs, raise distill, or allow a larger budget",
                config.budget, search.tried[0][1], *search.tried[-1],
            )  # fmt: skip
        return {
            "budget": config.budget,
            "respected": respected,
            "coefficient": search.coefficient,
            "kept": search.kept if found else None,
            "standard_error": found.error if found else None,
            "image_to_text": found.image_to_text if found else None,
            "text_to_image": found.text_to_image if found else None,
            "kept_tuned": search.tried[0][1],
            "kept_by_epoch": [
                Kept(**record["alignment"]).alignment for record in records if "alignment" in record
            ],
            "probe": {
                "images": len(probe.pixels),
                "captions": len(probe.texts),
                "source": self.probe_sources.description if self.probe_sources else "",
            },
            "tried": [list(pair) for pair in search.tried],
        }


def _score(metrics: dict[str, float]) -> float:
    """What "best" means: the mean of image search (mAP) and of each text metric that was measured."""
    names = ("i2i_map", "zero_shot", "t2i_r5")
    return float(np.mean([metrics[name] for name in names if name in metrics]))


def _seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    random.seed(seed)
