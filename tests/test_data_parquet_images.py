"""Parquet files that hold the images themselves, as Hugging Face's datasets write them."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from pymcip.data import load_images
from pymcip.errors import DataError, DecodeError, PymcipError
from tests.conftest import picture

NAMES = ["hat", "shoe"]


def encoded(seed: int) -> bytes:
    handle = io.BytesIO()
    picture(seed).save(handle, "PNG")
    return handle.getvalue()


def write(
    path: Path, columns: dict[str, Any], group: int = 2, names: list[str] | None = None
) -> Path:
    table = pa.table(columns)
    if names is not None:
        features = {"label": {"names": names, "_type": "ClassLabel"}}
        described = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": described})
    pyarrow.parquet.write_table(table, path, row_group_size=group)
    return path


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Two files of three images each."""
    for number in (0, 1):
        images = [
            {"bytes": encoded(3 * number + i), "path": f"{number}-{i}.png" if i else None}
            for i in range(3)
        ]
        columns = {
            "image": images,
            "label": [number, 1 - number, -1 if number else 0],
            "caption": [["one", "two"], [], ["three"]],
        }
        write(tmp_path / f"train-{number}.parquet", columns, names=NAMES)
    return [str(tmp_path / f"train-{number}.parquet") for number in (0, 1)]


def test_images_labels_and_captions(files: list[str]) -> None:
    data = load_images(str(Path(files[0]).parent / "train-*.parquet"), labelled=False)
    assert len(data) == 6
    assert data.class_names == NAMES
    assert data.labels.tolist() == [0, 1, 0, 1, 0, -1]
    assert [data.titles(i) for i in range(3)] == [("one", "two"), (), ("three",)]
    assert [data.key(i) for i in (0, 4)] == [f"{files[0]}/row 0", f"{files[1]}/1-1.png"]
    again = pickle.loads(pickle.dumps(data))  # as for worker processes
    for i in (5, 0, 3, 1, 4, 2, 0):
        expected = np.asarray(picture(i))
        assert np.array_equal(np.asarray(data.read(i)), expected)
        assert np.array_equal(np.asarray(again.read(i)), expected)


def test_the_fingerprint_is_of_the_content(files: list[str], tmp_path: Path) -> None:
    before = load_images(files, labelled=False).fingerprint()
    assert load_images(files, labelled=False).fingerprint() == before
    columns = {"image": [encoded(9)] * 3, "label": [0, 1, 0]}
    write(Path(files[1]), columns)
    assert load_images(files, labelled=False).fingerprint() != before


def test_plain_bytes_and_plain_labels(tmp_path: Path) -> None:
    columns = {"image": [encoded(0), encoded(1)], "label": ["a", "b"]}
    data = load_images(write(tmp_path / "x.parquet", columns))
    assert data.class_names == ["a", "b"]
    assert np.array_equal(np.asarray(data.read(1)), np.asarray(picture(1)))


def test_names_of_files_in_binary_are_no_images(tmp_path: Path) -> None:
    picture(0).save(tmp_path / "a.png")
    picture(1).save(tmp_path / "b.png")
    columns = {"image": [b"a.png", b"b.png"], "label": ["a", "b"]}
    data = load_images(write(tmp_path / "x.parquet", columns))
    assert data.key(0) == str(tmp_path / "a.png")


def test_a_row_without_an_image_is_named(tmp_path: Path) -> None:
    images = [{"bytes": encoded(0)}, {"bytes": None}]
    data = load_images(write(tmp_path / "x.parquet", {"image": images, "label": ["a", "b"]}))
    with pytest.raises(DecodeError, match="row 1: the row has no image"):
        data.read(1)


def test_files_of_both_kinds_are_two_sources(tmp_path: Path) -> None:
    picture(0).save(tmp_path / "a.png")
    write(tmp_path / "0.parquet", {"image": [encoded(0)], "label": ["a"]})
    write(tmp_path / "1.parquet", {"image": ["a.png"], "label": ["b"]})
    with pytest.raises(DataError, match="give them as two sources"):
        load_images(str(tmp_path / "*.parquet"))


def test_damaged_files_are_named_or_read_as_they_were(tmp_path: Path) -> None:
    """One byte changed anywhere: an error of pymcip's, or pictures that the decoder judges."""
    small = io.BytesIO()
    picture(0, size=4).save(small, "PNG")
    images = [{"bytes": small.getvalue(), "path": f"{name}.png"} for name in "ab"]
    path = write(tmp_path / "x.parquet", {"image": images, "label": ["a", "b"]})
    whole, refused = path.read_bytes(), 0
    for place in range(0, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            data = load_images(path, labelled=False)
            for i in range(len(data)):
                data.read(i)
        except PymcipError:
            refused += 1
    assert refused > 10
