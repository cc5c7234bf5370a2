"""Pseudo-captions replaced by random ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pymcip.configs import TrainConfig
from pymcip.errors import ConfigError, DataError
from pymcip.mining import CaptionTable
from pymcip.training import train
from pymcip.training.noise import noisy_captions


def mined_table(images: int, k: int, num_captions: int) -> CaptionTable:
    """A table in which image i has i % (k + 1) captions."""
    generator = np.random.default_rng(7)
    rows = [generator.choice(num_captions, i % (k + 1), replace=False) for i in range(images)]
    counts = np.cumsum([0] + [len(row) for row in rows]).astype(np.int64)
    ids = np.concatenate(rows).astype(np.int64)
    return CaptionTable(counts, ids, np.full(len(ids), 0.5, dtype=np.float32), num_captions)


def replaced_pairs(table: CaptionTable, noisy: CaptionTable) -> dict[int, int]:
    """Position of each replaced pair and its new caption."""
    return {int(i): int(noisy.ids[i]) for i in np.flatnonzero(table.ids != noisy.ids)}


@pytest.mark.parametrize("num_captions", [8, 50, 20_000])
def test_caption_noise_replaces_the_share_by_captions_of_others(num_captions: int) -> None:
    table = mined_table(60, 4, num_captions)
    before = table.ids.copy()
    found = [replaced_pairs(table, noisy_captions(table, share, 3)) for share in (0.1, 0.5, 1.0)]
    assert [len(pairs) for pairs in found] == [round(len(table.ids) * s) for s in (0.1, 0.5, 1.0)]
    assert found[0].items() <= found[1].items() <= found[2].items(), "shares are nested"
    noisy = noisy_captions(table, 0.5, 3)
    assert np.array_equal(noisy.indptr, table.indptr)
    assert np.array_equal(np.isnan(noisy.cosines), noisy.ids != table.ids)
    every = noisy_captions(table, 1.0, 3)
    assert every.ids.min() >= 0
    assert every.ids.max() < num_captions
    for image in range(len(table)):
        own, new = set(table[image][0].tolist()), every[image][0].tolist()
        assert len(set(new)) == len(own)
        assert not own & set(new)
    assert np.array_equal(table.ids, before), "the mined table is left as it is"


def test_caption_noise_depends_on_the_seed_alone_and_is_uniform() -> None:
    table = mined_table(400, 4, 8)
    first, again = noisy_captions(table, 0.5, 1), noisy_captions(table, 0.5, 1)
    assert np.array_equal(first.ids, again.ids)
    assert not np.array_equal(first.ids, noisy_captions(table, 0.5, 2).ids)
    assert noisy_captions(table, 0.0, 1) is table
    # images of one and the same caption: each of the 7 others as often, up to chance
    single = CaptionTable(np.arange(7001), np.full(7000, 4), np.full(7000, 0.5, np.float32), 10)
    drawn = np.bincount(noisy_captions(single, 1.0, 0).ids, minlength=10)
    assert drawn[4] == 0
    np.testing.assert_allclose(np.delete(drawn, 4), 7000 / 9, atol=5 * np.sqrt(7000 / 9))


def test_caption_noise_needs_other_captions() -> None:
    table = CaptionTable(np.array([0, 1]), np.array([0]), np.array([0.5], np.float32), 1)
    with pytest.raises(DataError, match=r"one has 1 of the corpus' 1; give a larger corpus"):
        noisy_captions(table, 0.5, 0)
    assert noisy_captions(table, 0.0, 0) is table


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_caption_noise_is_a_share(share: float) -> None:
    with pytest.raises(ConfigError, match=f"caption_noise={share}"):
        TrainConfig(model="m", train_data="d", captions="c", out="o", caption_noise=share)


def test_training_with_noise_keeps_the_mined_table(
    tmp_path: Path,
    tiny_model_dir: Path,
    tiny_images: Callable[..., Path],
    captions_file: Callable[..., Path],
) -> None:
    """Losses differ where the captions do, and a share of 0 is the run without the option."""
    common: dict[str, Any] = {
        "model": f"local-dir:{tiny_model_dir}",
        "train_data": str(tiny_images()),
        "captions": str(captions_file()),
        "cache": tmp_path / "cache",
        "threshold": -1.0,
        "k": 2,
        "epochs": 1,
        "batch_size": 4,
        "device": "cpu",
        "precision": "fp32",
        "method": "mcip",
        "log_steps": 1,
    }

    def losses(name: str, **options: Any) -> list[float]:
        result = train(**common, out=tmp_path / name, **options)
        lines = (result.out / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["caption_margin"] for line in lines]

    plain = losses("plain")
    assert losses("none", caption_noise=0.0) == plain
    noisy = losses("noisy", caption_noise=1.0)
    assert all(one != other for one, other in zip(noisy, plain, strict=True))
    mined = [CaptionTable.load(tmp_path / name / "mined").ids for name in ("plain", "noisy")]
    assert np.array_equal(*mined)
