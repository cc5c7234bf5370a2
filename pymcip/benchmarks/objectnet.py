"""ObjectNet: the classes that it shares with ImageNet."""

from __future__ import annotations

from pathlib import Path

from pymcip.benchmarks import webdataset
from pymcip.benchmarks.contract import AbsentError, DataSet, Labelled, SuiteOptions, check_counts
from pymcip.benchmarks.folders import count_labels, first_folder, list_classes, list_entries
from pymcip.benchmarks.imagenet_names import imagenet_templates
from pymcip.benchmarks.readers import read_json
from pymcip.data import list_images
from pymcip.data.sources import some
from pymcip.errors import DataError

OBJECTNET_COUNTS = {"images": 18_574, "classes": 113}


def _read(data: DataSet, folder: Path, options: SuiteOptions) -> Labelled:
    """Read ObjectNet's 18,574 images of the 113 classes that it shares with ImageNet.

    The classes are in the order of ObjectNet's folder names. Prompts call them by ObjectNet's own
    labels in lower case ("t-shirt", "drill") and are ImageNet's 80, as in wise-ft and CLIP_benchmark;
    CLIP has no list of prompts for ObjectNet. `options.objectnet_border` pixels are cut off each
    side: the red border that marks the pictures is 2 pixels wide. By default it stays on, as in the
    figures that open_clip and the paper publish, and in CLIP_benchmark's shards; wise-ft cuts it off.

    Raises:
        AbsentError: there are no images.
        DataError: some are missing, or the mappings are missing or contradict the folders.
    """
    if webdataset.is_layout(folder):
        read = webdataset.read_labelled(
            folder,
            "test",
            data.title,
            OBJECTNET_COUNTS,
            options,
            templates=imagenet_templates(),
        )
        images, labels, classes, notes = read.images, read.labels, read.names, read.notes
    else:
        place = first_folder(
            folder,
            ("", "objectnet-1.0", "objectnet-1.0/objectnet-1.0"),
            lambda path: (path / "images").is_dir(),
        )
        if not (place / "images").is_dir():
            raise AbsentError(f"{folder} holds no images/")
        titles = _titles(data, place)
        found, labels = list_classes(place / "images", data.title, sorted(titles), None)
        notes = check_counts(data.title, count_labels(labels), OBJECTNET_COUNTS, options)
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


def _titles(data: DataSet, place: Path) -> dict[str, str]:
    """Map each folder whose class is one of ImageNet's too to ObjectNet's label of it."""
    title_of = _mapping(data, place, "folder_to_objectnet_label.json")
    shared = set(_mapping(data, place, "objectnet_to_imagenet_1k.json"))
    folders, _ = list_entries(place / "images")
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
            f"{data.title}: {place}: {'; '.join(problems)}. Take images and mappings from one "
            "copy of objectnet-1.0.zip"
        )
    return titles


def _mapping(data: DataSet, place: Path, name: str) -> dict[str, str]:
    # clip_benchmark copies the mappings beside the folder objectnet-1.0.
    paths = [place / "mappings" / name, place / name, place.parent / name]
    path = next((each for each in paths if each.is_file()), None)
    if path is None:
        raise DataError(
            f"{data.title}: {paths[0]} is missing; it is part of objectnet-1.0.zip and says what "
            "the classes are; unpack it again"
        )
    value = read_json(path, data.title)
    if not all(isinstance(each, str) for each in value.values()):
        raise DataError(f"{data.title}: {path}: needed: an object of texts by text")
    return value


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
    reader=_read,
)
