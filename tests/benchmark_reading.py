"""Read miniatures of the benchmarks' data sets, or the message with which they are refused."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from pymcip.benchmarks.contract import AbsentError, DataSet, Labelled, QuerySet, SuiteOptions
from pymcip.data import ImageData
from pymcip.errors import DataError

PARTIAL = SuiteOptions(allow_partial=True)


def labelled(data: DataSet, folder: Path, options: SuiteOptions = PARTIAL) -> Labelled:
    found = data.read(folder, options)
    assert isinstance(found, Labelled)
    assert found.labels.dtype == np.int64
    assert len(found.labels) == len(found.images)
    return found


def query_set(data: DataSet, folder: Path, options: SuiteOptions = PARTIAL) -> QuerySet:
    found = data.read(folder, options)
    assert isinstance(found, QuerySet)
    return found


def refusal(data: DataSet, folder: Path, options: SuiteOptions = PARTIAL) -> str:
    with pytest.raises(DataError) as caught:
        data.read(folder, options)
    assert not isinstance(caught.value, AbsentError)
    return str(caught.value)


def names_of(images: ImageData, folder: Path) -> list[str]:
    return [os.path.relpath(images.key(i), folder) for i in range(len(images))]


def fan(degrees: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Unit vectors in the plane: their order by cosine is their order by angle."""
    angles = np.radians(np.asarray(degrees, np.float64))
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)
