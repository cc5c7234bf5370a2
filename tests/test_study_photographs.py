"""What the photographs' bench does beside calls of the package: the comparison of steps' times."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import bench_module


def test_cost_takes_turns_and_compares_medians(
    run_options: dict[str, Any],
    captions_file: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three epochs of 3 steps each; the first step of each is not counted."""
    common = {name: run_options[name] for name in ("model", "train_data", "device", "precision")}
    own = {**run_options, "captions": str(captions_file())}
    own = {name: value for name, value in own.items() if name not in ("out", *common)}
    rivals = {"mcip": own, "mcip+": {**own, "distill": 0.5, "mixtures": 0.5}}
    with bench_module("studies.photographs") as bench:
        train, calls = bench.pymcip.train, []

        def called(**options: Any) -> Any:
            calls.append((options["method"], options["epochs"], options.get("distill", 0)))
            return train(**options)

        monkeypatch.setattr(bench.pymcip, "train", called)
        found = bench.cost(rivals, common, 3)
    distilled = [0, 0.5, 0.5, 0, 0, 0.5]  # each goes first in turn
    assert calls == [("mcip", 1, weight) for weight in distilled]
    assert found["steps"] == {"mcip": 6, "mcip+": 6}
    first, last = (middle for _, middle, _ in found["images per second, p20 p50 p80"].values())
    # both medians are rounded to 0.1
    assert found["times the first"] == pytest.approx(first / last, rel=0.1 / last + 0.1 / first)
    assert found["options"] == rivals
