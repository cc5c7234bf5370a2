"""Progress: a bar in a terminal, else a log line now and then."""

from __future__ import annotations

import io
import sys

import pytest

from pymcip import progress as module
from pymcip.progress import progress


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.name == "pymcip.progress"]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still; its first entry is the time."""
    now = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


def test_without_a_terminal_a_line_every_30_seconds(
    clock: list[float], caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level("INFO", logger="pymcip")
    with progress(total=100, description="embedding images", unit="image") as bar:
        for _ in range(100):
            clock[0] += 1
            bar.update()
    assert lines(caplog) == [
        "embedding images: 30 of 100, 1.00image/s, 01:10 left",
        "embedding images: 60 of 100, 1.00image/s, 00:40 left",
        "embedding images: 90 of 100, 1.00image/s, 00:10 left",
    ]
    assert capsys.readouterr().err == ""


def test_what_is_quick_is_silent(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="pymcip")
    for _ in progress(range(20), description="indexing", unit="file"):
        clock[0] += 1
    assert lines(caplog) == []


def test_a_resumed_part_counts_what_was_done_before(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="pymcip")
    with progress(total=125, initial=5, description="reading", unit="row") as bar:
        clock[0] += module.LINE_SECONDS
        bar.update(60)
    assert lines(caplog) == ["reading: 65 of 125, 2.00row/s, 00:30 left"]


def test_in_a_terminal_there_is_a_bar(
    clock: list[float], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", logger="pymcip")
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress(total=2, description="embedding", unit="image") as bar:
        clock[0] += 40
        bar.update()
    assert lines(caplog) == []
    assert "embedding:  50%" in terminal.getvalue()
