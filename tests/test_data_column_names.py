"""`columns=`: names of a table's columns that the user gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

import pymcip
from pymcip.data import ImageData, load_captions, load_images
from pymcip.data.column_names import columns_named
from pymcip.errors import ConfigError, DataError
from tests.conftest import picture

NAMES = {"filepath": "Picture file", "label": "category", "caption": "beschreibung"}
ROWS = [
    {"Picture file": f"{i}.png", "category": "ab"[i % 2], "beschreibung": f"text {i}"}
    for i in range(4)
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(4):
        picture(i).save(tmp_path / f"{i}.png")
    return tmp_path


def write(folder: Path, kind: str, rows: list[dict[str, str]]) -> Path:
    path = folder / f"table.{kind}"
    if kind == "parquet":
        pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        mark = {"csv": ",", "tsv": "\t"}[kind]
        lines = [mark.join(row) for row in ([*rows[0]], *(row.values() for row in rows))]
        path.write_text("\n".join(lines))
    return path


def found(data: ImageData) -> list[tuple[str, str, tuple[str, ...]]]:
    return [
        (Path(data.key(i)).name, data.class_names[data.labels[i]], data.titles(i))
        for i in range(len(data))
    ]


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet"])
@pytest.mark.parametrize(
    "others", [{}, {"label": "no", "image": "no", "title": "no", "caption_2": "no"}]
)
def test_named_columns_are_read_and_no_others(
    kind: str, others: dict[str, str], folder: Path
) -> None:
    path = write(folder, kind, [{**others, **row} for row in ROWS])
    with columns_named(NAMES):
        data, captions = load_images(path), load_captions(path)
    assert found(data) == [(f"{i}.png", "ab"[i % 2], (f"text {i}",)) for i in range(4)]
    assert captions.texts == [f"text {i}" for i in range(4)]
    with pytest.raises(DataError):  # what was named is not remembered
        load_images(path)


def test_tables_without_the_names_are_read_as_ever(folder: Path) -> None:
    own = write(folder, "csv", ROWS)
    usual = folder / "usual.csv"
    usual.write_text("filepath,label\n0.png,x\n1.png,y\n")
    with columns_named(NAMES):
        data = load_images([own, usual])
    assert data.class_names == ["a", "b", "x", "y"]


def test_names_that_are_wrong(folder: Path) -> None:
    path = write(folder, "csv", ROWS)
    with (
        pytest.raises(DataError, match=r"has a column 'categorie', .*did you mean 'category'"),
        columns_named({**NAMES, "label": "categorie"}),
    ):
        load_captions(path)
    (folder / "texts.txt").write_text("one\ntwo")
    with (
        pytest.raises(DataError, match="has a column 'x', to be read as caption"),
        columns_named({"caption": "x"}),
    ):
        load_captions(folder / "texts.txt")
    for columns, message in (
        ({"lable": "x"}, "did you mean 'label'"),
        ({"label": 1.5}, "a column's name"),
        ({"label": "x", "caption": "x"}, "one column can't be two things"),
    ):
        with pytest.raises(ConfigError, match=message):
            pymcip.CheckConfig(data="d", columns=columns)


def test_the_stages_take_them(folder: Path, tiny_model_dir: Path) -> None:
    path = write(folder, "csv", ROWS)
    own: dict[str, Any] = {"columns": NAMES}
    model = {"model": f"local-dir:{tiny_model_dir}", "device": "cpu", "precision": "fp32"}
    checked = pymcip.check(data=path, **own)
    assert checked.counts["images"] == 4
    assert checked.counts["classes"] == 2
    embedded = pymcip.embed(**model, images=path, captions=path, out=folder / "emb", **own)
    assert embedded.captions() == [f"text {i}" for i in range(4)]
    pymcip.build_index(**model, images=path, out=folder / "index", **own)
    assert pymcip.Index(folder / "index").search("red", k=1)[0].label in ("a", "b")
    assert "t2i_r1" in pymcip.evaluate(**model, data=path, **own).metrics
    result = pymcip.train(
        **model, train_data=path, val_data=path, captions=path, out=folder / "run", epochs=1,
        batch_size=4, method="mcip", threshold=-1.0, **own,
    )  # fmt: skip
    command = (result.out / "out.log").read_text().splitlines()[-1]
    assert "--columns 'filepath=Picture file' label=category caption=beschreibung" in command
