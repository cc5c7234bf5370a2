"""The mining stage: its files, continuing an interrupted run, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pymcip
from pymcip.data import Captions, load_captions, load_images
from pymcip.embedding import EmbeddingFolder, embed_captions, embed_images
from pymcip.errors import (
    ConfigError,
    DataError,
    OutputExistsError,
    StaleEmbeddingsError,
)
from pymcip.mining import (
    images_per_block,
    mine,
    mine_table,
    search,
)
from pymcip.model import ClipModel, load
from tests.conftest import CAPTIONS
from tests.mining_cases import check_against_oracle, clustered, options, split

SHARED = Path(__file__).resolve().parents[2] / "shared"


# The stage


def test_stage(embedded: EmbeddingFolder, tmp_path: Path) -> None:
    result = pymcip.mine_captions(**options(embedded, tmp_path))
    images, captions = embedded.vectors("img"), embedded.vectors("text")
    check_against_oracle(result.table, images, captions, 3, -1.0)
    assert sorted(path.name for path in result.out.iterdir()) == [
        ".pymcip-files",
        "caption_table.npz",
        "caption_table.parquet",
        "mine.json",
        "report.json",
        "sample.tsv",
        "sources.npz",
    ]
    assert json.loads((result.out / "report.json").read_text()) == result.report
    lines = [line.split("\t") for line in (result.out / "sample.tsv").read_text().splitlines()]
    assert lines[0] == ["image", "label", "cosine", "caption"]
    assert len(lines) == 1 + 12 * 3
    ids, cosines = result.table[0]
    path = embedded.metadata("img")["image_path"][0].as_py()
    assert lines[1] == [path, "0", f"{cosines[0]:.4f}", CAPTIONS[ids[0]]]


def test_images_without_captions_are_in_the_sample(
    embedded: EmbeddingFolder, tmp_path: Path
) -> None:
    cosines = embedded.vectors("img").astype(np.float32) @ embedded.vectors("text").T
    threshold = float(np.median(cosines.max(axis=1)))
    result = pymcip.mine_captions(**options(embedded, tmp_path, threshold=threshold))
    assert 0 < result.report["images_by_captions"][0] < 12
    lines = [line.split("\t") for line in (result.out / "sample.tsv").read_text().splitlines()]
    assert sum(line[2:] == ["", ""] for line in lines) == result.report["images_by_captions"][0]


def test_captions_in_another_folder(
    tiny_clip: ClipModel, embedded: EmbeddingFolder, tmp_path: Path
) -> None:
    other = embed_captions(tiny_clip, Captions(CAPTIONS[:4]), tmp_path / "captions")
    result = pymcip.mine_captions(**options(embedded, tmp_path, captions=other.path))
    assert result.table.num_captions == 4


def stopping_topk(monkeypatch: pytest.MonkeyPatch, at: int) -> list[int]:
    """Interrupt the op in its call `at`; the list tells the images of each call."""
    calls: list[int] = []
    original = search.topk

    def stopping(queries: Any, *arguments: Any, **named: Any) -> Any:
        calls.append(len(queries))
        if len(calls) == at:
            raise KeyboardInterrupt
        return original(queries, *arguments, **named)

    monkeypatch.setattr(search, "topk", stopping)
    return calls


def test_interrupted_mining_goes_on(
    embedded: EmbeddingFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pymcip.mine_captions(**options(embedded, tmp_path, out=tmp_path / "whole"))
    monkeypatch.setattr(mine, "images_per_block", lambda *_: 2)
    calls = stopping_topk(monkeypatch, at=3)  # in the third block of images
    with pytest.raises(KeyboardInterrupt):
        pymcip.mine_captions(**options(embedded, tmp_path))
    assert len(list((tmp_path / "out" / "blocks").iterdir())) == 2
    assert not (tmp_path / "out" / "report.json").exists()
    monkeypatch.setattr(
        mine, "images_per_block", lambda *_: 5
    )  # of another machine: the run's rule
    result = pymcip.mine_captions(**options(embedded, tmp_path))
    assert calls[3:] == [2] * 4  # four images were done
    assert np.array_equal(result.table.ids, whole.table.ids)
    assert np.array_equal(result.table.cosines, whole.table.cosines)
    assert result.report == whole.report
    assert not (tmp_path / "out" / "blocks").exists()
    calls.clear()
    (tmp_path / "out" / "blocks").mkdir()  # as a kill after the report leaves it
    again = pymcip.mine_captions(**options(embedded, tmp_path))
    assert not calls
    assert not (tmp_path / "out" / "blocks").exists()
    assert again.report == result.report
    assert np.array_equal(again.table.ids, whole.table.ids)


def test_blocks_do_not_follow_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block reads all captions, so there are no more than needed, and all of one size."""
    images, captions = clustered(0, 23, 41)
    calls = stopping_topk(monkeypatch, at=0)
    mine_table(split(images, [1, 1, 0, 6, 7]), [captions], k=2, threshold=0.5, block_rows=10)
    assert calls == [7, 8, 8]
    calls.clear()
    mine_table(split(images, [1, 1]), split(captions, [5, 5]), k=2, threshold=0.5)
    assert calls == [23]


def test_blocks_are_one_pass_of_the_op() -> None:
    """Codes and candidates of a block stay below what the op takes at a time (40 MiB)."""
    cpu = torch.device("cpu")
    assert images_per_block(10, 512, cpu) == 14_848
    for k, columns in [(1, 1), (10, 512), (16, 768), (64, 1152), (2048, 4096)]:
        rows = images_per_block(k, columns, cpu)
        assert rows >= 32
        assert rows * (columns + 16 * max(128, 4 * k)) <= 40 << 20
    assert images_per_block(10, 512, torch.device("cuda")) == 131_072


def test_older_blocks_are_not_mixed_in(
    embedded: EmbeddingFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of version 0.1 had other names, another size, and cosines with other last bits."""
    whole = pymcip.mine_captions(**options(embedded, tmp_path, out=tmp_path / "whole"))
    monkeypatch.setattr(mine, "images_per_block", lambda *_: 5)
    stopping_topk(monkeypatch, at=2)
    with pytest.raises(KeyboardInterrupt):
        pymcip.mine_captions(**options(embedded, tmp_path))
    out = tmp_path / "out"
    stored = json.loads((out / "mine.json").read_text())
    assert stored.pop("block_rows") == 5
    assert stored.pop("recall") == 1
    (out / "mine.json").write_text(json.dumps(stored))
    wrong = {"ids": np.zeros((5, 3), np.int64), "cosines": np.ones((5, 3), np.float32)}
    np.savez(out / "blocks" / "block_000000.npz", **wrong)
    monkeypatch.setattr(mine, "images_per_block", lambda *_: 7)
    result = pymcip.mine_captions(**options(embedded, tmp_path))
    assert np.array_equal(result.table.ids, whole.table.ids)
    assert np.array_equal(result.table.cosines, whole.table.cosines)
    assert not (out / "blocks").exists()


def test_damaged_block(
    embedded: EmbeddingFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mine, "images_per_block", lambda *_: 6)
    stopping_topk(monkeypatch, at=2)
    with pytest.raises(KeyboardInterrupt):
        pymcip.mine_captions(**options(embedded, tmp_path))
    file = tmp_path / "out" / "blocks" / "images_0_6_captions_0_8.npz"
    np.savez(file, ids=np.zeros((6, 2), np.int64), cosines=np.zeros((6, 2), np.float32))
    with pytest.raises(
        DataError, match=r"images_0_6_captions_0_8\.npz is damaged: it holds \(6, 2\), not"
    ):
        pymcip.mine_captions(**options(embedded, tmp_path))
    file.write_bytes(b"PK no")
    with pytest.raises(DataError, match=r"images_0_6_captions_0_8\.npz is damaged.*mine again"):
        pymcip.mine_captions(**options(embedded, tmp_path))


class Bar:
    """Stands for tqdm's."""

    def __init__(self, **named: Any) -> None:
        self.named = named
        self.total, self.n = named["total"], named.get("initial", 0)
        self.places: list[float] = [self.n]

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, count: float) -> None:
        self.n += count
        self.places.append(self.n)


def test_bar_moves_within_blocks_and_goes_on(
    embedded: EmbeddingFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars: list[Bar] = []

    def new_bar(**named: Any) -> Bar:
        bars.append(Bar(**named))
        return bars[-1]

    original = search.topk

    def telling_topk(*arguments: Any, progress: Any, **named: Any) -> Any:
        progress(1, 4)
        progress(3, 4)
        if len(bars) == 1 and bars[0].n > 12 * 8 / 2:
            raise KeyboardInterrupt
        return original(*arguments, **named)

    monkeypatch.setattr(search, "progress", new_bar)
    monkeypatch.setattr(search, "topk", telling_topk)
    monkeypatch.setattr(mine, "images_per_block", lambda *_: 6)
    with pytest.raises(KeyboardInterrupt):
        pymcip.mine_captions(**options(embedded, tmp_path))
    pymcip.mine_captions(**options(embedded, tmp_path))
    first, second = bars
    assert (first.total, first.places) == (96, [0, 12, 36, 48, 60, 84])
    assert (second.total, second.places) == (96, [48, 60, 84, 96])


def test_stale_result_is_refused(
    tiny_clip: ClipModel, embedded: EmbeddingFolder, tmp_path: Path
) -> None:
    pymcip.mine_captions(**options(embedded, tmp_path))
    with pytest.raises(StaleEmbeddingsError, match=r"another k \(3, now 2\).*overwrite=True"):
        pymcip.mine_captions(**options(embedded, tmp_path, k=2))
    other = embed_captions(tiny_clip, Captions(CAPTIONS[:4]), tmp_path / "captions")
    with pytest.raises(StaleEmbeddingsError, match="another captions; mine into another folder"):
        pymcip.mine_captions(**options(embedded, tmp_path, captions=other.path))
    result = pymcip.mine_captions(**options(embedded, tmp_path, k=2, overwrite=True))
    assert result.report["k"] == 2


def test_foreign_folder_is_refused(embedded: EmbeddingFolder, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    with pytest.raises(OutputExistsError, match="not empty"):
        pymcip.mine_captions(**options(embedded, tmp_path))


def test_embeddings_without_metadata(tmp_path: Path) -> None:
    images, captions = clustered(0, 5, 6)
    for kind, rows in (("img", images), ("text", captions)):
        (tmp_path / "e" / f"{kind}_emb").mkdir(parents=True)
        np.save(tmp_path / "e" / f"{kind}_emb" / f"{kind}_emb_0.npy", rows)
    result = pymcip.mine_captions(images=tmp_path / "e", out=tmp_path / "out", threshold=0.5)
    check_against_oracle(result.table, images, captions, 10, 0.5)
    assert (result.out / "sample.tsv").read_text().splitlines()[1].startswith("0\t")


def test_bad_input(embedded: EmbeddingFolder, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"threshold=2\.0 is not allowed; it must be <= 1"):
        pymcip.mine_captions(**options(embedded, tmp_path, threshold=2.0))
    with pytest.raises(DataError, match="no embedding folder"):
        pymcip.mine_captions(**options(embedded, tmp_path, images=tmp_path / "absent"))
    with pytest.raises(DataError, match=r"8 and 16 wide; .* with one model"):
        mine_table(embedded.parts("img"), [clustered(0, 1, 3)[1]], k=1, threshold=0.0)
    with pytest.raises(DataError, match="no embedded captions to mine"):
        mine_table(embedded.parts("img"), [np.empty((0, 16), np.float16)], k=1, threshold=0.0)
    with pytest.raises(DataError, match="no caption of any image"):
        pymcip.mine_captions(**options(embedded, tmp_path, threshold=1.0))


def test_incomplete_embeddings_are_refused(embedded: EmbeddingFolder, tmp_path: Path) -> None:
    (embedded.path / "text_metadata" / "metadata_2.parquet").unlink()
    with pytest.raises(DataError, match="holds 2 of 3 parts of captions"):
        pymcip.mine_captions(**options(embedded, tmp_path))


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real model and data at {SHARED}")
def test_real_photographs_get_fitting_captions(tmp_path: Path) -> None:
    """With a real model, apples and pears find captions about fruit rather than about dogs."""
    clip = load(f"local-dir:{SHARED / 'models' / 'lite0'}", device="cpu", precision="fp32")
    data = load_images(SHARED / "data" / "grocery" / "grocery-val-000000.tar")
    chosen = np.flatnonzero(np.isin(data.labels, [0, 1]))[:4]
    captions = load_captions(SHARED / "data" / "captions" / "wordnet-nouns.txt.gz")
    about = ["fruit", "apple", "dog", "church", "disease"]
    texts = [next(text for text in captions if text.startswith(f"{word}:")) for word in about]
    embed_images(clip, data.select(chosen), tmp_path)
    folder = embed_captions(clip, Captions(texts), tmp_path)
    table, _ = mine_table(folder.parts("img"), folder.parts("text"), k=2, threshold=-1.0)
    first_two = {about[caption] for image in range(len(table)) for caption in table[image][0]}
    assert first_two == {"fruit", "apple"}
