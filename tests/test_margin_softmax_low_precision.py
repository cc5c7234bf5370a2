"""margin_softmax in 16 bits: no worse than plain torch, against fp64, in every way it can take.

The rule, for loss, dX and dW: relative error (of the norm) at most twice that of plain torch with
bf16 products, plus 1e-4. Without a GPU the Triton kernels run in Triton's interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pymcip.ops import explain, margin_softmax
from pymcip.ops.margin_softmax import (
    CELL_COLUMNS,
    CELL_ROWS,
    margin_logit,
    margin_softmax_filtered,
    probe_triton,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MISSING = probe_triton()  # Triton older than 3.4 has no tensor descriptors
needs_triton = pytest.mark.skipif(MISSING is not None, reason=f"Triton: {MISSING}")
KEEP, ANEW = 1 << 30, 1  # scratch: all of E, or one cell at a time


@dataclass(frozen=True)
class Case:
    rows: int
    columns: int
    dim: int
    scale: float = 30.0
    margin: float = 0.3
    positives: int = 1  # per row; -1: all columns
    clustered: bool = False
    duplicates: bool = False  # half of the columns repeat the other half
    pole: float = 0.0  # +-1: the first rows equal their positive, or its opposite
    equal: bool = False  # all rows and columns are the same

    @lru_cache(maxsize=2)  # noqa: B019  # one case after the other
    def make(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x, w in fp32, and the positives in CSR form."""
        generator = torch.Generator().manual_seed(self.rows + 7 * self.columns + self.dim)
        count = self.columns if self.positives < 0 else min(self.positives, self.columns)
        w = torch.randn(self.columns, self.dim, generator=generator)
        x = torch.randn(self.rows, self.dim, generator=generator)
        if self.clustered:  # cells are clusters, and rows lie near some of them
            centres = torch.randn(-(-self.columns // CELL_COLUMNS), self.dim, generator=generator)
            w = 0.5 * w + centres.repeat_interleave(CELL_COLUMNS, 0)[: self.columns]
            near = torch.arange(self.rows) // CELL_ROWS % len(centres)
            x = 0.5 * x + centres[near]
            own = near[:, None] * CELL_COLUMNS + torch.arange(count)
            return x, w, torch.arange(self.rows + 1) * count, own.flatten()
        if self.duplicates:
            w[self.columns // 2 : self.columns // 2 * 2] = w[: self.columns // 2]
        if self.equal:
            x[:], w[:] = x[:1].clone(), x[:1].clone()
        own = torch.stack(
            [torch.randperm(self.columns, generator=generator)[:count] for _ in range(self.rows)]
        ) if count else torch.empty(self.rows, 0, dtype=torch.int64)  # fmt: skip
        if self.pole and count:
            x[::2] = self.pole * 3 * w[own[::2, 0]]
        indptr = torch.arange(self.rows + 1) * count
        if self.rows > 2 and count > 1:  # rows of different lengths, one of them empty
            flat = [own[row, : (0 if row == 1 else 1 + row % count)] for row in range(self.rows)]
            indptr = torch.tensor([0, *map(len, flat)]).cumsum(0)
            return x, w, indptr, torch.cat(flat)
        return x, w, indptr, own.flatten()


def dense(
    x: Tensor, w: Tensor, indptr: Tensor, indices: Tensor, case: Case, product: torch.dtype
) -> Tensor:
    """The contract on the whole matrix, by autograd; `product`: dtype of its operands and result."""
    unit_x, unit_w = (torch.nn.functional.normalize(value, dim=1) for value in (x, w))
    cosine = (unit_x.to(product) @ unit_w.to(product).T).to(x.dtype)
    counts = indptr.diff()
    rows = torch.arange(len(x), device=x.device).repeat_interleave(counts)
    own = torch.zeros_like(cosine, dtype=torch.bool)
    own[rows, indices] = True
    log_z = (case.scale * cosine).masked_fill(own, float("-inf")).logsumexp(1)
    log_z = log_z.masked_fill(own.all(1), -1e30)  # no negatives: loss 0, gradient 0
    picked = cosine[rows, indices]
    value, slope = margin_logit(picked.detach(), case.margin, "linear")
    value = value + slope * (picked - picked.detach())  # the clamped derivative at the poles
    gap = log_z[rows] - case.scale * value
    softplus = torch.logaddexp(gap, torch.zeros_like(gap))
    weights = 1 / counts[rows]
    return torch.zeros_like(log_z).index_add(0, rows, weights * softplus)


def results(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    """Loss and gradients, each row's loss weighted differently."""
    (loss * torch.linspace(0.5, 1.5, len(loss), device=loss.device)).sum().backward()
    grads = [leaf.grad for leaf in leaves if leaf.requires_grad]
    return [value.detach().double().cpu() for value in (loss, *grads) if value is not None]


def errors(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    return [
        float((one - other).norm() / other.norm().clamp_min(1e-12))
        for one, other in zip(found, expected, strict=True)
    ]


@lru_cache(maxsize=4)
def references(case: Case, half: str | None) -> tuple[list[Tensor], list[float]]:
    """Loss, dX and dW in fp64, and the errors of plain torch with bf16 products."""
    x, w, indptr, indices = bring(case, half)
    found = []
    for dtype, product in ((torch.float64, torch.float64), (torch.float32, torch.bfloat16)):
        leaves = [value.to(dtype, copy=True).requires_grad_() for value in (x, w)]
        found.append(results(dense(*leaves, indptr, indices, case, product), *leaves))
    return found[0], errors(found[1], found[0])


def bring(case: Case, half: str | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, w, indptr, indices = (value.to(DEVICE, copy=True) for value in case.make())
    return x, w if half is None else w.to(getattr(torch, half)).float(), indptr, indices


def check(
    case: Case, backend: str, compute: str, *, need_w: bool, scratch: int, half_bank: bool = False
) -> None:
    half = compute if half_bank else None
    x, w, indptr, indices = bring(case, half)
    expected, allowed = references(case, half)
    leaves = x.requires_grad_(), w.requires_grad_(need_w)
    loss = margin_softmax(
        x,
        w.to(getattr(torch, compute)) if half_bank else w,
        indptr,
        indices,
        scale=case.scale,
        margin=case.margin,
        compute=compute,
        scratch=scratch,
        backend=backend,
        w_norms=w.norm(dim=1) if half_bank else None,
    )
    found = results(loss, *leaves)
    for name, own, plain in zip(
        ("loss", "dX", "dW"), errors(found, expected[: len(found)]), allowed, strict=False
    ):
        assert own <= 2 * plain + 1e-4, (name, own, plain)


SMALL = [
    Case(1, 1, 64),
    Case(1, 2, 64, scale=64.0, margin=0.5),
    Case(7, 2, 64, positives=-1),
    Case(7, 1000, 64, positives=0),
    Case(7, 1000, 64, scale=16.0, margin=0.0, positives=5),
    Case(5, 300, 64, positives=50),
    Case(130, 600, 72, scale=64.0, margin=0.5, positives=1),
    Case(7, 300, 64, duplicates=True, positives=5),
    Case(8, 300, 64, pole=1.0, margin=0.5),
    Case(8, 300, 64, pole=-1.0, margin=0.5),
    Case(8, 300, 64, equal=True, positives=5),
    Case(20, 300, 64, scale=110.0, positives=3),  # exp(s) is infinite in fp32
]
LARGE = [
    Case(7, 131_073, 64, positives=5),
    Case(256, 131_073, 64, scale=64.0, margin=0.5),
    Case(4096, 1000, 64, scale=16.0, positives=5),
    Case(256, 1000, 1152, positives=50),
    Case(256, 1000, 768, scale=64.0, margin=0.5),
    Case(256, 1000, 512, positives=-1),
]
GPU = [
    *LARGE,
    Case(4096, 131_073, 768, scale=64.0, margin=0.5, positives=50),
    Case(256, 131_073, 1152, positives=5),
    Case(4096, 131_073, 512, scale=16.0, margin=0.0, positives=1),
    Case(1, 131_073, 512, scale=64.0, positives=50),
]
WAYS = [(False, KEEP), (False, ANEW), (True, KEEP), (True, ANEW)]


@needs_triton
@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.parametrize(("need_w", "scratch"), WAYS)
@pytest.mark.parametrize("compute", ["bfloat16", "float16"])
def test_triton(case: Case, compute: str, need_w: bool, scratch: int) -> None:
    check(case, "triton", compute, need_w=need_w, scratch=scratch)


@needs_triton
@pytest.mark.parametrize("case", SMALL[4:7], ids=str)
@pytest.mark.parametrize("compute", ["bfloat16", "float16"])
def test_triton_with_a_bank_as_it_is(case: Case, compute: str) -> None:
    """A frozen bank in 16 bits, rows of any norm: not copied, its norms are given."""
    check(case, "triton", compute, need_w=False, scratch=KEEP, half_bank=True)


@needs_triton
@pytest.mark.parametrize("case", SMALL[4:7], ids=str)
@pytest.mark.parametrize(("need_w", "scratch"), WAYS)
def test_triton_with_pointers(
    case: Case, need_w: bool, scratch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPUs before Hopper load tiles by pointers."""
    monkeypatch.setattr("pymcip.triton_kernels.margin_softmax.capability", lambda device: 8)
    check(case, "triton", "bfloat16", need_w=need_w, scratch=scratch)


@pytest.mark.parametrize("case", SMALL + LARGE, ids=str)
@pytest.mark.parametrize(("need_w", "scratch"), WAYS)
def test_cpu(case: Case, need_w: bool, scratch: int) -> None:
    if DEVICE != "cpu":
        pytest.skip("runs where there is no GPU")
    check(case, "cpu", "bfloat16", need_w=need_w, scratch=scratch)


@needs_triton
@settings(deadline=None, max_examples=10, derandomize=True)
@given(
    case=st.builds(
        Case,
        rows=st.integers(64, 80),  # enough for the errors' norms to be no matter of luck
        columns=st.integers(1, 600),
        dim=st.integers(2, 9).map(lambda eighths: 8 * eighths),
        scale=st.sampled_from([16.0, 30.0, 64.0]),
        margin=st.sampled_from([0.0, 0.3, 0.5]),
        positives=st.integers(0, 2),  # each costs the interpreter a pass over its tile
    ),
    way=st.sampled_from(WAYS),
)
def test_any_small_problem(case: Case, way: tuple[bool, int]) -> None:
    check(case, "triton", "bfloat16", need_w=way[0], scratch=way[1])


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
@pytest.mark.parametrize("case", GPU, ids=str)
@pytest.mark.parametrize(("need_w", "scratch"), WAYS)
@pytest.mark.parametrize("compute", ["bfloat16", "float16"])
def test_gpu(case: Case, compute: str, need_w: bool, scratch: int) -> None:
    check(case, "triton", compute, need_w=need_w, scratch=max(scratch, 1 << 26))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_gpu_more_than_2_31_elements(backend: str) -> None:
    """Rows of W beyond 2^31 elements: the last columns' gradient is theirs."""
    dim, columns = 768, 3_000_000
    w = torch.zeros(columns, dim, device="cuda", dtype=torch.bfloat16)
    w[:, 0] = 1
    w[-1, 0], w[-1, 1] = 0, 1
    x = torch.zeros(4, dim, device="cuda")
    x[:, 1] = 1
    x.requires_grad_()
    own = torch.tensor([0, 1, 2, columns - 1], device="cuda")
    loss = margin_softmax(x, w, torch.arange(5, device="cuda"), own, scale=20.0, backend=backend)
    # cos is 0 to all columns but the last, where it is 1
    others = torch.tensor(float(columns - 2), dtype=torch.float64)
    z = torch.tensor([0.0, 0.0, 0.0, 20.0], dtype=torch.float64)
    log_z = torch.where(
        z > 0, (others + 1).log(), torch.logaddexp(others.log(), torch.tensor(20.0))
    )
    expected = torch.nn.functional.softplus(log_z - z)
    assert torch.allclose(loss.detach().double().cpu(), expected, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
@pytest.mark.parametrize("scratch", [KEEP, 1 << 26])
def test_gpu_two_runs_give_the_same_bits(scratch: int) -> None:
    x, w, indptr, indices = (value.cuda() for value in Case(512, 50_000, 512, positives=3).make())
    runs = []
    for _ in range(2):
        leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
        runs.append(results(margin_softmax(*leaves, indptr, indices, scratch=scratch), *leaves))
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


# --- the certified filter -----------------------------------------------------------------------

CLUSTERED = Case(130, 2500, 64, positives=3, clustered=True)
RANDOM = Case(130, 2500, 64, positives=3)


@pytest.mark.parametrize(
    ("backend", "compute"),
    [("torch", "float64"), ("cpu", "float32"), ("cpu", "bfloat16"), ("triton", "bfloat16")],
)
@pytest.mark.parametrize("case", [CLUSTERED, RANDOM], ids=["clustered", "random"])
@pytest.mark.parametrize("delta", [1e-3, 0.3])
@pytest.mark.parametrize("need_w", [False, True])
def test_filter_keeps_its_bound(
    backend: str, compute: str, case: Case, delta: float, need_w: bool
) -> None:
    if backend == "cpu" and DEVICE != "cpu":
        pytest.skip("runs where there is no GPU")
    if backend == "triton" and MISSING is not None:
        pytest.skip(MISSING)
    x, w, indptr, indices = (value.to(DEVICE) for value in case.make())
    x = torch.nn.functional.normalize(x.double(), dim=1)
    if backend != "torch":
        x = x.float()
    gradients, skipped = [], None
    for bound in (1e-30, delta):  # the former drops nothing, in the same way of computing
        own_x, own_w = x.clone().requires_grad_(), w.clone().requires_grad_(need_w)
        loss, skipped = margin_softmax_filtered(
            own_x,
            own_w,
            indptr,
            indices,
            delta=bound,
            backend=backend,
            compute=compute,
            scratch=ANEW,
        )
        gradients.append(results(loss, own_x, own_w))
    assert skipped is not None
    assert float(skipped.mass.max()) <= delta
    if case.clustered:
        assert int(skipped.cells) > 0.5 * skipped.of
    exact, filtered = gradients
    # Losses are not filtered; only the order of the sums differs.
    assert torch.allclose(exact[0], filtered[0], rtol=1e-5)
    # |error| <= s times the mass that was dropped, times the row's weight, which is at most 1.5; and
    # each of the two gradients has its own rounding: a few u of its terms, which sum to at most s
    # times that weight. A term e^(s cos) has s u more, with the cosines' own rounding, which on the
    # CPU is to 16 bits, too.
    unit_roundoff = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-9}[compute]
    rounding = unit_roundoff if backend == "triton" else 31 * unit_roundoff
    error = (exact[1] - filtered[1]).norm(dim=1)
    assert (error <= 1.5 * 30.0 * (skipped.mass.double().cpu() + 4 * rounding)).all()
    if not case.clustered and delta > 0.1 and not need_w:  # ten cells of about a tenth each
        assert float(skipped.mass.max()) > 0.1
        assert float(error.max()) > 0.01


# --- compiled ahead of time ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, int]]:
    """Resources of every kernel, for sm_80 and sm_90; Triton needs no GPU for this."""
    script = Path(__file__).parent / "compile_margin_softmax.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), "80", "90"],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@needs_triton
def test_compiled_kernels_fit_and_do_not_spill(compiled: list[dict[str, int]]) -> None:
    assert {row["capability"] for row in compiled} == {80, 90}
    for row in compiled:
        assert row["local"] == 0, row
        assert row["registers"] <= 255, row
        # 40 bytes of stack are what Triton 3.6 needs on sm_80; spilled products take hundreds
        assert row["stack"] <= (0 if row["capability"] == 90 else 64), row
        assert row["shared"] <= {80: 166_912, 90: 232_448}[row["capability"]], row
        assert row["atomics"] == 0, row


@needs_triton
def test_compiled_kernels_use_the_tensor_cores(compiled: list[dict[str, int]]) -> None:
    for row in compiled:
        if row["capability"] == 90:
            assert row["wgmma"] > 0, row
            assert row["tma"] > 0, row
        else:
            assert row["mma"] > 0, row


@needs_triton
def test_explain_says_why_triton_lost() -> None:
    text = str(explain("margin_softmax", device=DEVICE, dtype="bfloat16", dim=100))
    assert "triton: takes D = 16 … 8192 in multiples of 8, not 100" in text
    assert "triton: takes bfloat16, float16, not float32" in str(
        explain("margin_softmax", device=DEVICE, dtype="float32", dim=64)
    )
