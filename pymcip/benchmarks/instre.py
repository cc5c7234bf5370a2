"""INSTRE: queries of gnd_instre.mat, or all images against all."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pymcip.benchmarks.contract import (
    AbsentError,
    DataSet,
    Labelled,
    QuerySet,
    SuiteOptions,
    check_counts,
)
from pymcip.benchmarks.folders import any_exists, first_file, first_folder, image_names
from pymcip.benchmarks.query_sets import as_rows, as_texts, make_query_set
from pymcip.benchmarks.readers import load_mat
from pymcip.data import list_images
from pymcip.errors import DataError

INSTRE_SUBSETS = ("INSTRE-S1", "INSTRE-S2", "INSTRE-M")
INSTRE_COUNTS = {"queries": 1_250, "database images": 27_293}
INSTRE_ALL_COUNTS = {"images": 28_543, "folders": 250}


def _read(data: DataSet, folder: Path, options: SuiteOptions) -> QuerySet | Labelled:
    """Read INSTRE in the form that `options.instre` asks for.

    "iscen": queries, database and relevant images of gnd_instre.mat; queries are cropped to their
    boxes (x1, y1, x2, y2) if `options.instre_crop`.

    "all": every image below INSTRE-S1, -S2 and -M, ordered by path. Its class is the name of its
    folder, as in the authors' evaluation: an image of INSTRE-M, which shows two objects of
    INSTRE-S1, is relevant for neither. gnd_instre.mat is not needed.

    Raises:
        AbsentError: none of the three folders is there.
        MissingDependencyError: "iscen" without scipy.
        DataError: gnd_instre.mat is missing, of another form, or refers to images that are not
            there; the counts are others.

    Source: Wang and Jiang, INSTRE (TOMM 2015); Iscen et al. (CVPR 2017) for queries and database.
    """
    base = first_folder(
        folder,
        ("", "images", "INSTRE_release", "INSTRE", "instre"),
        lambda path: any_exists(path, INSTRE_SUBSETS),
    )
    if not any_exists(base, INSTRE_SUBSETS):
        raise AbsentError(f"{folder} has none of {', '.join(INSTRE_SUBSETS)}")
    if options.instre == "all":
        return _read_all(base, options)
    return _read_queries(data, folder, base, options)


def _read_all(base: Path, options: SuiteOptions) -> Labelled:
    names = sorted(name for subset in INSTRE_SUBSETS for name in image_names(base, subset))
    if not names:
        raise AbsentError(f"{base} holds no images")
    folders = [name.rpartition("/")[0] for name in names]
    distinct = sorted(set(folders))
    found = {"images": len(names), "folders": len(distinct)}
    notes = check_counts("INSTRE, all images", found, INSTRE_ALL_COUNTS, options)
    classes, labels = np.unique([path.rpartition("/")[2] for path in folders], return_inverse=True)
    if len(classes) < len(distinct):
        shared = len(distinct) - len(classes)
        notes += (f"{shared} names of folders stand in two subsets: one class each",)
    return Labelled(list_images(base, names), labels.reshape(-1).astype(np.int64), notes=notes)


def _read_queries(data: DataSet, folder: Path, base: Path, options: SuiteOptions) -> QuerySet:
    path = first_file((folder, base, folder / "test_script"), "gnd_instre.mat")
    if path is None:
        raise DataError(
            f"{folder} has no gnd_instre.mat, which says what the queries are; it is in "
            "https://cmp.felk.cvut.cz/~iscenahm/files/test_script.zip. Without it, "
            'instre="all" ranks all images for each image'
        )
    table = load_mat(path, data.title, ("imlist", "qimlist", "gnd"), "get it again")
    database = as_texts(path, "imlist", table["imlist"])
    queries = as_texts(path, "qimlist", table["qimlist"])
    gnd = np.asarray(table["gnd"]).reshape(-1)
    fields = gnd.dtype.names or ()
    if len(fields) != 2 and not {"ok", "bbx"} <= set(fields):
        raise DataError(f"{path}: gnd has the fields {list(fields)}; needed: ok and bbx")
    ok, bbx = ("ok", "bbx") if {"ok", "bbx"} <= set(fields) else fields  # all readers go by place
    problems: list[str] = []
    truth = [
        {"ok": as_rows(rows, len(database), 1, f"query {number}, ok", problems)}
        for number, rows in enumerate(gnd[ok])
    ]
    boxes = gnd[bbx] if options.instre_crop else None
    return make_query_set(
        data, path, base, database, queries, truth, problems, boxes, INSTRE_COUNTS, options
    )


INSTRE = DataSet(
    name="instre",
    title="INSTRE",
    folders=("instre", "INSTRE", "INSTRE_release"),
    source=(
        "http://123.57.42.89/instre/home.html (images) and "
        "https://cmp.felk.cvut.cz/~iscenahm/files/test_script.zip (gnd_instre.mat)"
    ),
    layout="""
gnd_instre.mat              queries and what is relevant for them (not for instre="all")
INSTRE-S1/01a_*/001.jpg     100 folders
INSTRE-S2/*/001.jpg         100 folders
INSTRE-M/01/001.jpg         50 folders; 28,543 images in all
""",
    reader=_read,
)
