"""The bench of storage: its vectors, fusion and recall, how knobs are set, and a small run."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pymcip.ops.faiss_import import probe_faiss
from tests.conftest import bench_module

N, D = 2000, 64
SMALL = ["--vectors", str(N), "--dimensions", str(D), "--queries", "40"]
QUICK = ["--repetitions", "3", "--seconds", "0.1", "--threads", "1"]

needs_faiss = pytest.mark.skipif(probe_faiss() is not None, reason="needs faiss")


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    with bench_module("studies.storage") as module:
        gc.freeze()  # the harness collects garbage for each rival; torch has much to look through
        yield module
        gc.unfreeze()


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
    centred = images - images.mean(axis=0)
    values = np.linalg.svd(centred, compute_uv=False) ** 2
    assert 60 < values.sum() ** 2 / (values**2).sum() < 400  # participation ratio
    order = np.argsort(labels, kind="stable")
    mates = np.flatnonzero(np.diff(labels[order]) == 0)
    for left, right, middle in (
        (images[:-1], images[1:], 0.5),
        (images[order[mates]], images[order[mates + 1]], 0.78),
        (asked["image"], images[ids], 0.89),
        (asked["image"][:-1], images[ids[1:]], 0.5),
        (asked["text"], images[ids], 0.32),
        (asked["text"][:-1], images[ids[1:]], 0.17),
    ):
        assert np.median((left * right).sum(axis=1)) == pytest.approx(middle, abs=0.04)


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


def test_fusion_by_hand(bench: Any) -> None:
    first = np.array([[7, 3, 5], [1, 2, -1]])
    second = np.array([[5, 9, 7], [-1, -1, -1]])
    # 7: 1/61 + 1/63, 5: 1/63 + 1/61, 3 and 9: 1/62. Ties go to the lower id.
    assert bench.fuse(first, second, 3).tolist() == [[5, 7, 3], [1, 2, -1]]
    assert bench.fuse(first, second, 5).tolist() == [[5, 7, 3, 9, -1], [1, 2, -1, -1, -1]]


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

    kind = Stepwise("steps", "", "efSearch", (1, 2, 4, 8, 16), "")
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
    asked = bench.ask(spaces, banks, options)
    assert set(asked) == set(bench.SEARCHES)
    for (space, _), (queries, wanted) in asked.items():
        exact = queries.astype(np.float64) @ banks[space].T.astype(np.float64)
        assert np.array_equal(wanted, np.argsort(-exact, axis=1, kind="stable")[:, :10])
    both = asked["joint", "image"][0] + asked["joint", "text"][0]
    np.testing.assert_allclose(asked["joint", "combined"][0], unit(both), atol=1e-6)


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


@needs_faiss
def test_the_systems_answer_what_they_are_asked(bench: Any) -> None:
    faiss = pytest.importorskip("faiss")
    generator = np.random.default_rng(0)
    asked, searches = {}, {}
    for place in bench.SEARCHES:
        index = faiss.IndexFlatIP(16)
        index.add(generator.standard_normal((300, 16), np.float32))
        searches[place] = bench.KINDS["flat"].search(index, None)
        queries = generator.standard_normal((5, 16), np.float32)
        asked[place] = queries, searches[place](queries, 4)
    for query in bench.QUERIES:
        rivals, shares = bench.systems(query, searches, asked, 4)
        assert [rival.name for rival in rivals] == [bench.TWO, bench.ONE]
        assert set(shares.values()) == {1}
        wanted = asked["joint", query][1]  # of one; one query a turn, and then from the start again
        rows = np.concatenate([rivals[1].run() for _ in range(6)])
        assert np.array_equal(rows, wanted[[0, 1, 2, 3, 4, 0]])
    rivals, _ = bench.systems("combined", searches, asked, 4)
    fused = bench.fuse(asked["image", "image"][1], asked["joint", "text"][1], 4)
    assert np.array_equal(np.concatenate([rivals[0].run() for _ in range(5)]), fused)


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
        for systems in figures["queries"].values():
            assert set(systems) == {bench.TWO, bench.ONE}
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
    assert {line.count("|") for line in first} == {5}
    assert {line.count("|") for line in second} == {8}
    assert len(second) == 2 + 3 * 3
    size = flat[bench.TWO]["bytes"]
    assert first[2].startswith(f"| flat | two | {size / 1e6:.1f} MB | ")


@needs_faiss
def test_rows(bench: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("PYMCIP_BENCH_ROWS", str(tmp_path / "rows.jsonl"))
    bench.main([*SMALL, "--appended", "8", *QUICK, "--indexes", "flat", "--store"])
    stored = (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in stored]
    assert [row["rival"] for row in rows if "bytes" in row] == [bench.TWO, bench.ONE]
    timed = [row for row in rows if "seconds" in row]
    assert len(timed) == 2 * 3
    assert all(row["accuracy"] == {"recall@10": 1} for row in timed)
    assert {(row["case"]["index"], row["case"]["appended"]) for row in rows} == {("flat", 8)}
