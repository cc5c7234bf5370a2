"""The runner of `make gpu-check`: limits, what is kept of what fails, goals, and a rehearsal."""

from __future__ import annotations

import contextlib
import importlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.beside import BESIDE, Finished
from tests.conftest import bench_module

SAYS = """
tests/test_a.py::test_b PASSED                                  [ 50%]
tests/test_a.py::test_c[x y] FAILED                             [ 60%]
[gw0] [ 75%] SKIPPED tests/test_a.py::test_d[1-2]
[gw1] [100%] PASSED tests/test_a.py::test_e
FAILED tests/test_a.py::test_c[x y] - assert False
"""
# Both ignore SIGINT; the child's id is in a file.
HANGS = "trap '' INT; sh -c 'trap \"\" INT; echo $$ > child; sleep 60' & wait"
KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from harness import Report
report = Report("margin_softmax", device="cpu", dtype="float32", store=True)
report.record({"case": {}, "rival": "first", "error": "none"})
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def check() -> Iterator[Any]:
    with bench_module("gpu_check") as module:
        yield module


def folder(check: Any) -> str:
    return str(Path(check.__file__).parent)


def is_alive(pid: int) -> bool:
    """A process that is dead but not yet waited for is not."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.fixture(scope="module")
def out(check: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a check left some of whose steps fail, hang or are killed."""
    path: Path = tmp_path_factory.mktemp("check")
    rows = {"PYMCIP_BENCH_ROWS": str(path / "rows.jsonl")}
    steps = [
        check.Step("good", "tests", ["echo", SAYS], limit=20, needed="pass"),
        check.Step("bad", "", ["sh", "-c", "echo why; exit 3"], limit=20, beside=True),
        check.Step("absent", "", ["/no/such/program"], limit=20, beside=True),
        check.Step("hangs", "", ["sh", "-c", HANGS], limit=1, beside=True, folder=path),
        check.Step("long", "", ["sh", "-c", "seq 100000; echo its end"], limit=60),
        check.Step(
            "killed", "", [sys.executable, "-c", KILLED, folder(check)],
            limit=60, beside=True, environment=rows,
        ),
    ]  # fmt: skip
    assert check.check(steps, path, 100, missing=["a tool"], grace=0.5) == 0
    return path


def test_every_step_has_its_result(check: Any, out: Path) -> None:
    found = {step["name"]: step for step in importlib.import_module("gpu_summary").results(out)}
    assert {name: step["result"] for name, step in found.items()} == {
        "good": "passed",
        "bad": "failed",
        "absent": "not started",
        "hangs": "timed out",
        "long": "passed",
        "killed": "failed",
    }
    assert found["bad"]["detail"] == "exit status 3: why"
    assert "No such file" in found["absent"]["detail"]
    assert 1 <= found["hangs"]["seconds"] < 10
    assert not is_alive(int((out / "child").read_text()))


def test_what_was_measured_and_said_is_kept(out: Path) -> None:
    (row,) = map(json.loads, (out / "rows.jsonl").read_text().splitlines())
    assert row["rival"] == "first"
    log = (out / "log.txt").read_text()
    assert "[bad] why\n" in log
    assert "[long] 1\n" in log
    assert "[long] 50000\n" not in log
    assert "lines are left out here)\n" in log
    assert log.count("[long] its end\n") == 1
    assert len(log) < 500_000
    text = (out / "summary.md").read_text()
    assert (
        "Tests: 2 passed, 1 failed, 1 skipped\n- FAILED good tests/test_a.py::test_c[x y]\n" in text
    )
    assert "Missing: a tool\n" in text
    assert "Steps: 2 passed, 2 failed, 1 not started, 1 timed out\n" in text


def test_steps_are_cut_when_the_time_is_over(
    check: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = [
        check.Step("endless", "", ["sleep", "60"], limit=60),
        check.Step("never", "", ["touch", tmp_path / "touched"], limit=60),
    ]
    start = time.monotonic()
    assert check.check(steps, tmp_path, 1.5, grace=0.5) == 0
    assert time.monotonic() - start < 10
    assert not (tmp_path / "touched").exists()
    assert "| endless |  | cut | 1 |  |\n| never |  | cut |  |  |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "limit", "needed", "status"),
    [
        ("exit 1", 20, "pass", 1),
        ("exit 1", 20, "not fail", 1),
        ("exit 1", 20, "", 0),
        ("sleep 60", 0.2, "pass", 1),
        ("sleep 60", 0.2, "not fail", 0),
        ("echo test_a.py::test_b SKIPPED", 20, "pass", 1),  # none of them ran
        ("echo test_a.py::test_b PASSED; echo test_a.py::test_c SKIPPED", 20, "pass", 0),
    ],
)
def test_exit_status(
    check: Any, tmp_path: Path, command: str, limit: float, needed: str, status: int
) -> None:
    step = check.Step("only", "", ["sh", "-c", command], limit=limit, needed=needed)
    assert check.check([step], tmp_path, 30, grace=0.5) == status


def test_an_interrupted_check_stops_its_steps_and_sums_up(check: Any, tmp_path: Path) -> None:
    program = f"""
import sys
from pathlib import Path
sys.path.insert(0, {folder(check)!r})
from gpu_check import Step, check
steps = [
    Step("hangs", "", ["sh", "-c", {HANGS!r}], limit=60, folder=Path({str(tmp_path)!r})),
    Step("never", "", ["true"], limit=60, needed="pass"),
]
sys.exit(check(steps, Path({str(tmp_path)!r}), 60, grace=0.5))
"""
    runner = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    child = tmp_path / "child"
    end = time.monotonic() + 30
    while not (child.exists() and child.read_text()) and time.monotonic() < end:
        time.sleep(0.05)
    runner.send_signal(signal.SIGTERM)
    assert runner.communicate(timeout=30)[0]
    assert runner.returncode == 1
    assert not is_alive(int(child.read_text()))
    text = (tmp_path / "summary.md").read_text()
    assert "| hangs |  | interrupted | " in text
    assert "| never |  | cut |" in text


def test_the_summary_of_a_check_that_was_killed(check: Any, out: Path, tmp_path: Path) -> None:
    assert check.main(["--summary", str(out)]) == 0
    for name in ("rows.jsonl", "tests.txt"):
        (tmp_path / name).write_bytes((out / name).read_bytes())
    lines = (out / "steps.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if '"end": "good"' not in line and '"killed"}' not in line]
    (tmp_path / "steps.jsonl").write_text("".join(kept[:-1]) + kept[-1][:20])
    check.main(["--summary", str(tmp_path)])
    text = (tmp_path / "summary.md").read_text()
    assert "| good | tests | killed with the check |" in text
    assert "Tests: 2 passed, 1 failed, 1 skipped" in text


def margin_row(mode: str, rival: str, times: float, **more: Any) -> dict[str, Any]:
    case = {"mode": mode, "B": 4096, "C": 1_000_320, "D": 768, "scale": 30.0}
    row = {"bench": "margin_softmax", "case": case, "rival": rival, "times_ceiling": times}
    return {**row, "seconds": {"p50": times / 100}, "rate": 1.0, "unit": "TFLOP/s", **more}


def test_goals_stand_beside_what_was_measured(check: Any, tmp_path: Path) -> None:
    topk = {"N": 2048, "M": 4_000_000, "D": 768, "k": 10, "threshold": None}
    ours = {"bench": "topk", "case": topk, "seconds": {"p50": 1.0}, "rate": 1.0, "unit": "GFLOP/s"}
    rows = [
        margin_row("forward", "pymcip triton bf16", 1.02),
        margin_row("mc", "pymcip triton bf16", 2.8, peak_bytes=300),
        margin_row("mc", "pymcip triton bf16", 2.5, peak_bytes=500),  # with more scratch
        margin_row("mc", "pymcip torch bf16", 1.0, peak_bytes=1),
        margin_row("mc", "torch.compile ArcFace", 6.0, peak_bytes=4000),
        margin_row("mc", "cce (m = 0)", 4.0),
        margin_row("arc", "pymcip triton bf16", 5.5),
        {**margin_row("arc", "x", 1.0), "case": {"mode": "arc", "B": 8}},
        {
            "bench": "margin_softmax",
            "case": rows_case("mc"),
            "rival": "quack (m = 0)",
            "error": "no",
        },
        {**ours, "rival": "pymcip cuda, screen", "of_ceiling": 0.95},
        {**ours, "rival": "pymcip cuda", "of_ceiling": 1.3},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    check.main(["--summary", str(tmp_path)])
    text = (tmp_path / "summary.md").read_text()
    for line in (
        "| forward | x G | 1.15 | 1.03 | 1.02, extreme reached |",
        "| MCArcMargin | x G | 2.6 | 2.2 | 2.50, reached |",
        "| ArcMargin, E anew | x G | 5 | 4.4 | 5.50, missed |",
        "| ArcMargin, E kept | x G | 3.7 | 3.25 | not measured |",
        "| torch.compile ArcFace, MCArcMargin | x faster | 2 | 3 | 2.40, reached |",
        "| torch.compile ArcFace, MCArcMargin | of its memory | 0.1 |  | 0.07, reached |",
        "| cce, MCArcMargin | x faster | 1.8 | 3 | 1.60, missed |",
        "| cce_exact, MCArcMargin | x faster | 3 | 5 | not measured |",
        "| quack, MCArcMargin | x faster | 1 | 1.15 | quack (m = 0) failed: no |",
        "| top-k bf16, N = 2048 | of G | 0.92 |  | 0.95, reached |",
        "| top-k INT8, ranked again, N = 2048 | of G | 1.4 | 1.6 | 1.30, missed |",
        "| top-k INT8, ranked again, N = 8192 | of G | 1.4 | 1.6 | not measured |",
    ):
        assert line in text.splitlines()


def rows_case(mode: str) -> dict[str, Any]:
    case: dict[str, Any] = margin_row(mode, "", 1.0)["case"]
    return case


def test_the_steps_measure_every_goal(check: Any, tmp_path: Path) -> None:
    """Each of ours by a step's options, as the benches read them, and each rival by its name."""
    places = check.Places(Path("python"), tmp_path, tmp_path, tmp_path)
    measured: list[dict[str, Any]] = []
    for step in check.steps(places, rehearse=False):
        words = list(map(str, step.command))
        if step.name.startswith("compile"):
            continue
        if "bench/bench_margin_softmax.py" in words:
            bench = importlib.import_module("bench_margin_softmax")
            options = bench.arguments(words[2:])
            chosen, left_out = bench.select_cases(options, 139 * 2**30)
            assert not left_out
            measured += [
                {**margin_row(mode, "", 1.0), "case": {"mode": mode, "B": b, "C": c, "D": d}}
                | {"words": options.rivals}
                for (b, c, d), modes in chosen
                for mode in modes
            ]
            assert options.seconds < step.limit
        if "bench/bench_topk.py" in words:
            bench = importlib.import_module("bench_topk")
            options = bench.arguments(words[2:])
            measured += [
                {"bench": "topk", "words": options.rivals}
                | {"case": {"N": case.queries, "M": options.bank, "D": case.dim, "k": case.k}
                   | {"threshold": case.threshold}}
                for case in bench.select_cases(options)
            ]  # fmt: skip
            assert options.seconds < step.limit
    for goal in importlib.import_module("gpu_summary").GOALS:
        for select in filter(None, (goal.ours, goal.rival)):
            assert any(
                select({**row, "rival": select.rival})
                and any(word in select.rival for word in row["words"])
                for row in measured
            ), select


def test_what_is_missing_is_named(
    check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    environment = check.gpu_environment
    monkeypatch.setattr(
        environment,
        "NEEDED",
        {"no_such": "no-such", "carried": "carried-along", "pytest": "pytest>=1000.0"},
    )
    monkeypatch.setattr(environment, "WANTED", {"neither": "neither", "torch": "torch"})
    monkeypatch.setattr(environment, "TOOLS", ("sh", "no-such-tool"))
    (tmp_path / "Carried_Along-1.0-py3-none-any.whl").touch()
    words = ["--wheels", str(tmp_path), "--out", str(tmp_path / "out")]
    for gpus, said in ((0, "the driver shows none: nothing was checked"), (1, "")):
        monkeypatch.setattr(environment, "gpus", lambda gpus=gpus: gpus)
        assert check.main(words) == 2
        printed = capsys.readouterr().out
        assert "lacks no-such, pytest>=1000.0, without which" in printed
        assert "left out: neither, no-such-tool." in printed
        assert "make gpu-wheels" in printed
        assert said in printed
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def rehearsed(check: Any) -> Finished:
    (finished,) = BESIDE.wait("rehearsed")
    return finished


def test_a_rehearsal(check: Any, rehearsed: Finished) -> None:
    """The check's own steps with tiny cases; its summary can be made anew."""
    program = str(Path(check.__file__))
    out = BESIDE.folder / "rehearsal"
    assert rehearsed.returncode == 0, rehearsed.out + rehearsed.error
    found = importlib.import_module("gpu_summary").results(out)
    assert {step["result"] for step in found} == {"passed"}, rehearsed.out
    assert sum(step["purpose"] != "a stand-in" for step in found) >= 9
    assert len(list(out.iterdir())) <= 8
    benches = {json.loads(line)["bench"] for line in (out / "rows.jsonl").read_text().splitlines()}
    assert benches == {"ceilings", "margin_softmax", "topk", "metrics"}
    text = (out / "summary.md").read_text()
    assert "Tests: 4 passed, 0 failed, 0 skipped" in text
    (out / "summary.md").unlink()
    again = subprocess.run([sys.executable, program, "--summary", str(out)], check=False)
    assert again.returncode == 0
    assert (out / "summary.md").read_text() == text
    twice = [sys.executable, program, "--rehearse", "--out", str(out)]
    assert subprocess.run(twice, capture_output=True, check=False).returncode == 2
