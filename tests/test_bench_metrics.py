"""The bench of metrics: its data, and that all rivals give one answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.conftest import bench_module


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    with bench_module("bench_metrics") as module:
        yield module


def test_cases_have_the_sizes_of_the_data_sets(bench: Any) -> None:
    sizes = {case.name: (case.queries, case.database) for case in bench.CASES}
    assert sizes == {"gpr1200": (0, 12_000), "instre": (1250, 27_293), "roxford": (70, 4993)}
    problem = bench.resembling(bench.SMALL[2])
    norms = torch.cat([problem.queries, problem.database]).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms))
    for own in problem.truth:
        kinds = [row for kind in ("easy", "hard", "junk") for row in own[kind]]
        assert sorted(kinds) == own["ok"].tolist()


def test_a_run(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    bench.main(["--smoke", "--repetitions", "1"])
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(last["rows"]) == 12
    assert {row["case"]["case"] for row in last["rows"]} == {"gpr1200", "instre", "roxford"}
    for row in last["rows"]:
        assert 20 < row["case"]["mAP"] < 99.9  # neither hopeless nor trivial
        assert row["points off"] < 0.2  # near-ties that fp32 turns round
        if row["rival"] == bench.OURS:
            assert row["points off"] < 1e-9
    assert set(last["goals"]) == {"gpr1200", "instre", "roxford"}


def test_one_case(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    bench.main(["--smoke", "--repetitions", "1", "--cases", "roxford", "--rivals", "torch"])
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    (row,) = last["rows"]
    assert (row["case"]["case"], row["rival"]) == ("roxford", "torch mm+argsort+loop")
    assert not last["goals"]  # which take all rivals
