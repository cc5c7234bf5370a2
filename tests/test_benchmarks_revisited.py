"""Readers of ROxford5k and RParis6k on miniatures of their layouts.

What they give is fed to the metric with embeddings made by hand, and compared with numbers computed
by hand.
"""

import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pymcip import metrics
from pymcip.benchmarks.contract import SuiteOptions
from pymcip.benchmarks.revisited import ROXFORD5K, RPARIS6K
from tests.benchmark_layouts import (
    revisited,
    save_picture,
    write_roxford5k,
    write_rparis6k,
)
from tests.benchmark_reading import fan, names_of, query_set, refusal

# ROxford5k and RParis6k


def test_roxford_takes_lists_and_truth_of_the_pickle(tmp_path: Path) -> None:
    write_roxford5k(tmp_path)
    found = query_set(ROXFORD5K, tmp_path)
    numbers = (7, 3, 5, 1, 4, 2, 8, 6)
    assert names_of(found.images, tmp_path) == [f"jpg/oxford_{n:06}.jpg" for n in numbers]
    assert names_of(found.queries, tmp_path) == [
        "jpg/all_souls_000013.jpg",
        "jpg/ashmolean_000000.jpg",
    ]
    assert [{part: rows.tolist() for part, rows in each.items()} for each in found.truth] == [
        {"easy": [0, 3], "hard": [5], "junk": [1]},
        {"easy": [], "hard": [2], "junk": [4, 6]},
    ]
    assert {rows.dtype for each in found.truth for rows in each.values()} == {np.dtype("int64")}
    assert found.queries.read(0).size == (26, 36)  # bbx 3.5 2 30.2 38, rounded as Pillow does
    assert found.images.read(0).size == (40, 40)
    plain = query_set(ROXFORD5K, tmp_path, SuiteOptions(allow_partial=True, revisited_crop=False))
    assert plain.queries.read(0).size == (40, 40)
    assert plain.images.fingerprint() == found.images.fingerprint()


def test_roxford_by_hand(tmp_path: Path) -> None:
    write_roxford5k(tmp_path)
    truth = list(query_set(ROXFORD5K, tmp_path).truth)
    # The first query ranks 0 to 7, the second 7 to 0.
    found = metrics.revisited_retrieval(fan([0, 90]), fan(range(10, 90, 10)), truth, (1, 5, 10))
    easy = ((1 + 1) + (1 / 2 + 2 / 3)) / 4  # ranks 0 and 2 of 0 2 3 4 6 7; the second has none
    medium = ((1 + 1) + (1 / 2 + 2 / 3) + (2 / 4 + 3 / 5)) / 6  # ranks 0, 2, 4 of 0 2 3 4 5 6 7
    hard = (0 / 2 + 1 / 3) / 2  # rank 2 of 2 4 5 6 7
    second = (0 / 3 + 1 / 4) / 2  # rank 3 of 7 5 3 2 1 0
    assert found["easy_map"] == pytest.approx(100 * easy)
    assert found["medium_map"] == pytest.approx(100 * (medium + second) / 2)
    assert found["hard_map"] == pytest.approx(100 * (hard + second) / 2)
    assert found["medium_mp1"] == pytest.approx(100 * (1 / 1 + 0 / 1) / 2)
    assert found["medium_mp5"] == pytest.approx(100 * (3 / 5 + 1 / 4) / 2)


@pytest.mark.parametrize(
    "moved", ["data/test/roxford5k", "datasets/roxford5k", "roxford5k", "beside", "flat"]
)
def test_roxford_in_other_layouts(tmp_path: Path, moved: str) -> None:
    place = tmp_path / ("roxford5k" if moved in ("beside", "flat") else moved)
    write_roxford5k(place)
    folder = tmp_path
    if moved == "beside":  # the pickle beside the folder of the images
        shutil.move(place / "gnd_roxford5k.pkl", tmp_path / "gnd_roxford5k.pkl")
        folder = place
    elif moved == "flat":
        for path in sorted((place / "jpg").iterdir()):
            shutil.move(path, place / path.name)
        (place / "jpg").rmdir()
        folder = place
    found = query_set(ROXFORD5K, folder)
    assert Path(found.images.key(0)).name == "oxford_000007.jpg"
    assert [len(found.images), len(found.queries)] == [8, 2]


def test_rparis_in_folders_of_landmarks_with_its_damaged_pictures(tmp_path: Path) -> None:
    write_rparis6k(tmp_path)
    found = query_set(RPARIS6K, tmp_path)
    assert names_of(found.images, tmp_path)[1] == "jpg/paris/defense/paris_defense_000001.jpg"
    assert names_of(found.queries, tmp_path) == [
        "jpg/paris/louvre/paris_louvre_000001.jpg",
        "jpg/paris/eiffel/paris_eiffel_000128.jpg",
    ]
    assert found.queries.read(1).size == (20, 20)


def test_a_picture_that_is_there_twice_is_taken_from_the_first_path(tmp_path: Path) -> None:
    write_rparis6k(tmp_path)
    for folder in ("jpg/a", "jpg/z"):
        save_picture(tmp_path / folder / "paris_defense_000001.jpg", 3)
    found = query_set(RPARIS6K, tmp_path)
    assert names_of(found.images, tmp_path)[:2] == [
        "jpg/paris/defense/paris_defense_000000.jpg",
        "jpg/a/paris_defense_000001.jpg",
    ]


def test_revisited_names_may_be_arrays(tmp_path: Path) -> None:
    write_roxford5k(tmp_path)
    plain = query_set(ROXFORD5K, tmp_path)
    path = tmp_path / "gnd_roxford5k.pkl"
    content = pickle.loads(path.read_bytes())
    content["imlist"] = np.array(content["imlist"])
    content["qimlist"] = np.array(content["qimlist"], "S")  # as Python 2 has them
    path.write_bytes(pickle.dumps(content))
    found = query_set(ROXFORD5K, tmp_path)
    assert found.images.fingerprint() == plain.images.fingerprint()
    assert found.queries.fingerprint() == plain.queries.fingerprint()


def test_revisited_names_what_is_missing(tmp_path: Path) -> None:
    write_roxford5k(tmp_path)
    (tmp_path / "jpg" / "oxford_000008.jpg").unlink()
    (tmp_path / "jpg" / "ashmolean_000000.jpg").unlink()
    message = refusal(ROXFORD5K, tmp_path)
    assert "2 of the 10 images that gnd_roxford5k.pkl lists are not below" in message
    assert "oxford_000008.jpg, ashmolean_000000.jpg" in message
    (tmp_path / "gnd_roxford5k.pkl").rename(tmp_path / "gnd_rparis6k.pkl")
    message = refusal(ROXFORD5K, tmp_path)
    assert "no gnd_roxford5k.pkl" in message
    assert "gnd_rparis6k.pkl" in message


def test_revisited_refuses_the_truth_before_the_revision(tmp_path: Path) -> None:
    write_roxford5k(tmp_path, gnd=[{"bbx": [0, 0, 1, 1], "ok": [1], "junk": []}] * 2)
    message = refusal(ROXFORD5K, tmp_path)
    assert "gnd of query 0 has ['bbx', 'junk', 'ok']; needed: bbx, easy, hard, junk" in message
    assert "before the revision" in message


def changed(**changes: Any) -> dict[str, Any]:
    entry = {"bbx": [0.0, 0.0, 20.0, 20.0], "easy": [0], "hard": [1], "junk": [2]}
    return {"gnd": [{**entry, **changes}, entry]}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (changed(easy=[8]), "query 0, easy: 8 is not 0 to 7"),
        (changed(hard=[-1]), "query 0, hard: -1 is not 0 to 7"),
        (changed(junk=[1]), "query 0 has an image twice in easy, hard and junk"),
        (changed(easy=[0, 0]), "query 0, easy: an image is there twice"),
        (changed(easy="0"), "query 0, easy: no list of whole numbers"),
        (changed(easy=[[1], [2, 3]]), "query 0, easy: no list of whole numbers"),
        (changed(easy=[float("nan")]), "query 0, easy: no list of whole numbers"),
        (changed(easy=None), "query 0, easy: no list of whole numbers"),
        (changed(bbx=[0, 0, 0, 0]), "query 0: [0.0, 0.0, 0.0, 0.0]"),
        (changed(bbx="a box"), "query 0: []"),
        (changed(bbx=None), "query 0: [nan]"),
        ({"gnd": 3}, "gnd of query 0 has NoneType"),
        ({"gnd": revisited([], [])["gnd"][:1]}, "gnd has 1 entries, qimlist has 2"),
        ({"imlist": []}, "imlist is empty"),
        ({"imlist": None}, "imlist holds None"),
        ({"qimlist": ["oxford_000001", "ashmolean_000000"]}, "in the database too: oxford_000001"),
        ({"qimlist": ["ashmolean_000000", 7]}, "qimlist holds 7"),
    ],
)
def test_revisited_refuses_truth_of_another_form(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    write_roxford5k(tmp_path, **changes)
    assert named in refusal(ROXFORD5K, tmp_path)


def test_revisited_refuses_pickles_of_other_things(tmp_path: Path) -> None:
    write_roxford5k(tmp_path)
    path = tmp_path / "gnd_roxford5k.pkl"
    path.write_bytes(pickle.dumps({"imlist": ["a"], "gnd": []}))
    assert "holds ['gnd', 'imlist']; needed: a dict of imlist, qimlist, gnd" in refusal(
        ROXFORD5K, tmp_path
    )
    path.write_bytes(pickle.dumps([1]))
    assert "holds list" in refusal(ROXFORD5K, tmp_path)
    path.write_bytes(b"cos\nsystem\n(S'touch trace'\ntR.")
    assert "asks for os.system" in refusal(ROXFORD5K, tmp_path)
    path.write_bytes(b"<html>404 Not Found</html>")
    assert "is no pickle" in refusal(ROXFORD5K, tmp_path)
