"""margin_softmax over shards of the columns in two processes, and as an opaque op of torch."""

from __future__ import annotations

import importlib.util
import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pymcip.losses import ArcMargin, MCArcMargin
from pymcip.ops import margin_softmax

SCRIPT = Path(__file__).parent / "margin_softmax_shard.py"
SPEC = importlib.util.spec_from_file_location("margin_softmax_shard", SCRIPT)
assert SPEC is not None
assert SPEC.loader is not None
shard = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(shard)
ROWS, COLUMNS, DIM, CUT = shard.ROWS, shard.COLUMNS, shard.DIM, shard.CUT
problem, run = shard.problem, shard.run


WAYS: list[dict[str, Any]] = [
    {"backend": "torch", "compute": "float64"},
    {"backend": "cpu", "compute": "float32"},
    {"backend": "torch", "compute": "float64", "delta": 0.2},
    {"backend": "torch", "compute": "float64", "positives": "compete", "repel": 0.3},
    {"backend": "cpu", "compute": "float32", "positives": "compete", "repel": 0.3},
]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[list[list[Tensor]]]:
    """By way, the results of two processes with a shard each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("shards")
    files = [folder / f"{rank}.pt" for rank in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, SCRIPT, str(rank), str(port), file, json.dumps(WAYS)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, file in enumerate(files)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    return list(zip(*(torch.load(file, weights_only=True) for file in files), strict=True))


@pytest.mark.parametrize(
    ("way", "tolerance"),
    [(0, 1e-12), (1, 1e-5), (3, 1e-12), (4, 1e-5)],  # fp32: sums of 700 terms, a few u
    ids=["torch in fp64", "cpu in fp32", "farthest in fp64", "farthest in fp32"],
)
def test_two_shards_give_the_whole(
    way: int, tolerance: float, shards: list[list[list[Tensor]]]
) -> None:
    whole = run(*problem(), **WAYS[way])
    for rank, (loss, grad_x, grad_w, _) in enumerate(shards[way]):
        part = slice(0, CUT) if rank == 0 else slice(CUT, COLUMNS)
        for own, other in ((loss, whole[0]), (grad_x, whole[1]), (grad_w, whole[2][part])):
            assert torch.allclose(own, other, rtol=tolerance, atol=tolerance * float(other.max()))


def test_the_filter_keeps_its_bound_over_shards(shards: list[list[list[Tensor]]]) -> None:
    whole = run(*problem(), **WAYS[0])
    first, second = shards[2]
    dropped = first[3] + second[3]
    assert float(dropped.max()) <= WAYS[2]["delta"]
    x = problem()[0]
    error = (first[1] - whole[1]).norm(dim=1) * x.norm(dim=1)
    assert (error <= 20.0 * dropped * torch.arange(1, 1 + ROWS) + 1e-9).all()


# --- as an op of torch --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "compute", "more"),
    [
        *(
            (backend, compute, {"delta": delta})
            for backend, compute in (
                ("torch", "float32"), ("cpu", "float32"), ("cpu", "bfloat16"), ("triton", "bfloat16")
            )
            for delta in (0.0, 0.1)
        ),
        ("cpu", "float32", {"positives": "compete", "repel": 0.1}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("frozen", [False, True])
def test_compiled_it_is_the_same(
    backend: str, compute: str, more: dict[str, Any], frozen: bool
) -> None:
    torch.compiler.reset()  # else the cases count as recompilations of one function
    x, w, indptr, indices = problem()
    if backend == "triton":  # the interpreter takes long for row 4's many positives
        x, indptr, indices = x[:4], indptr[:5], indices[: indptr[4]]
    options = {"backend": backend, "compute": compute, "margin": 0.3, **more}

    def loss_of(x: Tensor, w: Tensor) -> Tensor:
        return (margin_softmax(2 * x, w, indptr, indices, **options) ** 2).mean()

    found = []
    for function in (loss_of, torch.compile(loss_of, fullgraph=True, backend="aot_eager")):
        leaves = x.float().requires_grad_(), w.float().requires_grad_(not frozen)
        loss = function(*leaves)
        loss.backward()
        found.append([loss.detach(), *(leaf.grad for leaf in leaves if leaf.requires_grad)])
    for plain, compiled in zip(*found, strict=True):
        assert torch.equal(plain, compiled)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_the_operators_keep_torchs_rules(backend: str) -> None:
    """Fake and real results agree in shape, dtype and strides; inputs are not changed."""
    x, w, indptr, indices = problem()
    rows = torch.arange(ROWS).repeat_interleave(indptr.diff())
    unit = torch.nn.functional.normalize(x.float(), dim=1)
    common = (unit, w.float(), None, indptr, indices, rows, 20.0, torch.float32, 256, 1 << 20)
    torch.library.opcheck(
        torch.ops.pymcip.margin_softmax_farthest, common,
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip
    for need_w in (False, True):
        arguments = (*common, backend, True, need_w, True)
        torch.library.opcheck(
            torch.ops.pymcip.margin_softmax_sums, arguments,
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip
        log_z, _, shares, kept = torch.ops.pymcip.margin_softmax_sums(*arguments)
        active = torch.ones(1, shares.shape[1], dtype=torch.bool)
        torch.library.opcheck(
            torch.ops.pymcip.margin_softmax_gradients,
            (*common, backend, log_z, log_z, torch.ones(len(rows)), active, kept, True, need_w),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_micro_batches_add_up_under_autocast(backend: str) -> None:
    """Gradient accumulation: two halves of a batch give the gradient of the whole."""
    x, w, indptr, indices = problem()
    labels = indices[indptr[:-1].clamp_max(len(indices) - 1)]
    head = ArcMargin(COLUMNS, DIM, backend=backend, compute="bfloat16")
    with torch.no_grad():
        head.weight.copy_(w)
    gradients = []
    for parts in ([slice(0, ROWS)], [slice(0, 4), slice(4, ROWS)]):
        head.weight.grad = None
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for part in parts:
                head(x.float()[part], labels[part]).sum().backward()
        assert head.weight.grad is not None
        gradients.append(head.weight.grad)
    whole, halves = gradients
    assert whole.dtype == torch.float32
    # each of the two rounds to bf16 once more than the other
    assert float((whole - halves).norm() / whole.norm()) < 2.0**-8


def test_a_bank_keeps_its_norms() -> None:
    """MCArcMargin finds the norms of its frozen bank once; rows of any length are allowed."""
    x, w, indptr, indices = problem()
    bank = (3 * w).half()
    loss = MCArcMargin(bank, scale=20.0)(x.float(), indptr, indices)
    expected = margin_softmax(x, bank.double(), indptr, indices, scale=20.0)
    assert torch.allclose(loss.double(), expected, rtol=1e-5)
