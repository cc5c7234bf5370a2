"""Batches made by worker processes; an error in one of them is raised with its own message."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torch.utils.data import default_collate as torch_collate

from pymcip.configs import Workers
from pymcip.distributed import local_world
from pymcip.environment import usable_cores
from pymcip.errors import PymcipError, ResourceError

MOST, FEWEST = 16, 4  # processes
BATCHES = 4  # that a process makes, at least: it takes a moment to start
_ON = "then run the same command again (train: with resume='latest')"


@dataclass(frozen=True)
class _Failure:
    """In place of an item or a batch: the error that is to be raised by the process that asked."""

    error: PymcipError


class _Items(Dataset[Any]):
    """The items of another data set, or why there is none."""

    def __init__(self, items: Dataset[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)  # type: ignore[arg-type]

    def __getitem__(self, place: Any) -> Any:
        try:
            return self.items[place]
        except PymcipError as error:
            if get_worker_info() is None:
                raise
            return _Failure(error)  # torch would put the worker's traceback into the message


class _Collate:
    """Make a batch and, in a worker, put it into shared memory at once.

    torch itself does so in a thread whose errors are lost, and the batch is waited for in vain.
    """

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate

    def __call__(self, items: list[Any]) -> Any:
        for item in items:
            if isinstance(item, _Failure):
                return item
        batch = self.collate(items)
        if get_worker_info() is not None:
            for part in batch:
                if isinstance(part, Tensor):
                    part.share_memory_()
        return batch


def decoding_processes(workers: Workers) -> int:
    """How many processes `workers` asks for.

    "auto": the cores that this process may use, shared with the other processes of torchrun on this
    machine, at most 16. Without a GPU fewer than 4 are none: the model takes the same cores.
    """
    if workers != "auto":
        return workers
    cores = usable_cores() // local_world()
    return 0 if cores < FEWEST and not torch.cuda.is_available() else min(MOST, cores)


def load_batches(
    items: Dataset[Any],
    *,
    workers: Workers,
    collate: Callable[[Any], Any] = torch_collate,
    **options: Any,
) -> Iterator[Any]:
    """Yield the batches of a torch `DataLoader`.

    Args:
        items: the data set; may raise PymcipError.
        workers: processes; 0 makes the batches in this one; "auto": `decoding_processes`, but no
            more than there is work for.
        collate: makes a batch, a sequence that may hold tensors, of a list of items.
        options: other arguments of `DataLoader`.

    Raises:
        PymcipError: what `items` raises, with its own message.
        ResourceError: a worker was ended by the system; shared memory or open files don't suffice.
    """
    processes = decoding_processes(workers)
    if workers == "auto":
        given = options.get("batch_sampler")
        batches = len(items) // options["batch_size"] if given is None else len(given)  # type: ignore[arg-type]
        processes = min(processes, batches // BATCHES)
    loader = DataLoader(
        _Items(items),
        num_workers=processes,
        collate_fn=_Collate(collate),
        generator=torch.Generator(),  # its own: reading data must not move the global one
        **options,
    )
    try:
        for batch in loader:
            if isinstance(batch, _Failure):
                raise batch.error
            yield batch
    except (RuntimeError, OSError) as error:
        limit = _limit(str(error), processes)
        if limit is None or isinstance(error, PymcipError):
            raise
        raise limit from error


def _limit(text: str, workers: int) -> ResourceError | None:
    """The error to raise for what torch says of a worker at the machine's limits."""
    if "shared memory" in text or "/torch_" in text or "Bus error" in text:
        return ResourceError(
            errno.ENOSPC,
            f"Shared memory (/dev/shm) is too small for batches of {workers} workers; use fewer (0 "
            "needs none), smaller batches, or give a container more (docker run --shm-size=8g), "
            + _ON,
        )
    if "Too many open files" in text or "ancdata" in text:
        return ResourceError(
            errno.EMFILE,
            f"Too many open files for {workers} workers; allow more (ulimit -n 4096), or use fewer, "
            + _ON,
        )
    ended = re.search(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (.+)", text)
    if ended is None:
        return None
    return ResourceError(
        f"A decoding process ({ended[1]}) {ended[2].rstrip('. ')}. A system that runs out of memory "
        f"ends processes: use fewer workers (now {workers}) or smaller batches, " + _ON,
    )
