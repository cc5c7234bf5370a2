"""order_bank: a permutation, and one that lets the certified filter leave out what it should."""

from __future__ import annotations

import doctest
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import pymcip.ops
from pymcip.errors import ConfigError, DataError
from pymcip.ops import margin_softmax, order_bank, ordering
from pymcip.ops.margin_contract import CELL_COLUMNS, CELL_ROWS
from pymcip.ops.margin_softmax import Skipped, margin_softmax_filtered

ROWS, CLUSTERS, DIM, NEAR, SCALE = CELL_ROWS, 32, 128, 4, 64.0


def spread(directions: Tensor, generator: torch.Generator) -> Tensor:
    """Unit rows at a cosine of about sqrt(0.8) to the given ones."""
    noise = torch.randn(directions.shape, generator=generator, dtype=torch.float64)
    return normalize(0.8**0.5 * directions + 0.2**0.5 * normalize(noise, dim=1), dim=1)


def clustered(seed: int = 0) -> tuple[Tensor, Tensor]:
    """A shuffled bank of 32 clusters of 256 rows, and 128 rows near 4 of them; fp64.

    exp(64 cos) is about e^51 in a row's own cluster. Cosines to the centres of the other ones are
    below 0.4 (4.5 standard deviations of a random cosine), so even e^32 a column is an upper bound:
    those 8192 columns hold less than 1e-6 of the mass.
    """
    generator = torch.Generator().manual_seed(seed)
    centres = normalize(torch.randn(CLUSTERS, DIM, generator=generator, dtype=torch.float64), dim=1)
    bank = spread(centres.repeat_interleave(CELL_COLUMNS, 0), generator)
    x = spread(centres[:NEAR].repeat(ROWS // NEAR, 1), generator)
    lengths = torch.rand(ROWS, 1, generator=generator, dtype=torch.float64) * 5 + 0.2
    return bank[torch.randperm(len(bank), generator=generator)], x * lengths


def unstructured(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random directions in few dimensions, where mass falls off quickly, and 4 rows; fp64."""
    generator = torch.Generator().manual_seed(seed)
    bank = torch.randn(8192, 8, generator=generator, dtype=torch.float64)
    return bank, torch.randn(4, 8, generator=generator, dtype=torch.float64)


def positives(x: Tensor, bank: Tensor) -> tuple[Tensor, Tensor]:
    """Two columns for every row but the first, which has none: CSR, int64."""
    generator = torch.Generator().manual_seed(1)
    pairs = [torch.randperm(len(bank), generator=generator)[:2] for _ in range(len(x) - 1)]
    return torch.arange(-1, len(x)).clamp_min(0) * 2, torch.cat(pairs)


def gradient(
    x: Tensor, bank: Tensor, indptr: Tensor, indices: Tensor, delta: float
) -> tuple[Tensor, Tensor, Skipped]:
    x = x.clone().requires_grad_()
    loss, skipped = margin_softmax_filtered(
        x, bank, indptr, indices, scale=SCALE, margin=0.3, delta=delta, backend="torch"
    )
    loss.sum().backward()
    assert x.grad is not None
    return loss.detach(), x.grad, skipped


def test_it_is_public() -> None:
    assert "order_bank" in pymcip.ops.__all__


@pytest.mark.parametrize("flat", [8192, 4], ids=["flat", "groups"])
@pytest.mark.parametrize("iterations", [0, 1, 12])
@pytest.mark.parametrize(("count", "cluster_size"), [(700, 64), (257, 256), (65, 1)])
def test_it_is_a_permutation_and_the_same_again(
    count: int, cluster_size: int, iterations: int, flat: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ordering.FLAT, "cpu", flat)
    monkeypatch.setattr(ordering, "CHUNK_ROWS", 100)
    monkeypatch.setattr(ordering, "SCORES", 1000)
    bank = torch.randn(count, 5, generator=torch.Generator().manual_seed(0))
    order = order_bank(bank, cluster_size=cluster_size, iterations=iterations)
    assert order.dtype == torch.int64
    assert torch.equal(order.sort().values, torch.arange(count))
    before = torch.get_rng_state()
    assert torch.equal(order, order_bank(bank, cluster_size=cluster_size, iterations=iterations))
    assert torch.equal(before, torch.get_rng_state())
    if cluster_size > 1:  # else every row is a centroid
        other = order_bank(bank, cluster_size=cluster_size, iterations=iterations, seed=1)
        assert not torch.equal(order, other)


@pytest.mark.parametrize("flat", [8192, 8], ids=["flat", "groups"])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_filter_leaves_out_what_is_far(
    seed: int, flat: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """See `clustered`: only cells with rows of the 4 near clusters have mass worth keeping.

    Shuffled, a cell has 8 rows of each cluster on average, and about 1/32 of each row's mass, so
    none can go at 1e-3. Ordered, 256 consecutive rows lie in at most 2 cells, so 4 clusters keep
    at most 8 of 32.
    """
    monkeypatch.setitem(ordering.FLAT, "cpu", flat)
    bank, x = clustered(seed)
    indptr, indices = positives(x, bank)
    _, _, shuffled = gradient(x, bank, indptr, indices, 1e-3)
    order = order_bank(bank)
    _, _, ordered = gradient(x, bank[order], indptr, order.argsort()[indices], 1e-3)
    assert shuffled.of == ordered.of == CLUSTERS
    assert int(shuffled.cells) == 0
    assert int(ordered.cells) >= CLUSTERS - 2 * NEAR


@pytest.mark.parametrize("make", [clustered, unstructured])
@pytest.mark.parametrize("delta", [1e-3, 0.1])
def test_losses_stay_and_the_gradient_is_within_its_bound(make, delta: float) -> None:
    bank, x = make()
    indptr, indices = positives(x, bank)
    exact_loss, exact, nothing = gradient(x, bank, indptr, indices, 0.0)
    assert int(nothing.cells) == 0
    order = order_bank(bank)
    loss, grad, skipped = gradient(x, bank[order], indptr, order.argsort()[indices], delta)
    torch.testing.assert_close(loss, exact_loss, rtol=1e-12, atol=1e-12)
    assert int(skipped.cells) > 0
    assert float(skipped.mass.max()) <= delta
    error, norms = (grad - exact).norm(dim=1), x.norm(dim=1)
    rounding = 1e-12 * exact.norm(dim=1)
    assert bool((error <= SCALE * skipped.mass / norms + rounding).all())
    assert bool((error <= SCALE * delta / norms).all())
    assert float(error.max()) > 0  # or the bound was tested on nothing


def test_the_docstring_s_example() -> None:
    bank, x = clustered()
    indptr, indices = positives(x, bank)
    names = {"order_bank": order_bank, "bank": bank, "indices": indices}
    example = doctest.DocTestParser().get_doctest(
        str(order_bank.__doc__), names, "order_bank", None, None
    )
    assert len(example.examples) == 3
    assert doctest.DocTestRunner().run(example, clear_globs=False).failed == 0
    moved, moved_indices = example.globs["bank"], example.globs["indices"]
    assert not torch.equal(moved, bank)
    assert torch.equal(moved[moved_indices], bank[indices])
    assert torch.equal(example.globs["order"][moved_indices], indices)
    torch.testing.assert_close(
        margin_softmax(x, moved, indptr, moved_indices, backend="torch"),
        margin_softmax(x, bank, indptr, indices, backend="torch"),
        rtol=1e-12,
        atol=1e-12,
    )


def test_arrays_and_memory_maps_give_the_tensor_s_order(tmp_path: Path) -> None:
    bank = np.random.default_rng(0).standard_normal((600, 6)).astype(np.float16)
    np.save(tmp_path / "bank.npy", bank)
    expected = order_bank(torch.from_numpy(bank), cluster_size=32)
    for array in (
        bank,
        np.load(tmp_path / "bank.npy", mmap_mode="r"),
        np.asfortranarray(bank),
        bank.astype(np.float64),
        bank.astype(">f4"),
    ):
        order = order_bank(array, cluster_size=32)
        assert isinstance(order, np.ndarray)
        assert order.dtype == np.int64
        np.testing.assert_array_equal(order, expected.numpy())
    bfloat16 = torch.from_numpy(bank).bfloat16().requires_grad_()
    assert len(order_bank(bfloat16, cluster_size=32)) == 600


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_lengths_do_not_matter(dtype: type) -> None:
    rng = np.random.default_rng(0)
    bank = rng.standard_normal((400, 6)).astype(dtype)
    lengths = 2.0 ** rng.integers(-100, 100, (400, 1)).astype(dtype)  # exact
    order = order_bank(bank, cluster_size=16)
    np.testing.assert_array_equal(order_bank(bank * lengths, cluster_size=16), order)


def test_zeros_come_last_and_small_banks_stay() -> None:
    bank = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    bank[[7, 123, 256]] = 0
    assert order_bank(bank, cluster_size=16)[-3:].tolist() == [7, 123, 256]
    assert order_bank(bank[:9]).tolist() == [0, 1, 2, 3, 4, 5, 6, 8, 7]
    assert order_bank(bank[:0]).tolist() == []
    assert order_bank(bank[:1]).tolist() == [0]
    assert order_bank(torch.zeros(40, 3), cluster_size=4).tolist() == list(range(40))
    assert order_bank(np.zeros((0, 3), np.float32)).shape == (0,)


def test_duplicates_stand_together() -> None:
    ids = torch.arange(600) % 3
    order = order_bank(torch.eye(3, 5)[ids], cluster_size=200)
    assert int((ids[order].diff() != 0).sum()) == 2
    assert bool((order.view(3, 200).diff(dim=1) > 0).all())  # ties by row id
    for cluster_size in (1, 16):  # more centroids than distinct rows
        for bank in (torch.ones(100, 5), torch.eye(3, 5)[ids]):
            order = order_bank(bank, cluster_size=cluster_size)
            assert torch.equal(order.sort().values, torch.arange(len(bank)))


def test_clusters_that_are_near_stand_near() -> None:
    """Rows on a half circle: neighbours in the order are near on it."""
    angles = torch.rand(2000, generator=torch.Generator().manual_seed(0)) * torch.pi
    bank = torch.stack([angles.cos(), angles.sin()], dim=1)
    order = order_bank(bank, cluster_size=50)
    means = angles[order].view(-1, 50).mean(1)
    # 40 clusters of pi/40 each; a random order would be pi/3 apart on average.
    assert float(means.diff().abs().mean()) < 3 * torch.pi / 40


@pytest.mark.parametrize("count", [100, 3000])
@pytest.mark.parametrize(("value", "what"), [(np.nan, "NaN"), (-np.inf, "infinity")])
@pytest.mark.parametrize("row", [3, 98])
def test_rows_that_are_not_finite(count: int, value: float, what: str, row: int) -> None:
    bank = np.random.default_rng(0).standard_normal((count, 4)).astype(np.float16)
    bank[row, 2] = value
    for kind in (bank, torch.from_numpy(bank)):
        with pytest.raises(DataError, match=f"row {row} of the bank holds {what}"):
            order_bank(kind)


def test_wrong_arguments() -> None:
    bank = torch.randn(4, 3)
    with pytest.raises(ConfigError, match=r"bank is torch\.int64; allowed: a NumPy array"):
        order_bank(bank.long())
    with pytest.raises(ConfigError, match="bank is list; allowed"):
        order_bank([[1.0]])
    for shape in ((4,), (4, 0), (1, 2, 3)):
        with pytest.raises(ConfigError, match="bank has shape"):
            order_bank(np.zeros(shape, np.float32))
    with pytest.raises(ConfigError) as caught:
        order_bank(bank, cluster_size=0, iterations=-1, seed=0.5)  # type: ignore[arg-type]
    assert [problem.split()[1] for problem in caught.value.problems] == [
        "cluster_size=0",
        "iterations=-1",
        "seed=0.5",
    ]


def test_progress() -> None:
    seen: list[tuple[int, int]] = []
    bank = torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
    order_bank(bank, cluster_size=50, iterations=2, progress=lambda *pair: seen.append(pair))
    assert [done for done, _ in seen] == [320, 640, 1140]  # two steps over 320 rows, then all
    assert {total for _, total in seen} == {1140}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu() -> None:
    bank, x = clustered()
    indptr, indices = positives(x, bank)
    order = order_bank(bank.half().numpy(), device="cuda")
    on_device = order_bank(bank.half().cuda())
    assert on_device.device.type == "cuda"
    np.testing.assert_array_equal(on_device.cpu().numpy(), order)
    _, _, skipped = gradient(
        x, bank[order], indptr, torch.from_numpy(order).argsort()[indices], 1e-3
    )
    assert int(skipped.cells) >= CLUSTERS - 2 * NEAR
