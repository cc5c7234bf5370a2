"""A world of the demo on disk: shards of scenes to train on, to probe and to test, and captions.

Two levels of description, as on the web:

* the *label* of a scene is its instance: exactly which emoji is its main one;
* a *caption* speaks at the level of meaning: usually the emoji's name without its skin tone, or
  only its head noun ("a detective"), then some of the tint, the background and the clutter.

The classes of the retrieval test are emoji that appear in no scene that fine-tuning sees, not even
as clutter. Further emoji of the test's split, of things that are no test class, make the probe's
scenes (`probe_classes`). Pretraining (`bench/studies/pretrain_demo.py`) composes other scenes, of
all emoji, as a CLIP trained on the web has seen most things with their names. No test scene is trained
on. Everything is a function of a seed.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from pymcip.demo.captions import corpus, describe_all
from pymcip.demo.scenes import SEARCHED, SceneStyle, compose, render
from pymcip.demo.sprites import load_sprites, split_indices
from pymcip.errors import ConfigError
from pymcip.files import atomic_path, read_json, write_json, write_text

PROBE_SHARE = 0.4  # the number of the probe's scenes: of that of the test's
TEMPLATES = ("a {}", "a picture of a {}", "a {} on a plain background")


@dataclass(frozen=True)
class WorldConfig:
    """Sizes of a demo world on disk. The seed varies scenes and captions, never the split."""

    seed: int = 0
    train_classes: int = 1500
    train_images: int = 8
    test_classes: int = 300
    test_images: int = 6
    captions: int = 30_000
    tones: int = 2
    style: SceneStyle = SEARCHED
    shard_size: int = 5_000


@dataclass(frozen=True)
class World:
    """The files in a world's folder, and the options of `train` and `evaluate` that name them.

    Shards are tar files (png, cls, json; those of probe and test: txt too). `captions` is a text
    file with a caption in each line; names are `label<TAB>name` in each line. The probe holds
    scenes of things that are in no train and no test class (see `probe_classes`), if there are any.
    """

    folder: Path

    def shards(self, split: str) -> tuple[Path, ...]:
        """The shards of `"train"`, `"test"` or `"probe"` that are there, in order."""
        return tuple(sorted(self.folder.glob(f"{split}-*.tar")))

    def names(self, split: str) -> Path:
        """The table of class names of `"train"`, `"test"` or `"probe"`."""
        return self.folder / f"{split}_names.tsv"

    @property
    def captions(self) -> Path:
        """The text corpus."""
        return self.folder / "captions.txt"

    @property
    def training(self) -> dict[str, Any]:
        """Options of `train`: the shards as one source, so that they share their labels."""
        return {"train_data": self._source("train"), "captions": str(self.captions)}

    @property
    def probing(self) -> dict[str, Any]:
        """Options of `train` for a probe of what is neither trained on nor tested."""
        names = str(self.names("probe"))
        return {"probe_data": self._source("probe"), "probe_class_names": names}

    @property
    def testing(self) -> dict[str, Any]:
        """Options of `evaluate` that measure a model on the test scenes."""
        return {
            "data": self._source("test"),
            "class_names": self.names("test"),
            "templates": TEMPLATES,
            "batch_size": 256,
        }

    def _source(self, split: str) -> str:
        return str(self.folder / f"{split}-*.tar")


def prepare_world(config: WorldConfig, folder: Path) -> World:
    """Compose a world in `folder`, or open the one that is there if it is of the same config."""
    described = folder / "world.json"  # written last
    settings = json.loads(json.dumps(asdict(config)))
    if not described.is_file() or read_json(described) != settings:
        described.unlink(missing_ok=True)
        write_world(config, folder)
        write_json(described, settings)
    return World(folder)


def write_world(config: WorldConfig, out: str | os.PathLike[str]) -> World:
    """Compose a world and write it below `out`; every file is complete or absent.

    Raises:
        ConfigError: there are not as many emoji as classes are asked for.
    """
    emoji = load_sprites().emoji
    splits = {split: split_indices(emoji, split, config.tones) for split in ("train", "test")}
    sizes = {
        "train": (config.train_classes, config.train_images),
        "test": (config.test_classes, config.test_images),
    }
    for split, (classes, _) in sizes.items():
        if not 2 <= classes <= len(splits[split]):
            raise ConfigError(
                f"{split}_classes={classes} is not allowed; allowed: 2 to {len(splits[split])}"
            )
    world, probe = World(Path(out)), probe_classes(config)
    world.folder.mkdir(parents=True, exist_ok=True)
    # Clutter comes from the split's own emoji, so that neither training nor the probe shows a test class.
    for split, (classes, images) in sizes.items():
        members = splits[split][:classes]
        _write_split(world, split, config, members, classes * images, splits[split])
    if len(probe):
        _write_split(world, "probe", config, probe, _probe_count(config), probe)
    lines = corpus(config.seed, config.captions, emoji)
    write_text(world.captions, "".join(f"{line}\n" for line in lines))
    return world


def probe_classes(config: WorldConfig) -> npt.NDArray[np.int64]:
    """The emoji of the probe's scenes: of the test's split, but things that are no test class.

    So that a thing has several scenes, at most as many as fill `PROBE_SHARE` with `test_images` of
    each; of the default world 33 are left. None if the test takes nearly all.
    """
    emoji = load_sprites().emoji
    test = split_indices(emoji, "test", config.tones)
    tested = {emoji[index].concept for index in test[: config.test_classes]}
    free = [index for index in test[config.test_classes :] if emoji[index].concept not in tested]
    most = max(2, -(-_probe_count(config) // config.test_images))
    return np.asarray(free[:most] if len(free) > 1 else [], dtype=np.int64)


def _probe_count(config: WorldConfig) -> int:
    return max(4, round(PROBE_SHARE * config.test_classes * config.test_images))


def _write_split(
    world: World,
    split: str,
    config: WorldConfig,
    classes: npt.NDArray[np.int64],
    count: int,
    clutter: npt.NDArray[np.int64],
) -> None:
    """Draw `count` scenes, equally of each class, and write them in shards, in shuffled order."""
    sprites = load_sprites()
    names = [f"{label}\t{sprites.emoji[row].name}\n" for label, row in enumerate(classes)]
    write_text(world.names(split), "".join(names))
    key = {"train": 4, "test": 5, "probe": 6}[split]
    generator = np.random.default_rng([config.seed, key])
    labels = generator.permutation(np.sort(np.resize(np.arange(len(classes)), count)))
    scenes = compose(generator, classes[labels], clutter, config.style)
    pixels = render(scenes, 2 * config.seed + key)
    captions = None
    if split != "train":  # whose captions are the corpus, aligned with no image
        captions = describe_all(scenes, 2 * config.seed + key, sprites.emoji)

    def members(rows: range) -> Iterator[tuple[str, bytes]]:
        for row in rows:
            name, one = f"{split}{row:06d}", sprites.emoji[scenes.main[row]]
            buffer = io.BytesIO()
            Image.fromarray(pixels[row]).save(buffer, "PNG", compress_level=1)
            yield f"{name}.png", buffer.getvalue()
            yield f"{name}.cls", str(labels[row]).encode()
            if captions is not None:
                yield f"{name}.txt", captions[row].encode()
            yield f"{name}.json", json.dumps({"emoji": one.code, "name": one.name}).encode()

    for number, first in enumerate(range(0, len(labels), config.shard_size)):
        path = world.folder / f"{split}-{number:06d}.tar"
        _write_shard(path, members(range(first, min(first + config.shard_size, len(labels)))))


def _write_shard(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    with atomic_path(path) as temporary, tarfile.open(temporary, "w") as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
