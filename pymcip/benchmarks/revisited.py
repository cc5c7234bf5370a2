"""ROxford5k and RParis6k, with the ground truth of revisitop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pymcip.benchmarks.contract import AbsentError, DataSet, QuerySet, SuiteOptions
from pymcip.benchmarks.folders import first_file, first_folder, image_names
from pymcip.benchmarks.query_sets import as_rows, as_texts, make_query_set
from pymcip.benchmarks.unpickling import load_restricted
from pymcip.data.sources import some
from pymcip.errors import DataError
from pymcip.metrics.inputs import Int64

COUNTS = {
    "roxford5k": {"queries": 70, "database images": 4_993},
    "rparis6k": {"queries": 70, "database images": 6_322},
}
REVISITED_PARTS = ("easy", "hard", "junk")


def _read(data: DataSet, folder: Path, options: SuiteOptions) -> QuerySet:
    """Read gnd_*.pkl (imlist, qimlist, gnd: bbx, easy, hard, junk; 0-based) and the images of jpg/.

    Images may lie in jpg/ or below it, as the archives unpack, or in the folder itself. Queries are
    cropped to bbx (x1, y1, x2, y2) if `options.revisited_crop`. The 20 pictures of Paris6k that were
    damaged when it was published (they hold an HTML page) are in none of its lists.

    Raises:
        AbsentError: neither the pickle nor an image is there.
        DataError: one of them is missing, the pickle is of another form or holds more than data,
            it is that of Oxford5k or Paris6k before the revision, or the counts are others.

    Source: Radenović et al., Revisiting Oxford and Paris (CVPR 2018).
    """
    pickle = f"gnd_{data.name}.pkl"
    folder = first_folder(
        folder, ("", f"data/test/{data.name}", f"datasets/{data.name}", data.name),
        lambda path: (path / pickle).is_file() or (path / "jpg").is_dir(),
    )  # fmt: skip
    path = first_file((folder, folder.parent), pickle)
    base = first_folder(folder, ("jpg", "images", ""))
    places = {Path(name).stem: name for name in sorted(image_names(base, deep=True), reverse=True)}
    if path is None:
        if not places:
            raise AbsentError(f"{folder} has neither {pickle} nor images")
        others = some(sorted(each.name for each in folder.glob("gnd_*"))) or "none of that kind"
        raise DataError(
            f"{folder} has images, but no {pickle} ({others}); get it from "
            f"https://cmp.felk.cvut.cz/revisitop/data/datasets/{data.name}/{pickle}"
        )
    database, queries, gnd = _unpack_revisited(path)
    problems: list[str] = []
    truth: list[dict[str, Int64]] = []
    for number, each in enumerate(gnd):
        rows = {
            part: as_rows(each[part], len(database), 0, f"query {number}, {part}", problems)
            for part in REVISITED_PARTS
        }
        together = np.concatenate(list(rows.values()))
        if len(np.unique(together)) < len(together):
            problems.append(f"query {number} has an image twice in easy, hard and junk")
        truth.append(rows)
    boxes = [each.get("bbx") for each in gnd] if options.revisited_crop else None
    return make_query_set(
        data,
        path,
        base,
        database,
        queries,
        truth,
        problems,
        boxes,
        COUNTS[data.name],
        options,
        places,
    )


def _unpack_revisited(path: Path) -> tuple[list[str], list[str], list[dict[str, Any]]]:
    """Read imlist, qimlist and gnd, of the kinds that they must be."""
    table = load_restricted(path)
    wanted = ("imlist", "qimlist", "gnd")
    if not isinstance(table, dict) or any(key not in table for key in wanted):
        held = sorted(map(str, table)) if isinstance(table, dict) else type(table).__name__
        raise DataError(f"{path} holds {held}; needed: a dict of {', '.join(wanted)}")
    database = as_texts(path, "imlist", table["imlist"])
    queries = as_texts(path, "qimlist", table["qimlist"])
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


def _data_set(name: str, title: str, images: str, layout: str) -> DataSet:
    folders = (name, title, f"test/{name}", f"data/test/{name}", f"datasets/{name}")
    source = f"https://cmp.felk.cvut.cz/revisitop/data/datasets/{name}/gnd_{name}.pkl and {images}"
    return DataSet(name, title, folders, source, layout, _read)


ROXFORD5K = _data_set(
    "roxford5k",
    "ROxford5k",
    "https://www.robots.ox.ac.uk/~vgg/data/oxbuildings/ (oxbuild_images-v1.tgz)",
    """
gnd_roxford5k.pkl           imlist, qimlist, gnd
jpg/all_souls_000000.jpg    5,063 images: 4,993 of imlist, 70 of qimlist
""",
)
RPARIS6K = _data_set(
    "rparis6k",
    "RParis6k",
    "https://www.robots.ox.ac.uk/~vgg/data/parisbuildings/ (paris_1-v1.tgz, paris_2-v1.tgz)",
    """
gnd_rparis6k.pkl                    imlist, qimlist, gnd
jpg/paris_defense_000000.jpg        6,412 images, also in folders as the archives have them: 6,322
                                    of imlist, 70 of qimlist, 20 damaged ones that are in neither
""",
)
