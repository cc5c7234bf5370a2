"""Image search and text search of a model on the user's own data, before and after side by side."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pymcip import metrics as measure
from pymcip.benchmarks import (
    BENCHMARKS,
    DATA_SETS,
    SUITES,
    SuiteOptions,
    find_suite,
    measure_suite,
    paper,
)
from pymcip.benchmarks.suite import suite_table
from pymcip.configs import EvaluateConfig
from pymcip.data import ImageData, load_images
from pymcip.data.loading import iterate_batches
from pymcip.embedding import EmbeddingCache
from pymcip.errors import ConfigError, DataError
from pymcip.files import prepare_output, write_json, write_text
from pymcip.model import ClipModel, load
from pymcip.progress import progress

TEMPLATES = ("a photo of a {}.", "{}")

_log = logging.getLogger("pymcip.evaluation")


@dataclass(frozen=True)
class EvaluateResult:
    """What `evaluate` measured, in percent.

    On the user's data: keys as in `evaluate_model`; `counts` says on how much: images, labelled,
    classes, captions, skipped (images that could not be decoded). Of a suite: `metrics` and
    `baseline` hold each benchmark's figure by its name, `details` all figures of each for the model,
    `counts` the images of each, `missing` why the others were not measured.

    `table` is markdown: a row per metric or benchmark, columns for the baseline, the model and the
    difference (only the model without a baseline). `out` holds metrics.json and table.md, or is None.
    """

    metrics: dict[str, float]
    baseline: dict[str, float] | None
    table: str
    counts: dict[str, int]
    out: Path | None
    details: dict[str, dict[str, float]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ClassNames:
    """What the user calls the classes: rows of `labels`, `names` and, if given, `descriptions`."""

    labels: tuple[str, ...]
    names: tuple[str, ...]
    descriptions: tuple[str, ...] | None = None


@dataclass(frozen=True)
class ClassTexts:
    """Class texts, each once, and which of them each class of the data has (int64 [C])."""

    texts: list[str]
    of_class: npt.NDArray[np.int64]


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
    metrics.json and table.md.

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
    return _evaluate_data(chosen) if chosen.suite is None else _evaluate_suite(chosen)


def _evaluate_data(config: EvaluateConfig) -> EvaluateResult:
    assert config.data is not None
    data = load_images(config.data, labelled=False)
    knn_data = None if config.knn_data is None else load_images(config.knn_data)
    names = None if config.class_names is None else read_class_names(config.class_names)
    _check_data(data, knn_data, names)
    models = _models(config)
    out = _prepare(config, [*models, config.data, config.knn_data, config.class_names])
    results = []
    counts: dict[str, int] = {}
    for name, pretrained in models:
        clip = _load(config, name, pretrained)
        _log.info("evaluating %s on %d images", name, len(data))
        results.append(
            evaluate_model(
                clip,
                data,
                class_names=names,
                templates=config.templates,
                knn_data=knn_data,
                knn_k=config.knn_k,
                knn_vote=config.knn_vote,
                knn_temperature=config.knn_temperature or measure.KNN_TEMPERATURE,
                recall_at=config.recall_at,
                batch_size=config.batch_size,
                workers=config.workers,
                counts=counts,
            )
        )
        del clip  # one model in memory at a time
    baseline = results[0] if config.baseline is not None else None
    table = comparison_table(_headings(models), results, _notes(counts, config))
    result = EvaluateResult(
        metrics=results[-1], baseline=baseline, table=table, counts=counts, out=out
    )
    _write(result, config)
    return result


def _evaluate_suite(config: EvaluateConfig) -> EvaluateResult:
    assert config.suite is not None
    unknown = [name for name in config.benchmarks if name not in BENCHMARKS]
    if unknown:
        raise ConfigError(f"benchmarks={unknown} are not known; allowed: {', '.join(BENCHMARKS)}")
    unknown = sorted(config.data_paths.keys() - DATA_SETS.keys())
    if unknown:
        raise ConfigError(f"data_paths has {unknown}; allowed: {', '.join(sorted(DATA_SETS))}")
    options = _suite_options(config)
    wanted = [BENCHMARKS[name] for name in BENCHMARKS if name in (config.benchmarks or BENCHMARKS)]
    root = None if config.data_root is None else Path(config.data_root).expanduser()
    if root is not None and not root.is_dir():
        raise DataError(
            f"data_root={str(root)!r} is no folder; give the one that holds the data sets"
        )
    found, missing = find_suite(wanted, root, config.data_paths, options)
    if not found:
        reasons = "\n".join(f"- {name}: {reason}" for name, reason in missing.items())
        raise DataError(f"none of the benchmarks' data are there:\n{reasons}")
    models = _models(config)
    out = _prepare(
        config, [*models, config.data_root, config.cache, *map(str, config.data_paths.values())]
    )
    results = []
    with contextlib.ExitStack() as stack:
        folder = config.cache or (
            stack.enter_context(tempfile.TemporaryDirectory(prefix="pymcip-"))
            if out is None
            else out / "embeddings"
        )
        for name, pretrained in models:
            clip = _load(config, name, pretrained)
            _log.info("evaluating %s on %d benchmarks", name, len(found))
            cache = EmbeddingCache(
                clip, folder, batch_size=config.batch_size, workers=config.workers
            )
            results.append(measure_suite(found, cache, options))
            del clip, cache
    for scores in results:
        missing |= scores.failed
    if not any(scores.scores for scores in results):
        raise DataError(
            "not one benchmark could be measured:\n"
            + "\n".join(f"- {name}: {reason}" for name, reason in missing.items())
        )
    headings = _headings(models)
    result = EvaluateResult(
        metrics=results[-1].figures,
        baseline=results[0].figures if config.baseline is not None else None,
        table=suite_table(
            headings, [each.figures for each in results], found, missing, _reported(models)
        ),
        counts={item.benchmark.name: item.images for item in found},
        out=out,
        details=results[-1].scores,
        missing=missing,
    )
    _write(result, config, {"protocol": asdict(options), "baseline_details": results[0].scores})
    return result


def _suite_options(config: EvaluateConfig) -> SuiteOptions:
    """Combine the suite's settings with those that were given."""
    assert config.suite is not None
    names = {item.name for item in fields(SuiteOptions)} & {item.name for item in fields(config)}
    given = {name: getattr(config, name) for name in names}
    return SuiteOptions(
        **{
            **SUITES[config.suite],
            **{name: value for name, value in given.items() if value is not None},
        }
    )


def _models(config: EvaluateConfig) -> list[tuple[str, str | None]]:
    """List names and weights of the models to measure: the baseline, if there is one, first."""
    models: list[tuple[str, str | None]] = [(config.model, config.pretrained)]
    if config.baseline is not None:
        models.insert(0, (config.baseline, config.baseline_pretrained))
    return models


def _headings(models: Sequence[tuple[str, str | None]]) -> list[str]:
    return [name if tag is None else f"{name} ({tag})" for name, tag in models]


def _reported(models: Sequence[tuple[str, str | None]]) -> dict[str, dict[str, float]]:
    """Find the paper's own figures of these models, under headings for the table."""
    found = {
        f"paper: {heading}": paper.reported(*model)
        for heading, model in zip(_headings(models), models, strict=True)
    }
    return {heading: figures for heading, figures in found.items() if figures}


def _load(config: EvaluateConfig, name: str, pretrained: str | None) -> ClipModel:
    return load(
        name,
        pretrained,
        image_size=config.image_size,
        device=config.device,
        precision=config.precision,
    )


def _prepare(config: EvaluateConfig, inputs: list[Any]) -> Path | None:
    if config.out is None:
        return None
    return prepare_output(
        config.out,
        overwrite=config.overwrite,
        resume=config.resume is not None,
        inputs=inputs,
    )


def _write(
    result: EvaluateResult, config: EvaluateConfig, more: dict[str, Any] | None = None
) -> None:
    if result.out is None:
        return
    document = {
        name: value for name, value in asdict(result).items() if name not in ("table", "out")
    }
    write_json(
        result.out / "metrics.json", {**document, **(more or {}), "config": config.to_dict()}
    )
    write_text(result.out / "table.md", result.table)


def evaluate_model(
    clip: ClipModel,
    data: ImageData,
    *,
    class_names: ClassNames | None = None,
    templates: Sequence[str] = TEMPLATES,
    knn_data: ImageData | None = None,
    knn_k: int = 21,
    knn_vote: Literal["weighted", "majority"] = "weighted",
    knn_temperature: float = measure.KNN_TEMPERATURE,
    recall_at: Sequence[int] = (1, 5, 10),
    batch_size: int = 64,
    workers: int = 0,
    counts: dict[str, int] | None = None,
) -> dict[str, float]:
    """Measure a model on what the data allow; `pymcip.metrics` defines each metric.

    - `i2i_map`, `i2i_r1`, `knn` from labels of two or more classes; images without a label are
      left out. k-NN takes the vote of `knn_data`, or of the other images of `data`.
    - `zero_shot`, `zero_shot_top5` from labels and class names. All names of `class_names` are
      candidates, also those without an image here; a name that several classes share is one
      candidate. Without `class_names` the data's own class names serve, unless they are numbers.
      Names go into the templates as they are: `-` and `_` too.
    - `t2i_map` from the descriptions in `class_names`, each a query.
    - `t2i_r1`, `i2t_r1`, ... from captions; all images are candidates, labelled or not.

    Args:
        clip: the model.
        data: images; those that can't be decoded are left out with a warning.
        class_names: from `read_class_names`.
        templates: zero-shot prompts.
        knn_data: labelled images whose classes are joined to those of `data` by their names.
        knn_k: neighbours that vote.
        knn_vote: as in `pymcip.metrics.knn_classify`, with `knn_temperature`.
        knn_temperature: of the weighted vote.
        recall_at: the k of R@k.
        batch_size: images per forward pass; captions go in batches four times as large.
        workers: decoding processes.
        counts: filled with the numbers of images, labelled, classes, captions and skipped.

    Returns:
        Percentages by name, only those that the data allow.

    Raises:
        DataError: no image can be decoded; class names or k-NN data don't go with the data.
    """
    known = _check_data(data, knn_data, class_names)
    text_batch = 4 * batch_size
    rows, images = _embed(clip, data, batch_size, workers)
    labels = data.labels[rows]
    labelled = np.flatnonzero(labels >= 0)
    captions = [(text, row) for row, i in enumerate(rows) for text in data.titles(int(i))]
    if counts is not None:
        counts.update(
            images=len(rows),
            labelled=len(labelled),
            classes=len(np.unique(labels[labelled])),
            captions=len(captions),
            skipped=len(data) - len(rows),
        )
    found: dict[str, float] = {}
    if len(labelled):
        subset, classes = images[torch.from_numpy(labelled)], labels[labelled]
        if len(np.unique(classes)) > 1:  # any order of one class alone is a perfect one
            found["i2i_map"] = measure.full_ranking_map(subset, classes)
            found["i2i_r1"] = measure.nearest_other_recall(subset, classes)
        if knn_data is not None:
            bank_rows, bank = _embed(clip, knn_data, batch_size, workers)
            bank_labels = _shared_labels(data, knn_data)[knn_data.labels[bank_rows]]
            answers = measure.knn_classify(
                bank, bank_labels, subset, knn_k, knn_vote, temperature=knn_temperature
            )
            found["knn"] = 100 * float(np.mean(answers == classes))
        elif "i2i_map" in found:
            answers = measure.knn_classify(
                subset, classes, subset, knn_k, knn_vote, temperature=knn_temperature,
                leave_one_out=True,
            )  # fmt: skip
            found["knn"] = 100 * float(np.mean(answers == classes))
        names, descriptions = known
        if names is not None:
            classifier = measure.zero_shot_classifier(
                clip, names.texts, templates, batch_size=text_batch
            )
            top = measure.zero_shot_accuracy(subset, classifier, names.of_class[classes])
            found["zero_shot"], found["zero_shot_top5"] = top[1], top[5]
        if descriptions is not None:
            vectors = clip.encode_texts(descriptions.texts, text_batch)
            targets = descriptions.of_class[classes]
            found["t2i_map"] = measure.class_text_map(subset, targets, vectors)
    if captions:
        vectors = clip.encode_texts([text for text, _ in captions], text_batch)
        owners = np.array([row for _, row in captions])
        found.update(measure.cross_modal_recall(images, vectors, owners, tuple(recall_at)))
    if not found:
        raise DataError(
            "there is nothing to measure: the images have no captions, and labels of one class "
            f"only ({data.class_names[labels[labelled[0]]]!r}); give images of two classes or more"
        )
    return found


def read_class_names(path: str | os.PathLike[str]) -> ClassNames:
    r"""Read a UTF-8 TSV file of class names: `label<TAB>name[<TAB>description]`, a class per row.

    `label` is the label as the data have it: folder name, label column, or the number in a shard's
    cls member. With a header (a first row that holds the words "label" and "name") columns are
    found by name and others are ignored; without one they are taken by position. There is no
    quoting. The order of the rows means nothing.

    Raises:
        DataError: the file is missing, not UTF-8, or has missing, empty or repeated entries.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise DataError(f"class_names: can't read {path} ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"class_names: {path} is not UTF-8 ({error}); save it as UTF-8") from error
    table = [
        (number, [cell.strip() for cell in line.split("\t")])
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    columns = ["label", "name", "description"]
    if table and {"label", "name"} <= {cell.lower() for cell in table[0][1]}:
        columns = [cell.lower() for cell in table.pop(0)[1]]
    elif table:
        columns = columns[: len(table[0][1])]
    if not table:
        raise DataError(f"class_names: {path} has no rows; needed: label<TAB>name in each")
    problems: list[str] = []
    seen: dict[str, int] = {}
    wanted = [name for name in ("label", "name", "description") if name in columns]
    found: dict[str, list[str]] = {name: [] for name in wanted}
    if "name" not in columns:
        problems.append(f"line {table[0][0]} has one column; needed: label<TAB>name")
    for number, cells in table if not problems else []:
        row = dict(zip(columns, cells, strict=False))
        empty = [name for name in wanted if not row.get(name)]
        if empty:
            problems.append(f"line {number}: no {' and no '.join(empty)}")
        elif row["label"] in seen:
            problems.append(
                f"line {number}: label {row['label']!r} stands in line {seen[row['label']]} already"
            )
        for name in wanted:
            found[name].append(row.get(name, ""))
        seen.setdefault(row.get("label", ""), number)
    if problems:
        raise DataError(f"class_names: {path} can't be used: {_first(problems)}")
    return ClassNames(
        labels=tuple(found["label"]),
        names=tuple(found["name"]),
        descriptions=tuple(found["description"]) if "description" in found else None,
    )


def comparison_table(
    headings: Sequence[str], results: Sequence[dict[str, float]], notes: str = ""
) -> str:
    """Format results as a markdown table, one column each; of two also the difference."""
    heads = ["metric (%)", *headings] + (["difference"] if len(results) == 2 else [])
    lines = [
        "| " + " | ".join(head.replace("|", "\\|") for head in heads) + " |",
        "|" + "---|" + "---:|" * (len(heads) - 1),
    ]
    for key in results[-1]:
        values = [result[key] for result in results]
        cells = [f"{value:.2f}" for value in values]
        if len(values) == 2:
            cells.append(f"{values[1] - values[0]:+.2f}")
        lines.append("| " + " | ".join([_title(key), *cells]) + " |")
    return "\n".join(lines) + "\n" + (f"\n{notes}\n" if notes else "")


def _title(key: str) -> str:
    titles = {
        "i2i_map": "image-to-image mAP",
        "i2i_r1": "image-to-image R@1",
        "knn": "k-NN",
        "zero_shot": "zero-shot top-1",
        "zero_shot_top5": "zero-shot top-5",
        "t2i_map": "text-to-image mAP (class descriptions)",
    }
    if key in titles:
        return titles[key]
    way, rank = key.split("_r")
    return f"{'text-to-image' if way == 't2i' else 'image-to-text'} R@{rank}"


def _notes(counts: dict[str, int], config: EvaluateConfig) -> str:
    parts = [f"{counts['images']:,} images"]
    if counts["labelled"]:
        parts.append(f"{counts['labelled']:,} labelled in {counts['classes']:,} classes")
        voters = "the other images" if config.knn_data is None else "knn_data"
        parts.append(f"k-NN: k = {config.knn_k}, {config.knn_vote} vote of {voters}")
    if counts["captions"]:
        parts.append(f"{counts['captions']:,} captions")
    if counts["skipped"]:
        parts.append(f"{counts['skipped']:,} undecodable images left out")
    return "; ".join(parts) + "."


def _embed(
    clip: ClipModel, data: ImageData, batch_size: int, workers: int
) -> tuple[npt.NDArray[np.int64], Tensor]:
    """Embed every decodable image: its number (int64 [N]) and unit vector (float32 [N, D]).

    The vectors are on the model's device, where the metrics rank them.
    """
    numbers, vectors = [], []
    batches = iterate_batches(
        data,
        np.arange(len(data)),
        clip.preprocess_val,
        batch_size=batch_size,
        workers=workers,
    )
    total = math.ceil(len(data) / batch_size)
    for batch in progress(batches, total=total, description="embedding images", unit="batch"):
        for item in batch.skipped:
            _log.warning("left out: %s", item.reason)
        if len(batch.indices):
            numbers.append(batch.indices)
            vectors.append(clip.encode_images(batch.images))
    if not numbers:
        raise DataError(f"none of the {len(data)} images, such as {data.key(0)}, can be decoded")
    return np.concatenate(numbers), torch.cat(vectors).to(clip.device)


def _check_data(
    data: ImageData, knn_data: ImageData | None, class_names: ClassNames | None
) -> tuple[ClassTexts | None, ClassTexts | None]:
    """Refuse data that don't go together, before any model runs; returns names, descriptions."""
    labelled = bool((data.labels >= 0).any())
    if not labelled and not any(data.titles(i) for i in range(len(data))):
        raise DataError(
            "the images have neither labels nor captions, so there is nothing to measure; give them "
            "labels (folders, a label column, cls) or captions (a title column, txt)"
        )
    if not labelled:
        given = [
            name
            for name, value in (("class_names", class_names), ("knn_data", knn_data))
            if value is not None
        ]
        if given:
            raise DataError(f"{' and '.join(given)} need labelled images; data has no labels")
        return None, None
    if knn_data is not None:
        _shared_labels(data, knn_data)
    if class_names is None:
        if all(name.lstrip("-").isdecimal() for name in data.class_names):
            _log.info("no zero-shot: the class names are numbers; give class_names= to name them")
            return None, None
        if len(set(data.class_names)) < 2:
            return None, None
        return _class_texts(data.class_names, data.class_names), None
    rows = _rows_of_classes(data, class_names)
    names = _class_texts([class_names.names[row] for row in rows], class_names.names)
    if class_names.descriptions is None:
        return names, None
    described = [class_names.descriptions[row] for row in rows]
    return names, _class_texts(described, described)


def name_texts(data: ImageData, class_names: ClassNames) -> ClassTexts:
    """The names of the data's classes; raises DataError if one has none."""
    names = [class_names.names[row] for row in _rows_of_classes(data, class_names)]
    return _class_texts(names, names)


def _rows_of_classes(data: ImageData, class_names: ClassNames) -> list[int]:
    of_label = {label: row for row, label in enumerate(class_names.labels)}
    missing = [repr(label) for label in data.class_names if label not in of_label]
    if missing:
        known = ", ".join(repr(label) for label in class_names.labels[:5])
        raise DataError(
            f"class_names has no row for {len(missing)} of the data's {data.num_classes} labels: "
            f"{_first(missing)}; it has labels such as {known}. Give each label of the data a row "
            "label<TAB>name"
        )
    return [of_label[label] for label in data.class_names]


def _class_texts(of_class: Sequence[str], candidates: Sequence[str]) -> ClassTexts:
    texts = list(dict.fromkeys(candidates))
    number = {text: row for row, text in enumerate(texts)}
    return ClassTexts(texts, np.array([number[text] for text in of_class], dtype=np.int64))


def _shared_labels(data: ImageData, other: ImageData) -> npt.NDArray[np.int64]:
    """Label in `data` of each class of `other` (int64 [C of other]); new ones for its own classes.

    Classes are the same if their names are, and, where `data` has several sources, if their
    sources have the same position too.
    """

    def keys(images: ImageData) -> list[tuple[int, str]]:
        sources = images.class_sources if several else np.zeros(images.num_classes, dtype=np.int64)
        return list(zip(map(int, sources), images.class_names, strict=True))

    several = len(set(data.class_names)) < data.num_classes
    label_of = {key: label for label, key in enumerate(keys(data))}
    if not any(key in label_of for key in keys(other)):
        raise DataError(
            "knn_data and data have no class in common, such as "
            f"{_first([repr(name) for name in other.class_names[:3]])} and "
            f"{_first([repr(name) for name in data.class_names[:3]])}; label both alike"
        )
    for key in keys(other):
        label_of.setdefault(key, len(label_of))
    return np.array([label_of[key] for key in keys(other)], dtype=np.int64)


def _first(items: Sequence[str], shown: int = 5) -> str:
    rest = f" and {len(items) - shown} more" if len(items) > shown else ""
    return ", ".join(items[:shown]) + rest
