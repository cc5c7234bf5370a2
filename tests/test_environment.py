"""The report behind `pymcip env`."""

from __future__ import annotations

import json
from importlib import metadata

import pytest
import torch

from pymcip import environment
from pymcip.environment import environment_report, format_report
from pymcip.ops.dispatch import BACKENDS


def test_the_report_is_plain_json_and_complete() -> None:
    report = environment_report()
    assert json.loads(json.dumps(report)) == report
    assert report["versions"]["pymcip"] == metadata.version("pymcip")
    assert report["versions"]["torch"] == metadata.version("torch")
    for row in BACKENDS:
        assert row.name in report["back ends"][row.op]
    assert "portable" in report["core"]["topk kernels"]
    assert report["cpu"]["torch threads"] == torch.get_num_threads()
    assert report["gpu"]["available to torch"] == torch.cuda.is_available()
    assert len(report["gpu"]["devices"]) == torch.cuda.device_count()


def test_the_text_holds_every_value() -> None:
    report = environment_report()
    text = format_report(report)
    for section, values in report.items():
        assert section in text.splitlines()
        for name, value in values.items():
            assert name in text
            if isinstance(value, str):
                assert value in text


def test_cpu_features_are_read_from_the_kernels_list(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = {
        "/proc/cpuinfo": "model name\t: Some CPU\nflags\t\t: fpu avx2 fma amx_tile avx512_vnni\n",
        "/proc/meminfo": "MemTotal:       33554432 kB\n",
    }
    monkeypatch.setattr(environment, "read_system_file", lambda path: files.get(path, ""))
    cpu = environment_report()["cpu"]
    assert cpu["model"] == "Some CPU"
    assert cpu["features"] == ["avx2", "fma", "avx512_vnni", "amx_tile"]
    assert cpu["memory GiB"] == 32.0


def test_machines_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "read_system_file", lambda path: "")
    cpu = environment_report()["cpu"]
    assert cpu["features"] == []
    assert cpu["memory GiB"] is None
    assert cpu["model"]


def test_missing_packages_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "PACKAGES", ("pymcip", "no-such-distribution"))
    report = environment_report()
    assert report["versions"]["no-such-distribution"] is None
    assert "no-such-distribution" in format_report(report)
