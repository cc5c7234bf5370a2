"""The pieces of the trainer: order of images, batches, schedule, groups, banks, towers."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pymcip.data import load_images
from pymcip.errors import ConfigError
from pymcip.mining import CaptionLists, CaptionTable
from pymcip.model import ClipModel
from pymcip.model.depthwise import speed_up_depthwise
from pymcip.model.towers import (
    discard_projector,
    image_parameters,
    image_projector,
    text_parameters,
    unlock_image_tower,
    unlock_text_tower,
)
from pymcip.ops import margin_softmax, order_bank
from pymcip.ops.arrays import MatrixParts
from pymcip.training import train
from pymcip.training.batches import (
    AugmentedImages,
    image_batches,
    random_state,
    reduced_transform,
    train_transform,
)
from pymcip.training.image_stage import ImageStage, caption_bank, order_caption_bank
from pymcip.training.optim import cosine_with_warmup, parameter_groups
from pymcip.training.sampling import Stream, epoch_order, random_generator
from pymcip.training.text_stage import Pairs, TextStage
from tests.conftest import settings_for


def table_of(rows: list[list[int]]) -> CaptionTable:
    counts = np.cumsum([0] + [len(row) for row in rows])
    ids = np.array([i for row in rows for i in row], dtype=np.int64)
    cosines = np.full(len(ids), 0.5, dtype=np.float32)
    return CaptionTable(indptr=counts.astype(np.int64), ids=ids, cosines=cosines, num_captions=10)


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    seed=st.integers(0, 10**6),
    balanced=st.booleans(),
    weighted=st.booleans(),
)
def test_epoch_order_draws_what_was_asked(
    sizes: list[int], seed: int, balanced: bool, weighted: bool
) -> None:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    source_ids = (labels >= len(sizes) // 2).astype(np.int64)
    present = np.unique(source_ids)
    weights = (1.0, 3.0) if weighted else None
    order = epoch_order(
        labels,
        source_ids,
        generator=random_generator(seed, Stream.IMAGE_ORDER),
        class_balanced=balanced,
        source_weights=weights,
    )
    n = len(labels)
    assert len(order) == n
    if not balanced and not weighted:
        assert sorted(order) == list(range(n))
    if weighted:
        total = sum((1.0, 3.0)[source] for source in present)
        for source in present:
            expected = n * (1.0, 3.0)[source] / total
            groups = len(np.unique(labels[source_ids == source])) if balanced else 1
            assert abs((source_ids[order] == source).sum() - expected) <= groups
    if balanced and not weighted:
        for source in present:
            classes = np.unique(labels[source_ids == source])
            counts = np.bincount(labels[order], minlength=len(sizes))[classes]
            assert counts.max() - counts.min() <= 1
    # within a class no image is drawn a second time before all were drawn once
    for label in np.unique(labels):
        repeats = np.bincount(order, minlength=n)[labels == label]
        if balanced:
            assert repeats.max() - repeats.min() <= 1


def test_epoch_order_depends_on_the_epoch_and_nothing_else() -> None:
    labels = np.arange(50) % 5
    zeros = np.zeros(50, dtype=np.int64)
    first = epoch_order(labels, zeros, generator=random_generator(1, Stream.IMAGE_ORDER, 0))
    again = epoch_order(labels, zeros, generator=random_generator(1, Stream.IMAGE_ORDER, 0))
    second = epoch_order(labels, zeros, generator=random_generator(1, Stream.IMAGE_ORDER, 1))
    assert first.tolist() == again.tolist()
    assert first.tolist() != second.tolist()


def test_schedule() -> None:
    shares = [cosine_with_warmup(step, warmup=4, total=20) for step in range(20)]
    assert shares[:4] == [0.25, 0.5, 0.75, 1.0]
    assert shares[4] == 1.0
    assert shares[12] == pytest.approx(0.5)
    assert sorted(shares[4:], reverse=True) == shares[4:]
    assert shares[-1] == pytest.approx(0.5 * (1 + math.cos(math.pi * 15 / 16)))
    floored = [cosine_with_warmup(step, warmup=4, total=20, floor=0.1) for step in range(4, 20)]
    assert floored == pytest.approx([0.1 + 0.9 * share for share in shares[4:]])
    assert cosine_with_warmup(0, warmup=0, total=1) == 1.0
    assert cosine_with_warmup(0, warmup=100, total=1) == 1.0


def test_augmentation_is_open_clips(tiny_clip: ClipModel) -> None:
    ramp = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (256, 1))).convert("RGB")

    def spread(aug_cfg: dict[str, Any]) -> float:
        pixels = train_transform(tiny_clip, 24, aug_cfg)(ramp)
        assert pixels.shape == (3, 24, 24)
        return float(pixels.max() - pixels.min())

    assert spread({"scale": (0.1, 0.2)}) < 0.7 * spread({"scale": (1.0, 1.0)})
    spread({"use_timm": True, "scale": (0.5, 1.0), "color_jitter": 0.2})


@pytest.mark.parametrize(
    ("aug_cfg", "word"),
    [
        ({"zoom": 2}, "zoom"),
        ({"color_jitter": 0.2}, "use_timm=True"),
        ({"re_prob": 0.2}, "use_timm=True"),
    ],
)
def test_augmentation_that_would_not_be_applied(
    tiny_clip: ClipModel, aug_cfg: dict[str, Any], word: str
) -> None:
    with pytest.raises(ConfigError, match=word):
        train_transform(tiny_clip, 32, aug_cfg)


def test_batches_do_not_depend_on_workers_or_on_where_they_start(
    tiny_images: Callable[..., Path], tiny_clip: ClipModel
) -> None:
    images = AugmentedImages(load_images(tiny_images()), train_transform(tiny_clip, 32, {}), seed=5)
    order = np.random.default_rng(0).permutation(12)

    def run(first: int, workers: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return list(
            image_batches(
                images,
                order,
                epoch=2,
                batch_size=4,
                numbers=range(first, 3),
                workers=workers,
                pin_memory=False,
            )
        )

    def generators() -> list[Any]:
        legacy = np.random.get_state()  # noqa: NPY002
        return [torch.get_rng_state().tolist(), random.getstate(), legacy[1].tolist()]

    state = generators()
    whole = run(0, 0)
    assert generators() == state
    for other, offset in ((run(0, 2), 0), (run(1, 0), 1)):
        for (pixels, rows), (expected_pixels, expected_rows) in zip(
            other, whole[offset:], strict=True
        ):
            assert torch.equal(pixels, expected_pixels)
            assert torch.equal(rows, expected_rows)
    assert torch.cat([rows for _, rows in whole]).tolist() == order.tolist()


def test_random_state_is_restored_after_an_error() -> None:
    before = torch.get_rng_state()

    def fail() -> None:
        with random_state(1):
            torch.rand(3)
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("resize", "aug_cfg"),
    [(None, {}), (None, {"scale": (0.5, 0.9)}), (1.125, {}), (1.5, {"color_jitter": 0.2})],
)
def test_reduced_images_have_the_same_crops(
    resize: float | None, aug_cfg: dict[str, Any], tiny_clip: ClipModel, tmp_path: Path
) -> None:
    """Of a JPEG that is read at a part of its size, and of a PNG, which is read as it is."""
    coarse = np.random.default_rng(0).integers(0, 256, (18, 24, 3), dtype=np.uint8)
    whole = Image.fromarray(coarse).resize((803, 601), Image.Resampling.BICUBIC)
    whole.save(tmp_path / "a.jpg", quality=95)
    whole.save(tmp_path / "b.png")
    data = load_images(tmp_path, labelled=False)
    plain = train_transform(tiny_clip, 32, aug_cfg, resize)
    transform, least = reduced_transform(plain)
    reduced = data.reduced(least)
    assert reduced.read(0).width in (101, 201)
    exact, found = (
        torch.stack([AugmentedImages(source, made, seed=1)[0, place, row][0] for place in range(8) for row in (0, 1)])
        for source, made in ((data, plain), (reduced, transform))
    )  # fmt: skip
    assert torch.equal(exact[1::2], found[1::2])
    deviation = torch.tensor(tiny_clip.preprocess_cfg["std"])[:, None, None]
    difference = 255 * deviation * (exact - found).abs()
    assert 0 < float(difference.mean()) < 1
    assert float(difference.max()) < 8
    moved = 255 * deviation * (exact[::2] - exact[::2].roll(1, dims=3)).abs()  # by a pixel
    assert float(moved.mean()) > 10


def test_reduced_decoding_reaches_the_training_images(
    tiny_images: Callable[..., Path], tiny_clip: ClipModel
) -> None:
    data = load_images(tiny_images())
    sides = []
    for aug_cfg in ({}, {"scale": (0.25, 1)}):
        chosen = settings_for(reduced_decoding=True, train_size=32, aug_cfg=aug_cfg)
        stage = ImageStage(tiny_clip, data, chosen, class_rows=None)
        assert stage.data.least_side is None
        sides.append(stage.images.data.least_side)
    assert sides == [78, 148]  # 2 * 32 / sqrt(0.75 * 0.9), and with 0.25
    with pytest.raises(ConfigError, match="timm"):
        reduced_transform(train_transform(tiny_clip, 32, {"use_timm": True}))


def test_parameter_groups_exempt_vectors(tiny_clip: ClipModel) -> None:
    groups = parameter_groups(image_parameters(tiny_clip.model), lr=0.1, wd=0.2)
    decay = {group["weight_decay"]: group["params"] for group in groups}
    assert all(p.ndim >= 2 for p in decay[0.2])  # type: ignore[attr-defined]
    count = sum(len(group["params"]) for group in groups)  # type: ignore[arg-type]
    assert count == sum(1 for _ in image_parameters(tiny_clip.model))
    every = parameter_groups(image_parameters(tiny_clip.model), lr=0.1, wd=0.2, exempt=False)
    assert [group["weight_decay"] for group in every] == [0.2]


def test_towers_split_the_model_without_rest(tiny_clip: ClipModel) -> None:
    image = {name for name, _ in image_parameters(tiny_clip.model)}
    text = {name for name, _ in text_parameters(tiny_clip.model)}
    every = {name for name, _ in tiny_clip.model.named_parameters()}
    assert image & text == set()
    assert every - image - text == {"logit_scale"}


def test_unlocking(tiny_clip: ClipModel) -> None:
    model = tiny_clip.model
    unlock_image_tower(tiny_clip, projector="lock", unlock_layers=None)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in image_parameters(model)} - {"visual.proj"}
    unlock_image_tower(tiny_clip, projector="keep", unlock_layers=1)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"visual.proj"}
    with pytest.raises(ConfigError, match="nothing to train"):
        unlock_image_tower(tiny_clip, projector="lock", unlock_layers=1)
    unlock_text_tower(tiny_clip, None)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in text_parameters(model)}


def test_discarded_projector_leaves_the_towers_own_features(tiny_clip: ClipModel) -> None:
    pixels = torch.randn(2, 3, 32, 32)
    width = tiny_clip.model.visual.proj.shape[0]
    features: list[torch.Tensor] = []
    proj = tiny_clip.model.visual.proj
    tiny_clip.model.visual.proj = None
    with torch.no_grad():
        features.append(tiny_clip.image_features(pixels))
    tiny_clip.model.visual.proj = proj
    discard_projector(tiny_clip, seed=0)
    with torch.no_grad():
        features.append(tiny_clip.image_features(pixels))
        texts = tiny_clip.encode_texts(["a", "b"])
    assert torch.allclose(features[0], features[1], atol=1e-6)
    assert tiny_clip.embed_dim == width
    assert texts.shape == (2, width)
    assert len(image_projector(tiny_clip.model)) == 1


def test_caption_banks() -> None:
    table = table_of([[4, 2], [], [2, 7]])
    vectors = np.arange(10, dtype=np.float16)[:, None]
    bank, positives = caption_bank(table, vectors, "mined", 0)
    assert bank[:].ravel().tolist() == [2, 4, 7]
    assert positives.ids.tolist() == [1, 0, 0, 2]
    bank, positives = caption_bank(table, vectors, "bank", 0)
    assert len(bank) == 10
    assert positives.ids.tolist() == [4, 2, 2, 7]
    bank, positives = caption_bank(table, vectors, 6, 0)
    assert len(bank) == 6
    assert bank[:].ravel()[positives.ids].tolist() == [4, 2, 2, 7]
    batch = positives.take(np.array([2, 1, 0]))
    assert batch.indptr.tolist() == [0, 2, 2, 4]
    assert bank[:].ravel()[batch.ids].tolist() == [2, 7, 4, 2]


def test_an_ordered_bank_has_the_same_positives() -> None:
    vectors = np.random.default_rng(0).standard_normal((600, 8)).astype(np.float16)
    table = table_of([[4, 2], [], [2, 599]])
    read = MatrixParts([vectors[:250], vectors[250:]])
    bank, positives = caption_bank(table, read, "bank", 0)
    rows, moved = order_caption_bank(bank, positives, 0, torch.device("cpu"))
    ordered = rows[:]
    assert np.array_equal(ordered, vectors[order_bank(vectors)])
    assert np.array_equal(ordered[moved.ids], vectors[positives.ids])
    assert not np.array_equal(ordered, vectors)
    assert np.array_equal(np.sort(ordered, axis=0), np.sort(vectors, axis=0))


@pytest.mark.parametrize(("form", "repel"), [("apart", 0), ("compete", 0), ("compete", 0.1)])
def test_negatives_of_the_step_are_the_captions_of_its_images(
    form: str, repel: float, tiny_images: Callable[..., Path], tiny_clip: ClipModel
) -> None:
    """Five images whose captions are 0 to 3; one has none, and two have caption 1."""
    data = load_images(tiny_images())
    table = table_of([[0, 1], [1], [], [2], [3, 0], *[[i] for i in range(3, 10)]])
    vectors = np.random.default_rng(0).standard_normal((12, 16)).astype(np.float16)
    bank, positives = caption_bank(table, vectors, "batch", 0)
    settings = settings_for(negatives="batch", positives=form, repel=repel)
    stage = ImageStage(tiny_clip, data, settings, class_rows=None, bank=bank, positives=positives)
    pixels, rows = torch.randn(5, 3, 32, 32), torch.arange(5)
    found = stage.backward([(pixels, rows)])["caption_margin"]
    expected = margin_softmax(
        tiny_clip.image_features(pixels), torch.from_numpy(vectors[:4]).float(),
        torch.tensor([0, 2, 3, 3, 4, 6]), torch.tensor([0, 1, 1, 2, 3, 0]), positives=form,
        repel=repel,
    )  # fmt: skip
    assert float(found) == pytest.approx(float(expected.detach().sum()) / 4, rel=1e-5)
    alone = stage.backward([(pixels[2:3], rows[2:3])])
    assert float(alone["caption_margin"]) == 0


@pytest.mark.parametrize("changes", [{}, {"negatives": "batch"}, {"positives": "compete"}])
def test_accumulated_gradients_are_those_of_one_large_batch(
    changes: dict[str, Any], tiny_images: Callable[..., Path], tiny_clip: ClipModel
) -> None:
    """12 images as one batch or as 4 + 5 + 3: the same mean losses, gradients equal to rounding."""
    data = load_images(tiny_images())
    table = table_of([[i % 7, (i + 3) % 7] if i % 3 else [] for i in range(12)])
    vectors = np.random.default_rng(0).standard_normal((10, 16)).astype(np.float16)
    bank, positives = caption_bank(table, vectors, "bank", 0)
    stage = ImageStage(
        tiny_clip, data, settings_for(**changes), class_rows=None, bank=bank, positives=positives
    )
    pixels = torch.randn(12, 3, 32, 32)
    rows = torch.arange(12)
    stage.train_mode()
    gradients, losses = [], []
    for cut in ([12], [4, 5, 3]):
        stage.optimizer.zero_grad()
        values = stage.backward(list(zip(pixels.split(cut), rows.split(cut), strict=True)))
        losses.append({name: float(value) for name, value in values.items()})
        gradients.append(
            [p.grad.clone() for group in stage.optimizer.param_groups for p in group["params"]]
        )
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0]["loss"] == pytest.approx(
        0.5 * losses[0]["arc_margin"] + 0.5 * losses[0]["caption_margin"], rel=1e-5
    )
    for whole, parts in zip(*gradients, strict=True):
        # sums of 12 fp32 terms in another order: a few units in the last place of the largest
        assert torch.allclose(whole, parts, rtol=0, atol=1e-5 * max(1.0, whole.abs().max()))


def test_accumulated_text_gradients_are_those_of_one_large_batch(tiny_clip: ClipModel) -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(8, 16, generator=generator), dim=1)
    pairs = Pairs(
        vectors, CaptionLists(np.arange(9), np.arange(8) % 6), [f"caption {i}" for i in range(6)]
    )
    stage = TextStage(tiny_clip, pairs, settings_for())
    stage.train_mode()
    gradients = []
    rows, captions = np.arange(8), np.arange(8) % 6
    for cut in ([slice(0, 8)], [slice(0, 3), slice(3, 8)]):
        stage.optimizer.zero_grad()
        stage.backward([(rows[part], captions[part]) for part in cut])
        gradients.append(
            [p.grad.clone() for group in stage.optimizer.param_groups for p in group["params"]]
        )
    for whole, parts in zip(*gradients, strict=True):
        assert torch.allclose(whole, parts, rtol=0, atol=1e-5 * max(1.0, whole.abs().max()))


def test_copies_are_no_negatives_in_the_text_stage(tiny_clip: ClipModel) -> None:
    vectors = torch.eye(4, 16)
    vectors[1] = vectors[0]
    texts = [f"caption {i}" for i in range(4)]
    pairs = Pairs(
        vectors, CaptionLists(np.arange(5), np.arange(4)), texts, pictures=np.array([0, 0, 1, 2])
    )
    stage = TextStage(tiny_clip, pairs, settings_for())
    rows = np.arange(4)
    got = stage.backward([(rows, rows)])["loss"].item()
    logits = tiny_clip.logit_scale * vectors @ tiny_clip.encode_texts(texts).T
    logits[0, 1] = logits[1, 0] = float("-inf")
    wanted = -sum(torch.log_softmax(logits, dim)[range(4), range(4)].mean() / 2 for dim in (0, 1))
    assert got == pytest.approx(float(wanted), rel=1e-5)


def test_text_stage_shows_each_image_once_with_one_of_its_captions(tiny_clip: ClipModel) -> None:
    indptr, ids = np.array([0, 2, 2, 3, 6]), np.array([0, 1, 2, 3, 4, 5])
    pairs = Pairs(torch.eye(4, 16), CaptionLists(indptr, ids), [f"caption {i}" for i in range(6)])
    config = settings_for(rea_batch_size=2, rea_epochs=2)
    stage = TextStage(tiny_clip, pairs, config)
    assert stage.steps_per_epoch == 1  # three images have captions; a step takes two
    drawn = set()
    for epoch in range(60):
        for ((rows, captions),) in stage.steps(epoch, 0):
            assert len(set(rows)) == 2
            for row, caption in zip(rows, captions, strict=True):
                assert caption in ids[indptr[row] : indptr[row + 1]]
                drawn.add((row, caption))
    assert drawn == {(0, 0), (0, 1), (2, 2), (3, 3), (3, 4), (3, 5)}


def test_text_stage_shows_class_names_half_of_the_time(tiny_clip: ClipModel) -> None:
    """Image 1 has no caption, and image 3, the last, neither: they are shown with names alone."""
    indptr, ids = np.array([0, 2, 2, 3, 3]), np.array([0, 1, 2])
    names = np.array([[3, 4], [5, 6], [3, 4], [5, 6]])
    pairs = Pairs(
        torch.eye(4, 16), CaptionLists(indptr, ids), [f"text {i}" for i in range(7)], names
    )
    stage = TextStage(tiny_clip, pairs, settings_for(rea_batch_size=4))
    counts: dict[int, list[int]] = {row: [0] * 7 for row in range(4)}
    epochs = 400
    for epoch in range(epochs):
        for ((rows, texts),) in stage.steps(epoch, 0):
            assert sorted(rows) == [0, 1, 2, 3]
            for row, text in zip(rows, texts, strict=True):
                counts[int(row)][int(text)] += 1
    again = [texts for ((_, texts),) in stage.steps(7, 0)]
    assert np.array_equal(again, [texts for ((_, texts),) in stage.steps(7, 0)])
    shares = {0: [1 / 4, 1 / 4, 0, 1 / 4, 1 / 4, 0, 0], 1: [0, 0, 0, 0, 0, 1 / 2, 1 / 2],
              2: [0, 0, 1 / 2, 1 / 4, 1 / 4, 0, 0], 3: [0, 0, 0, 0, 0, 1 / 2, 1 / 2]}  # fmt: skip
    for row, expected in shares.items():
        for count, share in zip(counts[row], expected, strict=True):
            # five standard deviations of a binomial count; of shares that are 0 none
            assert abs(count - share * epochs) <= 5 * (epochs * share * (1 - share)) ** 0.5


@pytest.mark.parametrize(("stride", "kernel", "padding"), [(1, 3, 1), (2, 5, 2), (2, 3, 0)])
def test_depthwise_convolutions_have_autocasts_gradients(
    stride: int, kernel: int, padding: int
) -> None:
    """Forward and input gradient: autocast's bits. Weight gradient: nearer to fp64 than autocast."""
    layer = torch.nn.Conv2d(8, 8, kernel, stride, padding, groups=8, bias=False)
    torch.manual_seed(0)
    pixels, results = torch.randn(4, 8, 11, 13), []
    for changed in (False, True):
        assert speed_up_depthwise(layer) == 1 if changed else "forward" not in vars(layer)
        x = pixels.clone().requires_grad_()
        layer.weight.grad = None
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x)
        y.float().square().sum().backward()
        results.append((y.detach(), x.grad, layer.weight.grad))
    (y, x_grad, w_grad), (new_y, new_x_grad, new_w_grad) = results
    assert torch.equal(y, new_y)
    assert x_grad is not None
    assert torch.equal(x_grad, new_x_grad)
    assert new_w_grad.dtype == torch.float32
    rounded = [value.to(torch.bfloat16).double() for value in (pixels, layer.weight)]
    exact = torch.nn.grad.conv2d_weight(
        rounded[0], layer.weight.shape, (2 * y).double(), stride, padding, groups=8
    )
    assert (new_w_grad - exact).abs().max() <= (w_grad - exact).abs().max()
    assert torch.allclose(new_w_grad.double(), exact, rtol=1e-4, atol=1e-4)
    with torch.no_grad():  # without autocast it is the plain layer
        assert torch.equal(layer(pixels), type(layer).forward(layer, pixels))
    assert set(layer.state_dict()) == {"weight"}


def test_a_run_that_is_older_than_an_option_can_be_resumed(
    tmp_path: Path, tiny_model_dir: Path, tiny_images: Callable[..., Path]
) -> None:
    options: dict[str, Any] = {
        "model": f"local-dir:{tiny_model_dir}",
        "train_data": str(tiny_images()),
        "out": tmp_path / "run",
        "method": "gpr",
        "epochs": 1,
        "device": "cpu",
    }
    result = train(**options)
    written = json.loads((result.out / "config.json").read_text())
    written.pop("caption_noise")
    (result.out / "config.json").write_text(json.dumps(written))
    assert train(**options, resume="latest") == result
    with pytest.raises(ConfigError, match=r"caption_noise: was 0\.0, now 0\.5"):
        train(**options, resume="latest", caption_noise=0.5)
