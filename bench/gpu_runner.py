"""Runs commands one after another, or beside each other, and writes down what they say at once.

No step depends on the success of another: one that fails, hangs or can't start is a line among the
results. Standard library alone, as it has to start where nothing is installed.
"""

from __future__ import annotations

import collections
import contextlib
import datetime as dt
import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any

STEPS, LOG, TESTS, ROWS = "steps.jsonl", "log.txt", "tests.txt", "rows.jsonl"
HEAD, TAIL = 256 << 10, 64 << 10  # bytes of a step's output that are kept
# What pytest -v says of a test, with xdist and without.
OUTCOMES = "PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS"
OUTCOME = re.compile(
    rf"^\[gw\d+\] \[ *\d+%\] (?P<spread>{OUTCOMES}) (?P<test>\S+::.+?)\s*$"
    rf"|^(?P<alone>\S+::.+?) (?P<said>{OUTCOMES})\b"
)


Words = Sequence["str | Path"]


@dataclass(frozen=True)
class Step:
    """A command and what is to be known of it.

    rehearsal: the command that stands for it in a rehearsal; none: its words are printed.
    limit: seconds until it is stopped.
    beside: it starts together with the step above it.
    needed: what the whole check asks of it: "pass", "not fail" (it may be stopped, or not start), or
        nothing.
    into: the file that takes its output.
    """

    name: str
    purpose: str
    command: Words
    rehearsal: Words = ()
    _: KW_ONLY
    limit: float
    beside: bool = False
    needed: str = ""
    into: str = LOG
    folder: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


class Runner:
    """Runs steps within `seconds`, and writes into `out` as things happen.

    grace: seconds between the request to stop (SIGINT) and the end of a step's whole process group
        (SIGKILL). They count.
    """

    def __init__(self, out: Path, seconds: float, grace: float = 8.0) -> None:
        self._out, self._seconds, self._grace = out, seconds, grace
        self._end = time.monotonic() + seconds
        self._stopped = False
        self._lock = threading.Lock()

    def run(self, steps: Sequence[Step], **facts: Any) -> None:
        """`facts` are stored beside the plan."""
        plan = [
            {"name": step.name, "purpose": step.purpose, "needed": step.needed} for step in steps
        ]
        self._record(plan=plan, seconds=self._seconds, **facts)
        for group in groups(steps):
            if self._stopped or self._left() <= 0:
                return
            threads = [threading.Thread(target=self._step, args=[step]) for step in group]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

    def stop(self, number: int, frame: FrameType | None) -> None:
        """Stop what runs and start nothing more: a handler of signals."""
        self._stopped = True

    def _left(self) -> float:
        return self._end - self._grace - time.monotonic()

    def _record(self, **values: Any) -> None:
        now = dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds")
        self._write(STEPS, json.dumps({"time": now, **values}) + "\n")

    def _write(self, name: str, text: str) -> None:
        with self._lock, (self._out / name).open("a", encoding="utf-8") as stream:
            stream.write(text)

    def _step(self, step: Step) -> None:
        limit = min(step.limit, self._left())
        print(f"{step.name} ...\n", end="", flush=True)  # in one piece, beside others
        self._record(begin=step.name)
        start = time.monotonic()
        detail = ""
        try:
            process = subprocess.Popen(
                step.command,
                cwd=step.folder,
                env={**os.environ, **step.environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            result, detail = "not started", str(error)
        else:
            output = _Output(self, step)
            reader = threading.Thread(target=output.read, args=[process.stdout], daemon=True)
            reader.start()
            result = self._wait(process, start + limit, limit < step.limit)
            reader.join(self._grace)  # not for ever: a process of another group may hold the pipe
            if result == "failed":
                detail = f"exit status {process.returncode}: {output.last}"
        seconds = round(time.monotonic() - start, 1)
        self._record(end=step.name, result=result, seconds=seconds, detail=detail)
        print(f"{step.name}: {result}, {seconds:.0f} s {detail}\n", end="", flush=True)

    def _wait(self, process: subprocess.Popen[bytes], end: float, cut: bool) -> str:
        """How it ended. Its process group is killed then."""
        try:
            while process.poll() is None:
                if self._stopped:
                    return "interrupted"
                if time.monotonic() > end:
                    return "cut" if cut else "timed out"
                time.sleep(0.05)
            return "failed" if process.returncode else "passed"
        finally:
            if process.returncode is None:
                _signal(process, signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(self._grace)
            _signal(process, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the driver
                process.wait(self._grace)


def groups(steps: Sequence[Step]) -> Iterator[list[Step]]:
    """Steps that start together."""
    group: list[Step] = []
    for step in steps:
        if group and not step.beside:
            yield group
            group = []
        group.append(step)
    if group:
        yield group


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


class _Output:
    """Copies a step's output line by line: its beginning at once, of a long one then only the end."""

    def __init__(self, runner: Runner, step: Step) -> None:
        self._runner, self._step = runner, step
        self.last = ""

    def read(self, stream: IO[bytes]) -> None:
        with stream:
            self._read(stream)

    def _read(self, stream: IO[bytes]) -> None:
        written, kept, dropped = 0, 0, 0
        tail: collections.deque[str] = collections.deque()
        for raw in iter(lambda: stream.readline(1 << 16), b""):
            text = raw.decode("utf-8", "replace").rstrip()
            self.last = text[-200:] or self.last
            if found := OUTCOME.match(text):
                outcome, test = (
                    found[a] or found[b] for a, b in (("spread", "said"), ("test", "alone"))
                )
                self._runner._write(TESTS, f"{outcome}\t{self._step.name}\t{test}\n")
            line = f"[{self._step.name}] {text}\n"
            if written < HEAD:
                written += len(line)
                self._runner._write(self._step.into, line)
                continue
            tail.append(line)
            kept += len(line)
            while kept > TAIL:
                kept -= len(tail.popleft())
                dropped += 1
        if dropped:
            tail.appendleft(f"[{self._step.name}] ({dropped} lines are left out here)\n")
        self._runner._write(self._step.into, "".join(tail))
