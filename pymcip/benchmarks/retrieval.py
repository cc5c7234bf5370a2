"""Readers of the image-to-image benchmarks: GPR1200, INSTRE, CUB-200-2011, ROxford5k and RParis6k.

Each reads the layout in which the data set is published, and checks names, lists and counts before
any image is opened. `pymcip.benchmarks.protocols` says how they are measured.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pymcip.benchmarks.contract import (
    AbsentError,
    DataSet,
    Int64,
    Labelled,
    QuerySet,
    SuiteOptions,
    check_counts,
)
from pymcip.benchmarks.unpickling import load_restricted
from pymcip.data import ImageData, list_images
from pymcip.data.images import IMAGE_SUFFIXES
from pymcip.data.sources import some
from pymcip.errors import DataError, MissingDependencyError

Floats = npt.NDArray[np.float64]

GPR1200_COUNTS = {"images": 12_000, "classes": 1_200, "classes of 10 images": 1_200}
CUB_COUNTS = {"images": 5_924, "classes": 100}
CUB_TEST = range(100, 200)  # classes, 0-based: the second half, by which retrieval tests
INSTRE_SUBSETS = ("INSTRE-S1", "INSTRE-S2", "INSTRE-M")
INSTRE_COUNTS = {"queries": 1_250, "database images": 27_293}
INSTRE_ALL_COUNTS = {"images": 28_543, "folders": 250}
ROXFORD_COUNTS = {"queries": 70, "database images": 4_993}
RPARIS_COUNTS = {"queries": 70, "database images": 6_322}
REVISITED_PARTS = ("easy", "hard", "junk")


def read_gpr1200(folder: Path, options: SuiteOptions) -> Labelled:
    """Read GPR1200: 1,200 classes of 10 images, ordered by class number, then name.

    A file is called `{class}_{name}.jpg`, and the class number is its label. In this order the six
    sources are slices of 2,000 images.

    Raises:
        AbsentError: there are no images.
        DataError: an image's name begins with no number, or the counts are others.

    Source: Schall et al., GPR1200 (MMM 2022).
    """
    base = _first_folder(folder, ("images", "GPR1200/images", "GPR1200", ""))
    names = list(_image_names(base))
    if not names:
        raise AbsentError(f"{base} holds no images. {GPR1200.how_to_get()}")
    wrong = sorted(name for name in names if not name.partition("_")[0].isdecimal())
    if wrong:
        raise DataError(
            f"{base}: {len(wrong)} images have no class number before a '_': {some(wrong)}; needed: "
            "names such as 17_church.jpg. Take out what does not belong to GPR1200"
        )
    ordered = sorted((int(name.partition("_")[0]), name) for name in names)
    labels = np.array([label for label, _ in ordered], np.int64)
    sizes = Counter(labels.tolist())
    found = {
        "images": len(ordered),
        "classes": len(sizes),
        "classes of 10 images": sum(size == 10 for size in sizes.values()),
    }
    notes = check_counts("GPR1200", found, GPR1200_COUNTS, options)
    return Labelled(list_images(base, [name for _, name in ordered]), labels, notes=notes)


def read_cub200(folder: Path, options: SuiteOptions) -> Labelled:
    """Read the images of CUB-200-2011's classes 100 to 199 (counted from 0), as images.txt has them.

    That is the split of metric learning: by class, not by train_test_split.txt, whose two parts have
    all classes.

    Raises:
        AbsentError: none of the lists is there.
        DataError: a list is missing or malformed, the lists disagree, images are missing, or the
            counts are others.

    Source: Wah et al. (2011); Song et al., Lifted structured embedding (CVPR 2016), for the split.
    """
    lists = ("images.txt", "image_class_labels.txt", "classes.txt")
    base = _first_folder(
        folder, ("", "CUB_200_2011", "CUB_200_2011/CUB_200_2011"), lambda path: _any(path, lists)
    )
    absent = [name for name in lists if not (base / name).is_file()]
    if len(absent) == len(lists):
        raise AbsentError(f"{folder} has none of {', '.join(lists)}. {CUB200.how_to_get()}")
    if absent:
        raise DataError(f"{base} has no {' and no '.join(absent)}; unpack CUB_200_2011.tgz again")
    paths, classes, names = (_numbered(base / name) for name in lists)
    problems = []
    unlike = paths.keys() ^ classes.keys()
    if unlike:
        problems.append(
            f"images.txt and image_class_labels.txt don't list the same images: {some(sorted(unlike))}"
        )
    strange = sorted(
        number
        for number, label in classes.items()
        if not label.isdecimal() or int(label) not in names
    )
    if strange:
        problems.append(
            f"image_class_labels.txt has classes that classes.txt lacks: {some(strange)}"
        )
    if not problems:
        problems += [
            f"image {number} is {path}, but its class is {classes[number]} {names[int(classes[number])]}"
            for number, path in paths.items()
            if path.partition("/")[0] != names[int(classes[number])]
        ]
    if problems:
        raise DataError(f"{base}: {some(problems)}; unpack CUB_200_2011.tgz again")
    chosen = [number for number in paths if int(classes[number]) - 1 in CUB_TEST]
    labels = np.array([int(classes[number]) - 1 for number in chosen], np.int64)
    found = {"images": len(chosen), "classes": len(np.unique(labels))}
    notes = check_counts("CUB-200-2011, classes 100 to 199", found, CUB_COUNTS, options)
    return Labelled(list_images(base / "images", [paths[i] for i in chosen]), labels, notes=notes)


def read_instre(folder: Path, options: SuiteOptions) -> QuerySet | Labelled:
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
    base = _first_folder(
        folder,
        ("", "images", "INSTRE_release", "INSTRE", "instre"),
        lambda path: _any(path, INSTRE_SUBSETS),
    )
    if not _any(base, INSTRE_SUBSETS):
        raise AbsentError(
            f"{folder} has none of {', '.join(INSTRE_SUBSETS)}. {INSTRE.how_to_get()}"
        )
    return _instre_all(base, options) if options.instre == "all" else _instre(folder, base, options)


def _instre_all(base: Path, options: SuiteOptions) -> Labelled:
    names = sorted(name for subset in INSTRE_SUBSETS for name in _image_names(base, subset))
    if not names:
        raise AbsentError(f"{base} holds no images. {INSTRE.how_to_get()}")
    folders = [name.rpartition("/")[0] for name in names]
    distinct = sorted(set(folders))
    found = {"images": len(names), "folders": len(distinct)}
    notes = check_counts("INSTRE, all images", found, INSTRE_ALL_COUNTS, options)
    classes, labels = np.unique([path.rpartition("/")[2] for path in folders], return_inverse=True)
    if len(classes) < len(distinct):
        shared = len(distinct) - len(classes)
        notes += (f"{shared} names of folders stand in two subsets: one class each",)
    return Labelled(list_images(base, names), labels.reshape(-1).astype(np.int64), notes=notes)


def _instre(folder: Path, base: Path, options: SuiteOptions) -> QuerySet:
    path = _first_file((folder, base, folder / "test_script"), "gnd_instre.mat")
    if path is None:
        raise DataError(
            f"{folder} has no gnd_instre.mat, which says what the queries are; it is in "
            "https://cmp.felk.cvut.cz/~iscenahm/files/test_script.zip. Without it, "
            'instre="all" ranks all images for each image'
        )
    table = _load_mat(path, ("imlist", "qimlist", "gnd"))
    database = _texts(path, "imlist", table["imlist"])
    queries = _texts(path, "qimlist", table["qimlist"])
    gnd = np.asarray(table["gnd"]).reshape(-1)
    fields = gnd.dtype.names or ()
    if len(fields) != 2 and not {"ok", "bbx"} <= set(fields):
        raise DataError(f"{path}: gnd has the fields {list(fields)}; needed: ok and bbx")
    ok, bbx = ("ok", "bbx") if {"ok", "bbx"} <= set(fields) else fields  # all readers go by place
    problems = _check_lists(database, queries, len(gnd))
    truth: list[dict[str, Int64]] = []
    for number, rows in enumerate(gnd[ok]):
        truth.append({"ok": _rows(rows, len(database), 1, f"query {number}, ok", problems)})
    _raise_problems(path, problems)
    images, asked = _open(base, database, queries)
    if options.instre_crop:
        asked = asked.cropped(_boxes(path, gnd[bbx]))
    found = {"queries": len(queries), "database images": len(database)}
    notes = check_counts("INSTRE", found, INSTRE_COUNTS, options)
    return QuerySet(images, asked, tuple(truth), notes=notes)


def read_roxford5k(folder: Path, options: SuiteOptions) -> QuerySet:
    """Read ROxford5k: 70 queries, 4,993 images, and what is easy, hard and junk for each query.

    `_read_revisited` says what is read, and what is refused.
    """
    return _read_revisited(ROXFORD5K, ROXFORD_COUNTS, folder, options)


def read_rparis6k(folder: Path, options: SuiteOptions) -> QuerySet:
    """Read RParis6k: 70 queries, 6,322 images, and what is easy, hard and junk for each query.

    `_read_revisited` says what is read, and what is refused. The 20 pictures of Paris6k that were
    damaged when it was published (they hold an HTML page) are in none of its lists.
    """
    return _read_revisited(RPARIS6K, RPARIS_COUNTS, folder, options)


def _read_revisited(
    data: DataSet, counts: Mapping[str, int], folder: Path, options: SuiteOptions
) -> QuerySet:
    """Read gnd_*.pkl (imlist, qimlist, gnd: bbx, easy, hard, junk; 0-based) and the images of jpg/.

    Images may lie in jpg/ or below it, as the archives unpack, or in the folder itself. Queries are
    cropped to bbx (x1, y1, x2, y2) if `options.revisited_crop`.

    Raises:
        AbsentError: neither the pickle nor an image is there.
        DataError: one of them is missing, the pickle is of another form or holds more than data,
            it is that of Oxford5k or Paris6k before the revision, or the counts are others.

    Source: Radenović et al., Revisiting Oxford and Paris (CVPR 2018).
    """
    folder = _first_folder(
        folder, ("", f"data/test/{data.name}", f"datasets/{data.name}", data.name),
        lambda path: (path / f"gnd_{data.name}.pkl").is_file() or (path / "jpg").is_dir(),
    )  # fmt: skip
    path = _first_file((folder, folder.parent), f"gnd_{data.name}.pkl")
    base = _first_folder(folder, ("jpg", "images", ""))
    places = {Path(name).stem: name for name in sorted(_image_names(base, deep=True), reverse=True)}
    if path is None:
        if not places:
            raise AbsentError(
                f"{folder} has neither gnd_{data.name}.pkl nor images. {data.how_to_get()}"
            )
        others = some(sorted(each.name for each in folder.glob("gnd_*"))) or "none of that kind"
        raise DataError(
            f"{folder} has images, but no gnd_{data.name}.pkl ({others}); get it from "
            f"https://cmp.felk.cvut.cz/revisitop/data/datasets/{data.name}/gnd_{data.name}.pkl"
        )
    database, queries, gnd = _unpack_revisited(path)
    problems = _check_lists(database, queries, len(gnd))
    truth: list[dict[str, Int64]] = []
    for number, each in enumerate(gnd):
        rows = {
            part: _rows(each[part], len(database), 0, f"query {number}, {part}", problems)
            for part in REVISITED_PARTS
        }
        together = np.concatenate(list(rows.values()))
        if len(np.unique(together)) < len(together):
            problems.append(f"query {number} has an image twice in easy, hard and junk")
        truth.append(rows)
    _raise_problems(path, problems)
    absent = [name for name in (*database, *queries) if name not in places]
    if absent:
        raise DataError(
            f"{len(absent)} of the {len(database) + len(queries)} images that {path.name} lists are "
            f"not below {base}: {some(f'{name}.jpg' for name in absent)}; unpack the archives of "
            f"{data.source} there"
        )
    images, asked = _open(
        base, [places[name] for name in database], [places[name] for name in queries]
    )
    if options.revisited_crop:
        asked = asked.cropped(_boxes(path, [each.get("bbx") for each in gnd]))
    found = {"queries": len(queries), "database images": len(database)}
    notes = check_counts(data.title, found, counts, options)
    return QuerySet(images, asked, tuple(truth), notes=notes)


def _unpack_revisited(path: Path) -> tuple[list[str], list[str], list[dict[str, Any]]]:
    """Read imlist, qimlist and gnd, of the kinds that they must be."""
    table = load_restricted(path)
    wanted = ("imlist", "qimlist", "gnd")
    if not isinstance(table, dict) or any(key not in table for key in wanted):
        held = sorted(map(str, table)) if isinstance(table, dict) else type(table).__name__
        raise DataError(f"{path} holds {held}; needed: a dict of {', '.join(wanted)}")
    database = _texts(path, "imlist", table["imlist"])
    queries = _texts(path, "qimlist", table["qimlist"])
    gnd: list[Any] = list(table["gnd"]) if isinstance(table["gnd"], (list, tuple)) else [None]
    for number, each in enumerate(gnd):
        absent = [
            part for part in REVISITED_PARTS if not isinstance(each, dict) or part not in each
        ]
        if absent:
            held = sorted(map(str, each)) if isinstance(each, dict) else type(each).__name__
            raise DataError(
                f"{path}: gnd of query {number} has {held}; needed: bbx, easy, hard, junk. Files with "
                "ok and junk are those of Oxford5k and Paris6k before the revision"
            )
    return database, queries, gnd


def _check_lists(database: Sequence[str], queries: Sequence[str], described: int) -> list[str]:
    """Say what is wrong with the lists of images of a query set."""
    problems = []
    if described != len(queries):
        problems.append(f"gnd has {described} entries, qimlist has {len(queries)}")
    twice = [name for name, count in Counter(database).items() if count > 1]
    if twice:
        problems.append(f"imlist has images twice: {some(twice)}")
    both = sorted(set(database) & set(queries))
    if both:
        problems.append(f"queries are in the database too: {some(both)}")
    outside = [name for name in (*database, *queries) if ".." in name.split("/")]
    if outside:
        problems.append(f"names lead out of the folder: {some(outside)}")
    return problems


def _raise_problems(path: Path, problems: Sequence[str]) -> None:
    if problems:
        raise DataError(f"{path} can't be used: {some(problems)}. Get it from its authors again")


def _open(
    base: Path, database: Sequence[str], queries: Sequence[str]
) -> tuple[ImageData, ImageData]:
    """Index database and queries, and report what is missing of both at once."""
    both = list_images(base, [*database, *queries])
    return both.select(range(len(database))), both.select(range(len(database), len(both)))


def _rows(values: Any, count: int, first: int, what: str, problems: list[str]) -> Int64:
    """Make 0-based rows, int64 [n], of indices below `count` that are counted from `first`."""
    try:
        given = np.asarray(values).reshape(-1)
        numeric = given.dtype.kind in "iuf" and bool(np.isfinite(given).all())
        rows = given.astype(np.int64) if numeric else None
    except (TypeError, ValueError):
        rows = None
    if rows is None or not np.array_equal(rows, given):
        problems.append(f"{what}: no list of whole numbers")
        return np.empty(0, np.int64)
    wrong = rows[(rows < first) | (rows >= count + first)]
    if len(wrong):
        problems.append(f"{what}: {some(wrong.tolist())} is not {first} to {count + first - 1}")
    if len(np.unique(rows)) < len(rows):
        problems.append(f"{what}: an image is there twice")
    return rows - first


def _boxes(path: Path, values: Iterable[Any]) -> Floats:
    """Make float64 [Q, 4]: left, top, right, bottom."""
    boxes, problems = [], []
    for number, value in enumerate(values):
        try:
            box = np.asarray(value, np.float64).reshape(-1)
        except (TypeError, ValueError):
            box = np.empty(0)
        if box.shape != (4,) or not (box[0] < box[2] > 0 and box[1] < box[3] > 0):
            problems.append(f"query {number}: {box.tolist()}")
        boxes.append(box)
    if problems:
        raise DataError(
            f"{path}: bbx must be x1, y1, x2, y2 with x1 < x2 and y1 < y2 (not x, y, width, height), "
            f"got {some(problems)}. Get the file again, or measure without cropping"
        )
    return np.stack(boxes)


def _texts(path: Path, key: str, value: Any) -> list[str]:
    """Make a list of a list, an array of strings, or a cell array as scipy reads it."""
    parts = np.asarray(value).reshape(-1) if isinstance(value, np.ndarray) else value
    texts = []
    for part in parts if isinstance(parts, (list, tuple, np.ndarray)) else [None]:
        if isinstance(part, np.ndarray) and part.size == 1:  # a cell
            part = part.reshape(-1)[0]
        if isinstance(part, bytes):  # of an array that Python 2 wrote
            part = part.decode("latin1")
        if not isinstance(part, str) or not part.strip():
            raise DataError(f"{path}: {key} holds {part!r:.60}; needed: names of images")
        texts.append(str(part).strip().lstrip("/"))
    if not texts:
        raise DataError(f"{path}: {key} is empty; needed: names of images")
    return texts


def _load_mat(path: Path, wanted: Sequence[str]) -> dict[str, Any]:
    """Read variables of a MATLAB file up to version 7.

    Raises:
        MissingDependencyError: scipy can't be imported.
        DataError: it is no such file, or a variable is missing.
    """
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise MissingDependencyError(
            f"{path.name} needs scipy, which can't be imported ({error}); run: pip install "
            '"pymcip[benchmarks]"'
        ) from error
    try:
        table: dict[str, Any] = loadmat(path, variable_names=list(wanted))
    except Exception as error:  # scipy raises errors of many types on damaged files
        raise DataError(
            f"{path} can't be read as a MATLAB file of version 7 or lower "
            f"({type(error).__name__}: {error}); get it again"
        ) from error
    absent = [name for name in wanted if name not in table]
    if absent:
        raise DataError(f"{path} has no {' and no '.join(absent)}; get it from its authors again")
    return table


def _numbered(path: Path) -> dict[int, str]:
    """Read lines `number text`, in the order of the file.

    Raises:
        DataError: lines are of another form, numbers repeat, or the file is no UTF-8 text.
    """
    found: dict[int, str] = {}
    problems = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} can't be read as UTF-8 text: {error}") from error
    for row, line in enumerate(lines, start=1):
        number, _, text = line.strip().partition(" ")
        if not line.strip():
            continue
        if not number.isdecimal() or not text.strip():
            problems.append(f"line {row} is {line!r:.60}, needed: a number and a text")
        elif int(number) in found:
            problems.append(f"line {row}: {number} is there already")
        else:
            found[int(number)] = text.strip()
    if problems or not found:
        raise DataError(f"{path}: {some(problems) or 'it is empty'}; get it again")
    return found


def _image_names(base: Path, below: str = "", *, deep: bool = False) -> Iterator[str]:
    """Yield the image files of a folder, `/`-separated from `base`, in no order; none is hidden.

    With `below`, or `deep`, folders in it are entered.
    """
    pending = [below]
    while pending:
        inside = pending.pop()
        if not (base / inside).is_dir():
            continue
        with os.scandir(base / inside) as entries:
            for entry in entries:
                name = f"{inside}/{entry.name}" if inside else entry.name
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    pending += [name] if below or deep else []
                elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES:  # noqa: PTH122
                    yield name


def _first_folder(
    folder: Path, names: Sequence[str], accepts: Callable[[Path], bool] = Path.is_dir
) -> Path:
    """Return the first of the folders below `folder` ("": itself) that is accepted, else `folder`."""
    return next((folder / name for name in names if accepts(folder / name)), folder)


def _first_file(folders: Iterable[Path], name: str) -> Path | None:
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def _any(folder: Path, names: Iterable[str]) -> bool:
    return any((folder / name).exists() for name in names)


GPR1200 = DataSet(
    name="gpr1200",
    title="GPR1200",
    folders=("gpr1200", "GPR1200"),
    source="https://github.com/Visual-Computing/GPR1200",
    layout="""
images/0_*.jpg … images/1199_*.jpg    12,000 images, {class}_{name}.jpg
""",
    read=read_gpr1200,
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
    read=read_instre,
)
CUB200 = DataSet(
    name="cub200",
    title="CUB-200-2011",
    folders=("CUB_200_2011", "cub200", "CUB200", "cub_200_2011", "cub"),
    source="https://www.vision.caltech.edu/datasets/cub_200_2011/ (CUB_200_2011.tgz)",
    layout="""
images.txt                  1 001.Black_footed_Albatross/Black_Footed_Albatross_0046_18.jpg
image_class_labels.txt      1 1
classes.txt                 1 001.Black_footed_Albatross
images/001.Black_footed_Albatross/*.jpg
""",
    read=read_cub200,
)
ROXFORD5K = DataSet(
    name="roxford5k",
    title="ROxford5k",
    folders=(
        "roxford5k",
        "ROxford5k",
        "test/roxford5k",
        "data/test/roxford5k",
        "datasets/roxford5k",
    ),
    source=(
        "https://cmp.felk.cvut.cz/revisitop/data/datasets/roxford5k/gnd_roxford5k.pkl and "
        "https://www.robots.ox.ac.uk/~vgg/data/oxbuildings/ (oxbuild_images-v1.tgz)"
    ),
    layout="""
gnd_roxford5k.pkl           imlist, qimlist, gnd
jpg/all_souls_000000.jpg    5,063 images: 4,993 of imlist, 70 of qimlist
""",
    read=read_roxford5k,
)
RPARIS6K = DataSet(
    name="rparis6k",
    title="RParis6k",
    folders=("rparis6k", "RParis6k", "test/rparis6k", "data/test/rparis6k", "datasets/rparis6k"),
    source=(
        "https://cmp.felk.cvut.cz/revisitop/data/datasets/rparis6k/gnd_rparis6k.pkl and "
        "https://www.robots.ox.ac.uk/~vgg/data/parisbuildings/ (paris_1-v1.tgz, paris_2-v1.tgz)"
    ),
    layout="""
gnd_rparis6k.pkl                    imlist, qimlist, gnd
jpg/paris_defense_000000.jpg        6,412 images, also in folders as the archives have them: 6,322
                                    of imlist, 70 of qimlist, 20 damaged ones that are in neither
""",
    read=read_rparis6k,
)
