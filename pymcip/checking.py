"""`pymcip.check`: what pymcip sees in a data source, before anybody trains on it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from pymcip.configs import CheckConfig
from pymcip.data import Captions, ImageData, load_captions, load_images
from pymcip.data.column_names import columns_named
from pymcip.data.decode import kind_of_suffix
from pymcip.data.sources import some
from pymcip.data.stores import FileStore
from pymcip.data.tally import LeftOut
from pymcip.errors import DataError, DecodeError
from pymcip.files import atomic_path, write_text
from pymcip.outputs import output_folder
from pymcip.progress import progress

THUMBNAILS = 10  # of a class, and rows of them
_SIDE = 96  # pixels of a thumbnail
_LONG = 300  # characters, above which CLIP's 77 tokens may not be enough

_log = logging.getLogger("pymcip.data")


@dataclass(frozen=True)
class CheckResult:
    """What `check` found.

    Attributes:
        counts: of images, labelled, classes, captions, duplicates (of images: files with the content
            of another one; of captions: rows with the text of another one) and left_out.
        left_out: how many things are left out, by reason.
        suspicious: what may be wrong, in words; [] if nothing was found.
        table: all of it as text.
        out: the folder with check.txt, skipped.tsv and thumbnails.png, or None.
    """

    counts: dict[str, int]
    left_out: dict[str, int]
    suspicious: list[str]
    table: str
    out: Path | None


def check(config: CheckConfig | Any = None, /, **options: Any) -> CheckResult:
    """Say what pymcip sees in sources of images or of captions; nothing is embedded.

    Takes the fields of `CheckConfig` as keywords, or a ready config, or the sources first:
    `check("shop/train")`. Copies are found by the content of files of equal size.

    Raises:
        ConfigError: an option is wrong.
        DataError: the sources are neither images nor captions, or what any other stage would refuse.
        OutputExistsError: `out` is not empty, and `overwrite` was not given.
    """
    if config is not None and not isinstance(config, CheckConfig):
        config, options = None, {"data": config, **options}
    chosen = CheckConfig.make(config, options)
    data, no_images = _load(chosen)
    if isinstance(data, Captions):
        counts, suspicious = _check_captions(data)
        if no_images:
            suspicious.insert(0, f"these are read as captions, for as images: {no_images}")
    else:
        counts, suspicious = _check_images(data)
    left_out = dict(Counter(item.reason for item in data.left_out))
    counts["left_out"] = len(data.left_out)
    sizes = {} if isinstance(data, Captions) else _class_sizes(data)
    table = _table(counts, left_out, suspicious, sizes)
    out = None
    if chosen.out is not None:
        read = data.files() if isinstance(data, ImageData) else []
        with output_folder(chosen, read=read) as out:
            write_text(out / "check.txt", table)
            write_text(out / "skipped.tsv", _listed(data.left_out))
            if isinstance(data, ImageData):
                with atomic_path(out / "thumbnails.png") as temporary:
                    _thumbnails(data).save(temporary, "PNG")
    return CheckResult(counts, left_out, suspicious, table, out)


def _load(config: CheckConfig) -> tuple[ImageData | Captions, str]:
    """Index images, or read captions where there are no images, and say why there are none.

    A reason that any file of captions gives is left out.
    """
    try:
        with columns_named(config.columns):
            return load_images(config.data, labelled=False), ""
    except DataError as error:
        try:
            with columns_named(config.columns):
                captions = load_captions(config.data)
        except DataError as other:
            raise DataError(f"as images: {error}\nas captions: {other}") from error
        return captions, "" if "no column filepath" in str(error) else str(error)


# Images


def _class_sizes(data: ImageData) -> dict[str, int]:
    """Return how many images each class has, the most common class first."""
    sizes = np.bincount(data.labels[data.labels >= 0], minlength=data.num_classes)
    order = np.argsort(-sizes, kind="stable")
    several = len(set(data.class_names)) < data.num_classes
    return {
        data.class_names[c] + (f" (source {data.class_sources[c] + 1})" if several else ""): int(
            sizes[c]
        )
        for c in order
    }


def _check_images(data: ImageData) -> tuple[dict[str, int], list[str]]:
    copies = _copies(data)
    titles = [text for index in range(len(data)) for text in data.titles(index)]
    counts = {
        "images": len(data),
        "labelled": int((data.labels >= 0).sum()),
        "classes": data.num_classes,
        "captions": len(titles),
        "duplicates": sum(len(group) - 1 for group in copies),
    }
    found = []
    sizes = _class_sizes(data)
    single = [name for name, size in sizes.items() if size == 1]
    if single:
        found.append(f"{len(single)} of {len(sizes)} classes have one image: {some(single)}")
    found += _alike(data.class_names)
    if 0 < counts["labelled"] < len(data):
        found.append(f"{len(data) - counts['labelled']} of {len(data)} images have no class")
    unnamed = [
        data.key(index)
        for index in range(len(data))
        if isinstance(data.stores[data.source_ids[index]], FileStore)
        and kind_of_suffix(Path(data.key(index)).suffix.lower()) != "image"
    ]
    if unnamed:
        found.append(
            f"{len(unnamed)} of {len(data)} files have no image's extension and are read as images by "
            f"their content: {some(unnamed[:6], len(unnamed))}"
        )
    empty = [data.key(index) for index in range(len(data)) if data.size(index) == 0]
    if empty:
        found.append(f"{len(empty)} image files are empty: {some(empty)}")
    disputed = [
        f"{data.key(group[0])} = {data.key(index)}"
        for group in copies
        for index in group[1:]
        if data.labels[index] != data.labels[group[0]]
    ]
    if copies:
        pairs = (f"{data.key(group[0])} = {data.key(group[1])}" for group in copies[:6])
        found.append(
            f"{counts['duplicates']} images are copies of others: {some(pairs, len(copies))}"
        )
    if disputed:
        found.append(f"{len(disputed)} copies have another class than the first: {some(disputed)}")
    return counts, found + _odd_texts(titles)


def _copies(data: ImageData) -> list[list[int]]:
    """Find the images whose files are equal: the indices of each group of two or more."""
    by_size: dict[int, list[int]] = {}
    for index in range(len(data)):
        by_size.setdefault(data.size(index), []).append(index)
    asked = [index for size, group in by_size.items() if len(group) > 1 and size for index in group]
    by_content: dict[str, list[int]] = {}
    for index in progress(asked, description="looking for copies", unit="file"):
        try:
            by_content.setdefault(data.digest(index), []).append(index)
        except DecodeError as error:
            _log.warning("left out: %s", error)
    return [group for group in by_content.values() if len(group) > 1]


def _alike(names: Sequence[str]) -> list[str]:
    """Find classes whose names differ in nothing but case, spaces, hyphens and underscores."""
    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        plain = "".join(name.casefold().replace("_", " ").replace("-", " ").split())
        groups.setdefault(plain, []).append(name)
    twins = [" and ".join(map(repr, group)) for group in groups.values() if len(group) > 1]
    return (
        [f"{len(twins)} groups of class names are nearly the same: {some(twins)}"] if twins else []
    )


# Captions


def _check_captions(captions: Captions) -> tuple[dict[str, int], list[str]]:
    counts = {"captions": len(captions), "duplicates": captions.duplicates}
    return counts, _odd_texts(list(captions))


def _odd_texts(texts: Sequence[str]) -> list[str]:
    """Find captions that are no captions, and those that say little."""
    kinds = {
        f"captions have more than {_LONG} characters; a model cuts them at its context": [
            text for text in texts if len(text) > _LONG
        ],
        "captions are web addresses or file names": [
            text for text in texts if " " not in text and ("://" in text or text[-4:-3] == ".")
        ],
        "captions have several lines": [text for text in texts if "\n" in text],
        "captions have one or two characters": [text for text in texts if len(text) < 3],
    }
    found = [
        f"{len(those)} of {len(texts)} {what}: {some((repr(t[:60]) for t in those[:6]), len(those))}"
        for what, those in kinds.items()
        if those
    ]
    text, count = Counter(texts).most_common(1)[0] if texts else ("", 0)
    if count > max(10, len(texts) // 100):
        found.append(f"{count} of {len(texts)} captions are the same: {text[:60]!r}")
    return found


# What is written


def _table(
    counts: dict[str, int], left_out: dict[str, int], suspicious: list[str], sizes: dict[str, int]
) -> str:
    lines = [f"{name.replace('_', ' '):12}{count:>12,}" for name, count in counts.items()]
    if sizes:
        listed = [f"{name} {size:,}" for name, size in sizes.items()]
        lines += ["", f"most common: {', '.join(listed[:THUMBNAILS])}"]
        lines += [f"rarest:      {', '.join(listed[: -THUMBNAILS - 1 : -1])}"]
    for head, parts in (
        ("left out", [f"{count:,} × {reason}" for reason, count in left_out.items()]),
        ("suspicious", suspicious),
    ):
        if parts:
            lines += ["", f"{head}:", *(f"- {part}" for part in parts)]
    return "\n".join(lines) + "\n"


def _listed(left_out: Sequence[LeftOut]) -> str:
    rows = ("\t".join(" ".join(text.split()) for text in (i.key, i.reason)) for i in left_out)
    return "\n".join(["key\treason", *rows]) + "\n"


def _thumbnails(data: ImageData) -> Image.Image:
    """Draw rows of images: the most common classes, then the rarest; or images without classes."""
    rows = list(_rows(data))
    sheet = Image.new("RGB", (THUMBNAILS * (_SIDE + 4), len(rows) * (_SIDE + 20)), "white")
    draw = ImageDraw.Draw(sheet)
    for place, (head, indices) in enumerate(rows):
        top = place * (_SIDE + 20)
        draw.text((4, top + 3), head.encode("latin-1", "replace").decode("latin-1"), fill="black")
        for column, index in enumerate(indices):
            try:
                image = data.read(index)
            except DecodeError:
                draw.text((column * (_SIDE + 4) + 4, top + 60), "not decoded", fill="red")
                continue
            image.thumbnail((_SIDE, _SIDE))
            sheet.paste(image, (column * (_SIDE + 4), top + 18))
    return sheet


def _rows(data: ImageData) -> Iterator[tuple[str, list[int]]]:
    if not data.num_classes:
        chosen = np.linspace(0, len(data) - 1, min(len(data), THUMBNAILS**2)).astype(int).tolist()
        for start in range(0, len(chosen), THUMBNAILS):
            yield "" if start else "images", chosen[start : start + THUMBNAILS]
        return
    sizes = np.bincount(data.labels[data.labels >= 0], minlength=data.num_classes)
    order = np.argsort(-sizes, kind="stable").tolist()
    half = THUMBNAILS // 2
    if len(order) > 2 * half:
        order = order[:half] + order[-half:]
    for label in order:
        members = np.flatnonzero(data.labels == label)
        step = np.linspace(0, len(members) - 1, min(len(members), THUMBNAILS)).astype(int)
        yield f"{data.class_names[label]} ({len(members)})", members[step].tolist()
