"""Ranks against rankings of the score's definition, written out in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pymcip.errors import BackendError, ConfigError, DataError
from pymcip.ops import explain, ranks, ranks_torch
from pymcip.ops.topk_torch import product_error

BACKENDS = ("cpu", "torch")
few_settings = settings(max_examples=40, deadline=None)


@pytest.fixture(params=[(name, wide) for name in BACKENDS for wide in (False, True)])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each of them, with products in fp32 and in fp64."""
    name, wide = request.param
    monkeypatch.setattr(ranks_torch, "WIDE", -1.0 if wide else 2.0)
    return str(name)


def scores(queries: np.ndarray, bank: np.ndarray) -> np.ndarray:
    """fp32 [N, M], as pymcip.ops.canonical defines them."""
    lanes = np.zeros((len(queries), len(bank), 16))
    left, right = queries.astype(np.float64), bank.astype(np.float64)
    for column in range(queries.shape[1]):
        lanes[..., column % 16] += left[:, None, column] * right[None, :, column]
    for width in (8, 4, 2, 1):
        lanes = lanes[..., :width] + lanes[..., width : 2 * width]
    return lanes[..., 0].astype(np.float32)


def ranked(queries: np.ndarray, bank: np.ndarray, indptr: Any, indices: Any) -> list[int]:
    found = []
    for query, line in enumerate(scores(queries, bank)):
        order = sorted(range(len(bank)), key=lambda row: (-line[row], row))
        place = {row: rank for rank, row in enumerate(order)}
        found += [place[int(row)] for row in indices[indptr[query] : indptr[query + 1]]]
    return found


def asked(
    generator: np.random.Generator, queries: int, bank: int, most: int
) -> tuple[np.ndarray, np.ndarray]:
    """Up to `most` rows of each query, some twice, of every third query none."""
    sizes = generator.integers(0, most + 1, queries)
    sizes[::3] = 0
    indptr = np.concatenate([[0], np.cumsum(sizes)])
    return indptr, generator.integers(0, bank, indptr[-1])


def near_ties(generator: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """A few rows, repeated with some elements moved by a unit in the last place."""
    few = generator.standard_normal((5, columns)).astype(np.float32)
    bank = few[generator.integers(0, 5, rows)]
    moved = generator.random(bank.shape) < 0.5 / columns
    return np.where(moved, np.nextafter(bank, np.float32(9)), bank)


def test_by_hand(backend: str) -> None:
    # Scores of query 0: 3, 5, 3, -1, 5; of query 1: all 0, so that the lower number comes first.
    bank = np.array([[3.0], [5], [3], [-1], [5]], dtype=np.float32)
    queries = np.array([[1.0], [0.0]], dtype=np.float32)
    found = ranks(queries, bank, [0, 5, 7], [0, 1, 2, 3, 4, 4, 0], backend=backend)
    assert found.tolist() == [2, 0, 3, 4, 1, 4, 0]
    assert found.dtype == np.int64


@pytest.mark.parametrize(
    ("queries", "bank", "columns", "most"),
    [(1, 1, 1, 2), (9, 300, 7, 10), (7, 520, 16, 24), (6, 700, 33, 25), (5, 90, 100, 200)],
)
def test_random_rows(backend: str, queries: int, bank: int, columns: int, most: int) -> None:
    generator = np.random.default_rng(bank)
    q = generator.standard_normal((queries, columns)).astype(np.float32)
    b = generator.standard_normal((bank, columns)).astype(np.float32)
    indptr, indices = asked(generator, queries, bank, most)
    indptr, indices = np.append(indptr, indptr[-1] + 2), np.append(indices, [0, bank - 1])
    q = np.vstack([q, b[:1]])
    assert ranks(q, b, indptr, indices, backend=backend).tolist() == ranked(q, b, indptr, indices)


@pytest.mark.parametrize("sides", [(1024, 4096, 2048), (3, 50, 7), (9, 4, 5)])
def test_near_ties_in_blocks(
    backend: str, sides: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products in fp32 can't tell such rows apart; the bank as queries, itself and a copy."""
    for name, side in zip(("QUERIES", "ROWS", "SIDE"), sides, strict=True):
        monkeypatch.setattr(ranks_torch, name, side)
    generator = np.random.default_rng(sides[0])
    bank = near_ties(generator, 60, 24)
    indptr, indices = asked(generator, 60, 60, 30)
    wanted = ranked(bank, bank, indptr, indices)
    tensor = torch.from_numpy(bank)
    for queries, rows in ((bank, bank), (bank.copy(), bank), (tensor, tensor), (tensor, bank)):
        found = ranks(queries, rows, indptr, indices, backend=backend)
        assert type(found) is type(queries)
        assert found.tolist() == wanted


# Rows whose inner products are exact, so that ties are many.
directions = st.lists(st.integers(0, 6), min_size=1, max_size=30)


@given(directions, directions, st.data())
@few_settings
def test_ties(queries: list[int], bank: list[int], data: st.DataObject) -> None:
    table = np.array(
        [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0.5, 0.5, 0], [-1, 0, 0], [0, 0, 0], [1, 1, 1]],
        dtype=np.float32,
    )
    places = data.draw(
        st.lists(
            st.lists(st.integers(0, len(bank) - 1), max_size=40),
            min_size=len(queries),
            max_size=len(queries),
        )
    )
    indptr = np.cumsum([0, *map(len, places)])
    indices = [place for own in places for place in own]
    wanted = ranked(table[queries], table[bank], indptr, indices)
    for backend in BACKENDS:
        found = ranks(table[queries], table[bank], indptr, indices, backend=backend)
        assert found.tolist() == wanted


def test_all_rows_alike(backend: str) -> None:
    bank = np.full((300, 20), 0.1, dtype=np.float32)
    indices = np.tile(np.arange(299, -1, -1), 2)
    found = ranks(bank[:2], bank, [0, 300, 600], indices, backend=backend)
    assert found.tolist() == indices.tolist()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("bank_dtype", ["float32", "float16"])
def test_low_precision_is_widened(backend: str, dtype: str, bank_dtype: str) -> None:
    generator = np.random.default_rng(4)
    queries = torch.from_numpy(generator.standard_normal((8, 30))).to(getattr(torch, dtype))
    bank = torch.from_numpy(generator.standard_normal((200, 30))).to(getattr(torch, bank_dtype))
    bank[100:] = bank[:100]
    indptr, indices = asked(generator, 8, 200, 12)
    found = ranks(queries, bank, indptr, indices, backend=backend)
    wanted = ranked(queries.float().numpy(), bank.float().numpy(), indptr, indices)
    assert found.tolist() == wanted
    if dtype == "float16":
        half = ranks(queries.numpy(), bank.numpy(), indptr, indices, backend=backend)
        assert isinstance(half, np.ndarray)
        assert half.tolist() == wanted


def test_any_layout(backend: str, tmp_path: Any) -> None:
    generator = np.random.default_rng(5)
    whole = generator.standard_normal((90, 40)).astype(np.float32)
    np.save(tmp_path / "bank.npy", whole)
    bank, queries = np.load(tmp_path / "bank.npy", mmap_mode="r")[::3, 1::2], whole[:5, ::2]
    indptr, indices = asked(generator, 5, 30, 9)
    wanted = ranked(queries, bank, indptr, indices)
    shapes = (bank, np.asfortranarray(bank), torch.from_numpy(whole)[::3, 1::2])
    for rows in shapes:
        found = ranks(queries, rows, torch.from_numpy(indptr).int(), indices, backend=backend)
        assert found.tolist() == wanted
    graph = torch.from_numpy(whole).requires_grad_()[:5, ::2]
    assert ranks(graph, bank, indptr, indices, backend=backend).tolist() == wanted


@pytest.mark.parametrize("scale", [2.0**-70, 2.0**-50, 2.0**61])
def test_lengths_of_all_orders(backend: str, scale: float) -> None:
    """Scores that underflow, and products that might overflow on their way."""
    generator = np.random.default_rng(6)
    bank = generator.standard_normal((80, 18)).astype(np.float32) * np.float32(scale)
    bank[::2] *= np.float32(2.0**-7)
    bank[5] = 0
    bank[7] = bank[3]
    indptr, indices = asked(generator, 80, 80, 40)
    with np.errstate(under="ignore", over="ignore"):
        wanted = ranked(bank, bank, indptr, indices)
    assert ranks(bank, bank, indptr, indices, backend=backend).tolist() == wanted


@pytest.mark.parametrize("share", [0.9, 0.0])
def test_products_within_the_bound_decide_nothing_else(
    backend: str, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products as wrong as another machine's could be at worst leave the ranks as they are."""
    generator = np.random.default_rng(7)
    bank = np.vstack([near_ties(generator, 100, 48), generator.standard_normal((400, 48))])
    bank = (bank / np.linalg.norm(bank, axis=1, keepdims=True)).astype(np.float32)
    indptr, indices = asked(generator, 60, 500, 20)
    wide = ranks_torch.WIDE < 0
    plain = torch.mm
    # Some of the bound is for roundings: of both limits and, in fp64, of scores and products.
    off = share * (2.0**-24 * 0.5 if wide else product_error(48) * 0.6)
    changed = []

    def wrong(left: torch.Tensor, right: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        plain(left, right, out=out)
        before = out.clone()
        out += off * torch.from_numpy(np.sign(generator.standard_normal(out.shape))).to(out.dtype)
        changed.append(int((out != before).sum()))
        return out

    monkeypatch.setattr(torch, "mm", wrong)
    found = ranks(bank[:60], bank, indptr, indices, backend=backend)
    assert found.tolist() == ranked(bank[:60], bank, indptr, indices)
    assert (sum(changed) > 10_000) == (share > 0)


def test_products_are_in_fp32_whatever_the_caller_has_set(backend: str) -> None:
    generator = np.random.default_rng(8)
    bank = near_ties(generator, 300, 64)
    indptr, indices = asked(generator, 30, 300, 9)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = ranks(bank[:30], bank, indptr, indices, backend=backend)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert found.tolist() == ranked(bank[:30], bank, indptr, indices)


def test_fp64_where_many_rows_are_close(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, seen = torch.mm, []
    monkeypatch.setattr(
        torch, "mm", lambda *pair, out: (seen.append(out.dtype), plain(*pair, out=out))
    )
    generator = np.random.default_rng(12)
    bank = generator.standard_normal((400, 32)).astype(np.float32)
    alike = near_ties(generator, 400, 32)
    for rows, dtype in ((bank, torch.float32), (alike, torch.float64)):
        seen.clear()
        indptr, indices = asked(generator, 10, 400, 20)
        found = ranks(rows[:10], rows, indptr, indices)
        assert set(seen) == {dtype}
        assert found.tolist() == ranked(rows[:10], rows, indptr, indices)


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of products, too; the setting is the caller's afterwards, also if something fails."""
    generator = np.random.default_rng(9)
    bank = generator.standard_normal((1200, 8)).astype(np.float32)
    indptr, indices = asked(generator, 1200, 1200, 4)
    before, seen = torch.get_num_threads(), []
    plain = torch.mm
    monkeypatch.setattr(
        torch,
        "mm",
        lambda *pair, out: (seen.append(torch.get_num_threads()), plain(*pair, out=out)),
    )
    one = ranks(bank, bank, indptr, indices, threads=1)
    three = ranks(bank, bank, indptr, indices, threads=3)
    assert one.tolist() == three.tolist()
    assert set(seen) == {1, 3}
    assert torch.get_num_threads() == before

    def fails(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(torch, "mm", fails)
    with pytest.raises(MemoryError):
        ranks(bank, bank, indptr, indices, threads=before + 1)
    assert torch.get_num_threads() == before


def test_what_nobody_asks_for_is_not_computed(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks_torch, "QUERIES", 2)
    monkeypatch.setattr(ranks_torch, "SIDE", 2)
    plain, shapes = torch.mm, []
    monkeypatch.setattr(
        torch, "mm", lambda *pair, out: (shapes.append(tuple(out.shape)), plain(*pair, out=out))
    )
    bank = np.eye(6, dtype=np.float32)
    indptr = [0, 0, 0, 1, 1, 1, 1]  # row 2 alone asks
    assert ranks(bank.copy(), bank, indptr, [3], backend=backend).tolist() == [3]
    assert shapes == [(2, 6)]
    shapes.clear()
    assert ranks(bank, bank, indptr, [3], backend=backend).tolist() == [3]
    assert len(shapes) == 3  # of 6 blocks on and above the diagonal
    shapes.clear()
    assert ranks(bank, bank, [0] * 7, [], backend=backend).shape == (0,)
    assert not shapes


def test_no_queries_and_no_bank(backend: str) -> None:
    none, some = np.empty((0, 3), np.float32), np.ones((2, 3), np.float32)
    assert ranks(none, some, [0], [], backend=backend).tolist() == []
    assert ranks(some, none, [0, 0, 0], [], backend=backend).tolist() == []


def test_more_columns_than_the_kernels_take() -> None:
    generator = np.random.default_rng(10)
    bank = generator.standard_normal((40, 4100)).astype(np.float32)
    indptr, indices = asked(generator, 4, 40, 5)
    assert explain("ranks", dim=4100).chosen == "torch"
    assert ranks(bank[:4], bank, indptr, indices).tolist() == ranked(
        bank[:4], bank, indptr, indices
    )
    with pytest.raises(BackendError, match="takes D <= 4096, not 4100"):
        ranks(bank[:4], bank, indptr, indices, backend="cpu")


def test_explain() -> None:
    assert explain("ranks").chosen == "cpu"
    assert explain("ranks", device="cuda", dtype="bfloat16").chosen == "torch"


ROWS = np.ones((2, 3), dtype=np.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": ROWS.astype(np.float64)}, "ranks: queries holds float64"),
        ({"bank": ROWS[0]}, "ranks: bank has shape"),
        ({"bank": np.ones((2, 4), np.float32)}, "3 columns and the bank has 4"),
        ({"indptr": [0, 1]}, r"indptr is \[0, 1\] with 2 entries; needed: 3"),
        ({"indptr": [0, 2, 1]}, "rise from 0"),
        ({"indptr": [1, 1, 1]}, "rise from 0"),
        ({"indptr": [0, 1, 2]}, "1 indices"),
        ({"indptr": np.array([0.0, 1, 1])}, "indptr holds float64; allowed: integers"),
        ({"indptr": []}, "indptr has shape"),
        ({"indices": [2]}, "indices go from 2 to 2; allowed: rows of the bank, 0 to 1"),
        ({"indices": [-1]}, "indices go from -1"),
        ({"indices": torch.tensor([True])}, r"indices holds torch.bool"),
        ({"threads": 0}, "ranks: threads=0"),
        ({"backend": "avx2"}, "backend='avx2' is not known; allowed: auto, cpu, torch"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {"queries": ROWS, "bank": ROWS, "indptr": [0, 1, 1], "indices": [0]}
    with pytest.raises(ConfigError, match=message):
        ranks(**{**options, **change})


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
@pytest.mark.parametrize("name", ["queries", "bank"])
def test_rows_that_cannot_be_ranked(name: str, value: float) -> None:
    rows = {"queries": ROWS.copy(), "bank": ROWS.copy()}
    rows[name][1, 2] = value
    for kind in (np.asarray, torch.from_numpy):
        with pytest.raises(DataError, match=f"ranks: row 1 of {name}"):
            ranks(kind(rows["queries"]), kind(rows["bank"]), [0, 1, 1], [0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_gpu_gives_the_same(dtype: torch.dtype) -> None:
    generator = np.random.default_rng(11)
    rows = np.vstack([near_ties(generator, 2000, 96), generator.standard_normal((3000, 96))])
    bank = torch.from_numpy(rows.astype(np.float32)).to(dtype)
    indptr, indices = asked(generator, 5000, 5000, 20)
    wanted = ranks(bank, bank, indptr, indices)
    for queries, held in ((bank.cuda(), bank.cuda()), (bank.cuda(), bank)):
        found = ranks(queries, held, indptr, indices)
        assert found.is_cuda
        assert found.tolist() == wanted.tolist()
