"""Suites of public benchmarks, end to end on miniatures of all data sets with a tiny random CLIP."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pymcip
from pymcip import benchmarks
from pymcip.benchmarks import (
    BENCHMARKS,
    PAPER,
    SuiteOptions,
    find_suite,
    imagenet,
    listing,
    objectnet,
    paper,
)
from pymcip.benchmarks.suite import Found
from pymcip.cli import main
from pymcip.configs import EvaluateConfig
from pymcip.data import ImageData
from pymcip.errors import ConfigError, DataError
from pymcip.evaluation import run
from pymcip.evaluation.run import protocol_options
from pymcip.evaluation.tables import (
    BENCHMARKS_OF_THE_MEAN,
    model_headings,
    reported_columns,
    suite_table,
)
from pymcip.model import ClipModel
from tests import benchmark_layouts as layouts

TEMPLATES = ("a {}", "the {}.")
ROUNDED = 0.05 + 0.05 + 1e-9  # a mean of figures rounded to 0.1, itself rounded


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write miniatures of every data set below one folder."""
    root = tmp_path_factory.mktemp("data")
    for name, write in {
        "gpr1200": layouts.write_gpr1200,
        "instre": layouts.write_instre,
        "cub200": layouts.write_cub200,
        "roxford5k": layouts.write_roxford5k,
        "rparis6k": layouts.write_rparis6k,
        "imagenet-sketch": layouts.write_imagenet_sketch,
        "imagenet-a": layouts.write_imagenet_a,
        "objectnet": layouts.write_objectnet,
        "fgvc-aircraft": layouts.write_aircraft,
        "flickr30k": layouts.write_flickr30k,
        "coco": layouts.write_coco,
    }.items():
        write(root / name)
    layouts.write_imagenet_val(root / "imagenet1k")
    layouts.write_imagenet_train(root / "imagenet1k")
    return root


@pytest.fixture(autouse=True)
def _few_templates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two templates instead of eighty: 1,000 names times two prompts."""
    for module in (imagenet, objectnet):
        monkeypatch.setattr(module, "imagenet_templates", lambda: TEMPLATES)


@pytest.fixture
def options(data_root: Path, tiny_model_dir: Path) -> dict[str, Any]:
    return {
        "model": f"local-dir:{tiny_model_dir}",
        "suite": "paper",
        "data_root": data_root,
        "allow_partial": True,
        "device": "cpu",
        "precision": "fp32",
    }


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the images of every forward pass."""
    passes: list[int] = []
    encode = ClipModel.encode_images

    def counted(self: ClipModel, images: Any) -> Any:
        passes.append(len(images))
        return encode(self, images)

    monkeypatch.setattr(ClipModel, "encode_images", counted)
    return passes


# All of them


def test_all_benchmarks_run_and_each_image_is_embedded_once(
    options: dict[str, Any], data_root: Path, tmp_path: Path, embedded: list[int]
) -> None:
    options |= {"out": tmp_path / "out", "cache": tmp_path / "cache"}
    result = pymcip.evaluate(**options)
    assert list(result.metrics) == list(BENCHMARKS)
    assert result.missing == {}
    assert all(0 <= value <= 100 for value in result.metrics.values())
    found, _ = find_suite(BENCHMARKS.values(), data_root, {}, SuiteOptions(allow_partial=True))
    distinct: dict[str, ImageData] = {}
    for item in found:
        for data in (item.data.images, getattr(item.data, "queries", None)):
            if data is not None:
                distinct[data.fingerprint()] = data
        if item.voters is not None:
            distinct[item.voters.images.fingerprint()] = item.voters.images
    assert len(distinct) == 17  # 14 data sets, INSTRE's, ROxford's and RParis's queries
    assert sum(embedded) == sum(map(len, distinct.values()))
    # Now all of it is in the cache.
    embedded.clear()
    again = pymcip.evaluate(**{**options, "out": None})
    assert embedded == []
    assert again.metrics == result.metrics
    document = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert document["metrics"] == result.metrics
    assert document["details"] == result.details
    assert document["protocol"]["knn_database"] == "train"
    assert (tmp_path / "out" / "table.md").read_text() == result.table
    assert "| mean |" in result.table
    assert "gpr1200 \\* | I2I mAP" in result.table
    assert "\\* gpr1200: partial: 6 of 12,000 images" in result.table


def test_figures_are_those_of_the_embeddings(
    options: dict[str, Any], data_root: Path, tiny_clip: ClipModel
) -> None:
    """Three figures anew in NumPy, straight from pixels and prompts."""
    result = pymcip.evaluate(
        **options, benchmarks=["gpr1200", "zeroshot-imagenet-a", "t2i-flickr30k"]
    )

    def embed(images: ImageData) -> np.ndarray:
        pixels = [tiny_clip.preprocess_val(images.read(i)) for i in range(len(images))]
        rows = [tiny_clip.encode_images(one[None]).numpy()[0] for one in pixels]
        return np.array(rows, np.float16).astype(np.float64)  # what an embedding folder holds

    partial = SuiteOptions(allow_partial=True)
    names = ("gpr1200", "zeroshot-imagenet-a", "t2i-flickr30k")
    found, _ = find_suite([BENCHMARKS[name] for name in names], data_root, {}, partial)
    gpr, imagenet_a, flickr = (item.data for item in found)

    x = embed(gpr.images)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    precisions = []
    for query, scores in enumerate(x @ x.T):
        relevant = gpr.labels[np.argsort(-scores, kind="stable")] == gpr.labels[query]
        ranks = np.flatnonzero(relevant) + 1
        precisions.append(np.mean(np.arange(1, len(ranks) + 1) / ranks))
    assert result.metrics["gpr1200"] == pytest.approx(100 * np.mean(precisions), abs=1e-9)

    prompts = [template.replace("{}", name) for name in imagenet_a.names for template in TEMPLATES]
    texts = tiny_clip.encode_texts(prompts).numpy().astype(np.float16).astype(np.float64)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    classes = texts.reshape(len(imagenet_a.names), len(TEMPLATES), -1).mean(axis=1)
    classes /= np.linalg.norm(classes, axis=1, keepdims=True)
    candidates = np.array(imagenet_a.candidates)
    answers = candidates[(embed(imagenet_a.images) @ classes[candidates].T).argmax(axis=1)]
    wanted = 100 * np.mean(answers == imagenet_a.labels)
    assert result.metrics["zeroshot-imagenet-a"] == pytest.approx(wanted)

    images = embed(flickr.images)
    texts = tiny_clip.encode_texts(list(flickr.captions)).numpy().astype(np.float64)
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    nearest = (texts @ images.T).argmax(axis=1)
    details = result.details["t2i-flickr30k"]
    assert details["t2i_r1"] == pytest.approx(100 * np.mean(nearest == flickr.owners))
    assert details["t2i_r5"] == result.metrics["t2i-flickr30k"] == 100  # of three images


def test_baseline_stands_beside_the_model(
    options: dict[str, Any], hub_folder: Callable[..., Path]
) -> None:
    result = pymcip.evaluate(
        **options, baseline=f"local-dir:{hub_folder('other', embed_dim=8)}", benchmarks=["gpr1200"]
    )
    assert result.baseline is not None
    row = next(line for line in result.table.splitlines() if line.startswith("| gpr1200"))
    before, after = result.baseline["gpr1200"], result.metrics["gpr1200"]
    assert row.endswith(f"| {before:.2f} | {after:.2f} | {after - before:+.2f} |")
    assert "mean of these 1 of 14" in result.table


def test_the_model_may_come_first(options: dict[str, Any]) -> None:
    name = options.pop("model")
    result = pymcip.evaluate(name, **options, benchmarks=["gpr1200"])
    assert list(result.metrics) == ["gpr1200"]


# Options


def test_suites_set_what_is_left_open() -> None:
    def chosen(**given: Any) -> SuiteOptions:
        return protocol_options(EvaluateConfig(model="m", data_root="d", **given))

    assert chosen(suite="paper") == SuiteOptions()
    authors = chosen(suite="authors")
    assert (authors.knn_temperature, authors.instre, authors.revisited_crop) == (0.1, "all", False)
    assert authors.aircraft_database == "train"
    mixed = chosen(suite="authors", instre="iscen", knn_temperature=0.5, revisited_crop=True)
    assert (mixed.knn_temperature, mixed.instre, mixed.revisited_crop) == (0.5, "iscen", True)


def test_authors_suite_measures_all(options: dict[str, Any]) -> None:
    result = pymcip.evaluate(**{**options, "suite": "authors"})
    assert list(result.metrics) == list(BENCHMARKS)


def test_knn_among_the_other_images_needs_no_training_set(
    options: dict[str, Any], data_root: Path, tmp_path: Path
) -> None:
    root = tmp_path / "data"
    shutil.copytree(data_root / "imagenet-a", root / "imagenet-a")
    options |= {"data_root": root}
    result = pymcip.evaluate(**options)
    assert list(result.metrics) == ["zeroshot-imagenet-a"]
    assert "knn_database='self'" in result.missing["knn-imagenet-a"]
    assert "Not measured: gpr1200, instre" in result.table
    result = pymcip.evaluate(**options, knn_database="self")
    assert list(result.metrics) == ["knn-imagenet-a", "zeroshot-imagenet-a"]


def test_difficulty_is_the_figure(options: dict[str, Any]) -> None:
    for level in ("easy", "hard"):
        result = pymcip.evaluate(**options, benchmarks=["roxford5k"], revisited_difficulty=level)
        details = result.details["roxford5k"]
        assert result.metrics["roxford5k"] == details[f"{level}_map"]
        assert {"easy_map", "medium_map", "hard_map", "medium_mp10"} <= details.keys()


def test_data_paths_name_single_folders(
    options: dict[str, Any], data_root: Path, tmp_path: Path
) -> None:
    options |= {"data_root": tmp_path, "data_paths": {"gpr1200": str(data_root / "gpr1200")}}
    assert list(pymcip.evaluate(**options).metrics) == ["gpr1200"]
    with pytest.raises(ConfigError, match=r"data_paths has \['gpr'\]; allowed: .*gpr1200"):
        pymcip.evaluate(**{**options, "data_paths": {"gpr": str(data_root)}})


def test_parts_of_a_set_may_lie_in_different_folders(
    options: dict[str, Any], data_root: Path, tmp_path: Path
) -> None:
    shutil.copytree(data_root / "imagenet1k" / "train", tmp_path / "ILSVRC2012" / "train")
    shutil.copytree(data_root / "imagenet1k" / "val", tmp_path / "imagenet1k" / "val")
    result = pymcip.evaluate(**{**options, "data_root": tmp_path, "benchmarks": ["knn-imagenet1k"]})
    assert list(result.metrics) == ["knn-imagenet1k"]


# What is refused


def test_incomplete_sets_are_refused_together(options: dict[str, Any], embedded: list[int]) -> None:
    options |= {"allow_partial": False}
    with pytest.raises(DataError) as caught:
        pymcip.evaluate(**options)
    message = str(caught.value)
    for part in ("6 of 12,000 images", "ImageNet-A", "Flickr30k", "allow_partial=True"):
        assert part in message
    assert embedded == []


def test_nothing_there_says_where_to_get_it(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none of the benchmarks' data are there") as caught:
        pymcip.evaluate(**{**options, "data_root": tmp_path})
    for item in BENCHMARKS.values():
        assert f"- {item.name}: " in str(caught.value)
        assert item.data.source in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"benchmarks": ["gpr"]}, r"benchmarks=\['gpr'\] are not known; allowed: gpr1200, instre"),
        ({"data": "x"}, "not both"),
        ({"suite": None}, "give data="),
        ({"data_root": None}, "suite= needs data_root="),
        ({"class_names": "x"}, "belong to data="),
        ({"knn_temperature": 0.0}, "must be > 0"),
        ({"suite": "mteb"}, "allowed: one of 'paper', 'authors'"),
        ({"overwrite": True, "resume": "latest"}, "exclude each other"),
    ],
)
def test_wrong_options(options: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pymcip.evaluate(**{**options, **changes})


def test_an_image_that_cannot_be_decoded_fails_its_benchmark_alone(
    options: dict[str, Any], data_root: Path, tmp_path: Path
) -> None:
    root = tmp_path / "data"
    for name in ("gpr1200", "flickr30k"):
        shutil.copytree(data_root / name, root / name)
    damaged = next((root / "gpr1200" / "images").glob("2_*.jpg"))
    damaged.write_bytes(damaged.read_bytes()[:200])
    result = pymcip.evaluate(**{**options, "data_root": root})
    assert list(result.metrics) == ["t2i-flickr30k"]
    assert "1 of 6 images can't be decoded" in result.missing["gpr1200"]
    assert damaged.name in result.missing["gpr1200"]
    with pytest.raises(DataError, match="not one benchmark could be measured"):
        pymcip.evaluate(**{**options, "data_root": root, "benchmarks": ["gpr1200"]})


def test_a_killed_evaluation_keeps_its_embeddings(
    options: dict[str, Any], tmp_path: Path, embedded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    options |= {"out": tmp_path / "out", "benchmarks": ["gpr1200", "t2i-flickr30k"]}
    with monkeypatch.context() as patch:
        patch.setattr(run, "suite_table", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pymcip.evaluate(**options)
    assert sum(embedded) == 9
    embedded.clear()
    pymcip.evaluate(**options, resume="latest")
    assert embedded == []


# Listing, table


def test_listing_names_everything(data_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--list", "--data-root", str(data_root)]) == 0
    shown = capsys.readouterr().out
    assert shown == listing(data_root)
    for name, item in BENCHMARKS.items():
        assert f"{name} " in shown
        assert f"\n{item.data.name}: {item.data.title}\n" in shown
    assert f"in {data_root / 'gpr1200'}" in shown
    absent = listing()
    for item in BENCHMARKS.values():
        assert item.data.source in absent
        for line in item.data.layout.strip().splitlines():
            assert line.strip() in absent


def test_the_registry_is_the_papers_table() -> None:
    columns = [BENCHMARKS[name].column for name in PAPER]
    assert columns == ["GPR", "INS", "CUB", "ROx", "IN-V", "IN-S", "IN-A", "FGVC",
                       "IN-V", "IN-S", "IN-A", "ON", "F30k", "COCO"]  # fmt: skip
    assert len(PAPER) == BENCHMARKS_OF_THE_MEAN
    assert set(benchmarks.SUITES) == {"paper", "authors"}


OPEN_CLIP = (
    Path(__file__).resolve().parents[2] / "shared/data/annotations/clip/open_clip_published.csv"
)


def test_reported_figures_have_the_papers_means() -> None:
    """The table's own last column, AVG; but for GPR-FT's, where it says 68.4: no mean of its row."""
    assert paper.BENCHMARKS == PAPER
    means = [67.2, 72.8, 73.8, 74.1, 74.2, 70.5, 76.5, 76.2, 80.4]
    for row, mean in zip(paper.TABLE.values(), means, strict=True):
        assert len(row) == BENCHMARKS_OF_THE_MEAN
        assert abs(sum(row) / len(row) - mean) < ROUNDED, row
    assert paper.reported("ViT-L-14-336", "openai")["t2i-coco"] == 61.7
    assert paper.reported("ViT-L-14-336", None) == {}


def test_the_papers_figures_stand_beside_its_models(data_root: Path) -> None:
    found, _ = find_suite([BENCHMARKS["cub200"]], data_root, {}, SuiteOptions(allow_partial=True))
    models = [("ViT-L-14-336", "openai"), ("runs/shop", None)]
    headings = model_headings(models)
    results = [{"cub200": 76.5}, {"cub200": 88.0}]
    table = suite_table(headings, results, found, {}, reported_columns(models))
    assert "| runs/shop | difference | paper: ViT-L-14-336 (openai) |" in table
    assert "| cub200 \\* | I2I R@1 | 76.50 | 88.00 | +11.50 | 77.0 |  |" in table


def test_open_clips_figures_stand_beside_the_papers(data_root: Path) -> None:
    chosen = [BENCHMARKS[name] for name in ("cub200", "t2i-flickr30k")]
    found, _ = find_suite(chosen, data_root, {}, SuiteOptions(allow_partial=True))
    models = [("ViT-SO400M-14-SigLIP-384", "webli")]
    results = [{"cub200": 80.0, "t2i-flickr30k": 96.0}]
    table = suite_table(model_headings(models), results, found, {}, reported_columns(models))
    heading = "ViT-SO400M-14-SigLIP-384 (webli)"
    assert f"| {heading} | paper: {heading} | open_clip: {heading} |" in table
    assert "| t2i-flickr30k \\* | T2I R@5 | 96.00 | 93.5 | 96.1 |" in table
    assert "| mean of these 2 of 14 |  | 88.00 | 88.0 |  |" in table  # (82.4 + 93.5) / 2


@pytest.mark.skipif(not OPEN_CLIP.is_file(), reason=f"no real data at {OPEN_CLIP}")
def test_open_clips_figures_are_those_of_its_tables() -> None:
    with OPEN_CLIP.open(newline="") as handle:
        for row in csv.DictReader(handle):
            model, tag, *figures = row.values()
            published = paper.published_by_open_clip(model, tag)
            assert tuple(published.values()) == tuple(map(float, figures))


def test_a_mean_needs_every_model(data_root: Path) -> None:
    partial = SuiteOptions(allow_partial=True)
    chosen = [BENCHMARKS[name] for name in ("gpr1200", "rparis6k", "t2i-coco")]
    found, _ = find_suite(chosen, data_root, {}, partial)
    results = [
        {"gpr1200": 50.0, "rparis6k": 99.0},
        {"gpr1200": 60.0, "rparis6k": 10.0, "t2i-coco": 70.0},
    ]
    bare = [Found(item.benchmark, item.data) for item in found]
    table = suite_table(["a|b", "c"], results, bare, {"t2i-coco": "why"})
    assert "| a\\|b | c | difference |" in table
    assert "| t2i-coco \\* | T2I R@5 |  | 70.00 |  |" in table
    assert "| mean of these 1 of 14 |  | 50.00 | 60.00 | +10.00 |" in table  # RParis: not in it
    assert "Not measured: t2i-coco." in table
