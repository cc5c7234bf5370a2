"""Evaluation of a model on the user's data: what is measured, from what, and what is refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pymcip
from pymcip import metrics
from pymcip.benchmarks.embedder import CachedEmbedder
from pymcip.data import ImageData, load_images
from pymcip.errors import ConfigError, DataError, OutputExistsError
from pymcip.evaluation import (
    ClassNames,
    comparison_table,
    evaluate_model,
    read_class_names,
    run,
)
from pymcip.model import ClipModel
from tests.conftest import CAPTIONS, COLOURS, picture, write_hub_folder

Shards = Callable[..., list[Path]]
LABEL_METRICS = {"i2i_map", "i2i_r1", "knn"}
ZERO_SHOT = {"zero_shot", "zero_shot_top5"}


def write_names(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def embed_all(clip: ClipModel, data: ImageData) -> np.ndarray:
    """Embed images one by one, as an embedding folder holds them: in float16."""
    pixels = [clip.preprocess_val(data.read(i)) for i in range(len(data))]
    rows = [clip.encode_images(one[None]).numpy() for one in pixels]
    return np.concatenate(rows).astype(np.float16)


def embed_texts(clip: ClipModel, texts: Sequence[str]) -> np.ndarray:
    return clip.encode_texts(texts).numpy().astype(np.float16)


def options(model: Path, data: Any, **more: Any) -> dict[str, Any]:
    return {"model": str(model), "data": data, "device": "cpu", "precision": "fp32", **more}


# What is measured


def test_metrics_are_those_of_the_embeddings(tiny_clip: ClipModel, shards: Shards) -> None:
    data = load_images(shards()[0].parent)
    names = ClassNames(("2", "0", "1"), ("blue", "red", "green"), tuple(CAPTIONS[:3]))
    got = evaluate_model(
        tiny_clip, data, class_names=names, knn_k=3, recall_at=(1, 3), batch_size=5
    )
    x, labels = embed_all(tiny_clip, data), data.labels
    classifier = metrics.zero_shot_classifier(
        tiny_clip, ["red", "green", "blue"], ["a photo of a {}.", "{}"]
    )
    accuracy = metrics.zero_shot_accuracy(x, classifier, labels)
    voted = metrics.knn_classify(x, labels, x, 3, leave_one_out=True)
    captions = embed_texts(tiny_clip, [data.titles(i)[0] for i in range(12)])
    wanted = {
        "i2i_map": metrics.full_ranking_map(x, labels),
        "i2i_r1": metrics.nearest_other_recall(x, labels),
        "knn": 100 * np.mean(voted == labels),
        "zero_shot": accuracy[1],
        "zero_shot_top5": accuracy[5],
        "t2i_map": metrics.class_text_map(
            x, labels, embed_texts(tiny_clip, [CAPTIONS[1], CAPTIONS[2], CAPTIONS[0]])
        ),
        **metrics.cross_modal_recall(x, captions, np.arange(12), (1, 3)),
    }
    assert got == pytest.approx(wanted, abs=1e-4)


def test_every_image_is_embedded_once(
    tiny_clip: ClipModel, shards: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load_images(shards()[0].parent)
    seen: list[int] = []
    read = ImageData.read_with_digest

    def watch(self: ImageData, index: int) -> Any:
        seen.append(index)
        return read(self, index)

    monkeypatch.setattr(ImageData, "read_with_digest", watch)
    evaluate_model(tiny_clip, data)
    assert sorted(seen) == list(range(12))


def test_folders_of_images_need_nothing_else(
    tiny_model_dir: Path, tiny_images: Callable[..., Path]
) -> None:
    result = pymcip.evaluate(**options(tiny_model_dir, tiny_images()))
    assert result.metrics.keys() == LABEL_METRICS | ZERO_SHOT
    assert result.baseline is None
    assert result.out is None
    assert result.counts == {
        "images": 12, "labelled": 12, "classes": 3, "captions": 0, "duplicates": 0, "skipped": 0,
        "texts_cut": 0,
    }  # fmt: skip


def test_numbers_are_no_class_names(tiny_clip: ClipModel, shards: Shards) -> None:
    got = evaluate_model(tiny_clip, load_images(shards()[0].parent))
    assert not ZERO_SHOT & got.keys()
    assert got.keys() >= LABEL_METRICS | {"t2i_r1", "i2t_r10"}


def test_captions_alone_are_enough(tiny_model_dir: Path, shards: Shards) -> None:
    samples = [{"jpg": picture(i), "txt": CAPTIONS[i]} for i in range(4)]
    result = pymcip.evaluate(**options(tiny_model_dir, shards(samples)[0].parent, recall_at=(1, 4)))
    assert result.metrics.keys() == {"t2i_r1", "t2i_r4", "i2t_r1", "i2t_r4"}
    assert result.metrics["t2i_r4"] == 100
    assert result.counts["labelled"] == 0


def test_several_captions_per_image_and_images_without(
    tiny_clip: ClipModel, shards: Shards
) -> None:
    samples: list[dict[str, Any]] = [
        {"jpg": picture(0), "cls": 0, "txt": CAPTIONS[0], "json": {"caption": CAPTIONS[3]}},
        {"jpg": picture(1), "cls": 1},
        {"jpg": picture(2), "cls": 1, "txt": CAPTIONS[1]},
    ]
    data = load_images(shards(samples)[0].parent)
    counts: dict[str, int] = {}
    got = evaluate_model(tiny_clip, data, counts=counts)
    texts = [*data.titles(0), *data.titles(2)]
    wanted = metrics.cross_modal_recall(
        embed_all(tiny_clip, data), embed_texts(tiny_clip, texts), np.array([0, 0, 2])
    )
    assert {key: got[key] for key in wanted} == pytest.approx(wanted)
    assert counts["captions"] == 3


def test_images_without_a_label_count_for_captions_only(
    tiny_clip: ClipModel, shards: Shards
) -> None:
    samples: list[dict[str, Any]] = [
        {"jpg": picture(i, COLOURS[i % 3]), "txt": CAPTIONS[i]} for i in range(8)
    ]
    for i in (1, 2, 4, 5, 7):
        samples[i]["cls"] = i % 3
    data = load_images(shards(samples)[0].parent, labelled=False)
    counts: dict[str, int] = {}
    got = evaluate_model(tiny_clip, data, counts=counts)
    x = embed_all(tiny_clip, data)
    kept = data.labels >= 0
    assert counts == {
        "images": 8, "labelled": 5, "classes": 2, "captions": 8, "duplicates": 0, "skipped": 0,
        "texts_cut": 0,
    }  # fmt: skip
    assert got["i2i_map"] == pytest.approx(metrics.full_ranking_map(x[kept], data.labels[kept]))
    texts = embed_texts(tiny_clip, CAPTIONS)
    assert got["t2i_r1"] == metrics.cross_modal_recall(x, texts, np.arange(8))["t2i_r1"]


def test_undecodable_images_are_left_out(
    tiny_clip: ClipModel, shards: Shards, caplog: pytest.LogCaptureFixture
) -> None:
    samples: list[dict[str, Any]] = [
        {"jpg": picture(i, COLOURS[i % 2]), "cls": i % 2, "txt": CAPTIONS[i]} for i in range(6)
    ]
    samples[3]["jpg"] = b"not a picture"
    data = load_images(shards(samples)[0].parent)
    counts: dict[str, int] = {}
    with caplog.at_level(logging.WARNING):
        got = evaluate_model(tiny_clip, data, counts=counts, batch_size=2)
    assert counts["skipped"] == 1
    assert "000003.jpg" in caplog.text
    good = data.select([0, 1, 2, 4, 5])
    assert got == pytest.approx(evaluate_model(tiny_clip, good), abs=1e-4)


def test_data_without_one_image_that_decodes(tiny_clip: ClipModel, shards: Shards) -> None:
    samples = [{"jpg": b"nothing", "cls": i} for i in range(3)]
    with pytest.raises(DataError, match="not one of 3 images"):
        evaluate_model(tiny_clip, load_images(shards(samples)[0].parent))


def test_one_class_alone_has_no_search_to_measure(tiny_clip: ClipModel, shards: Shards) -> None:
    samples = [{"jpg": picture(i), "cls": 0} for i in range(3)]
    data = load_images(shards(samples)[0].parent, labelled=False)
    with pytest.raises(DataError, match="labels of one class"):
        evaluate_model(tiny_clip, data)
    names = ClassNames(("0", "1"), ("red", "green"))
    assert evaluate_model(tiny_clip, data, class_names=names).keys() == ZERO_SHOT


def test_images_without_labels_and_captions(tiny_clip: ClipModel, shards: Shards) -> None:
    data = load_images(shards([{"jpg": picture(0)}])[0].parent, labelled=False)
    with pytest.raises(DataError, match="neither labels nor captions"):
        evaluate_model(tiny_clip, data)


# k-NN from other data


def knn_folder(base: Path, classes: Sequence[str], per_class: int = 3) -> Path:
    for number, name in enumerate(classes):
        (base / name).mkdir(parents=True)
        for i in range(per_class):
            picture(100 * number + i, COLOURS[number]).save(base / name / f"{i}.png")
    return base


def test_knn_data_are_joined_by_class_name(tiny_clip: ClipModel, tmp_path: Path) -> None:
    data = load_images(knn_folder(tmp_path / "data", ["bee", "cow"]))
    bank = load_images(knn_folder(tmp_path / "bank", ["ant", "cow", "bee"], 4))
    got = evaluate_model(tiny_clip, data, knn_data=bank, knn_k=3)
    renamed = np.array([{"bee": 0, "cow": 1, "ant": 2}[name] for name in bank.class_names])
    answers = metrics.knn_classify(
        embed_all(tiny_clip, bank), renamed[bank.labels], embed_all(tiny_clip, data), 3
    )
    assert got["knn"] == pytest.approx(100 * np.mean(answers == data.labels))


def test_knn_data_that_hold_the_images_themselves_are_perfect(
    tiny_clip: ClipModel, tmp_path: Path
) -> None:
    data = load_images(knn_folder(tmp_path / "data", ["bee", "cow"]))
    assert evaluate_model(tiny_clip, data, knn_data=data, knn_k=1)["knn"] == 100


def test_knn_data_without_a_class_in_common(tiny_clip: ClipModel, tmp_path: Path) -> None:
    data = load_images(knn_folder(tmp_path / "data", ["bee", "cow"]))
    bank = load_images(knn_folder(tmp_path / "bank", ["ant", "dog"]))
    with pytest.raises(DataError, match="no class in common"):
        evaluate_model(tiny_clip, data, knn_data=bank)


# Class names


def test_names_are_joined_by_label_not_by_order(
    tiny_model_dir: Path, tiny_images: Callable[..., Path], tmp_path: Path
) -> None:
    images = tiny_images()
    rows = ["class0\tred thing", "class1\tgreen thing", "class2\tblue thing", "extra\tgrey thing"]
    orders = [rows, rows[::-1], ["label\tname", *rows[2:], *rows[:2]]]
    results = [
        pymcip.evaluate(
            **options(
                tiny_model_dir,
                images,
                class_names=write_names(tmp_path / f"{n}.tsv", "\n".join(order) + "\n"),
            )
        ).metrics
        for n, order in enumerate(orders)
    ]
    assert results[0] == pytest.approx(results[1])
    assert results[0] == pytest.approx(results[2])


def test_all_names_of_the_file_are_candidates_each_once(
    tiny_clip: ClipModel, tiny_images: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    plain = CachedEmbedder.classifier

    def watch(self: CachedEmbedder, names: Sequence[str], templates: Sequence[str]) -> Any:
        asked.append(list(names))
        return plain(self, names, templates)

    monkeypatch.setattr(CachedEmbedder, "classifier", watch)
    names = ClassNames(
        ("extra", "class2", "class0", "class1"),
        ("a-b_c d", "blue", "red", "red"),
        ("extra text", "the blue", "the red", "the red"),
    )
    data = load_images(tiny_images())
    got = evaluate_model(tiny_clip, data, class_names=names)
    assert asked == [["a-b_c d", "blue", "red"]] * 2  # for the figures, and for what is shown
    x = embed_all(tiny_clip, data)
    merged = np.repeat([0, 0, 1], 4)
    texts = embed_texts(tiny_clip, ["the red", "the blue"])
    assert got["t2i_map"] == pytest.approx(metrics.class_text_map(x, merged, texts), abs=1e-4)


def test_labels_without_a_name_are_an_error(
    tiny_model_dir: Path, tiny_images: Callable[..., Path], tmp_path: Path
) -> None:
    path = write_names(tmp_path / "names.tsv", "class1\tgreen\nKlasse0\tred\n")
    with pytest.raises(DataError) as raised:
        pymcip.evaluate(**options(tiny_model_dir, tiny_images(), class_names=path))
    message = str(raised.value)
    assert "2 of the data's 3 labels: 'class0', 'class2'" in message
    assert "'Klasse0'" in message


def test_class_names_need_labels(tiny_clip: ClipModel, shards: Shards) -> None:
    data = load_images(shards([{"jpg": picture(0), "txt": "a square"}])[0].parent, labelled=False)
    with pytest.raises(DataError, match="class_names need labelled images"):
        evaluate_model(tiny_clip, data, class_names=ClassNames(("0",), ("red",)))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("0\tred\n1\tgreen\n", ClassNames(("0", "1"), ("red", "green"))),
        (
            '1\tgreen\tIs green.\n0\tred\tIs "red", it\'s said.',
            ClassNames(("1", "0"), ("green", "red"), ("Is green.", 'Is "red", it\'s said.')),
        ),
        (
            "Description\tname\tcoarse\tlabel\r\nlong\tPink-Lady\tApple\t2\r\n\r\n",
            ClassNames(("2",), ("Pink-Lady",), ("long",)),
        ),
        ("\ufefflabel\tname\n7\tété\n", ClassNames(("7",), ("été",))),
        ("label\tname\tcoarse\n7\tpear\t\n", ClassNames(("7",), ("pear",))),
    ],
    ids=["bare", "descriptions", "header in any order", "BOM", "other column empty"],
)
def test_class_name_files(tmp_path: Path, text: str, wanted: ClassNames) -> None:
    path = tmp_path / "names.tsv"
    path.write_bytes(text.encode())
    assert read_class_names(path) == wanted


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no rows"),
        (b"label\tname\n", "no rows"),
        (b"red\ngreen\n", "line 1 has one column"),
        (b"0\tred\n1\n", "line 2: no name"),
        (b"label\tname\tdescription\n0\tred\tr\n1\tgreen\n", "line 3: no description"),
        (b"0\tred\n\n0\tgreen\n", "line 3: label '0' stands in line 1 already"),
        (b"0\tred\xff\n", "not UTF-8"),
    ],
)
def test_class_name_files_that_are_wrong(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "names.tsv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_class_names(path)


def test_class_name_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        read_class_names(tmp_path / "names.tsv")


# Before and after


def test_baseline_beside_the_model(
    tiny_model_dir: Path, tiny_images: Callable[..., Path], tmp_path: Path
) -> None:
    other = write_hub_folder(tmp_path / "other", seed=4)
    images = tiny_images()
    result = pymcip.evaluate(
        **options(other, images, baseline=str(tiny_model_dir), out=tmp_path / "out")
    )
    alone = pymcip.evaluate(**options(tiny_model_dir, images))
    assert result.baseline == alone.metrics
    assert result.metrics != alone.metrics
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in result.table.splitlines()
        if line.startswith("|")
    ]
    assert rows[0] == ["metric (%)", str(tiny_model_dir), str(other), "difference"]
    assert [row[0] for row in rows[2:]] == [
        "image-to-image mAP",
        "image-to-image R@1",
        "k-NN",
        "zero-shot top-1",
        "zero-shot top-5",
    ]
    for row, key in zip(rows[2:], result.metrics, strict=True):
        before, after = alone.metrics[key], result.metrics[key]
        assert row[1:] == [f"{before:.2f}", f"{after:.2f}", f"{after - before:+.2f}"]
    assert "12 images" in result.table
    assert (tmp_path / "out" / "table.md").read_text() == result.table
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert written["metrics"] == result.metrics
    assert written["baseline"] == alone.metrics
    assert written["counts"] == result.counts
    assert written["config"]["data"] == str(images)


def test_table_of_one_model() -> None:
    table = comparison_table(["a|b"], [{"t2i_r5": 12.345, "i2t_r1": 0.0}])
    assert table.splitlines() == [
        "| metric (%) | a\\|b |",
        "|---|---:|",
        "| text-to-image R@5 | 12.35 |",
        "| image-to-text R@1 | 0.00 |",
    ]


# What is refused before any model runs


def test_problems_are_told_before_a_model_is_loaded(
    tiny_images: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: Any, **more: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(run, "load_configured", never)
    images = tiny_images()
    with pytest.raises(ConfigError, match="knn_k=0"):
        pymcip.evaluate(model="any", data=images, knn_k=0)
    with pytest.raises(DataError, match="nothing at"):
        pymcip.evaluate(model="any", data=tmp_path / "nowhere")
    names = write_names(tmp_path / "names.tsv", "0\tred\n")
    with pytest.raises(DataError, match="no row for"):
        pymcip.evaluate(model="any", data=images, class_names=names)
    with pytest.raises(OutputExistsError, match="not empty"):
        pymcip.evaluate(model="any", data=images, out=tmp_path)
    with pytest.raises(OutputExistsError, match="overwrite would remove"):
        pymcip.evaluate(model="any", data=images, out=tmp_path, overwrite=True)
    assert any(images.iterdir())


# Twins: no picture is its own neighbour


def test_copies_are_one_picture(
    tiny_clip: ClipModel, tiny_images: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny_images()
    plain = evaluate_model(tiny_clip, load_images(folder))
    for label in range(3):
        copy = folder / f"class{label}" / "copy.jpg"
        copy.write_bytes((folder / f"class{label}" / "0.jpg").read_bytes())
    data = load_images(folder)
    counts: dict[str, int] = {}
    assert evaluate_model(tiny_clip, data, counts=counts) == plain
    assert (counts["images"], counts["duplicates"]) == (12, 3)
    assert "3 of 15 images are copies of others, byte for byte" in caplog.text
    kept = evaluate_model(tiny_clip, data, counts=counts, duplicates="keep")
    assert (counts["images"], counts["duplicates"]) == (15, 0)
    assert kept["i2i_r1"] >= 100 * 6 / 15  # each copy finds the other


def test_captions_of_copies_are_joined(tiny_clip: ClipModel, shards: Shards) -> None:
    samples = [{"jpg": picture(i % 6), "txt": CAPTIONS[i]} for i in range(8)]
    counts: dict[str, int] = {}
    data = load_images(shards(samples)[0].parent, labelled=False)
    got = evaluate_model(tiny_clip, data, counts=counts)
    assert (counts["images"], counts["captions"], counts["duplicates"]) == (6, 8, 2)
    images = embed_all(tiny_clip, data)[:6]
    texts = embed_texts(tiny_clip, CAPTIONS[:8])
    best = (texts.astype(np.float64) @ images.astype(np.float64).T).argmax(axis=1)
    assert got["t2i_r1"] == pytest.approx(100 * np.mean(best == np.arange(8) % 6))


def test_voters_that_are_the_queries_do_not_vote_for_themselves(
    tiny_clip: ClipModel, tiny_images: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    data = load_images(tiny_images())
    alone = evaluate_model(tiny_clip, data, knn_k=3)["knn"]
    assert evaluate_model(tiny_clip, data, knn_data=data, knn_k=3)["knn"] == alone
    assert "knn_data holds 12 of the 12 images to classify" in caplog.text
    half = data.select(np.arange(0, 12, 2))
    x, labels = embed_all(tiny_clip, data).astype(np.float64), data.labels
    right = 0
    for query in range(12):
        others = [row for row in range(0, 12, 2) if row != query]
        right += labels[max(others, key=lambda row: x[row] @ x[query])] == labels[query]
    assert evaluate_model(tiny_clip, data, knn_data=half, knn_k=1)["knn"] == pytest.approx(
        100 * right / 12
    )


def test_classes_of_one_side_are_reported(
    tiny_clip: ClipModel, tiny_images: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    data, others = load_images(tiny_images()), tiny_images("others")
    (others / "class1").rename(others / "Class1")
    evaluate_model(tiny_clip, data, knn_data=load_images(others))
    assert (
        "1 of the 3 classes of data only: 'class1'; 1 of the 3 classes of knn_data only: 'Class1'"
        in caplog.text
    )
