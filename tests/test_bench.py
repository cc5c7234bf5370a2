"""The bench of margin_softmax: which cases it takes, its own fp64 reference, rivals that fail."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pymcip.ops import margin_softmax
from tests.conftest import bench_module

GIB = 2**30


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    with bench_module("bench_margin_softmax") as module:
        yield module


@pytest.fixture(scope="module")
def rivals() -> Iterator[Any]:
    with bench_module("margin_rivals") as module:
        yield module


def test_default_cases_on_a_gpu(bench: Any) -> None:
    chosen, left_out = bench.select_cases(bench.arguments(["--device", "cuda"]), 79 * GIB)
    assert chosen[0] == (bench.GOAL, list(bench.PRODUCTS))
    for values, axis in ((bench.ROWS, 0), (bench.COLUMNS, 1), (bench.DIMS, 2)):
        assert {size[axis] for size, _ in chosen} == set(values)
    assert not left_out
    chosen, left_out = bench.select_cases(bench.arguments(["--device", "cuda"]), 40 * GIB)
    (large,) = (modes for size, modes in chosen if size[1] == 12_000_000)
    assert large == ["mc"]
    assert [row[1] for row in left_out] == ["arc"]
    assert "73 GiB of 40 GiB" in left_out[0][2]
    chosen, left_out = bench.select_cases(bench.arguments(["--device", "cuda", "--full"]), 79 * GIB)
    assert len({size for size, _, _ in left_out} | {size for size, _ in chosen}) == 27
    assert chosen[0][0] == bench.GOAL


@pytest.mark.parametrize(("kind", "margin"), [("several", 0.3), ("one", 0.3), ("plain", 0.0)])
def test_reference(bench: Any, rivals: Any, kind: str, margin: float) -> None:
    options = bench.arguments(["--cluster", "64", "--positives", "3"])
    case = bench.Case(9, 700, 16, options)
    found = case.expected(kind, trainable=True)
    positives = case.several if kind == "several" else case.one
    x, w = case.x.double().requires_grad_(), case.matrix.double().requires_grad_()
    loss = margin_softmax(
        x, w, positives.indptr, positives.indices, scale=30.0, margin=margin, backend="torch"
    )
    dx, dw = torch.autograd.grad(loss.sum(), [x, w])
    assert rivals.error(loss, found.loss) < 1e-10
    result = rivals.Result(loss, dx, dw)
    assert max(rivals.errors(case, result, found).values()) < 1e-10


def test_every_mode_runs_on_the_cpu(bench: Any) -> None:
    options = bench.arguments(["--cluster", "64", "--positives", "3"])
    case = bench.Case(9, 700, 16, options)
    for mode, products in bench.PRODUCTS.items():
        for rival in bench.rivals(case, mode):
            figures = rival.check(rival.run())
            wanted = {"loss err": 1e-5, "dX err": 1e-2, "dW err": 1e-2, "kept": 1.0}
            assert all(value <= wanted[name] for name, value in figures.items()), rival.name
            if rival.name.startswith("pymcip"):
                assert len(figures) == products + mode.endswith("filtered")


def test_a_rival_that_fails_stops_nothing(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> None:
        raise RuntimeError("out of luck\nand more")

    rivals = [bench.Rival("one", lambda: 1.0, lambda value: value), bench.Rival("two", fails)]
    with pytest.raises(RuntimeError, match="out of luck"):
        bench.compare(rivals)
    timings = bench.compare(rivals, repetitions=4, seconds=1e-9, tolerant=True)
    assert [len(timing.seconds) for timing in timings] == [3, 0]
    report = bench.Report("none", device="cpu", dtype="float32")
    report.add({}, timings, work=1.0, unit="runs", accuracy="value")
    report.finish()
    assert '"error": "RuntimeError: out of luck"' in capsys.readouterr().out.splitlines()[-1]


def test_rows_are_stored_when_they_are_measured(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "new" / "rows.jsonl"
    monkeypatch.setenv("PYMCIP_BENCH_ROWS", str(file))
    monkeypatch.setenv("PYMCIP_COMMIT", "abc")
    report = bench.Report("none", device="cpu", dtype="float32", store=True)
    timings = bench.compare([bench.Rival("one", lambda: None)])
    for count in (1, 2):
        notes = {"count": count}
        report.add({"B": 1}, timings, work=1.0, unit="runs", accuracy="value", notes=notes)
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        assert len(rows) == count
        assert {name: rows[-1][name] for name in ("bench", "rival", "commit", "count")} == {
            "bench": "none",
            "rival": "one",
            "commit": "abc",
            "count": count,
        }


def test_a_rival_that_breaks_the_gpu_is_named(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    with pytest.raises(RuntimeError, match=r"^one left the GPU unusable .* with --rivals"):
        bench.compare([bench.Rival("one", lambda: None)], device="cuda", tolerant=True)


def test_liger_cute_gets_the_shapes_that_it_takes(
    bench: Any, rivals: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = bench.Case(256, 700, 16, bench.arguments(["--cluster", "64"]))
    monkeypatch.setattr(rivals, "chunk_rows", lambda rows, columns: 128)
    rival = rivals.cross_entropy_builder(rivals.liger_cute(256, 700), 256)
    name = "liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90"
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install 'liger-kernel\[cutedsl\]>=0.8.5'"):
        rival(case, "arc")

    def its_function(
        _input: torch.Tensor,
        weight: torch.Tensor,
        target: torch.Tensor,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> torch.Tensor:
        assert len(_input) == len(target) == 128
        assert len(weight) == 768
        return torch.nn.functional.cross_entropy(
            _input.float() @ weight.float().T, target, reduction=reduction
        )

    module = SimpleNamespace(liger_fused_linear_cross_entropy_sm90=its_function)
    monkeypatch.setitem(sys.modules, name, module)
    run, check = rival(case, "arc")
    figures = check(run())
    # 68 more terms of e^0 beside 700
    assert set(figures) == {"loss err", "dX err", "dW err"}
    assert max(figures.values()) < 0.1


@pytest.mark.parametrize(
    ("rows", "columns", "chunk"),
    [(4096, 168_192, 4096), (4096, 1_000_320, 2048), (512, 12_000_000, 128), (200, 1000, 256)],
)
def test_chunk_rows(rivals: Any, rows: int, columns: int, chunk: int) -> None:
    assert rivals.chunk_rows(rows, columns) == chunk
    assert chunk * columns < 2**31
