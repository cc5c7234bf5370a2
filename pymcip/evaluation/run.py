"""`pymcip.evaluate`: models side by side on the user's own data, or on public benchmarks."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from pymcip.benchmarks import (
    BENCHMARKS,
    DATA_SETS,
    SUITES,
    Found,
    SuiteOptions,
    find_suite,
    measure_suite,
)
from pymcip.configs import EvaluateConfig
from pymcip.data import load_images
from pymcip.data.class_names import read_class_names
from pymcip.data.column_names import columns_named
from pymcip.data.tally import LeftOut
from pymcip.distributed import barrier, is_first, joined, world
from pymcip.embedding import EmbeddingCache
from pymcip.errors import ConfigError, DataError
from pymcip.evaluation.own_data import check_own, measure_own
from pymcip.evaluation.report import LeftOuts, Model, Named, Thumbnails, write_report
from pymcip.evaluation.tables import comparison_table, model_headings, reported_columns, suite_table
from pymcip.files import write_json, write_text
from pymcip.folders import manifest
from pymcip.model import load_configured
from pymcip.outputs import output_folder

Result = TypeVar("Result")

_log = logging.getLogger("pymcip.evaluation")


@dataclass(frozen=True)
class EvaluateResult:
    """What `evaluate` measured, in percent.

    On the user's data: keys as in `evaluate_model`; `counts` says on how much: images, labelled,
    classes, captions, duplicates (copies that were joined to a picture), skipped (images that could
    not be decoded), texts_cut (at the model's context). Of a suite: `metrics` and
    `baseline` hold each benchmark's figure by its name, `details` all figures of each for the model,
    `counts` the images of each, `missing` why the others were not measured.

    `table` is markdown: a row per metric or benchmark, columns for the baseline, the model and the
    difference (only the model without a baseline). `out` holds metrics.json, table.md
    and report.html, or is None.
    """

    metrics: dict[str, float]
    baseline: dict[str, float] | None
    table: str
    counts: dict[str, int]
    out: Path | None
    details: dict[str, dict[str, float]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def evaluate(
    config: EvaluateConfig | str | os.PathLike[str] | None = None, /, **options: Any
) -> EvaluateResult:
    """Measure a model, and a baseline beside it, on the user's images or on public benchmarks.

    Takes the fields of `EvaluateConfig` as keywords, or a ready config, or the model's name first:
    `evaluate("ViT-L-14-336", pretrained="openai", suite="paper", data_root="/data")`.

    With `data`, `evaluate_model` says what is measured from which data; every image is embedded once
    per model. With `suite`, the public benchmarks of the paper's Table 1 (arXiv 2409.01936) that
    lie below `data_root` are read from their original layouts, all of them are checked before anything
    is embedded, and each image is embedded once per model, whichever benchmarks use it.
    `pymcip.benchmarks.listing` says what each needs and where to get it.

    `image_size`, `device` and `precision` hold for both models. With `out`, the folder gets
    metrics.json, table.md and report.html, which shows what the models find. Processes of torchrun
    share the embedding, then each computes the figures, which are the same to the bit, and the first
    one writes them.

    Raises:
        ConfigError: the options are wrong.
        DataError: the data can't be read, or hold nothing to measure; the class names don't cover
            the data's labels; a benchmark's data are not complete.
        MissingDependencyError: a benchmark's files need a package that is not installed.
        CheckpointError: weights can't be loaded.
        OutputExistsError: `out` is not empty, and `overwrite` was not given.
    """
    if config is not None and not isinstance(config, EvaluateConfig):
        options = {"model": os.fspath(config), **options}
        config = None
    chosen = EvaluateConfig.make(config, options)
    if world() > 1 and chosen.cache is None and (chosen.suite is None or chosen.out is None):
        raise ConfigError(
            f"evaluate was started as {world()} processes, which share embeddings by a folder that all "
            "can reach: give cache="
        )
    with joined(chosen.device):
        return _evaluate_own(chosen) if chosen.suite is None else _evaluate_suite(chosen)


def _evaluate_own(config: EvaluateConfig) -> EvaluateResult:
    assert config.data is not None
    with columns_named(config.columns):
        data = load_images(config.data, labelled=False)
        knn_data = None if config.knn_data is None else load_images(config.knn_data)
    names = None if config.class_names is None else read_class_names(config.class_names)
    own = check_own(data, knn_data, names, config.duplicates)
    options = protocol_options(config)
    read = chain(data.files(), () if knn_data is None else knn_data.files())
    with _prepare(config, read) as out:
        started = time.monotonic()
        measured = _each_model(
            config,
            config.cache,
            lambda cache: measure_own(own, cache, options, config.templates, config.recall_at),
        )
        last, figures = measured[-1], [each.metrics for each in measured]
        headings, notes = model_headings(_models(config)), _notes(last.counts, config)
        result = EvaluateResult(
            metrics=figures[-1],
            baseline=figures[0] if config.baseline is not None else None,
            table=comparison_table(headings, figures, notes),
            counts=last.counts,
            out=out,
        )
        models = [
            Model(heading, each.metrics, each.examples)
            for heading, each in zip(headings, measured, strict=True)
        ]
        left_out = LeftOuts("images are not measured", last.left_out)
        named, seconds = Named(own.images, last.names), time.monotonic() - started
        return _written(config, result, models, left_out, named, seconds, note=notes)


def _evaluate_suite(config: EvaluateConfig) -> EvaluateResult:
    assert config.suite is not None
    unknown = [name for name in config.benchmarks if name not in BENCHMARKS]
    if unknown:
        raise ConfigError(f"benchmarks={unknown} are not known; allowed: {', '.join(BENCHMARKS)}")
    unknown = sorted(config.data_paths.keys() - DATA_SETS.keys())
    if unknown:
        raise ConfigError(f"data_paths has {unknown}; allowed: {', '.join(sorted(DATA_SETS))}")
    options = protocol_options(config)
    wanted = [BENCHMARKS[name] for name in BENCHMARKS if name in (config.benchmarks or BENCHMARKS)]
    root = None if config.data_root is None else Path(config.data_root).expanduser()
    if root is not None and not root.is_dir():
        raise DataError(
            f"data_root={str(root)!r} is no folder; give the one that holds the data sets"
        )
    found, missing = find_suite(wanted, root, config.data_paths, options)
    if not found:
        raise DataError(f"none of the benchmarks' data are there:{_reasons(missing)}")
    read = [path for item in found for path in item.files]
    with _prepare(config, read) as out:
        results = _each_model(
            config,
            config.cache or (None if out is None else out / "embeddings"),
            lambda cache: measure_suite(found, cache, options),
        )
        for scores in results:
            missing |= scores.failed
        if not any(scores.scores for scores in results):
            raise DataError(f"not one benchmark could be measured:{_reasons(missing)}")
        figures, headings = [each.figures for each in results], model_headings(_models(config))
        reported = reported_columns(_models(config))
        result = EvaluateResult(
            metrics=figures[-1],
            baseline=figures[0] if config.baseline is not None else None,
            table=suite_table(headings, figures, found, missing, reported),
            counts={item.benchmark.name: item.images for item in found},
            out=out,
            details=results[-1].scores,
            missing=missing,
        )
        models = [Model(*each) for each in zip(headings, figures, strict=True)]
        left_out = LeftOuts(
            "benchmarks are not measured", [LeftOut(*each) for each in missing.items()]
        )
        words = {item.benchmark.name: (item.benchmark.name, _in_words(item)) for item in found}
        more = {"protocol": asdict(options), "baseline_details": results[0].scores}
        return _written(config, result, models, left_out, more=more, words=words.__getitem__)


def _in_words(item: Found) -> str:
    measured = f"{item.benchmark.group} {item.benchmark.metric}, on {item.images:,} images"
    return "; ".join([measured, *item.notes])


def _reasons(missing: dict[str, str]) -> str:
    return "".join(f"\n- {name}: {reason}" for name, reason in missing.items())


def protocol_options(config: EvaluateConfig) -> SuiteOptions:
    """Combine the suite's settings (without a suite: the defaults) with those that were given."""
    names = {item.name for item in fields(SuiteOptions)} & vars(config).keys()
    given = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    return SuiteOptions(**{**SUITES[config.suite or "paper"], **given})


def _models(config: EvaluateConfig) -> list[tuple[str, str | None]]:
    """List names and weights of the models to measure: the baseline, if there is one, first."""
    baseline = [] if config.baseline is None else [(config.baseline, config.baseline_pretrained)]
    return [*baseline, (config.model, config.pretrained)]


def _each_model(
    config: EvaluateConfig,
    folder: str | os.PathLike[str] | None,
    measure: Callable[[EmbeddingCache], Result],
) -> list[Result]:
    """Measure the baseline, if there is one, then the model: one is in memory at a time.

    Embeddings go into `folder`, or into a temporary one.
    """
    with ExitStack() as stack:
        if folder is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="pymcip-"))
        results = []
        for name, pretrained in _models(config):
            clip = load_configured(replace(config, model=name, pretrained=pretrained))
            _log.info("evaluating %s", name)
            cache = EmbeddingCache(
                clip, folder, batch_size=config.batch_size, workers=config.workers
            )
            results.append(measure(cache))
            del clip, cache
    return results


@contextlib.contextmanager
def _prepare(config: EvaluateConfig, read: Iterable[Path]) -> Iterator[Path | None]:
    """Make and hold the output folder, if one is asked for; `read`: files of the data.

    Of several processes the first one does, before the others continue.
    """
    if config.out is None or not is_first():
        barrier()
        yield None if config.out is None else Path(config.out)
        return
    out = Path(config.out)
    known = manifest(out) or any((out / name).exists() for name in ("metrics.json", "embeddings"))
    with output_folder(config, resume=bool(config.resume and known), read=read):
        barrier()
        yield out


def _written(
    config: EvaluateConfig,
    result: EvaluateResult,
    models: list[Model],
    left_out: LeftOuts,
    data: Named | None = None,
    seconds: float = 0,
    more: dict[str, Any] | None = None,
    **page: Any,
) -> EvaluateResult:
    """Write metrics.json (with `more`), table.md and report.html, if there is a folder for them."""
    if result.out is not None and is_first():
        document = asdict(result)
        del document["table"], document["out"]
        document = {**document, **(more or {}), "config": config.to_dict()}
        write_json(result.out / "metrics.json", document)
        write_text(result.out / "table.md", result.table)
        title = f"pymcip evaluate: {' and '.join(model.heading for model in models)}"
        path = write_report(
            result.out, title, models, data, [left_out], Thumbnails(seconds), **page
        )
        _log.info("the report, for a browser: %s", path)
    return result


def _notes(counts: dict[str, int], config: EvaluateConfig) -> str:
    parts = [f"{counts['images']:,} images"]
    if counts["labelled"]:
        parts.append(f"{counts['labelled']:,} labelled in {counts['classes']:,} classes")
        voters = "the other images" if config.knn_data is None else "knn_data"
        parts.append(f"k-NN: k = {config.knn_k}, {config.knn_vote} vote of {voters}")
    if counts["captions"]:
        parts.append(f"{counts['captions']:,} captions")
    if counts["duplicates"]:
        parts.append(f"{counts['duplicates']:,} copies of other images joined to them")
    if counts["texts_cut"]:
        parts.append(f"{counts['texts_cut']:,} texts cut at the model's context")
    if counts["skipped"]:
        parts.append(f"{counts['skipped']:,} undecodable images left out")
    return "; ".join(parts) + "."
