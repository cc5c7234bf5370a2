"""Files are complete or absent; the same content gives the same bytes; damage is named."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pymcip.files import (
    atomic_path,
    fingerprint,
    read_json,
    write_json,
    write_text,
)

plain_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_file_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b.txt"
    with atomic_path(target) as temporary:
        temporary.write_text("new")
        assert not target.exists()
        assert temporary.parent == target.parent  # the same file system, so that a rename does
    assert target.read_text() == "new"
    assert names(target.parent) == ["b.txt"]


def test_content_is_on_the_disk_before_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the name before the call returns; so that a power cut leaves the old file or the new one."""
    order: list[str] = []

    def synced(descriptor: int) -> None:
        name = Path(f"/proc/self/fd/{descriptor}").readlink()
        order.append("folder" if name.is_dir() else f"file, {target.exists()}")

    monkeypatch.setattr(os, "fsync", synced)
    target = tmp_path / "a.txt"
    write_text(target, "new")
    assert order == ["file, False", "folder"]
    target = tmp_path / "b"
    with atomic_path(target) as temporary:
        temporary.mkdir()
        (temporary / "c.txt").write_text("new")
    assert order[2:] == ["file, False", "folder"]


def test_failure_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "b.txt"
    target.write_text("old")

    def fail() -> None:
        with atomic_path(target) as temporary:
            temporary.write_text("half of it")
            raise OSError("disk full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert target.read_text() == "old"
    assert names(tmp_path) == ["b.txt"]


def test_folder_appears_whole_and_replaces_a_folder(tmp_path: Path) -> None:
    target = tmp_path / "hub"
    for content in ("first", "second"):
        with atomic_path(target) as temporary:
            temporary.mkdir()
            (temporary / f"{content}.txt").write_text(content)
    assert names(target) == ["second.txt"]

    def fail() -> None:
        with atomic_path(target) as temporary:
            temporary.mkdir()
            (temporary / "third.txt").write_text("third")
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        fail()
    assert names(target) == ["second.txt"]
    assert names(tmp_path) == ["hub"]


def test_block_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "b.txt"):
        pass
    assert names(tmp_path) == []


@given(plain_json)
@settings(max_examples=40, deadline=None)
def test_json_round_trip(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    path = tmp_path_factory.mktemp("json") / "value.json"
    write_json(path, value)
    assert read_json(path) == value


def test_json_is_readable_text(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"name": "Äpfel"})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "name": "Äpfel"\n}\n'
    write_text(tmp_path / "a.json", "gone")
    assert (tmp_path / "a.json").read_text() == "gone"


@given(st.dictionaries(st.text(), plain_json, max_size=5))
@settings(max_examples=40, deadline=None)
def test_fingerprint_does_not_mind_the_order(value: dict[str, object]) -> None:
    backwards = dict(reversed(list(value.items())))
    assert fingerprint(value) == fingerprint(backwards)
    assert fingerprint(value) == fingerprint(json.loads(json.dumps(value)))
    assert fingerprint({**value, "one more": 1}) != fingerprint(value)


def test_fingerprint_is_stable_between_versions() -> None:
    # sha256 of {"a":1,"b":"ä"}
    assert fingerprint({"b": "ä", "a": 1}) == (
        "f5300ffcfd6fd3fc2de46d700be90d43fd799cd9eb69da4737201006143d48a1"
    )
