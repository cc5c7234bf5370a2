"""ImageNet-1k (val and train), ImageNet-Sketch, ImageNet-A, ObjectNet and FGVC-Aircraft.

Labels are the data sets' own. ImageNet's classes are its 1,000 synset ids in sorted order (the order
of open_clip's names, and of cls in CLIP_benchmark's shards), for -Sketch and -A too. Each data set is
also read in CLIP_benchmark's layout (see `pymcip.benchmarks.webdataset`), with the same labels.
"""

from __future__ import annotations

import csv
import functools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path

import numpy as np

from pymcip.benchmarks import webdataset
from pymcip.benchmarks.contract import (
    AbsentError,
    DataSet,
    Int64,
    Labelled,
    SuiteOptions,
    check_counts,
)
from pymcip.data import ImageData, list_images
from pymcip.data.images import IMAGE_SUFFIXES
from pymcip.data.sources import some
from pymcip.errors import DataError, MissingDependencyError
from pymcip.progress import progress

# Prompts of "Learning Transferable Visual Models From Natural Language Supervision" (openai/CLIP,
# data/prompts.md) for FGVC-Aircraft.
AIRCRAFT_TEMPLATES = (
    "a photo of a {}, a type of aircraft.",
    "a photo of the {}, a type of aircraft.",
)
AIRCRAFT_IMAGES = {"train": 3_334, "trainval": 6_667, "test": 3_333}

SOLUTION = "LOC_val_solution.csv"  # of Kaggle's ILSVRC
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"  # of the development kit, as is meta.mat
DEVELOPMENT_KITS = ("ILSVRC2012_devkit_t12/data", "data", ".")

_IMAGENET_VAL = {"images": 50_000, "classes": 1_000}
_IMAGENET_TRAIN = {"images": 1_281_167, "classes": 1_000}
_SKETCH = {"images": 50_889, "classes": 1_000}
_IMAGENET_A = {"images": 7_500, "classes": 200}
_OBJECTNET = {"images": 18_574, "classes": 113}
_VAL_PER_CLASS = 50

_SYNSET = re.compile(r"n\d{8}")
# Hugging Face's copy of ImageNet-1k appends the synset to the name.
_VAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})(?:_(n\d{8}))?")
_IMAGENET_FOLDERS = (
    "imagenet1k",
    "imagenet-1k",
    "imagenet",
    "ImageNet",
    "ILSVRC2012",
    "imagenet-object-localization-challenge",
    "wds_imagenet1k",
)


def read_imagenet_val(folder: Path, options: SuiteOptions) -> Labelled:
    """Read ImageNet-1k's 50,000 validation images, 50 of each of the 1,000 classes.

    They lie in a folder per synset, or all in one folder; then their classes are taken from the
    synsets in their names (Hugging Face), from LOC_val_solution.csv (Kaggle), or from the
    development kit, whose ILSVRC2012_ID (1 to 1,000, not in the order of the synsets) meta.mat maps
    to synsets.

    Raises:
        AbsentError: there are no validation images.
        DataError: there are other images among them, or some are missing or without a class.
        MissingDependencyError: the development kit is needed, and SciPy is missing.
    """
    if webdataset.is_layout(folder):
        return _imagenet_shards(folder, "test", IMAGENET_VAL.title, _IMAGENET_VAL, options)
    places = ("val", "ILSVRC/Data/CLS-LOC/val", "Data/CLS-LOC/val", "ILSVRC2012_img_val", ".")
    place = _find_split(folder, places, IMAGENET_VAL, "ILSVRC2012_val_")
    folders, files = _entries(place)
    if folders:
        names, labels = _list_classes(place, IMAGENET_VAL.title, synsets(), "ILSVRC2012_val_")
    else:
        names, labels = _list_flat_val(folder, place, files, options)
    notes = check_counts(IMAGENET_VAL.title, _count(labels), _IMAGENET_VAL, options)
    if not notes:  # complete, but images may lie in folders of other classes
        even = int(np.sum(np.bincount(labels) == _VAL_PER_CLASS))
        what = f"classes of {_VAL_PER_CLASS} images"
        notes = check_counts(IMAGENET_VAL.title, {what: even}, {what: 1_000}, options)
    return _imagenet(list_images(place, names), labels, notes)


def read_imagenet_train(folder: Path, options: SuiteOptions) -> Labelled:
    """Read ImageNet-1k's 1,281,167 training images from a folder per synset.

    Raises:
        AbsentError: there are no training images.
        DataError: there are other images among them, or some are missing.
    """
    if webdataset.is_layout(folder):
        return _imagenet_shards(folder, "train", IMAGENET_TRAIN.title, _IMAGENET_TRAIN, options)
    places = (
        "train",
        "ILSVRC/Data/CLS-LOC/train",
        "Data/CLS-LOC/train",
        "ILSVRC2012_img_train",
        ".",
    )
    place = _find_split(folder, places, IMAGENET_TRAIN, "n")
    names, labels = _list_classes(place, IMAGENET_TRAIN.title, synsets(), "{}_")
    notes = check_counts(IMAGENET_TRAIN.title, _count(labels), _IMAGENET_TRAIN, options)
    return _imagenet(list_images(place, names), labels, notes)


def read_imagenet_sketch(folder: Path, options: SuiteOptions) -> Labelled:
    """Read ImageNet-Sketch's 50,889 images of ImageNet's 1,000 classes.

    Raises:
        AbsentError: there are no images.
        DataError: some are missing, or there are folders of other classes.
    """
    if webdataset.is_layout(folder):
        return _imagenet_shards(folder, "test", IMAGENET_SKETCH.title, _SKETCH, options)
    place = _find_split(folder, ("sketch", "ImageNet-Sketch", "."), IMAGENET_SKETCH, "")
    names, labels = _list_classes(place, IMAGENET_SKETCH.title, synsets(), "")
    notes = check_counts(IMAGENET_SKETCH.title, _count(labels), _SKETCH, options)
    return _imagenet(list_images(place, names), labels, notes)


def read_imagenet_a(folder: Path, options: SuiteOptions) -> Labelled:
    """Read ImageNet-A's 7,500 images of 200 of ImageNet's classes.

    Labels are ImageNet's, 0 to 999, so that ImageNet's training images can vote for them; the
    candidates of zero-shot are the 200, whichever of them have images.

    Raises:
        AbsentError: there are no images.
        DataError: some are missing, or there are folders of other classes.
    """
    known = synsets("imagenet_a_synsets.txt")
    label_of = {synset: label for label, synset in enumerate(synsets())}
    candidates = tuple(label_of[synset] for synset in known)
    if webdataset.is_layout(folder):
        return webdataset.read_labelled(
            folder,
            "test",
            IMAGENET_A.title,
            _IMAGENET_A,
            options,
            class_ids=candidates,
            names=imagenet_names(),
            templates=imagenet_templates(),
        )
    place = _find_split(folder, ("imagenet-a", "."), IMAGENET_A, "")
    names, labels = _list_classes(place, IMAGENET_A.title, known, "")
    notes = check_counts(IMAGENET_A.title, _count(labels), _IMAGENET_A, options)
    own = np.array(candidates, np.int64)[labels]
    return _imagenet(list_images(place, names), own, notes, candidates)


def read_objectnet(folder: Path, options: SuiteOptions) -> Labelled:
    """Read ObjectNet's 18,574 images of the 113 classes that it shares with ImageNet.

    The classes are in the order of ObjectNet's folder names. Prompts call them by ObjectNet's own
    labels in lower case ("t-shirt", "drill") and are ImageNet's 80, as in wise-ft and CLIP_benchmark;
    CLIP has no list of prompts for ObjectNet. `options.objectnet_border` pixels are cut off each
    side: the red border that marks the pictures is 2 pixels wide. CLIP_benchmark leaves it on, in
    its shards too; wise-ft cuts it off.

    Raises:
        AbsentError: there are no images.
        DataError: some are missing, or the mappings are missing or contradict the folders.
    """
    if webdataset.is_layout(folder):
        read = webdataset.read_labelled(
            folder, "test", OBJECTNET.title, _OBJECTNET, options, templates=imagenet_templates()
        )
        images, labels, classes, notes = read.images, read.labels, read.names, read.notes
    else:
        place = _objectnet_folder(folder)
        titles = _objectnet_titles(place)
        found, labels = _list_classes(place / "images", OBJECTNET.title, sorted(titles), None)
        notes = check_counts(OBJECTNET.title, _count(labels), _OBJECTNET, options)
        images = list_images(place / "images", found)
        classes = tuple(titles[name].lower() for name in sorted(titles))
    border = options.objectnet_border
    return Labelled(
        images=images.cropped((border, border, -border, -border)) if border > 0 else images,
        labels=labels,
        names=classes,
        templates=imagenet_templates(),
        notes=notes,
    )


def read_aircraft_test(folder: Path, options: SuiteOptions) -> Labelled:
    """Read FGVC-Aircraft's 3,333 test images of 100 variants; see `read_aircraft_database`."""
    return _read_aircraft(folder, "test", AIRCRAFT_TEST, options)


def read_aircraft_database(folder: Path, options: SuiteOptions) -> Labelled:
    """Read the images that vote for FGVC-Aircraft's test images.

    They are the 6,667 of trainval or the 3,334 of train, as `options.aircraft_database` says. Labels
    are the variants in the order of variants.txt. The banner with the photographer's name, 20 pixels
    at the bottom, stays on the pictures, as in CLIP's evaluations.

    Raises:
        AbsentError: the data set is not there. CLIP_benchmark's shards have train and test only.
        DataError: lists or images are missing, a list has malformed or double lines, or the split
            shares images with the test.
    """
    return _read_aircraft(folder, options.aircraft_database, AIRCRAFT_DATABASE, options)


@functools.cache
def synsets(name: str = "imagenet_synsets.txt") -> tuple[str, ...]:
    """Return synset ids in sorted order, ImageNet's 1,000 or those of another list of timm's.

    Raises:
        MissingDependencyError: timm, which open_clip needs, has no such list.
    """
    try:
        text = resources.files("timm.data").joinpath("_info", name).read_text(encoding="utf-8")
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise MissingDependencyError(
            f"timm has no list {name} ({error}); install one that has: pip install 'timm>=1.0'"
        ) from error
    return tuple(text.split())


@functools.cache
def imagenet_names() -> tuple[str, ...]:
    """Return what prompts call ImageNet's 1,000 classes, as OpenAI's CLIP does."""
    import open_clip

    return tuple(open_clip.IMAGENET_CLASSNAMES)


@functools.cache
def imagenet_templates() -> tuple[str, ...]:
    """Return OpenAI's 80 prompts for ImageNet, with `{}` for the name."""
    import open_clip

    return tuple(template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES)


def _imagenet(
    images: ImageData,
    labels: Int64,
    notes: tuple[str, ...],
    candidates: tuple[int, ...] | None = None,
) -> Labelled:
    return Labelled(images, labels, imagenet_names(), imagenet_templates(), candidates, notes)


def _imagenet_shards(
    folder: Path, split: str, title: str, expected: Mapping[str, int], options: SuiteOptions
) -> Labelled:
    names, templates = imagenet_names(), imagenet_templates()
    return webdataset.read_labelled(
        folder, split, title, expected, options, names=names, templates=templates
    )


def _count(labels: Int64) -> dict[str, int]:
    return {"images": len(labels), "classes": len(np.unique(labels))}


def _entries(place: Path) -> tuple[list[str], list[str]]:
    """List a folder's visible folders and its images, sorted."""
    folders, files = [], []
    with os.scandir(place) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue  # .DS_Store and the like
            if _is_image(entry.name):
                files.append(entry.name)
            elif entry.is_dir():
                folders.append(entry.name)
    return sorted(folders), sorted(files)


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES  # noqa: PTH122  a million names


def _find_split(folder: Path, places: Iterable[str], data: DataSet, stem: str) -> Path:
    """Return the first of the places that holds images or folders.

    The folder itself (".") may be the one of another split: the names of its images must begin with
    `stem`.
    """
    for name in places:
        place = folder / name
        if not place.is_dir():
            continue
        folders, files = _entries(place)
        if name == ".":
            classes = [each for each in folders if _SYNSET.fullmatch(each)]
            samples = files[:1] + [each for one in classes[:3] for each in _entries(place / one)[1]]
            if samples and samples[0].startswith(stem):
                return place
        elif folders or files:
            return place
    raise AbsentError(f"{data.title}: {folder} holds none of its images. {data.how_to_get()}")


def _list_classes(
    place: Path, title: str, known: Sequence[str], stem: str | None
) -> tuple[list[str], Int64]:
    """List the images of a folder per class: names below `place`, and labels int64 [N].

    Args:
        place: holds the folders.
        title: the data set's, for messages.
        known: the folders' names in the order of the labels.
        stem: what images' names begin with, `{}` for the folder's; None: folders that are not known
            are of no concern.

    Raises:
        DataError: folders are unknown, images lie outside of them or have other names, or there are
            none.
    """
    folders, files = _entries(place)
    unknown = [] if stem is None else sorted(set(folders) - set(known))
    problems = []
    if unknown:
        problems.append(f"folders that are none of its {len(known):,} classes: {some(unknown)}")
    if files:
        problems.append(f"images outside of the classes' folders: {some(files)}")
    names: list[str] = []
    sizes = []
    foreign: list[str] = []
    present = set(folders)
    listed = [(label, name) for label, name in enumerate(known) if name in present]
    for label, name in progress(listed, description=f"listing {title}", unit="folder"):
        _, found = _entries(place / name)
        start = (stem or "").replace("{}", name)
        foreign += [f"{name}/{each}" for each in found if not each.startswith(start)]
        names += [f"{name}/{each}" for each in found]
        sizes.append((label, len(found)))
    if foreign:
        form = (stem or "").replace("{}", "SYNSET")
        problems.append(f"images whose names don't begin with {form}: {some(foreign)}")
    if not names:
        problems.append("no images in folders of its classes")
    if problems:
        raise DataError(
            f"{title}: {place} has {'; '.join(problems)}. Needed: a folder per class, such as "
            f"{known[0]}, with its images and nothing else; is this another data set or split?"
        )
    labels = np.repeat(
        np.array([label for label, _ in sizes], np.int64), [size for _, size in sizes]
    )
    return names, labels


def _list_flat_val(
    folder: Path, place: Path, files: list[str], options: SuiteOptions
) -> tuple[list[str], Int64]:
    """List validation images that lie in one folder: names and labels int64 [N]."""
    numbers: dict[int, str] = {}
    own: dict[int, str] = {}
    odd, twice = [], []
    for name in files:
        match = _VAL_NAME.fullmatch(os.path.splitext(name)[0])  # noqa: PTH122
        number = int(match[1]) if match else 0
        if match is None:
            odd.append(name)
        elif number in numbers:
            twice.append(name)
        else:
            numbers[number] = name
            if match[2]:
                own[number] = match[2]
    problems = []
    if odd:
        problems.append(f"images not named ILSVRC2012_val_NNNNNNNN.JPEG: {some(odd)}")
    if twice:
        problems.append(f"images that are there twice: {some(twice)}")
    if problems:
        raise DataError(
            f"{IMAGENET_VAL.title}: {place} has {'; '.join(problems)}. Needed: the validation images, "
            "each once, or a folder per synset"
        )
    source, truth = "their names", own
    if len(own) < len(numbers):
        source, truth = _find_truth(folder, place)
    missing = sorted(set(truth) - set(numbers))
    unlabelled = sorted(set(numbers) - set(truth))
    label_of = {synset: label for label, synset in enumerate(synsets())}
    unknown = sorted({synset for synset in truth.values() if synset not in label_of})
    if unlabelled:
        problems.append(f"{source} has no class of {_val_names(unlabelled)}")
    if unknown:
        problems.append(f"{source} names classes that are not ImageNet-1k's: {some(unknown)}")
    if missing and not options.allow_partial:
        problems.append(f"{source} lists images that are missing: {_val_names(missing)}")
    if problems:
        raise DataError(
            f"{IMAGENET_VAL.title}: {place}: {'; '.join(problems)}. Needed: the 50,000 validation "
            "images and their classes"
        )
    order = sorted(numbers)
    labels = np.array([label_of[truth[number]] for number in order], np.int64)
    return [numbers[number] for number in order], labels


def _val_names(numbers: Sequence[int]) -> str:
    return some((f"ILSVRC2012_val_{number:08d}" for number in numbers[:6]), len(numbers))


def _find_truth(folder: Path, place: Path) -> tuple[str, dict[int, str]]:
    """Find the validation images' synsets by number: in the images' folder or in those above it."""
    above = [place]
    while above[-1] != folder and above[-1] != above[-1].parent:
        above.append(above[-1].parent)
    for each in [*above, folder.parent]:
        if (each / SOLUTION).is_file():
            return SOLUTION, _read_solution(each / SOLUTION)
        for kit in DEVELOPMENT_KITS:
            if (each / kit / GROUND_TRUTH).is_file():
                return GROUND_TRUTH, _read_development_kit(each / kit)
    raise DataError(
        f"{IMAGENET_VAL.title}: the images of {place} lie in one folder, and nothing tells their "
        f"classes. Sort them into a folder per synset, or put Kaggle's {SOLUTION} into {folder}, or "
        f"unpack ILSVRC2012_devkit_t12.tar.gz there ({DEVELOPMENT_KITS[0]}/{GROUND_TRUTH}, meta.mat)"
    )


def _read_solution(path: Path) -> dict[int, str]:
    """Read Kaggle's solution: an image's id, then a synset and four edges for each of its boxes."""
    truth: dict[int, str] = {}
    problems = []
    for line, row in enumerate(csv.reader(_lines(path, IMAGENET_VAL.title)), start=1):
        if row == ["ImageId", "PredictionString"] or not row:
            continue
        match = _VAL_NAME.fullmatch(row[0])
        words = row[1].split() if len(row) == 2 else []
        classes = set(words[::5])
        if match is None or len(words) % 5 or len(classes) != 1:
            problems.append(f"line {line}: {','.join(row)[:60]!r}")
        elif int(match[1]) in truth:
            problems.append(f"line {line}: {row[0]} for the second time")
        else:
            truth[int(match[1])] = classes.pop()
    if problems or not truth:
        raise DataError(
            f"{IMAGENET_VAL.title}: {path}: {some(problems) or 'no lines'}; needed: "
            "ILSVRC2012_val_NNNNNNNN,SYNSET LEFT TOP RIGHT BOTTOM, the last five once per box and all "
            "of one synset"
        )
    return truth


def _read_development_kit(folder: Path) -> dict[int, str]:
    """Read the development kit: line i is the ILSVRC2012_ID of image i, and meta.mat maps it."""
    path = folder / GROUND_TRUTH
    synset_of = _read_meta(folder / "meta.mat")
    ids = [line.strip() for line in _lines(path, IMAGENET_VAL.title)]
    while ids and not ids[-1]:
        ids.pop()
    wrong = [
        f"line {number}: {text[:40]!r}"
        for number, text in enumerate(ids, start=1)
        if not (text.isascii() and text.isdecimal() and int(text) in synset_of)
    ]
    if wrong or not ids:
        raise DataError(
            f"{IMAGENET_VAL.title}: {path}: {some(wrong) or 'no lines'}; needed: in each line the "
            f"ILSVRC2012_ID of a class of {folder / 'meta.mat'}, counted from 1"
        )
    return {number: synset_of[int(text)] for number, text in enumerate(ids, start=1)}


def _read_meta(path: Path) -> dict[int, str]:
    """Read the synsets of the classes (those without children) by their ILSVRC2012_ID."""
    if not path.is_file():
        raise DataError(
            f"{IMAGENET_VAL.title}: {path} is missing; it is part of ILSVRC2012_devkit_t12.tar.gz and "
            f"maps the numbers of {GROUND_TRUTH} to synsets"
        )
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise MissingDependencyError(
            f"{path} is a MATLAB file, and SciPy reads it: pip install 'pymcip[benchmarks]'"
        ) from error
    try:
        table = np.atleast_1d(loadmat(path, squeeze_me=True, variable_names=["synsets"])["synsets"])
        rows = zip(table["ILSVRC2012_ID"], table["WNID"], table["num_children"], strict=True)
        return {int(number): str(synset) for number, synset, children in rows if int(children) == 0}
    except Exception as error:  # loadmat raises errors of many types on damaged files
        raise DataError(
            f"{IMAGENET_VAL.title}: {path} can't be read: {type(error).__name__}: {error}. It is part "
            "of ILSVRC2012_devkit_t12.tar.gz; unpack that again"
        ) from error


def _objectnet_folder(folder: Path) -> Path:
    for place in (folder, folder / "objectnet-1.0", folder / "objectnet-1.0" / "objectnet-1.0"):
        if (place / "images").is_dir():
            return place
    raise AbsentError(f"{OBJECTNET.title}: {folder} holds no images/. {OBJECTNET.how_to_get()}")


def _objectnet_titles(place: Path) -> dict[str, str]:
    """Give ObjectNet's label of each folder whose class is one of ImageNet's too."""
    title_of = _mapping(place, "folder_to_objectnet_label.json")
    shared = set(_mapping(place, "objectnet_to_imagenet_1k.json"))
    folders, _ = _entries(place / "images")
    problems = []
    unknown = sorted(set(folders) - set(title_of))
    if unknown:
        problems.append(
            f"images/ has folders that folder_to_objectnet_label.json lacks: {some(unknown)}"
        )
    untold = sorted(shared - set(title_of.values()))
    if untold:
        problems.append(f"no folder has a label of objectnet_to_imagenet_1k.json: {some(untold)}")
    titles = {name: title for name, title in title_of.items() if title in shared}
    if len(set(titles.values())) < len(titles):
        problems.append("folder_to_objectnet_label.json gives several folders one label")
    if problems:
        raise DataError(
            f"{OBJECTNET.title}: {place}: {'; '.join(problems)}. Take images and mappings from one "
            "copy of objectnet-1.0.zip"
        )
    return titles


def _mapping(place: Path, name: str) -> dict[str, str]:
    # clip_benchmark copies the mappings beside the folder objectnet-1.0.
    paths = [place / "mappings" / name, place / name, place.parent / name]
    path = next((each for each in paths if each.is_file()), None)
    if path is None:
        raise DataError(
            f"{OBJECTNET.title}: {paths[0]} is missing; it is part of objectnet-1.0.zip and tells the "
            "classes"
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{OBJECTNET.title}: {path} can't be read as JSON: {error}") from error
    if not isinstance(value, dict) or not all(isinstance(each, str) for each in value.values()):
        raise DataError(f"{OBJECTNET.title}: {path}: needed: an object of texts by text")
    return value


def _read_aircraft(folder: Path, split: str, data: DataSet, options: SuiteOptions) -> Labelled:
    expected = {"images": AIRCRAFT_IMAGES[split], "classes": 100}
    if webdataset.is_layout(folder):
        if split == "trainval" and not (folder / split).is_dir():
            raise AbsentError(
                f"{data.title}: {folder} holds CLIP_benchmark's shards, which have no split trainval. "
                'Let the split train vote with aircraft_database="train", or get the original data set'
            )
        return webdataset.read_labelled(
            folder, split, data.title, expected, options, templates=AIRCRAFT_TEMPLATES
        )
    place = _aircraft_folder(folder, data)
    variants = [line.strip() for line in _lines(place / "variants.txt", data.title) if line.strip()]
    if len(set(variants)) < len(variants) or not variants:
        raise DataError(
            f"{data.title}: {place / 'variants.txt'} has {len(variants)} lines, "
            f"{len(set(variants))} of them different; needed: each variant once"
        )
    listed = _aircraft_list(place, split, variants, data.title)
    if split != "test" and (place / "images_variant_test.txt").is_file():
        shared = set(listed) & set(_aircraft_list(place, "test", variants, data.title))
        if shared:
            raise DataError(
                f"{data.title}: images_variant_{split}.txt and images_variant_test.txt of {place} share "
                f"{len(shared)} images: {some(sorted(shared))}. Get the lists again"
            )
    labels = np.fromiter(listed.values(), np.int64, len(listed))
    notes = check_counts(data.title, _count(labels), expected, options)
    images = list_images(place, [f"images/{number}.jpg" for number in listed])
    return Labelled(images, labels, tuple(variants), AIRCRAFT_TEMPLATES, notes=notes)


def _aircraft_folder(folder: Path, data: DataSet) -> Path:
    for place in (folder / "fgvc-aircraft-2013b" / "data", folder / "data", folder):
        if (place / "variants.txt").is_file() or (place / "images").is_dir():
            return place
    raise AbsentError(f"{data.title}: {folder} holds no variants.txt. {data.how_to_get()}")


def _aircraft_list(place: Path, split: str, variants: Sequence[str], title: str) -> dict[str, int]:
    """Read a split's lines, an image's number and its variant: labels by number, in their order."""
    path = place / f"images_variant_{split}.txt"
    label_of = {variant: label for label, variant in enumerate(variants)}
    listed: dict[str, int] = {}
    problems = []
    for line, text in enumerate(_lines(path, title), start=1):
        number, _, variant = text.strip().partition(" ")
        if not number and not variant:
            continue
        if re.fullmatch(r"\d{7}", number) is None or variant not in label_of:
            problems.append(f"line {line}: {text.strip()[:60]!r}")
        elif number in listed:
            problems.append(f"line {line}: {number} for the second time")
        else:
            listed[number] = label_of[variant]
    if problems or not listed:
        raise DataError(
            f"{title}: {path}: {some(problems) or 'no lines'}; needed: an image's seven digits, a "
            "space, and a variant of variants.txt, each image once"
        )
    return listed


def _lines(path: Path, title: str) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise DataError(f"{title}: {path} is missing; the data set comes with it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{title}: {path} can't be read as UTF-8 text: {error}") from error


IMAGENET_VAL = DataSet(
    name="imagenet1k-val",
    title="ImageNet-1k val",
    folders=_IMAGENET_FOLDERS,
    source="https://image-net.org/download-images (ILSVRC 2012), "
    "https://www.kaggle.com/c/imagenet-object-localization-challenge or "
    "https://huggingface.co/datasets/clip-benchmark/wds_imagenet1k",
    layout="""
val/n01440764/ILSVRC2012_val_00000293.JPEG   1,000 folders named by synset ids, 50 images each
or val/ILSVRC2012_val_00000001.JPEG          all 50,000 in it (or in ILSVRC/Data/CLS-LOC/val/), with
   LOC_val_solution.csv                      Kaggle's, or
   ILSVRC2012_devkit_t12/data/               meta.mat, ILSVRC2012_validation_ground_truth.txt
or test/{nshards.txt,0.tar,…}                CLIP_benchmark's shards
""",
    read=read_imagenet_val,
)
IMAGENET_TRAIN = DataSet(
    name="imagenet1k-train",
    title="ImageNet-1k train",
    folders=_IMAGENET_FOLDERS,
    source=IMAGENET_VAL.source,
    layout="""
train/n01440764/n01440764_10026.JPEG         1,000 folders named by synset ids, 1,281,167 images
                                             (or in ILSVRC/Data/CLS-LOC/train/)
or train/{nshards.txt,0.tar,…}               CLIP_benchmark's shards
""",
    read=read_imagenet_train,
)
IMAGENET_SKETCH = DataSet(
    name="imagenet-sketch",
    title="ImageNet-Sketch",
    folders=(
        "imagenet-sketch",
        "imagenet_sketch",
        "ImageNet-Sketch",
        "sketch",
        "wds_imagenet_sketch",
    ),
    source="https://github.com/HaohanWang/ImageNet-Sketch or "
    "https://huggingface.co/datasets/clip-benchmark/wds_imagenet_sketch",
    layout="""
sketch/n01440764/sketch_0.JPEG               1,000 folders named by synset ids, 50,889 images
or test/{nshards.txt,0.tar,…}                CLIP_benchmark's shards
""",
    read=read_imagenet_sketch,
)
IMAGENET_A = DataSet(
    name="imagenet-a",
    title="ImageNet-A",
    folders=("imagenet-a", "imagenet_a", "ImageNet-A", "wds_imagenet-a"),
    source="https://github.com/hendrycks/natural-adv-examples or "
    "https://huggingface.co/datasets/clip-benchmark/wds_imagenet-a",
    layout="""
n01498041/*.jpg                              200 folders named by synset ids, 7,500 images
or test/{nshards.txt,0.tar,…}                CLIP_benchmark's shards
""",
    read=read_imagenet_a,
)
OBJECTNET = DataSet(
    name="objectnet",
    title="ObjectNet",
    folders=("objectnet", "objectnet-1.0", "ObjectNet", "wds_objectnet"),
    source="https://objectnet.dev/download.html or "
    "https://huggingface.co/datasets/clip-benchmark/wds_objectnet",
    layout="""
objectnet-1.0/images/air_freshener/*.png     313 folders, of which 113 are used
objectnet-1.0/mappings/folder_to_objectnet_label.json
objectnet-1.0/mappings/objectnet_to_imagenet_1k.json
or test/{nshards.txt,0.tar,…}                CLIP_benchmark's shards
""",
    read=read_objectnet,
)
_AIRCRAFT_FOLDERS = (
    "fgvc-aircraft",
    "fgvc-aircraft-2013b",
    "fgvc_aircraft",
    "wds_fgvc_aircraft",
)
_AIRCRAFT_SOURCE = (
    "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/ or "
    "https://huggingface.co/datasets/clip-benchmark/wds_fgvc_aircraft"
)
AIRCRAFT_TEST = DataSet(
    name="fgvc-aircraft-test",
    title="FGVC-Aircraft test",
    folders=_AIRCRAFT_FOLDERS,
    source=_AIRCRAFT_SOURCE,
    layout="""
fgvc-aircraft-2013b/data/images/1514522.jpg
fgvc-aircraft-2013b/data/variants.txt        100 variants
fgvc-aircraft-2013b/data/images_variant_test.txt   3,333 lines such as "1514522 707-320"
or test/{nshards.txt,0.tar,…}                CLIP_benchmark's shards
""",
    read=read_aircraft_test,
)
AIRCRAFT_DATABASE = DataSet(
    name="fgvc-aircraft-trainval",
    title="FGVC-Aircraft trainval (or train)",
    folders=_AIRCRAFT_FOLDERS,
    source=_AIRCRAFT_SOURCE,
    layout="""
fgvc-aircraft-2013b/data/images/1025794.jpg
fgvc-aircraft-2013b/data/variants.txt        100 variants
fgvc-aircraft-2013b/data/images_variant_trainval.txt   6,667 lines; images_variant_train.txt: 3,334
or train/{nshards.txt,0.tar,…}               CLIP_benchmark's shards: aircraft_database="train" only
""",
    read=read_aircraft_database,
)
