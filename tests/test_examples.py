"""The notebook runs from top to bottom; files for contributors name what is there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent


def test_the_notebook_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((ROOT / "examples" / "search.ipynb").read_text())
    names: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [], "outputs are not kept under version control"
            exec("".join(cell["source"]), names)
    result, losses = names["result"], names["losses"]
    assert result.hub.is_dir()
    assert len(losses) == result.steps > 0
    assert "| image-to-image mAP |" in result.markdown
    printed = capsys.readouterr().out
    assert "300" in printed, "images, of pymcip.check"
    assert printed.count("  class ") == 3


def test_files_for_contributors_name_what_is_there() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([\w-]+):", makefile, re.M))
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    text = (ROOT / "CONTRIBUTING.md").read_text() + container["postCreateCommand"]
    named = set(re.findall(r"(?:^ +|`|^)make (\w+)", text, re.M))
    assert {"setup", "test"} <= named <= targets
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    for hook in hooks:
        entry = hook["entry"].replace(".venv/bin", "$(BIN)").removesuffix(" --force-exclude")
        assert entry in makefile
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        form = yaml.safe_load(path.read_text())
        assert path.name == "config.yml" or {"name", "description", "body"} <= form.keys()
    extras = re.findall(r"\.\[([\w,]+)\]", (ROOT / "Dockerfile").read_text())[0].split(",")
    assert all(f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text() for extra in extras)
