"""Sources of very many images are indexed in tens of bytes an image, and nothing of them is lost."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import tarfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pymcip.contents import file_digests
from pymcip.data import ImageData, load_images, shards
from pymcip.data.compact import Labels, Names
from pymcip.files import json_pieces

NAMES = ["a", "", "été/日本.jpg", "odd\udcff\udce9.png", "\ud800", "a\0b", "a"]


def test_names_are_what_they_were() -> None:
    names = Names(NAMES)
    names.append("z")
    assert list(names) == [*NAMES, "z"]
    assert [names[row] for row in range(len(names))] == [*NAMES, "z"]
    for row in (-1, len(names)):
        with pytest.raises(IndexError):
            names[row]


def test_labels_are_what_they_were() -> None:
    labels = Labels(["b", None, "a", "b"])
    labels.append("c")
    labels[1] = "a"
    labels[0] = None
    assert list(labels) == [None, "a", "a", "b", "c"]
    assert labels.names == ["b", "a", "c"]
    assert list(labels.codes) == [-1, 1, 1, 0, 2]


def generated(monkeypatch: pytest.MonkeyPatch, folder: Path, images: int) -> Path:
    """A folder of ten shards, whose members are not there but in their index."""

    def read_index(path: Path, tally: Any) -> Iterator[tuple[str, shards.Sample]]:
        for number in range(images // 10):
            key = f"{path.stem}/{number:08d}-photograph"  # 31 characters with .jpg
            yield key, {"jpg": shards.Member(f"{key}.jpg", 512 * number, 1000)}

    folder.mkdir()
    for number in range(10):
        (folder / f"{number:06d}.tar").touch()
    monkeypatch.setattr("pymcip.data.shards.read_index", read_index)
    return folder


def files(monkeypatch: pytest.MonkeyPatch, folder: Path, images: int) -> Path:
    """An ImageFolder of empty files with names of 31 characters."""
    for number in range(images):
        path = folder / f"class{number // 100:05d}" / f"photograph{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


@pytest.mark.parametrize(
    ("make", "few", "many"), [(generated, 10_000, 30_000), (files, 1_000, 3_000)]
)
def test_opening_takes_less_than_100_bytes_an_image(
    make: Any, few: int, many: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What each further image adds to the most that is held at a time."""
    peaks = []
    for images in (few // 2, few, many):  # the first of them brings what any source takes
        source = make(monkeypatch, tmp_path / str(images), images)
        before = pa.total_allocated_bytes()
        tracemalloc.start()
        data = load_images(source, labelled=False)
        peaks.append(tracemalloc.get_traced_memory()[1] + pa.total_allocated_bytes() - before)
        tracemalloc.stop()
        assert len(data) == images
        assert len(data.key(images - 1).removeprefix(f"{source}/")) >= 31
    assert 31 < (peaks[2] - peaks[1]) / (many - few) < 100


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Two shards whose index is kept, however small they are and however new."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("pymcip.contents.SETTLED", 0)
    monkeypatch.setattr("pymcip.data.kept_index.KEPT_FROM", 5)
    for number in range(2):
        write_tar(tmp_path / f"{number:05d}.tar", 3 + number)
    return str(tmp_path / "{00000..00001}.tar")


def write_tar(path: Path, images: int) -> None:
    with tarfile.open(path, "w") as tar:
        for number in range(images):
            picture = io.BytesIO()
            Image.new("RGB", (4, 4), (images, number, 0)).save(picture, "PNG")
            members = {f"é{number}.png": picture.getvalue(), f"é{number}.cls": b"%d" % (number % 2)}
            if number == 1:
                members[f"é{number}.txt"] = "one\ntwo é".encode()
            if number == 2:
                del members[f"é{number}.cls"]
                members["no image.txt"] = b"text"
            for name, content in members.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def everything(data: ImageData) -> list[Any]:
    each = [
        (data.key(i), data.titles(i), data.size(i), data.read(i).tobytes())
        for i in range(len(data))
    ]
    return [each, data.labels.tolist(), data.class_names, data.left_out, data.fingerprint()]


def test_an_index_of_shards_is_found_once(
    shop: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    first = everything(load_images(shop, labelled=False))
    said = [line.message for line in caplog.records]
    caplog.clear()
    with monkeypatch.context() as patched:  # nothing of the shards is read
        patched.setattr("pymcip.data.shards.read_index", None)
        again = load_images(shop, labelled=False)
    (kept,) = caplog.records[0].args[2:]  # type: ignore[index]
    assert [line.message for line in caplog.records[1:]] == said
    assert everything(again) == first
    assert everything(pickle.loads(pickle.dumps(again))) == first
    assert len(first[0]) == 7
    assert first[3]

    content = Path(kept).read_bytes()
    for damaged in (content[:-1], content[:100], b"", content.replace(b"two", b"owt")):
        assert damaged != content == Path(kept).read_bytes()
        Path(kept).write_bytes(damaged)
        assert everything(load_images(shop, labelled=False)) == first
    write_tar(tmp_path / "00001.tar", 5)
    assert len(load_images(shop, labelled=False)) == 8
    assert len(load_images(tmp_path / "00001.tar", labelled=False)) == 5


def test_an_index_of_few_images_or_of_changing_shards_is_not_kept(
    shop: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_images(tmp_path / "00001.tar", labelled=False)
    monkeypatch.setattr("pymcip.contents.SETTLED", 10**12)
    load_images(shop, labelled=False)
    assert not (tmp_path / "cache" / "pymcip" / "indexes").exists()


class Listed:
    """A list that is not one."""

    def __init__(self, *items: Any) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


@pytest.mark.parametrize("piece", [1, 2, 3, 100])
@pytest.mark.parametrize(
    "options", [{}, {"sort_keys": True, "separators": (",", ":"), "ensure_ascii": False}]
)
def test_json_in_pieces_is_json(
    piece: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pymcip.files.PIECE", piece)
    plain = [
        [],
        [1, None, True, 0.5],
        NAMES,
        [["é", "b"], [], [["x"]]],
        {"b": [1, 2], "a": {}},
        "t",
        [7, [8]],
    ]
    lazy = [
        Listed(), [1, None, True, 0.5], Names(NAMES), Listed(["é", "b"], [], (Listed("x"),)),
        {"b": [1, 2], "a": {}}, "t", (7, np.array([8])),
    ]  # fmt: skip
    for value, same in zip([*plain, plain], [*lazy, lazy], strict=True):
        assert "".join(json_pieces(same, **options)) == json.dumps(value, **options)


def test_digests_of_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pymcip.contents.FILES_AT_A_TIME", 2)
    monkeypatch.setattr("pymcip.contents.FILES_WAITING", 4)
    paths = [tmp_path / f"{number}" for number in range(11)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes(number))
    expected = [hashlib.sha256(bytes(number)).digest() for number in range(11)]
    assert [row.tobytes() for row in file_digests(paths)] == expected


def test_the_fingerprint_is_of_plain_json(tmp_path: Path) -> None:
    """By which the folders of earlier versions are known."""
    names = [f"{label}/{number}.png" for label in "ab" for number in range(3)]
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(f"caption é {number}\n" * (number % 3))
    titles = [[f"caption é {number}"] if number % 3 else [] for number in range(6)]
    data: ImageData = load_images(tmp_path)
    contents = b"".join(hashlib.sha256((tmp_path / name).read_bytes()).digest() for name in names)
    described = [["folder", names, titles, hashlib.sha256(contents).hexdigest()], ["a", "b"]]
    digest = hashlib.sha256(json.dumps(described).encode())
    for column in ([0] * 6, range(6), [0, 0, 0, 1, 1, 1]):
        digest.update(np.array(column, np.int64).tobytes())
    assert data.fingerprint() == digest.hexdigest()
