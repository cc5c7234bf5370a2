"""Captioned public data sets: Flickr30k and COCO.

Both are read in the split of Karpathy & Li (CVPR 2015), "test", from dataset_flickr30k.json and
dataset_coco.json: `images[]` of `split`, `filename`, for COCO `filepath` ("val2014"), and
`sentences[]`, of which `raw` is the caption. COCO's own annotations, `images[]` of `id` and
`file_name` and `annotations[]` of `image_id` and `caption`, are read too: of val2017, which are other
images, and of the Karpathy test split (coco_test_karpathy.json, as CLIP_benchmark has it). Of Flickr30k
CLIP_benchmark's list is read too (flickr30k_test_karpathy.txt).

Images are in the order of the file, and an image's captions in theirs. Captions are taken as they
are written, neither stripped nor in lower case nor without punctuation: evaluations of CLIP do so
(BLIP's and ALBEF's do not), and CLIP's tokenizers drop white space at the ends themselves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from pymcip.benchmarks.contract import (
    AbsentError,
    Captioned,
    DataSet,
    SuiteOptions,
    check_counts,
)
from pymcip.benchmarks.readers import read_json, read_lines
from pymcip.benchmarks.webdataset import is_layout, read_captioned
from pymcip.data import list_images
from pymcip.data.sources import some
from pymcip.errors import DataError

SPLIT = "test"
KARPATHY_SOURCE = "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"

_FLICKR30K_FOLDERS = ("flickr30k", "Flickr30k", "flickr30k_images")
_COCO_FOLDERS = ("coco", "COCO", "mscoco", "MSCOCO", "coco2014", "coco2017")
_JSON_FOLDERS = ("", "caption_datasets", "annotations", "karpathy")

_Listing = dict[str, list[str]]  # file name -> captions, both in the order of the file


@dataclass(frozen=True)
class _Layout:
    """One way in which a data set is laid out.

    Attributes:
        file: the captions' file name, in the data set's folder or in one of `_JSON_FOLDERS`.
        parse: reads it: (path, title) -> listing.
        bases: folders, below the data set's, that the listed names may be relative to.
        images: the folder, below a base, without which there are no images; "": not known.
        expected: the public numbers of images and captions.
        notes: for the table.
    """

    file: str
    parse: Callable[[Path, str], _Listing]
    bases: tuple[str, ...]
    images: str
    expected: Mapping[str, int]
    notes: tuple[str, ...] = ()

    def captions_in(self, folder: Path) -> Path | None:
        places = (folder / place / self.file for place in _JSON_FOLDERS)
        return next((path for path in places if path.is_file()), None)

    def images_in(self, folder: Path) -> bool:
        places = [f"{base}/{self.images}".strip("/") for base in self.bases]
        return any((folder / place).is_dir() for place in places if place)


def _read(
    data: DataSet,
    folder: Path,
    options: SuiteOptions,
    *,
    folders: Sequence[str],
    layouts: Sequence[_Layout],
) -> Captioned:
    """Read the first layout that has captions and images, in `folder` or one more folder down.

    Raises:
        AbsentError: neither images nor captions are there.
        DataError: one of them is missing, the file of captions is malformed, images are missing,
            or the numbers are others.
    """
    title = data.title
    if is_layout(folder):
        return read_captioned(folder, SPLIT, title, layouts[0].expected, options)
    roots = [folder, *(folder / name for name in folders if (folder / name).is_dir())]
    halves = []
    for layout in layouts:
        for root in roots:
            path, has_images = layout.captions_in(root), layout.images_in(root)
            if path is not None and (has_images or not layout.images):
                return _captioned(title, root, path, layout, options)
            if path is not None:
                halves.append(f"{path} is there, but not the images, {root / layout.images}/")
            elif has_images:
                halves.append(
                    f"images are in {root}, but no {layout.file}, neither there nor in "
                    f"{', '.join(f'{place}/' for place in _JSON_FOLDERS if place)}"
                )
    files = " or ".join(layout.file for layout in layouts)
    if not halves:
        raise AbsentError(f"{folder} holds neither {files} nor a folder of images")
    raise DataError(
        f"{title}: {'; '.join(halves)}. Captions of the Karpathy split come from {KARPATHY_SOURCE}"
    )


def _captioned(
    title: str, root: Path, path: Path, layout: _Layout, options: SuiteOptions
) -> Captioned:
    listing = layout.parse(path, title)
    bases = [root / base for base in layout.bases]
    base = next((base for base in bases if any((base / name).is_file() for name in listing)), None)
    if base is None:
        raise DataError(
            f"{title}: none of the {len(listing):,} images that {path} lists is there, such as "
            f"{next(iter(listing))}; looked in {', '.join(map(str, bases))}. Unpack them there"
        )
    if options.allow_partial:
        listing = {name: texts for name, texts in listing.items() if (base / name).is_file()}
    try:
        images = list_images(base, list(listing), kind="captions")
    except DataError as error:
        raise DataError(
            f"{title}: {error}; {path} lists them. Unpack the images again, or give "
            "allow_partial=True to leave them out and have it marked in the table"
        ) from error
    captions = tuple(text for texts in listing.values() for text in texts)
    owners = np.repeat(np.arange(len(images)), [len(texts) for texts in listing.values()])
    found = {"images": len(images), "captions": len(captions)}
    notes = layout.notes + check_counts(title, found, layout.expected, options)
    return Captioned(images, captions, owners.astype(np.int64), notes)


def _parse_karpathy(path: Path, title: str) -> _Listing:
    """Read the images of the test split from dataset_flickr30k.json or dataset_coco.json."""
    document = read_json(path, title)
    dataset = document.get("dataset", title.lower())
    if dataset != title.lower():
        raise DataError(f"{title}: {path} is of {dataset!r}; needed: that of {title.lower()!r}")
    listing: _Listing = {}
    splits: Counter[str] = Counter()
    problems: list[str] = []
    for row, image in enumerate(_rows(document, "images", path, title)):
        split = image.get("split")
        splits[str(split)] += 1
        if split != SPLIT:
            continue
        name, sentences = image.get("filename"), image.get("sentences")
        if isinstance(name, str) and "filepath" in image:
            name = f"{image['filepath']}/{name}"
        texts = [
            sentence.get("raw") if isinstance(sentence, dict) else None
            for sentence in (sentences if isinstance(sentences, list) else [])
        ]
        _add(listing, problems, f"images[{row}]", name, texts)
    if not listing and not problems:
        there = ", ".join(f"{split} {count:,}" for split, count in splits.items())
        problems.append(f"no image of the split {SPLIT!r}, only of {there or 'none'}")
    _refuse(problems, path, title)
    return listing


def _parse_coco(path: Path, title: str, place: str) -> _Listing:
    """Read COCO's own annotations of captions; images lie in the folder `place`."""
    document = read_json(path, title)
    problems: list[str] = []
    texts: dict[Any, list[Any]] = {}
    names: dict[Any, Any] = {}
    for row, image in enumerate(_rows(document, "images", path, title)):
        number = image.get("id")
        if not isinstance(number, int) or number in names:
            problems.append(f"images[{row}]: id {number!r} is no number or there twice")
            continue
        names[number], texts[number] = image.get("file_name"), []
    for row, annotation in enumerate(_rows(document, "annotations", path, title)):
        number = annotation.get("image_id")
        if not isinstance(number, int) or number not in texts:
            problems.append(f"annotations[{row}]: image_id {number!r} is no image's id")
            continue
        texts[number].append(annotation.get("caption"))
    listing: _Listing = {}
    for number, name in names.items():
        full = f"{place}/{name}" if isinstance(name, str) else name
        _add(listing, problems, f"image {number}", full, texts[number])
    if not listing and not problems:
        problems.append("no images")
    _refuse(problems, path, title)
    return listing


def _parse_clip_benchmark(path: Path, title: str) -> _Listing:
    """Read CLIP_benchmark's list: a header, then `NAME.jpg,CAPTION`; captions may hold commas.

    They are taken as CLIP_benchmark takes them, quotes included.
    """
    listing: _Listing = {}
    problems = []
    for row, line in enumerate(read_lines(path, title)[1:], start=2):
        name, comma, caption = line.strip().partition(".jpg,")
        if not line.strip():
            continue
        if not (name and comma and caption.strip()):
            problems.append(f"line {row}: {line[:60]!r}")
            continue
        listing.setdefault(f"{name}.jpg", []).append(caption.strip())
    _refuse(problems, path, title)
    return listing


def _add(
    listing: _Listing, problems: list[str], where: str, name: Any, captions: list[Any]
) -> None:
    """Add an image to the listing, or what is wrong with it to the problems."""
    plain = isinstance(name, str) and bool(name) and not name.endswith("/")
    if not plain or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        problems.append(f"{where}: {name!r} is no file name below the folder of images")
    elif name in listing:
        problems.append(f"{where}: {name} is there twice")
    elif not captions or not all(isinstance(caption, str) for caption in captions):
        problems.append(f"{where}: {name} has no captions, or one that is no text")
    else:
        listing[name] = captions


def _refuse(problems: list[str], path: Path, title: str) -> None:
    if problems:
        raise DataError(
            f"{title}: {path} is not what it must be: {some(problems)}. Get the file again"
        )


def _rows(document: dict[str, Any], key: str, path: Path, title: str) -> list[dict[str, Any]]:
    rows = document.get(key)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(
            f"{title}: {path} has no list of objects {key!r}, only {some(map(repr, document))}. It is "
            "no such file, or damaged: get it again"
        )
    return rows


_FLICKR30K_KARPATHY = _Layout(
    "dataset_flickr30k.json",
    _parse_karpathy,
    (
        "flickr30k-images",
        "flickr30k_images",
        "flickr30k_images/flickr30k_images",
        "images",
        "Images",
        "",
    ),
    "",
    {"images": 1_000, "captions": 5_000},
)
_FLICKR30K_CLIP_BENCHMARK = replace(
    _FLICKR30K_KARPATHY, file="flickr30k_test_karpathy.txt", parse=_parse_clip_benchmark
)
_COCO_KARPATHY = _Layout(
    "dataset_coco.json",
    _parse_karpathy,
    ("", "images"),
    "val2014",
    {"images": 5_000, "captions": 25_010},
)
_COCO_TEST_KARPATHY = replace(
    _COCO_KARPATHY,
    file="coco_test_karpathy.json",
    parse=partial(_parse_coco, place="val2014"),
)
_COCO_VAL2017 = _Layout(
    "captions_val2017.json",
    partial(_parse_coco, place="val2017"),
    ("", "images"),
    "val2017",
    {"images": 5_000, "captions": 25_014},
    ("COCO val2017, not the Karpathy test split",),
)

FLICKR30K = DataSet(
    name="flickr30k",
    title="Flickr30k",
    folders=(*_FLICKR30K_FOLDERS, "wds_flickr30k"),
    source=(
        f"https://shannon.cs.illinois.edu/DenotationGraph/ (images), {KARPATHY_SOURCE} (captions); as "
        "shards from https://huggingface.co/datasets/clip-benchmark/wds_flickr30k"
    ),
    layout="""
dataset_flickr30k.json       (or in caption_datasets/; or flickr30k_test_karpathy.txt)
flickr30k-images/            (or flickr30k_images/, images/)
  1007129816.jpg             all that the split "test" lists: 1,000
""",
    reader=partial(
        _read,
        folders=_FLICKR30K_FOLDERS,
        layouts=(_FLICKR30K_KARPATHY, _FLICKR30K_CLIP_BENCHMARK),
    ),
)
COCO = DataSet(
    name="coco",
    title="COCO",
    folders=(*_COCO_FOLDERS, "wds_mscoco_captions"),
    source=(
        f"http://images.cocodataset.org/zips/val2014.zip (images), {KARPATHY_SOURCE} (captions); as "
        "shards from https://huggingface.co/datasets/clip-benchmark/wds_mscoco_captions"
    ),
    layout="""
dataset_coco.json            (or in caption_datasets/ or annotations/)
val2014/                     (or images/val2014/)
  COCO_val2014_000000391895.jpg   all that the split "test" lists: 5,000
or, for other images than the Karpathy test split:
annotations/captions_val2017.json
val2017/
  000000397133.jpg           5,000
""",
    reader=partial(
        _read, folders=_COCO_FOLDERS, layouts=(_COCO_KARPATHY, _COCO_TEST_KARPATHY, _COCO_VAL2017)
    ),
)
