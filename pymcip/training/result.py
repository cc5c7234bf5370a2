"""What `pymcip.train` returns, and reading it back when a finished run is resumed."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from pymcip.configs import TrainConfig
from pymcip.errors import ConfigError, StaleEmbeddingsError
from pymcip.evaluation import comparison_table
from pymcip.files import damaged, read_json, write_json
from pymcip.folders import holds_files

# Options that may differ when a run is resumed: they don't change what is computed.
RESUMABLE = (
    "out", "resume", "overwrite", "workers", "save_steps", "log_steps", "report_to", "cache",
    "device", "sharding", "first_stage",
)  # fmt: skip
PATHS = ("out", "checkpoint", "best_checkpoint", "state_dict", "hub")  # of a result; below `out`
RESULT = "result.json"
INPUTS = "inputs.json"
_AGAIN = "Give another folder, or overwrite=True to train anew"
REQUIRED = {  # of result.json
    "method": str, "metrics": dict, "before": dict, "checkpoint": str, "steps": int,
    "skipped_steps": int, "seconds": float,
}  # fmt: skip

_log = logging.getLogger("pymcip.training")


@dataclass(frozen=True)
class TrainResult:
    """What `train` returns, and writes as `result.json`.

    `metrics`: last evaluation on `val_data`, or on the classes that were held out (`holdout`), in
    percent, of the exported model if there is one; `before`: the same before training (both {} without
    either). Of appended dimensions the head is fitted again after it, to the held-out classes too. `interrupted`: "SIGINT" or
    "SIGTERM" if the run stopped early with a checkpoint, else None; `hub` and `state_dict` are None
    then. `best_checkpoint`: of the epoch with the best metrics on `val_data`.

    `alignment`, of a run with `alignment_budget` (None without, or if interrupted; also written as
    `alignment.json`):

    - `budget`; `respected`: whether there is a model that keeps it. If not, nothing is exported:
      `hub` and `state_dict` are None, and `checkpoint` holds the tuned model.
    - `coefficient`: how far the exported model is on the line from the original weights (0) to the
      tuned ones (1).
    - `kept`: what it keeps of the original's alignment, the smaller of `image_to_text` and
      `text_to_image` (all None if nothing is exported): 0 to 1, or more where the probe's right
      answers are known and it gives more of them. `standard_error`: of `kept`, for other images (or
      texts) like the probe's: a small probe can't resolve a small loss. `kept_tuned`: of the tuned model,
      `kept_by_epoch`: while it was trained.
    - `probe`: how many `images` and `captions` were asked for, and their `source`.
    - `tried`: [coefficient, kept] in the order of the search; `seconds`: spent on all probing.
    """

    out: Path
    method: str
    metrics: dict[str, float]
    before: dict[str, float]
    checkpoint: Path
    best_checkpoint: Path | None
    state_dict: Path | None
    hub: Path | None
    steps: int
    skipped_steps: int
    seconds: float
    interrupted: str | None
    alignment: dict[str, Any] | None = None

    @property
    def markdown(self) -> str:
        """The figures before and after as a table; "" where they were not measured."""
        if not (self.before and self.metrics):
            return ""
        return comparison_table(["before", "after"], [self.before, self.metrics])

    def _repr_markdown_(self) -> str:  # what a notebook shows
        return self.markdown or f"`{self!r}`"

    def write(self) -> None:
        """Write `result.json`, with paths relative to the run folder, so that it can be moved."""
        plain = {
            name: str(value.relative_to(self.out)) if isinstance(value, Path) else value
            for name, value in asdict(self).items()
        }
        write_json(self.out / RESULT, plain)


def read_begun(
    out: Path, kind: str = "pymcip run", needed: Mapping[str, type] | None = None
) -> dict[str, Any] | None:
    """What config.json in `out` says of the run, or sweep, that is resumed; None if there is none yet.

    `needed`: fields that it must have, see `read_json`.

    Raises:
        ConfigError: the folder holds something else.
        DamagedFileError: it can't be read.
    """
    if (out / "config.json").is_file():
        begun: dict[str, Any] = read_json(out / "config.json", needed or {}, _AGAIN)
        return begun
    if holds_files(out) and [path.name for path in out.iterdir()] != [INPUTS]:
        raise ConfigError(
            f"resume='latest': {out} holds files but no config.json, so it is no {kind}; give the folder "
            f"of a {kind}, or one that is new or empty"
        )
    return None


def as_begun(config: TrainConfig, begun: Mapping[str, Any] | None) -> TrainConfig:
    """The config with what the run that was begun took where it says "auto"."""
    if begun is None:
        return config
    chosen = {
        name: begun[name]
        for name, value in vars(config).items()
        if value == "auto" and name in begun
    }
    return replace(config, **chosen)


def finished_result(
    config: TrainConfig, begun: Mapping[str, Any], made_from: dict[str, str]
) -> TrainResult | None:
    """The result of the run in `config.out`, or None if something of it is left to do.

    `begun`: its options. `made_from`: fingerprints of what this run reads, see `Inputs.fingerprints`.

    Raises:
        ConfigError: it has other options.
        StaleEmbeddingsError: it holds a run of other data or weights.
        DamagedFileError: a file of the run can't be read.
    """
    out = Path(config.out)
    changed = changed_options(config, begun)
    if changed:
        raise ConfigError(
            f"resume='latest': the run in {out} was started with other options: {'; '.join(changed)}. "
            "Give the same ones, or another folder"
        )
    names = changed_inputs(out, made_from)
    if names:
        raise StaleEmbeddingsError(
            f"resume='latest': the run in {out} was started with other {', other '.join(names)}. Give "
            "what it was started with, or another folder, or overwrite=True to train anew"
        )
    if not (out / RESULT).is_file():
        return None
    _log.info("the run in %s is finished; nothing to resume", out)
    return read_result(out)


def changed_options(
    config: TrainConfig, begun: Mapping[str, Any], ignored: Collection[str] = RESUMABLE
) -> list[str]:
    """Compare `config` with the options of a run: the names that differ, with both values."""
    younger = {item.name: item.default for item in fields(config)}  # than the run: not in its file
    before = {**younger, **begun}
    return [
        f"{name}: was {before.get(name)!r}, now {value!r}"
        for name, value in config.to_dict().items()
        if name not in ignored and before.get(name) != value
    ]


def changed_inputs(out: Path, made_from: Mapping[str, str]) -> list[str]:
    """Name the inputs of the run in `out` whose content is not that of `made_from`."""
    known = read_json(out / INPUTS, {}, _AGAIN)
    return [name for name in {**known, **made_from} if known.get(name) != made_from.get(name)]


def read_result(out: Path) -> TrainResult:
    """Read the result of the finished run in `out`; raises DamagedFileError."""
    values: dict[str, Any] = read_json(out / RESULT, REQUIRED, _AGAIN)
    unknown = values.keys() ^ {item.name for item in fields(TrainResult)}
    if unknown - {"alignment"}:
        raise damaged(out / RESULT, f"it lacks or has {sorted(unknown)}", _AGAIN)
    for name in PATHS:
        if values[name] is not None and not isinstance(values[name], str):
            raise damaged(out / RESULT, f"{name!r} is {values[name]!r}", _AGAIN)
    values |= {name: out / values[name] for name in PATHS if values[name] is not None}
    return TrainResult(**values)
