"""Several processes on one task, as torchrun starts them: who is who, and what they exchange.

torchrun (or srun) sets RANK, LOCAL_RANK and WORLD_SIZE. Without them there is one process, for which
every function here does nothing, and no process group is made. torch is imported where it is needed.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from pymcip.errors import ConfigError, PymcipError, ResourceError, reason_of

STEP_TIMEOUT = timedelta(minutes=30)  # of an exchange within a training step
WAIT_TIMEOUT = timedelta(days=7)  # of waiting for process 0, which embeds or measures
_LOST = re.compile(r"gloo|nccl|timed? ?out|connection (closed|reset|refused)|broken pipe", re.I)

_waiting: Any = None  # the group of CPU exchanges that may take long; None: not joined


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    if text and not text.isdecimal():
        raise ConfigError(
            f"the environment has {name}={text!r}; torchrun sets it to a number. Unset it to run one "
            "process"
        )
    return int(text or default)


def world() -> int:
    """Return the number of processes, W; 1 without torchrun.

    Raises:
        ConfigError: the environment variables of torchrun hold something else than numbers.
    """
    return max(1, _number("WORLD_SIZE", 1))


def rank() -> int:
    """Return the number of this process, 0 to W - 1.

    Raises:
        ConfigError: RANK is no such number.
    """
    own = _number("RANK", 0) if world() > 1 else 0
    if own >= world():
        raise ConfigError(
            f"the environment has RANK={own} and WORLD_SIZE={world()}; torchrun sets RANK to 0 to "
            f"{world() - 1}"
        )
    return own


def local_world() -> int:
    """Return how many processes torchrun started on this machine; 1 without it.

    Raises:
        ConfigError: LOCAL_WORLD_SIZE is no number.
    """
    return max(1, _number("LOCAL_WORLD_SIZE", 1))


def is_first() -> bool:
    """Whether this process is number 0, the only one that writes files that all share."""
    return rank() == 0


def own_device(device: str | None) -> str | None:
    """Return the name of this process's own device: for "cuda" or None the GPU of its LOCAL_RANK.

    A process that sees one GPU alone (CUDA_VISIBLE_DEVICES, srun --gpus-per-task=1) takes it.

    Args:
        device: as the option `device` has it; None: a GPU if there is one.

    Raises:
        ConfigError: one GPU is named for all, or this machine has fewer GPUs than processes.
    """
    if world() == 1 or device == "cpu":
        return device
    import torch

    if device is None and not torch.cuda.is_available():
        return "cpu"
    if device not in (None, "cuda"):
        raise ConfigError(
            f"device={device!r} with {world()} processes: each has a device of its own; allowed: cpu, "
            "cuda, or leave it out"
        )
    count, number = torch.cuda.device_count(), _number("LOCAL_RANK", rank())
    if count > 1 and number >= count:
        raise ConfigError(
            f"process {number} of this machine has no GPU of its own, as torch sees {count}; start "
            f"torchrun with --nproc-per-node {count} at most"
        )
    return f"cuda:{number if count > 1 else 0}"


@contextlib.contextmanager
def joined(device: str | None = None) -> Iterator[None]:
    """Let this process exchange with the others in the block; the first call joins them until it ends.

    Args:
        device: of this process, see `own_device`; on a GPU tensors go by NCCL, on the CPU by gloo.

    Raises:
        ConfigError: the environment lacks the address of process 0, or the caller has joined them.
        ResourceError: another process ended, or did not answer in time.
    """
    if world() > 1 and _waiting is None:
        _join(device)
    with _explained():
        yield


def _join(device: str | None) -> None:
    global _waiting
    import torch
    from torch import distributed

    rank()  # is checked before anything is joined
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(
            f"the environment has WORLD_SIZE={world()} without {', '.join(missing)}; start the processes "
            "by torchrun, or unset WORLD_SIZE to run one"
        )
    if distributed.is_initialized():
        raise ConfigError(
            "torch.distributed has a process group already; pymcip makes its own: call "
            "torch.distributed.destroy_process_group() before"
        )
    name, backend = own_device(device), "gloo"
    if name is not None and name.startswith("cuda"):
        torch.cuda.set_device(name)
        backend = "cpu:gloo,cuda:nccl"
    with _explained():
        distributed.init_process_group(backend, timeout=STEP_TIMEOUT)
        atexit.register(distributed.destroy_process_group)  # a process can join only once
        _waiting = distributed.new_group(backend="gloo", timeout=WAIT_TIMEOUT)


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Raise a ResourceError for what torch raises where an exchange fails."""
    try:
        yield
    except RuntimeError as error:
        if world() == 1 or isinstance(error, PymcipError) or not _LOST.search(str(error)):
            raise
        raise ResourceError(
            f"process {rank()} of {world()} lost the others: one of them ended or hung (its own message "
            f"says why), or the network between them failed; an exchange may take "
            f"{STEP_TIMEOUT} at most. {reason_of(error)}. Run the same command again (train: with "
            "resume='latest')"
        ) from error


def waiting_group() -> Any:
    """Return torch's group for exchanges on the CPU that may take long; None for one process."""
    return _waiting


def barrier() -> None:
    """Wait until all processes are here."""
    if _waiting is not None:
        from torch import distributed

        distributed.barrier(group=_waiting)


def broadcast(value: Any) -> Any:
    """Return what process 0 gives, in every process; of the others the value is not used.

    `value`: anything that pickle takes; it goes from one process of a run to another, not by the disk.
    """
    if _waiting is None:
        return value
    from torch import distributed

    values = [value]
    distributed.broadcast_object_list(values, src=0, group=_waiting)
    return values[0]


def gathered(value: Any) -> list[Any]:
    """Return what every process gives, by their numbers, in each of them; see `broadcast`."""
    if _waiting is None:
        return [value]
    from torch import distributed

    values = [None] * world()
    distributed.all_gather_object(values, value, group=_waiting)
    return values


def highest(*values: float) -> list[float]:
    """Return the highest that a process gives, of each of the values; a part of a training step."""
    if _waiting is None:
        return list(values)
    import torch

    found = torch.tensor(values, dtype=torch.float64)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    numbers: list[float] = found.tolist()
    return numbers


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Let this process do in the block what only it does: nothing in it waits for the others."""
    global _waiting
    group, _waiting = _waiting, None
    try:
        yield
    finally:
        _waiting = group


def share(count: int, of: int | None = None) -> range:
    """Return which of `count` equal pieces of work process `of` (default: this one) does.

    W divides `count`.
    """
    each = count // world()
    number = rank() if of is None else of
    return range(number * each, (number + 1) * each)


def rows_of(count: int) -> slice:
    """Return which of `count` rows this process holds, by the rule of `torch.chunk`; maybe none."""
    each = -(-count // world())
    return slice(min(rank() * each, count), min((rank() + 1) * each, count))
