"""How fast a stage trains: warns of one that takes over an hour, or that waits for its data."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any

from pymcip.configs import Workers
from pymcip.environment import usable_cores
from pymcip.workers import decoding_processes

STEPS = 20  # that are measured, but for those that start worker processes
LONG = 3600.0  # seconds
WAITING = 0.3  # of the time

_log = logging.getLogger("pymcip.training")


class Pace:
    """Measures the first steps of a stage in this process, and warns once they are done.

    Args:
        workers: decoding processes of the run.
        clock: seconds, as `time.perf_counter` gives them.
    """

    def __init__(self, workers: Workers, clock: Callable[[], float] = time.perf_counter) -> None:
        self.workers, self.clock = decoding_processes(workers), clock
        self.steps = 0
        self.seconds = self.waited = 0.0

    def watched(self, batches: Iterable[Any], *, stage: str, left: int) -> Iterator[Any]:
        """Yield `batches`, one a step.

        Args:
            batches: of some steps; the first one is not measured.
            stage: its name.
            left: steps of the stage that are not done yet, these among them.
        """
        ended = self.clock()
        for number, batch in enumerate(batches):
            came = self.clock()
            yield batch
            if number > 0:  # at the first one worker processes start
                self.steps += 1
                self.waited += came - ended
                self.seconds += self.clock() - ended
                if self.steps == STEPS:
                    self._warn(stage, left - number - 1)
            ended = self.clock()

    def _warn(self, stage: str, left: int) -> None:
        a_step = self.seconds / self.steps
        if a_step * left > LONG:
            _log.warning(
                "the %s stage will take about %s more (%.2f s a step, %d steps left). It can be ended "
                "at any time and continued with resume='latest'. Fewer epochs, smaller crops "
                "(train_size), unlock_layers= or a GPU take less time",
                stage, timedelta(seconds=round(a_step * left)), a_step, left,
            )  # fmt: skip
        if self.waited > WAITING * self.seconds:
            cores = usable_cores()
            advice = f"raise workers (now {self.workers}; this machine has {cores} processor cores)"
            if self.workers >= cores - 1:
                advice = (
                    f"workers={self.workers} is what {cores} processor cores allow; smaller image files, "
                    "or files on a faster disk, are read sooner"
                )
            _log.warning(
                "the %s stage waits for its data %.0f %% of the time: %s",
                stage, 100 * self.waited / self.seconds, advice,
            )  # fmt: skip
