"""Configs are checked as a whole when they are made, before any work."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pymcip import configs
from pymcip.configs import (
    Config,
    EmbedConfig,
    EvaluateConfig,
    ExportConfig,
    MineConfig,
    TrainConfig,
    option,
    required,
)
from pymcip.errors import ConfigError, PymcipError

TRAIN: dict[str, Any] = {"model": "m", "train_data": "d", "out": "o", "captions": "c"} | {
    "method": "mcip"
}
EVALUATE: dict[str, Any] = {"model": "m", "data": "d"}
MINE: dict[str, Any] = {"images": "i", "out": "o"}
STAGES = [
    value
    for value in vars(configs).values()
    if isinstance(value, type) and issubclass(value, Config) and value is not Config
]


def problems(kind: type[Config], options: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        kind(**options)
    return raised.value.problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample(Config):
    number: int = option(1, "a number")
    share: float | Literal["auto"] = option(0.5, "a share")
    names: tuple[str, ...] = option((), "names")
    count: Literal["all"] | int | None = option(None, "a count")
    path: str | Path = required("a path")
    settings: dict[str, Any] = option({}, "settings")
    flag: bool = option(False, "a flag")


# All at once


def test_all_problems_are_reported_at_once() -> None:
    found = problems(TrainConfig, {**TRAIN, "epochs": 0, "lr": -1.0, "accum_freq": 0, "beta1": 1.5})
    assert len(found) == 4
    with pytest.raises(ConfigError) as raised:
        TrainConfig(**{**TRAIN, "epochs": 0, "lr": -1.0})
    message = str(raised.value)
    assert message.startswith("2 problems with the configuration:\n  - ")
    assert "epochs=0 is not allowed; it must be >= 1" in message
    assert "lr=-1.0 is not allowed; it must be > 0" in message


def test_all_wrong_types_are_reported_at_once() -> None:
    found = problems(TrainConfig, {**TRAIN, "epochs": "3", "precision": "fp16", "lr": None})
    assert len(found) == 3
    assert "precision='fp16' is not allowed; allowed: one of 'fp32', 'amp_bf16'" in found
    assert "epochs='3' is not allowed; allowed: int or one of 'auto'" in found


def test_one_problem_is_told_plainly() -> None:
    with pytest.raises(ConfigError) as raised:
        TrainConfig(**{**TRAIN, "epochs": 0})
    assert str(raised.value) == "epochs=0 is not allowed; it must be >= 1"
    assert isinstance(raised.value, ValueError)
    assert isinstance(raised.value, PymcipError)


# Types


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"number": 1.0}, "int"),
        ({"number": True}, "int"),
        ({"number": None}, "int"),
        ({"share": "much"}, "float or one of 'auto'"),
        ({"share": True}, "float or one of 'auto'"),
        ({"names": "abc"}, "a list of str"),
        ({"names": (1,)}, "a list of str"),
        ({"count": "some"}, "one of 'all' or int or None"),
        ({"count": 1.5}, "one of 'all' or int or None"),
        ({"path": 3}, "str or Path"),
        ({"settings": [("a", 1)]}, "dict"),
        ({"flag": 1}, "bool"),
    ],
)
def test_wrong_types(options: dict[str, Any], allowed: str) -> None:
    name, value = next(iter(options.items()))
    value = tuple(value) if isinstance(value, list) else value
    assert problems(Sample, {"path": "p", **options}) == [
        f"{name}={value!r} is not allowed; allowed: {allowed}"
    ]


@pytest.mark.parametrize(
    "options",
    [
        {"share": 1},
        {"share": "auto"},
        {"names": ["a", "b"]},
        {"names": []},
        {"count": "all"},
        {"count": 3},
        {"count": None},
        {"path": Path("p")},
        {"settings": {"a": (1, 2)}},
    ],
)
def test_right_types(options: dict[str, Any]) -> None:
    made = Sample(**{"path": "p", **options})
    for name, value in options.items():
        wanted = tuple(value) if isinstance(value, list) else value
        assert getattr(made, name) == wanted


def test_configs_can_not_be_changed_and_share_no_dicts() -> None:
    one, other = Sample(path="p"), Sample(path="p")
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.number = 2  # type: ignore[misc]
    one.settings["a"] = 1
    assert other.settings == {}


# Ranges and combinations


@pytest.mark.parametrize(
    ("kind", "base", "options", "word"),
    [
        (TrainConfig, TRAIN, {"image_size": 0}, "image_size=0"),
        (TrainConfig, TRAIN, {"batch_size": 0}, "batch_size=0"),
        (TrainConfig, TRAIN, {"wd": -0.1}, "wd=-0.1"),
        (TrainConfig, TRAIN, {"warmup": -1}, "warmup=-1"),
        (TrainConfig, TRAIN, {"scale": 0.0}, "scale=0.0 is not allowed; it must be > 0"),
        (TrainConfig, TRAIN, {"lr": float("nan")}, "lr=nan"),
        (TrainConfig, TRAIN, {"grad_clip_norm": 0.0}, "grad_clip_norm=0.0"),
        (TrainConfig, TRAIN, {"negatives": 0}, "negatives=0"),
        (TrainConfig, TRAIN, {"threshold": 1.5}, "threshold=1.5 is not allowed; it must be <= 1"),
        (TrainConfig, TRAIN, {"loss_delta": 1.0}, "loss_delta=1.0 is not allowed; it must be < 1"),
        (TrainConfig, TRAIN, {"captions": None}, "needs captions="),
        (TrainConfig, TRAIN, {"captions": None, "method": "2sft"}, "or rea_data="),
        (TrainConfig, TRAIN, {"projector": "discard"}, "allowed: keep, lock"),
        (TrainConfig, TRAIN, {"overwrite": True, "resume": "latest"}, "exclude each other"),
        (TrainConfig, TRAIN, {"train_data": ()}, "train_data is empty"),
        (TrainConfig, TRAIN, {"train_weights": (1.0, 2.0)}, "2 values for 1 sources"),
        (
            TrainConfig,
            TRAIN,
            {"train_weights": (0.0,)},
            "train_weights=0.0 is not allowed; it must be > 0",
        ),
        (TrainConfig, TRAIN, {"lambda_class": 0.0, "lambda_caption": 0.0}, "both 0"),
        (EvaluateConfig, EVALUATE, {"knn_k": 0}, "knn_k=0"),
        (EvaluateConfig, EVALUATE, {"recall_at": ()}, "recall_at=()"),
        (
            EvaluateConfig,
            EVALUATE,
            {"recall_at": (1, 0)},
            "recall_at=0 is not allowed; it must be >= 1",
        ),
        (EvaluateConfig, EVALUATE, {"templates": ("a photo",)}, "must hold {}"),
        (EvaluateConfig, EVALUATE, {"templates": ()}, "must hold {}"),
        (EmbedConfig, {"model": "m", "out": "o"}, {}, "nothing to embed"),
        (MineConfig, MINE, {"k": 0}, "k=0"),
        (MineConfig, MINE, {"threshold": -2}, "threshold=-2 is not allowed; it must be >= -1"),
    ],
)
def test_values_out_of_range(
    kind: type[Config], base: dict[str, Any], options: dict[str, Any], word: str
) -> None:
    found = problems(kind, {**base, **options})
    assert len(found) == 1
    assert word in found[0]


@pytest.mark.parametrize(
    "options",
    [
        {"method": "gpr", "captions": None, "projector": "discard"},
        {"method": "rea", "captions": None, "rea_data": "pairs"},
        {"threshold": "auto", "negatives": "bank", "grad_clip_norm": None},
        {"negatives": 1000, "threshold": -1},
        {"train_data": ["a", "b"], "train_weights": [1, 2.5]},
        {"resume": "latest"},
        {"report_to": ["tensorboard"]},
        {"aug_cfg": {"scale": (0.5, 1.0)}},
    ],
)
def test_combinations_that_are_right(options: dict[str, Any]) -> None:
    TrainConfig(**{**TRAIN, **options})


# make


def test_make_names_unknown_and_missing_options_together() -> None:
    with pytest.raises(ConfigError) as raised:
        TrainConfig.make(None, {"model": "m", "train_dat": "d", "learning_rate": 1})
    found = raised.value.problems
    assert len(found) == 4
    assert found[0].startswith("unknown option 'train_dat'; allowed: accum_freq, ")
    assert found[0].endswith("; did you mean 'train_data'?")
    assert found[1].startswith("unknown option 'learning_rate'")
    assert found[2] == "train_data is required: " + next(
        item.metadata["help"]
        for item in dataclasses.fields(TrainConfig)
        if item.name == "train_data"
    )
    assert found[3].startswith("out is required")


def test_make_changes_a_ready_config() -> None:
    ready = MineConfig(**MINE)
    changed = MineConfig.make(ready, {"k": 3})
    assert (changed.k, ready.k) == (3, 10)
    assert MineConfig.make(ready, {}) == ready
    with pytest.raises(ConfigError, match="k=0"):
        MineConfig.make(ready, {"k": 0})
    with pytest.raises(ConfigError, match="unknown option 'kk'"):
        MineConfig.make(ready, {"kk": 0})


# Round trip


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "train_data": st.lists(st.text(min_size=1), min_size=1, max_size=3).map(tuple),
            "lr": st.floats(1e-8, 1.0),
            "epochs": st.integers(1, 100),
            "class_balanced": st.booleans(),
            "negatives": st.sampled_from(["mined", "bank"]) | st.integers(1, 9),
            "threshold": st.just("auto") | st.floats(-1, 1),
            "grad_clip_norm": st.none() | st.floats(0.1, 10),
            "report_to": st.lists(st.sampled_from(["tensorboard", "wandb"])).map(tuple),
        },
    )
)
@settings(max_examples=60, deadline=None)
def test_round_trip_through_json(options: dict[str, Any]) -> None:
    made = TrainConfig(**{**TRAIN, **options})
    again = TrainConfig.make(None, json.loads(json.dumps(made.to_dict())))
    assert again == made


def test_to_dict_has_plain_values_only() -> None:
    made = ExportConfig(model="m", out=Path("a") / "b", index=Path("e"))
    assert made.to_dict()["out"] == "a/b"
    assert made.to_dict()["index"] == "e"
    evaluated = EvaluateConfig(model="m", data=(Path("x"), "y"))
    assert evaluated.to_dict()["data"] == ["x", "y"]


# What docs and command line rely on


@pytest.mark.parametrize("kind", STAGES, ids=lambda kind: kind.__name__)
def test_every_option_says_what_it_is(kind: type[Config]) -> None:
    for item in dataclasses.fields(kind):
        assert item.metadata["help"], f"{kind.__name__}.{item.name}"


def test_configs_need_no_torch() -> None:
    code = "import sys, pymcip, pymcip.configs; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
