"""Readers of GPR1200, CUB-200 and INSTRE on miniatures of their layouts.

What they give is fed to the metric with embeddings made by hand, and compared with numbers computed
by hand.
"""

import contextlib
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pymcip import metrics
from pymcip.benchmarks.contract import AbsentError, DataSet, Labelled, SuiteOptions
from pymcip.benchmarks.cub200 import CUB200
from pymcip.benchmarks.gpr1200 import GPR1200, GPR1200_COUNTS
from pymcip.benchmarks.instre import INSTRE
from pymcip.benchmarks.revisited import ROXFORD5K, RPARIS6K
from pymcip.errors import MissingDependencyError
from tests.benchmark_layouts import (
    INSTRE_DATABASE,
    INSTRE_QUERIES,
    matlab_cells,
    matlab_structs,
    save_picture,
    write_cub200,
    write_gpr1200,
    write_instre,
    write_roxford5k,
    write_rparis6k,
)
from tests.benchmark_reading import PARTIAL, fan, labelled, names_of, query_set, refusal

INSTRE_ALL = SuiteOptions(allow_partial=True, instre="all")
WRITERS: dict[str, tuple[DataSet, Callable[[Path], Any]]] = {
    "gpr1200": (GPR1200, write_gpr1200),
    "instre": (INSTRE, write_instre),
    "cub200": (CUB200, write_cub200),
    "roxford5k": (ROXFORD5K, write_roxford5k),
    "rparis6k": (RPARIS6K, write_rparis6k),
}


# All of them


@pytest.mark.parametrize("name", WRITERS)
def test_counts_are_named_and_the_partial_is_marked(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data, write = WRITERS[name]
    write(tmp_path)
    wanted = {
        "gpr1200": "6 of 12,000 images, 3 of 1,200 classes, 0 of 1,200 classes of 10 images",
        "instre": "2 of 1,250 queries, 6 of 27,293 database images",
        "cub200": "5 of 5,924 images, 3 of 100 classes",
        "roxford5k": "2 of 70 queries, 8 of 4,993 database images",
        "rparis6k": "2 of 70 queries, 8 of 6,322 database images",
    }[name]
    message = refusal(data, tmp_path, SuiteOptions())
    assert f"found {wanted};" in message
    assert "allow_partial=True" in message
    assert data.read(tmp_path, PARTIAL).notes == (f"partial: {wanted}",)
    assert wanted in caplog.text


@pytest.mark.parametrize("name", WRITERS)
def test_an_empty_folder_is_absent_and_the_message_says_where_to_get_it(
    name: str, tmp_path: Path
) -> None:
    data, _ = WRITERS[name]
    with pytest.raises(AbsentError, match=re.escape(data.source)):
        data.read(tmp_path, PARTIAL)


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "cub200"])  # it lists none
def test_the_order_of_the_listing_means_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, write = WRITERS[name]
    write(tmp_path)
    options = INSTRE_ALL if name == "instre" else PARTIAL
    before = data.read(tmp_path, options)
    scandir = os.scandir

    calls: list[Any] = []

    @contextlib.contextmanager
    def turned(path: Any) -> Iterator[list[os.DirEntry[str]]]:
        calls.append(path)
        with scandir(path) as entries:
            yield sorted(entries, key=lambda entry: entry.name, reverse=True)

    monkeypatch.setattr(os, "scandir", turned)
    after = data.read(tmp_path, options)
    assert after.images.fingerprint() == before.images.fingerprint()
    if isinstance(before, Labelled):
        assert isinstance(after, Labelled)
        np.testing.assert_array_equal(after.labels, before.labels)
    assert calls


def test_the_registry_names() -> None:
    assert [data.name for data, _ in WRITERS.values()] == list(WRITERS)
    for data, _ in WRITERS.values():
        assert data.layout.strip()
        assert data.source.startswith("http")


# GPR1200


@pytest.mark.parametrize("moved", ["", "images", "GPR1200"])
def test_gpr1200_is_ordered_by_class_number_then_name(tmp_path: Path, moved: str) -> None:
    names = write_gpr1200(tmp_path)
    folder = tmp_path
    if moved == "images":
        folder = tmp_path / "images"
    elif moved:
        shutil.move(tmp_path / "images", tmp_path / "top" / moved / "images")
        folder = tmp_path / "top"
    found = labelled(GPR1200, folder)
    assert [Path(name).name for name in names_of(found.images, folder)] == names
    assert found.labels.tolist() == [0, 0, 2, 2, 10, 10]
    assert found.labels.dtype == np.int64
    assert found.images.read(0).size == (40, 40)
    # e0 e0 e1 e0 e2 e2: precisions 1, 1, (1/1 + 2/4)/2, (1/3 + 2/4)/2, 1, 1
    embeddings = np.eye(3)[[0, 0, 1, 0, 2, 2]]
    expected = 100 * (1 + 1 + 3 / 4 + 5 / 12 + 1 + 1) / 6
    assert metrics.full_ranking_map(embeddings, found.labels) == pytest.approx(expected)


def test_gpr1200_complete_needs_no_permission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gpr1200(tmp_path)
    for label in (0, 2, 10):
        for number in range(8):
            save_picture(tmp_path / "images" / f"{label}_more{number}.JPG", number)
    monkeypatch.setitem(GPR1200_COUNTS, "images", 30)
    monkeypatch.setitem(GPR1200_COUNTS, "classes", 3)
    monkeypatch.setitem(GPR1200_COUNTS, "classes of 10 images", 3)
    assert labelled(GPR1200, tmp_path, SuiteOptions()).notes == ()
    (tmp_path / "images" / "0_z.jpg").rename(tmp_path / "images" / "2_z2.jpg")  # 9 and 11
    assert "1 of 3 classes of 10 images" in refusal(GPR1200, tmp_path, SuiteOptions())


def test_gpr1200_refuses_names_without_a_class(tmp_path: Path) -> None:
    write_gpr1200(tmp_path)
    for name in ("cover.jpg", "x1_a.jpg", "-1_a.jpg"):
        save_picture(tmp_path / "images" / name, 0)
    message = refusal(GPR1200, tmp_path)
    assert "3 images have no class number before a '_': -1_a.jpg, cover.jpg, x1_a.jpg" in message


# CUB-200-2011


@pytest.mark.parametrize("below", ["", "CUB_200_2011", "CUB_200_2011/CUB_200_2011"])
def test_cub_takes_the_second_half_of_the_classes(tmp_path: Path, below: str) -> None:
    names = write_cub200(tmp_path / below)
    found = labelled(CUB200, tmp_path)
    assert names_of(found.images, tmp_path / below / "images") == names
    assert found.labels.tolist() == [199, 100, 100, 101, 199]
    # the nearest others of e0 e1 e1 e1 e0, ties by index: rows 4, 2, 1, 1, 0; the fourth is wrong
    embeddings = np.eye(2)[[0, 1, 1, 1, 0]]
    assert metrics.nearest_other_recall(embeddings, found.labels) == pytest.approx(80)


def test_cub_goes_by_ids_not_by_lines(tmp_path: Path) -> None:
    write_cub200(tmp_path)
    for name in ("images.txt", "image_class_labels.txt", "classes.txt"):
        lines = (tmp_path / name).read_text().splitlines()
        turned = lines if name == "images.txt" else lines[::-1]
        (tmp_path / name).write_bytes("\r\n".join([*turned, ""]).encode())
    assert labelled(CUB200, tmp_path).labels.tolist() == [199, 100, 100, 101, 199]


def test_cub_refuses_lists_that_disagree(tmp_path: Path) -> None:
    write_cub200(tmp_path)
    labels = tmp_path / "image_class_labels.txt"
    whole = labels.read_text()
    labels.write_text(whole.replace("3 200\n", "3 201\n").replace("8 3\n", "9 3\n"))
    message = refusal(CUB200, tmp_path)
    assert "don't list the same images: 8, 9" in message
    assert "has classes that classes.txt lacks: 3" in message
    labels.write_text(whole.replace("4 101\n", "4 102\n"))
    assert "image 4 is 101.Bird_101/Bird_101_0004.jpg, but its class is 102" in refusal(
        CUB200, tmp_path
    )


def test_cub_refuses_malformed_lists(tmp_path: Path) -> None:
    write_cub200(tmp_path)
    images = tmp_path / "images.txt"
    whole = images.read_text()
    images.write_text(whole + "8 again.jpg\n9\nnine x.jpg\n")
    message = refusal(CUB200, tmp_path)
    assert "line 9: 8 for the second time" in message
    assert "line 10: '9'" in message
    assert "needed: a number and a text in each line" in message
    assert "line 11: 'nine x.jpg'" in message
    images.write_text("\n")
    assert "no lines; needed: a number" in refusal(CUB200, tmp_path)
    images.write_bytes(b"1 \xff.jpg\n")
    assert "can't be read as UTF-8 text" in refusal(CUB200, tmp_path)
    images.unlink()
    assert "has no images.txt; unpack CUB_200_2011.tgz again" in refusal(CUB200, tmp_path)


def test_cub_refuses_to_miss_an_image_of_the_test_classes_only(tmp_path: Path) -> None:
    names = write_cub200(tmp_path)
    shutil.rmtree(tmp_path / "images" / "001.Bird_1")
    assert len(labelled(CUB200, tmp_path).images) == 5
    (tmp_path / "images" / names[1]).unlink()
    message = refusal(CUB200, tmp_path)
    assert "1 of 5 images" in message
    assert names[1] in message


# INSTRE


@pytest.mark.parametrize("layout", ["", "INSTRE_release", "images"])
def test_instre_takes_queries_and_truth_of_the_mat_file(tmp_path: Path, layout: str) -> None:
    write_instre(tmp_path / layout)
    if layout == "images":  # the ground truth beside the folder of the images
        shutil.move(tmp_path / layout / "gnd_instre.mat", tmp_path / "gnd_instre.mat")
    found = query_set(INSTRE, tmp_path)
    base = tmp_path / layout
    assert names_of(found.images, base) == list(INSTRE_DATABASE)
    assert names_of(found.queries, base) == list(INSTRE_QUERIES)
    assert [each["ok"].tolist() for each in found.truth] == [[0, 1, 4, 5], [4, 5]]
    assert all(each["ok"].dtype == np.int64 for each in found.truth)
    assert found.queries.crops is None
    assert found.queries.read(0).size == (40, 40)


def test_instre_by_hand(tmp_path: Path) -> None:
    write_instre(tmp_path)
    truth = [each["ok"] for each in query_set(INSTRE, tmp_path).truth]
    # The first query ranks 0 1 2 3 4 5: positives at 0, 1, 4, 5. The second 5 4 3 2 1 0: at 0, 1.
    found = metrics.trapezoidal_retrieval(fan([0, 90]), fan([10, 20, 30, 40, 50, 60]), truth)
    first = ((1 + 1) + (1 + 1) + (2 / 4 + 3 / 5) + (3 / 5 + 4 / 6)) / (2 * 4)
    assert found == pytest.approx(100 * (first + 1) / 2)


def test_instre_crops_queries_if_asked(tmp_path: Path) -> None:
    write_instre(tmp_path)
    found = query_set(INSTRE, tmp_path, SuiteOptions(allow_partial=True, instre_crop=True))
    assert found.queries.read(0).size == (20, 22)
    assert found.queries.read(1).size == (40, 30)
    assert found.images.crops is None
    plain = query_set(INSTRE, tmp_path)
    assert plain.images.fingerprint() == found.images.fingerprint()
    assert plain.queries.fingerprint() != found.queries.fingerprint()


def test_instre_all_takes_every_image_with_its_folder_for_a_class(tmp_path: Path) -> None:
    write_instre(tmp_path)
    (tmp_path / "gnd_instre.mat").unlink()
    found = labelled(INSTRE, tmp_path, INSTRE_ALL)
    assert names_of(found.images, tmp_path) == sorted([*INSTRE_DATABASE, *INSTRE_QUERIES])
    assert found.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 3]
    assert found.notes == ("partial: 8 of 28,543 images, 4 of 250 folders",)
    # e0 e0 e1 e1 e1 e1 e2 e3: row 2 ranks 2 3 4 5 0 1, rows 3, 4 and 5 rank 2 3 4 5
    embeddings = np.eye(4)[[0, 0, 1, 1, 1, 1, 2, 3]]
    third, later = (1 / 1 + 2 / 5 + 3 / 6) / 3, (1 / 2 + 2 / 3 + 3 / 4) / 3
    expected = 100 * (1 + 1 + third + 3 * later + 1 + 1) / 8
    assert metrics.full_ranking_map(embeddings, found.labels) == pytest.approx(expected)


def test_instre_all_says_when_folders_share_a_name(tmp_path: Path) -> None:
    write_instre(tmp_path)
    save_picture(tmp_path / "INSTRE-S2" / "01" / "001.jpg", 0)
    found = labelled(INSTRE, tmp_path, INSTRE_ALL)
    assert found.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 0, 3]
    assert "1 names of folders stand in two subsets: one class each" in found.notes


def test_instre_without_scipy_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_instre(tmp_path)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "pymcip\[benchmarks\]"'):
        INSTRE.read(tmp_path, PARTIAL)
    assert len(labelled(INSTRE, tmp_path, INSTRE_ALL).images) == 8


def test_instre_without_ground_truth_says_what_to_do(tmp_path: Path) -> None:
    write_instre(tmp_path)
    (tmp_path / "gnd_instre.mat").unlink()
    message = refusal(INSTRE, tmp_path)
    assert "test_script.zip" in message
    assert 'instre="all"' in message


def test_instre_refuses_truth_of_another_form(tmp_path: Path) -> None:
    boxes = [[[4.0, 6, 24, 28]], [[0.0, 0, 40, 30]]]
    write_instre(tmp_path, gnd=matlab_structs(ok=[[[0.0, 2]], [[5.0, 7]]], bbx=boxes))
    message = refusal(INSTRE, tmp_path)
    assert "query 0, ok: 0 is not 1 to 6" in message
    assert "query 1, ok: 7 is not 1 to 6" in message
    write_instre(tmp_path, gnd=matlab_structs(ok=[[[1.5]], [[5.0, 5]]], bbx=boxes))
    message = refusal(INSTRE, tmp_path)
    assert "query 0, ok: no list of whole numbers" in message
    assert "query 1, ok: an image is there twice" in message
    write_instre(tmp_path, gnd=matlab_structs(ok=[[[1.0]]], bbx=boxes[:1]))
    assert "gnd has 1 entries, qimlist has 2" in refusal(INSTRE, tmp_path)
    write_instre(tmp_path, gnd=matlab_structs(yes=[[[1.0]]]))
    assert "gnd has the fields ['yes']; needed: ok and bbx" in refusal(INSTRE, tmp_path)
    write_instre(tmp_path, gnd=np.zeros((1, 2)))
    assert "gnd has the fields []" in refusal(INSTRE, tmp_path)


def test_instre_goes_by_the_place_of_fields_of_other_names(tmp_path: Path) -> None:
    fields = {"pos": [[[1.0]], [[5.0, 6]]], "box": [[[4.0, 6, 24, 28]], [[0.0, 0, 40, 30]]]}
    write_instre(tmp_path, gnd=matlab_structs(**fields))
    found = query_set(INSTRE, tmp_path, SuiteOptions(allow_partial=True, instre_crop=True))
    assert [each["ok"].tolist() for each in found.truth] == [[0], [4, 5]]
    assert found.queries.read(1).size == (40, 30)


def test_instre_refuses_boxes_of_another_form_if_it_crops(tmp_path: Path) -> None:
    sizes = [[[30.0, 6, 8, 28]], [[1.0, 2, 3]]]  # x, y, width, height; three numbers
    write_instre(tmp_path, gnd=matlab_structs(ok=[[[1.0]], [[2.0]]], bbx=sizes))
    message = refusal(INSTRE, tmp_path, SuiteOptions(allow_partial=True, instre_crop=True))
    assert "query 0: [30.0, 6.0, 8.0, 28.0], query 1: [1.0, 2.0, 3.0]" in message
    assert "not x, y, width, height" in message
    assert len(query_set(INSTRE, tmp_path).queries) == 2


def test_instre_refuses_lists_that_cannot_be(tmp_path: Path) -> None:
    inside = list(INSTRE_DATABASE)
    write_instre(tmp_path, imlist=matlab_cells([*inside[:5], inside[0]]))
    assert f"imlist has images twice: {inside[0]}" in refusal(INSTRE, tmp_path)
    write_instre(tmp_path, qimlist=matlab_cells([INSTRE_QUERIES[0], inside[4]]))
    assert f"queries are in the database too: {inside[4]}" in refusal(INSTRE, tmp_path)
    write_instre(tmp_path, imlist=matlab_cells([*inside[:5], "INSTRE-M/../../x.jpg"]))
    assert "names lead out of the folder: INSTRE-M/../../x.jpg" in refusal(INSTRE, tmp_path)
    write_instre(tmp_path, imlist=np.zeros((1, 6)))
    assert "imlist holds" in refusal(INSTRE, tmp_path)
    write_instre(tmp_path, imlist=np.empty((1, 0), object))
    assert "imlist is empty" in refusal(INSTRE, tmp_path)


def test_instre_refuses_to_miss_images(tmp_path: Path) -> None:
    write_instre(tmp_path)
    (tmp_path / INSTRE_DATABASE[3]).unlink()
    (tmp_path / INSTRE_QUERIES[1]).unlink()
    message = refusal(INSTRE, tmp_path)
    assert "2 of 8 images" in message
    assert INSTRE_DATABASE[3] in message
    assert INSTRE_QUERIES[1] in message


def test_instre_refuses_a_damaged_mat_file(tmp_path: Path) -> None:
    write_instre(tmp_path)
    path = tmp_path / "gnd_instre.mat"
    whole = path.read_bytes()
    for content in (
        b"",
        whole[:200],
        b"<html>404</html>" * 20,
        b"MATLAB 7.3 MAT-file".ljust(124) + b"\0\2IM",
    ):
        path.write_bytes(content)
        assert "can't be read as a MATLAB file of version 7 or lower" in refusal(INSTRE, tmp_path)
    import scipy.io

    scipy.io.savemat(path, {"imlist": matlab_cells(INSTRE_DATABASE)})
    assert "has no qimlist and no gnd" in refusal(INSTRE, tmp_path)
