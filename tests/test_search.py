"""Search in one's own images: what is found, how an index is kept up to date, what is refused."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import pymcip
from pymcip.cli import main
from pymcip.errors import ConfigError, DataError, PymcipError, StaleEmbeddingsError
from pymcip.exporting import write_export
from pymcip.model import ClipModel
from pymcip.model.appended import Gate, appended_clip, linear_head
from tests.conftest import picture, write_hub_folder

Build = Callable[..., pymcip.IndexResult]


@pytest.fixture
def photos(tiny_images: Callable[..., Path]) -> Path:
    """Seven images of two classes, one with captions, in a folder."""
    folder = tiny_images("photos", classes=2, per_class=3)
    picture(7).save(folder / "class1" / "seventh.png")
    (folder / "class0" / "1.txt").write_text("<i>one</i>\ntwo\n")
    return folder


@pytest.fixture
def build(photos: Path, tiny_model_dir: Path, tmp_path: Path) -> Build:
    """Build an index of the photos in parts of three; keywords change the options."""

    def run(**changes: Any) -> pymcip.IndexResult:
        options = {"model": f"local-dir:{tiny_model_dir}", "images": photos, "part_size": 3}
        options |= {"out": tmp_path / "index", "device": "cpu", "precision": "fp32"}
        return pymcip.build_index(**{**options, **changes})

    return run


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each forward pass has had so far."""
    calls: list[int] = []
    original = ClipModel.encode_images

    def counting(self: ClipModel, pixels: torch.Tensor) -> torch.Tensor:
        calls.append(len(pixels))
        return original(self, pixels)

    monkeypatch.setattr(ClipModel, "encode_images", counting)
    return calls


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def stored(index: pymcip.Index) -> np.ndarray:
    """The index's rows in fp64 [N, D]."""
    return np.concatenate([np.asarray(part) for part in index.embeddings.parts("img")]).astype(
        float
    )


def check(hits: list[pymcip.Hit], index: pymcip.Index, query: np.ndarray, k: int) -> None:
    scores = stored(index) @ query
    order = np.argsort(-scores, kind="stable")[:k]
    assert [hit.row for hit in hits] == order.tolist()
    np.testing.assert_allclose([hit.score for hit in hits], scores[order], rtol=0, atol=2e-6)


def test_queries_are_as_documented(build: Build, tiny_clip: ClipModel, photos: Path) -> None:
    result = build()
    assert (result.images, result.new, result.removed, result.skipped) == (7, 7, 0, 0)
    index = pymcip.Index(result.out, device="cpu")
    assert len(index) == 7
    paths = [photos / "class0" / "1.jpg", photos / "class1" / "seventh.png"]
    opened = [Image.open(path) for path in paths]
    pixels = torch.stack([tiny_clip.preprocess_val(image.convert("RGB")) for image in opened])
    a, b = tiny_clip.encode_images(pixels).double().numpy()
    s, t = tiny_clip.encode_texts(["red apple", "green"]).double().numpy()
    texts, pictures = unit(s + t), unit(a + b)
    search = index.search

    check(search("red apple", k=7), index, s, 7)
    check(search(image=str(paths[0]), k=3), index, a, 3)
    check(search(image=opened[1], k=100), index, b, 7)
    check(search("red apple", paths[0], k=3), index, unit(s + a), 3)
    check(search("red apple", paths[0], weight=0.2), index, unit(0.8 * s + 0.2 * a), 7)
    check(search("red apple", paths[0], weight=1), index, a, 7)
    check(
        search(["red apple", "green"], [paths[0], opened[1]], weight=0.75),
        index, unit(0.25 * texts + 0.75 * pictures), 7,
    )  # fmt: skip
    check(search("red apple", without="green"), index, unit(2 * s - t), 7)
    row = search(image=opened[1], k=1)[0].row
    check(
        search("red apple", row, without=0),
        index,
        unit(2 * unit(s + unit(stored(index)[row])) - unit(stored(index)[0])),
        7,
    )
    check(
        search(image=paths, without=["green", paths[0]]),
        index, unit(2 * pictures - unit(t + a)), 7,
    )  # fmt: skip

    grey = np.random.default_rng(0).integers(0, 1 << 16, (40, 40), dtype=np.uint16)
    Image.fromarray(grey).save(photos / "grey.png")  # scaled from a file and in memory
    assert search(image=photos / "grey.png") == search(image=Image.open(photos / "grey.png"))
    best = search(image=paths[0], k=1)[0]
    assert (best.path, best.label) == (str(paths[0]), "class0")
    assert best.captions == ("<i>one</i>", "two")
    assert best.score == pytest.approx(1, abs=1e-3)
    assert search(image=paths[1], k=1)[0].captions == ()


def test_filters(build: Build, photos: Path) -> None:
    index = pymcip.Index(build().out, device="cpu")
    everything = index.search("red", k=7)
    assert len({hit.label for hit in everything[:3]}) == 2
    for labels in ("class1", ["class0"], ["class0", "class1"]):
        expected = [hit for hit in everything if hit.label in labels]
        assert index.search("red", k=7, where={"label": labels}) == expected
        assert index.search("red", k=2, where={"label": labels}) == expected[:2]
    path = str(photos / "class1" / "0.jpg")
    found = index.search("red", where={"path": path, "label": "class1"})
    assert [hit.path for hit in found] == [path]
    assert index.search("red", where={"path": path, "label": "class0"}) == []


def test_an_index_is_brought_up_to_date(
    build: Build, photos: Path, tmp_path: Path, embedded: list[int]
) -> None:
    picture(0).save(photos / "class0" / "00.png")
    (photos / "class0" / "01.png").write_bytes((photos / "class0" / "00.png").read_bytes())
    before = pymcip.Index(build().out, device="cpu")
    was = before.search("red")
    embedded.clear()
    assert build().new == 0
    assert embedded == []
    picture(50).save(photos / "class0" / "new.png")
    picture(51).save(photos / "class0" / "0.jpg")  # changed
    (photos / "class1" / "1.jpg").unlink()
    (photos / "class1" / "2.jpg").rename(photos / "class0" / "renamed.jpg")
    (photos / "class1" / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    (photos / "class0" / "1.txt").write_text("another caption")
    result = build()
    assert sum(embedded) == 2
    assert (result.images, result.new, result.removed, result.skipped) == (9, 2, 2, 1)
    assert "broken.jpg" in (result.embeddings / "skipped.tsv").read_text()
    assert [path.name for path in result.out.glob("embeddings-*")] == [result.embeddings.name]
    assert before.search("red") == was  # until it is opened again
    now = pymcip.Index(result.out, device="cpu").search("red")
    anew = pymcip.Index(build(out=tmp_path / "anew").out, device="cpu").search("red")
    for one, other in zip(now, anew, strict=True):
        assert one.score == pytest.approx(other.score, abs=2e-6)
        assert (one.path, one.label, one.captions) == (other.path, other.label, other.captions)
    assert ("another caption",) in [hit.captions for hit in now]
    assert build(part_size=2).new == 0  # other files, the same vectors
    assert sum(embedded) == 11


@pytest.mark.parametrize("changed", [False, True])
def test_a_killed_call_is_continued(
    changed: bool,
    build: Build,
    photos: Path,
    embedded: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class KilledError(Exception):
        pass

    with monkeypatch.context() as patch:
        read = ClipModel.encode_images

        def killed(self: ClipModel, pixels: torch.Tensor) -> torch.Tensor:
            if sum(embedded) >= 6:
                raise KilledError
            return read(self, pixels)

        patch.setattr(ClipModel, "encode_images", killed)
        with pytest.raises(KilledError):
            build()
    with pytest.raises(DataError, match="is not finished; run pymcip index again"):
        pymcip.Index(photos.parent / "index")
    if changed:  # what is embedded counts although the data are others by now
        (photos / "class0" / "1.jpg").rename(photos / "class1" / "moved.jpg")
    result = build()
    assert sum(embedded) == 7
    assert result.new == 7
    index = pymcip.Index(result.out, device="cpu")
    assert len(index.search("red")) == 7
    assert len(list(result.out.glob("embeddings-*"))) == 1


def test_paths_hold_from_every_folder(
    build: Build, photos: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photos.parent)
    model = Path("model")
    model.symlink_to(tiny_model_dir)
    result = build(images="photos", out="index", model=str(model))
    out = result.out.absolute()
    monkeypatch.chdir("/")
    assert all(Path(hit.path).is_file() for hit in pymcip.Index(out).search("red"))
    photos.rename(photos.with_name("elsewhere"))
    moved = build(images=photos.with_name("elsewhere"))
    assert moved.new == 0
    assert all("elsewhere" in hit.path for hit in pymcip.Index(out).search("red"))


def test_appended_dimensions_count_as_the_strength_says(
    build: Build, tiny_clip: ClipModel, photos: Path, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(0)
    head = linear_head(torch.randn(6, tiny_clip.embed_dim, generator=generator), torch.zeros(6))
    gate = Gate(torch.eye(tiny_clip.embed_dim)[:2], 0.5, 0.1)
    clip = appended_clip(tiny_clip, None, head, 1.5, gate)
    index = pymcip.Index(build(model=str(write_export(clip, tmp_path / "model").hub)).out)
    path = photos / "class0" / "2.jpg"
    vectors = clip.encode_images(clip.preprocess_val(Image.open(path))[None])
    for strength in (None, 0.0, 0.4, 1):
        query = clip.as_queries(vectors, strength)[0].double().numpy()
        check(index.search(image=path, strength=strength), index, query, 7)
        text = clip.encode_texts(["red"])[0].double().numpy()
        combined = unit(text + unit(query))
        check(index.search("red", path, strength=strength), index, combined, 7)
    assert not np.allclose(query, clip.as_queries(vectors, 0.0)[0])


def test_another_model_is_refused(build: Build, tmp_path: Path) -> None:
    out = build().out
    other = write_hub_folder(tmp_path / "other", seed=1)
    with pytest.raises(StaleEmbeddingsError, match=r"was made by .* overwrite=True to replace"):
        build(model=str(other))
    clip = pymcip.load(str(other), device="cpu", precision="fp32")
    with pytest.raises(StaleEmbeddingsError, match="Give the model it was made by"):
        pymcip.Index(out, clip=clip)
    assert build(model=str(other), overwrite=True).new == 7
    assert len(pymcip.Index(out, clip=clip)) == 7
    assert len(list(out.glob("embeddings-*/img_emb/*.npy"))) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "nothing to look for"),
        ({"text": []}, "nothing to look for"),
        ({"text": " "}, "text=' ' is not allowed"),
        ({"text": 3}, "text=3 is not allowed"),
        ({"text": [None]}, "text=None is not allowed"),
        ({"image": "nowhere.jpg"}, "nowhere.jpg can't be read: No such file"),
        ({"image": "index.json"}, "index.json can't be decoded"),
        ({"image": [3.5]}, "image=3.5 is not allowed"),
        ({"image": 7}, "image=7 is not allowed; the index has the rows 0 to 6"),
        ({"image": True}, "image=True is not allowed"),
        ({"image": Image.new("RGB", (100_000, 1))}, "100000 x 1 pixels become .* are refused"),
        ({"image": Image.new("F", (9, 9), 7.0)}, "can't be converted to RGB: its float pixels"),
        ({"text": "a", "weight": 2}, "weight=2 is not allowed"),
        ({"text": "a", "strength": float("nan")}, "strength=nan is not allowed"),
        ({"text": "a", "k": 0}, "k=0"),
        ({"text": "a", "k": "x"}, "k='x'"),
        ({"text": "a", "where": {"colour": "red"}}, "where={'colour': …} is not allowed; allowed: label"),
        ({"text": "a", "where": {"label": "cat"}}, "no image has the label 'cat'; there are class0, class1"),
        ({"text": "a", "where": {"label": []}}, "where.*empty"),
        ({"text": "a", "without": [-1]}, "is not allowed"),
    ],
)  # fmt: skip
def test_bad_queries(
    arguments: dict[str, Any], message: str, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = build().out
    monkeypatch.chdir(out)
    with pytest.raises(PymcipError, match=message):
        pymcip.Index(out, device="cpu").search(**arguments)


def test_folders_that_are_no_index(build: Build, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no index"):
        pymcip.Index(photos)
    with pytest.raises(PymcipError, match="is not empty"):
        build(out=photos)
    out = build().out
    (out / "index.json").write_text("{}")
    with pytest.raises(DataError, match="is damaged"):
        pymcip.Index(out)
    with pytest.raises(ConfigError, match="images is required"):
        pymcip.build_index(model="m", out=tmp_path)


def test_the_commands(
    build: Build, photos: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = photos / "<b>\x1b[31m"
    (photos / "class0").rename(odd)
    out = str(photos.parent / "index")
    build()
    assert main(["index", str(photos), "--model", str(tiny_model_dir), "--out", out,
                 "--precision", "fp32", "--device", "cpu", "--part-size", "3"]) == 0  # fmt: skip
    assert json.loads(capsys.readouterr().out)["images"] == 7
    image, web = str(odd / "1.jpg"), photos.parent / "page.html"
    assert main(["search", out, "red", "--image", image, "--weight", "1", "-k", "2",
                 "--html", str(web)]) == 0  # fmt: skip
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split() == ["rank", "score", "label", "path"]
    rank, score, label = shown[1].split()[:3]
    assert (rank, label) == ("1", "<b>\\x1b[31m")
    assert float(score) == pytest.approx(1, abs=1e-3)
    assert len(shown) == 3
    page = web.read_text()
    assert page.count("<img") == 2
    assert "&lt;i&gt;one&lt;/i&gt;" in page
    assert set(re.findall(r"</?(\w+)", page.split("<ol>")[1])) == {
        "li", "img", "b", "br", "small", "ol", "html",
    }  # fmt: skip
    assert main(["search", out, "red", "green", "--without", "blue", "--json", "--label",
                 "class1"]) == 0  # fmt: skip
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = pymcip.Index(out).search(["red", "green"], without="blue", where={"label": "class1"})
    assert [(line["row"], line["score"]) for line in lines] == [(h.row, h.score) for h in expected]
    assert main(["search", out]) == 2
    assert "nothing to look for" in capsys.readouterr().err


def test_approximate_search_of_many_images(
    tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("faiss")
    drawing = np.random.default_rng(0)
    with tarfile.open(tmp_path / "many.tar", "w") as tar:
        for number in range(10_000):
            content = io.BytesIO()
            pixels = drawing.integers(0, 256, (4, 4, 3), np.uint8)
            Image.fromarray(pixels).save(content, "PNG")
            for name, data in (("png", content.getvalue()), ("cls", str(number % 9).encode())):
                member = tarfile.TarInfo(f"{number:05}.{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    options = {"model": f"local-dir:{tiny_model_dir}", "images": tmp_path / "many.tar"}
    options |= {"out": tmp_path / "index", "device": "cpu", "precision": "fp32"}
    result = pymcip.build_index(**options, recall=0.9)
    assert result.recall is not None
    assert result.recall.keys() == {"pictures", "texts"}
    index = pymcip.Index(tmp_path / "index", device="cpu")
    assert index.approximate is not None
    vectors = stored(index)
    shares = []
    for row in range(0, 10_000, 100):
        hits = index.search(image=row, k=12)
        assert len(hits) == 12
        rows = [hit.row for hit in hits]
        scores = vectors @ vectors[row]
        np.testing.assert_allclose([hit.score for hit in hits], scores[rows], atol=1e-6)
        shares.append(len({*rows} & {*np.argsort(-scores, kind="stable")[:12].tolist()}) / 12)
    # 100 and 256 queries: a standard error of 0.05 at most, as each share is of 12
    assert abs(np.mean(shares) - result.recall["pictures"]) < 0.15
    assert {hit.label for hit in index.search(image=0, where={"label": "3"})} == {"3"}
    with caplog.at_level("WARNING"):
        again = pymcip.build_index(**options)
    assert (again.new, again.recall) == (0, None)
    assert pymcip.Index(tmp_path / "index", device="cpu").approximate is None


def test_few_images_are_searched_exactly(build: Build) -> None:
    result = build(recall=0.5)
    assert result.recall is None
    assert pymcip.Index(result.out, device="cpu").approximate is None
