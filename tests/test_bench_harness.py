"""The harness of the benches: rows that are stored name no place of the machine that made them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import bench_module

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def harness() -> Iterator[Any]:
    with bench_module("harness") as module:
        yield module


def test_paths_in_neutral_form(harness: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for text, wanted in {
        f"python {ROOT}/bench/x.py --out runs/a": "python bench/x.py --out runs/a",
        "--data ../shared --out=/data/runs/7 --store": "--data shared --out=7 --store",
        "local-dir:/models/vit": "local-dir:vit",
        "~/images/{0..7}.tar": "{0..7}.tar",
        "can't read '/data/a.bin' (or /data/b)": "can't read 'a.bin' (or b)",
        "https://example.org/a": "https://example.org/a",
        "12 GFLOP/s, 1 / 3, and/or": "12 GFLOP/s, 1 / 3, and/or",
    }.items():
        assert harness.neutral(text) == wanted
    value = {"file": Path("/a/b.so"), "rows": (1, None, ["/c/d"]), "share": 0.5}
    assert harness.neutral(value) == {"file": "b.so", "rows": [1, None, ["d"]], "share": 0.5}


def test_stored_rows_are_neutral(
    harness: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "rows.jsonl"
    monkeypatch.setenv("PYMCIP_BENCH_ROWS", str(file))
    monkeypatch.setattr(sys, "argv", [str(ROOT / "bench" / "x.py"), "--out", str(tmp_path)])
    report = harness.Report("none", device="cpu", dtype="float32", store=True)
    report.record({"options": {"data": str(tmp_path / "data")}})
    row = json.loads(file.read_text())
    assert row["command"] == f"{Path(sys.executable).name} bench/x.py --out {tmp_path.name}"
    assert row["options"] == {"data": "data"}
    assert os.sep not in row["core"]["file"] or (ROOT / row["core"]["file"]).is_file()


@pytest.mark.parametrize(
    "file", sorted((ROOT / "bench" / "results").glob("*.json*")), ids=lambda file: file.name
)
def test_what_is_in_the_repository_is_neutral(harness: Any, file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    documents = text.splitlines() if file.suffix == ".jsonl" else [text]
    for document in map(json.loads, documents):
        assert harness.neutral(document) == document
