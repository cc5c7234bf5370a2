"""Studies: the Pareto front, which runs a sweep makes, and its options."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pymcip.cli import COMMANDS, build_parser, make_config
from pymcip.configs import SweepConfig, TrainConfig
from pymcip.demo.points import label, make_point, study_points
from pymcip.errors import ConfigError
from pymcip.studies import pareto_front, sweep

BASE = TrainConfig(
    model="m",
    train_data="d",
    captions="c",
    out="",
    method="mcip",
    threshold=0.27,
    lambda_class=0.4,
    lambda_caption=0.6,
)


# The front


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(*[st.sampled_from([0.0, 1.0, 2.0, 3.0, 4.5, float("nan")])] * 2)))
def test_the_front_against_all_pairs(points: list[tuple[float, float]]) -> None:
    def dominated(i: int) -> bool:
        x, y = points[i]
        return any(a >= x and b >= y and (a > x or b > y) for a, b in points)

    expected = [i for i, pair in enumerate(points) if not np.isnan(pair).any() and not dominated(i)]
    assert pareto_front(points) == expected


def test_the_front_by_hand() -> None:
    assert pareto_front([(1, 5), (2, 4), (2, 3), (3, 4), (0, 5), (3, 4), (4, 1)]) == [0, 3, 5, 6]
    assert pareto_front([]) == []
    with pytest.raises(ValueError, match=r"allowed: \[N, 2\]"):
        pareto_front(np.zeros((2, 3)))


# Points


def points_of(base: TrainConfig = BASE, **options: Any) -> dict[str, str]:
    """Label and run of every point."""
    grid = options.pop("grid", "axes")
    config = SweepConfig(set=options, grid=grid)
    return {label(p.settings, len(config.axes)): p.run for p in study_points(config, base)}


def test_axes_are_tried_one_at_a_time() -> None:
    found = points_of(threshold=(0.2, 0.27, "auto", 0.2), margin=(0.3, 0.5))
    assert found == {
        "threshold 0.2": "mcip_threshold=0.2",
        "threshold 0.27, margin 0.3": "mcip",  # the base's own values: one run, one row
        "threshold auto": "mcip_threshold=auto",
        "margin 0.5": "mcip_margin=0.5",
    }
    assert list(points_of(k=(1, 10))) == ["1", "10"]


def test_a_product_leaves_out_what_a_method_does_not_use() -> None:
    found = points_of(method=("gpr", "mcip"), threshold=(0.2, 0.3), grid="product")
    assert found == {
        "gpr": "gpr",
        "mcip, threshold 0.2": "mcip_threshold=0.2",
        "mcip, threshold 0.3": "mcip_threshold=0.3",
    }


def test_the_weights_of_the_losses_sum_to_one() -> None:
    config = SweepConfig(set={"lambda_caption": (0.3, 0.6)})
    points = study_points(config, BASE)
    assert [(p.config.lambda_class, p.config.lambda_caption) for p in points] == [
        (0.7, 0.3),
        (0.4, 0.6),
    ]
    assert [p.run for p in points] == ["mcip_lambda_caption=0.3", "mcip"]
    alone = dataclasses.replace(BASE, lambda_class=1.0)
    assert make_point(alone, {"lambda_caption": 0.6}).run == "mcip_lambda_caption=0.6"


def test_options_that_go_together() -> None:
    found = points_of(positives=("compete",), repel=(0, 0.1), grid="product")
    assert found == {
        "positives compete, repel 0": "mcip_positives=compete",
        "positives compete, repel 0.1": "mcip_positives=compete_repel=0.1",
    }
    with pytest.raises(ConfigError, match="give positives='compete' too"):
        points_of(repel=(0.1,))


def test_two_stages_share_the_first_one() -> None:
    point = make_point(BASE, {"method": "mcip+rea", "threshold": 0.2})
    assert point.run == "mcip+rea_threshold=0.2"
    first = point.first
    assert first is not None
    assert first.run == "mcip_threshold=0.2"
    assert first.first is None
    two = make_point(BASE, {"method": "2sft", "threshold": 0.2})
    gpr = two.first
    assert gpr is not None
    assert gpr.run == "gpr", "class labels know of no threshold"
    with_budget = make_point(BASE, {"method": "2sft", "alignment_budget": 0.1})
    assert with_budget.first is None, "its first stage would export weights that are drawn back"


def test_a_method_with_options_of_its_own() -> None:
    changes = {"mcip+": {"alignment_budget": 0.0, "margin": 0.9, "probe_data": "probe"}}
    config = SweepConfig(set={"method": ["mcip", "mcip+"], "margin": [0.5, 0.9]}, grid="product")
    points = study_points(config, dataclasses.replace(BASE, margin=0.5), changes)
    assert [(p.run, p.config.margin, p.config.probe_data) for p in points] == [
        ("mcip", 0.5, None),
        ("mcip_margin=0.9", 0.9, None),
        ("mcip+_margin=0.5", 0.5, "probe"),  # "mcip+" is the run with the margin of its own
        ("mcip+", 0.9, "probe"),
    ]
    assert points[3].config.alignment_budget == 0


def test_an_option_that_no_method_uses() -> None:
    with pytest.raises(ConfigError, match="threshold is swept, but method gpr doesn't use it"):
        points_of(dataclasses.replace(BASE, method="gpr"), threshold=(0.2, 0.3))
    with pytest.raises(ConfigError, match="lambda_caption is swept, but method gpr, 2sft"):
        points_of(method=("gpr", "2sft"), lambda_caption=(0.5,), grid="product")
    with pytest.raises(ConfigError, match="method='mcip' needs captions"):
        points_of(dataclasses.replace(BASE, method="gpr", captions=None), method=("gpr", "mcip"))


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"set": {}}, "nothing is swept; give set="),
        ({"set": {"k": ""}}, "nothing is swept"),
        ({"set": {"k": (0, 1)}}, "k=0 is not allowed"),
        ({"set": {"threshold": (2.0,)}}, "threshold=2.0 is not allowed; it must be <= 1"),
        ({"set": {"lambda_caption": (1.5,)}}, "lambda_class=-0.5 is not allowed; it must be >= 0"),
        ({"set": {"caption_noise": "0.1,1.1"}}, "caption_noise=1.1 is not allowed"),
        ({"set": {"method": "magic"}}, "one of 'appended'"),
        ({"set": {"thresold": 0.2}}, "unknown option 'thresold'"),
        ({"set": {"seed": (1, 2)}}, "seed can't be swept"),
        ({"set": {"first_stage": "runs/gpr"}}, "first_stage can't be swept"),
        ({"set": {"k": 1}, "data": "d"}, "data is for your own data: give `train` too"),
        ({"set": {"k": 1}, "train": "t", "smoke": True}, "it excludes `train`"),
        ({"set": {"k": 1}, "train": "t", "class_names": "n"}, "give `data` too"),
        ({"set": {"k": 1}, "overwrite": True, "resume": "latest"}, "exclude each other"),
        ({"set": {"k": 1}, "templates": ("a photo",)}, "must hold {}"),
        ({"set": {"k": 1}, "seeds": 0}, "seeds=0 is not allowed"),
        ({"set": {"k": 1}, "retrieval": "t2i_r5"}, "retrieval='t2i_r5' is not allowed"),
    ],
)
def test_options_that_are_wrong(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        sweep(**options, out=tmp_path / "out")
    assert message in str(raised.value)
    assert not (tmp_path / "out").exists()


def parse(*words: str) -> Any:
    options = vars(build_parser().parse_args(["sweep", *words]))
    return make_config(COMMANDS[options.pop("command")].config, options)


def test_values_on_the_command_line() -> None:
    found = parse(
        *["--set", "threshold=0.20,0.27,auto", "k=1,5", "method=gpr,mcip+rea", "margin=0.3"],
        *["--alignment", "t2i_r1,t2i_r5", "--templates", "a {}, drawn", "{}", "--data", "a,b"],
        *["--train", "t.json", "--grid", "product"],
    )
    assert found.axes == {
        "threshold": (0.2, 0.27, "auto"),
        "k": (1, 5),
        "method": ("gpr", "mcip+rea"),
        "margin": (0.3,),
    }
    assert found.alignment == ("t2i_r1", "t2i_r5")
    assert found.templates == ("a {}, drawn", "{}"), "a text keeps its commas"
    assert found.data == "a,b"
    assert parse("--set", "threshold=-0.1,0.2").axes == {"threshold": (-0.1, 0.2)}


@pytest.mark.parametrize("word", ["threshold=0.2,low", "threshold=0.2;0.3"])
def test_values_that_are_wrong(word: str) -> None:
    with pytest.raises(ConfigError, match=r"threshold=.* is not allowed; allowed: float or one of"):
        parse("--set", word)
