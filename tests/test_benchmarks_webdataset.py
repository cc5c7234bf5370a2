"""CLIP_benchmark's layout: labels, names, prompts and captions of its shards, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pymcip import metrics
from pymcip.benchmarks.contract import AbsentError, Labelled, SuiteOptions
from pymcip.benchmarks.webdataset import is_layout, read_captioned, read_labelled
from pymcip.errors import DataError
from tests.benchmark_layouts import write_coco_val2017, write_flickr30k, write_webdataset
from tests.conftest import picture

STRICT, PARTIAL = SuiteOptions(), SuiteOptions(allow_partial=True)
NAMES = ("tench", "great white shark", "hen")
CLASSES = [2, 0, 1, 0, 2]
NUMBERS = {"images": 5, "classes": 3}


def write(folder: Path, classes: list[int] = CLASSES, **options: Any) -> Path:
    samples = [{"cls": label, "webp": picture(row)} for row, label in enumerate(classes)]
    return write_webdataset(folder, samples, **{"names": NAMES, **options})


def write_captions(folder: Path) -> Path:
    texts = ["a dog\na big dog  \nA dog, running.\\n\n", r"two\nlines" + "\r\none", "only one"]
    return write_webdataset(
        folder,
        [{"jpg": picture(row), "txt": text} for row, text in enumerate(texts)],
        per_shard=2,
    )


def read(folder: Path, options: SuiteOptions = STRICT, **given: Any) -> Labelled:
    return read_labelled(folder, "test", "Three", NUMBERS, options, **given)


# What the layout says


def test_is_layout(tmp_path: Path) -> None:
    assert is_layout(write(tmp_path / "wds_three"))
    assert is_layout(write(tmp_path / "train_only", split="train"))
    assert is_layout(write_captions(tmp_path / "wds_captions"))
    (tmp_path / "wds_three" / "test" / "nshards.txt").unlink()
    assert is_layout(tmp_path / "wds_three")  # by its shards; reading it says what is missing
    write_flickr30k(tmp_path / "flickr30k")
    write_coco_val2017(tmp_path / "coco")
    assert not is_layout(tmp_path / "flickr30k")
    assert not is_layout(tmp_path / "coco")
    assert not is_layout(tmp_path / "coco" / "val2017")


def test_labelled(tmp_path: Path) -> None:
    found = read(write(tmp_path))
    assert found.labels.dtype == np.int64
    assert found.labels.tolist() == CLASSES
    assert found.names == NAMES
    assert found.templates == ("a photo of a {}.", "{}, up close")
    assert found.candidates is None
    assert found.notes == ()
    assert [found.images.key(row).rpartition("/")[2] for row in range(5)] == [
        f"s{row:07d}.webp" for row in range(5)
    ]
    assert found.images.key(3).endswith("test/1.tar/s0000003.webp")
    assert found.images.read(4).size == (40, 40)


def test_shards_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    classes = [row % 3 for row in range(12)]
    found = read_labelled(
        write(tmp_path, classes, per_shard=1), "test", "Three", {"images": 12}, STRICT
    )
    assert found.labels.tolist() == classes  # 10.tar comes after 2.tar and 9.tar


def test_label_is_the_number_not_the_rank_of_the_text(tmp_path: Path) -> None:
    names = [f"name {number}" for number in range(12)]
    found = read(write(tmp_path, [11, 2, 10, 2, 11], names=names))
    assert found.labels.tolist() == [11, 2, 10, 2, 11]
    assert found.names == tuple(names)


def test_class_ids(tmp_path: Path) -> None:
    names = [f"class {number}" for number in range(10)]
    found = read(write(tmp_path), class_ids=(3, 5, 8), names=names, templates=("{}",))
    assert found.labels.tolist() == [8, 3, 5, 3, 8]
    assert found.candidates == (3, 5, 8)
    assert found.names == tuple(names)
    assert found.templates == ("{}",)
    everything = read(tmp_path, class_ids=(2, 0, 1), names=names[:3])
    assert everything.labels.tolist() == [1, 2, 0, 2, 1]
    assert everything.candidates is None


def test_names_and_templates_replace_those_of_the_folder(tmp_path: Path) -> None:
    given = {"names": ("a", "b", "c"), "templates": ("the {}",)}
    found = read(write(tmp_path), **given)
    assert (found.names, found.templates) == (("a", "b", "c"), ("the {}",))
    for name in ("classnames.txt", "zeroshot_classification_templates.txt"):
        (tmp_path / name).unlink()
    assert read(tmp_path, **given).names == ("a", "b", "c")


def test_splits_have_the_same_classes(tmp_path: Path) -> None:
    write(tmp_path)
    write(tmp_path, [1, 1, 2], split="train")
    found = read_labelled(tmp_path, "train", "Three", {"images": 3}, STRICT)
    assert found.labels.tolist() == [1, 1, 2]
    # Votes by hand, one neighbour: the test images 0 and 4 (class 2) lie on the train image 2,
    # image 2 (class 1) on train image 0, the rest (class 0) on train image 1: 3 of 5 are right.
    test = read(tmp_path)
    axes = np.eye(3)
    answers = metrics.knn_classify(axes, found.labels, axes[[2, 1, 0, 1, 2]], 1)
    assert answers.tolist() == [2, 1, 1, 1, 2]
    assert (answers == test.labels).mean() == 3 / 5


def test_zero_shot_number_by_hand(tmp_path: Path) -> None:
    found = read(write(tmp_path))
    images = np.eye(3)[[2, 0, 2, 1, 2]]  # classes 2 0 1 0 2: rows 2 and 3 go to other classes
    scores = metrics.zero_shot_accuracy(images, np.eye(len(found.names)), found.labels, top=(1,))
    assert scores[1] == pytest.approx(60)


def test_captioned(tmp_path: Path) -> None:
    numbers = {"images": 3, "captions": 6}
    found = read_captioned(write_captions(tmp_path), "test", "Some", numbers, STRICT)
    assert found.captions == (
        "a dog",
        "a big dog",
        "A dog, running.",
        "two\nlines",
        "one",
        "only one",
    )
    assert found.owners.dtype == np.int64
    assert found.owners.tolist() == [0, 0, 0, 1, 1, 2]
    assert found.notes == ()
    # By hand: captions 1 and 3 point to image 2, the others to their own: 4 of 6 are hits.
    texts = np.eye(3)[[0, 2, 0, 2, 1, 2]]
    scores = metrics.cross_modal_recall(np.eye(3), texts, found.owners, ks=(1,))
    assert scores["t2i_r1"] == pytest.approx(100 * 4 / 6)


def test_images_are_the_same_whoever_reads_them(tmp_path: Path) -> None:
    write(tmp_path)
    first = read(tmp_path)
    second = read(tmp_path, class_ids=(3, 5, 8), names=list("abcdefghij"))
    assert first.images.fingerprint() == second.images.fingerprint()


def test_partial(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "test" / "0.tar").unlink()
    found = read(tmp_path, PARTIAL)
    assert found.labels.tolist() == CLASSES[3:]
    assert found.notes == ("partial: 1 of 2 shards", "partial: 2 of 5 images, 2 of 3 classes")


# What is refused


def test_absent_split(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(AbsentError, match=r"no split 'train' in .*, only test; needed: .*train/"):
        read_labelled(tmp_path, "train", "Three", {}, STRICT)


def test_other_numbers(tmp_path: Path) -> None:
    write(tmp_path)
    expected = {"images": 50_000, "classes": 1_000}
    with pytest.raises(DataError, match="Three: found 5 of 50,000 images, 3 of 1,000 classes"):
        read_labelled(tmp_path, "test", "Three", expected, STRICT)
    write_captions(tmp_path / "captions")
    with pytest.raises(DataError, match="Some: found 6 of 25,010 captions"):
        read_captioned(tmp_path / "captions", "test", "Some", {"captions": 25_010}, STRICT)


def remove_shard(folder: Path) -> None:
    (folder / "test" / "1.tar").unlink()


def remove_shards(folder: Path) -> None:
    for number in (0, 1):
        (folder / "test" / f"{number}.tar").unlink()


def add_shard(folder: Path) -> None:
    (folder / "test" / "00002.tar").write_bytes((folder / "test" / "1.tar").read_bytes())


def make_pointer(folder: Path) -> None:
    (folder / "test" / "1.tar").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 10240\n"
    )


def cut_shard(folder: Path) -> None:
    path = folder / "test" / "1.tar"
    path.write_bytes(path.read_bytes()[:700])


@pytest.mark.parametrize(
    ("damage", "options", "message"),
    [
        (remove_shard, STRICT, r"says 2 shards, 0.tar to 1.tar; missing: 1.tar\. Complete"),
        (remove_shards, PARTIAL, "missing: 0.tar, 1.tar"),
        (add_shard, PARTIAL, "not among them: 00002.tar"),
        (make_pointer, PARTIAL, r"Git LFS pointers, no shards: 1.tar \(run git lfs pull\)"),
        (cut_shard, PARTIAL, "1.tar can't be read as a tar shard"),
    ],
)
def test_damaged_shards(
    tmp_path: Path, damage: Callable[[Path], None], options: SuiteOptions, message: str
) -> None:
    write(tmp_path)
    damage(tmp_path)
    with pytest.raises(DataError, match=message):
        read(tmp_path, options)


@pytest.mark.parametrize("text", ["", "two", "0", "-1", "2.0", "10000000000"])
def test_number_of_shards(tmp_path: Path, text: str) -> None:
    write(tmp_path)
    (tmp_path / "test" / "nshards.txt").write_text(text)
    with pytest.raises(
        DataError, match=rf"nshards.txt says '{text}'; needed: the number of shards"
    ):
        read(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("test/nshards.txt", None, "nshards.txt is missing"),
        ("classnames.txt", None, "classnames.txt is missing"),
        ("classnames.txt", "tench\n\nhen\n", "line 2 is blank"),
        ("classnames.txt", "tench\nhen\n", "cls '2'; needed: 0 to 1"),
        ("zeroshot_classification_templates.txt", None, "templates.txt is missing"),
        ("zeroshot_classification_templates.txt", "\n", "no lines; needed: prompts with {c}"),
        ("zeroshot_classification_templates.txt", "a {c}\na hen\n", "'a hen'; needed: prompts"),
        ("dataset_type.txt", "retrieval\n", "says 'retrieval'; needed: '' or 'classification'"),
        ("dataset_type.txt", "multilabel\n", "says 'multilabel'"),
    ],
)
def test_lists(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    write(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path)


def test_lists_are_text(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "classnames.txt").write_bytes(b"tench\n\xff\xfe\nhen\n")
    with pytest.raises(DataError, match=r"classnames.txt can't be read as UTF-8"):
        read(tmp_path)


@pytest.mark.parametrize(
    "given",
    [
        {"names": ("a", "b", "c", "d")},
        {"class_ids": (1, 2), "names": ("a", "b", "c")},
    ],
)
def test_names_of_another_data_set(tmp_path: Path, given: dict[str, Any]) -> None:
    write(tmp_path)
    with pytest.raises(DataError, match=r"classnames.txt has 3 lines; needed: [24], one per class"):
        read(tmp_path, **given)


def test_class_ids_need_names(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(ValueError, match="class_ids needs names"):
        read(tmp_path, class_ids=(3, 5, 8))


@pytest.mark.parametrize(
    ("label", "message"),
    [("n01440764", "cls 'n01440764'"), ("-1", "cls '-1'"), ("3", "cls '3'; needed: 0 to 2")],
)
def test_wrong_cls(tmp_path: Path, label: str, message: str) -> None:
    samples = [{"cls": 0, "jpg": picture(0)}, {"cls": label, "jpg": picture(1)}]
    write_webdataset(tmp_path, samples, names=NAMES)
    with pytest.raises(DataError, match=message):
        read(tmp_path, PARTIAL)


def test_missing_cls(tmp_path: Path) -> None:
    write_webdataset(tmp_path, [{"cls": 0, "jpg": picture(0)}, {"jpg": picture(1)}], names=NAMES)
    with pytest.raises(DataError, match=r"1 of 2 images have no class: .*s0000001.jpg.*\.cls"):
        read(tmp_path, PARTIAL)


def test_captioned_refuses(tmp_path: Path) -> None:
    write(tmp_path / "labelled")
    with pytest.raises(DataError, match=r"dataset_type.txt says ''; needed: 'retrieval'"):
        read_captioned(tmp_path / "labelled", "test", "Some", {}, STRICT)
    samples = [{"jpg": picture(0), "txt": "a dog"}, {"jpg": picture(1)}]
    write_webdataset(tmp_path / "captions", samples)
    with pytest.raises(DataError, match=r"1 of 2 images have no caption: .*s0000001.jpg"):
        read_captioned(tmp_path / "captions", "test", "Some", {}, PARTIAL)
