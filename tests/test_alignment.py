"""The alignment budget: mixtures, the probe, the search, and whole runs."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import pymcip
from pymcip.data import load_images
from pymcip.errors import ConfigError, DataError
from pymcip.model import ClipModel, load
from pymcip.training import probe_sources
from pymcip.training.budget import AlignmentBudget
from pymcip.training.checkpoints import load_checkpoint
from pymcip.training.interpolation import interpolated, largest_coefficient
from pymcip.training.mixtures import mixtures, other_views
from pymcip.training.probe import AlignmentProbe, Beliefs, Kept, Truth, ratio_of_sums, right_answers
from pymcip.training.probe_sources import affordable, load_probe_sources, probe_pixels, probe_rows
from pymcip.training.sampling import Stream, random_generator
from tests.conftest import lines_of, picture, train_until_killed

THINGS = ["red square", "green square", "dog", "city at night", "wooden box", "tree", "cup", "car"]
TEXTS = [f"a photo of a {thing}, number {number}" for number in range(16) for thing in THINGS]


def perturbed(clip: ClipModel, amount: float, seed: int = 0) -> ClipModel:
    """The same model, its weights moved by `amount` of their own spread."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in clip.model.named_parameters():
            if name != "logit_scale":
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += amount * parameter.std(correction=0) * noise
    return clip


def random_pixels(count: int, size: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(7))


# --- mixtures -----------------------------------------------------------------------------------

GREY = {"mean": (0.48, 0.46, 0.41), "std": (0.27, 0.26, 0.28)}


def normalised(images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(GREY[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    return (images - mean) / std


def shown(pixels: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(GREY[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    return pixels * std + mean


def test_mixtures_depend_on_the_generator_alone() -> None:
    pixels = normalised(torch.rand(5, 3, 20, 24, generator=torch.Generator().manual_seed(0)))
    before = pixels.clone()
    state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    one = mixtures(pixels, 9, np.random.default_rng(3), **GREY)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert np.array_equal(np.random.get_state()[1], state[1])  # noqa: NPY002
    assert torch.equal(pixels, before)
    assert one.shape == (9, 3, 20, 24)
    assert torch.equal(one, mixtures(pixels, 9, np.random.default_rng(3), **GREY))
    assert not torch.equal(one, mixtures(pixels, 9, np.random.default_rng(4), **GREY))
    assert shown(one).min() >= -1e-6
    assert shown(one).max() <= 1 + 1e-6
    assert mixtures(pixels, 0, np.random.default_rng(3), **GREY).shape == (0, 3, 20, 24)


def test_rectangles_are_pasted_and_colours_changed() -> None:
    """Of plain mid-grey images only the brightness can change: what differs in it was pasted."""
    pixels = normalised(torch.full((2, 3, 40, 40), 0.5))
    made = shown(mixtures(pixels, 600, np.random.default_rng(0), **GREY))
    corner = made[:, :, :1, :1]
    inner = ((made - corner).abs() > 1e-4).all(1)
    areas = inner.float().mean((1, 2))
    areas = torch.minimum(areas, 1 - areas)  # the corner itself may lie in the rectangle
    pasted = areas > 0
    # 4 of 10 are pasted; of those, both parts keep their colours (0.4 * 0.4) and look the same
    assert abs(float(pasted.float().mean()) - 0.4 * (1 - 0.16)) < 0.05
    assert areas[pasted].min() >= 0.29**2
    assert areas[pasted].max() <= 0.5
    grey = (made[:, 0, 0, 0] - 0.5).abs() < 1e-4
    assert 0.15 < float(grey.float().mean()) < 0.4


def test_other_views_show_the_same() -> None:
    """A plain image stays plain, of a left half and a right half both are seen, all drawn anew."""
    plain = torch.full((200, 3, 20, 30), 0.5)
    made = other_views(plain, np.random.default_rng(0))
    assert made.shape == plain.shape
    assert (made - made[:, :1, :1, :1]).abs().max() < 1e-6
    values = made[:, 0, 0, 0]
    assert len(values.unique()) == 200
    # 0.5 * uniform(0.8, 1.2) + normal(0, 0.15): mean 0.5, deviation 0.161; four standard errors
    assert abs(float(values.mean()) - 0.5) < 4 * 0.161 / 200**0.5
    assert abs(float(values.std()) - 0.161) < 4 * 0.161 / 400**0.5
    halves = torch.zeros(200, 3, 20, 30)
    halves[..., 15:] = 1.0
    made = other_views(halves, np.random.default_rng(1))
    left, right = made[..., 0].mean((1, 2)), made[..., -1].mean((1, 2))
    flipped = (left > right).float().mean()
    assert (left - right).abs().min() > 0.79  # contrast of 0.8 at least
    assert abs(float(flipped) - 0.5) < 4 * 0.5 / 200**0.5
    assert torch.equal(made, other_views(halves, np.random.default_rng(1)))


# --- the probe ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("captions", "rows"), [(1, 0), (4, 2), (100, 50), (256, 64), (1000, 250)])
def test_rows_of_the_probe(captions: int, rows: int) -> None:
    drawn = probe_rows(captions, seed=3)
    assert drawn.dtype == np.int64
    assert len(np.unique(drawn)) == len(drawn) == rows
    assert set(drawn.tolist()) <= set(range(captions))
    assert np.array_equal(drawn, probe_rows(captions, seed=3))
    assert len(probe_rows(captions, seed=3, part=False)) == captions


def test_large_corpora_give_4096_rows() -> None:
    drawn = probe_rows(100_000, seed=0)
    assert len(drawn) == len(probe_rows(5000, seed=0, part=False)) == 4096
    assert not np.array_equal(drawn, probe_rows(100_000, seed=1))


def test_the_probe_costs_at_most_its_share() -> None:
    count = affordable(10_000 * 3, 11, fewest=32, most=1024)
    assert count * 11 <= 0.08 * 3 * 10_000 * 3 < (count + 1) * 11
    assert affordable(100, 11, fewest=32, most=1024) == 32
    assert affordable(10**7, 11, fewest=32, most=1024) == 1024


def oracle(
    base: np.ndarray, beliefs: np.ndarray, tuned: np.ndarray, scale: float, tasks: list[np.ndarray]
) -> float:
    """The definition, in fp64: rows are queries, columns what they choose from."""
    given = own = 0.0
    for row in range(len(base)):
        for task in tasks:
            logits = scale * beliefs[row, task]
            shares = np.exp(logits - logits.max())
            shares /= shares.sum()
            given += shares[np.argmax(tuned[row, task])]
            own += shares[np.argmax(base[row, task])]
    return given / own


@pytest.mark.parametrize(
    ("images", "texts", "names"), [(7, 6, False), (30, 40, False), (30, 80, True)]
)
def test_probe_against_the_definition(
    images: int, texts: int, names: bool, tiny_clip: ClipModel, tiny_model_dir: Path
) -> None:
    pixels = random_pixels(images).half()
    asked = TEXTS[:texts]
    prompts = [template.format(text) for text in asked for template in ("a photo of a {}.", "{}")]
    probe = AlignmentProbe(tiny_clip, pixels, asked, seed=5, names=names)

    def embed(clip: ClipModel, of: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        vectors = clip.encode_texts(prompts if names else asked).numpy().astype(np.float64)
        if names:
            vectors = vectors.reshape(texts, 2, -1).mean(1)
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return clip.encode_images(of).numpy().astype(np.float64), vectors

    scale = float(np.exp(float(tiny_clip.model.logit_scale.detach())))  # type: ignore[arg-type,union-attr,operator]
    original_images, original_texts = embed(tiny_clip, pixels.float())
    views = other_views(pixels.float(), random_generator(5, Stream.PROBE_VIEWS))
    beliefs = embed(tiny_clip, views)[0] @ original_texts.T
    tuned = perturbed(load(f"local-dir:{tiny_model_dir}", device="cpu", precision="fp32"), 0.3)
    tuned_images, tuned_texts = embed(tuned, pixels.float())
    base = original_images @ original_texts.T
    assert isinstance(probe.image_to_text, Beliefs)
    assert isinstance(probe.text_to_image, Beliefs)
    text_tasks, image_tasks = probe.image_to_text.tasks, probe.text_to_image.tasks
    assert len(text_tasks) == (1 if names or texts <= 8 else 200)
    assert len(image_tasks) == (1 if images <= 8 else 200)
    assert {len(set(task.tolist())) for task in text_tasks} == {texts if names else min(8, texts)}
    for anew, now in ((False, original_texts), (True, tuned_texts)):
        kept = probe.measure(tuned, texts=anew)
        similarities = tuned_images @ now.T
        forth = oracle(base, beliefs, similarities, scale, text_tasks)
        back = oracle(base.T, beliefs.T, similarities.T, scale, image_tasks)
        assert kept.image_to_text == pytest.approx(forth, abs=1e-6)
        assert kept.text_to_image == pytest.approx(back, abs=1e-6)
        assert kept.alignment == min(kept.image_to_text, kept.text_to_image) != 1
    only_texts = probe.measure(tuned, images=False, texts=True)
    forth = oracle(base, beliefs, original_images @ tuned_texts.T, scale, text_tasks)
    assert only_texts.image_to_text == pytest.approx(forth, abs=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "amp_bf16"])
@pytest.mark.parametrize("stored", [False, True])
def test_the_original_keeps_everything(precision: str, stored: bool, tiny_model_dir: Path) -> None:
    clip = load(f"local-dir:{tiny_model_dir}", device="cpu", precision=precision)
    vectors = clip.encode_texts(TEXTS).half() if stored else None
    probe = AlignmentProbe(clip, random_pixels(130), TEXTS, seed=0, vectors=vectors)
    kept = probe.measure(clip, texts=not stored)
    assert (kept.image_to_text, kept.text_to_image) == (1.0, 1.0)
    assert probe.measure(perturbed(clip, 0.02)) != kept


def test_the_scale_is_at_most_100_as_in_training(
    tiny_clip: ClipModel, tiny_model_dir: Path
) -> None:
    """The original is as sure in the probe as in the losses: CLIP clips the scale at 100."""
    pixels, kept = random_pixels(40), []
    tuned = perturbed(load(f"local-dir:{tiny_model_dir}", device="cpu", precision="fp32"), 0.3)
    for scale in (100.0, 400.0):
        with torch.no_grad():
            tiny_clip.model.logit_scale.fill_(np.log(scale))  # type: ignore[union-attr,operator]
        probe = AlignmentProbe(tiny_clip, pixels, TEXTS, seed=0)
        kept.append(probe.measure(tuned, texts=True))
    assert kept[0] == kept[1] != probe.measure(tiny_clip, texts=True)


def test_an_answer_the_original_was_sure_of_costs_more(tiny_clip: ClipModel) -> None:
    """Two texts, p0 by hand: the scale makes the original sure, and the tuned one errs always."""
    with torch.no_grad():
        tiny_clip.model.logit_scale.fill_(np.log(100.0))  # type: ignore[union-attr,operator]
    pixels, texts = random_pixels(8), TEXTS[:2]
    images = tiny_clip.encode_images(pixels.half().float()).double()
    views = other_views(pixels.half().float(), random_generator(0, Stream.PROBE_VIEWS))
    vectors = tiny_clip.encode_texts(texts).double()
    signs = (images @ vectors.T).diff(dim=1)[:, 0].sign()
    seen = (tiny_clip.encode_images(views).double() @ vectors.T).diff(dim=1)[:, 0]
    probe = AlignmentProbe(tiny_clip, pixels, texts, seed=0)
    sure = torch.sigmoid(100 * signs * seen)  # p0 of the original's answers
    expected = float((1 - sure).sum() / sure.sum())
    wrong = probe.features @ probe.vectors.flip(0).T  # every answer is the other one
    assert probe.image_to_text.kept(wrong)[0] == pytest.approx(expected, rel=1e-4)


def test_pixels_of_the_probe(
    tiny_clip: ClipModel, tiny_images: Callable[..., Path], tmp_path: Path
) -> None:
    training = load_images(tiny_images("train"))
    mixed, rows = probe_pixels(tiny_clip, None, training, 40, 0, 0)
    assert len(rows) == 40
    assert mixed.shape == (40, 3, 32, 32)  # more than there are images
    assert mixed.dtype == torch.float16
    assert torch.equal(mixed, probe_pixels(tiny_clip, None, training, 40, 0, 0)[0])
    given = load_images(tiny_images("given", classes=2), labelled=False)
    own, rows = probe_pixels(tiny_clip, given, training, 40, 0, 0)
    assert sorted(rows.tolist()) == list(range(8))
    for row, image in zip(rows.tolist(), own, strict=True):
        assert torch.equal(image, tiny_clip.preprocess_val(given.read(row)).half())
    assert len(probe_pixels(tiny_clip, given, training, 5, 0, 0)[0]) == 5
    (tmp_path / "bad").mkdir()
    for index in range(3):
        (tmp_path / "bad" / f"{index}.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match="0 of 3 images of the probe"):
        probe_pixels(tiny_clip, load_images(tmp_path / "bad", labelled=False), training, 5, 0, 0)


def test_memory_of_the_probe_is_bounded(
    tiny_clip: ClipModel, tiny_images: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe_sources, "PIXEL_BYTES", 2 * 3 * 32 * 32 * 100)
    training = load_images(tiny_images("train"))
    pixels, _ = probe_pixels(tiny_clip, None, training, 1000, 0, 0)
    assert 100 <= len(pixels) < 100 + probe_sources.READ_BATCH


# --- the probe, where right answers are known ---------------------------------------------------


def drawn_accuracy(similarities: np.ndarray, right: np.ndarray, candidates: int) -> float:
    """The definition in fp64, all sets of candidates tried one by one."""
    shares = []
    for row, own in zip(similarities.astype(np.float64), right, strict=True):
        wrong = np.flatnonzero(~own)
        sets = list(itertools.combinations(wrong, min(candidates - 1, len(wrong))))
        wins = [
            all(row[one] > row[other] for other in others)
            for one in np.flatnonzero(own)
            for others in sets
        ]
        if wins:
            shares.append(np.mean(wins))
    return float(np.mean(shares))


def drawn_candidates(similarities: np.ndarray, right: np.ndarray) -> int:
    """How many candidates make the task neither too hard nor, below 8, a matter of luck."""
    for candidates in (64, 32, 16):
        if drawn_accuracy(similarities, right, candidates) >= 0.5:
            return candidates
    return 8


@pytest.mark.parametrize("candidates", [1, 2, 4, 100])
def test_right_answers_are_the_mean_over_all_sets(candidates: int) -> None:
    generator = np.random.default_rng(0)
    similarities = generator.integers(0, 12, (7, 9)).astype(np.float32)  # with ties
    right = generator.random((7, 9)) < 0.3
    right[3], right[5] = False, True  # a query that nothing answers, and one that all do
    found = right_answers(torch.from_numpy(similarities), torch.from_numpy(right), candidates)
    assert len(found) == 6
    assert float(found.mean()) == pytest.approx(
        drawn_accuracy(similarities, right, candidates), abs=1e-9
    )


def test_right_answers_among_many_candidates() -> None:
    """Of 5000 others g are more similar: the chance that 63 of them are none of the g."""
    above = np.array([0, 1, 50, 4937, 4938])
    similarities = torch.zeros(5, 5001)
    for row, count in enumerate(above.tolist()):
        similarities[row, 1 : count + 1] = 2.0
    similarities[:, 0] = 1.0
    right = torch.zeros(5, 5001, dtype=torch.bool)
    right[:, 0] = True
    chances = [math.comb(5000 - g, 63) / math.comb(5000, 63) for g in above.tolist()]
    for row, chance in enumerate(chances):
        part = slice(row, row + 1)
        found = float(right_answers(similarities[part], right[part], 64))
        assert found == pytest.approx(chance, rel=1e-9)
    assert right_answers(similarities[:1], right[:1], 64) == 1
    similarities[0, 0] = torch.nan
    assert right_answers(similarities[:1], right[:1], 64) == 0


@pytest.mark.parametrize(
    ("above", "candidates"),
    [(0, 64), (54, 64), (60, 32), (108, 32), (120, 16), (214, 16), (300, 8), (1500, 8)],
)
def test_a_hard_task_has_fewer_candidates(above: int, candidates: int) -> None:
    """Of 5000 wrong answers so many are more similar than the right one, for every query."""
    similarities = torch.zeros(3, 5001)
    similarities[:, 0] = 1.0
    similarities[:, 1 : above + 1] = 2.0
    right = torch.zeros(3, 5001, dtype=torch.bool)
    right[:, 0] = True
    truth = Truth(similarities, right, 64)
    assert truth.candidates == candidates
    own = {n: math.comb(5000 - above, n - 1) / math.comb(5000, n - 1) for n in (64, 32, 16, 8)}
    assert truth.accuracy == pytest.approx(own[candidates], rel=1e-9)
    assert all(own[n] < 0.5 for n in own if n > candidates)
    assert own[candidates] >= 0.5 or candidates == 8
    worse = similarities.clone()
    worse[:, 1 : above + 201] = 2.0
    kept = math.comb(4800 - above, candidates - 1) / math.comb(5000 - above, candidates - 1)
    assert truth.kept(worse)[0] == pytest.approx(kept, rel=1e-9)


@pytest.mark.parametrize("names", [False, True])
def test_kept_is_a_ratio_of_right_answers(
    names: bool, tiny_clip: ClipModel, tiny_model_dir: Path
) -> None:
    pixels = random_pixels(9).half()
    texts = TEXTS[:6]
    right = [[0], [1], [0, 2] if not names else [0], [3], [3], [1], [5], [5], [0]]
    mask = np.zeros((9, 6), dtype=bool)
    for image, own in enumerate(right):
        mask[image, own] = True
    probe = AlignmentProbe(tiny_clip, pixels, texts, seed=0, names=names, right=right)
    assert probe.measure(tiny_clip, texts=True) == Kept(1.0, 1.0)
    tuned = perturbed(load(f"local-dir:{tiny_model_dir}", device="cpu", precision="fp32"), 0.5)
    base_images, base_texts = probe.features, probe.vectors
    tuned_images = tuned.encode_images(pixels.float())
    before, after = (
        (images @ base_texts.T).numpy().astype(np.float64) for images in (base_images, tuned_images)
    )
    kept = probe.measure(tuned)
    forth = drawn_accuracy(after, mask, 64) / drawn_accuracy(before, mask, 64)
    back = drawn_accuracy(after.T, mask.T, 64) / drawn_accuracy(before.T, mask.T, 64)
    assert kept.image_to_text == pytest.approx(forth, abs=1e-6)
    assert kept.text_to_image == pytest.approx(back, abs=1e-6)
    assert (kept.image_to_text, kept.text_to_image) != (1.0, 1.0)


def test_a_model_may_keep_more_than_the_original_knew(tiny_clip: ClipModel) -> None:
    """Images of two classes whose texts the original takes for each other, but for one image."""
    pixels, texts = random_pixels(12), TEXTS[:3]
    answers = tiny_clip.encode_images(pixels.half().float()) @ tiny_clip.encode_texts(texts).T
    truth = [[int(row.argmin())] for row in answers]
    truth[0] = [int(answers[0].argmax())]
    probe = AlignmentProbe(tiny_clip, pixels, texts, seed=0, right=truth)
    assert isinstance(probe.image_to_text, Truth)
    assert probe.image_to_text.accuracy == pytest.approx(1 / 12)
    reversed_order = -probe.features @ probe.vectors.T
    assert probe.image_to_text.kept(reversed_order)[0] == pytest.approx(11)
    wrong = [[int(row.argmin())] for row in answers]
    with pytest.raises(DataError, match="gives no right answer to the probe's tasks"):
        AlignmentProbe(tiny_clip, pixels, texts, seed=0, right=wrong)


def test_the_error_of_a_ratio_is_that_of_other_samples() -> None:
    """Over 2000 samples of 60 things seen twice the ratios spread as their errors say.

    The deviation of 2000 ratios has a standard error of 1.6 %, linearisation at 60 clusters costs
    about as much: 6 % is three of both. Clusters that are ignored would make it 26 % too small, as
    both views are nearly the same.
    """
    generator = np.random.default_rng(0)
    groups = torch.arange(60).repeat_interleave(2)
    ratios, errors, ignored = [], [], []
    for _ in range(2000):
        thing = generator.random((60, 2)).repeat(2, axis=0) + 0.05 * generator.random((120, 2))
        own, found = torch.from_numpy(thing[:, 0]), torch.from_numpy(thing.mean(1))
        ratio, error = ratio_of_sums(found, own, groups)
        ratios.append(ratio)
        errors.append(error)
        ignored.append(ratio_of_sums(found, own)[1])
    spread = np.std(ratios)
    assert spread == pytest.approx(np.mean(errors), rel=0.06)
    assert np.mean(ignored) < 0.8 * spread
    same = torch.ones(3, dtype=torch.float64)
    assert ratio_of_sums(same, same) == (1.0, 0.0)


def test_views_of_one_thing_are_one_observation(tiny_clip: ClipModel) -> None:
    """Of the image to text direction, by their captions; photographs of a class are not views."""
    pixels = random_pixels(6)
    answers = tiny_clip.encode_images(pixels.half().float()) @ tiny_clip.encode_texts(TEXTS[:3]).T
    right = [[int(row.argmin())] for row in answers]
    right[0] = [int(answers[0].argmax())]  # one right answer at least, and one to a text
    right[int(answers[:, 0].argmax())] = [0]
    for names in (False, True):
        probe = AlignmentProbe(tiny_clip, pixels, TEXTS[:3], seed=0, names=names, right=right)
        assert isinstance(probe.image_to_text, Truth)
        groups = probe.image_to_text.groups
        if names:
            assert groups is None
        else:
            assert groups is not None
            pairs = {(group, own[0]) for group, own in zip(groups.tolist(), right, strict=True)}
            assert 1 < len(pairs) == len({text for _, text in pairs}) <= 3


def test_captions_of_one_image_are_one_observation(tiny_clip: ClipModel) -> None:
    """Of the text to image direction; each image has two captions."""
    pixels, texts = random_pixels(3), TEXTS[:6]
    right = [[0, 1], [2, 3], [4, 5]]
    probe = AlignmentProbe(tiny_clip, pixels, texts, seed=0, right=right)
    assert isinstance(probe.text_to_image, Truth)
    groups = probe.text_to_image.groups
    assert groups is not None
    first, second = groups[0::2].tolist(), groups[1::2].tolist()
    assert first == second
    assert sorted(first) == [0, 1, 2]


# --- between two models -------------------------------------------------------------------------


def test_interpolation_is_exact_at_its_ends_and_where_nothing_changed() -> None:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)) for _ in range(2)]
    for layer, mean in zip(layers, (0.1, 0.7), strict=True):
        layer[1].running_mean.fill_(mean)  # type: ignore[union-attr,operator]
        layer(torch.randn(2, 3, 4, 4))
    original, tuned = (layer.state_dict() for layer in layers)
    tuned["0.bias"] = original["0.bias"].clone()
    tuned["1.num_batches_tracked"] += 6
    for coefficient, expected in ((0.0, original), (1.0, tuned)):
        found = interpolated(original, tuned, coefficient)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    for coefficient in (1 / 128, 0.3, 0.5, 0.9):
        found = interpolated(original, tuned, coefficient)
        assert torch.equal(found["0.bias"], original["0.bias"])
        assert int(found["1.num_batches_tracked"]) == 7
        for name in ("0.weight", "1.running_mean", "1.running_var"):
            one, other = original[name].double(), tuned[name].double()
            exact = (1 - coefficient) * one + coefficient * other
            torch.testing.assert_close(found[name].double(), exact, rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match="1 names are in one state alone"):
        interpolated(original, {**tuned, "extra": torch.zeros(1)}, 0.5)


def test_search_takes_the_tuned_model_if_it_may() -> None:
    search = largest_coefficient(lambda c: 1 - 0.01 * c, 0.99)
    assert (search.coefficient, search.kept) == (1.0, 0.99)
    assert search.tried == [(1.0, 0.99)]


@pytest.mark.parametrize("end", [0.01, 0.3, 0.4142, 0.77, 0.999])
def test_search_finds_the_end_of_what_is_allowed(end: float) -> None:
    search = largest_coefficient(lambda c: 1.0 if c <= end else 0.5, 0.98)
    assert search.coefficient <= end < search.coefficient + 1 / 128
    assert len(search.tried) == 8
    assert [c for c, _ in search.tried[:2]] == [1.0, 0.5]


def test_what_the_search_returns_was_measured_and_respects_the_bound() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        heights = generator.uniform(0.9, 1.0, 1000)
        search = largest_coefficient(lambda c: heights[int(c * 999)], 0.95)  # noqa: B023
        respecting = [pair for pair in search.tried if pair[1] >= 0.95]
        if respecting:
            assert (search.coefficient, search.kept) == max(respecting)
        else:
            assert (search.coefficient, search.kept) == (0.0, 1.0)
    calls: list[float] = []
    none = largest_coefficient(lambda c: calls.append(c) or 0.2, 0.9, evaluations=5)  # type: ignore[func-returns-value]
    assert none.coefficient == 0
    assert calls == [1.0, 0.5, 0.25, 0.125, 0.0625]


# --- whole runs ---------------------------------------------------------------------------------


@pytest.fixture
def options(run_options: dict[str, Any], captions_file: Callable[..., Path]) -> dict[str, Any]:
    """Options of a run of 2 x 3 steps whose budget bites."""
    return {
        **run_options,
        "captions": str(captions_file(TEXTS)),
        "lr": 1e-2,
        "rea_epochs": 2,
        "rea_batch_size": 6,
        "rea_lr": 1e-5,
        "alignment_budget": 0.05,
    }


def remeasured(options: dict[str, Any], hub: Path) -> float:
    """What the exported model keeps on the run's probe, made again from its definition."""
    original, tuned = (
        load(name, device="cpu", precision="fp32")
        for name in (options["model"], f"local-dir:{hub}")
    )
    pixels, _ = probe_pixels(original, None, load_images(options["train_data"]), 32, 0, 0)
    texts = [TEXTS[row] for row in probe_rows(len(TEXTS), 0)]
    probe = AlignmentProbe(original, pixels, texts, seed=0)
    return probe.measure(tuned, texts=True).alignment


@pytest.mark.parametrize("method", ["mcip", "gpr", "mcip+rea"])
def test_exported_model_keeps_the_budget(method: str, options: dict[str, Any]) -> None:
    result = pymcip.train(**options, method=method)
    found = result.alignment
    assert found is not None
    assert result.hub is not None
    assert found["respected"]
    assert 0 < found["coefficient"] < 1
    assert found["kept_tuned"] < 0.95 <= found["kept"]
    assert [found["coefficient"], found["kept"]] in found["tried"]
    # the probe of mcip has the stored, rounded vectors of its captions
    assert remeasured(options, result.hub) == pytest.approx(found["kept"], abs=2e-3)
    assert found["probe"]["images"] == 32
    assert found["probe"]["captions"] == 64
    records = [record for record in lines_of(result.out) if "alignment" in record]
    steps = [3, 6, 8, 10] if method == "mcip+rea" else [3, 6]
    assert [record["global_step"] for record in records] == steps
    by_epoch = [Kept(**record["alignment"]).alignment for record in records]
    assert by_epoch == found["kept_by_epoch"]
    assert by_epoch[-1] == found["kept_tuned"]
    assert json.loads((result.out / "alignment.json").read_text()) == found
    assert pymcip.train(**options, method=method, resume="latest") == result


@pytest.mark.parametrize("tower", ["vit", "timm"])
def test_exported_weights_lie_between(
    tower: str, options: dict[str, Any], hub_folder: Callable[..., Path]
) -> None:
    """Of both kinds of tower, batch norms' statistics included."""
    options = {**options, "val_data": options["train_data"], "method": "mcip"}
    if tower == "timm":
        vision = {
            "timm_model_name": "test_efficientnet",
            "timm_model_pretrained": False,
            "timm_pool": "avg",
            "timm_proj": "linear",
            "image_size": 32,
        }
        options |= {"model": f"local-dir:{hub_folder('timm', vision_cfg=vision)}"}
        options |= {"lr": 2e-3, "alignment_budget": 0.2}
    result = pymcip.train(**options)
    tuned = load_checkpoint(result.checkpoint)["model"]  # as trained: to be searched again
    assert result.alignment is not None
    assert 0 < result.alignment["coefficient"] < 1
    original = load(options["model"], device="cpu", precision="fp32").model.state_dict()
    expected = interpolated(original, tuned, result.alignment["coefficient"])
    exported = torch.load(result.state_dict, weights_only=True)
    assert expected.keys() == exported.keys()
    assert all(torch.equal(value, expected[name]) for name, value in exported.items())
    changed = {name for name in exported if not torch.equal(exported[name], original[name])}
    assert {name for name in tuned if not torch.equal(tuned[name], original[name])} == changed
    assert any("running_var" in name for name in changed) == (tower == "timm")
    measured = pymcip.evaluate(
        str(result.out), data=options["val_data"], device="cpu", precision="fp32"
    ).metrics
    assert result.metrics == {name: measured[name] for name in result.metrics}


def test_a_generous_budget_changes_nothing(options: dict[str, Any], tmp_path: Path) -> None:
    plain = pymcip.train(**{**options, "alignment_budget": None}, method="gpr")
    assert plain.alignment is None
    assert not (plain.out / "alignment.json").exists()
    for budget in (0.999999, 1.0):
        kept = pymcip.train(
            **{**options, "alignment_budget": budget, "out": tmp_path / f"{budget}"}, method="gpr"
        )
        one, other = (torch.load(run.state_dict, weights_only=True) for run in (plain, kept))
        assert all(torch.equal(value, other[name]) for name, value in one.items())
        if budget < 1:
            assert kept.alignment is not None
            assert kept.alignment["coefficient"] == 1
        else:
            assert kept.alignment is None


def test_a_budget_that_nothing_keeps_exports_nothing(
    options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    options = {**options, "alignment_budget": 0.0, "lr": 1.0, "method": "mcip"}
    result = pymcip.train(**options)
    assert result.alignment is not None
    assert not result.alignment["respected"]
    assert result.alignment["coefficient"] == 0
    assert result.alignment["kept"] is None
    assert result.alignment["standard_error"] is None
    assert len(result.alignment["tried"]) == 8
    assert result.hub is None
    assert result.state_dict is None
    assert result.interrupted is None
    assert not (result.out / "exported").exists()
    assert result.checkpoint.is_file()
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert any("nothing is exported" in text and "Lower lr" in text for text in warnings)
    assert pymcip.train(**options, resume="latest") == result


def test_probe_of_ones_own(
    options: dict[str, Any], tiny_images: Callable[..., Path], tmp_path: Path
) -> None:
    own = tiny_images("own", classes=5)
    (tmp_path / "names.tsv").write_text("0\tred square\n1\tgreen square\n2\tdog\n3\tdog\n")
    sources = {"probe_data": str(own), "probe_class_names": str(tmp_path / "names.tsv")}
    result = pymcip.train(**{**options, **sources, "captions": None}, method="gpr")
    assert result.alignment is not None
    assert result.alignment["probe"] == {
        "images": 20,
        "captions": 3,
        "source": "probe_data, probe_class_names",
    }
    (tmp_path / "own.txt").write_text("one caption\nand another\n")
    result = pymcip.train(
        **{**options, "out": tmp_path / "second", "probe_captions": str(tmp_path / "own.txt")},
        method="rea",
    )
    assert result.alignment is not None
    assert result.alignment["probe"]["captions"] == 2


def probe_shards(shards: Callable[..., list[Path]], **changes: Any) -> str:
    """24 images of 4 classes; every third caption is that of another image too."""
    samples = []
    for index in range(24):
        number = index - 1 if index % 3 == 1 else index
        text = f"a photo of a {THINGS[index % 4]}, number {number}"
        samples.append({"jpg": picture(index), "cls": index % 4, "txt": text, **changes})
    return str(shards(samples, name="probe", per_shard=12)[0].parent / "*.tar")


def test_captions_of_the_probe_are_the_truth(
    options: dict[str, Any], shards: Callable[..., list[Path]]
) -> None:
    options = {**options, "captions": None, "probe_data": probe_shards(shards), "lr": 1e-3}
    options["alignment_budget"] = 0.9
    config = pymcip.TrainConfig(**options, method="gpr")
    sources = load_probe_sources(config, None)
    assert sources is not None
    assert sources.images is not None
    rows = np.array([3, 4, 0])
    texts, right = sources.answers(rows)
    assert texts == list(dict.fromkeys(sources.images.titles(row)[0] for row in rows))
    assert [[texts[text] for text in own] for own in right] == [
        list(sources.images.titles(row)) for row in rows
    ]
    result = pymcip.train(**options, method="gpr")
    found = result.alignment
    assert found is not None
    titles = {title for row in range(24) for title in sources.images.titles(row)}
    assert found["probe"] == {
        "images": 24,
        "captions": len(titles),
        "source": "probe_data with their own captions",
    }
    assert result.hub is not None
    original, tuned = (
        load(name, device="cpu", precision="fp32")
        for name in (options["model"], f"local-dir:{result.hub}")
    )
    asked = sorted(titles)
    mask = np.array([[text in sources.images.titles(row) for text in asked] for row in range(24)])
    before, after = (
        (clip.encode_images(images.half().float()) @ clip.encode_texts(asked).T).numpy()
        for clip in (original, tuned)
        for images in [
            torch.stack([clip.preprocess_val(sources.images.read(row)) for row in range(24)])
        ]
    )
    forth = drawn_candidates(before, mask)
    back = drawn_candidates(before.T, mask.T)
    ratios = np.array(
        [
            drawn_accuracy(after, mask, forth) / drawn_accuracy(before, mask, forth),
            drawn_accuracy(after.T, mask.T, back) / drawn_accuracy(before.T, mask.T, back),
        ]
    )
    assert found["image_to_text"] == pytest.approx(ratios[0], abs=1e-9)
    assert found["text_to_image"] == pytest.approx(ratios[1], abs=1e-9)
    assert found["kept"] == pytest.approx(ratios.min(), abs=1e-9)
    assert 0 < found["standard_error"] < 1


def test_classes_of_the_probe_are_the_truth(
    options: dict[str, Any], shards: Callable[..., list[Path]], tmp_path: Path
) -> None:
    names = tmp_path / "names.tsv"
    names.write_text("0\tred square\n1\tgreen square\n2\tdog\n3\tdog\n4\tcup\n")
    options = {**options, "probe_data": probe_shards(shards), "probe_class_names": str(names)}
    sources = load_probe_sources(pymcip.TrainConfig(**options, method="gpr"), None)
    assert sources is not None
    assert sources.images is not None
    assert sources.description == "probe_data with their own classes"
    texts, right = sources.answers(np.arange(24))
    assert texts == ["red square", "green square", "dog", "cup"]
    labels = [sources.images.class_names[label] for label in sources.images.labels]
    assert right == [[min(int(label), 2)] for label in labels]
    result = pymcip.train(**options, method="gpr")
    assert result.alignment is not None
    assert result.alignment["probe"]["captions"] == 4
    names.write_text("0\tred square\n1\tgreen square\n2\tdog\n")  # not all labels have names
    sources = load_probe_sources(pymcip.TrainConfig(**options, method="gpr"), None)
    assert sources is not None
    assert sources.truth is None


def test_captions_given_are_asked_for_instead_of_the_images_own(
    options: dict[str, Any], shards: Callable[..., list[Path]], tmp_path: Path
) -> None:
    given = {"probe_data": probe_shards(shards), "probe_captions": options["captions"]}
    config = pymcip.TrainConfig(**{**options, **given}, method="gpr")
    sources = load_probe_sources(config, None)
    assert sources is not None
    assert sources.truth is None
    assert sources.description == "probe_data, probe_captions"


def test_a_probe_without_texts(options: dict[str, Any], shards: Callable[..., list[Path]]) -> None:
    source = probe_shards(shards, txt="the same")
    options = {**options, "captions": None, "probe_data": source, "method": "gpr"}
    with pytest.raises(DataError, match="no captions, or all the same one; give captions="):
        pymcip.train(**options)
    assert not Path(options["out"]).exists()


# --- resuming -----------------------------------------------------------------------------------


def assert_same_run(first: pymcip.TrainResult, second: pymcip.TrainResult) -> None:
    """Exported bits and the tuned weights before, logged numbers, the search."""
    one, other = (torch.load(run.state_dict, weights_only=True) for run in (first, second))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    one, other = (load_checkpoint(run.checkpoint)["model"] for run in (first, second))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    logs = [
        [{k: v for k, v in line.items() if k != "samples_per_second"} for line in lines_of(run.out)]
        for run in (first, second)
    ]
    assert logs[0] == logs[1]
    assert first.alignment is not None
    assert second.alignment is not None
    assert {**first.alignment, "seconds": 0} == {**second.alignment, "seconds": 0}
    assert first.metrics == second.metrics


def test_resumed_after_sigkill_gives_the_same_bits(options: dict[str, Any], tmp_path: Path) -> None:
    options = {**options, "method": "mcip", "epochs": 3}
    options |= {"val_data": options["train_data"], "precision": "amp_bf16"}
    whole = pymcip.train(**options)
    killed = {**options, "out": str(tmp_path / "killed"), "resume": "latest"}
    point = random.SystemRandom().randrange(4, 10)
    train_until_killed(point, killed, tmp_path)
    assert_same_run(whole, pymcip.train(**killed))


@pytest.mark.parametrize("where", ["after_epoch", "keep"])
def test_resumed_after_a_kill_while_probing(
    where: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**options, "method": "mcip", "val_data": options["train_data"]}
    whole = pymcip.train(**options)
    stopped = {**options, "out": str(tmp_path / "stopped")}

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(AlignmentBudget, where, stop)
        with pytest.raises(KeyboardInterrupt):
            pymcip.train(**stopped)
    assert not (tmp_path / "stopped" / "result.json").exists()
    assert_same_run(whole, pymcip.train(**stopped, resume="latest"))


# --- bad options --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alignment_budget": -0.1}, "alignment_budget=-0.1"),
        ({"alignment_budget": 1.5}, "alignment_budget=1.5: a share"),
        ({"method": "2sft", "projector": "discard"}, "gives up the joint"),
        ({"method": "gpr", "captions": None}, "give captions=, probe_captions= or probe_class"),
        ({"alignment_budget": None, "probe_data": "x"}, "probe_data is for a budget"),
        ({"alignment_budget": None, "probe_captions": "x"}, "probe_captions is for a budget"),
        ({"probe_captions": "x", "probe_class_names": "y"}, "exclude each other"),
    ],
)
def test_bad_options(changes: dict[str, Any], message: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=message):
        pymcip.train(**{**options, **changes})
    assert not Path(options["out"]).exists()


def test_the_recipe_has_a_budget(options: dict[str, Any]) -> None:
    plain = {name: value for name, value in options.items() if name != "alignment_budget"}
    config = pymcip.TrainConfig(**plain, method="mcip+", probe_data="x")
    assert config.alignment_budget is None
    assert config.budget == 0.02
    with pytest.raises(ConfigError, match="probe_data is for a budget"):
        pymcip.TrainConfig(**plain, method="mcip", probe_data="x")


def test_bad_sources_are_refused_before_any_work(options: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("a single caption\n")
    (tmp_path / "one.tsv").write_text("0\tdog\n1\tdog\n")
    (tmp_path / "single").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "single" / "one.jpg")
    for changes, message in [
        ({"captions": str(tmp_path / "one.txt")}, "1 captions, too few"),
        ({"probe_captions": str(tmp_path / "one.txt")}, "holds one caption"),
        ({"probe_class_names": str(tmp_path / "one.tsv")}, "holds one name"),
        ({"probe_data": str(tmp_path / "single")}, "holds one image"),
        ({"probe_data": str(tmp_path / "nowhere")}, "nowhere"),
    ]:
        with pytest.raises(DataError, match=message):
            pymcip.train(**{**options, **changes}, method="gpr")
    assert not Path(options["out"]).exists()


def test_the_probe_is_not_overwritten(
    options: dict[str, Any], tiny_images: Callable[..., Path]
) -> None:
    inside = tiny_images("run/probe")
    with pytest.raises(pymcip.errors.OutputExistsError, match="overwrite would remove"):
        pymcip.train(**options, method="gpr", probe_data=str(inside), overwrite=True)
    assert inside.is_dir()
