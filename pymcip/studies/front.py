"""The Pareto front of two qualities."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def pareto_front(points: npt.ArrayLike) -> list[int]:
    """Indices, ascending, of the points that no other point dominates; larger is better.

    A point dominates another if it is at least as good in both qualities and better in one. Equal
    points don't dominate each other: either all of them are on the front, or none. A point with a
    quality that is NaN was not measured; it is not on the front and dominates nothing.

    Args:
        points: [N, 2], float.

    Raises:
        ValueError: another shape.
    """
    values = np.asarray(points, dtype=np.float64)
    if values.size == 0:
        return []
    if values.ndim != 2 or values.shape[1] != 2:
        raise ValueError(f"points has the shape {values.shape}; allowed: [N, 2]")
    measured = np.flatnonzero(~np.isnan(values).any(axis=1))
    # By falling first quality, ties by falling second: a point is on the front if its second quality
    # is above all before it, or if it equals the last point of the front.
    order = measured[np.lexsort((-values[measured, 1], -values[measured, 0]))]
    front: list[int] = []
    for index in order.tolist():
        last = values[front[-1]] if front else None
        if last is None or values[index, 1] > last[1] or bool((values[index] == last).all()):
            front.append(index)
    return sorted(front)
