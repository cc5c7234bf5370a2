"""Which parts of a stage's work a process does, where several work on one result.

A part is a file that holds the same bytes whichever process makes it, and is complete or absent. So
processes need not know of each other: a call makes those of its parts that are not there. What was
killed is started again, also with another number of processes.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from pymcip.distributed import rank, waiting_group, world
from pymcip.errors import ConfigError

Shard: TypeAlias = tuple[int, int]  # i and n: the i-th of n shares of the work, i from 0 to n - 1

WHOLE: Shard = (0, 1)


def own_shard(option: str | None = None) -> Shard:
    """The share of this process: of shard i of n (the option's "i/n") each of W joined ones does a part."""
    number, count = (0, 1) if option is None else map(int, option.split("/"))
    if waiting_group() is None:
        return number, count
    return number * world() + rank(), count * world()


def refuse_overwrite(config: Any, shard: Shard) -> None:
    """Refuse `overwrite` where others may be writing to the folder.

    Raises:
        ConfigError: it is set, and the shard is not the whole.
    """
    if config.overwrite and shard[1] > 1:
        raise ConfigError(
            f"overwrite=True with {shard[1]} processes: one would remove what the others write. "
            "Remove the folder first, or give another one"
        )
