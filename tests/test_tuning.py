"""Which tile size a Triton kernel runs with; launches and their times are made up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("triton", minversion="3.4")

from triton.runtime.errors import OutOfResources

from pymcip.errors import BackendError
from pymcip.triton_kernels import tuning
from pymcip.triton_kernels.tuning import Config, launch

LARGE, MIDDLE, SMALL = (Config(size, size, 64, 8, 3) for size in (256, 128, 64))
SIZES = (LARGE, MIDDLE, SMALL)
Run = Callable[[Config], None]


class Gpu:
    """Has room for some tiles, and remembers what was launched."""

    def __init__(self, *fitting: Config) -> None:
        self.fitting = fitting
        self.launched: list[Config] = []

    def run(self, config: Config) -> None:
        if config not in self.fitting:
            raise OutOfResources(164_000, 101_376, "shared memory")
        self.launched.append(config)


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """As if nothing were interpreted; gives the file of choices."""
    file = tmp_path / "tuning" / "gpu.json"
    monkeypatch.setattr(tuning, "INTERPRETED", False)
    monkeypatch.setattr(tuning, "choices_file", lambda: file)
    monkeypatch.setattr(tuning, "chosen", {})
    monkeypatch.setattr(tuning, "read_files", set())
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: False)
    monkeypatch.delenv("PYMCIP_TUNE", raising=False)
    return file


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> dict[Config, float]:
    """Milliseconds by tile size; what does not fit takes for ever, as in `tuning`."""
    milliseconds = {LARGE: 3.0, MIDDLE: 1.0, SMALL: 2.0}

    def timed(run: Run, config: Config) -> float:
        try:
            run(config)
        except OutOfResources:
            return float("inf")
        return milliseconds[config]

    monkeypatch.setattr(tuning, "time_config", timed)
    return milliseconds


@pytest.mark.parametrize(("fitting", "expected"), [(SIZES, LARGE), ((SMALL,), SMALL)])
@pytest.mark.parametrize("why", ["PYMCIP_TUNE", "capture", "small"])
def test_without_timing_the_first_that_fits_runs(
    fitting: tuple[Config, ...], expected: Config, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if why == "PYMCIP_TUNE":
        monkeypatch.setenv("PYMCIP_TUNE", "0")
    elif why == "capture":
        monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: True)
    gpu = Gpu(*fitting)
    launch("kernel", [1], SIZES, gpu.run, timed=why != "small")
    assert gpu.launched == [expected]


@pytest.mark.usefixtures("times")
def test_the_fastest_is_remembered(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(*SIZES)
    launch("kernel", [1], SIZES, gpu.run)
    assert gpu.launched == [*SIZES, MIDDLE]
    monkeypatch.setattr(tuning, "chosen", {})  # as in a new process
    monkeypatch.setattr(tuning, "read_files", set())
    again = Gpu(*SIZES)
    launch("kernel", [1], SIZES, again.run)
    assert again.launched == [MIDDLE]
    assert compiled.exists()


@pytest.mark.usefixtures("times")
def test_a_choice_that_no_longer_fits_is_passed_over() -> None:
    launch("kernel", [1], SIZES, Gpu(*SIZES).run)
    gpu = Gpu(SMALL)
    launch("kernel", [1], SIZES, gpu.run)
    assert gpu.launched == [SMALL]


@pytest.mark.usefixtures("times")
@pytest.mark.parametrize("timed", [True, False])
def test_nothing_fits(timed: bool, compiled: Path) -> None:
    with pytest.raises(BackendError, match=r"kernel: none of 3 tile sizes .*shared memory.*torch"):
        launch("kernel", [1], SIZES, Gpu().run, timed=timed)
    assert not compiled.exists()
