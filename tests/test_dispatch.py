"""The table of back ends: it names what exists, and a named back end is never replaced."""

from __future__ import annotations

import dataclasses
from types import ModuleType

import pytest

from pymcip import _core
from pymcip.errors import BackendError, ConfigError
from pymcip.ops import dispatch
from pymcip.ops.dispatch import BACKENDS, Backend, backends, explain, ops, select

# Of the CPU's back ends of topk: those in C++ that this machine can run, then torch and others.
FASTEST, *SLOWER = _core.topk_kernels()

BROKEN = Backend(
    op="topk",
    name="broken",
    devices=("cpu",),
    dtypes=("float32",),
    function="pymcip.ops.topk_torch:topk_torch",
    probe="tests.test_dispatch:probe_broken",
)


def probe_broken() -> str:
    return "its library is missing"


@pytest.fixture
def broken_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "BACKENDS", (BROKEN, *BACKENDS))


@pytest.mark.parametrize("row", BACKENDS, ids=lambda row: f"{row.op}-{row.name}")
def test_rows_name_functions_that_exist(row: Backend) -> None:
    reason = row.unavailable()
    assert reason is None or isinstance(reason, str)
    if reason is None:
        assert callable(row.load()) or isinstance(row.load(), ModuleType)
    assert row.devices
    assert set(row.dtypes) <= {"float64", "float32", "float16", "bfloat16"}


def test_names_are_unique_within_an_op() -> None:
    names = [(row.op, row.name) for row in BACKENDS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("op", ops())
def test_every_op_has_a_plain_torch_version_on_any_device(op: str) -> None:
    assert [row.devices for row in backends(op) if row.name == "torch"] == [dispatch.ANY_DEVICE]


def test_auto_takes_the_first_that_works(broken_first: None) -> None:
    assert select("topk", dtype="float32").name == FASTEST
    assert select("topk", device="mps:1", dtype="torch.float16").name == "torch"


def test_a_named_back_end_is_refused_rather_than_replaced(broken_first: None) -> None:
    with pytest.raises(BackendError) as caught:
        select("topk", "broken", dtype="float32")
    message = str(caught.value)
    assert "backend='broken' was asked for" in message  # received
    assert "its library is missing" in message
    assert f"Allowed for these inputs: auto, {FASTEST}, " in message
    assert "pymcip env" in message  # next step
    with pytest.raises(BackendError, match="runs on cpu, not on cuda"):
        select("topk", FASTEST, device="cuda", dtype="float32")
    with pytest.raises(BackendError, match="takes float32, not float16"):
        select("topk", "broken", dtype="float16")


def test_nothing_fits() -> None:
    with pytest.raises(
        BackendError, match=r"no back end takes device=cpu, dtype=int8: .*torch takes"
    ):
        select("topk", dtype="int8")


def test_unknown_names() -> None:
    with pytest.raises(ConfigError, match="op='topq' is not known; allowed: topk"):
        backends("topq")
    with pytest.raises(
        ConfigError, match="backend='cuda13' is not known; allowed: auto, cuda, amx"
    ):
        explain("topk", backend="cuda13")


def test_explain_says_what_won_and_why_the_others_lost(broken_first: None) -> None:
    explanation = explain("topk")
    assert explanation.chosen == FASTEST
    verdicts = dict(explanation.verdicts)
    assert next(iter(verdicts)) == "broken"
    assert set(verdicts) == {"broken", *(row.name for row in BACKENDS if row.op == "topk")}
    assert verdicts["broken"] == "its library is missing"
    assert verdicts["cuda"] == "runs on cuda, not on cpu"
    assert verdicts[FASTEST] == "chosen"
    for name in (*SLOWER, "torch"):
        assert verdicts[name] == f"would work, but {FASTEST} is preferred"
    lines = str(explanation).splitlines()
    assert lines[0] == f"topk on cpu with float32, backend='auto': {FASTEST}"
    assert lines[1:] == [f"  {name}: {verdict}" for name, verdict in explanation.verdicts]


def test_facts_of_a_problem_rule_back_ends_out() -> None:
    wide = explain("topk", dim=5000)
    assert wide.chosen == "torch"
    assert dict(wide.verdicts)[FASTEST] == "takes D <= 4096, not 5000"


def test_explain_a_named_back_end() -> None:
    assert explain("topk", backend="torch").chosen == "torch"
    refused = explain("topk", device="cuda", backend="portable")
    assert refused.chosen is None
    assert str(refused).startswith("topk on cuda with float32, backend='portable': no back end")
    assert dict(refused.verdicts)["torch"] == "not asked for (backend='portable')"


def test_rows_are_plain_data() -> None:
    for row in BACKENDS:
        assert all(
            isinstance(getattr(row, field.name), (str, tuple, type(None)))
            for field in dataclasses.fields(row)
        )
