"""Retrieval, k-NN and zero-shot metrics: pure functions of arrays, all in percent.

Common to all of them: embeddings [N, D] of any real type are L2-normalised to fp32, and rankings
order by (score descending, index ascending), the score being the inner product in fp64 rounded to
fp32 (`pymcip.ops.canonical`). The first of a ranking come from `pymcip.ops.topk`, the places of
relevant rows in a full one from `pymcip.ops.ranks`; both are the same on every device, with any
number of threads. No ranking is ever whole in memory, which stays bounded (a few hundred MB). NumPy
arrays and tensors are taken; tensors are worked on where they are.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pymcip.errors import ConfigError, DataError
from pymcip.ops import ranks as ranks_of
from pymcip.ops import topk
from pymcip.ops.canonical import canonical_unit

if TYPE_CHECKING:
    from pymcip.model import ClipModel

Array = npt.ArrayLike | Tensor
Int64: TypeAlias = npt.NDArray[np.int64]
Float64: TypeAlias = npt.NDArray[np.float64]

KNN_TEMPERATURE = 0.07  # of the weighted vote, as in DINO (arXiv 2104.14294)
REVISITED = {  # what counts as relevant and what is junk (Radenović et al., section 4)
    "easy": (("easy",), ("junk", "hard")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("junk", "easy")),
}
_SCORES_AT_ONCE = 1 << 22
_RANKS_AT_ONCE = 1 << 20


def full_ranking_map(embeddings: Array, labels: Array) -> float:
    """Measure image-to-image mAP over the full ranking, as GPR1200 defines it.

    The mean of `full_ranking_ap`, which says how, what is taken and what is raised. Not comparable
    with mAP variants that leave the query out or that stop at rank k.

    Returns:
        Mean AP over the N queries, percent.
    """
    return float(full_ranking_ap(embeddings, labels).mean())


def full_ranking_ap(embeddings: Array, labels: Array) -> Float64:
    """Measure each image's average precision over the full ranking, as GPR1200 defines it.

    Every image is a query and ranks all N images. The query itself is in the ranking and counts as
    relevant. AP = (1 / n_rel) * sum over hits of (hit number / 1-based rank), the step form.

    Args:
        embeddings: float [N, D], N >= 1.
        labels: int [N]; images with equal labels are relevant for each other.

    Returns:
        float64 [N], percent. Means of slices are the means of GPR1200's parts.

    Raises:
        DataError: wrong shapes, values that are not finite, or negative labels.

    Source: Schall et al., GPR1200 (MMM 2022).
    """
    vectors = _unit(embeddings, "embeddings")
    classes = _labels(labels, "labels", vectors)
    _rows_match(vectors, "embeddings", classes, "labels")
    return 100 * _average_precisions(vectors, classes, vectors, classes)


def trapezoidal_map(
    ranks: npt.ArrayLike,
    positives: Sequence[npt.ArrayLike],
    junk: Sequence[npt.ArrayLike] | None = None,
) -> float:
    """Measure mAP of given rankings by the trapezoidal rule, as Oxford5k, revisitop and INSTRE do.

    Junk is taken out of the ranking, so that what follows moves up. For positive j (0-based) at
    0-based rank r the precision before it is p0 = j / r (1 where r = 0) and with it
    p1 = (j + 1) / (r + 1); AP is the sum of (p0 + p1) / 2 over the positives that are ranked, divided
    by the number of all distinct positives, ranked or not. Queries without positives are left out.

    Args:
        ranks: int [database, queries]: column q holds database rows, best first, as in revisitop.
            It may be cut short; places that hold -1 are empty.
        positives: of each query the relevant database rows, 0-based, in any order.
        junk: of each query the rows to take out; None: no junk. A row that is both stays, and moves
            up what follows (revisitop).

    Returns:
        Mean AP over the queries with positives, percent.

    Raises:
        DataError: wrong shapes or lists, a row ranked twice, or no query has positives.

    Source: Radenović et al., Revisiting Oxford and Paris (CVPR 2018), their evaluate.py; for INSTRE
    the split of Iscen et al. (CVPR 2017).
    """
    columns = _ranking(ranks, len(positives))
    wanted = _row_lists(positives, "positives", len(positives))
    ignored = _row_lists(junk, "junk", len(positives))
    places = [
        _listed(column, np.union1d(*lists))
        for column, *lists in zip(columns.T, wanted, ignored, strict=True)
    ]
    return _mean(_trapezoids(places, wanted, ignored)[0], "positives")


def trapezoidal_retrieval(
    queries: Array,
    database: Array,
    positives: Sequence[npt.ArrayLike],
    junk: Sequence[npt.ArrayLike] | None = None,
) -> float:
    """Measure `trapezoidal_map` of the full rankings of a database's embeddings.

    Args:
        queries: float [N, D].
        database: float [M, D].
        positives: of each query the relevant rows of `database`, 0-based, in any order.
        junk: of each query the rows to take out of the ranking; None: no junk.

    Returns:
        Mean AP over the queries with positives, percent.

    Raises:
        DataError: wrong shapes or lists, values that are not finite, or no query has positives.
    """
    asked, known = _pair(queries, "queries", database, "database")
    wanted = _row_lists(positives, "positives", len(asked), len(known))
    ignored = _row_lists(junk, "junk", len(asked), len(known))
    needed = [
        np.union1d(*lists) if len(lists[0]) else lists[0]
        for lists in zip(wanted, ignored, strict=True)
    ]
    places = _placed(asked, known, needed)
    return _mean(_trapezoids(places, wanted, ignored)[0], "positives")


def revisited_map(
    ranks: npt.ArrayLike,
    gnd: Sequence[Mapping[str, Any]],
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """Measure revisitop's figures (ROxford, RParis) of given rankings.

    Easy: relevant are the easy rows, junk and hard ones are taken out of the ranking. Medium: easy
    and hard ones are relevant, junk is taken out. Hard: hard ones are relevant, junk and easy ones are
    taken out. AP as in `trapezoidal_map`. Precision at k is the share of relevant rows among the
    first min(k, 1-based rank of the last relevant one); 0 if none is ranked. Queries without
    relevant rows are left out of a difficulty's means.

    Args:
        ranks: int [database, queries], as `trapezoidal_map` takes it.
        gnd: of each query the rows "easy", "hard" and "junk" (0-based; junk may be missing), as in
            gnd_roxford5k.pkl's "gnd". Other keys are ignored.
        ks: the k wanted of mP@k.

    Returns:
        {"easy_map", "medium_map", "hard_map", "easy_mp1", …, "hard_mp10"}, percent.

    Raises:
        ConfigError: a k below 1.
        DataError: wrong shapes or lists, a row ranked twice, or a difficulty for which no query
            has relevant rows: there is no mean of nothing.

    Source: Radenović et al., Revisiting Oxford and Paris (CVPR 2018), their evaluate.py.
    """
    columns = _ranking(ranks, len(gnd))
    lists = _truth(gnd, len(gnd), None)
    needed = [np.unique(np.concatenate(own)) for own in zip(*lists.values(), strict=True)]
    places = [_listed(column, rows) for column, rows in zip(columns.T, needed, strict=True)]
    return _revisited(places, lists, ks)


def revisited_retrieval(
    queries: Array,
    database: Array,
    gnd: Sequence[Mapping[str, Any]],
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """Measure `revisited_map` of the full rankings of a database's embeddings.

    Args:
        queries: float [N, D].
        database: float [M, D].
        gnd: of each query the rows of `database` that are "easy", "hard" and "junk".
        ks: the k wanted of mP@k.

    Returns:
        As `revisited_map`, percent.

    Raises:
        ConfigError: a k below 1.
        DataError: wrong shapes or lists, values that are not finite, or a difficulty for which no
            query has relevant rows.
    """
    asked, known = _pair(queries, "queries", database, "database")
    lists = _truth(gnd, len(asked), len(known))
    needed = [np.unique(np.concatenate(own)) for own in zip(*lists.values(), strict=True)]
    return _revisited(_placed(asked, known, needed), lists, ks)


def recall_at_k(
    embeddings: Array,
    labels: Array,
    ks: Sequence[int] = (1, 2, 4, 8),
    *,
    queries: Array | None = None,
    query_labels: Array | None = None,
) -> dict[int, float]:
    """Measure R@k: how often one of the k nearest images has the query's label.

    Without `queries` it is all against all, each image against the *others*: the diagonal is masked,
    so an exact duplicate of the query may be its nearest neighbour. An image whose class has no
    other image can't be hit and counts as a miss.

    Args:
        embeddings: float [N, D]; N >= 2 without `queries`.
        labels: int [N].
        ks: the k wanted; where fewer images are ranked, all of them count.
        queries: float [Q, D], which rank all N.
        query_labels: int [Q].

    Returns:
        {k: percent of the queries}.

    Raises:
        ConfigError: a k below 1, or only one of queries and query_labels.
        DataError: wrong shapes, fewer than two images, values that are not finite.

    Source: Musgrave et al., A Metric Learning Reality Check (arXiv 2003.08505), section 2; for
    CUB-200, Cars-196 and SOP all against all.
    """
    counts = _counts(ks)
    if (queries is None) != (query_labels is None):
        raise ConfigError("queries and query_labels belong together; give both, or neither")
    known = _unit(embeddings, "embeddings")
    classes = _labels(labels, "labels", known)
    _rows_match(known, "embeddings", classes, "labels")
    if queries is None:
        if len(known) < 2:
            raise DataError(
                "R@k needs at least 2 images (each ranks the others), got 1; give more images"
            )
        asked, targets = known, classes
    else:
        asked = _unit(queries, "queries").to(known.device)
        targets = _labels(query_labels, "query_labels", known)
        _rows_match(asked, "queries", targets, "query_labels")
        _widths_match(known, "embeddings", asked, "queries")
    most = min(max(counts), len(known) - (queries is None))
    hits = dict.fromkeys(counts, 0)
    for rows in _chunks(len(asked), most):
        if queries is None:
            found, _ = _nearest_others(known, most, rows)
        else:
            found, _ = topk(asked[rows], known, most)
        hit = classes[found] == targets[rows, None]
        for k in counts:
            hits[k] += int(hit[:, :k].any(dim=1).sum())
    return {k: 100 * count / len(asked) for k, count in hits.items()}


def nearest_other_recall(embeddings: Array, labels: Array) -> float:
    """Measure R@1, all against all: how often the nearest *other* image has the query's label.

    Args:
        embeddings: float [N, D], N >= 2.
        labels: int [N].

    Returns:
        Percent of the N images: `recall_at_k` for k = 1, which says more.

    Raises:
        DataError: wrong shapes, fewer than two images, values that are not finite.
    """
    return recall_at_k(embeddings, labels, (1,))[1]


def knn_classify(
    bank: Array,
    bank_labels: Array,
    queries: Array,
    k: int = 21,
    vote: Literal["weighted", "majority"] = "weighted",
    *,
    temperature: float = KNN_TEMPERATURE,
    leave_one_out: bool = False,
) -> npt.NDArray[np.int64]:
    """Label each query by the vote of its k nearest bank rows.

    Args:
        bank: float [M, D].
        bank_labels: int [M], any values >= 0.
        queries: float [N, D].
        k: neighbours that vote; all of them where the bank has fewer.
        vote: `"weighted"` sums exp(cos / temperature) by class in fp32 (DINO), ties go to the lower
            label; `"majority"` counts, ties go to the larger summed cosine, then the lower label.
        temperature: of the weighted vote.
        leave_one_out: the queries are the bank's own rows, in order, and no row votes for itself.

    Returns:
        int64 [N], values of `bank_labels`.

    Raises:
        ConfigError: k < 1, a temperature <= 0, or an unknown vote.
        DataError: wrong shapes, an empty bank, values that are not finite.
    """
    if vote not in ("weighted", "majority"):
        raise ConfigError(f"vote={vote!r} is not allowed; allowed: 'weighted', 'majority'")
    if k < 1:
        raise ConfigError(f"k={k} is not allowed; it must be >= 1")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ConfigError(
            f"temperature={temperature} is not allowed; it must be finite and above 0"
        )
    if not temperature > 0:
        raise ConfigError(f"temperature={temperature} is not allowed; it must be > 0")
    known = _unit(bank, "bank")
    asked = _unit(queries, "queries").to(known.device)
    classes = _labels(bank_labels, "bank_labels", known)
    _rows_match(known, "bank", classes, "bank_labels")
    _widths_match(known, "bank", asked, "queries")
    if leave_one_out and len(asked) != len(known):
        raise DataError(
            f"leave_one_out needs the bank's own rows as queries, got {len(asked)} queries for "
            f"{len(known)} bank rows; give the same embeddings, or leave_one_out=False"
        )
    if leave_one_out and len(known) < 2:
        raise DataError("leave_one_out with one image leaves nobody to vote; give more images")
    count = min(k, len(known) - leave_one_out)
    values, compact = torch.unique(classes, return_inverse=True)
    if leave_one_out:
        neighbours, cosines = _nearest_others(known, count)
    else:
        neighbours, cosines = topk(asked, known, count)
    answers = torch.empty(len(asked), dtype=torch.int64, device=known.device)
    for rows in _chunks(len(asked), len(values)):
        voters = compact[neighbours[rows]]
        ballots = torch.zeros(len(voters), len(values), device=known.device)
        if vote == "weighted":
            # Where exp would overflow less the best cosine, which changes no vote.
            best = cosines[rows, :1] if temperature < 0.0125 else 0.0
            ballots.scatter_add_(1, voters, torch.exp((cosines[rows] - best) / temperature))
            winners = ballots.argmax(dim=1)
        else:
            ballots.scatter_add_(1, voters, torch.ones_like(cosines[rows]))
            similarity = torch.zeros_like(ballots).scatter_add_(1, voters, cosines[rows])
            leading = ballots == ballots.max(dim=1, keepdim=True).values
            winners = similarity.masked_fill(~leading, -torch.inf).argmax(dim=1)
        answers[rows] = values[winners]
    return answers.cpu().numpy()


def zero_shot_classifier(
    clip: ClipModel, names: Sequence[str], templates: Sequence[str], *, batch_size: int = 256
) -> Tensor:
    """Make one unit vector per class: encode every template, normalise, mean, normalise.

    Args:
        clip: the model whose text tower encodes.
        names: C class names, in the order of the labels 0..C-1.
        templates: prompts with `{}` for the name, such as "a photo of a {}.".
        batch_size: prompts per forward pass.

    Returns:
        float32 [C, D] on the CPU.

    Raises:
        ConfigError: no names, no templates, or a template without `{}`.

    Source: Radford et al., CLIP (arXiv 2103.00020), prompt ensembling.
    """
    if not names:
        raise ConfigError("zero-shot needs at least one class name, got none")
    if not templates or any("{}" not in template for template in templates):
        raise ConfigError(
            f"templates={list(templates)!r}: give at least one, each with {{}} for the class name"
        )
    step = max(1, batch_size // len(templates))
    parts = []
    for start in range(0, len(names), step):
        group = names[start : start + step]
        prompts = [template.replace("{}", name) for name in group for template in templates]
        parts.append(prompt_ensemble(clip.encode_texts(prompts, batch_size), len(templates)))
    return torch.cat(parts)


def prompt_ensemble(vectors: Tensor, templates: int) -> Tensor:
    """Make one unit vector per class of float [C * templates, D]: normalise, mean, normalise."""
    unit = nn.functional.normalize(vectors, dim=-1)
    means = unit.view(-1, templates, unit.shape[-1]).mean(dim=1)
    return nn.functional.normalize(means, dim=-1)


def zero_shot_accuracy(
    images: Array, classifier: Array, labels: Array, top: Sequence[int] = (1, 5)
) -> dict[int, float]:
    """Measure the top-k accuracy of the nearest class vectors.

    Args:
        images: float [N, D].
        classifier: float [C, D], row c for label c (`zero_shot_classifier`).
        labels: int [N], 0 <= label < C.
        top: the k wanted. Where C < k every image is a hit.

    Returns:
        {k: percent of the N images whose class is among the first k}.

    Raises:
        DataError: wrong shapes, labels out of range, values that are not finite.
    """
    vectors = _unit(images, "images")
    classes = _unit(classifier, "classifier").to(vectors.device)
    targets = _labels(labels, "labels", vectors)
    _rows_match(vectors, "images", targets, "labels")
    _widths_match(vectors, "images", classes, "classifier")
    if int(targets.max()) >= len(classes):
        raise DataError(
            f"labels go up to {int(targets.max())}, but the classifier has {len(classes)} rows; "
            "give one row per class, in the order of the labels"
        )
    first, _ = topk(vectors, classes, max([1, *top]))
    hits = first == targets[:, None]
    return {k: 100 * int(hits[:, : max(0, k)].sum()) / len(vectors) for k in top}


def cross_modal_recall(
    image_emb: Array, text_emb: Array, text_to_image: Array, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Measure text-to-image and image-to-text R@k, with any number of captions per image.

    T2I: each caption is a query against all images; a hit if its image is among the first k; mean
    over captions. I2T: each image that has a caption is a query against all captions; a hit if any
    of its own is among the first k; mean over those images. Images without a caption are
    distractors in T2I and no queries in I2T.

    Args:
        image_emb: float [N, D].
        text_emb: float [M, D].
        text_to_image: int [M], the image row that each caption belongs to.
        ks: the k wanted.

    Returns:
        {"t2i_r1": percent, ..., "i2t_r1": percent, ...}.

    Raises:
        DataError: wrong shapes, rows out of range, values that are not finite.

    Source: the COCO (Karpathy test) and Flickr30k retrieval protocol.
    """
    images = _unit(image_emb, "image_emb")
    texts = _unit(text_emb, "text_emb").to(images.device)
    owners = _labels(text_to_image, "text_to_image", images)
    _rows_match(texts, "text_emb", owners, "text_to_image")
    _widths_match(images, "image_emb", texts, "text_emb")
    if int(owners.max()) >= len(images):
        raise DataError(
            f"text_to_image names image row {int(owners.max())} of {len(images)} images"
        )
    described = torch.unique(owners)
    most = max([1, *ks])
    first, _ = topk(texts, images, most)
    t2i = first == owners[:, None]
    first, _ = topk(images[described], texts, most)
    i2t = (first >= 0) & (owners[first] == described[:, None])
    return {
        f"{way}_r{k}": 100 * int(hits[:, : max(0, k)].any(dim=1).sum()) / len(hits)
        for way, hits in (("t2i", t2i), ("i2t", i2t))
        for k in ks
    }


def class_text_map(image_emb: Array, labels: Array, class_text_emb: Array) -> float:
    """Measure text-to-image mAP with one text per class, such as a product's description.

    Each class's text ranks all N images; relevant are the images of the class. AP as in
    `full_ranking_map` (step form over the full ranking). Classes without images are left out.

    Args:
        image_emb: float [N, D].
        labels: int [N], 0 <= label < C.
        class_text_emb: float [C, D], row c for label c.

    Returns:
        Mean AP over the classes that have images, percent.

    Raises:
        DataError: wrong shapes, labels out of range, values that are not finite.
    """
    images = _unit(image_emb, "image_emb")
    texts = _unit(class_text_emb, "class_text_emb").to(images.device)
    classes = _labels(labels, "labels", images)
    _rows_match(images, "image_emb", classes, "labels")
    _widths_match(images, "image_emb", texts, "class_text_emb")
    if int(classes.max()) >= len(texts):
        raise DataError(
            f"labels go up to {int(classes.max())}, but there are {len(texts)} class texts; give "
            "one per class, in the order of the labels"
        )
    present = torch.unique(classes)
    return 100 * float(_average_precisions(texts[present], present, images, classes).mean())


def _average_precisions(queries: Tensor, wanted: Tensor, bank: Tensor, classes: Tensor) -> Float64:
    """Compute the step AP, float64 [N], of the full ranking of `bank` [M, D] for each query [N, D].

    Relevant are the rows whose class is the query's `wanted` one; every query has some.
    """
    members = classes.sort(stable=True).indices
    values, counts = torch.unique(classes, return_counts=True)
    own = torch.searchsorted(values, wanted)
    firsts = (counts.cumsum(0) - counts)[own]  # of each query's relevant rows, in `members`
    sizes = counts[own].cpu().numpy()
    precisions = np.empty(len(queries))
    for rows in _shares(sizes, _RANKS_AT_ONCE):
        indptr = np.concatenate([[0], np.cumsum(sizes[rows])])
        owners = np.repeat(np.arange(len(indptr) - 1), sizes[rows])
        numbers = np.arange(indptr[-1]) - indptr[owners]  # of a query's relevant rows
        places = firsts[rows][torch.from_numpy(owners).to(bank.device)]
        places += torch.from_numpy(numbers).to(bank.device)
        found = ranks_of(queries[rows], bank, indptr, members[places]).cpu().numpy()
        # In the order of their ranks within each query.
        found = np.sort(owners * len(bank) + found) - owners * len(bank)
        precisions[rows] = np.add.reduceat((numbers + 1) / (found + 1), indptr[:-1]) / sizes[rows]
    return precisions


def _placed(queries: Tensor, bank: Tensor, needed: Sequence[Int64]) -> list[tuple[Int64, Int64]]:
    """Find the ranks of each query's needed rows of `bank`: these rows and ranks, per query."""
    sizes = np.array([len(rows) for rows in needed], dtype=np.int64)
    places: list[tuple[Int64, Int64]] = []
    for part in _shares(sizes, _RANKS_AT_ONCE):
        indptr = np.concatenate([[0], np.cumsum(sizes[part])])
        rows = needed[part]
        found = ranks_of(queries[part], bank, indptr, np.concatenate(rows)).cpu().numpy()
        places += zip(rows, np.split(found, indptr[1:-1]), strict=True)
    return places


def _listed(column: Int64, needed: Int64) -> tuple[Int64, Int64]:
    """Those of the needed rows that a ranking lists, and their ranks."""
    ranks = np.flatnonzero(np.isin(column, needed))
    rows = column[ranks]
    values, counts = np.unique(rows, return_counts=True)
    if len(values) < len(rows):
        raise DataError(
            f"a ranking lists row {int(values[counts.argmax()])} {int(counts.max())} times; list each "
            "database row once"
        )
    return rows, ranks


def _trapezoids(
    places: Sequence[tuple[Int64, Int64]], positives: Sequence[Int64], junk: Sequence[Int64]
) -> tuple[list[float], list[Int64]]:
    """Compute the trapezoidal AP of each query that has positives, and their ranks without junk."""
    precisions, kept = [], []
    for (rows, ranks), wanted, ignored in zip(places, positives, junk, strict=True):
        if not len(wanted):
            continue
        found = np.sort(ranks[_among(rows, wanted)])
        found = found - np.searchsorted(np.sort(ranks[_among(rows, ignored)]), found)
        hits = np.arange(len(found))
        before = np.where(found > 0, hits / np.maximum(found, 1), 1.0)
        precisions.append(float((before + (hits + 1) / (found + 1)).sum()) / (2 * len(wanted)))
        kept.append(found)
    return precisions, kept


def _among(rows: Int64, wanted: Int64) -> npt.NDArray[np.bool_]:
    """Which of the rows are among the wanted ones, which are sorted."""
    if not len(wanted):
        return np.zeros(len(rows), dtype=bool)
    places = np.searchsorted(wanted, rows).clip(max=len(wanted) - 1)
    return np.asarray(wanted[places] == rows)


def _revisited(
    places: Sequence[tuple[Int64, Int64]], lists: Mapping[str, list[Int64]], ks: Sequence[int]
) -> dict[str, float]:
    maps: dict[str, float] = {}
    shares: dict[str, float] = {}
    counts = _counts(ks)
    for difficulty, kinds in REVISITED.items():
        wanted, ignored = (
            [
                np.unique(np.concatenate(own))
                for own in zip(*(lists[kind] for kind in chosen), strict=True)
            ]
            for chosen in kinds
        )
        precisions, kept = _trapezoids(places, wanted, ignored)
        maps[f"{difficulty}_map"] = _mean(precisions, " or ".join(kinds[0]) + " rows")
        for k in counts:
            reached = [min(k, int(found[-1]) + 1) if len(found) else 1 for found in kept]
            hits = [
                float((found < reach).sum()) / reach
                for found, reach in zip(kept, reached, strict=True)
            ]
            shares[f"{difficulty}_mp{k}"] = _mean(hits, "")
    return maps | shares


def _mean(shares: Sequence[float], what: str) -> float:
    """The mean in percent."""
    if not shares:
        raise DataError(
            f"no query has {what}, so that there is nothing to average; check the ground truth"
        )
    return 100 * math.fsum(shares) / len(shares)


def _nearest_others(vectors: Tensor, k: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
    """Find the k nearest other rows of each row [N, D], and their scores; 1 <= k < N."""
    found, scores = topk(vectors[rows], vectors, k + 1)
    itself = found == torch.arange(len(vectors), device=vectors.device)[rows, None]
    itself[:, k] |= ~itself.any(dim=1)  # k + 1 rows that are its equals may all come before it
    return found[~itself].view(-1, k), scores[~itself].view(-1, k)


def _chunks(queries: int, columns: int) -> Iterator[slice]:
    step = max(1, _SCORES_AT_ONCE // max(1, columns))
    for start in range(0, queries, step):
        yield slice(start, min(start + step, queries))


def _shares(sizes: Int64, most: int) -> Iterator[slice]:
    """Consecutive slices whose sizes add up to `most` at most, or of a single one."""
    ends = np.cumsum(sizes)
    first = 0
    while first < len(sizes):
        before = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + most, side="right")))
        yield slice(first, last)
        first = last


def _tensor(values: Any) -> Tensor:
    if isinstance(values, Tensor):
        return values.detach()
    array = np.asarray(values)
    low = array.dtype == np.float16 or array.dtype.name == "bfloat16"  # which torch doesn't know
    if low or not array.flags.writeable or not array.flags.c_contiguous:
        array = np.array(array, dtype=np.float32 if low else None, order="C")
    return torch.from_numpy(array)


def _unit(values: Any, name: str) -> Tensor:
    """Make unit fp32 rows [N, D]; a zero row stays zero."""
    tensor = _tensor(values)
    if tensor.ndim != 2 or 0 in tensor.shape:
        raise DataError(
            f"{name} has shape {tuple(tensor.shape)}; needed: [rows, dimensions], neither is 0"
        )
    if tensor.dtype.is_complex or tensor.dtype == torch.bool:
        raise DataError(f"{name} has dtype {tensor.dtype}; needed: real numbers")
    rows = tensor.float()
    # The sum of what is not finite isn't; that of finite values is but for overflow.
    if not math.isfinite(float(rows.sum())) and not bool(torch.isfinite(rows).all()):
        bad = int((~torch.isfinite(rows)).any(dim=1).sum())
        raise DataError(
            f"{name} has NaN or infinite values in {bad} of {len(rows)} rows; embed them again"
        )
    return canonical_unit(rows)


def _pair(first: Any, name: str, second: Any, other_name: str) -> tuple[Tensor, Tensor]:
    """Unit rows of both, on the second's device."""
    known = _unit(second, other_name)
    asked = _unit(first, name).to(known.device)
    _widths_match(asked, name, known, other_name)
    return asked, known


def _labels(values: Any, name: str, like: Tensor) -> Tensor:
    """Make int64 [N], all >= 0, where `like` is."""
    tensor = _tensor(values)
    if tensor.ndim != 1 or tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        raise DataError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}; needed: integers [rows]")
    tensor = tensor.to(device=like.device, dtype=torch.int64)
    if len(tensor) and int(tensor.min()) < 0:
        raise DataError(
            f"{name} has negative values (unlabelled rows?); leave those rows out first"
        )
    return tensor


def _rows_match(vectors: Tensor, name: str, others: Tensor, other_name: str) -> None:
    if len(vectors) != len(others):
        raise DataError(
            f"{name} has {len(vectors)} rows, {other_name} has {len(others)}; give one per row"
        )


def _widths_match(first: Tensor, name: str, second: Tensor, other_name: str) -> None:
    if first.shape[1] != second.shape[1]:
        raise DataError(
            f"{name} has {first.shape[1]} dimensions, {other_name} has {second.shape[1]}; "
            "both must come from the same model"
        )


def _counts(ks: Sequence[int]) -> list[int]:
    counts = [operator.index(k) for k in ks]
    if not counts or min(counts) < 1:
        raise ConfigError(f"ks={list(ks)} is not allowed; give at least one k, each >= 1")
    return counts


def _ranking(ranks: Any, queries: int) -> Int64:
    columns = np.asarray(ranks)
    if columns.ndim != 2 or columns.dtype.kind not in "iu" or columns.shape[1] != queries:
        raise DataError(
            f"ranks is {columns.dtype} {columns.shape}; needed: integers [database, queries], with "
            f"a column for each of the {queries} queries"
        )
    return columns.astype(np.int64, copy=False)


def _truth(
    gnd: Sequence[Mapping[str, Any]], queries: int, database: int | None
) -> dict[str, list[Int64]]:
    """Lists of rows of each query, by kind."""
    for number, truth in enumerate(gnd):
        missing = [kind for kind in ("easy", "hard") if kind not in truth]
        if missing:
            raise DataError(
                f"gnd[{number}] has {', '.join(map(str, truth)) or 'nothing'}, but no "
                f"{' and no '.join(missing)}; needed: lists of rows 'easy', 'hard' and, if any, 'junk'"
            )
    return {
        kind: _row_lists([truth.get(kind, ()) for truth in gnd], f"gnd {kind}", queries, database)
        for kind in ("easy", "hard", "junk")
    }


def _row_lists(
    lists: Sequence[Any] | None, name: str, queries: int, database: int | None = None
) -> list[Int64]:
    """Distinct rows of each query, sorted; none of any query for None."""
    if lists is None:
        return [np.empty(0, dtype=np.int64)] * queries
    if len(lists) != queries:
        raise DataError(f"{name} has {len(lists)} lists for {queries} queries; give one per query")
    found = []
    for number, values in enumerate(lists):
        rows = np.asarray(values)
        if rows.size == 0:
            rows = rows.astype(np.int64)  # NumPy makes floats of an empty list
        if rows.dtype.kind not in "iu":
            raise DataError(f"{name}[{number}] holds {rows.dtype}; needed: integers, rows from 0")
        rows = np.unique(rows).astype(np.int64)
        if len(rows) and (rows[0] < 0 or (database is not None and rows[-1] >= database)):
            allowed = "" if database is None else f", below {database}"
            raise DataError(
                f"{name}[{number}] goes from {rows[0]} to {rows[-1]}; needed: rows from 0{allowed} "
                "(MATLAB files count from 1)"
            )
        found.append(rows)
    return found
