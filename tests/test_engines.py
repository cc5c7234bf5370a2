"""The recipes of docs/search.md for other engines: run as they stand, they find what our search finds."""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pymcip

DOCS = Path(__file__).parent.parent / "docs" / "search.md"
PACKAGES = {
    "faiss": ["faiss"],
    "usearch": ["usearch"],
    "LanceDB": ["lancedb"],
    "Qdrant": ["qdrant_client"],
    "Milvus": ["pymilvus", "milvus_lite"],
    "pgvector": ["psycopg", "pgvector", "pgserver"],
}


def recipes() -> dict[str, str]:
    """The code of each engine by its heading; that of "" comes before all."""
    text = DOCS.read_text(encoding="utf-8").partition("## Other engines")[2]
    first, *parts = re.split(r"^### (.*)$", text, flags=re.M)
    blocks = {"": first, **dict(zip(parts[::2], parts[1::2], strict=True))}
    found = {name: re.search(r"```python\n(.*?)```", block, re.S) for name, block in blocks.items()}
    return {name: match[1] for name, match in found.items() if match}


@pytest.mark.parametrize("engine", PACKAGES)
def test_a_recipe_finds_the_nearest(
    engine: str,
    tmp_path: Path,
    tiny_model_dir: Path,
    tiny_images: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for package in PACKAGES[engine]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                importlib.import_module(package)
            except ImportError:
                pytest.skip(f"{package} is not installed; pip install 'pymcip[engines]'")
    monkeypatch.chdir(tmp_path)
    pymcip.embed(model=str(tiny_model_dir), images=str(tiny_images("photos")), out="photos.emb")
    Path("runs").mkdir()
    Path("runs/shop").symlink_to(tiny_model_dir)
    values: dict[str, Any] = {}
    server = None
    if engine == "pgvector":
        server = importlib.import_module("pgserver").get_server(tmp_path / "postgres")
        values["DATABASE"] = server.get_uri()
    code = recipes()
    with warnings.catch_warnings():  # of other packages
        warnings.simplefilter("ignore")
        exec(compile(code[""] + code[engine], str(DOCS), "exec"), values)
    if server is not None:
        server.cleanup()
    scores = values["vectors"] @ values["query"]
    order = np.argsort(-scores)[:5]
    assert np.diff(scores[order]).max() < 0
    assert values["paths"] == [values["rows"][row]["image_path"] for row in order]


def test_the_recipe_for_elasticsearch_is_python() -> None:
    compile(recipes()["Elasticsearch"], str(DOCS), "exec")
