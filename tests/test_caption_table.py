"""`train(caption_table=...)`: the table of a `mine` run in place of mining."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pymcip
from pymcip.data import load_captions
from pymcip.errors import ConfigError, DataError, PymcipError, StaleEmbeddingsError
from pymcip.mining import GivenTable
from tests.conftest import computed_of


@pytest.fixture
def options(run_options: dict[str, Any], captions_file: Callable[..., Path]) -> dict[str, Any]:
    """Options of a run of `mcip` on 12 images of 3 classes, but for its table."""
    return {**run_options, "threshold": "auto", "captions": str(captions_file()), "method": "mcip"}


@pytest.fixture
def mined(options: dict[str, Any], tmp_path: Path) -> Path:
    """Give the folder of a mine run over the same images and captions."""
    model = {name: options[name] for name in ("model", "device", "precision", "captions")}
    folder = pymcip.embed(**model, images=options["train_data"], out=tmp_path / "emb")
    return pymcip.mine_captions(images=folder.path, out=tmp_path / "mined", k=2, threshold=-1.0).out


def test_a_run_on_a_table_is_the_run_that_mines_it(
    options: dict[str, Any], mined: Path, tmp_path: Path
) -> None:
    own = pymcip.train(**{**options, "out": tmp_path / "own", "k": 2, "threshold": -1.0})
    given = pymcip.train(**options, caption_table=mined)
    assert computed_of(given.out) == computed_of(own.out)
    one, other = (torch.load(run.state_dict, weights_only=True) for run in (own, given))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not (given.out / "mined").exists()
    log = (given.out / "out.log").read_text()
    assert f"pseudo-captions from {mined}: 24 pairs, 12 of 12 images have some" in log
    again = pymcip.train(**options, caption_table=mined, resume="latest")
    assert again == given
    other_table = pymcip.mine_captions(
        images=tmp_path / "emb", out=tmp_path / "three", k=3, threshold=-1.0
    ).out
    shutil.copytree(other_table, mined, dirs_exist_ok=True)
    with pytest.raises(StaleEmbeddingsError, match="with other caption_table"):
        pymcip.train(**options, caption_table=mined, resume="latest")


def test_a_part_of_the_images_takes_their_rows(
    options: dict[str, Any], mined: Path, tmp_path: Path
) -> None:
    part = tmp_path / "part"
    for place in sorted(Path(options["train_data"]).iterdir())[1:]:
        shutil.copytree(place, part / f"other {place.name}")  # contents count, not names
    own = pymcip.train(
        **{**options, "out": tmp_path / "own", "train_data": part, "k": 2, "threshold": -1.0}
    )
    given = pymcip.train(**{**options, "train_data": part}, caption_table=mined)
    assert computed_of(given.out) == computed_of(own.out)
    with pytest.raises(StaleEmbeddingsError, match="lacks 4 of 12 training images"):
        pymcip.train(
            **{**options, "out": tmp_path / "more"}, caption_table=tmp_path / "own" / "mined"
        )


def test_rows_are_found_by_content(options: dict[str, Any], mined: Path) -> None:
    captions = load_captions(options["captions"])
    given = GivenTable.open(mined, captions.fingerprint())
    order = np.random.default_rng(3).permutation(12)[:7]
    contents = [given.images[row].decode() for row in order]
    taken = given.of(contents, str)
    assert taken.num_captions == given.table.num_captions
    for row, image in enumerate(order):
        for one, other in zip(taken[row], given.table[int(image)], strict=True):
            assert np.array_equal(one, other)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"captions": "other"}, StaleEmbeddingsError, "mined from other captions"),
        ({"caption_table": "none"}, DataError, r"holds no caption_table\.npz"),
        ({"remove": "sources.npz"}, DataError, "which says what it was mined from"),
        ({"k": 3}, ConfigError, "mined with k of its own; leave k=3 out"),
        ({"mine_model": "ViT-B-32"}, ConfigError, "leave mine_model='ViT-B-32' out"),
    ],
)
def test_what_does_not_fit_is_refused(
    change: dict[str, Any],
    error: type[PymcipError],
    message: str,
    options: dict[str, Any],
    mined: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "captions.txt").write_text("one\ntwo\n")
    change = {
        name: tmp_path / value if name in ("captions", "caption_table") else value
        for name, value in change.items()
    }
    if name := change.pop("remove", None):
        (mined / name).unlink()
    with pytest.raises(error, match=message):
        pymcip.train(**{**options, "caption_table": mined, **change})
    assert not Path(options["out"]).exists()
