"""Output folders: one process at a time, nothing removed but what was written, leftovers swept."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pymcip.configs import EmbedConfig
from pymcip.errors import FolderInUseError, OutputExistsError
from pymcip.files import atomic_path, write_npz, write_text
from pymcip.folders import LOCK, MANIFEST, hold, manifest, remove_written, temporary_name
from pymcip.outputs import output_folder
from tests.conftest import files

HOLDS = """
import sys, time
from pathlib import Path
from pymcip.folders import hold
with hold(Path(sys.argv[1]), shared="shared" in sys.argv):
    print("held", flush=True)
    time.sleep(60)
"""


def config(out: Path, **more: object) -> EmbedConfig:
    return EmbedConfig(**{"model": "none", "images": "none", "out": out, **more})  # type: ignore[arg-type]


def test_a_folder_is_held_by_one_process_and_freed_when_it_is_killed(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE, cwd="/"
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"held\n"
    said = (tmp_path / LOCK).read_bytes()
    (tmp_path / LOCK).write_bytes(b"")  # as before it says who it is
    with pytest.raises(FolderInUseError, match="in use by another process"), hold(tmp_path):
        pass
    (tmp_path / LOCK).write_bytes(said)
    with pytest.raises(FolderInUseError, match=f"in use by process {child.pid} on"), hold(tmp_path):
        pass
    child.kill()
    child.wait()
    child.stdout.close()
    assert (tmp_path / LOCK).is_file()
    with hold(tmp_path):
        pass
    assert files(tmp_path) == {}


def test_processes_share_a_folder_that_no_other_may_have_meanwhile(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path), "shared"], stdout=subprocess.PIPE, cwd="/"
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"held\n"
    theirs = temporary_name(tmp_path / "part.npy")
    theirs.write_text("being written")
    with hold(tmp_path, shared=True):
        write_text(tmp_path / "mine.txt", "1")
    with pytest.raises(FolderInUseError), hold(tmp_path):
        pass
    assert files(tmp_path).keys() == {theirs.name, "mine.txt", LOCK, MANIFEST}
    child.kill()
    child.wait()
    child.stdout.close()
    with hold(tmp_path):
        pass
    assert files(tmp_path).keys() == {"mine.txt", MANIFEST}
    with hold(tmp_path, shared=True):
        pass
    assert not (tmp_path / LOCK).exists()


def test_threads_wait_for_each_other_and_one_may_enter_twice(tmp_path: Path) -> None:
    order: list[str] = []

    def other() -> None:
        with pytest.raises(FolderInUseError), hold(tmp_path):
            pass
        entered.set()
        with hold(tmp_path, wait=True):
            order.append("other")

    entered = threading.Event()
    thread = threading.Thread(target=other)
    with hold(tmp_path), hold(tmp_path):
        thread.start()
        assert entered.wait(10)
        order.append("first")
    thread.join()
    assert order == ["first", "other"]


def test_a_lock_of_another_host_is_decided_by_the_kernel(tmp_path: Path) -> None:
    for text in ('{"host": "elsewhere", "pid": 1}', "", "not JSON", "[1]"):
        (tmp_path / LOCK).write_text(text)
        with hold(tmp_path):
            assert str(os.getpid()) in (tmp_path / LOCK).read_text()


def test_names_of_temporary_files_are_unique_and_leftovers_are_swept(tmp_path: Path) -> None:
    target = tmp_path / "a" / ("ü" * 120)
    names = {temporary_name(target).name for _ in range(100)}
    assert len(names) == 100
    assert max(len(os.fsencode(name)) for name in names) <= 255
    left = temporary_name(target)
    left.parent.mkdir()
    left.write_text("half")
    temporary_name(tmp_path / "hub").mkdir()
    own = tmp_path / "a" / ".mine.tmp"
    own.write_text("mine")
    with hold(tmp_path):
        assert files(tmp_path).keys() == {"a/.mine.tmp", LOCK}
        assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["a"]


def test_the_manifest_lists_what_is_written_while_a_folder_is_held(tmp_path: Path) -> None:
    write_text(tmp_path / "before.txt", "not listed")
    odd = "a\nb\udcff.txt"
    with hold(tmp_path):
        write_text(tmp_path / odd, "1")
        with atomic_path(tmp_path / "hub") as temporary:
            (temporary / "deep").mkdir(parents=True)
            (temporary / "deep" / "c.txt").write_text("2")
    write_text(tmp_path / "after.txt", "not listed")
    assert manifest(tmp_path) == [odd, "hub/deep/c.txt"]
    (tmp_path / "hub" / "mine.txt").write_text("mine")
    with (tmp_path / MANIFEST).open("a") as handle:
        handle.write('"../outside.txt"\n"/etc/passwd"\n{"half')
    with hold(tmp_path):
        assert remove_written(tmp_path) == ["after.txt", "before.txt", "hub"]
    assert files(tmp_path).keys() == {"after.txt", "before.txt", "hub/mine.txt"}


def test_nothing_behind_a_link_is_removed(tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    (out / "part").mkdir(parents=True)
    other.mkdir()
    with hold(out):
        write_text(out / "part" / "a.txt", "ours")
        write_text(out / "b.txt", "ours")
    (out / "part" / "a.txt").rename(other / "a.txt")
    (out / "part").rmdir()
    (out / "part").symlink_to(other)
    with hold(out):
        remove_written(out)
    assert files(other) == {"a.txt": b"ours"}
    assert not (out / "b.txt").exists()


def test_output_folders(tmp_path: Path) -> None:
    with output_folder(config(tmp_path / "a" / "b")) as out:
        write_text(out / "x.txt", "ours")
    with pytest.raises(OutputExistsError, match=r"not empty.*overwrite=True.*resume"):
        output_folder(config(out)).__enter__()
    with output_folder(config(out), resume=True):
        assert (out / "x.txt").read_text() == "ours"
    (out / "kept.txt").write_text("mine")
    with output_folder(config(out, overwrite=True)):
        assert files(out).keys() == {"kept.txt", LOCK}
    with pytest.raises(OutputExistsError, match=r"kept\.txt, which pymcip did not write"):
        output_folder(config(out, overwrite=True)).__enter__()
    with pytest.raises(OutputExistsError, match="is a file"):
        output_folder(config(out / "kept.txt", overwrite=True)).__enter__()
    assert files(out) == {"kept.txt": b"mine"}


@pytest.mark.parametrize("how", ["glob", "brace", "link", "local-dir:", "hard link", "folder"])
def test_overwriting_never_removes_an_input(tmp_path: Path, how: str) -> None:
    out, read = tmp_path / "out", []
    out.mkdir()
    with hold(out):
        for number in range(2):
            write_text(out / "parts" / f"{number}.txt", "ours")
    before = files(out)
    source = {
        "glob": f"{out}/parts/*.txt",
        "brace": f"{out}/parts/{{0..1}}.txt",
        "link": str(tmp_path / "link"),
        "local-dir:": f"local-dir:{out}/../out/parts",
        "hard link": "none",
        "folder": str(out / "parts"),
    }[how]
    (tmp_path / "link").symlink_to(out / "parts")
    if how == "hard link":  # such as a table that points to it
        read = [tmp_path / "picture.jpg"]
        read[0].hardlink_to(out / "parts" / "1.txt")
    for name in ("images", "captions", "model"):
        given = dataclasses.replace(config(out, overwrite=True), **{name: source})
        with pytest.raises(OutputExistsError, match="overwrite would remove"):
            output_folder(given, read=read).__enter__()
    assert files(out) == before


def test_the_same_content_gives_the_same_file(tmp_path: Path) -> None:
    digests = set()
    for name in ("a", "b"):
        path = tmp_path / name / "table.npz"
        write_npz(path, ids=[1, 2], scores=[0.5, 0.25])
        os.utime(path, (1, 1))
        digests.add(hashlib.sha256(path.read_bytes()).hexdigest())
    assert len(digests) == 1


def test_a_signal_frees_the_folder(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path)],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd="/",
    )  # fmt: skip
    assert child.stdout is not None
    child.stdout.readline()
    child.send_signal(signal.SIGINT)
    child.wait()
    child.stdout.close()
    assert files(tmp_path) == {}
