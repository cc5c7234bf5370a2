"""A user's own images, class names and captions as data sets that the benchmarks' protocols measure."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from pymcip.benchmarks import SuiteOptions, protocols
from pymcip.benchmarks.contract import Captioned, Labelled
from pymcip.benchmarks.embedder import CachedEmbedder
from pymcip.configs import Workers
from pymcip.data import ImageData
from pymcip.data.class_names import ClassNames, ClassTexts, class_texts, rows_of_classes
from pymcip.data.labels import difference
from pymcip.data.sources import some
from pymcip.data.tally import LeftOut
from pymcip.embedding import EmbeddingCache
from pymcip.errors import DataError
from pymcip.evaluation.examples import (
    Examples,
    Ranking,
    by_captions,
    by_names,
    by_pictures,
    drawn_queries,
)
from pymcip.metrics import KNN_TEMPERATURE, full_ranking_ap
from pymcip.metrics.inputs import Int64
from pymcip.model import ClipModel

Duplicates: TypeAlias = Literal["join", "keep"]
TEMPLATES = ("a photo of a {}.", "{}")
RECALL_AT = (1, 5, 10)

_log = logging.getLogger("pymcip.evaluation")


@dataclass(frozen=True)
class OwnData:
    """A user's data, checked: the images, and what else there is to measure them by.

    Attributes:
        images: with labels, captions or both; -1 is the label of an image without one.
        names: the candidates of zero-shot; None: no zero-shot.
        descriptions: the queries of text-to-image mAP; None: there are none.
        voters: images that vote in k-NN, and the label of each (int64), which for a class of
            `images` is the same; None: the other images of `images` vote.
        duplicates: "join" makes one picture of files with the same content, "keep" doesn't.
    """

    images: ImageData
    names: ClassTexts | None = None
    descriptions: ClassTexts | None = None
    voters: tuple[ImageData, Int64] | None = None
    duplicates: Duplicates = "join"


@dataclass(frozen=True)
class Measured:
    """One model on a user's data.

    Attributes:
        metrics: what `evaluate_model` returns.
        counts: what it fills `counts` with.
        examples: what the model finds.
        names: of the data's classes, in words where they are known.
        left_out: what is not measured, and why.
    """

    metrics: dict[str, float]
    counts: dict[str, int]
    examples: Examples
    names: Sequence[str]
    left_out: list[LeftOut]


def evaluate_model(
    clip: ClipModel,
    data: ImageData,
    *,
    class_names: ClassNames | None = None,
    templates: Sequence[str] = TEMPLATES,
    knn_data: ImageData | None = None,
    knn_k: int = 21,
    knn_vote: Literal["weighted", "majority"] = "weighted",
    knn_temperature: float = KNN_TEMPERATURE,
    recall_at: Sequence[int] = RECALL_AT,
    batch_size: int = 64,
    workers: Workers = 0,
    counts: dict[str, int] | None = None,
    duplicates: Duplicates = "join",
) -> dict[str, float]:
    """Measure a model on what the data allow; `pymcip.metrics` defines each metric.

    - `i2i_map`, `i2i_r1`, `knn` from labels of two or more classes; images without a label are
      left out. k-NN takes the vote of `knn_data`, or of the other images of `data`; no picture votes
      for itself.
    - `zero_shot`, `zero_shot_top5` from labels and class names. All names of `class_names` are
      candidates, also those without an image here; a name that several classes share is one
      candidate. Without `class_names` the data's own class names serve, unless they are numbers.
      Names go into the templates as they are: `-` and `_` too.
    - `t2i_map` from the descriptions in `class_names`, each a query.
    - `t2i_r1`, `i2t_r1`, ... from captions; all images are candidates, labelled or not.

    Vectors go through float16, as in all embedding folders; they are kept for the time of the call,
    in a temporary folder.

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
        counts: filled with the numbers of images (distinct pictures), labelled, classes, captions,
            duplicates (copies that were joined to a picture), skipped, and texts_cut at the model's
            context.
        duplicates: "join" makes one picture, with all their captions, of image files that are equal
            byte for byte; "keep" takes each file by itself.

    Returns:
        Percentages by name, only those that the data allow.

    Raises:
        DataError: no image can be decoded; class names or k-NN data don't match the data.
    """
    own = check_own(data, knn_data, class_names, duplicates)
    options = SuiteOptions(knn_k=knn_k, knn_vote=knn_vote, knn_temperature=knn_temperature)
    measured = measure_model(
        own, clip, options, templates, recall_at, batch_size=batch_size, workers=workers
    )
    if counts is not None:
        counts.update(measured.counts)
    return measured.metrics


def measure_model(
    own: OwnData,
    clip: ClipModel,
    options: SuiteOptions,
    templates: Sequence[str] = TEMPLATES,
    recall_at: Sequence[int] = RECALL_AT,
    *,
    batch_size: int = 64,
    workers: Workers = 0,
) -> Measured:
    """Measure as `measure_own` does, with embeddings that are kept for the time of the call only."""
    with tempfile.TemporaryDirectory(prefix="pymcip-") as folder:
        cache = EmbeddingCache(clip, folder, batch_size=batch_size, workers=workers)
        return measure_own(own, cache, options, templates, recall_at)


def check_own(
    data: ImageData,
    knn_data: ImageData | None,
    class_names: ClassNames | None,
    duplicates: Duplicates = "join",
) -> OwnData:
    """Check that the parts of a user's data match, and join them, before any model runs.

    Raises:
        DataError: they don't match, or there is nothing to measure.
    """
    labelled = bool((data.labels >= 0).any())
    if not labelled and not any(data.titles(i) for i in range(len(data))):
        raise DataError(
            "the images have neither labels nor captions, so there is nothing to measure; give them "
            "labels (folders, a label column, cls) or captions (a title column, txt)"
        )
    both = {"class_names": class_names, "knn_data": knn_data}
    given = [name for name, value in both.items() if value is not None]
    if not labelled and given:
        raise DataError(f"{' and '.join(given)} need labelled images; data has no labels")
    voters = names = descriptions = None
    if knn_data is not None:
        voters = knn_data, np.append(_shared_labels(data, knn_data), -1)[knn_data.labels]
    if class_names is not None:
        rows = rows_of_classes(data, class_names)
        names = class_texts([class_names.names[row] for row in rows], class_names.names)
        if class_names.descriptions is not None:
            described = [class_names.descriptions[row] for row in rows]
            descriptions = class_texts(described, described)
    elif labelled and all(name.lstrip("-").isdecimal() for name in data.class_names):
        _log.info("no zero-shot: the class names are numbers; give class_names= to name them")
    elif len(set(data.class_names)) > 1:
        names = class_texts(data.class_names, data.class_names)
    return OwnData(data, names, descriptions, voters, duplicates)


def measure_own(
    own: OwnData,
    cache: EmbeddingCache,
    options: SuiteOptions,
    templates: Sequence[str] = TEMPLATES,
    recall_at: Sequence[int] = RECALL_AT,
) -> Measured:
    """Measure one model by the protocols that the data allow.

    Raises:
        DataError: no image can be decoded, or those that can leave nothing to measure.
    """
    embed = CachedEmbedder(cache)
    images = own.images
    pictures = _pictures(images, images.labels, embed, own.duplicates)
    classes = _labelled(images, pictures)
    several = len(np.unique(classes.labels)) > 1  # any order of one class alone is a perfect one
    captions = [
        (text, place) for place, texts in enumerate(pictures.titles(images)) for text in texts
    ]
    found: dict[str, float] = {}
    by_picture: list[Ranking] = []
    by_text: list[Ranking] = []
    by_class: list[tuple[int, int, float]] = []
    chosen = drawn_queries(classes.labels)
    if several:
        precisions = full_ranking_ap(
            embed.images(images, classes.rows),
            classes.labels,
            queries=embed.queries(images, classes.rows),
        )
        found["i2i_map"] = float(precisions.mean())
        sizes = np.bincount(classes.labels)
        sums = np.bincount(classes.labels, weights=precisions)
        by_class = [
            (int(c), int(sizes[c]), float(sums[c] / sizes[c])) for c in np.flatnonzero(sizes)
        ]
        by_picture = by_pictures(classes, chosen, embed)
        found["i2i_r1"] = protocols.nearest_other(classes, embed, options)["r1"]
    voters = own_voters = None
    if own.voters is not None:
        known = _pictures(*own.voters, embed, own.duplicates)
        voters = _labelled(own.voters[0], known)
        place = {content: row for row, content in enumerate(known.of(known.labels >= 0))}
        asked = pictures.of(pictures.labels >= 0)
        own_voters = np.array([place.get(content, -1) for content in asked], np.int64)
        if held := int((own_voters >= 0).sum()):
            _log.warning(
                "knn_data holds %d of the %d images to classify; none of them votes for itself",
                held, len(own_voters),
            )  # fmt: skip
    if several or (voters and len(classes.labels)):
        voting = replace(classes, voters=voters, own_voters=own_voters)
        found["knn"] = protocols.knn(voting, embed, options)["top1"]
    if len(classes.labels) and own.names is not None:
        named = replace(_by_texts(own.names, classes), templates=tuple(templates))
        top = protocols.zero_shot(named, embed, options)
        found["zero_shot"], found["zero_shot_top5"] = top["top1"], top["top5"]
        by_text = by_names(named, chosen, embed)
    if len(classes.labels) and own.descriptions is not None:
        described = _by_texts(own.descriptions, classes)
        found["t2i_map"] = protocols.descriptions(described, embed, options)["map"]
    if captions:
        owners = np.array([place for _, place in captions], np.int64)
        texts = tuple(text for text, _ in captions)
        found |= protocols.cross_modal(
            Captioned(images, texts, owners, rows=pictures.rows), embed, tuple(recall_at)
        )
    if not found:
        raise DataError(
            "there is nothing to measure: the images have no captions, and labels of one class "
            f"only ({images.class_names[classes.labels[0]]!r}); give images of two classes or more"
        )
    counts = {
        "images": len(pictures.rows),
        "labelled": len(classes.labels),
        "classes": len(np.unique(classes.labels)),
        "captions": len(captions),
        "duplicates": sum(map(len, pictures.members)) - len(pictures.rows),
        "skipped": len(images) - sum(map(len, pictures.members)),
        "texts_cut": embed.texts_cut,
    }
    if captions:
        by_text = by_captions(images, pictures.rows, texts, owners, embed)
    left_out = [*images.left_out, *embed.undecodable(images)]
    class_names = images.class_names
    if own.names is not None:
        class_names = [own.names.texts[text] for text in own.names.of_class]
    return Measured(found, counts, Examples(by_picture, by_text, by_class), class_names, left_out)


@dataclass(frozen=True)
class _Pictures:
    """The distinct pictures among images that can be decoded, P of them.

    Attributes:
        rows: int64 [P], the first image of each.
        labels: int64 [P], its label, or that of its first copy that has one; -1: none has.
        contents: P texts that identify them.
        members: of each, the rows of all its copies, its own among them.
    """

    rows: Int64
    labels: Int64
    contents: list[str]
    members: list[list[int]]

    def of(self, chosen: npt.NDArray[np.bool_]) -> list[str]:
        """Return what identifies the chosen ones."""
        return [self.contents[row] for row in np.flatnonzero(chosen)]

    def titles(self, images: ImageData) -> list[list[str]]:
        """Return the captions of each picture: those of all its copies, each once."""
        return [
            list(dict.fromkeys(text for row in rows for text in images.titles(row)))
            for rows in self.members
        ]


def _pictures(
    images: ImageData, labels: Int64, embed: CachedEmbedder, duplicates: Duplicates
) -> _Pictures:
    """Find the pictures that are the same: by their files' content, or to keep copies by their names."""
    rows = embed.decodable(images).tolist()
    contents = embed.contents(images) if duplicates == "join" else map(images.key, rows)
    members: dict[str, list[int]] = {}
    for row, content in zip(rows, contents, strict=True):
        members.setdefault(content, []).append(row)
    found = []
    disputed = []
    for copies in members.values():
        known = [row for row in copies if labels[row] >= 0]
        found.append(int(labels[known[0]]) if known else -1)
        disputed += [
            f"{images.key(known[0])} and {images.key(row)}"
            for row in known[1:]
            if labels[row] != labels[known[0]]
        ]
    copies_left_out = len(rows) - len(members)
    if copies_left_out:
        _log.warning(
            "%d of %d images are copies of others, byte for byte; each picture is measured once "
            '(duplicates="keep" for all of them): %s',
            copies_left_out, len(rows),
            some((images.key(c[1]) for c in members.values() if len(c) > 1), copies_left_out),
        )  # fmt: skip
    if disputed:
        _log.warning(
            "%d copies have other labels than the first; the first one's counts: %s",
            len(disputed), some(disputed),
        )  # fmt: skip
    return _Pictures(
        np.array([copies[0] for copies in members.values()], np.int64),
        np.array(found, np.int64),
        list(members),
        list(members.values()),
    )


def _labelled(images: ImageData, pictures: _Pictures) -> Labelled:
    """Make a data set of the pictures that have a label."""
    chosen = pictures.labels >= 0
    return Labelled(images, pictures.labels[chosen], rows=pictures.rows[chosen])


def _by_texts(texts: ClassTexts, classes: Labelled) -> Labelled:
    """Make a data set whose labels are the texts of the classes."""
    return replace(classes, labels=texts.of_class[classes.labels], names=tuple(texts.texts))


def _shared_labels(data: ImageData, other: ImageData) -> Int64:
    """Find the label in `data` of each class of `other` (int64 [C of other]); new ones for its own classes.

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
            f"{some(map(repr, other.class_names[:3]))} and "
            f"{some(map(repr, data.class_names[:3]))}; label both alike"
        )
    mismatch = difference("data", data.class_names, "knn_data", other.class_names)
    if mismatch:
        _log.warning("k-NN: %s", mismatch)
    for key in keys(other):
        label_of.setdefault(key, len(label_of))
    return np.array([label_of[key] for key in keys(other)], dtype=np.int64)
