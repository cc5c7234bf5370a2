"""The study of photographs: the options of each of its methods are ones that `train` takes."""

from __future__ import annotations

from pymcip.configs import TrainConfig
from tests.conftest import bench_module


def test_every_stage_is_a_method_with_the_schedule() -> None:
    with bench_module("studies.photographs") as bench:
        methods = {stage for stages in bench.STAGES.values() for stage in stages}
        for method in methods:
            options = {} if method == "appended" else bench.SCHEDULE
            TrainConfig(
                model="m", train_data="d", captions="c", out="o", method=method, **options
            )  # raises for what is not allowed
        assert methods == {"appended", "gpr", "rea", "mcip", "mcip+"}
