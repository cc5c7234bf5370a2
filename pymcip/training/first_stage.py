"""A two-stage method that takes its first stage from a finished run instead of training it again."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch

from pymcip.configs import TrainSettings
from pymcip.configs.train import FIRST_STAGE
from pymcip.errors import ConfigError
from pymcip.files import atomic_path, damaged, read_json
from pymcip.training.checkpoints import Position, checkpoint_files, save_checkpoint
from pymcip.training.result import RESULT, RESUMABLE, changed_inputs, changed_options, read_result

_log = logging.getLogger("pymcip.training")


def check_first_stage(config: TrainSettings, made_from: Mapping[str, str]) -> None:
    """Check that the run in `config.first_stage` trained what the first stage of this run would be.

    Args:
        config: the options of a run.
        made_from: fingerprints of what it reads, see `Inputs.fingerprints`.

    Raises:
        ConfigError: there is no finished run; or it is of another method, options, data or weights.
        DamagedFileError: a file of it can't be read.
    """
    begun = config.resume and checkpoint_files(Path(config.out) / "checkpoints")
    if config.first_stage is None or begun:
        return
    first = Path(config.first_stage)
    if not (first / RESULT).is_file():
        raise ConfigError(
            f"first_stage: {first} holds no {RESULT}, so it is no finished run; give the folder of one, "
            "or leave first_stage out"
        )
    wanted = replace(config, method=FIRST_STAGE[config.method], first_stage=None)
    ignored = {*RESUMABLE, *wanted.unused}
    differences = changed_options(wanted, read_json(first / "config.json", {}), ignored)
    inputs = [name for name in changed_inputs(first, made_from) if name.split()[-1] not in ignored]
    if "val_class_names" in inputs and config.val_class_names is None:
        inputs[inputs.index("val_class_names")] = "rea_class_names, which name held-out classes"
    differences += [f"other {name}" for name in inputs]
    if differences:
        raise ConfigError(
            f"first_stage: the run in {first} is not the first stage of this one: "
            f"{'; '.join(differences)}. Give what it was trained with, or leave first_stage out"
        )


def take_first_stage(config: TrainSettings, out: Path) -> None:
    """Make a checkpoint in `out`, between the stages, of the weights of the run in `config.first_stage`.

    Its log of metrics and its evaluation of the untrained model are copied too. A run that has a
    checkpoint already has taken them.

    Raises:
        DamagedFileError: a file of the first stage can't be read.
        ResourceError: the disk is full.
    """
    if config.first_stage is None or checkpoint_files(out / "checkpoints"):
        return
    result = read_result(Path(config.first_stage))
    assert result.state_dict is not None  # only a budget leaves it out
    for name in ("before.json", "metrics.jsonl"):
        if (result.out / name).is_file():
            with atomic_path(out / name) as temporary:
                shutil.copyfile(result.out / name, temporary)
    try:
        weights = torch.load(result.state_dict, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged file raises is not bounded by a list
        raise damaged(result.state_dict, error) from error
    position = Position(stage=1, global_step=result.steps, skipped_steps=result.skipped_steps)
    state = {**asdict(position), "model": weights, "heads": {}, "optimizer": {}}
    save_checkpoint(out / "checkpoints", state)
    _log.info("the first stage is that of %s", result.out)
