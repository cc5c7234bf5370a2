"""GPR1200: 1,200 classes of 10 images from six sources."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from pymcip.benchmarks.contract import AbsentError, DataSet, Labelled, SuiteOptions, check_counts
from pymcip.benchmarks.folders import first_folder, image_names
from pymcip.data import list_images
from pymcip.data.sources import some
from pymcip.errors import DataError

GPR1200_COUNTS = {"images": 12_000, "classes": 1_200, "classes of 10 images": 1_200}


def _read(data: DataSet, folder: Path, options: SuiteOptions) -> Labelled:
    """Read GPR1200: 1,200 classes of 10 images, ordered by class number, then name.

    A file is called `{class}_{name}.jpg`, and the class number is its label. In this order the six
    sources are slices of 2,000 images.

    Raises:
        AbsentError: there are no images.
        DataError: an image's name begins with no number, or the counts are others.

    Source: Schall et al., GPR1200 (MMM 2022).
    """
    base = first_folder(folder, ("images", "GPR1200/images", "GPR1200", ""))
    names = list(image_names(base))
    if not names:
        raise AbsentError(f"{base} holds no images")
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
    notes = check_counts(data.title, found, GPR1200_COUNTS, options)
    return Labelled(list_images(base, [name for _, name in ordered]), labels, notes=notes)


GPR1200 = DataSet(
    name="gpr1200",
    title="GPR1200",
    folders=("gpr1200", "GPR1200"),
    source="https://github.com/Visual-Computing/GPR1200",
    layout="""
images/0_*.jpg … images/1199_*.jpg    12,000 images, {class}_{name}.jpg
""",
    reader=_read,
)
