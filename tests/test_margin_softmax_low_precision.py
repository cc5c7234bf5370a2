"""margin_softmax in 16 bits: no worse than plain torch, against fp64, in every way it can take.

The rule, for loss, dX and dW: relative error (of the norm) at most twice that of plain torch with
bf16 products, plus 1e-4. Without a GPU the Triton kernels run in Triton's interpreter.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pymcip.ops import explain, margin_softmax
from pymcip.ops.margin_contract import margin_logit
from pymcip.ops.margin_softmax import Skipped, margin_softmax_filtered, probe_triton
from tests.margin_softmax_cases import ANEW, KEEP, ON_GPU, Case, Way

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MISSING = probe_triton()  # Triton older than 3.4 has no tensor descriptors
needs_triton = pytest.mark.skipif(MISSING is not None, reason=f"Triton: {MISSING}")


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
    x, w, indptr, indices = (value.clone() for value in case.make(DEVICE))
    return x, w if half is None else w.to(getattr(torch, half)).float(), indptr, indices


def check(case: Case, backend: str, way: Way) -> None:
    half = way.compute if way.half_bank else None
    x, w, indptr, indices = bring(case, half)
    expected, allowed = references(case, half)
    leaves = x.requires_grad_(), w.requires_grad_(way.need_w)
    found = results(way.loss(backend, case, *leaves, indptr, indices), *leaves)
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
COMPUTE = pytest.mark.parametrize("compute", ["bfloat16", "float16"])
GRADIENTS = pytest.mark.parametrize("need_w", [False, True])
SCRATCH = pytest.mark.parametrize("scratch", [KEEP, ANEW])


# The case is the slowest to change: its reference is kept.
@needs_triton
@GRADIENTS
@pytest.mark.parametrize(  # nothing is kept in float16
    ("compute", "scratch"), [("bfloat16", KEEP), ("bfloat16", ANEW), ("float16", ANEW)]
)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_triton(case: Case, compute: str, need_w: bool, scratch: int) -> None:
    check(case, "triton", Way(compute, need_w, scratch))


@needs_triton
@pytest.mark.parametrize("case", SMALL[4:7], ids=str)
@COMPUTE
def test_triton_with_a_bank_as_it_is(case: Case, compute: str) -> None:
    """A frozen bank in 16 bits, rows of any norm: not copied, its norms are given."""
    check(case, "triton", Way(compute, half_bank=True))


@needs_triton
@pytest.mark.parametrize("case", SMALL[4:7], ids=str)
@GRADIENTS
@SCRATCH
def test_triton_with_pointers(
    case: Case, need_w: bool, scratch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPUs before Hopper load tiles by pointers."""
    monkeypatch.setattr("pymcip.triton_kernels.margin_softmax.capability", lambda device: 8)
    check(case, "triton", Way("bfloat16", need_w, scratch))


@needs_triton
@pytest.mark.parametrize("capability", [8, 9])
def test_triton_reads_only_what_was_written(
    capability: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last block of rows needs the last cell alone, which ends within a tile; memory is NaN."""
    monkeypatch.setattr(
        "pymcip.triton_kernels.margin_softmax.capability", lambda device: capability
    )
    case = Case(300, 600, 72, clustered=True)
    x, w, indptr, indices = bring(case, None)
    torch.use_deterministic_algorithms(True)  # fills what is allocated
    try:
        leaves = x.requires_grad_(), w.requires_grad_()
        way = Way("bfloat16", need_w=True, scratch=ANEW, delta=0.3)
        found = results(way.loss("triton", case, *leaves, indptr, indices), *leaves)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.isfinite(value).all() for value in found)


@GRADIENTS
@SCRATCH
@pytest.mark.parametrize("case", SMALL + LARGE, ids=str)
def test_cpu(case: Case, need_w: bool, scratch: int) -> None:
    if DEVICE != "cpu":
        pytest.skip("runs where there is no GPU")
    check(case, "cpu", Way("bfloat16", need_w, scratch))


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
    need_w=st.booleans(),
    scratch=st.sampled_from([KEEP, ANEW]),
)
def test_any_small_problem(case: Case, need_w: bool, scratch: int) -> None:
    check(case, "triton", Way("bfloat16", need_w, scratch))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
@pytest.mark.parametrize(("case", "way"), ON_GPU, ids=str)
def test_gpu(case: Case, way: Way) -> None:
    check(case, "triton", way)


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
    x, w, indptr, indices = Case(512, 50_000, 768, positives=3).make(DEVICE)
    runs = []
    for _ in range(2):
        leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
        runs.append(results(margin_softmax(*leaves, indptr, indices, scratch=scratch), *leaves))
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


# --- the certified filter -----------------------------------------------------------------------

CLUSTERED = Case(130, 1300, 72, positives=2, clustered=True)
RANDOM = Case(130, 1300, 72, positives=2)
NOTHING = 1e-30  # a bound that drops nothing, in the same way of computing


@lru_cache
def filtered_results(
    backend: str, compute: str, case: Case, need_w: bool, delta: float
) -> tuple[list[Tensor], Skipped]:
    """Loss and gradients with a bound, and what was dropped."""
    x, w, indptr, indices = case.make(DEVICE)
    x = torch.nn.functional.normalize(x.double(), dim=1)
    leaves = (x if backend == "torch" else x.float()).requires_grad_(), w.clone()
    leaves[1].requires_grad_(need_w)
    loss, skipped = margin_softmax_filtered(
        *leaves, indptr, indices, delta=delta, backend=backend, compute=compute, scratch=ANEW
    )
    return results(loss, *leaves), skipped


@pytest.mark.parametrize(
    ("backend", "compute"),
    [
        ("torch", "float64"),
        ("cpu", "float32"),
        ("cpu", "bfloat16"),
        pytest.param("triton", "bfloat16", marks=pytest.mark.gpu),
    ],
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
    exact, _ = filtered_results(backend, compute, case, need_w, NOTHING)
    filtered, skipped = filtered_results(backend, compute, case, need_w, delta)
    assert float(skipped.mass.max()) <= delta
    if case.clustered:
        assert int(skipped.cells) > 0.5 * skipped.of
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
    if not case.clustered and delta > 0.1 and not need_w:  # cells of about a fifth each
        assert float(skipped.mass.max()) > 0.1
        assert float(error.max()) > 0.01


@needs_triton
def test_explain_says_why_triton_lost() -> None:
    text = str(explain("margin_softmax", device=DEVICE, dtype="bfloat16", dim=100))
    assert "triton: takes D = 16 … 8192 in multiples of 8, not 100" in text
    assert "triton: takes bfloat16, float16, not float32" in str(
        explain("margin_softmax", device=DEVICE, dtype="float32", dim=64)
    )
