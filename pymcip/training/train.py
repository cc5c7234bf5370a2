"""`pymcip.train`: the methods of MCIP (arXiv 2409.01936), and `mcip+`, on one training loop.

| method     | trains                                | loss                             |
|------------|---------------------------------------|----------------------------------|
| `appended` | image tower, for dimensions of its own| ArcMargin on class labels        |
| `gpr`      | image tower                           | ArcMargin on class labels        |
| `mcip`     | image tower                           | + MCArcMargin on pseudo-captions |
| `rea`      | text tower, on cached image embeddings| InfoNCE, both directions         |
| `2sft`     | `gpr`, then `rea`                     |                                  |
| `mcip+rea` | `mcip`, then `rea`                    |                                  |
| `mcip+`    | the same, within `alignment_budget`   |                                  |

With `distill`, every stage on images also stays near the untrained model's distribution over captions.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
from torch import Tensor

from pymcip.configs import TrainConfig, TrainSettings
from pymcip.data import ImageData
from pymcip.distributed import alone, barrier, broadcast, is_first, joined
from pymcip.embedding import EmbeddingCache, EmbeddingFolder
from pymcip.errors import ConfigError, DataError
from pymcip.exporting import ExportResult, write_export
from pymcip.files import write_json
from pymcip.mining import CaptionTable, mine_captions
from pymcip.model import ClipModel, load_configured, plain_state
from pymcip.model.appended import appended_clip
from pymcip.model.towers import discard_projector, set_patch_dropout, unlock_text_tower
from pymcip.ops.arrays import MatrixParts
from pymcip.outputs import output_folder
from pymcip.training.appended import SHAPES, WEIGHT, choose_head, fit_appended
from pymcip.training.budget import AlignmentBudget
from pymcip.training.callbacks import Callbacks
from pymcip.training.card import model_card
from pymcip.training.checkpoints import Position, checkpoint_files, load_checkpoint, load_weights
from pymcip.training.distillation import Distillation
from pymcip.training.divergence import refuse_diverged, weight_norms
from pymcip.training.first_stage import check_first_stage, take_first_stage
from pymcip.training.image_stage import ImageStage, caption_bank, class_means, order_caption_bank
from pymcip.training.inputs import Inputs, open_inputs
from pymcip.training.logs import MetricsLog, forget_after, log_file
from pymcip.training.loop import Interruption, Run, Stage, fit, restore
from pymcip.training.noise import noisy_captions
from pymcip.training.replicas import check_alike, check_processes
from pymcip.training.report import report_run
from pymcip.training.result import INPUTS, TrainResult, as_begun, finished_result, read_begun
from pymcip.training.settings import fit_settings
from pymcip.training.sharding import on_device
from pymcip.training.summary import log_end, log_start
from pymcip.training.text_stage import TextStage, image_text_pairs
from pymcip.training.validation import Validation

_log = logging.getLogger("pymcip.training")


def train(
    config: TrainConfig | None = None, /, *, callbacks: Callbacks | None = None, **options: Any
) -> TrainResult:
    """Fine-tune an open_clip model for image search; `pymcip.TrainConfig` lists the options.

    Writes a run folder: `config.json`, `inputs.json` (what the data and weights were), `out.log`, `metrics.jsonl`, `embeddings/` and `mined/` (the
    pseudo-captions), `checkpoints/`, `exported/` (plain open_clip weights), `result.json`;
    with a budget `alignment.json`; and `report.html`, which shows the results.

    With `alignment_budget` the tuned weights are drawn back towards the original ones as far as the
    budget asks for (`TrainResult.alignment`); if nothing keeps it, nothing is exported.

    With `appended_dims` the exported open_clip weights are the untrained model's (with a budget: those
    that keep it), and beside them `exported/hub/appended.safetensors` holds the tuned image tower's
    dimensions; `pymcip.load` reads both.

    Options that are "auto" are chosen by the model and the number of images; `config.json` and the log
    say what was taken. Where there is no `val_data`, some classes are held out to measure the model
    before and after. The last lines of the log give both figures, and warn if it isn't better.

    With `resume="latest"` a run that was killed continues from its last checkpoint, on the CPU to the
    same bits as if it had not been.

    With `first_stage` a two-stage method takes its first stage from a finished run, which must have had
    the same options, data and weights; the result has the same bits as if both were trained here.

    `callbacks` are called at steps, evaluations and the ends of epochs, and may end a stage early; see
    `pymcip.Callbacks`.

    Raises:
        ConfigError, DataError: something is wrong with options or data; nothing was written.
        OutputExistsError: `out` holds something.
        FolderInUseError: another process writes to `out`.
        StaleEmbeddingsError: the run in `out` was of other data, labels, captions or weights.
        CheckpointError: a checkpoint is damaged or of another run or model.
        DamagedFileError: another file of the run is damaged.
        ResourceError: the disk is full; a decoding process was ended.
        TrainingDivergedError: ten steps in a row, or most, without a finite loss; or weights that are
            not finite or have grown a thousandfold. Nothing was exported.
    """
    config = TrainConfig.make(config, options)
    if not isinstance(callbacks, (Callbacks, NoneType)):
        raise ConfigError(
            f"callbacks={callbacks!r:.60} is not allowed; allowed: pymcip.Callbacks(on_epoch=…), or None"
        )
    with joined(config.device):
        return _train(config, callbacks or Callbacks())


def _train(config: TrainConfig, callbacks: Callbacks) -> TrainResult:
    """Check everything, then hold the run's folder and run; of several processes the first writes."""
    begun = read_begun(Path(config.out)) if config.resume else None
    config = as_begun(config, begun)
    inputs = open_inputs(config)
    clip = load_configured(config).joint()
    set_patch_dropout(clip, config.patch_dropout)
    if config.realigns:
        unlock_text_tower(clip, config.rea_unlock_layers)  # what can't be done is refused here
    settings, reasons = fit_settings(config, clip, inputs.images)
    check_processes(settings, clip, len(inputs.images))
    weights = {part: clip.weights(part) for part in ("image", "text")}
    made_from = inputs.fingerprints(config, weights)
    check_alike(made_from)
    check_first_stage(settings, made_from)
    if begun is not None:
        finished = finished_result(config, begun, made_from)
        if finished is not None:
            return finished
    cache = _cache(settings, Path(settings.out), clip, weights)
    barrier()  # all have read what the folder holds
    if not is_first():
        barrier()  # the first one holds it, and has seen what may be in it
        with Interruption().installed() as interruption:
            return _run(
                settings, reasons, Path(settings.out), cache, inputs, interruption, callbacks
            )
    with output_folder(config, resume=config.resume is not None, read=inputs.files()) as out:
        write_json(out / INPUTS, made_from)
        write_json(out / "config.json", settings.to_dict())
        (out / "checkpoints").mkdir(exist_ok=True)
        take_first_stage(settings, out)
        barrier()
        with Interruption().installed() as interruption, log_file(out / "out.log"):
            log_start(settings, reasons, clip, inputs)
            result = _run(settings, reasons, out, cache, inputs, interruption, callbacks)
            log_end(result, settings)
            return result


def _run(
    config: TrainSettings,
    reasons: Mapping[str, str],
    out: Path,
    cache: EmbeddingCache,
    inputs: Inputs,
    interruption: Interruption,
    callbacks: Callbacks,
) -> TrainResult:
    """Embed, mine, run the stages in order, keep the budget, export, report.

    `reasons`: of what was chosen for the run. `cache`: of the untrained model, which is trained here.
    """
    started = time.perf_counter()
    clip = cache.clip
    data, mined, table = _embed_and_mine(config, out, cache, inputs)
    embedded = mined
    if config.projector == "discard":
        discard_projector(clip, config.seed)
        cache = _cache(config, out, clip)

    # `clip` is the untrained model up to here: take from it what training will need of it.
    captions = class_rows = distillation = budget = None
    original = plain_state(clip.model.visual) if config.extra_dims else {}  # type: ignore[arg-type]
    if config.compares_with_captions:
        assert inputs.captions is not None  # `TrainConfig.problems` sees to it
        captions = cache.captions(inputs.captions)
    if config.trains_images and (config.distill > 0 or config.class_init == "mean"):
        if config.mine_model is not None or config.projector == "discard":
            embedded = cache.images(data)
        if config.class_init == "mean":
            class_rows = class_means(data.labels, data.num_classes, embedded.vectors("img"))
        if config.distill > 0:
            assert captions is not None
            distillation = Distillation.start(
                config, cache, embedded, captions,
                generic=inputs.generic,
                left_out=inputs.probe.held_back(config.seed) if inputs.probe is not None else None,
            )  # fmt: skip
    if inputs.probe is not None and is_first():
        with alone():
            budget = AlignmentBudget(config, inputs.probe, clip, data, captions)

    norms = weight_norms(clip.model)

    # Where a killed run stopped, or the start.
    if config.grad_checkpointing:
        clip.model.set_grad_checkpointing(True)  # type: ignore[operator]
    files = checkpoint_files(out / "checkpoints")
    state = load_checkpoint(files[-1]) if files and (config.resume or config.first_stage) else None
    if state is None:
        position = Position()
    else:
        position = Position(**{item.name: state[item.name] for item in fields(Position)})
        load_weights(clip.model, state, files[-1], config.model)
        _log.info("resuming from %s", files[-1])
    metrics: dict[str, float] = {}
    seconds = 0.0
    if is_first():
        metrics, seconds = forget_after(out / "metrics.jsonl", position)
    validation = None
    if inputs.validation is not None and is_first():
        validation = Validation(
            clip, inputs.validation, inputs.validation_names,
            held_out=inputs.held_out, workers=config.workers, metrics=metrics,
        )  # fmt: skip

    def image_stage() -> Stage:
        bank = positives = None
        if config.uses_captions_for_images:
            assert table is not None
            assert captions is not None
            vectors = MatrixParts(captions.parts("text"))
            bank, positives = caption_bank(table, vectors, config.negatives, config.seed)
            if config.loss_delta > 0:
                bank, positives = order_caption_bank(bank, positives, config.seed, clip.device)
        return ImageStage(
            clip, data, config, class_rows=class_rows, bank=bank, positives=positives,
            distillation=distillation,
        )  # fmt: skip

    def text_stage() -> Stage:
        tuned = _cache(config, out, clip)  # embeds by the image tower as it is now
        if inputs.pairs is not None:
            pairs = image_text_pairs(config, inputs.pairs, tuned.images(inputs.pairs))
        else:
            pairs = image_text_pairs(
                config, data, tuned.images(data),
                captions=inputs.captions, table=table, class_texts=inputs.class_texts,
            )  # fmt: skip
        return TextStage(clip, pairs, config)

    def end_of_epoch(run: Run, stage: Stage) -> None:
        refuse_diverged(clip.model, norms)
        with alone():
            for part in (validation, budget):  # of the first process
                if part is not None:
                    with on_device(clip):
                        part.after_epoch(run, stage)
        barrier()
        measured = {}
        if validation is not None:
            measured = {"metrics": validation.metrics, "before": validation.before}
        if inputs.validation is not None:
            run.call_back("on_evaluation", stage, **measured)
        run.call_back("on_epoch", stage, **measured)

    stages: list[Callable[[], Stage]] = [image_stage] if config.trains_images else []
    if config.realigns:
        stages.append(text_stage)
    seconds += time.perf_counter() - started
    with MetricsLog(out, config.report_to, config.to_dict(), seconds) as log:
        run = Run(
            clip, config, out, log, interruption, position, end_of_epoch,
            checkpoint=files[-1] if state is not None else None, callbacks=callbacks,
        )  # fmt: skip
        if validation is not None:
            with alone():
                validation.start(run)
        barrier()
        while position.stage < len(stages) and not interruption.agreed:
            stage = stages[position.stage]()
            if state is not None:
                restore(state, stage)
                state = None
            fit(run, stage)
            clip.model.to(clip.device)  # where a stage trains a copy, it is in host memory
            if not interruption.agreed:
                position.stage, position.epoch, position.step = position.stage + 1, 0, 0
                run.save(None)
            del stage  # frees its optimizer before the next one embeds

    if run.checkpoint is None:  # nothing to train but the head of the appended dimensions
        run.save(None)
    assert run.checkpoint is not None
    if not is_first():
        others: TrainResult = broadcast(None)
        return others
    with alone():
        exported = alignment = None
        if not interruption.agreed:
            refuse_diverged(clip.model, norms, position)
            trained = bool(stages)
            exported, alignment = _finish(
                run, reasons, inputs, data, original, trained, budget, validation
            )
        best = out / "checkpoints" / "best.pt"
        result = TrainResult(
            out=out,
            method=config.method,
            metrics=validation.metrics if validation is not None else {},
            before=validation.before if validation is not None else {},
            checkpoint=run.checkpoint,
            best_checkpoint=best if best.is_file() else None,
            state_dict=exported.state_dict if exported else None,
            hub=exported.hub if exported else None,
            steps=position.global_step,
            skipped_steps=position.skipped_steps,
            seconds=log.seconds,
            interrupted=interruption.agreed,
            alignment=alignment,
        )
        if not interruption.agreed:
            report_run(result, config, reasons, inputs, mined, validation)
            result.write()
    broadcast(result)
    return result


def _finish(
    run: Run,
    reasons: Mapping[str, str],
    inputs: Inputs,
    data: ImageData,
    original: dict[str, Tensor],
    trained: bool,
    budget: AlignmentBudget | None,
    validation: Validation | None,
) -> tuple[ExportResult | None, dict[str, Any] | None]:
    """Keep the budget, append dimensions, measure what came of it, and export it.

    Args:
        run: at its end. `reasons`: of what was chosen for it.
        inputs, data: its data; `data` are the training images.
        original: the image tower before training; needed where dimensions are appended.
        trained: whether the run has changed the model, or only appends to it.
        budget, validation: of the run.

    Returns:
        What was exported, if anything was, and what `AlignmentBudget.keep` found.
    """
    config, out, clip, tuned = run.config, run.out, run.clip, run.clip
    alignment = final = None
    if config.extra_dims and trained:
        tuned = replace(clip, model=copy.deepcopy(clip.model))
    if budget is not None:
        alignment = budget.keep(run)
    elif config.extra_dims:
        clip.model.visual.load_state_dict(original)  # type: ignore[union-attr,operator]
    if config.extra_dims:
        caches = _cache(config, out, clip), _cache(config, out, tuned)
        heads, gate = fit_appended(config, *caches, [data], SHAPES)
        number, weight = 0, WEIGHT
        if inputs.held_out and inputs.validation is not None:
            number, weight = choose_head(*caches, inputs.validation, heads, gate)
            both = [data, inputs.validation]
            final = fit_appended(config, *caches, both, SHAPES[number : number + 1])
        tower: Any = None if tuned is clip else tuned.model.visual
        clip = appended_clip(clip, tower, heads[number], weight, gate)
    elif alignment is not None and not alignment["respected"]:
        return None, alignment
    if validation is not None:
        drawn_back = alignment is not None and alignment["coefficient"] < 1
        validation.finish(run, clip, changed=config.extra_dims > 0 or drawn_back)
    if final is not None:  # has seen the classes that were held out to measure the model
        clip = replace(clip, head=final[0][0], gate=final[1])  # type: ignore[call-arg]
    card = model_card(config, reasons, inputs, validation, alignment)
    return write_export(clip, out / "exported", card), alignment


def _cache(
    config: TrainSettings, out: Path, clip: ClipModel, weights: Mapping[str, str] | None = None
) -> EmbeddingCache:
    """The run's embeddings by a model whose weights stay as they are while the cache is in use."""
    folder = config.cache if config.cache is not None else out / "embeddings"
    return EmbeddingCache(clip, folder, workers=config.workers, weights=weights)


def _embed_and_mine(
    config: TrainSettings, out: Path, cache: EmbeddingCache, inputs: Inputs
) -> tuple[ImageData, EmbeddingFolder, CaptionTable | None]:
    """The images that can be decoded, their embeddings by the model that mines, what it mined."""
    if config.mine_model is not None:
        mining = replace(config, model=config.mine_model, pretrained=config.mine_pretrained)
        cache = _cache(config, out, load_configured(mining).joint())
    embedded = cache.images(inputs.images)
    data = inputs.images.select(embedded.rows("img"))
    empty = np.setdiff1d(np.arange(data.num_classes), data.labels)
    if len(empty):
        names = [data.class_names[i] for i in empty[:5]]
        raise DataError(
            f"{len(empty)} classes have no image that can be decoded (first: {names}); see "
            f"{embedded.path / 'skipped.tsv'}, and repair or remove them"
        )
    if not config.needs_captions:
        return data, embedded, None
    assert inputs.captions is not None  # `TrainConfig.problems` sees to it
    if inputs.table is not None:
        table = inputs.table.of(embedded.contents(), data.key)
    else:
        table = mine_captions(
            images=embedded.path,
            captions=cache.captions(inputs.captions).path,
            out=out / "mined",
            k=config.k,
            threshold=config.threshold,
            seed=config.seed,
        ).table
    if config.caption_noise > 0:  # mined/ keeps what was mined
        table = noisy_captions(table, config.caption_noise, config.seed)
    return data, embedded, table
