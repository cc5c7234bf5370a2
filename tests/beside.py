"""Programs that some tests wait for, run one by one beside the tests that come before those.

They start when the tests are collected, and only if tests that need them are to run: the fixtures
named in `PROGRAMS`. So the minutes that compilers take are spent on a core that is idle otherwise.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
CAPABILITIES = ("80", "90", "100", "120")
ARCHITECTURES = ("80", "90a", "100", "120")
SECONDS = 600  # that a test waits at most


class Finished(NamedTuple):
    returncode: int
    out: str
    error: str


def _compiled(script: str, *words: str) -> list[str]:
    """Triton decides at its import whether kernels are interpreted: not here."""
    clean = ["env", "-u", "TRITON_INTERPRET", sys.executable, "-W", "ignore"]
    return [*clean, str(ROOT / "tests" / script), *words]


PROGRAMS: dict[str, list[list[str]]] = {
    "rehearsed": [
        [
            sys.executable, str(ROOT / "bench" / "gpu_check.py"),
            *("--rehearse", "--out", "rehearsal", "--wheels", "."),
        ]
    ],
    "cubins": [
        [
            *("nvcc", "-std=c++17", "-cubin", "-Xptxas", "-v", "-o", f"{architecture}.cubin"),
            str(ROOT / "csrc" / "topk_cuda.cu"),
            f"-gencode=arch=compute_{architecture},code=sm_{architecture}",
        ]
        for architecture in ARCHITECTURES
    ],
    "compiled_kernels": [
        _compiled("compile_margin_softmax.py", *CAPABILITIES),
        _compiled("compile_topk.py", *CAPABILITIES),
    ],
    "counted_kernels": [_compiled("count_kernels.py")],
}  # fmt: skip


class Beside:
    """The programs, once started; a folder of their own holds what they write."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self.folder = Path()

    def start(self, names: Iterable[str]) -> None:
        """Run the programs of these names."""
        lines = [
            f"{shlex.join(command)} >{name}{number}.out 2>{name}{number}.error </dev/null; "
            f"echo $? >rc; mv rc {name}{number}.rc"
            for name in PROGRAMS
            if name in names
            for number, command in enumerate(PROGRAMS[name])
        ]
        if lines:
            self.folder = Path(tempfile.mkdtemp(prefix="pymcip-tests-"))
            self._process = subprocess.Popen(
                ["sh", "-c", "\n".join(lines)], cwd=self.folder, start_new_session=True
            )

    def wait(self, name: str) -> list[Finished]:
        """What the programs of a name did, in order, as soon as they have ended."""
        found = []
        for number in range(len(PROGRAMS[name])):
            status, out, error = (
                self.folder / f"{name}{number}.{kind}" for kind in ("rc", "out", "error")
            )
            end = time.monotonic() + SECONDS
            while not status.exists():
                ended = self._process is None or self._process.poll() is not None
                assert status.exists() or not ended, f"{name}: ended early"
                assert time.monotonic() < end, f"{name}: takes more than {SECONDS} s"
                time.sleep(0.05)
            found.append(Finished(int(status.read_text()), *(p.read_text() for p in (out, error))))
        return found

    def stop(self) -> None:
        """End what still runs, and remove what was written."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
        self._process = None


BESIDE = Beside()
