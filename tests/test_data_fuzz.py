"""Readers of users' files, given damaged ones: the right answer, or a PymcipError, and nothing else."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pymcip.data import load_captions, load_images
from pymcip.data.class_names import read_class_names
from pymcip.errors import PymcipError
from tests.conftest import encoded, picture, sample_members, write_shard

EXAMPLES = int(15 * float(os.environ.get("PYMCIP_EXAMPLES", "1")))
WORDS = [f"caption number {number}" for number in range(6)]
JPEG = encoded(picture(0))


def parquet() -> bytes:
    buffer = io.BytesIO()
    lists = pa.array([[word] for word in WORDS])
    pyarrow.parquet.write_table(pa.table({"caption": lists, "n": range(6)}), buffer)
    return buffer.getvalue()


def table(head: str, row: Callable[[int, str], str]) -> bytes:
    return (head + "".join(row(number, word) + "\n" for number, word in enumerate(WORDS))).encode()


CONTENTS: dict[str, bytes] = {
    "lines.txt": table("", lambda n, word: word),
    "token.txt": table("", lambda n, word: f"{n}.jpg#0\t{word}"),
    "captions.txt": table("image,caption\n", lambda n, word: f"{n}.jpg,{word}"),
    "cc12m.tsv": table("", lambda n, word: f"http://x/{n}\t{word}"),
    "quoted.csv": table("n,caption\n", lambda n, word: f'"{n}","{word}"'),
    "results.csv": table("image_name| comment_number| comment\n", lambda n, w: f"{n}.jpg| 0| {w}"),
    "list.json": json.dumps(
        [{"image": f"{n}.jpg", "caption": w} for n, w in enumerate(WORDS)]
    ).encode(),
    "rows.jsonl": table("", lambda n, word: json.dumps({"image": f"{n}.jpg", "text": word})),
    "table.parquet": parquet(),
}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.getLogger("pymcip").setLevel(logging.CRITICAL)
    yield
    logging.getLogger("pymcip").setLevel(logging.NOTSET)


@st.composite
def damaged(draw: Any, content: bytes) -> bytes:
    """Flip bytes, cut, repeat, swap lines or cells, put quotes and zero bytes in."""
    lines = content.split(b"\n")
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, max(0, len(content) - 1)))
        match draw(st.integers(0, 6)):
            case 0:
                content = (
                    content[:place] + bytes([draw(st.integers(0, 255))]) + content[place + 1 :]
                )
            case 1:
                content = content[:place]
            case 2:
                content = content[:place] + content[max(0, place - 40) :]
            case 3:
                order = draw(st.permutations(range(len(lines))))
                content = b"\n".join(lines[row] for row in order)
            case 4:
                content = b"\n".join(b"\t".join(line.split(b"\t")[::-1]) for line in lines)
            case 5:
                content = content[:place] + b'"' + content[place:]
            case _:
                content = (
                    content[:place] + b"\r\xff\xfe\0"[: draw(st.integers(1, 4))] + content[place:]
                )
    return content


def outcome(read: Callable[[], Any]) -> Any:
    """Call a reader; its value, or None if it refuses."""
    with contextlib.suppress(PymcipError):
        return read()
    return None


@pytest.mark.parametrize("name", CONTENTS)
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_captions(name: str, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(CONTENTS[name])
        assert load_captions(path).texts == WORDS
        path.write_bytes(data.draw(damaged(CONTENTS[name])))
        found = outcome(lambda: load_captions(path))
        if found is not None:
            assert all(text == text.strip() and text for text in found)
            outcome(lambda: load_images(path, labelled=False))


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_shards(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        members = [
            member
            for number, word in enumerate(WORDS[:3])
            for member in sample_members(f"{number}", {"jpg": JPEG, "cls": number, "txt": word})
        ]
        path = write_shard(Path(folder) / "x.tar", members)
        path.write_bytes(data.draw(damaged(path.read_bytes())))
        found = outcome(lambda: load_images(path, labelled=False))
        if found is not None:
            for index in range(len(found)):
                outcome(lambda: found.read(index))  # noqa: B023
        outcome(lambda: load_captions(path))


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_images_and_labels(data: st.DataObject) -> None:
    content = b"filepath,label,title\n0.jpg,a,one\n1.jpg,b,two\n2.jpg,a,three\n"
    with tempfile.TemporaryDirectory() as folder:
        for number in range(3):
            (Path(folder) / f"{number}.jpg").write_bytes(JPEG)
        (Path(folder) / "1.jpg").write_bytes(data.draw(damaged(JPEG)))
        path = Path(folder) / "t.csv"
        path.write_bytes(data.draw(damaged(content)))
        found = outcome(lambda: load_images(path, labelled=False))
        if found is not None:
            for index in range(len(found)):
                outcome(lambda: found.read(index))  # noqa: B023
        path.write_bytes(data.draw(damaged(b"label\tname\na\tapple\nb\tpear\n")))
        outcome(lambda: read_class_names(path))


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    captions=st.lists(
        st.text(st.sampled_from('ab",;\n é\t'), min_size=1, max_size=12)
        .map(str.strip)
        .filter(bool),
        min_size=1,
        max_size=6,
        unique=True,
    )
)
def test_what_csv_writes_is_read_or_refused(captions: list[str]) -> None:
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(["n", "caption"])
    writer.writerows(enumerate(captions))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.csv"
        path.write_bytes(buffer.getvalue().encode())
        found = outcome(lambda: load_captions(path).texts)
        assert found == captions or (found is None and any("\n" in text for text in captions))
