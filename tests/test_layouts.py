"""Every op and back end reads a matrix of any layout as it reads the contiguous one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from pymcip.ops import backends, margin_softmax, ranks, topk
from pymcip.ops.canonical import canonical_matrix, canonical_topk
from pymcip.ops.margin_softmax import probe_triton
from pymcip.ops.topk_triton import probe_triton_topk, topk_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def wider(matrix: Tensor, columns: int) -> Tensor:
    """A matrix of NaN, as high and that much wider, to be sliced."""
    return matrix.new_full((len(matrix), columns), torch.nan)


def column_slice(matrix: Tensor) -> Tensor:
    wide = wider(matrix, matrix.shape[1] + 24)
    wide[:, 8:-16] = matrix
    return wide[:, 8:-16]


def every_other_column(matrix: Tensor) -> Tensor:
    wide = wider(matrix, 2 * matrix.shape[1])
    wide[:, ::2] = matrix
    return wide[:, ::2]


def every_other_row(matrix: Tensor) -> Tensor:
    return wider(matrix, 2 * matrix.shape[1]).view(-1, matrix.shape[1])[::2].copy_(matrix)


def row_slice(matrix: Tensor) -> Tensor:
    return torch.cat([matrix[:3] * torch.nan, matrix, matrix[:2] * torch.nan])[3:-2]


def off_by_one(matrix: Tensor) -> Tensor:
    """Dense, but no row starts at a multiple of 16 bytes, nor does the matrix."""
    return matrix.new_full((matrix.numel() + 1,), torch.nan)[1:].view_as(matrix).copy_(matrix)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda matrix: matrix.T.contiguous().T,
    "column slice": column_slice,
    "row slice": row_slice,
    "every other column": every_other_column,
    "every other row": every_other_row,
    "off by one": off_by_one,
    "one row, expanded": lambda matrix: matrix[:1].expand_as(matrix),
    "one row of a wider matrix": lambda matrix: wider(matrix, 83)[:1, : matrix.shape[1]].copy_(
        matrix[:1]
    ),
}
EVERY_LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)


def gaussian(seed: int, rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
    values = torch.randn(rows, 72, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype).to(DEVICE)


def both(matrix: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """In this layout, and the same values dense."""
    laid_out = LAYOUTS[layout](matrix)
    dense = laid_out.clone(memory_format=torch.contiguous_format)
    assert torch.equal(laid_out, dense)
    same = laid_out.stride() == dense.stride() and laid_out.data_ptr() % 16 == 0
    assert not same or layout == "row slice"
    return laid_out, dense


# --- margin_softmax: 12 rows, 140 columns -------------------------------------------------------

COMPUTE = [
    ("torch", "float32"),
    ("cpu", "float32"),
    ("cpu", "bfloat16"),
    pytest.param("triton", "bfloat16", marks=pytest.mark.gpu),
    pytest.param("triton", "float16", marks=pytest.mark.gpu),
]


def loss_and_gradients(
    x: Tensor, w: Tensor, norms: Tensor | None, backend: str, compute: str
) -> list[Tensor]:
    """W is frozen where its norms are given."""
    if backend == "cpu" and DEVICE != "cpu":
        pytest.skip("runs where there is no GPU")
    if backend == "triton" and (missing := probe_triton()) is not None:
        pytest.skip(missing)
    x = x.detach().requires_grad_()
    w = w.detach().requires_grad_(norms is None)
    generator = torch.Generator().manual_seed(2)
    indices = torch.randint(len(w), (len(x),), generator=generator).to(DEVICE)
    loss = margin_softmax(
        x, w, torch.arange(len(x) + 1, device=DEVICE), indices,
        w_norms=norms, scale=16.0, margin=0.1, backend=backend, compute=compute,
    )  # fmt: skip
    return [loss.detach(), *torch.autograd.grad(loss.sum(), [x, w] if norms is None else [x])]


def assert_close(found: list[Tensor], expected: list[Tensor], error: float = 0.0) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.isfinite(one).all()
        assert float((one - other).norm()) <= error * float(other.norm())


@EVERY_LAYOUT
@pytest.mark.parametrize(("backend", "compute"), COMPUTE)
def test_margin_softmax_rows(layout: str, backend: str, compute: str) -> None:
    laid_out, dense = both(gaussian(0, 12), layout)
    w = gaussian(1, 140)
    found, expected = (loss_and_gradients(x, w, None, backend, compute) for x in (laid_out, dense))
    assert_close(found, expected)


@EVERY_LAYOUT
@pytest.mark.parametrize(("backend", "compute"), COMPUTE)
@pytest.mark.parametrize("bank", ["trainable", *HALVES])
def test_margin_softmax_bank(layout: str, backend: str, compute: str, bank: str) -> None:
    """A frozen bank in 16 bits is read where it lies, rows of any norm."""
    dtype = HALVES.get(bank, torch.float32)
    scales = torch.rand(140, 1, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    laid_out, dense = both((gaussian(1, 140) * (0.5 + scales)).to(dtype), layout)
    norms = None if bank == "trainable" else dense.float().norm(dim=1)
    found, expected = (
        loss_and_gradients(gaussian(0, 12), w, norms, backend, compute) for w in (laid_out, dense)
    )
    # Where its rows are not aligned, the kernels take a copy, rounded again as unit rows; each of the
    # two is off by a few roundings of a cosine, scale 2^-9 and scale 2^-12.
    copied = backend == "triton" and bank in HALVES and layout == "off by one"
    assert_close(found, expected, 2.0**-6 if copied else 0.0)


# --- topk and ranks: 9 queries, a bank of 90 rows ------------------------------------------------


def laid_out_pairs(layout: str, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Queries and a bank, one of them in this layout."""
    queries, bank = gaussian(4, 9, dtype), gaussian(5, 90, dtype)
    return [(both(queries, layout)[0], bank), (queries, both(bank, layout)[0])]


def triton_topk(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    ids, scores = topk_triton(queries, bank, k, -np.inf, exact=True, threads=1, progress=None)
    return ids, scores


@EVERY_LAYOUT
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES.values()], ids=str)
@pytest.mark.parametrize(
    "backend",
    [
        pytest.param(row.name, marks=pytest.mark.gpu if row.name == "cuda" else ())
        for row in backends("topk")
        if row.name != "faiss"  # it is not exact: test_topk_faiss.py
    ],
)
def test_topk(layout: str, dtype: torch.dtype, backend: str) -> None:
    (row,) = (row for row in backends("topk") if row.name == backend)
    interpreted = backend == "triton" and DEVICE == "cpu"  # in the table it is for GPUs only
    name = str(dtype).removeprefix("torch.")
    reason = probe_triton_topk() if interpreted else row.obstacle(DEVICE, name, k=5, dim=72)
    if reason is not None:
        pytest.skip(reason)
    for queries, bank in laid_out_pairs(layout, dtype):
        if interpreted:
            ids, scores = triton_topk(queries, bank, 5)
        else:
            ids, scores = topk(queries, bank, 5, backend=backend)
        dense = (
            matrix.cpu().clone(memory_format=torch.contiguous_format) for matrix in (queries, bank)
        )
        wanted_ids, wanted_scores = canonical_topk(*dense, 5)
        np.testing.assert_array_equal(ids.cpu(), wanted_ids)
        np.testing.assert_array_equal(scores.cpu(), wanted_scores)


@EVERY_LAYOUT
@pytest.mark.parametrize("backend", [row.name for row in backends("ranks")])
def test_ranks(layout: str, backend: str) -> None:
    if backend == "cpu" and DEVICE != "cpu":
        pytest.skip("runs where there is no GPU")
    for queries, bank in laid_out_pairs(layout, torch.float32):
        indptr, asked = torch.arange(len(queries) + 1), torch.arange(len(queries)) * 8 % len(bank)
        found = ranks(queries, bank, indptr, asked, backend=backend)
        score = np.asarray(canonical_matrix(queries.cpu(), bank.cpu()))
        own = score[np.arange(len(queries)), asked][:, None]
        earlier = np.arange(len(bank)) < asked.numpy()[:, None]
        better = (score > own) | ((score == own) & earlier)
        np.testing.assert_array_equal(found.cpu(), better.sum(1))
