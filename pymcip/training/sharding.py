"""`sharding="full"`: every process trains its own part of a tower's weights, gradients and moments.

torch's FSDP2 (`fully_shard`) divides a copy of the tower by rows, block by block; it gathers a block's
weights while that runs, and gives each process the sum of its rows' gradients after every micro-batch.
All else runs the plain model, which stays as it is between the stages: while a stage trains the copy, the
plain model waits in host memory, and gets the trained weights whenever a checkpoint is written.

With `sharding="none"`, or in one process, the copy is the model itself, and nothing here changes anything.
torch's modules are imported where they are needed, as that takes a second.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pymcip.configs import TrainSettings
from pymcip.distributed import is_first, rows_of, world
from pymcip.errors import ConfigError
from pymcip.model import ClipModel
from pymcip.model.towers import copied_tower, image_parameters, text_parameters

OLDEST_TORCH = "2.9"


def check_sharding(config: TrainSettings, clip: ClipModel) -> None:
    """Refuse what can't be trained with `sharding="full"`.

    Args:
        config: the options of the run.
        clip: the model before training.

    Raises:
        ConfigError: as said.
    """
    if config.sharding == "none" or world() == 1:
        return
    from torch.distributed.fsdp import FSDPModule

    refused = ""
    odd = _indivisible(config, clip.model)
    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        refused = (
            f" with torch {torch.__version__}, whose FSDP can't sum gradients on every device; allowed: "
            f"torch {OLDEST_TORCH} or newer, or"
        )
    elif config.realigns and config.rea_logit_scale:
        refused = " with rea_logit_scale=True: a single number is not divided; allowed: rea_logit_scale=False, or"
    elif odd:
        refused = (
            f": {clip.name} has weights that are single numbers, or in two places of it, and can't be divided "
            f"({', '.join(odd[:3])}); allowed:"
        )
    if refused:
        raise ConfigError(
            f"sharding='full'{refused} sharding='none', which keeps whole towers in every process"
        )


def _indivisible(config: TrainSettings, model: nn.Module) -> list[str]:
    """Names of parameters to train that are numbers, or that several modules have."""
    places = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    towers = [image_parameters(model)] if config.trains_images else []
    if config.realigns:
        towers.append(text_parameters(model))
    return [name for name, p in chain(*towers) if not p.ndim or places[id(p)] > 1]


def divided(clip: ClipModel, config: TrainSettings, part: Literal["image", "text"]) -> ClipModel:
    """Return the model to train: a copy of `clip` whose tower is divided among the processes, or `clip`.

    The copy shares the other tower with `clip`, which is moved to host memory.

    Args:
        clip: the plain model, the same in all processes; what of it is trained has been decided.
        config: the options of the run.
        part: the tower that the stage trains.
    """
    if config.sharding == "none" or world() == 1:
        return clip
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    from torch.distributed.tensor import init_device_mesh

    clip.model.to("cpu")
    trained = copied_tower(clip, part)
    model = trained.model
    named = image_parameters if part == "image" else text_parameters
    own = {parameter for _, parameter in named(model)}
    for parameter in own:
        parameter.data = parameter.data.contiguous()  # convolutions may have channels last
    others = set(model.parameters()) - own
    mesh = init_device_mesh(clip.device.type, (world(),))
    module: Any
    for module in [*blocks(model, own), model]:
        # Also freed after a pass without gradients, so that no old weights stay.
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=others)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, f"encode_{part}")
    return trained


def blocks(model: nn.Module, trained: set[nn.Parameter]) -> list[nn.Module]:
    """Return the repeated parts of a model that hold `trained` parameters alone, inner ones first.

    These are the blocks of transformers and the stages and blocks of convolutional towers: modules of
    one class, in a list or a sequence, that have modules in turn.
    """
    found = [
        layer
        for layers in model.modules()
        if isinstance(layers, (nn.ModuleList, nn.Sequential))
        and len({type(layer) for layer in layers}) == 1
        for layer in layers
        if any(layer.children()) and trained.issuperset(layer.parameters())
    ]
    return list(dict.fromkeys(reversed(found)))


def is_part(value: Any) -> bool:
    """Whether this is a tensor of which every process holds its own rows (torch's DTensor)."""
    return hasattr(value, "full_tensor")


def whole(value: Any) -> Tensor:
    """Return the whole of such a tensor, in all processes; another one as it is."""
    gathered: Tensor = value.full_tensor() if is_part(value) else value
    return gathered


@torch.no_grad()
def bring_back(trained: ClipModel, clip: ClipModel) -> None:
    """Put the trained weights into the plain model that `divided` has made `trained` of.

    One tensor at a time is whole on the device.
    """
    if trained.model is not clip.model:
        plain = clip.model.state_dict()
        for name, value in trained.model.state_dict().items():
            plain[name].copy_(whole(value))


@contextmanager
def on_device(clip: ClipModel) -> Iterator[None]:
    """Hold the plain model on its device in the block, and then where it was."""
    before = next(clip.model.parameters()).device
    clip.model.to(clip.device)
    try:
        yield
    finally:
        clip.model.to(before)


def clip_gradients(parameters: list[nn.Parameter], limit: float) -> Tensor:
    """Clip the norm of all these gradients together to `limit`; return what it was, a scalar."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = whole(nn.utils.get_total_norm(gradients, foreach=True))
    nn.utils.clip_grads_with_norm_(parameters, limit, norm, foreach=True)
    return norm


def whole_moments(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return an optimizer's state with whole moments on the CPU of process 0, elsewhere with none.

    What is not divided stays as it is.
    """

    def moment(value: Any) -> Any:
        if not is_part(value):
            return value
        gathered = whole(value)
        return gathered.cpu() if is_first() else gathered.new_empty(0)

    state = optimizer.state_dict()
    moments = {
        number: {name: moment(value) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": moments}


def own_moments(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Return a saved state of an optimizer with its moments as the parameters are: divided, or whole.

    Args:
        optimizer: the one to put it into.
        state: as `whole_moments` gives it, from a run with any `sharding` and number of processes.
    """
    parameters = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))

    def moment(value: Tensor, parameter: Any) -> Tensor:
        if not value.ndim or (value.stride() == parameter.stride() and not is_part(parameter)):
            return value  # a count of steps, or as it was saved
        if not is_part(parameter):
            return torch.empty_like(parameter, device=value.device).copy_(value)
        from torch.distributed.tensor import DTensor

        own = value[rows_of(len(value))].clone(memory_format=torch.contiguous_format)
        return DTensor.from_local(
            own.to(parameter.device), parameter.device_mesh, parameter.placements,
            run_check=False, shape=parameter.shape, stride=parameter.stride(),
        )  # fmt: skip

    moments = {
        number: {name: moment(value, parameters[number]) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": moments}
