"""Writers of miniatures of public data sets: the original layouts with a few tiny images each."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.io
from PIL import ImageOps

from pymcip.files import write_json
from tests.conftest import COLOURS, picture, sample_members, write_shard


def save_picture(path: Path, seed: int) -> None:
    """Write a picture of 40 px in the format of the path's ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed, COLOURS[seed % len(COLOURS)]).save(path)


# Captioned


def write_flickr30k(folder: Path) -> list[str]:
    """Write Flickr30k with Karpathy's captions; return the 3 test images, in the file's order.

    As in the original, the splits are mixed, images are not in the order of the listing of the
    folder, raw captions have spaces at their ends, and images of other splits may be missing.
    """
    entries = []
    for row, (name, split) in enumerate(
        [
            ("998845445.jpg", "train"),
            ("1009434119.jpg", "test"),
            ("1007129816.jpg", "test"),
            ("1000092795.jpg", "val"),
            ("101362133.jpg", "test"),
        ]
    ):
        sentences = [
            {
                "tokens": ["caption", str(number), "of", name[:-4]],
                "raw": f"Caption {number} of {name[:-4]} . " + "\n" * (number == 1),
                "imgid": row,
                "sentid": 5 * row + number,
            }
            for number in range(5)
        ]
        entries.append(
            {
                "sentids": [sentence["sentid"] for sentence in sentences],
                "imgid": row,
                "sentences": sentences,
                "split": split,
                "filename": name,
            }
        )
        if split != "train":
            save_picture(folder / "flickr30k-images" / name, row)
    write_json(folder / "dataset_flickr30k.json", {"images": entries, "dataset": "flickr30k"})
    return [str(entry["filename"]) for entry in entries if entry["split"] == "test"]


def write_coco(folder: Path) -> list[str]:
    """Write COCO's val2014 with Karpathy's captions; return the 3 test images.

    The second of them has 6 captions, the others 5. Images of restval lie in val2014 too.
    """
    entries = []
    for row, (number, split, place, captions) in enumerate(
        [
            (391895, "test", "val2014", 5),
            (522418, "restval", "val2014", 5),
            (57870, "train", "train2014", 5),
            (60623, "test", "val2014", 6),
            (483108, "val", "val2014", 5),
            (184613, "test", "val2014", 5),
        ]
    ):
        name = f"COCO_{place}_{number:012d}.jpg"
        entries.append(
            {
                "filepath": place,
                "sentids": list(range(100 * row, 100 * row + captions)),
                "filename": name,
                "imgid": row,
                "split": split,
                "sentences": [
                    {
                        "tokens": ["a"],
                        "raw": f"A {i} of {number}",
                        "imgid": row,
                        "sentid": 100 * row + i,
                    }
                    for i in range(captions)
                ],
                "cocoid": number,
            }
        )
        if place == "val2014":
            save_picture(folder / place / name, row)
    write_json(folder / "dataset_coco.json", {"images": entries, "dataset": "coco"})
    return [
        f"{entry['filepath']}/{entry['filename']}" for entry in entries if entry["split"] == "test"
    ]


def write_coco_val2017(folder: Path) -> list[str]:
    """Write COCO's own val2017 with captions, which are not in the order of the images."""
    numbers = [397133, 37777, 252219]
    for row, number in enumerate(numbers):
        save_picture(folder / "val2017" / f"{number:012d}.jpg", row)
    write_json(
        folder / "annotations" / "captions_val2017.json",
        {
            "info": {"year": 2017},
            "licenses": [],
            "images": [
                {"license": 1, "file_name": f"{number:012d}.jpg", "height": 40, "id": number}
                for number in numbers
            ],
            "annotations": [
                {"image_id": number, "id": 10 * turn + row, "caption": f"Turn {turn} of {number}."}
                for turn in range(5)
                for row, number in enumerate(reversed(numbers))
            ],
        },
    )
    return [f"val2017/{number:012d}.jpg" for number in numbers]


def write_webdataset(
    folder: Path,
    samples: Sequence[Mapping[str, Any]],
    *,
    split: str = "test",
    per_shard: int = 3,
    names: Sequence[str] = (),
    templates: Sequence[str] = ("a photo of a {c}.", "{c}, up close"),
) -> Path:
    """Write CLIP_benchmark's layout: with `names` it is labelled, without them captioned.

    A sample is a dict extension -> content, as `tests.conftest.sample_members` takes it. As
    webdataset's writer has it, members of a sample are in the order of their extensions.
    """
    starts = range(0, len(samples), per_shard)
    for number, start in enumerate(starts):
        members = []
        for row, sample in enumerate(samples[start : start + per_shard], start):
            members += sample_members(f"s{row:07d}", dict(sorted(sample.items())))
        write_shard(folder / split / f"{number}.tar", members)
    (folder / split / "nshards.txt").write_text(f"{len(starts)}\n")
    if names:
        (folder / "classnames.txt").write_text("".join(f"{name}\n" for name in names))
        prompts = "".join(f"{template}\n" for template in templates)
        (folder / "zeroshot_classification_templates.txt").write_text(prompts)
    else:
        (folder / "dataset_type.txt").write_text("retrieval\n")
    return folder


# Classification

# Labels are places among ImageNet's 1,000 sorted synsets. The first two of the development kit's
# own numbering, 1 and 2, are n02119789 and n02100735; its other ids here are made up.
IMAGENET_CLASSES = {"n01440764": 0, "n01498041": 6, "n02100735": 212, "n02119789": 278}
IMAGENET_A_CLASSES = {"n01498041": 6, "n01531178": 11}
DEVELOPMENT_KIT_IDS = {"n02119789": 1, "n02100735": 2, "n01440764": 449, "n01498041": 437}
VAL_CLASSES = ("n02119789", "n01440764", "n02100735", "n01440764", "n01498041", "n02119789")


def val_name(number: int, ending: str = ".JPEG") -> str:
    return f"ILSVRC2012_val_{number:08d}{ending}"


def write_imagenet_val(folder: Path) -> None:
    """Write ImageNet-1k's val, 6 images of 4 classes, in a folder per synset."""
    for number, synset in enumerate(VAL_CLASSES, start=1):
        save_picture(folder / "val" / synset / val_name(number), number)
    (folder / "val" / "n01440764" / f"._{val_name(2)}").write_bytes(b"\0")  # macOS leaves them


def write_imagenet_val_flat(place: Path, ending: str = ".JPEG") -> None:
    """Write the same 6 images as the original archive holds them: all in one folder."""
    for number, _ in enumerate(VAL_CLASSES, start=1):
        save_picture(place / val_name(number, ending), number)


def write_solution(path: Path) -> None:
    """Write Kaggle's LOC_val_solution.csv: unordered, several boxes in a line, a space at the end."""
    rows = [
        f"{val_name(number, '')},{f'{synset} 85 1 499 272 ' * (1 + number % 2)}\n"
        for number, synset in enumerate(VAL_CLASSES, start=1)
    ]
    path.write_text("ImageId,PredictionString\n" + "".join(reversed(rows)))


def write_development_kit(folder: Path) -> None:
    """Write ILSVRC2012_devkit_t12/data: ground truth by ILSVRC2012_ID, and meta.mat."""
    folder.mkdir(parents=True)
    ids = [DEVELOPMENT_KIT_IDS[synset] for synset in VAL_CLASSES]
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{i}\n" for i in ids))
    columns = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children"]
    rows = [(i, synset, "words", "gloss", 0, 0) for synset, i in DEVELOPMENT_KIT_IDS.items()]
    # Classes that others belong to have ids too; no image has them.
    rows.append((1001, "n00001740", "entity", "gloss", 2, 1))
    table = np.array([tuple(row) for row in rows], dtype=[(name, object) for name in columns])
    scipy.io.savemat(folder / "meta.mat", {"synsets": table[:, None]})


def write_imagenet_train(folder: Path) -> None:
    """Write ImageNet-1k's train, 2 images each of 4 classes."""
    for synset, label in IMAGENET_CLASSES.items():
        for number in (10026, 1060):
            save_picture(folder / "train" / synset / f"{synset}_{number}.JPEG", label + number)


def write_imagenet_sketch(folder: Path) -> None:
    """Write ImageNet-Sketch, 2 images each of 4 classes."""
    for synset, label in IMAGENET_CLASSES.items():
        for number in range(2):
            save_picture(folder / "sketch" / synset / f"sketch_{number}.JPEG", label + number)


def write_imagenet_a(folder: Path) -> None:
    """Write ImageNet-A, 2 images each of 2 classes, and its README.txt."""
    for synset, label in IMAGENET_A_CLASSES.items():
        for number in range(2):
            name = f"0.{number}_fire hydrant _ chain_0.5.jpg"
            save_picture(folder / synset / name, label + number)
    (folder / "README.txt").write_text("This is the ImageNet-A dataset.\n")


# Folders of ObjectNet and their labels, of which ImageNet shares all but the first two. Sorted by
# label the third and fourth change places.
OBJECTNET_FOLDERS = {
    "air_freshener": "Air freshener",
    "bills_money": "Bills (money)",
    "drinking_cup": "Drinking Cup",
    "hand_towel_or_rag": "Dishrag or hand towel",
    "t-shirt": "T-shirt",
}
OBJECTNET_SHARED = {
    "Drinking Cup": "cup",
    "Dishrag or hand towel": "dishrag, dishcloth",
    "T-shirt": "jersey, T-shirt, tee shirt",
}


def write_objectnet(folder: Path) -> None:
    """Write ObjectNet, 2 images each of 5 classes, 3 of them shared, with its red border of 2 px."""
    top = folder / "objectnet-1.0"
    for row, name in enumerate(OBJECTNET_FOLDERS):
        for number in range(2):
            path = top / "images" / name / f"{row}f{number}a.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            framed = ImageOps.expand(picture(row + number, COLOURS[row]), 2, (255, 0, 0))
            framed.save(path)
    folders = dict(reversed(OBJECTNET_FOLDERS.items()))
    write_json(top / "mappings" / "folder_to_objectnet_label.json", folders)
    write_json(top / "mappings" / "objectnet_to_imagenet_1k.json", OBJECTNET_SHARED)


AIRCRAFT_VARIANTS = ("707-320", "A380", "Boeing 717", "F/A-18")
AIRCRAFT_LISTS = {
    "train": [("1025794", "Boeing 717"), ("0481847", "707-320")],
    "val": [("1340192", "F/A-18"), ("0056978", "Boeing 717")],
    "test": [("1514522", "F/A-18"), ("0747566", "707-320"), ("1008575", "Boeing 717")],
}


def write_aircraft(folder: Path) -> None:
    """Write FGVC-Aircraft, 2 images each of train and val and 3 of test, of 4 variants."""
    place = folder / "fgvc-aircraft-2013b" / "data"
    lists = {**AIRCRAFT_LISTS, "trainval": AIRCRAFT_LISTS["train"] + AIRCRAFT_LISTS["val"]}
    for rows in AIRCRAFT_LISTS.values():
        for number, variant in rows:
            save_picture(place / "images" / f"{number}.jpg", AIRCRAFT_VARIANTS.index(variant))
    (place / "variants.txt").write_text("".join(f"{name}\n" for name in AIRCRAFT_VARIANTS))
    for split, rows in lists.items():
        text = "".join(f"{number} {variant}\n" for number, variant in rows)
        (place / f"images_variant_{split}.txt").write_text(text)


# Image to image


def write_gpr1200(folder: Path) -> list[str]:
    """Write GPR1200's images: classes 0, 2 and 10, two images each; return their order.

    As text, 10 comes before 2. A folder that was copied about holds files that are no images.
    """
    names = [f"{label}_{name}.jpg" for label in (0, 2, 10) for name in ("b-1_0", "z")]
    for seed, name in enumerate(names):
        save_picture(folder / "images" / name, seed)
    (folder / "images" / "desktop.ini").write_text("[.ShellClassInfo]\n")
    (folder / "images" / "._0_z.jpg").write_bytes(b"\0\5\x16\7")
    return names


def write_cub200(folder: Path) -> list[str]:
    """Write CUB_200_2011 with 8 images; return the 5 of classes 101 to 200, in images.txt's order.

    As in the original, ids and classes count from 1, and train_test_split.txt cuts through the classes.
    """
    labels = [1, 100, 200, 101, 101, 102, 200, 3]
    classes = [f"{number:03}.Bird_{number}" for number in range(1, 201)]
    names = [
        f"{classes[label - 1]}/Bird_{label}_{row:04}.jpg"
        for row, label in enumerate(labels, start=1)
    ]
    for seed, name in enumerate(names):
        save_picture(folder / "images" / name, seed)
    for file, column in [
        ("images.txt", names),
        ("image_class_labels.txt", labels),
        ("classes.txt", classes),
        ("train_test_split.txt", [row % 2 for row in range(len(names))]),
    ]:
        lines = [f"{number} {value}\n" for number, value in enumerate(column, start=1)]
        (folder / file).write_text("".join(lines), encoding="utf-8")
    return [name for name, label in zip(names, labels, strict=True) if label > 100]


INSTRE_DATABASE = (
    "INSTRE-S1/01a_canada_book/001.jpg",
    "INSTRE-S1/01a_canada_book/002.jpg",
    "INSTRE-S1/01b_pepsi_can/001.jpg",
    "INSTRE-S2/eiffel_tower/001.jpg",
    "INSTRE-M/01/001.jpg",
    "INSTRE-M/01/002.jpg",
)
INSTRE_QUERIES = ("INSTRE-S1/01a_canada_book/003.jpg", "INSTRE-M/01/003.jpg")


def write_instre(folder: Path, **changes: Any) -> None:
    """Write INSTRE with a box file per image, and gnd_instre.mat; `changes` are its variables.

    Relevant for the first query are rows 0, 1, 4 and 5 of the database, for the second 4 and 5.
    """
    for seed, name in enumerate((*INSTRE_DATABASE, *INSTRE_QUERIES)):
        save_picture(folder / name, seed)
        (folder / name).with_suffix(".txt").write_text("4 6 20 22\n")
    variables = {
        "imlist": matlab_cells(INSTRE_DATABASE),
        "qimlist": matlab_cells(INSTRE_QUERIES),
        "gnd": matlab_structs(
            ok=[[[1.0, 2, 5, 6]], [[5.0, 6]]], bbx=[[[4.0, 6, 24, 28]], [[0.0, 0, 40, 30]]]
        ),
    }
    scipy.io.savemat(folder / "gnd_instre.mat", {**variables, **changes}, do_compression=True)


def matlab_cells(texts: Sequence[str]) -> npt.NDArray[np.object_]:
    cells = np.empty((1, len(texts)), object)
    cells[0] = texts
    return cells


def matlab_structs(**fields: Sequence[Any]) -> npt.NDArray[np.void]:
    """Make a 1 x N array of structs of N values per field."""
    columns = list(fields.values())
    table = np.empty((1, len(columns[0])), [(name, object) for name in fields])
    for name, column in fields.items():
        for row, value in enumerate(column):
            table[name][0, row] = np.asarray(value)
    return table


def revisited(names: Sequence[str], queries: Sequence[str]) -> dict[str, Any]:
    """Make what gnd_*.pkl holds, for 8 images and 2 queries; rows count from 0."""
    first = {"bbx": [3.5, 2.0, 30.2, 38.0], "easy": [0, 3], "hard": [5], "junk": [1]}
    second = {"bbx": [0.0, 0.0, 20.0, 20.0], "easy": [], "hard": [2], "junk": np.array([4, 6])}
    return {"imlist": list(names), "qimlist": list(queries), "gnd": [first, second]}


def write_roxford5k(folder: Path, **changes: Any) -> None:
    """Write ROxford5k: images in jpg/, not in the order of imlist; `changes` are of the pickle."""
    names = [f"oxford_{number:06}" for number in (7, 3, 5, 1, 4, 2, 8, 6)]
    queries = ["all_souls_000013", "ashmolean_000000"]
    for seed, name in enumerate((*names, *queries, "hertford_000015")):
        save_picture(folder / "jpg" / f"{name}.jpg", seed)
    content = pickle.dumps({**revisited(names, queries), **changes}, protocol=2)
    (folder / "gnd_roxford5k.pkl").write_bytes(content)


def write_rparis6k(folder: Path) -> None:
    """Write RParis6k as its archives unpack: a folder per landmark, one picture an HTML page."""
    names = [f"paris_defense_{number:06}" for number in range(8)]
    queries = ["paris_louvre_000001", "paris_eiffel_000128"]
    for seed, name in enumerate((*names, *queries)):
        landmark = name.split("_")[1]
        save_picture(folder / "jpg" / "paris" / landmark / f"{name}.jpg", seed)
    (folder / "jpg" / "paris" / "louvre" / "paris_louvre_000136.jpg").write_text("<html>302 Found")
    content = pickle.dumps(revisited(names, queries), protocol=4)
    (folder / "gnd_rparis6k.pkl").write_bytes(content)
