"""Triton's kernels compiled for GPUs that aren't there: resources, instructions, and how many.

Triton needs no GPU for this, but a process in which nothing is interpreted.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from pymcip.ops.margin_softmax import probe_triton
from tests.beside import BESIDE, CAPABILITIES

pytestmark = pytest.mark.skipif(
    (probe_triton() or "").startswith("Triton"), reason=f"{probe_triton()}"
)
SHARED = {80: 166_912, 90: 232_448, 100: 232_448, 120: 101_376}  # bytes that a program may have
# Triton 3.8 has three kernels of sm_100 take 40 bytes, 3.6 some of sm_120 16; spilled products take
# hundreds.
STACK = 40
TENSOR_CORES = {80: "mma", 90: "wgmma", 100: "tcgen05", 120: "mma"}
PRODUCTS = {"exponentials", "rows", "columns", "screen"}


def rows_of(name: str) -> list[dict[str, Any]]:
    found = []
    for program in BESIDE.wait(name):
        assert program.returncode == 0, program.error
        found += [json.loads(line) for line in program.out.splitlines()]
    return found


@pytest.fixture(scope="module")
def compiled_kernels() -> list[dict[str, Any]]:
    """Resources of what runs without timing, on every kind of GPU."""
    return rows_of("compiled_kernels")


@pytest.fixture(scope="module")
def counted_kernels() -> list[dict[str, Any]]:
    """What Triton would compile for the GPU tests."""
    return rows_of("counted_kernels")


def test_kernels_fit_and_do_not_spill(compiled_kernels: list[dict[str, Any]]) -> None:
    assert {row["capability"] for row in compiled_kernels} == set(map(int, CAPABILITIES))
    assert {row["kernel"] for row in compiled_kernels} == PRODUCTS | {"prepare", "refine"}
    for row in compiled_kernels:
        assert row["local"] == 0, row
        assert row["stack"] <= STACK, row
        assert row["registers"] <= 255, row
        assert row["shared"] <= SHARED[row["capability"]], row


def test_products_use_the_tensor_cores(compiled_kernels: list[dict[str, Any]]) -> None:
    for row in compiled_kernels:
        if row["kernel"] in PRODUCTS:
            assert row[TENSOR_CORES[row["capability"]]] > 0, row
            assert row["tma"] > 0 or row["capability"] == 80, row


def test_nothing_depends_on_the_order_of_programs(compiled_kernels: list[dict[str, Any]]) -> None:
    for row in compiled_kernels:
        if row["kernel"] != "screen":  # appends to lists that are sorted afterwards
            assert row["atomics"] == 0, row
        if row["kernel"] == "refine":  # flushed scores would not be canonical
            assert row["flushes"] == 0, row


def test_gpu_tests_compile_few_kernels(counted_kernels: list[dict[str, Any]]) -> None:
    """Each takes a second or more, of the minutes that a GPU check has."""
    kernels = Counter(row["kernel"] for row in counted_kernels)
    assert kernels.total() <= 80, kernels
