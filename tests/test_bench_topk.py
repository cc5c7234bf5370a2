"""The bench of topk: its cases, its data, and its rivals, which answer what they are asked."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from pymcip.ops.faiss_import import faiss_threads, probe_faiss
from tests.conftest import bench_module


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    with bench_module("bench_topk") as module:
        if probe_faiss() is not None:
            yield module
            return
        with faiss_threads(torch.get_num_threads()):  # which the rivals set for themselves
            yield module


@pytest.fixture(scope="module")
def problem(bench: Any) -> Any:
    queries, bank = bench.resembling(9, 3000, 64)
    return bench.Problem(queries, bank, 5, 2)


def test_cases(bench: Any) -> None:
    cases = bench.select_cases(bench.arguments([]))
    assert {(case.dim, case.k) for case in cases} == {(768, 10)}
    assert [case.queries for case in cases] == [2048, 2048, 64, 64, 1, 1]
    assert {case.threshold for case in cases} == {None, 0.27}
    assert len(bench.select_cases(bench.arguments(["--full"]))) == 54
    words = ["--full", "--dims", "512", "--k", "64", "--no-threshold"]
    assert [case.queries for case in bench.select_cases(bench.arguments(words))] == [2048, 64, 1]
    (case,) = bench.select_cases(bench.arguments(["--queries", "7", "--threshold", "0.3"]))
    assert case == bench.Case(768, 10, 7, 0.3)
    assert bench.arguments(["--device", "cuda"]).bank == 2_000_000
    assert bench.arguments(["--full"]).seconds is None


def test_data_are_as_described(bench: Any) -> None:
    queries, bank = bench.resembling(200, 70_000, 512)
    norms = torch.cat([queries, bank]).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms))
    scores = queries @ bank.T
    assert 0.02 < float(scores.median()) < 0.15  # the common mean
    admitted = (scores >= bench.THRESHOLD).sum(dim=1).double().mean()
    assert 10 < float(admitted) < 1000


def test_the_reference_is_a_ranking_in_fp64(bench: Any, problem: Any) -> None:
    ids, scores = bench.fp64_ranking(problem.queries, problem.bank.repeat(6, 1), 5)
    exact = problem.queries.double() @ problem.bank.double().T
    wanted = exact.topk(5, dim=1)
    torch.testing.assert_close(scores[:, 0], wanted.values[:, 0], rtol=1e-12, atol=0)
    assert (scores[:, 5 - 1] == scores[:, 0]).all()  # of six copies
    assert (ids % 3000 == wanted.indices[:, :1]).all()


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("count", [1, 9])
def test_rivals_answer(bench: Any, problem: Any, k: int, count: int) -> None:
    asked = bench.Problem(problem.queries[:count], problem.bank, k, 2)
    exact = (asked.queries.double() @ asked.bank.double().T).numpy()
    wanted = np.argsort(-exact, axis=1)[:, :k]
    largest = max(float(asked.queries.abs().max()), float(asked.bank.abs().max()))
    # 8 bits: half a step per element in either row, times the other's length. bf16: 2^-9 of the
    # score for each row, and for the score itself.
    bound = max(64**0.5 * largest / 127 * 1.02, 3.1 * 2.0**-9)
    answered, reasons = 0, []
    for contender in bench.CONTENDERS:
        if contender.device != "cpu":
            continue
        try:
            call = contender.make(asked)
        except bench.MissingRivalError as reason:
            reasons.append(str(reason))
            continue
        answered += 1
        ids, scores = (np.asarray(part) for part in call())
        assert ids.shape == scores.shape == (count, k), contender.name
        own = np.take_along_axis(exact, ids, axis=1)
        assert np.abs(scores - own).max() <= bound, contender.name
        assert (own >= np.take_along_axis(exact, wanted, axis=1)[:, -1:] - 2 * bound).all()
    assert all("pip install" in reason for reason in reasons)
    assert answered >= 2  # torch is always there
    product = bench.product_alone(asked, torch.bfloat16, 1024)
    assert product() is None


def test_a_run(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    words = "--bank 3000 --dims 64 --k 5 --queries 9 --repetitions 1 --rivals faiss torch pymcip"
    bench.main(words.split())
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {(row["rival"], row["case"]["threshold"]): row for row in last["rows"]}
    for threshold in (None, 0.27):
        assert rows["torch fp32 mm+topk", threshold]["recall@5"] == 1
        assert rows["pymcip torch", threshold]["recall@5"] == 1
        assert rows[bench.GEMM, threshold]["times_ceiling"] == 1
    assert not any("numkong" in name for name, _ in rows)
    assert not last["left_out"]


def test_time_that_has_run_out(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    words = "--bank 300 --dims 16 --k 5 --queries 9 --rivals torch --seconds 0"
    bench.main(words.split())
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert not last["rows"]
    assert len(last["left_out"]) == 2


def test_a_rival_that_is_missing_is_told(
    bench: Any, problem: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "numkong", None)
    options = bench.arguments(["--rivals", "numkong", "packed"])
    missing: dict[str, str] = {}
    wanted = bench.fp64_ranking(problem.queries, problem.bank, 5)
    names = [rival.name for rival in bench.rivals(problem, 0.27, wanted, options, missing)]
    assert names[-1] == bench.GEMM
    assert "pip install numkong" in missing["numkong bf16 packed+topk"]
