"""FGVC-Aircraft: 100 variants of aircraft, with the split that is tested and the one that votes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from pymcip.benchmarks import webdataset
from pymcip.benchmarks.contract import AbsentError, DataSet, Labelled, SuiteOptions, check_counts
from pymcip.benchmarks.folders import any_exists, count_labels, first_folder
from pymcip.benchmarks.readers import read_keyed, read_lines
from pymcip.data import list_images
from pymcip.data.sources import some
from pymcip.errors import DataError

AIRCRAFT_TEMPLATES = (
    "a photo of a {}, a type of aircraft.",
    "a photo of the {}, a type of aircraft.",
)
AIRCRAFT_IMAGES = {"train": 3_334, "trainval": 6_667, "test": 3_333}


def _read(data: DataSet, folder: Path, options: SuiteOptions) -> Labelled:
    """Read the test split, or the one that votes (`options.aircraft_database`).

    Labels are the 100 variants in the order of variants.txt. The banner with the photographer's
    name, 20 pixels at the bottom, stays on the pictures, as in CLIP's evaluations.

    Raises:
        AbsentError: the data set is not there. CLIP_benchmark's shards have train and test only.
        DataError: lists or images are missing, a list has malformed or double lines, or the split
            shares images with the test.
    """
    split = "test" if data is AIRCRAFT_TEST else options.aircraft_database
    title = data.title
    expected = {"images": AIRCRAFT_IMAGES[split], "classes": 100}
    if webdataset.is_layout(folder):
        if split == "trainval" and not (folder / split).is_dir():
            raise AbsentError(
                f"{folder} holds CLIP_benchmark's shards, which have no split trainval. "
                'Let the split train vote with aircraft_database="train", or get the original data set'
            )
        return webdataset.read_labelled(
            folder, split, title, expected, options, templates=AIRCRAFT_TEMPLATES
        )
    marks = ("variants.txt", "images")
    places = ("fgvc-aircraft-2013b/data", "data", "")
    place = first_folder(folder, places, lambda path: any_exists(path, marks))
    if not any_exists(place, marks):
        raise AbsentError(f"{folder} holds no variants.txt")
    variants = [line.strip() for line in read_lines(place / "variants.txt", title) if line.strip()]
    if len(set(variants)) < len(variants) or not variants:
        raise DataError(
            f"{title}: {place / 'variants.txt'} has {len(variants)} lines, "
            f"{len(set(variants))} of them different; needed: each variant once"
        )
    listed = _aircraft_list(place, split, variants, title)
    if split != "test" and (place / "images_variant_test.txt").is_file():
        shared = set(listed) & set(_aircraft_list(place, "test", variants, title))
        if shared:
            raise DataError(
                f"{title}: images_variant_{split}.txt and images_variant_test.txt of {place} share "
                f"{len(shared)} images: {some(sorted(shared))}. Get the lists again"
            )
    labels = np.fromiter(listed.values(), np.int64, len(listed))
    notes = check_counts(title, count_labels(labels), expected, options)
    images = list_images(place, [f"images/{number}.jpg" for number in listed])
    return Labelled(images, labels, tuple(variants), AIRCRAFT_TEMPLATES, notes=notes)


def _aircraft_list(place: Path, split: str, variants: Sequence[str], title: str) -> dict[str, int]:
    """Read a split's lines, an image's number and its variant: labels by number, in their order."""
    label_of = {variant: label for label, variant in enumerate(variants)}

    def parse(line: str) -> tuple[str, int] | None:
        number, _, variant = line.partition(" ")
        if re.fullmatch(r"\d{7}", number) is None or variant not in label_of:
            return None
        return number, label_of[variant]

    needed = "an image's seven digits, a space, and a variant of variants.txt, each image once"
    return read_keyed(place / f"images_variant_{split}.txt", title, parse, needed)


AIRCRAFT_TEST = DataSet(
    name="fgvc-aircraft-test",
    title="FGVC-Aircraft test",
    folders=("fgvc-aircraft", "fgvc-aircraft-2013b", "fgvc_aircraft", "wds_fgvc_aircraft"),
    source="https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/ or "
    "https://huggingface.co/datasets/clip-benchmark/wds_fgvc_aircraft",
    layout="""
fgvc-aircraft-2013b/data/images/1514522.jpg
fgvc-aircraft-2013b/data/variants.txt        100 variants
fgvc-aircraft-2013b/data/images_variant_test.txt   3,333 lines such as "1514522 707-320"
or test/{nshards.txt,0.tar,…}                CLIP_benchmark's shards
""",
    reader=_read,
)
AIRCRAFT_DATABASE = replace(
    AIRCRAFT_TEST,
    name="fgvc-aircraft-trainval",
    title="FGVC-Aircraft trainval (or train)",
    layout="""
fgvc-aircraft-2013b/data/images/1025794.jpg
fgvc-aircraft-2013b/data/variants.txt        100 variants
fgvc-aircraft-2013b/data/images_variant_trainval.txt   6,667 lines; images_variant_train.txt: 3,334
or train/{nshards.txt,0.tar,…}               CLIP_benchmark's shards: aircraft_database="train" only
""",
)
