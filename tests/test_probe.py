"""The alignment probe: against its definition, and where right answers are known."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pymcip.data import load_images
from pymcip.errors import DataError
from pymcip.model import ClipModel, load
from pymcip.training import probe_sources
from pymcip.training.mixtures import other_views
from pymcip.training.probe import AlignmentProbe, Beliefs, Kept, Truth, ratio_of_sums, right_answers
from pymcip.training.probe_sources import affordable, probe_pixels, probe_rows
from pymcip.training.sampling import Stream, random_generator
from tests.probe_cases import TEXTS, drawn_accuracy, perturbed, random_pixels


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
        to_text = oracle(base, beliefs, similarities, scale, text_tasks)
        back = oracle(base.T, beliefs.T, similarities.T, scale, image_tasks)
        assert kept.image_to_text == pytest.approx(to_text, abs=1e-6)
        assert kept.text_to_image == pytest.approx(back, abs=1e-6)
        assert kept.alignment == min(kept.image_to_text, kept.text_to_image) != 1
    only_texts = probe.measure(tuned, images=False, texts=True)
    to_text = oracle(base, beliefs, original_images @ tuned_texts.T, scale, text_tasks)
    assert only_texts.image_to_text == pytest.approx(to_text, abs=1e-6)


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
    to_text = drawn_accuracy(after, mask, 64) / drawn_accuracy(before, mask, 64)
    back = drawn_accuracy(after.T, mask.T, 64) / drawn_accuracy(before.T, mask.T, 64)
    assert kept.image_to_text == pytest.approx(to_text, abs=1e-6)
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
