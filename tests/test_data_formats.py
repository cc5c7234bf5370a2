"""Files of captions as the field writes them: what each is taken for, and what is refused."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from pymcip.data import load_captions, load_images
from pymcip.errors import DataError
from tests.conftest import picture

ANNOTATIONS = Path(__file__).resolve().parents[2] / "shared" / "data" / "annotations"
COCO = {
    "images": [{"id": 7, "file_name": "a.jpg"}, {"id": 3, "file_name": "b.jpg"}],
    "annotations": [
        {"image_id": 3, "caption": "one"},
        {"image_id": 7, "caption": "two\n"},
        {"image_id": 7, "caption": "three"},
    ],
}
KARPATHY = {
    "images": [
        {"filename": "a.jpg", "split": "train", "sentences": [{"raw": "one"}, {"raw": "two"}]},
        {"filename": "b.jpg", "split": "test", "sentences": [{"raw": "three"}]},
    ]
}
# File name, content, captions, and a piece of what the log says it was taken for.
READ: list[tuple[str, str | bytes, list[str], str]] = [
    ("cc3m.tsv", "a bus\thttp://x/1\na cat\thttps://x/2\n", ["a bus", "a cat"], "caption and url"),
    (
        "cc12m.tsv",
        'http://x/1\t"a" bus\nhttp://x/2\ta cat\n',
        ['"a" bus', "a cat"],
        "url and caption",
    ),
    ("captions.txt", 'image,caption\n1.jpg,a dog\n1.jpg,"a , b"\n', ["a dog", "a , b"], "image"),
    ("karpathy.txt", "image,caption\n1.jpg,a, b\n1.jpg,c\n2.jpg,d, e\n", ["a, b", "c", "d, e"], ""),
    ("token.txt", "1.jpg#0\ta dog\n1.jpg#1\ta cat , too\n", ["a dog", "a cat , too"], "image"),
    (
        "results.csv",
        "image_name| comment_number| comment\n1.jpg| 0| A man, a dog .\n2.jpg| 4   A cat .\n",
        ["A man, a dog .", "A cat ."],
        "comment",
    ),
    ("tab.csv", "image\tcaption\na.jpg\ta, b\n", ["a, b"], "TSV"),
    ("semicolon.csv", "image;caption\na.jpg;a, b\n", ["a, b"], "caption"),
    ("twice.csv", "n,caption\n1,a\nn,caption\n2,b\n", ["a", "b"], "CSV"),
    (
        "inch.tsv",
        'caption\n"6 inch pipe\nred\n"old" lamp\n',
        ['"6 inch pipe', "red", '"old" lamp'],
        "",
    ),
    ("inch.csv", 'n,caption\n1,"6 inch\n2,b\n3,c\n', ['"6 inch', "b", "c"], "without quoting"),
    ("lines.csv", 'n,caption\n1,"a\nb"\n2,c\n', ["a\nb", "c"], "quoted"),
    ("all.csv", '"n","caption"\n"1","a\n2,b"\n"3","c"\n', ["a\n2,b", "c"], "quoted"),
    ("utf16.txt", "käse\nbrot\n".encode("utf-16"), ["käse", "brot"], "a caption per line"),
    ("mac.txt", b"one\rtwo\r", ["one", "two"], "a caption per line"),
    ("coco.json", json.dumps(COCO), ["two", "three", "one"], "COCO"),
    ("dataset.json", json.dumps(KARPATHY), ["one", "two", "three"], "Karpathy"),
    (
        "blip.json",
        json.dumps([{"image": "a.jpg", "caption": ["one", "two"]}, {"caption": "three"}]),
        ["one", "two", "three"],
        "BLIP",
    ),
    ("by_image.json", json.dumps({"a.jpg": ["one"], "b.jpg": "two"}), ["one", "two"], "by image"),
    ("m.jsonl", '{"file_name": "a.jpg", "text": "one"}\n{"text": "two"}\n', ["one", "two"], "JSON"),
]
REFUSED: list[tuple[str, str | bytes, str]] = [
    ("two.tsv", "a b\tc d\ne f\tg h\n", "line 1: .*2 cells; expected url<TAB>caption"),
    ("turn.tsv", "http://x/1\ta\n" * 300 + "b\thttp://x/2\n", "line 301: 'b' is no url"),
    ("names.txt", "a.jpg a dog\nb.jpg a cat\n", "line 1: .*begins with an image's name"),
    ("urls.txt", "http://x/1\nhttp://x/2\n", "line 1: .*is a web address"),
    (
        "swallow.csv",
        'n,caption\n1,"6 inch\n2,red 5"\n3,c\n',
        "line 2: a quote opens a cell that closes",
    ),
    ("wide.csv", "n,caption\n1,a\n2,b,c\n", "line 3: Expected 2 columns .*got 3"),
    ("double.csv", "caption,n,Caption\na,1,b\n", "has 2 columns caption"),
    ("utf16.txt", "käse\nbrot".encode("utf-16-le"), "UTF-16 or UTF-32 without a byte-order mark"),
    ("zero.txt", b"one\ntwo\nth\0ree\n", "line 3 holds a zero byte"),
    ("latin.txt", b"one\nk\xe4se\n", r"not UTF-8 text \(line 2: "),
    ("lines.txt", '{"caption": "a"}\n', "holds JSON in each line; name it .jsonl"),
    ("instances.json", json.dumps({**COCO, "annotations": [{"image_id": 3}]}), "has no caption"),
    ("odd.json", '{"a": {"b": 1}}', "known: COCO's captions"),
    ("deep.json", "[" * 100_000, "is not JSON"),
    ("bad.jsonl", '{"text": "one"}\n{"text": \n', "line 2 is not JSON"),
]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(("name", "content", "captions", "told"), READ, ids=lambda v: str(v)[:12])
def test_read(
    name: str,
    content: str | bytes,
    captions: list[str],
    told: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        assert load_captions(write(tmp_path / name, content)).texts == captions
    (said,) = (r.getMessage() for r in caplog.records if ": read as " in r.getMessage())
    assert told in said


@pytest.mark.parametrize(("name", "content", "message"), REFUSED, ids=lambda v: str(v)[:12])
def test_refused(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        load_captions(write(tmp_path / name, content))


@pytest.mark.parametrize(
    ("column", "captions"),
    [
        (pa.array([["a", "b"], None, [], ["c"]]), ["a", "b", "c"]),
        (pa.array([[{"raw": "a"}, {"raw": "b"}], [{"raw": "c"}]]), ["a", "b", "c"]),
        (pa.array([{"caption": "a"}, None, {"caption": "b"}]), ["a", "b"]),
        (pa.array([[["a"], ["b", "c"]], [], [["d"]]]), ["a", "b", "c", "d"]),
        (pa.array(["a", "b"]).dictionary_encode(), ["a", "b"]),
        (pa.array([b"a", None, b"b"]), ["a", "b"]),
        (pa.array([["a", "b"], ["c", "d"]], pa.list_(pa.string(), 2)), ["a", "b", "c", "d"]),
    ],
)
def test_columns_of_parquet(column: pa.Array, captions: list[str], tmp_path: Path) -> None:
    pa.parquet.write_table(
        pa.table({"id": range(len(column)), "caption": column}), tmp_path / "t.parquet"
    )
    assert load_captions(tmp_path / "t.parquet").texts == captions


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([b"a", b"\xff"]), "row 2: column caption is not UTF-8"),
        (pa.array([{"k": 1}]), "column caption holds struct"),
        (pa.array([1.0, 2.5]), r"column caption holds 2\.5"),
    ],
)
def test_columns_that_are_no_texts(column: pa.Array, message: str, tmp_path: Path) -> None:
    pa.parquet.write_table(pa.table({"caption": column}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=message):
        load_captions(tmp_path / "t.parquet")


def test_numbered_columns_are_all_captions(tmp_path: Path) -> None:
    table = pa.table({"caption_0": ["a", "c"], "caption_1": ["b", "d"], "title": ["x", "y"]})
    pa.parquet.write_table(table, tmp_path / "t.parquet")
    assert load_captions(tmp_path / "t.parquet").texts == ["a", "b", "c", "d"]


def test_documents_in_a_folder_are_no_captions(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("README.txt", "LICENSE-2.0.txt", "nshards.txt", "classnames.txt"):
        (tmp_path / name).write_text("MIT\n")
    (tmp_path / "readings.txt").write_text("a page\n")
    (tmp_path / "00000_stats.json").write_text('{"count": 1}')
    (tmp_path / "more.json").write_text('["lost"]')
    captions = load_captions(tmp_path)
    assert captions.texts == ["a page"]
    assert len(captions.left_out) == 5
    assert "4 left out, a document by its name" in caplog.text


@pytest.mark.parametrize("folder", ["", "Images"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("captions.txt", "image,caption\na.jpg,one\na.jpg,two\nb.jpg,three\n"),
        ("t.token.txt", "a.jpg#0\tone\na.jpg#1\ttwo\nb.jpg#0\tthree\n"),
        ("dataset.json", json.dumps(KARPATHY)),
        (
            "m.jsonl",
            '{"file_name": "a.jpg", "caption": ["one", "two"]}\n{"image": "b.jpg", "caption": "three"}',
        ),
    ],
)
def test_lists_of_captions_are_sources_of_images_too(
    name: str, content: str, folder: str, tmp_path: Path
) -> None:
    (tmp_path / folder).mkdir(exist_ok=True)
    for number, image in enumerate(("a.jpg", "b.jpg")):
        picture(number).save(tmp_path / folder / image)
    data = load_images(write(tmp_path / name, content), labelled=False)
    assert [Path(data.key(i)).name for i in range(len(data))] == ["a.jpg", "b.jpg"]
    assert [data.titles(i) for i in range(2)] == [("one", "two"), ("three",)]


@pytest.mark.skipif(not ANNOTATIONS.is_dir(), reason=f"no real data at {ANNOTATIONS}")
def test_real_annotations(tmp_path: Path) -> None:
    flickr = load_captions(ANNOTATIONS / "flickr8k" / "captions_1000.txt")
    assert len(flickr) + flickr.duplicates == 5_000
    assert not any(".jpg" in text or text.startswith('"') for text in flickr)
    coco = tmp_path / "captions_val2017.json"
    coco.write_bytes(
        gzip.decompress((ANNOTATIONS / "coco" / "captions_val2017.json.gz").read_bytes())
    )
    captions = load_captions(coco)
    assert len(captions) + captions.duplicates == 25_014
    labels: Any = ANNOTATIONS / "fgvc" / "train.txt"
    with pytest.raises(DataError, match=r"line 1: '1025794\.jpg 1' begins with an image's name"):
        load_captions(labels)
