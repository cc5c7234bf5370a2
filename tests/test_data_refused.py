"""Image sources that are missing, damaged or unsafe are refused, with what to do."""

from __future__ import annotations

import logging
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from pymcip.data import load_images
from pymcip.data.sources import expand_braces, natural
from pymcip.errors import DataError, DecodeError
from tests.conftest import picture, sample_members, write_shard, write_table

# Bad input


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing at .*absent; .*Give an existing file, folder"):
        load_images(tmp_path / "absent")
    with pytest.raises(DataError, match=r"nothing at .*\*\.tar"):
        load_images(tmp_path / "*.tar")
    with pytest.raises(DataError, match="no image source was given"):
        load_images(())


def test_missing_shards_of_a_pattern_are_named(shards: Callable[..., list[Path]]) -> None:
    folder = shards()[0].parent
    with pytest.raises(DataError, match=r"000003\.tar, .*000009\.tar|000003\.tar.*\(7 in all\)"):
        load_images(folder / "{000000..000009}.tar")


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no images; expected .*class/image\.jpg"):
        load_images(tmp_path)
    (tmp_path / "class0").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        load_images(tmp_path)


def test_empty_class_folder_is_reported(
    tiny_images: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny_images(classes=2, per_class=1)
    (folder / "nothing").mkdir()
    with caplog.at_level(logging.WARNING):
        assert load_images(folder).class_names == ["class0", "class1"]
    assert "without images are no classes: nothing" in caplog.text


def test_url() -> None:
    with pytest.raises(
        DataError, match="not a local path; allowed: a file, a folder, or a pattern"
    ):
        load_images("https://example.org/{000..010}.tar")


def test_unknown_kind(tmp_path: Path) -> None:
    (tmp_path / "x.pdf").write_text("x")
    with pytest.raises(DataError, match=r"no image source; allowed: a folder .*\.csv.*tar shards"):
        load_images(tmp_path / "x.pdf")


def test_one_class(tiny_images: Callable[..., Path]) -> None:
    folder = tiny_images(classes=1)
    with pytest.raises(DataError, match=r"only one class \('class0'\).*two at least"):
        load_images(folder)
    assert load_images(folder, labelled=False).num_classes == 1


def test_image_without_a_class(
    tiny_images: Callable[..., Path], shards: Callable[..., list[Path]]
) -> None:
    folder = tiny_images(classes=2, per_class=2)
    picture(0).save(folder / "stray.jpg")
    with pytest.raises(DataError, match=r"1 of 5 images have no class: .*stray\.jpg"):
        load_images(folder)
    rows = [{"filepath": "class0/0.jpg", "label": "a"}, {"filepath": "class1/0.jpg", "label": " "}]
    with pytest.raises(DataError, match=r"1 of 2 images have no class: .*class1/0\.jpg"):
        load_images(write_table(folder / "list.csv", rows))
    samples = [{"jpg": picture(i), **({"cls": i} if i < 2 else {})} for i in range(10)]
    with pytest.raises(DataError, match=r"8 of 10 images .*000002\.jpg, .* … \(8 in all\)"):
        load_images(shards(samples)[0].parent)


def test_label_gaps(shards: Callable[..., list[Path]], caplog: pytest.LogCaptureFixture) -> None:
    path = shards([{"jpg": picture(i), "cls": label} for i, label in enumerate([9, 2, 4])])[0]
    with caplog.at_level(logging.WARNING):
        data = load_images(path)
    assert data.labels.tolist() == [2, 0, 1]
    assert data.class_names == ["2", "4", "9"]
    assert "no image has the label 3, 5, 6, 7, 8; classes are numbered" in caplog.text


def test_huge_label_gap_is_reported_quickly(
    shards: Callable[..., list[Path]], caplog: pytest.LogCaptureFixture
) -> None:
    path = shards([{"jpg": picture(i), "cls": label} for i, label in enumerate([0, 10**15])])[0]
    with caplog.at_level(logging.WARNING):
        load_images(path)
    assert f"1, 2, 3, 4, 5 … ({10**15 - 1} in all)" in caplog.text


@pytest.mark.parametrize("name", ["../evil.jpg", "a/../../evil.jpg", "/etc/evil.jpg"])
def test_unsafe_member(name: str, tmp_path: Path) -> None:
    members = [*sample_members("0", {"jpg": picture(0), "cls": 0}), (name, b"x")]
    path = write_shard(tmp_path / "bad.tar", members)
    with pytest.raises(DataError, match=r"bad\.tar: member '.*evil\.jpg' points outside"):
        load_images(path)


def test_links_in_shards_are_not_followed(tmp_path: Path) -> None:
    path = write_shard(
        tmp_path / "x.tar",
        [
            member
            for i in range(2)
            for member in sample_members(str(i), {"jpg": picture(i), "cls": i})
        ],
    )
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("2.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    assert len(load_images(path)) == 2


@pytest.mark.parametrize("cut", [700, 5000])
def test_truncated_shard(cut: int, shards: Callable[..., list[Path]]) -> None:
    path = shards([{"jpg": picture(i, size=200), "cls": i} for i in range(3)])[0]
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"000000\.tar can't be read as a tar shard: .*cut short"):
        load_images(path)


def test_damaged_header_does_not_end_a_shard_in_silence(shards: Callable[..., list[Path]]) -> None:
    path = shards()[0]
    with tarfile.open(path) as archive:
        third = archive.getmembers()[4].offset
    content = bytearray(path.read_bytes())
    content[third : third + 50] = b"x" * 50
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"damaged header at byte {third}"):
        load_images(path)


def test_shard_cut_after_indexing(shards: Callable[..., list[Path]]) -> None:
    path = shards()[0]
    data = load_images(path)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(DataError, match="cut short since it was indexed") as caught:
        data.read(3)
    assert not isinstance(caught.value, DecodeError)  # embedding must not skip it


def test_compressed_shard(shards: Callable[..., list[Path]], tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(shards()[0], "0.jpg")
    with pytest.raises(DataError, match=r"uncompressed tar \(unpack \.tar\.gz first\)"):
        load_images(path)


def test_duplicate_member(tmp_path: Path) -> None:
    sample = sample_members("0", {"jpg": picture(0), "cls": 0})
    with pytest.raises(DataError, match=r"member 0\.jpg is there twice"):
        load_images(write_shard(tmp_path / "x.tar", [*sample, *sample]))


def test_keys_without_an_image_are_reported(
    shards: Callable[..., list[Path]], caplog: pytest.LogCaptureFixture
) -> None:
    samples = [
        {"jpg": picture(0), "cls": 0},
        {"cls": 1, "txt": "lost"},
        {"png": picture(1), "cls": 2},
    ]
    with caplog.at_level(logging.WARNING):
        assert len(load_images(shards(samples)[0])) == 2
    assert "1 left out, no image under its key: " in caplog.text


def test_shards_without_images(shards: Callable[..., list[Path]]) -> None:
    with pytest.raises(DataError, match=r"no images; expected members named key\.jpg"):
        load_images(shards([{"txt": "only text"}])[0])


@pytest.mark.parametrize(
    ("member", "content", "message"),
    [("json", b"{", "is not JSON"), ("json", b"\xff{", "not UTF-8"), ("cls", b"\xff", "not UTF-8")],
)
def test_broken_member(
    member: str, content: bytes, message: str, shards: Callable[..., list[Path]]
) -> None:
    path = shards([{"jpg": picture(0), member: content}])[0]
    with pytest.raises(DataError, match=message):
        load_images(path)


@pytest.mark.parametrize("ending", ["csv", "tsv", "parquet"])
def test_table_without_columns(ending: str, tmp_path: Path) -> None:
    path = write_table(tmp_path / f"x.{ending}", [{"file": "a.jpg", "label": "1"}])
    with pytest.raises(DataError, match=r"no column filepath; it has .*file.* Expected a header"):
        load_images(path)


def test_table_with_missing_files(tiny_images: Callable[..., Path]) -> None:
    folder = tiny_images(classes=2, per_class=1)
    rows = [{"filepath": f"class{i}/0.jpg", "label": f"{i}"} for i in range(4)]
    with pytest.raises(DataError, match=r"2 of 4 images .* are not there: .*class2/0\.jpg"):
        load_images(write_table(folder / "x.csv", rows))


def test_broken_tables(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("filepath,label\na.jpg,1\nb.jpg,2,3\n")
    with pytest.raises(DataError, match=r"x\.csv can't be read as CSV: .*[Ee]xpected 2 columns"):
        load_images(tmp_path / "x.csv")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"x\.parquet can't be read as PARQUET"):
        load_images(tmp_path / "x.parquet")
    (tmp_path / "y.csv").write_text("filepath,label\n")
    with pytest.raises(DataError, match="no rows"):
        load_images(tmp_path / "y.csv")
    (tmp_path / "z.csv").write_text("filepath,label\n,1\n")
    with pytest.raises(DataError, match="row 1 has no filepath"):
        load_images(tmp_path / "z.csv")


def test_braces() -> None:
    assert expand_braces("{08..11}") == ["08", "09", "10", "11"]
    assert expand_braces("{3..1}-{a,b}") == ["3-a", "3-b", "2-a", "2-b", "1-a", "1-b"]
    assert expand_braces("x{0..2}.tar") == ["x0.tar", "x1.tar", "x2.tar"]
    assert expand_braces("{single}") == ["{single}"]
    with pytest.raises(DataError, match="allowed: up to"):
        expand_braces("{0..99999999}")


def test_a_path_with_braces_is_a_path(shards: Callable[..., list[Path]], tmp_path: Path) -> None:
    path = shards()[0].rename(tmp_path / "x{0..3}.tar")
    assert len(load_images(path)) == 4


def test_natural_order() -> None:
    assert sorted(["b", "a10", "a2", "10", "9"], key=natural) == ["9", "10", "a2", "a10", "b"]
