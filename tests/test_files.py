"""Files are complete or absent, and output folders are not lost by accident."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pymcip.errors import OutputExistsError
from pymcip.files import (
    atomic_path,
    file_fingerprint,
    fingerprint,
    prepare_output,
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


def test_file_fingerprint_sees_size_and_time(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(b"123")
    os.utime(path, ns=(5, 7))
    assert file_fingerprint(path) == ["a.tar", 3, 7]
    path.write_bytes(b"1234")
    os.utime(path, ns=(5, 7))
    assert file_fingerprint(path) == ["a.tar", 4, 7]


# Output folders


def test_new_and_empty_folders_are_taken(tmp_path: Path) -> None:
    assert prepare_output(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert prepare_output(str(tmp_path / "a" / "b")).is_dir()


def test_folder_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "kept.txt").write_text("kept")
    with pytest.raises(OutputExistsError, match=r"not empty.*overwrite=True.*resume"):
        prepare_output(tmp_path)
    assert prepare_output(tmp_path, resume=True) == tmp_path
    assert names(tmp_path) == ["kept.txt"]
    with pytest.raises(OutputExistsError, match="is a file"):
        prepare_output(tmp_path / "kept.txt", overwrite=True)
    prepare_output(tmp_path, overwrite=True)
    assert names(tmp_path) == []


@pytest.mark.parametrize("prefix", ["", "local-dir:"])
def test_overwriting_never_removes_an_input(tmp_path: Path, prefix: str) -> None:
    (tmp_path / "run" / "hub").mkdir(parents=True)
    inputs = (None, "ViT-B-32", f"{prefix}{tmp_path}/run/../run/hub")
    with pytest.raises(OutputExistsError, match="overwrite would remove"):
        prepare_output(tmp_path / "run", overwrite=True, inputs=inputs)
    assert (tmp_path / "run" / "hub").is_dir()
    prepare_output(tmp_path / "run", resume=True, inputs=inputs)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").write_text("old")
    prepare_output(tmp_path / "out", overwrite=True, inputs=inputs)
    assert names(tmp_path / "out") == []
