"""margin_softmax against a NumPy fp64 oracle, each back end forced by name."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pymcip.losses import ArcMargin, MCArcMargin, info_nce
from pymcip.ops import margin_softmax
from pymcip.ops.margin_contract import margin_logit
from pymcip.ops.margin_softmax import POSITIVES, MarginOptions, margin_softmax_filtered

EXACT = ("torch", "cpu")  # those that take fp32 operands


def oracle(
    x: np.ndarray,
    w: np.ndarray,
    positives: list[list[int]],
    scale: float,
    margin: float,
    continuation: str = "linear",
    weights: list[list[float]] | None = None,
    positives_are: str = "apart",
    repel: float = 0.0,
) -> np.ndarray:
    """The formulas of the module's contract, row by row, in fp64 with Python floats."""
    x = x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    w = w.astype(np.float64) / np.linalg.norm(w.astype(np.float64), axis=1, keepdims=True)
    losses = np.zeros(len(x))
    for i, own in enumerate(positives):
        cosines = x[i] @ w.T
        others = np.delete(scale * cosines, own)
        shares, values = [], []
        for n, p in enumerate(own):
            theta = math.acos(min(1.0, max(-1.0, cosines[p])))
            value = math.cos(theta + margin)
            if continuation == "linear" and theta + margin > math.pi:
                value = cosines[p] - margin * math.sin(margin)
            if continuation == "easy" and cosines[p] <= 0:
                value = cosines[p]
            shares.append(1 / len(own) if weights is None else weights[i][n])
            values.append(scale * value)
        log_z = np.logaddexp.reduce(others) if len(others) else -math.inf
        for share, value in zip(shares, values, strict=True):
            below = np.logaddexp.reduce(
                [log_z, *values] if positives_are == "compete" else [log_z, value]
            )
            losses[i] += share * (below - value)
        if repel and own and len(others):
            every = np.concatenate([others, values])
            losses[i] += repel * max(np.logaddexp.reduce(every) - other for other in others)
    return losses


def csr(positives: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    counts = torch.tensor([0] + [len(own) for own in positives])
    flat = [column for own in positives for column in own]
    return counts.cumsum(0), torch.tensor(flat, dtype=torch.int64)


def problem(
    rows: int, columns: int, dim: int, per_row: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, list[list[int]]]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, dim)).astype(np.float32) * rng.uniform(0.1, 9, (rows, 1))
    w = rng.standard_normal((columns, dim)).astype(np.float32)
    x[: rows // 2] += 2 * w[rng.integers(0, columns, rows // 2)]
    own = [rng.choice(columns, min(per_row, columns), replace=False).tolist() for _ in range(rows)]
    return x.astype(np.float32), w, own


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("positives", POSITIVES)
@pytest.mark.parametrize("continuation", ["linear", "none", "easy"])
@pytest.mark.parametrize(
    ("rows", "columns", "dim", "per_row", "scale", "margin"),
    [
        (1, 1, 8, 1, 30.0, 0.5),
        (1, 2, 8, 1, 64.0, 0.5),
        (7, 100, 16, 1, 30.0, 0.0),
        (7, 100, 16, 5, 16.0, 0.3),
        (33, 1000, 64, 50, 64.0, 0.5),
        (5, 20, 16, 20, 30.0, 0.3),
        (4, 50, 16, 0, 30.0, 0.3),
    ],
)
def test_matches_fp64(
    backend: str,
    positives: str,
    continuation: str,
    rows: int,
    columns: int,
    dim: int,
    per_row: int,
    scale: float,
    margin: float,
) -> None:
    x, w, own = problem(rows, columns, dim, per_row)
    expected = oracle(x, w, own, scale, margin, continuation, positives_are=positives)
    options: dict[str, Any] = {"scale": scale, "margin": margin, "continuation": continuation}
    options["positives"] = positives
    found = margin_softmax(
        torch.from_numpy(x), torch.from_numpy(w), *csr(own), chunk=37, backend=backend, **options
    )
    # A cosine's error is at most about (dim + 3) u with u = 2^-24 (dot product and two norms); near
    # |cos| = 1 the sine magnifies it by at most 1e3 (sin^2 >= 1e-6), elsewhere in these data by < 10.
    # The loss is 2 scale-Lipschitz in the cosines, and log-sum-exp adds (columns) u at most.
    bound = 2.0**-24 * (2 * 10 * scale * (dim + 3) + columns) + 1e-6
    assert np.abs(found.numpy() - expected).max() <= bound


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("positives", POSITIVES)
def test_weights_of_positives(positives: str, backend: str) -> None:
    x, w, own = problem(6, 40, 16, 3)
    weights = [[0.5, 0.25, 0.0] for _ in own]
    flat = torch.tensor(weights).flatten()
    found = margin_softmax(
        torch.from_numpy(x), torch.from_numpy(w), *csr(own),
        weights=flat, backend=backend, positives=positives,
    )  # fmt: skip
    expected = oracle(x, w, own, 30.0, 0.0, weights=weights, positives_are=positives)
    assert np.abs(found.numpy() - expected).max() < 1e-4


@pytest.mark.parametrize(("positives", "repel"), [("apart", 0), ("compete", 0), ("compete", 0.3)])
@pytest.mark.parametrize("continuation", ["linear", "none", "easy"])
@pytest.mark.parametrize("per_row", [0, 1, 3, 9])
def test_gradcheck(positives: str, repel: float, continuation: str, per_row: int) -> None:
    x, w, own = problem(4, 9, 5, per_row, seed=3)
    arguments = (
        torch.from_numpy(x).double().requires_grad_(),
        torch.from_numpy(w).double().requires_grad_(),
    )

    def run(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return margin_softmax(
            x, w, *csr(own), scale=8.0, margin=0.4, continuation=continuation, chunk=4,
            positives=positives, repel=repel,
        )  # fmt: skip

    assert torch.autograd.gradcheck(run, arguments)


REPEL = {"positives": "compete", "repel": 0.3}


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("per_row", [0, 1, 5, 40])
def test_the_farthest_negative_in_fp64_and_fp32(backend: str, per_row: int) -> None:
    x, w, own = problem(7, 40, 16, per_row)
    expected = oracle(x, w, own, 20.0, 0.2, positives_are="compete", repel=0.3)
    options: dict[str, Any] = {"scale": 20.0, "margin": 0.2, "chunk": 7, **REPEL}
    found = margin_softmax(*map(torch.from_numpy, (x, w)), *csr(own), backend=backend, **options)
    assert np.abs(found.numpy() - expected).max() < 1e-3
    exact = (torch.from_numpy(value).double() for value in (x, w))
    found = margin_softmax(*exact, *csr(own), **options)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", EXACT)
def test_gradients_with_the_farthest_negative(backend: str) -> None:
    x, w, own = problem(6, 30, 16, 3, seed=4)
    own[1] = []  # no loss, no gradient
    options: dict[str, Any] = {"scale": 10.0, "margin": 0.2, "chunk": 7, **REPEL}
    drawn = torch.rand(6, dtype=torch.float64)
    for need_w in (True, False):
        gradients = []
        for dtype, name in ((torch.float64, "torch"), (torch.float32, backend)):
            rows = torch.from_numpy(x).to(dtype).requires_grad_()
            columns = torch.from_numpy(w).to(dtype).requires_grad_(need_w)
            loss = margin_softmax(rows, columns, *csr(own), backend=name, **options)
            (loss * drawn).sum().backward()
            gradients.append([v.grad for v in (rows, columns) if v.grad is not None])
        assert bool((gradients[0][0][1] == 0).all())
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(other.double(), one, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("continuation", ["linear", "none", "easy"])
@pytest.mark.parametrize("cosine", [1.0, -1.0])
def test_gradient_is_finite_at_the_poles(continuation: str, cosine: float) -> None:
    w = torch.eye(3, 8)
    x = (cosine * w[:1]).requires_grad_()
    loss = margin_softmax(
        x, w, *csr([[0]]), scale=64.0, margin=0.5, continuation=continuation
    ).sum()
    loss.backward()
    assert torch.isfinite(loss)
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def test_slope_is_the_derivative_where_the_sine_is_not_clamped() -> None:
    cosine = torch.linspace(-0.999, 0.999, 401, dtype=torch.float64)
    step = 1e-7
    for continuation in ("linear", "none", "easy"):
        _, slope = margin_logit(cosine, 0.5, continuation)
        above, _ = margin_logit(cosine + step, 0.5, continuation)
        below, _ = margin_logit(cosine - step, 0.5, continuation)
        numeric = (above - below) / (2 * step)
        kink = 0.0 if continuation == "easy" else -math.cos(0.5)
        smooth = (cosine - kink).abs() > 1e-3
        assert torch.allclose(slope[smooth], numeric[smooth], rtol=1e-4, atol=1e-5)


def test_equals_cross_entropy_without_margin() -> None:
    x, w, own = problem(16, 64, 32, 1)
    unit_x = torch.nn.functional.normalize(torch.from_numpy(x).double(), dim=1)
    unit_w = torch.nn.functional.normalize(torch.from_numpy(w).double(), dim=1)
    labels = torch.tensor(own).flatten()
    expected = torch.nn.functional.cross_entropy(20 * unit_x @ unit_w.T, labels, reduction="none")
    found = margin_softmax(unit_x, unit_w, *csr(own), scale=20.0, chunk=10)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)


def test_the_authors_form_in_fp64() -> None:
    """Loss and gradients of the softmax that the authors' scripts take, by torch's own autograd."""
    x, w, own = problem(9, 60, 16, 4, seed=5)
    ours, theirs = (
        [torch.from_numpy(value).double().requires_grad_() for value in (x, w)] for _ in range(2)
    )
    found = margin_softmax(*ours, *csr(own), scale=20.0, margin=0.1, positives="compete")
    cosine = torch.nn.functional.normalize(theirs[0]) @ torch.nn.functional.normalize(theirs[1]).T
    target = torch.zeros_like(cosine, dtype=torch.bool)
    for row, columns in enumerate(own):
        target[row, columns] = True
    logits = 20 * torch.where(target, torch.cos(torch.acos(cosine) + 0.1), cosine)
    expected = -(logits.log_softmax(1) * target).sum(1) / target.sum(1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    drawn = torch.rand(9, dtype=torch.float64)
    for loss in (found, expected):
        (loss * drawn).sum().backward()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-12)


def test_duplicate_positives_columns_are_no_negatives_of_each_other() -> None:
    """Two equal caption rows, both positive: neither is pushed away; one of them alone is."""
    x = torch.tensor([[1.0, 0.2]])
    w = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    both = margin_softmax(x, w, *csr([[0, 1]]))
    one = margin_softmax(x, w, *csr([[0]]))
    assert both.item() < 1e-6
    assert one.item() > 0.6


def test_large_scale_does_not_overflow_or_vanish() -> None:
    """All columns at cos = -1: exp(-s) underflows in fp32 unless the sum is taken in logs."""
    w = torch.eye(1, 8).repeat(3, 1)
    loss = margin_softmax(-torch.eye(1, 8), w, *csr([[0]]), scale=200.0)
    assert loss.item() == pytest.approx(math.log(3), abs=1e-5)


def test_autocast_does_not_lower_the_precision() -> None:
    x, w, own = problem(8, 100, 32, 2)
    arguments = (torch.from_numpy(x), torch.from_numpy(w), *csr(own))
    plain = margin_softmax(*arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = margin_softmax(*arguments)
    assert torch.equal(plain, mixed)


def test_half_precision_bank_is_converted_by_chunks() -> None:
    x, w, own = problem(8, 100, 32, 2)
    bank = torch.from_numpy(w).half()
    found = margin_softmax(torch.from_numpy(x), bank, *csr(own), chunk=7)
    expected = margin_softmax(torch.from_numpy(x), bank.float(), *csr(own))
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 40),
    dim=st.integers(1, 20),
    chunk=st.integers(1, 50),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_chunks_do_not_matter(
    rows: int, columns: int, dim: int, chunk: int, seed: int, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, dim))
    w = rng.standard_normal((columns, dim))
    own = [
        data.draw(st.lists(st.integers(0, columns - 1), unique=True, max_size=columns))
        for _ in range(rows)
    ]
    tensors = [torch.from_numpy(value).requires_grad_() for value in (x, w)]
    loss = margin_softmax(*tensors, *csr(own), scale=12.0, margin=0.3, chunk=chunk)
    assert np.abs(loss.detach().numpy() - oracle(x, w, own, 12.0, 0.3)).max() < 1e-9
    loss.sum().backward()
    whole = [torch.from_numpy(value).requires_grad_() for value in (x, w)]
    margin_softmax(*whole, *csr(own), scale=12.0, margin=0.3, chunk=columns).sum().backward()
    for one, other in zip(tensors, whole, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.allclose(one.grad, other.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": 0.0}, "scale > 0"),
        ({"margin": 4.0}, "margin < pi"),
        ({"continuation": "hard"}, "allowed: linear"),
        ({"positives": "both"}, "allowed: apart, compete"),
        ({"repel": 0.1}, "positives='compete'"),
        ({"repel": -0.1, "positives": "compete"}, "repel >= 0"),
        ({"chunk": 0}, "at least 1"),
        ({"scratch": 0}, "at least 1"),
        ({"delta": 1.0}, "delta < 1"),
        ({"delta": -0.1}, "0 <= delta"),
        ({"compute": "int8"}, "allowed: auto, float64"),
        ({"w_norms": torch.ones(4)}, r"need \[C\]"),
        ({"weights": torch.ones(9)}, "weights"),
    ],
)
def test_bad_options(change: dict[str, Any], message: str) -> None:
    x, w, own = problem(3, 5, 4, 1)
    with pytest.raises(ValueError, match=message):
        margin_softmax(torch.from_numpy(x), torch.from_numpy(w), *csr(own), **change)


@pytest.mark.parametrize("backend", ["torch", "cpu", "triton"])
def test_no_rows(backend: str) -> None:
    x = torch.zeros(0, 16, requires_grad=True)
    none = torch.empty(0, dtype=torch.int64)
    compute = "bfloat16" if backend == "triton" else "float32"
    loss = margin_softmax(
        x,
        torch.ones(5, 16),
        torch.zeros(1, dtype=torch.int64),
        none,
        backend=backend,
        compute=compute,
    )
    loss.sum().backward()
    assert loss.shape == (0,)
    assert x.grad is not None


@pytest.mark.parametrize("backend", EXACT)
def test_the_filter_works_in_whole_cells_whatever_the_chunk(backend: str) -> None:
    x, w, own = problem(5, 600, 16, 1)
    found = [
        margin_softmax_filtered(
            torch.from_numpy(x).requires_grad_(), torch.from_numpy(w), *csr(own),
            delta=0.5, chunk=chunk, backend=backend,
        )[1]
        for chunk in (37, 600)
    ]  # fmt: skip
    assert found[0].of == 3
    assert int(found[0].cells) == int(found[1].cells)
    assert torch.allclose(found[0].mass, found[1].mass, rtol=1e-5)


def test_bad_tensors() -> None:
    x, w = torch.ones(3, 4), torch.ones(5, 4)
    with pytest.raises(ValueError, match=r"need \[B, D\] and \[C, D\]"):
        margin_softmax(x, torch.ones(5, 3), *csr([[0]] * 3))
    with pytest.raises(ValueError, match="at least one column"):
        margin_softmax(x, torch.ones(0, 4), *csr([[]] * 3))
    with pytest.raises(ValueError, match=r"rows 0\.\.4"):
        margin_softmax(x, w, *csr([[0], [1], [5]]))
    with pytest.raises(ValueError, match="indptr"):
        margin_softmax(x, w, *csr([[0]]))
    with pytest.raises(ValueError, match="must rise"):
        margin_softmax(x, w, torch.tensor([0, 2, 1, 3]), torch.tensor([0, 1, 2]))


def test_arc_margin_module_is_mc_arc_margin_with_one_positive() -> None:
    x, w, own = problem(6, 30, 16, 1)
    arc = ArcMargin(30, 16, scale=20.0, margin=0.4, chunk=7)
    with torch.no_grad():
        arc.weight.copy_(torch.from_numpy(w))
    several = MCArcMargin(torch.from_numpy(w), scale=20.0, margin=0.4)
    images, labels = torch.from_numpy(x), torch.tensor(own).flatten()
    assert torch.allclose(arc(images, labels), several(images, *csr(own)), rtol=1e-6, atol=1e-6)
    arc(images, labels).sum().backward()
    assert arc.weight.grad is not None
    assert arc.weight.grad.abs().sum() > 0


def test_info_nce_by_hand_and_with_repeated_captions() -> None:
    images = torch.eye(3)
    texts = torch.eye(3)
    # every row: -log(e^2 / (e^2 + 1 + 1)), in both directions
    expected = math.log(math.exp(2) + 2) - 2
    assert info_nce(images, texts, 2.0).item() == pytest.approx(expected, rel=1e-6)
    # captions 0 and 1 are the same row: not negatives of each other's images
    ids = torch.tensor([7, 7, 8])
    masked = info_nce(images, texts, 2.0, text_ids=ids).item()
    two = math.log(math.exp(2) + 1) - 2
    assert masked == pytest.approx((2 * two + expected) / 3, rel=1e-6)


@pytest.mark.parametrize(
    ("gibibytes", "expected"), [(8, 1 << 28), (40, 40 << 24), (80, 80 << 24), (141, 1 << 31)]
)
def test_scratch_by_the_memory_of_the_device(
    gibibytes: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = SimpleNamespace(total_memory=gibibytes << 30)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: gpu)
    assert MarginOptions().scratch_bytes(torch.device("cuda")) == expected
    assert MarginOptions().scratch_bytes(torch.device("cpu")) == 1 << 28
    assert MarginOptions(scratch=5).scratch_bytes(torch.device("cuda")) == 5
