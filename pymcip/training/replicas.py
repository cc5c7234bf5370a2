"""What the processes of a training step exchange: rows of features, gradients, rows of the class matrix.

Every process has a whole copy of the model (or a part of it: `training.sharding`), and its own rows of
the class matrix and of the captions (`pymcip.ops.margin_softmax.Shard`). For one process every function
here gives back what it is given.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from pymcip.configs import TrainSettings
from pymcip.distributed import gathered, is_first, rank, waiting_group, world
from pymcip.errors import ConfigError
from pymcip.model import ClipModel
from pymcip.ops.margin_softmax import Shard
from pymcip.training.sharding import check_sharding, is_part


def check_processes(config: TrainSettings, clip: ClipModel, images: int) -> None:
    """Refuse a run of several processes that they can't share out.

    Args:
        config: the options of the run.
        clip: the model before training.
        images: how many there are to train on, at most.

    Raises:
        ConfigError: their number doesn't divide the micro-batches of a step; a step has too few images;
            batch norms take their statistics from a batch.
    """
    count = world()
    if config.accum_freq % count:
        raise ConfigError(
            f"accum_freq={config.accum_freq} micro-batches of a step can't be shared out to {count} "
            f"processes; allowed with them: accum_freq={count}, {2 * count}, … Or start as many processes "
            f"as divide {config.accum_freq}. A step has accum_freq times batch_size images, whatever the "
            "number of processes"
        )
    norms = any(isinstance(layer, _BatchNorm) for layer in clip.model.modules())
    if count > 1 and norms and config.trains_images and not config.freeze_bn_stats:
        raise ConfigError(
            f"freeze_bn_stats=False with {count} processes: {clip.name} has batch norms, and each process "
            "would take statistics of its own images; allowed: freeze_bn_stats=True, or one process"
        )
    check_sharding(config, clip)
    if config.trains_images:
        check_steps(images, config.accum_freq, batch_size=config.batch_size)
    if config.realigns and config.rea_data is None:
        check_steps(images, config.accum_freq, rea_batch_size=config.rea_batch_size)


def check_alike(made_from: dict[str, str]) -> None:
    """Refuse processes that read different things.

    `made_from`: fingerprints of what this one reads, by name.

    Raises:
        ConfigError: another one has a different fingerprint.
    """
    everywhere = [set(found.items()) for found in gathered(made_from)]
    if odd := set.union(*everywhere) - set.intersection(*everywhere):
        raise ConfigError(
            f"the {world()} processes read different {', '.join(sorted(dict(odd)))}; allowed: the same files, "
            "with the same content, on all machines"
        )


def check_steps(count: int, accum_freq: int, **size: int) -> None:
    """Refuse an epoch of `count` images that has no whole step for several processes.

    `size`: the name of the option for a micro-batch's images, and its value.

    Raises:
        ConfigError: as said.
    """
    ((name, images),) = size.items()
    if world() > 1 and count < accum_freq * images:
        raise ConfigError(
            f"{count} images with a text or label are fewer than accum_freq={accum_freq} times {name}={images}: "
            f"with {world()} processes every step must be whole; allowed: {name} of "
            f"{count // accum_freq} at most, or one process"
        )


def shard_of(rows: slice) -> Shard | None:
    """Return what the margin losses are to be told of these rows; None for one process."""
    return Shard(rows.start) if world() > 1 else None


def gather(x: Tensor) -> Tensor:
    """Return the rows [W * B, D] of all processes in order, of x [B, D]; B is the same in all of them.

    Backwards each process takes its own rows of the gradient: the margin losses give all of them the
    whole one. (A sum over the processes would be W times too large.)
    """
    if world() == 1:
        return x
    rows: Tensor = _Gather.apply(x)  # type: ignore[no-untyped-call]
    return rows


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.own = slice(rank() * len(x), (rank() + 1) * len(x))
        rows = x.new_empty(world() * len(x), *x.shape[1:])
        distributed.all_gather(list(rows.chunk(world())), x.contiguous())
        return rows

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return grad_outputs[0][ctx.own]


def total(values: Tensor) -> Tensor:
    """Return the sum of the processes' `values`, of one shape in all of them."""
    if world() > 1:
        values = values.clone()
        distributed.all_reduce(values)
    return values


def replicated(function: Callable[..., Any], model: nn.Module) -> Callable[..., Any]:
    """Return a function like `function` that sums the gradients of `model` over the processes.

    It takes one more argument, `last`: whether the backward pass of this call is the step's last one,
    in which they are summed; before it they add up in each process. The weights are those of process 0.

    `function` runs `model`, and gives tensors. Calls of the model past what is returned sum nothing.
    A model that is divided among the processes (`training.sharding`) sums them in each call.
    """
    if world() == 1 or any(map(is_part, model.parameters())):
        return lambda *arguments, last: function(*arguments)
    # Looking for unused parameters keeps the order of the sums from one run to its resumption.
    replica = DistributedDataParallel(
        _Function(function, model), gradient_as_bucket_view=True, find_unused_parameters=True
    )
    replica.broadcast_buffers = False  # no step changes them, see `check_processes`
    # The sum of a bucket; DDP's own hook would divide it by W.
    replica.register_comm_hook(
        None,
        lambda _, bucket: (
            distributed.all_reduce(bucket.buffer(), async_op=True)
            .get_future()
            .then(lambda future: future.value()[0])
        ),
    )

    def call(*arguments: Any, last: bool) -> Any:
        with nullcontext() if last else replica.no_sync():
            return replica(*arguments)

    return call


class _Function(nn.Module):
    def __init__(self, function: Callable[..., Any], model: nn.Module) -> None:
        super().__init__()
        self.function, self.model = function, model

    def forward(self, *arguments: Any) -> Any:
        return self.function(*arguments)


def to_first(rows: Tensor) -> Tensor:
    """Return all processes' `rows` [n, …], of any n each, on the CPU of process 0; elsewhere none."""
    if world() == 1:
        return rows
    counts = torch.zeros(world(), dtype=torch.int64)
    counts[rank()] = len(rows)
    distributed.all_reduce(counts, group=waiting_group())
    padded = rows.new_zeros(int(counts.max()), *rows.shape[1:], device="cpu")
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts] if is_first() else None
    distributed.gather(padded, parts, dst=0, group=waiting_group())
    if parts is None:
        return rows[:0]
    return torch.cat([part[:count] for part, count in zip(parts, counts.tolist(), strict=True)])


def change_rows(
    heads: dict[str, Tensor], optimizer: dict[str, Any], change: Callable[[Tensor], Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Change the class matrix and its moments by `to_first`, or by a cut, in a stage's states.

    Args:
        heads: of the parts that are trained beside the model; all of them are matrices.
        optimizer: its last group holds the heads, if there are any.
        change: what to make of [rows, D].
    """
    if not heads or world() == 1:
        return heads, optimizer
    moments = {
        number: {name: change(value) if value.ndim else value for name, value in state.items()}
        if number in optimizer["param_groups"][-1]["params"] else state
        for number, state in optimizer["state"].items()
    }  # fmt: skip
    return {name: change(value) for name, value in heads.items()}, {**optimizer, "state": moments}
