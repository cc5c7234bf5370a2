"""report.html of a run and of an evaluation: what it says, that it is true, and that it is escaped."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch

import pymcip
from pymcip.data import load_images
from pymcip.embedding import EmbeddingCache
from pymcip.evaluation import report
from pymcip.evaluation.examples import NEAREST
from pymcip.model import ClipModel, load
from pymcip.training import loop
from tests.conftest import picture

NASTY = "<script>alert('1')</script> & \"x\""


class Page(HTMLParser):
    """Of a page the tags, and the text outside of the style."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def pictures(self) -> list[dict[str, str | None]]:
        found = [attributes for tag, attributes in self.tags if tag == "span"]
        return [one for one in found if one.get("role") == "img"]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Ten classes of three pictures, one class with an odd name; and a file that is no picture."""
    names = [NASTY.replace("/", "|"), *(f"class{number}" for number in range(9))]
    for label, name in enumerate(names):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(3):
            image = picture(100 * label + number, (25 * label, 200 - 20 * label, 90))
            image.save(tmp_path / "photos" / name / f"{number}.jpg")
    (tmp_path / "photos" / "class5" / "broken <b>.jpg").write_bytes(b"\xff\xd8\xff broken")
    return tmp_path / "photos"


@pytest.fixture
def options(
    run_options: dict[str, Any], photos: Path, captions_file: Callable[..., Path]
) -> dict[str, Any]:
    return {
        **run_options,
        "train_data": str(photos),
        "captions": str(captions_file([NASTY, "a red square", "the blue square", "grey noise"])),
        "method": "mcip",
        "holdout": 0.3,
        "batch_size": 8,
        "alignment_budget": 0.9,
    }


def test_a_run_ends_with_a_report_and_a_model_card(options: dict[str, Any]) -> None:
    result = pymcip.train(**options)
    check_card(result, options)
    page = Page(result.out / "report.html")
    assert (
        f"the report of the run, for a browser: {result.out / 'report.html'}"
        in (result.out / "out.log").read_text()
    )
    for name, value in result.metrics.items():
        before = result.before[name]
        change = f"{round(value, 2) - round(before, 2):+.2f}"
        row = f"{report.metric_in_words(name)[0]} {before:.2f} {value:.2f} {change}"
        assert row in page.text
    assert result.alignment is not None
    assert f"{result.alignment['kept']:.4f}, with a standard error" in page.text
    assert f"images of 7 classes and 4 captions: {result.steps} steps" in page.text
    assert "Measured on 9 images of 3 classes that were held out of training" in page.text
    config = json.loads((result.out / "config.json").read_text())
    assert f"lr_classes {config['lr_classes']} chosen: a class matrix" in page.text
    assert "margin 0.3 m of ArcMargin" in page.text
    assert "broken <b>.jpg" in page.text  # as text
    assert NASTY in page.text  # a caption of some images
    assert {tag for tag, _ in page.tags} & {"script", "link", "iframe", "img", "object"} == set()
    assert not re.findall(r"(?:https?:|src=|href=|@import)", page.source)
    assert set(re.findall(r"url\((.{15})", page.source)) == {"data:image/jpeg"}
    assert sum(tag == "svg" for tag, _ in page.tags) == 3  # losses, figures, alignment
    assert "no_image" not in page.text
    assert len(page.source) < 600_000
    # nothing of the run but the report knows of it: a finished run is not reported on again
    (result.out / "report.html").unlink()
    pymcip.train(**options, resume="latest")
    assert not (result.out / "report.html").exists()


def check_card(result: pymcip.TrainResult, options: dict[str, Any]) -> None:
    assert result.hub is not None
    card = (result.hub / "README.md").read_text()
    front, _, body = card.removeprefix("---\n").partition("---\n")
    assert {line.partition(":")[0] for line in front.splitlines() if ":" in line} == {
        "library_name", "pipeline_tag", "tags",
    }  # fmt: skip
    assert result.markdown in body
    assert "| captions to mine from | captions.txt | 4 |  |" in body
    assert "| training images | photos | 21 | 7 |" in body
    assert "Licence\n\nNone is stated here" in body
    assert "with a standard error" in body
    assert "| `method` | mcip |" in body
    folder = str(Path(options["train_data"]).parent)
    assert folder not in card
    assert str(result.out) not in card
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{result.hub}")
    state = torch.load(result.state_dict, weights_only=True)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def nearest(clip: ClipModel, data: Any, folder: Path, row: int) -> list[int]:
    """The rows nearest to a row, by a plain sort of the embeddings."""
    x = EmbeddingCache(clip, folder).images(data).vectors("img").astype(np.float64)
    order = np.argsort(-(x @ x[row]), kind="stable")
    return [int(other) for other in order if other != row][:NEAREST]


def test_the_pictures_are_the_nearest_of_each_model(
    tiny_model_dir: Path, hub_folder: Callable[..., Path], photos: Path, tmp_path: Path
) -> None:
    (photos / "class5" / "broken <b>.jpg").unlink()
    other = hub_folder("other", embed_dim=24)
    pymcip.evaluate(
        model=str(other), baseline=str(tiny_model_dir), data=str(photos), out=tmp_path / "out",
        device="cpu", precision="fp32",
    )  # fmt: skip
    page = Page(tmp_path / "out" / "report.html")
    assert "Nothing: all images of the sources were used." in page.text
    data = load_images(str(photos))
    row_of = {data.key(row): row for row in range(len(data))}
    shown = []
    for one in page.pictures()[: 12 * 11]:
        label, _, key = str(one["title"]).rpartition(" · ")
        assert label == data.class_names[data.labels[row_of[key]]]
        shown.append((row_of[key], "hit" in str(one["class"]).split()))
    models = [load(str(path), device="cpu", precision="fp32") for path in (tiny_model_dir, other)]
    assert len({data.labels[shown[start][0]] for start in range(0, 132, 11)}) == 10
    for start in range(0, 132, 11):
        query = shown[start][0]
        for number, clip in enumerate(models):
            found = shown[start + 1 + 5 * number :][:5]
            assert [row for row, _ in found] == nearest(clip, data, tmp_path / "cache", query)
            assert [hit for _, hit in found] == [
                bool(data.labels[row] == data.labels[query]) for row, _ in found
            ]


def test_captions_are_queries_where_there_are_no_labels(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    rows = []
    for number in range(6):
        picture(number).save(tmp_path / f"{number}.png")
        rows.append(f"{number}.png\tcaption {number} <i>")
    table = tmp_path / "table.tsv"
    table.write_text("\n".join(["filepath\ttitle", *rows]) + "\n")
    pymcip.evaluate(model=str(tiny_model_dir), data=str(table), out=tmp_path / "out", device="cpu")
    page = Page(tmp_path / "out" / "report.html")
    asked = re.findall(r"“caption (\d) <i>”", page.text)
    assert len(asked) == len(set(asked)) == 4
    pictures = page.pictures()
    assert len(pictures) == 4 * 5
    for number, text in enumerate(asked):
        for one in pictures[5 * number : 5 * number + 5]:
            own = Path(str(one["title"]).rpartition(" · ")[2]).stem == text
            assert own == ("hit" in str(one["class"]).split())


def test_an_interrupted_run_has_no_report_until_it_is_finished(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pymcip.train(**{**options, "out": options["out"] + "-whole"})
    inner = loop.optimizer_step

    def stopped(run: Any, stage: Any, micro_batches: Any) -> dict[str, float]:
        run.interruption.requested = "SIGTERM"
        return inner(run, stage, micro_batches)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "optimizer_step", stopped)
        result = pymcip.train(**options)
    assert result.interrupted
    assert not (result.out / "report.html").exists()
    resumed = pymcip.train(**options, resume="latest")
    pages = [Page(run.out / "report.html") for run in (whole, resumed)]
    assert pages[0].pictures() == pages[1].pictures()
    assert pages[1].text.count("“class") == pages[0].text.count("“class") > 0


def test_thumbnails_end_with_time_or_room(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = load_images(str(photos))
    row = next(r for r in range(len(data)) if "broken" not in data.key(r))
    thumbnails = report.Thumbnails(0)
    assert thumbnails.add(data, row) == thumbnails.add(data, row) == 0
    broken = next(r for r in range(len(data)) if "broken" in data.key(r))
    assert thumbnails.add(data, broken) is None
    thumbnails.room = 0
    assert thumbnails.add(data, row) == 0
    assert thumbnails.add(data, row + 1) is None
    assert thumbnails.missing == 2
    now = time.monotonic()
    monkeypatch.setattr(report.time, "monotonic", lambda: now)
    thumbnails = report.Thumbnails(1000)
    now += 14.9
    assert thumbnails.add(data, row) == 0
    now += 0.2
    assert thumbnails.add(data, row + 1) is None
