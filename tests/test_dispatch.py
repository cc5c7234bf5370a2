"""The table of back ends: it names what exists, and a named back end is never replaced."""

from __future__ import annotations

import dataclasses
from types import ModuleType

import pytest

from pymcip.errors import BackendError, ConfigError
from pymcip.ops import dispatch
from pymcip.ops.dispatch import BACKENDS, Backend, backends, explain, ops, select

BROKEN = Backend(
    op="topk",
    name="broken",
    devices=("cpu",),
    dtypes=("float32",),
    function="pymcip.ops.topk:topk_torch",
    probe="a library:that is missing",
)


@pytest.fixture
def broken_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "BACKENDS", (BROKEN, *BACKENDS))
    monkeypatch.setattr(
        dispatch,
        "_resolve",
        lambda where, resolve=dispatch._resolve: (
            (lambda: "its library is missing") if where == BROKEN.probe else resolve(where)
        ),
    )


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
    assert select("topk", dtype="float32").name == "cpp"
    assert select("topk", device="cuda:1", dtype="torch.float16").name == "torch"


def test_a_named_back_end_is_refused_rather_than_replaced(broken_first: None) -> None:
    with pytest.raises(BackendError) as caught:
        select("topk", "broken", dtype="float32")
    message = str(caught.value)
    assert "backend='broken' was asked for" in message  # received
    assert "its library is missing" in message
    assert "Allowed for these inputs: auto, cpp, torch" in message
    assert "pymcip env" in message  # next step
    with pytest.raises(BackendError, match="runs on cpu, not on cuda"):
        select("topk", "cpp", device="cuda", dtype="float32")
    with pytest.raises(BackendError, match="takes float32, not float16"):
        select("topk", "broken", dtype="float16")


def test_nothing_fits() -> None:
    with pytest.raises(BackendError, match="no back end takes device=cpu, dtype=int8: cpp takes"):
        select("topk", dtype="int8")


def test_unknown_names() -> None:
    with pytest.raises(ConfigError, match="op='topq' is not known; allowed: topk"):
        backends("topq")
    with pytest.raises(ConfigError, match="backend='cuda13' is not known; allowed: auto, cpp"):
        explain("topk", backend="cuda13")


def test_explain_says_what_won_and_why_the_others_lost(broken_first: None) -> None:
    explanation = explain("topk")
    assert explanation.chosen == "cpp"
    assert dict(explanation.verdicts) == {
        "broken": "its library is missing",
        "cpp": "chosen",
        "torch": "would work, but cpp is preferred",
    }
    assert str(explanation).splitlines() == [
        "topk on cpu with float32, backend='auto': cpp",
        "  broken: its library is missing",
        "  cpp: chosen",
        "  torch: would work, but cpp is preferred",
    ]


def test_explain_a_named_back_end() -> None:
    assert explain("topk", backend="torch").chosen == "torch"
    refused = explain("topk", device="cuda", backend="cpp")
    assert refused.chosen is None
    assert str(refused).startswith("topk on cuda with float32, backend='cpp': no back end")
    assert dict(refused.verdicts)["torch"] == "not asked for (backend='cpp')"


def test_rows_are_plain_data() -> None:
    for row in BACKENDS:
        assert all(
            isinstance(getattr(row, field.name), (str, tuple, type(None)))
            for field in dataclasses.fields(row)
        )
