"""The bench of mining: its data, and a small run from the kill to the rows."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import bench_module


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    with bench_module("bench_mining") as module:
        yield module


def test_data_are_as_described() -> None:
    with bench_module("mining_data") as data:
        spectrum, same = data.Spectrum(512, 100), data.Spectrum(512, 100)
    images, captions = spectrum.rows("img", 0, 500), spectrum.rows("text", 0, 20_000)
    assert images.dtype == captions.dtype == np.float16
    again = same.rows("text", 0, 20_000)
    assert np.array_equal(captions, again)
    assert not np.array_equal(captions[:500], spectrum.rows("text", 1, 500))
    norms = np.linalg.norm(captions.astype(np.float32), axis=1)
    np.testing.assert_allclose(norms, 1, atol=2**-11)
    streams = [spectrum.centres, images.astype(np.float32), captions[:500].astype(np.float32)]
    for first, second in itertools.combinations(streams, 2):  # drawn apart from each other
        alike = (first[:100] * second[:100]).sum(axis=1)
        assert np.quantile(alike, 0.75) < 0.2
    cosines = images.astype(np.float32) @ captions.astype(np.float32).T
    assert 0.02 < np.median(cosines) < 0.15  # the mean that all share
    over = (cosines >= 0.27).sum(axis=1)
    assert 0.5 < np.median(over) / 200 < 1.1  # most captions of an image's cluster
    values = np.linalg.svd(captions[:2000].astype(np.float32), compute_uv=False)
    assert values[1] > 3 * values[-1]


def test_room_is_checked(bench: Any, tmp_path: Path) -> None:
    words = ["--captions", "1000000000000", "--work", str(tmp_path)]
    with pytest.raises(SystemExit, match="GB are needed"):
        bench.main(words)


def test_smoke(bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A killed and resumed run finds all pairs, and the rows tell what it took."""
    words = ["--smoke", "--work", str(tmp_path / "work"), "--checked", "8", "--repetitions", "1"]
    words += ["--rival-images", "64", "--rival-captions", "2000", "--threads", "1", "--note", "so"]
    bench.main([*words, "--memory-limit", "3"])
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["case"] == {"N": 70_000, "M": 6000, "D": 32, "k": 10, "threshold": 0.27}
    assert summary["fp64"] == {"recall": 1.0, "images": 8, "same_order": 1.0}
    assert summary["note"] == "so"
    assert summary["seconds"] > summary["seconds_lost_by_the_kill"] >= 0
    assert summary["cpu_seconds"] > 0
    peak = summary["peak_bytes"]
    assert 0 < peak["without_page_cache"] < peak["resident"] < 3 << 30
    assert summary["rivals"]["pymcip topk over parts"]["recall"] == 1
    assert not list((tmp_path / "work").iterdir())  # nothing is left without --keep
