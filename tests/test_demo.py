"""The demo: its world, its base model, and a tiny run from end to end."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
import shutil
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import pymcip
from pymcip.cli import build_parser, main, summary
from pymcip.configs import DemoConfig, TrainConfig
from pymcip.data import load_captions, load_images
from pymcip.demo import DemoResult, points, run_demo, world
from pymcip.demo.captions import describe_all
from pymcip.demo.recipe import BASE_FOLDER
from pymcip.demo.report import METHODS, METRICS, Table, check_pattern, format_table, mean_table
from pymcip.demo.scenes import COLOURS, Scenes, SceneStyle, compose, render
from pymcip.demo.sprites import load_sprites, split_indices, split_of
from pymcip.errors import ConfigError, OutputExistsError

SMALL = world.WorldConfig(
    train_classes=6, train_images=3, test_classes=5, test_images=4, captions=50, shard_size=7
)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> world.World:
    return world.write_world(SMALL, tmp_path_factory.mktemp("world"))


def test_names_are_distinct_and_pictures_too() -> None:
    sprites = load_sprites()
    assert len(sprites) > 3800
    assert len({one.name for one in sprites.emoji}) == len(sprites)
    assert sprites.large.shape == (len(sprites), 4, 48, 48)
    assert sprites.small.shape == (len(sprites), 4, 24, 24)
    clear = sprites.large[:, 3:] == 0
    assert int((sprites.large[:, :3] * clear).max()) <= 16, "colours are premultiplied"


def test_names_on_three_levels() -> None:
    known = {one.name: one for one in load_sprites().emoji}
    hand = known["waving hand with dark skin"]
    assert (hand.concept, hand.noun) == ("waving hand", "hand")
    assert known["flag of japan"].noun == "flag"
    assert known["clock showing one o'clock"].noun == "clock"
    assert known["woman lifting weights with light skin"].noun == "woman"


def test_the_splits_share_no_thing_and_do_not_move() -> None:
    emoji = load_sprites().emoji
    train = split_indices(emoji, "train")
    test = split_indices(emoji, "test")
    assert not {emoji[i].concept for i in train} & {emoji[i].concept for i in test}
    assert len(set(train) | set(test)) == len(train) + len(test)
    assert len(train) > 2500
    assert len(test) > 300
    assert emoji[test[0]].name == "man white hair with medium skin"
    few = split_indices(emoji, "test", 1)
    assert len({emoji[i].concept for i in few}) == len(few)
    with pytest.raises(ConfigError, match="'train' or 'test'"):
        split_indices(emoji, "val")


def test_scenes_are_a_function_of_the_seed() -> None:
    def draw(seed: int) -> tuple[np.ndarray, list[str]]:
        emoji = load_sprites().emoji
        generator = np.random.default_rng(seed)
        scenes = compose(generator, np.arange(40), np.arange(100))
        return render(scenes, seed), describe_all(scenes, seed, emoji)

    images, captions = draw(3)
    again, same = draw(3)
    assert images.shape == (40, 64, 64, 3)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(images, again)
    assert captions == same
    others, different = draw(4)
    assert (images != others).any()
    assert captions != different


def test_the_batch_does_not_change_a_scene() -> None:
    generator = np.random.default_rng(0)
    scenes = compose(generator, np.arange(20), np.arange(100), SceneStyle(noise=0.0))
    whole = render(scenes, 0).astype(np.int64)
    parts = render(scenes, 0, batch=7).astype(np.int64)
    assert np.abs(whole - parts).max() <= 1


def test_a_caption_tells_what_is_in_the_scene() -> None:
    emoji = load_sprites().emoji
    scenes = compose(np.random.default_rng(0), np.arange(300), np.arange(300))
    for row, caption in enumerate(describe_all(scenes, 0, emoji)):
        one = emoji[scenes.main[row]]
        assert one.noun in caption or one.concept in caption
        if " background" in caption:
            assert list(COLOURS)[scenes.colour[row]] in caption


def test_a_written_world_is_read_back(written: world.World) -> None:
    emoji = load_sprites().emoji
    train = load_images(tuple(str(path) for path in written.shards("train")))
    test = load_images(tuple(str(path) for path in written.shards("test")))
    assert len(written.shards("train")) == 3
    assert (len(train), len(test)) == (18, 20)
    assert test.read(0).size == (64, 64)
    assert all(len(test.titles(i)) == 1 for i in range(len(test)))
    assert not any(train.titles(i) for i in range(len(train)))
    names = dict(
        line.split("\t") for line in written.names("test").read_text(encoding="utf-8").splitlines()
    )
    expected = [emoji[i].name for i in split_indices(emoji, "test", SMALL.tones)[:5]]
    assert [names[str(label)] for label in range(5)] == expected
    captions = load_captions(str(written.captions))
    assert 30 <= len(captions) <= 50
    assert not list(written.captions.parent.glob(".*")), "no temporary file is left"


def test_a_written_world_is_the_same_to_the_byte(written: world.World, tmp_path: Path) -> None:
    again = world.write_world(SMALL, tmp_path)
    for before, after in zip(
        (
            *written.shards("train"),
            *written.shards("test"),
            *written.shards("probe"),
            written.captions,
            written.names("test"),
            written.names("probe"),
        ),
        (
            *again.shards("train"),
            *again.shards("test"),
            *again.shards("probe"),
            again.captions,
            again.names("test"),
            again.names("probe"),
        ),
        strict=True,
    ):
        assert before.read_bytes() == after.read_bytes(), before.name


def test_the_probe_changes_no_other_file(written: world.World) -> None:
    """What is in the scenes of `SMALL`, as before there was a probe: stored results are of such worlds."""
    digest = hashlib.sha256(written.captions.read_bytes())
    for path in (*written.shards("train"), *written.shards("test")):
        with tarfile.open(path) as tar:
            for member in tar:
                if not member.name.endswith(".png"):  # whose bytes depend on the library
                    digest.update(member.name.encode())
                    digest.update(tar.extractfile(member).read())  # type: ignore[union-attr]
    assert digest.hexdigest() == "6eccc82ccfeb86861e8e1cd6881d33558c215ad14b33c87488af72f40717e726"


@pytest.mark.parametrize("config", [SMALL, world.WorldConfig()])
def test_things_of_the_probe_are_neither_trained_on_nor_tested(config: world.WorldConfig) -> None:
    emoji = load_sprites().emoji
    classes = world.probe_classes(config)
    assert len(classes) == {SMALL: 2}.get(config, 33)
    assert {split_of(emoji[i]) for i in classes} == {"test"}
    tested = split_indices(emoji, "test", config.tones)[: config.test_classes]
    assert not {emoji[i].concept for i in classes} & {emoji[i].concept for i in tested}


def test_scenes_of_the_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    inner = world.compose

    def watched(*arguments: Any) -> Scenes:
        drawn.append(inner(*arguments))
        return drawn[-1]

    monkeypatch.setattr(world, "compose", watched)
    world.write_world(SMALL, tmp_path)
    classes = set(world.probe_classes(SMALL))
    (scenes,) = (one for one in drawn if set(one.main) <= classes)
    assert set(scenes.other[scenes.other >= 0]) <= classes
    probe = load_images(str(tmp_path / "probe-*.tar"))
    assert np.bincount(probe.labels).tolist() == [4, 4]
    assert all(len(probe.titles(i)) == 1 for i in range(len(probe)))


def test_a_test_of_all_emoji_leaves_none_for_the_probe(tmp_path: Path) -> None:
    every = len(split_indices(load_sprites().emoji, "test", SMALL.tones))
    config = dataclasses.replace(SMALL, test_classes=every, test_images=1)
    written = world.write_world(config, tmp_path)
    assert len(load_images(tuple(map(str, written.shards("test"))))) == every
    assert not list(tmp_path.glob("probe*"))


def test_more_classes_than_there_are(tmp_path: Path) -> None:
    config = world.WorldConfig(test_classes=10_000)
    with pytest.raises(ConfigError, match="test_classes=10000 is not allowed; allowed: 2 to"):
        world.write_world(config, tmp_path / "world")
    assert not (tmp_path / "world").exists()


def test_no_training_scene_shows_a_test_emoji(written: world.World) -> None:
    emoji = load_sprites().emoji
    train = split_indices(emoji, "train", SMALL.tones)
    scenes = compose(np.random.default_rng(0), train[:50], train)
    shown = set(scenes.main) | set(scenes.other[scenes.other >= 0])
    assert {split_of(emoji[i]) for i in shown} == {"train"}


def test_the_base_model_loads_strictly_and_is_small() -> None:
    weights = BASE_FOLDER / "open_clip_model.safetensors"
    assert weights.stat().st_size <= 12_000_000
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{BASE_FOLDER}")
    with safe_open(weights, "pt") as stored:
        assert set(stored.keys()) == set(model.state_dict())
        for name, tensor in model.state_dict().items():
            assert torch.equal(stored.get_tensor(name).to(tensor.dtype), tensor), name
    assert transform(Image.new("RGB", (64, 64))).shape == (3, 64, 64)
    record = json.loads((BASE_FOLDER / "pretrain.json").read_text(encoding="utf-8"))
    assert record["command"] == "python bench/studies/pretrain_demo.py"
    assert record["metrics"]["t2i_r5"] > 0


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> DemoResult:
    """A tiny run from end to end."""
    return run_demo(out=tmp_path_factory.mktemp("runs") / "demo", smoke=True)


def test_a_tiny_run_from_end_to_end(smoke: DemoResult) -> None:
    assert list(smoke.table) == list(METHODS)
    assert all(list(row) == list(METRICS) for row in smoke.table.values())
    report = json.loads((smoke.out / "report.json").read_text(encoding="utf-8"))
    assert report["table"] == smoke.table
    assert report["seeds"] == smoke.seeds == [0]
    (kept,) = report["alignment"]
    assert kept["respected"]
    assert kept["probe"]["source"] == "probe_data with their own classes"
    assert kept["probe"]["images"] == 7
    text = (smoke.out / "report.md").read_text(encoding="utf-8")
    assert "CC-BY 4.0" in text
    assert smoke.markdown in text
    commands = text.split("```")[1].strip().splitlines()
    assert [main(shlex.split(line)[1:]) for line in commands[:-1]] == [0, 0]
    opened = build_parser().parse_args(shlex.split(commands[-1])[1:])
    after, before = pymcip.Index(opened.index), pymcip.Index(opened.baseline)
    assert after.same_images(before)
    assert after.clip.embed_dim > before.clip.embed_dim
    pages = list(smoke.out.rglob("report.html"))
    assert len(pages) == len(METHODS)  # of the runs, all but base, and before-and-after
    assert all("Twemoji, copyright" in page.read_text() for page in pages)
    page = (smoke.out / "before-and-after" / "report.html").read_text()
    assert "](before-and-after/report.html)" in text
    assert page.count('<td class="query"><span class="pic') == 12
    with pytest.raises(OutputExistsError):
        run_demo(DemoConfig(out=smoke.out, smoke=True))


def test_a_run_that_keeps_nothing_leaves_the_base(
    smoke: DemoResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(config: TrainConfig) -> SimpleNamespace:
        """The finished runs; that of mcip+ without its export."""
        out = Path(config.out)
        shutil.copytree(smoke.out / "seed0" / "runs" / out.name, out)
        if out.name == "mcip+":
            shutil.rmtree(out / "exported")
        return SimpleNamespace(interrupted=None)

    monkeypatch.setattr(points, "train", train)
    result = run_demo(out=tmp_path / "demo", smoke=True)
    assert result.table["mcip+"] == result.table["base"] != result.table["mcip"]
    assert result.table["mcip+"] != smoke.table["mcip+"]


def test_the_mean_of_seeds_and_the_pattern() -> None:
    def table(shift: float) -> Table:
        rows = {
            "base": (20.0, 10.0, 30.0, 40.0),
            "appended": (29.8, 20.0, 30.0, 40.0),
            "gpr": (30.0, 20.0, 20.0, 30.0),
            "2sft": (30.0, 20.0, 25.0, 36.0),
            "mcip": (29.0, 19.0, 30.0, 39.5),
            "mcip+rea": (29.0, 19.0, 31.0, 41.0),
            "mcip+": (29.5, 19.0, 30.0, 40.0),
        }
        return {
            method: {name: value + shift for name, value in zip(METRICS, row, strict=True)}
            for method, row in rows.items()
        }

    mean = mean_table([table(0.0), table(2.0)])
    assert mean == table(1.0)
    assert all(check_pattern(mean).values())
    mean["mcip"]["t2i_r5"] -= 0.1
    assert [name for name, holds in check_pattern(mean).items() if not holds] == [
        "mcip: T2I R@5 at most 0.5 points under the base"
    ]
    mean["mcip"]["t2i_r5"] += 0.1
    for method, metric, text in (
        ("appended", "i2i_map", "appended: at least 98 % of gpr's I2I gain"),
        ("appended", "t2i_r5", "appended: zero-shot and T2I R@5 as the base's"),
        ("mcip+", "i2i_map", "mcip+: at least 95 % of gpr's I2I gain"),
        ("mcip+", "t2i_r5", "mcip+: T2I R@5 not under the base"),
        ("mcip+", "zero_shot", "mcip+: zero-shot not under the base"),
    ):
        changed = {**mean, method: {**mean[method], metric: mean[method][metric] - 0.01}}
        assert [name for name, holds in check_pattern(changed).items() if not holds] == [text]
    assert "30.0 (-10.0)" not in format_table(mean)
    assert "31.0 (-10.0)" in format_table(mean)


def test_the_last_line_is_the_table_as_json(tmp_path: Path) -> None:
    """What the command line prints of a demo: the table for people, then one line of JSON."""
    row = {"i2i_map": 1.0, "knn": 2.0, "zero_shot": 3.0, "t2i_r5": 4.0}
    result = DemoResult(tmp_path, [0], {"base": row}, 5.0, {"holds": True}, "| a table |\n")
    found = summary(result)
    assert found["table"] == {"base": row}
    assert found["seeds"] == [0]
    assert found["seconds"] == 5.0
    assert "markdown" not in found
