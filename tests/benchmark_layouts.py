"""Writers of miniatures of public data sets: the original layouts with a few tiny images each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
