"""Caption corpora: every layout gives the same texts; duplicates, order, bad input."""

from __future__ import annotations

import bz2
import gzip
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from pymcip.data import Captions, load_captions
from pymcip.errors import DataError
from tests.conftest import CAPTIONS, picture, write_shard

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def zstd(content: bytes) -> bytes:
    compressed: bytes = pa.compress(content, codec="zstd", asbytes=True)
    return compressed


def test_text(captions_file: Callable[..., Path]) -> None:
    captions = load_captions(captions_file())
    assert captions.texts == CAPTIONS
    assert list(captions) == CAPTIONS
    assert len(captions) == len(CAPTIONS)
    assert captions[3] == CAPTIONS[3]
    assert captions.slice(2, 4) == CAPTIONS[2:4]
    assert captions.slice(6, 100) == CAPTIONS[6:]
    assert captions.slice(3, 3) == []
    assert captions.duplicates == 0


def test_duplicates_and_blank_lines(captions_file: Callable[..., Path]) -> None:
    captions = load_captions(captions_file(["b", "", "a", " b\t", "   ", "a", "B", "b  b"]))
    assert captions.texts == ["b", "a", "B", "b  b"]
    assert captions.duplicates == 2


def test_duplicates_between_sources(captions_file: Callable[..., Path]) -> None:
    first = captions_file(["a", "b"], "1.txt")
    second = captions_file(["c", "b"], "2.txt")
    assert load_captions([first, second]).texts == ["a", "b", "c"]
    assert load_captions((second, first)).texts == ["c", "b", "a"]
    assert load_captions(first.parent / "{1..2}.txt").texts == ["a", "b", "c"]
    assert load_captions(first.parent).duplicates == 1


@pytest.mark.parametrize(
    ("ending", "compress"), [("gz", gzip.compress), ("zst", zstd), ("bz2", bz2.compress)]
)
def test_compressed(ending: str, compress: Callable[[bytes], bytes], tmp_path: Path) -> None:
    content = "".join(f"{text}\n" for text in CAPTIONS).encode()
    (tmp_path / f"c.txt.{ending}").write_bytes(compress(content))
    (tmp_path / f"d.tsv.{ending}").write_bytes(compress(b"http://x\tred \xc3\xa4pple\n"))
    (tmp_path / f"e.csv.{ending}").write_bytes(compress(b'n,caption\n1,"a, b"\n'))
    assert load_captions(tmp_path).texts == [*CAPTIONS, "red äpple", "a, b"]


def test_several_compressed_streams_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"one\ntw") + gzip.compress(b"o\n"))
    assert load_captions(tmp_path / "c.txt.gz").texts == ["one", "two"]


def test_other_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "c.txt"
    path.write_bytes("\ufeffone\r\ntwo\u2028still two\r\n\r\nthree".encode())
    assert load_captions(path).texts == ["one", "two\u2028still two", "three"]


def test_cc12m_layout_is_taken_as_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "cc12m.tsv"
    path.write_text(
        'https://a/1.jpg\t"Quoted" from the start, never closed\n'
        'https://a/2.jpg\t<PERSON> at the "sea"\n\nhttps://a/3.jpg\tplain\n'
    )
    assert load_captions(path).texts == [
        '"Quoted" from the start, never closed',
        '<PERSON> at the "sea"',
        "plain",
    ]


def test_tsv_with_header_and_quotes(tmp_path: Path) -> None:
    path = tmp_path / "c.tsv"
    path.write_text('url\tCaption\tsize\nu1\t"a ""b""\tc"\t3\nu2\tplain\t4\n')
    assert load_captions(path).texts == ['a "b"\tc', "plain"]


def test_tsv_of_one_column(tmp_path: Path) -> None:
    (tmp_path / "c.tsv").write_text("first\nsecond\n")
    assert load_captions(tmp_path / "c.tsv").texts == ["first", "second"]


@pytest.mark.parametrize("column", ["caption", "title", "TEXT"])
def test_csv_and_parquet(column: str, tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text(f'id,{column}\n7,"one, two"\n8,\n9,NA\n')
    assert load_captions(tmp_path / "c.csv").texts == ["one, two", "NA"]
    table = pa.table({"id": [1, 2, 3], column: ["one", None, "two"]})
    pa.parquet.write_table(table, tmp_path / "c.parquet")
    assert load_captions(tmp_path / "c.parquet").texts == ["one", "two"]


def test_caption_column_goes_before_title_and_text(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("text,title,caption\nx,y,z\n")
    assert load_captions(tmp_path / "c.csv").texts == ["z"]


def test_shards(shards: Callable[..., list[Path]]) -> None:
    samples = [
        {"jpg": picture(0), "txt": " one \n", "json": {"caption": "not this"}},
        {"jpg": picture(1), "json": {"caption": "two"}},
        {"jpg": picture(2), "json": {"caption": None}, "cls": 3},
        {"txt": "three"},
        {"txt": "one"},
    ]
    folder = shards(samples, per_shard=2)[0].parent
    captions = load_captions(folder / "{000000..000002}.tar")
    assert captions.texts == ["one", "two", "three"]
    assert captions.duplicates == 1
    assert load_captions(folder).texts == captions.texts


def test_img2dataset_folder_is_read_from_its_parquet_files(
    shards: Callable[..., list[Path]],
) -> None:
    paths = shards([{"txt": "in the shard"}, {"txt": "in the second shard"}], per_shard=1)
    table = pa.table({"caption": ["in the shard", "failed to download"], "key": ["0", "1"]})
    pa.parquet.write_table(table, paths[0].with_suffix(".parquet"))
    paths[0].with_name("000000_stats.json").write_text("{}")
    expected = ["in the shard", "failed to download", "in the second shard"]
    assert load_captions(paths[0].parent).texts == expected


def test_fingerprint(captions_file: Callable[..., Path], tmp_path: Path) -> None:
    path = captions_file(["a", "b", "a"])
    fingerprint = load_captions(path).fingerprint()
    (tmp_path / "same.tsv").write_text("http://x/1\ta\nhttp://x/2\tb\n")
    assert load_captions(tmp_path / "same.tsv").fingerprint() == fingerprint
    assert Captions(["a", "b"]).fingerprint() == fingerprint
    assert Captions(["b", "a"]).fingerprint() != fingerprint
    assert Captions(["ab"]).fingerprint() != fingerprint


def test_many_lines(captions_file: Callable[..., Path]) -> None:
    lines = [f"caption {number % 150_000}" for number in range(200_000)]
    captions = load_captions(captions_file(lines))
    assert captions.texts == lines[:150_000]
    assert captions.duplicates == 50_000
    assert sum(1 for _ in captions) == 150_000


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real data at {SHARED}")
def test_real_corpus() -> None:
    captions = load_captions([SHARED / "captions" / "flickr8k.txt.gz"])
    assert len(captions) + captions.duplicates == 40_588
    assert len(set(captions.texts)) == len(captions)


# Bad input


def test_nothing_there(tmp_path: Path, captions_file: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match=r"nothing at .*absent"):
        load_captions(tmp_path / "absent.txt")
    with pytest.raises(DataError, match=r"holds no captions; expected files .*\.txt"):
        load_captions(tmp_path)
    with pytest.raises(DataError, match="not one caption"):
        load_captions(captions_file(["", "  "]))
    (tmp_path / "empty.tsv").write_bytes(b"")
    with pytest.raises(DataError, match="not one caption"):
        load_captions(tmp_path / "empty.tsv")


def test_other_kind(tmp_path: Path) -> None:
    (tmp_path / "c.docx").write_text("x")
    with pytest.raises(DataError, match=r"c\.docx is no caption file; allowed: \.txt"):
        load_captions(tmp_path / "c.docx")


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_no_caption_column(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"c.{ending}"
    if ending == "csv":
        path.write_text("url,alt\nx,y\n")
    else:
        pa.parquet.write_table(pa.table({"url": ["x"], "alt": ["y"]}), path)
    with pytest.raises(
        DataError, match="no column caption, title or text; it starts with url, alt"
    ):
        load_captions(path)


def test_ragged_tsv(tmp_path: Path) -> None:
    path = tmp_path / "c.tsv"
    path.write_text("u\tone\nu\ttwo\nu\tthree\tfour\n")
    with pytest.raises(DataError, match=r"line 3: 3 cells; expected 2 as in the first line"):
        load_captions(path)
    path.write_text("a\tb\tc\n")
    with pytest.raises(
        DataError, match=r"line 1: .*3 cells; expected url<TAB>caption, .*or a header"
    ):
        load_captions(path)


def test_not_text(tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_bytes("käse".encode("latin-1"))
    with pytest.raises(DataError, match=r"c\.txt is not UTF-8 text .*convert it"):
        load_captions(tmp_path / "c.txt")


@pytest.mark.parametrize(("ending", "compress"), [("gz", gzip.compress), ("zst", zstd)])
def test_truncated_file(ending: str, compress: Callable[[bytes], bytes], tmp_path: Path) -> None:
    content = compress("".join(f"line {i}\n" for i in range(1000)).encode())
    path = tmp_path / f"c.txt.{ending}"
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=rf"c\.txt\.{ending} can't be read"):
        load_captions(path)


def test_unsafe_shard(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "x.tar", [("0.txt", b"fine"), ("../1.txt", b"not")])
    with pytest.raises(DataError, match=r"x\.tar: member '\.\./1\.txt' points outside"):
        load_captions(path)
