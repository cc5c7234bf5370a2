"""The bench of storage: its vectors, fusion and recall, how knobs are set, and a small run."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pymcip.ops.faiss_import import probe_faiss
from tests.conftest import bench_module

N, D = 2000, 64
SMALL = ["--vectors", str(N), "--dimensions", str(D), "--queries", "40", "--batch", "8"]
QUICK = ["--repetitions", "3", "--seconds", "0.1", "--threads", "1"]

needs_faiss = pytest.mark.skipif(probe_faiss() is not None, reason="needs faiss")


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    with bench_module("studies.storage") as module:
        gc.freeze()  # the harness collects garbage for each rival; torch has much to look through
        yield module
        gc.unfreeze()


@pytest.fixture(scope="module")
def search() -> Iterator[Any]:
    with bench_module("studies.storage_search") as module:
        yield module


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_clusters(bench: Any) -> None:
    labels = bench.cluster_labels(5000, 3)
    assert len(labels) == 5000
    sizes = np.bincount(labels)
    assert sizes[:-1].min() >= 10  # the last is cut where the images end
    assert sizes.max() <= 50
    assert abs(np.corrcoef(labels, np.arange(5000))[0, 1]) < 0.1


def test_vectors_are_as_described(bench: Any, tmp_path: Path, monkeypatch: Any) -> None:
    with bench_module("studies.storage_space") as module:
        monkeypatch.setattr(module, "BLOCK", 1500)
    labels = bench.cluster_labels(4000, 0)
    space, other = bench.Space(512, labels, 0), bench.Space(512, labels, 1)
    images = bench.generate(space, tmp_path / "one.npy", 1)
    assert images.dtype == np.float32
    assert np.array_equal(images, bench.generate(space, tmp_path / "two.npy", 2))
    assert np.array_equal(images[3000:], space.images(2))
    assert not np.allclose(images[:1000], images[1500:2500])
    assert abs(float((images[:1000] * other.images(0)[:1000]).sum(axis=1).mean())) < 0.2
    ids = np.arange(0, 4000, 20)
    asked = {
        "image": space.image_queries(ids, images[ids]),
        "text": space.text_queries(ids, images[ids]),
    }
    for rows in (images, *asked.values()):
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    gap = images.mean(axis=0) - asked["text"].mean(axis=0)
    assert np.linalg.norm(gap) == pytest.approx(0.83, abs=0.04)
    drawn = bench.describe(space, images, ids, asked)
    middles = {pair: quantiles[1] for pair, quantiles in drawn["cosines"].items()}
    assert middles == {
        "two images": pytest.approx(0.5, abs=0.04),
        "two of a cluster": pytest.approx(0.78, abs=0.03),
        "image query, its image": pytest.approx(0.89, abs=0.02),
        "image query, any image": pytest.approx(0.5, abs=0.04),
        "text query, its image": pytest.approx(0.32, abs=0.04),
        "text query, any image": pytest.approx(0.17, abs=0.04),
    }
    values = np.linalg.eigvalsh(np.cov(images.T.astype(np.float64)))
    assert drawn["participation_ratio"] == pytest.approx(
        values.sum() ** 2 / (values**2).sum(), rel=1e-6
    )
    assert 60 < drawn["participation_ratio"] < drawn["effective_rank"] < 400
    reached = np.cumsum(values[::-1]) / values.sum()
    count = drawn["components_for_90_percent"]
    assert reached[count - 2] < 0.9 <= reached[count - 1]


def test_texts_rank_images_with_appended_dimensions_as_without(bench: Any) -> None:
    labels = bench.cluster_labels(300, 0)
    joint, own = bench.Space(64, labels, 0), bench.Space(8, labels, 2)
    space = bench.AppendedSpace(joint, own, 2.0)
    images, ids = space.images(0), np.arange(0, 300, 7)
    for rows in (images, space.image_queries(ids, images[ids])):
        assert rows.shape[1] == 72
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    texts = space.text_queries(ids, images[ids])
    assert not texts[:, 64:].any()
    plain = joint.text_queries(ids, joint.images(0)[ids]) @ joint.images(0).T
    np.testing.assert_allclose(texts @ images.T, plain / math.sqrt(5), atol=1e-6)


def test_fusion_by_hand(search: Any) -> None:
    first = np.array([[7, 3, 5], [1, 2, -1]])
    second = np.array([[5, 9, 7], [-1, -1, -1]])
    # 7: 1/61 + 1/63, 5: 1/63 + 1/61, 3 and 9: 1/62. Ties go to the lower id.
    assert search.fuse(first, second, 3).tolist() == [[5, 7, 3], [1, 2, -1]]
    assert search.fuse(first, second, 5).tolist() == [[5, 7, 3, 9, -1], [1, 2, -1, -1, -1]]


def test_recall_by_hand(bench: Any) -> None:
    wanted = np.array([[1, 2, 3], [4, 5, 6]])
    found = np.array([[3, 1, 9], [-1, -1, 5]])
    assert bench.recall(found, wanted) == 0.5
    assert bench.recall(wanted[:, ::-1], wanted) == 1


def test_the_knob(bench: Any) -> None:
    """The first value that reaches the goal; otherwise the first that is close to the best."""

    class Stepwise(bench.Kind):  # type: ignore[misc]
        def search(self, index: Any, value: int | None) -> Any:
            right = {1: 0, 2: 400, 4: 898, 8: 900, 16: 900}[value]  # of 1000 queries

            def answer(queries: np.ndarray, k: int) -> np.ndarray:
                return np.where(np.arange(len(queries)) < right, 0, -1)[:, None]

            return answer

    kind = Stepwise("steps", lambda faiss, options: None, "efSearch", (1, 2, 4, 8, 16), "")
    queries, wanted = np.zeros((1000, 4), np.float32), np.zeros((1000, 1), np.int64)
    assert bench.tune(kind, None, queries, wanted, 0.3) == 2
    assert bench.tune(kind, None, queries, wanted, 0.9) == 8
    assert bench.tune(kind, None, queries, wanted, 0.95) == 4
    assert bench.tune(bench.KINDS["flat"], None, queries, wanted, 0.95) is None


def test_exact_answers(bench: Any) -> None:
    options = bench.arguments([*SMALL, "--threads", "1"])
    labels = bench.cluster_labels(N, 0)
    spaces = {name: bench.Space(D, labels, seed) for seed, name in enumerate(("image", "joint"))}
    banks = {name: space.images(0) for name, space in spaces.items()}
    asked, drawn = bench.ask(spaces, banks, options)
    assert set(drawn) == {"image", "joint"}
    assert set(asked) == set(bench.SEARCHES)
    for (space, _), own in asked.items():
        exact = own.queries.astype(np.float64) @ banks[space].T.astype(np.float64)
        assert np.array_equal(own.wanted, np.argsort(-exact, axis=1, kind="stable")[:, :10])
    both = asked["joint", "image"].queries + asked["joint", "text"].queries
    np.testing.assert_allclose(asked["joint", "combined"].queries, unit(both), atol=1e-6)
    tuning, measured = asked["image", "image"].halves()
    assert np.array_equal(
        np.concatenate([tuning.queries, measured.queries]), asked["image", "image"].queries
    )
    assert len(tuning.wanted) == len(tuning.queries) == 20


def test_options(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.lists(1_000_000) == 4000
    assert bench.lists(2000) == 50
    for words, said in (
        (["--vectors", "1999"], "at least 2000"),
        (["--dimensions", "100"], "multiple of 8"),
        (["--device", "cuda"], "on the CPU"),
        (["--queries", "1"], "2 to --vectors"),
        (["--k", "0"], "--k 0; allowed: at least 1"),
    ):
        with pytest.raises(SystemExit):
            bench.arguments(words)
        assert said in capsys.readouterr().err
    assert bench.arguments(["--queries", "100"]).batch == 50


@needs_faiss
def test_room_is_checked(bench: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="GB are needed; give another folder with --work"):
        bench.main(["--vectors", "1000000000000", "--work", str(tmp_path)])
    assert not list(tmp_path.iterdir())


@needs_faiss
def test_both_at_once_answers_the_same(search: Any) -> None:
    faiss = pytest.importorskip("faiss")
    generator = np.random.default_rng(0)
    asked, searches = {}, {}
    for space, query in search.SEARCHES:
        index = faiss.IndexFlatIP(16)
        index.add(generator.standard_normal((300, 16), np.float32))
        searches[space, query] = search.KINDS["flat"].search(index, None)
        queries = generator.standard_normal((5, 16), np.float32)
        asked[space, query] = search.Asked(queries, searches[space, query](queries, 4))
    with ThreadPoolExecutor(1) as pool:
        flat = searches["joint", "combined"]
        two, one, other, at_once = search.systems("combined", searches, asked, pool, flat)
        assert (other.name, other.queries) == (search.TEXTS, one.queries)
        assert np.array_equal(two.answer(*two.queries, 4), two.wanted)
        assert np.array_equal(at_once.answer(*at_once.queries, 4), two.wanted)
    assert np.array_equal(one.answer(*one.queries, 4), asked["joint", "combined"].wanted)
    turned = search.systems("image", searches, asked)
    assert [own.name for own in turned] == [search.TWO, search.ONE]
    assert turned[0].queries[0] is asked["image", "image"].queries
    assert turned[1].queries[0] is asked["joint", "image"].queries
    run = turned[0].rival(4, 2, 1.0).run  # two queries a turn, and then from the start again
    rows = np.concatenate([run(), run(), run()])
    assert np.array_equal(rows, turned[0].wanted[[0, 1, 2, 3, 0, 1]])


@needs_faiss
def test_a_run(bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    bench.main([*SMALL, *QUICK, "--work", str(work), "--out", str(out), "--note", "so"])
    printed = capsys.readouterr().out
    summary = json.loads(printed.splitlines()[-1])
    assert not list(work.iterdir())
    assert summary["note"] == "so"
    assert list(summary["indexes"]) == ["flat", "HNSW", "IVF-PQ"]
    rows = {"flat": 4 * D, "HNSW": 4 * D + 4 * 2 * 32, "IVF-PQ": D // 8 + 8}
    for name, figures in summary["indexes"].items():
        two, one = (figures["storage"][system] for system in (bench.TWO, bench.ONE))
        assert abs(two["bytes"] - 2 * one["bytes"]) < 0.02 * one["bytes"]  # HNSW's levels are drawn
        assert rows[name] <= one["bytes"] / N < 1.25 * rows[name] + 4 * D * 256 / N + 4 * D * 50 / N
        assert two["build_seconds"] > one["build_seconds"] > 0
        assert set(figures["queries"]) == set(bench.QUERIES)
        for batches in figures["queries"].values():
            assert set(batches) == {"batch 1", "batch 8"}
            for systems in batches.values():
                assert {bench.TWO, bench.ONE} <= set(systems)
                assert bench.AT_ONCE not in systems  # with one thread
                for own in systems.values():
                    assert own["seconds"]["p20"] <= own["seconds"]["p50"] <= own["seconds"]["p80"]
                    if name == "flat":
                        assert own["recall"] == 1
                    else:
                        assert (0.9 if name == "HNSW" else 0.3) < own["recall"] <= 1
    flat = summary["indexes"]["flat"]["storage"]
    assert flat[bench.TWO]["bytes"] == 2 * flat[bench.ONE]["bytes"]
    assert summary["indexes"]["flat"]["knob"] is None
    assert set(summary["indexes"]["HNSW"]["values"]) == set(bench.QUERIES)

    table = (out / "storage.md").read_text(encoding="utf-8")
    assert table in printed
    lines = [line for line in table.splitlines() if line.startswith("|")]
    first, second = lines[: 2 + 6], lines[2 + 6 :]
    assert {line.count("|") for line in first} == {6}
    assert {line.count("|") for line in second} == {11}
    values = [figures["values"] for figures in summary["indexes"].values()]
    more = [own for own in values if own["combined"] != own["text"]]
    assert more  # HNSW's, with these vectors
    assert len(second) == 2 + 3 * 3 + len(more)
    assert sum(" for one |" in line for line in second) == len(more)
    size = flat[bench.TWO]["bytes"]
    assert first[2].startswith(f"| flat | two | {size / 1e6:.1f} MB | {size / N:.0f} |")


@needs_faiss
def test_rows(bench: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("PYMCIP_BENCH_ROWS", str(tmp_path / "rows.jsonl"))
    words = [
        *SMALL,
        "--appended",
        "8",
        *QUICK,
        "--indexes",
        "flat",
        "--threads",
        "2",
        "--store",
    ]
    bench.main([*words, "--out", str(tmp_path)])
    table = (tmp_path / "storage.md").read_text(encoding="utf-8")
    assert "| flat | combined, two indexes at once |" in table
    stored = (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in stored]
    assert [row["rival"] for row in rows if "bytes" in row] == [bench.TWO, bench.ONE]
    timed = [row for row in rows if "seconds" in row]
    assert len(timed) == 2 * (2 + 2) + 2 + 3  # combined: both indexes at once, for single queries
    assert all(row["accuracy"] == {"recall@10": 1} for row in timed)
    assert {row["case"]["index"] for row in rows} == {"flat"}
