"""Decoding images: damaged files, modes, batches with what could not be decoded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pymcip.data import load_images
from pymcip.data.loading import Skipped, iterate_batches
from pymcip.errors import DecodeError
from tests.conftest import encoded, picture

# Decoding


def corrupted(kind: str) -> bytes:
    whole = encoded(picture(0, size=200))
    return {
        "truncated": whole[: len(whole) // 2],
        "header only": whole[:20],
        "empty": b"",
        "text": b"<html>404</html>",
        "png": encoded(picture(0), "PNG")[:60] + b"\0" * 40,
    }[kind]


@pytest.mark.parametrize("kind", ["truncated", "header only", "empty", "text", "png"])
def test_damaged_image(kind: str, tiny_images: Callable[..., Path]) -> None:
    folder = tiny_images(classes=2, per_class=2)
    (folder / "class0" / "0.jpg").write_bytes(corrupted(kind))
    data = load_images(folder)
    with pytest.raises(DecodeError, match=r"class0/0\.jpg can't be decoded \(\d+ bytes\)"):
        data.read(0)
    assert data.read(1).mode == "RGB"


@pytest.mark.parametrize("limit", [1000, 799])  # Pillow warns below twice its limit, raises above
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bomb(
    limit: int, tiny_images: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load_images(tiny_images(classes=2, per_class=1))  # 40 x 40 = 1600 pixels
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(DecodeError, match=f"more than {limit} pixels.*decompression bomb"):
        data.read(0)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1600)
    assert data.read(0).size == (40, 40)


def test_decompression_bomb_where_warnings_are_errors(
    tiny_images: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load_images(tiny_images(classes=2, per_class=1))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DecodeError, match="decompression bomb"):
        data.read(0)


def test_modes_become_rgb(tmp_path: Path) -> None:
    folder = tmp_path / "modes"
    colour = Image.new("RGB", (8, 8), (200, 100, 50))
    palette = colour.quantize(4)
    images = {
        "rgba.png": Image.new("RGBA", (8, 8), (200, 100, 50, 0)),
        "palette.png": palette,
        "palette.gif": palette,
        "cmyk.jpg": colour.convert("CMYK"),
        "grey.png": Image.new("L", (8, 8), 77),
        "greyalpha.png": Image.new("LA", (8, 8), (77, 10)),
        "sixteen.png": Image.fromarray(np.full((8, 8), 77 * 256 + 13, np.uint16)),
        "bits.png": Image.new("1", (8, 8), 1),
    }
    for number, (name, image) in enumerate(images.items()):
        path = folder / f"class{number % 2}" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        extra: dict[str, Any] = {"transparency": bytes([0, 9, 9, 9])}
        image.save(path, **(extra if name == "palette.png" else {}))
    data = load_images(folder)
    means = {
        Path(data.key(i)).name: np.asarray(data.read(i)).mean(axis=(0, 1)) for i in range(len(data))
    }
    assert len(means) == len(images)
    for name in ("rgba.png", "palette.png", "palette.gif", "cmyk.jpg"):
        assert np.abs(means[name] - [200, 100, 50]).max() <= 4, name
    for name in ("grey.png", "greyalpha.png", "sixteen.png"):
        assert means[name].tolist() == [77, 77, 77], name
    assert means["bits.png"].tolist() == [255, 255, 255]


def test_exif_orientation_is_left(tmp_path: Path) -> None:
    wide = Image.new("RGB", (30, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    wide.save(tmp_path / "wide.jpg", exif=exif)
    assert load_images(tmp_path, labelled=False).read(0).size == (30, 10)


# Batches


@pytest.mark.parametrize("workers", [0, 1])
def test_batches(workers: int, shards: Callable[..., list[Path]]) -> None:
    samples = [{"jpg": picture(i), "cls": i % 2} for i in range(7)]
    samples[2]["jpg"] = samples[4]["jpg"] = b"broken"
    data = load_images(shards(samples)[0].parent)
    batches = list(iterate_batches(data, [6, 4, 2, 1, 0], _mean, batch_size=2, workers=workers))
    assert [batch.indices.tolist() for batch in batches] == [[6], [1], [0]]
    assert [[item.index for item in batch.skipped] for batch in batches] == [[4], [2], []]
    assert all(isinstance(item, Skipped) for batch in batches for item in batch.skipped)
    assert "000004.jpg" in batches[0].skipped[0].key
    assert torch.equal(batches[1].images[0], _mean(data.read(1)))


def test_batch_without_any_image(shards: Callable[..., list[Path]]) -> None:
    samples = [{"jpg": b"broken", "cls": i} for i in range(2)]
    data = load_images(shards(samples)[0])
    (batch,) = iterate_batches(data, np.arange(2), _mean, batch_size=2)
    assert len(batch.indices) == len(batch.images) == 0
    assert len(batch.skipped) == 2


def _mean(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image).mean(axis=(0, 1)))[:, None, None].float()


def test_large_jpegs_are_read_at_a_part_of_their_size(shards: Callable[..., list[Path]]) -> None:
    """The part is the least of 1, 1/2, 1/4 and 1/8 that keeps the shorter side as long as asked."""
    large = picture(0, size=40).resize((330, 250), Image.Resampling.BICUBIC)
    samples = [
        {"jpg": large, "cls": 0},
        {"png": encoded(large, "PNG"), "cls": 1},
        {"jpg": picture(1, size=90), "cls": 0},
    ]
    data = load_images(shards(samples)[0].parent)
    for least, size in [(251, (330, 250)), (125, (165, 125)), (124, (165, 125)), (60, (83, 63))]:
        reduced = data.reduced(least)
        assert reduced.read(0).size == size
        assert reduced.read(1).size == (330, 250)
        assert reduced.fingerprint() != data.fingerprint()
    boxed = data.cropped([0, 0, 200, 200]).reduced(60)
    assert boxed.read(0).tobytes() == data.cropped([0, 0, 200, 200]).read(0).tobytes()
    whole, part = (
        np.asarray(found.read(0).resize((33, 25)), float) for found in (data, data.reduced(60))
    )
    assert 0 < np.abs(whole - part).mean() < 3  # of 255, of a picture of noise and edges
    assert data.reduced(60).digest(0) == data.digest(0)
