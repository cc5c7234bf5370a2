"""`pymcip.check`: what it says of images and of captions, and what it writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

import pymcip
from pymcip.cli import main
from pymcip.errors import DataError


@pytest.fixture
def shop(tiny_images: Callable[..., Path]) -> Path:
    folder = tiny_images(classes=3, per_class=4)
    (folder / "Class-1").mkdir()
    (folder / "Class-1" / "copy.jpg").write_bytes((folder / "class0" / "1.jpg").read_bytes())
    (folder / "class2" / "empty.jpg").write_bytes(b"")
    (folder / "class2" / "drawing.svg").write_text("<svg/>")
    (folder / "class0" / "1.jpg").rename(folder / "class0" / "one")
    (folder / "class2" / "0.txt").write_text("a red square\nhttp://x/1.jpg\n")
    return folder


def test_images(shop: Path, tmp_path: Path) -> None:
    result = pymcip.check(shop, out=tmp_path / "out")
    assert result.counts == {
        "images": 14, "labelled": 14, "classes": 4, "captions": 2, "duplicates": 1, "left_out": 1,
    }  # fmt: skip
    assert result.left_out == {"no kind of image that Pillow reads here": 1}
    told = "\n".join(result.suspicious)
    for part in (
        "1 of 4 classes have one image: Class-1",
        "1 groups of class names are nearly the same: 'Class-1' and 'class1'",
        "1 of 14 files have no image's extension and are read as images by their content: ",
        "1 image files are empty",
        "1 images are copies of others: ",
        "1 copies have another class than the first",
        "1 of 2 captions are web addresses",
    ):
        assert part in told
    assert len(result.suspicious) == 7
    assert (
        "most common: class2 5, class0 4, class1 4, Class-1 1\nrarest:      Class-1 1"
        in result.table
    )
    assert (tmp_path / "out" / "check.txt").read_text() == result.table
    key, reason = (tmp_path / "out" / "skipped.tsv").read_text().splitlines()[1].split("\t")
    assert (Path(key).name, reason) == ("drawing.svg", "no kind of image that Pillow reads here")
    with Image.open(tmp_path / "out" / "thumbnails.png") as sheet:
        assert sheet.size == (1000, 4 * 116)


def test_captions_and_command_line(
    captions_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = captions_file(["a dog", "a dog", "a" * 301, "x"])
    assert main(["check", str(path)]) == 0
    table, line = capsys.readouterr().out.rstrip().rsplit("\n", 1)
    assert json.loads(line)["counts"] == {"captions": 3, "duplicates": 1, "left_out": 0}
    assert "1 of 3 captions have more than 300 characters" in table
    assert "1 of 3 captions have one or two characters: 'x'" in table


def test_neither(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"as images: .*holds no images.*\nas captions: .*no captions"
    ):
        pymcip.check(tmp_path)
