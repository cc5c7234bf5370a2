"""The study of kept alignment: its rank correlation, and its variants as options of `train`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pymcip.configs import TrainConfig
from pymcip.demo.recipe import DEMO
from pymcip.errors import DataError
from tests.conftest import bench_module


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    with bench_module("studies.alignment") as module:
        yield module


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1.0, 2.0, 30.0, 4.0, 50.0], [2, 1, 5, 3, 40], 1 - 6 * 2 / 120),  # squared differences: 2
        # Ranks 0, 1.5, 1.5, 3 and 0, 2, 1, 3 around their mean 1.5: 4.5 / sqrt(4.5 * 5).
        ([1, 2, 2, 4], [10, 30, 20, 40], math.sqrt(0.9)),
        # Ranks 1, 1, 1, 3 and 2.5, 2.5, 0.5, 0.5: (-0.5 - 0.5 + 0.5 - 1.5) / sqrt(3 * 4).
        ([7, 7, 7, 9], [0.2, 0.2, 0.1, 0.1], -2 / math.sqrt(12)),
    ],
)
def test_rank_correlation_by_hand(
    first: list[float], second: list[float], expected: float, bench: Any
) -> None:
    one, other = np.array(first), np.array(second)
    assert bench.rank_correlation(one, other) == pytest.approx(expected, abs=1e-12)
    assert bench.rank_correlation(other, one) == pytest.approx(expected, abs=1e-12)
    assert bench.rank_correlation(one, -other) == pytest.approx(-expected, abs=1e-12)
    assert bench.rank_correlation(np.exp(one), other) == pytest.approx(expected, abs=1e-12)


def test_variants_are_allowed_and_measured(bench: Any) -> None:
    """Each with the demo's recipe, as the ablation trains it; all have a probe."""
    common = {"method": "mcip", **DEMO.train}
    for options in bench.VARIANTS.values():
        config = TrainConfig(
            model="m", train_data="d", captions="c", out="o", **{**common, **options}
        )
        assert config.budget


def test_a_run_that_was_drawn_back_has_no_tuned_weights_without_checkpoints(
    bench: Any, tmp_path: Path
) -> None:
    (tmp_path / "result.json").write_text('{"alignment": {"coefficient": 0.5}}')
    with pytest.raises(DataError, match=r"no checkpoints, and its export was drawn back to 0\.5"):
        bench.tuned_state(tmp_path)
