"""Distillation in the image stage, and what it is distilled on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm

import pymcip
from pymcip.data import load_images
from pymcip.errors import ConfigError, DataError
from pymcip.mining import CaptionTable
from pymcip.model import ClipModel, load
from pymcip.model.towers import image_parameters
from pymcip.training.checkpoints import checkpoint_files, load_checkpoint
from pymcip.training.distillation import (
    CaptionSample,
    Distillation,
    caption_divergence,
    frozen_copy,
)
from pymcip.training.image_stage import ImageStage, caption_bank
from pymcip.training.probe_sources import probe_rows
from tests.conftest import computed_of, lines_of, settings_for, start_killed, train_until_killed

RESNET = {"vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "head_width": 16, "image_size": 32}}
TIMM = {
    "vision_cfg": {
        "timm_model_name": "test_efficientnet", "timm_model_pretrained": False,
        "timm_pool": "avg", "timm_proj": "linear", "image_size": 32,
    }
}  # fmt: skip


@pytest.fixture
def options(run_options: dict[str, Any], captions_file: Callable[..., Path]) -> dict[str, Any]:
    captions = [f"{word} number {i}" for i in range(20) for word in "abc"]
    return {**run_options, "captions": str(captions_file(captions)), "method": "mcip"}


def unit(rows: int, columns: int, seed: int) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal((rows, columns))
    return values / np.linalg.norm(values, axis=1, keepdims=True)


# --- the divergence -----------------------------------------------------------------------------


def divergence(features: np.ndarray, original: np.ndarray, captions: np.ndarray) -> np.ndarray:
    """KL(p0 || p) in fp64 at scale 20, from the definition."""
    before, now = (20 * rows @ captions.T for rows in (original, features))
    p0, p = (np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in (before, now))
    result: np.ndarray = (p0 * (np.log(p0) - np.log(p))).sum(axis=1)
    return result


def test_divergence_against_fp64() -> None:
    features, original, captions = unit(5, 12, 0), unit(5, 12, 1), unit(40, 12, 2)
    tensors = [torch.from_numpy(x).float() for x in (features, original, captions)]
    found = caption_divergence(*tensors, 20.0)
    # logits are at most 20: fp32 rounds them to 20 * 2^-23, and a KL of a few is made of a few
    expected = divergence(features, original, captions)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-5)
    assert expected.min() > 0.1
    same = caption_divergence(tensors[1], tensors[1], tensors[2], 20.0)
    assert torch.equal(same, torch.zeros(5))


def test_gradient_goes_to_the_student_alone() -> None:
    tensors = [
        torch.from_numpy(unit(n, 12, seed)).requires_grad_() for n, seed in ((3, 0), (3, 1), (9, 2))
    ]
    caption_divergence(*tensors, 20.0).sum().backward()
    features, original, captions = (tensor.detach().numpy() for tensor in tensors)
    assert tensors[1].grad is None
    assert tensors[2].grad is None
    before, now = (
        np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)
        for x in (20 * original @ captions.T, 20 * features @ captions.T)
    )
    assert tensors[0].grad is not None
    np.testing.assert_allclose(tensors[0].grad.numpy(), 20 * (now - before) @ captions, rtol=1e-9)


# --- what is drawn ------------------------------------------------------------------------------


def test_sample_is_a_function_of_seed_epoch_and_step() -> None:
    whole = unit(50, 4, 0).astype(np.float16)
    parts = np.split(whole, [7, 7, 30])  # one part is empty
    left_out = np.array([3, 8, 49, 11])
    sample = CaptionSample(parts, 20, 1, left_out)
    seen: set[int] = set()
    for epoch, step in ((0, 0), (0, 1), (1, 0)):
        rows = sample.drawn(epoch, step)
        assert len(np.unique(rows)) == 20
        found = sample.vectors(epoch, step, torch.device("cpu")).numpy()
        assert np.array_equal(found, whole[rows].astype(np.float32))
        assert np.array_equal(rows, CaptionSample(parts, 20, 1, left_out).drawn(epoch, step))
        seen |= set(rows.tolist())
        others = [(0, 0), (0, 1), (1, 0)]
        others.remove((epoch, step))
        assert all(not np.array_equal(rows, sample.drawn(*other)) for other in others)
    assert not seen & set(left_out.tolist())
    assert set(CaptionSample(parts, 99, 1, left_out).drawn(0, 0)) == set(range(50)) - set(
        left_out.tolist()
    )
    with pytest.raises(DataError, match="distillation has 1 of 50 captions"):
        CaptionSample(parts, 20, 1, np.arange(49))


def test_the_probe_captions_are_left_out(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[CaptionSample] = []
    inner = CaptionSample.__init__

    def noted(self: CaptionSample, *arguments: Any) -> None:
        inner(self, *arguments)
        made.append(self)

    monkeypatch.setattr(CaptionSample, "__init__", noted)
    options |= {"method": "mcip+", "distill": 1.0, "epochs": 1, "rea_epochs": 1}
    pymcip.train(**{**options, "alignment_budget": 1.0})
    pymcip.train(**{**options, "out": options["out"] + "2"})
    kept = probe_rows(60, 0)
    assert 0 < len(kept) < 60
    assert set(made[1].drawn(0, 0)) == set(range(60)) - set(kept.tolist())


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_generic_images_stand_behind_each_batch(
    temperature: float, tiny_clip: ClipModel, tiny_images: Callable[..., Path]
) -> None:
    data, generic = load_images(tiny_images("a")), load_images(tiny_images("b", 2, 2))
    sample = CaptionSample([unit(5, 16, 0)], 5, 0)
    vectors = [unit(12, 16, 1), unit(4, 16, 2)]
    distillation = Distillation(
        tiny_clip, sample, vectors[0], weight=1.0, rate=0.5, seed=0, generic=generic,
        generic_vectors=vectors[1], temperature=temperature,
    )  # fmt: skip
    stage = ImageStage(
        tiny_clip, data, settings_for(batch_size=4, method="gpr"), class_rows=None,
        distillation=distillation,
    )  # fmt: skip
    plain = ImageStage(tiny_clip, data, settings_for(batch_size=4, method="gpr"), class_rows=None)
    shown = [rows.numpy() for ((_, rows),) in stage.steps(0, 0)]
    assert [len(rows) for rows in shown] == [6, 6, 6]
    assert np.array_equal([r[:4] for r in shown], [r.numpy() for ((_, r),) in plain.steps(0, 0)])
    extra = np.concatenate([rows[4:] for rows in shown])
    assert sorted(extra[:4]) == [12, 13, 14, 15]  # each once before any is drawn again
    ((pixels, rows),) = next(stage.steps(0, 2))  # as a resumed run starts
    assert np.array_equal(rows, shown[2])
    known = np.concatenate(vectors)
    expected = clip_divergence(tiny_clip, pixels, rows.numpy(), known, sample, temperature)
    stage.clip.model.eval()
    values = stage.backward([(pixels, rows)])
    assert float(values["distill"]) == pytest.approx(expected[:4].mean(), rel=1e-4)
    assert float(values["distill_data"]) == pytest.approx(expected[4:].mean(), rel=1e-4)
    total = values["arc_margin"] + values["distill"] + values["distill_data"]
    assert float(values["loss"]) == pytest.approx(float(total), rel=1e-6)


def clip_divergence(
    clip: ClipModel,
    pixels: torch.Tensor,
    rows: np.ndarray,
    known: np.ndarray,
    sample: CaptionSample,
    temperature: float = 1.0,
) -> np.ndarray:
    """fp64 losses of a batch, against embeddings `known` of the original."""
    scale = float(clip.model.logit_scale.detach().double().exp()) / temperature
    features = clip.encode_images(pixels).double().numpy()
    captions = sample.vectors(0, 2, torch.device("cpu")).double().numpy()
    # the oracle has a scale of 20: scaling the captions makes it the model's
    return temperature**2 * divergence(features, known[rows], captions * scale / 20)


def test_mixtures_are_taught_by_the_original(
    tiny_clip: ClipModel, tiny_images: Callable[..., Path]
) -> None:
    """At the start student and teacher agree; the teacher stays when the student moves."""
    data = load_images(tiny_images())
    teacher = frozen_copy(tiny_clip)
    sample = CaptionSample([unit(30, 16, 0)], 20, 0)
    distillation = Distillation(teacher, sample, unit(12, 16, 1), weight=2.0, rate=0.5, seed=3)
    config = settings_for(method="gpr", batch_size=12)
    stage = ImageStage(tiny_clip, data, config, class_rows=None, distillation=distillation)
    pixels, rows = next(stage.steps(0, 0))[0]
    before = teacher.encode_images(pixels)
    stage.clip.model.eval()
    values = stage.backward([(pixels, rows)])
    assert float(values["distill_mixtures"]) == pytest.approx(0, abs=1e-5)
    assert float(values["distill"]) > 0.01
    with torch.no_grad():
        for _, parameter in image_parameters(tiny_clip.model):
            parameter += 0.05 * torch.randn_like(parameter)
    assert torch.equal(teacher.encode_images(pixels), before)
    values = stage.backward([(pixels, rows)])
    mixed = distillation.mixed(pixels, 0, 0, 0)
    assert mixed.shape == (6, 3, 32, 32)
    assert not torch.equal(mixed, distillation.mixed(pixels, 0, 1, 0))
    drawn = sample.vectors(0, 0, torch.device("cpu"))
    student, original = tiny_clip.encode_images(mixed), teacher.encode_images(mixed)
    expected = caption_divergence(student, original, drawn, distillation.scale).mean()
    assert float(expected) > 0.01
    assert float(values["distill_mixtures"]) == pytest.approx(float(expected), rel=1e-4)
    total = values["arc_margin"] + 2 * (values["distill"] + values["distill_mixtures"])
    assert float(values["loss"]) == pytest.approx(float(total), rel=1e-5)


@pytest.mark.parametrize("kind", ["resnet", "timm"])
def test_mixtures_leave_batch_statistics_alone(
    kind: str, hub_folder: Callable[..., Path], tiny_images: Callable[..., Path]
) -> None:
    """Running statistics after a step, beside those of a step without distillation: the same bits."""
    folder = hub_folder(kind, **{"resnet": RESNET, "timm": TIMM}[kind])
    data, found = load_images(tiny_images()), []
    for rate in (None, 1.0):
        clip = load(f"local-dir:{folder}", device="cpu", precision="fp32")
        visual: Any = clip.model.visual
        before = statistics_of(visual)
        distillation = None
        if rate is not None:
            sample = CaptionSample([unit(30, 16, 0)], 20, 0)
            distillation = Distillation(
                frozen_copy(clip), sample, unit(12, 16, 1), weight=1.0, rate=rate, seed=0
            )
        config = settings_for(method="gpr", batch_size=6, freeze_bn_stats=False)
        stage = ImageStage(clip, data, config, class_rows=None, distillation=distillation)
        stage.train_mode()
        values = stage.backward(next(stage.steps(0, 0)))
        assert ("distill_mixtures" in values) == (rate is not None)
        found.append(statistics_of(visual))
        assert all(not torch.equal(value, before[name]) for name, value in found[-1].items())
        norms = [layer for layer in visual.modules() if isinstance(layer, _BatchNorm)]
        assert all(layer.training for layer in norms)
    assert any(name.endswith("running_var") for name in found[0])
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def statistics_of(tower: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of a tower's batch statistics."""
    return {
        name: value.clone()
        for name, value in tower.named_buffers()
        if name.endswith(("running_mean", "running_var", "num_batches_tracked"))
    }


def test_batches_too_small_for_a_mixture_are_told(
    tiny_clip: ClipModel, tiny_images: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    data, sample = load_images(tiny_images()), CaptionSample([unit(9, 16, 0)], 5, 0)
    for rate, told in ((0.0, False), (0.25, False), (0.125, True)):
        caplog.clear()
        distillation = Distillation(
            tiny_clip, sample, unit(12, 16, 1), weight=1.0, rate=rate, seed=0
        )
        config = settings_for(method="gpr", batch_size=4)
        ImageStage(tiny_clip, data, config, class_rows=None, distillation=distillation)
        assert ("rounds to none" in caplog.text) == told


def test_accumulated_gradients_are_those_of_one_large_batch(
    tiny_clip: ClipModel, tiny_images: Callable[..., Path]
) -> None:
    data = load_images(tiny_images())
    sample = CaptionSample([unit(30, 16, 0)], 20, 0)
    distillation = Distillation(tiny_clip, sample, unit(12, 16, 1), weight=1.0, rate=0.0, seed=0)
    table = CaptionTable(np.arange(0, 13), np.arange(12) % 5, np.full(12, 0.5, np.float32), 5)
    bank, positives = caption_bank(table, unit(5, 16, 4).astype(np.float16), "bank", 0)
    stage = ImageStage(
        tiny_clip, data, settings_for(), class_rows=None, bank=bank, positives=positives,
        distillation=distillation,
    )  # fmt: skip
    stage.train_mode()
    pixels, rows = torch.randn(12, 3, 32, 32), torch.arange(12)
    gradients, losses = [], []
    for cut in (12, 6):
        stage.optimizer.zero_grad()
        values = stage.backward(list(zip(pixels.split(cut), rows.split(cut), strict=True)))
        losses.append({name: float(value) for name, value in values.items()})
        groups = stage.optimizer.param_groups
        gradients.append(torch.cat([p.grad.flatten() for g in groups for p in g["params"]]))
    assert set(losses[0]) == {"loss", "arc_margin", "caption_margin", "distill"}
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    # fp32 sums of some hundred terms in another order
    scale = gradients[0].abs().max()
    assert (gradients[0] - gradients[1]).abs().max() <= 1e-5 * scale


# --- whole runs ---------------------------------------------------------------------------------


def test_a_distilled_run_stays_closer_to_the_original(
    options: dict[str, Any], tiny_images: Callable[..., Path]
) -> None:
    images = load_images(tiny_images("other", classes=5, per_class=3))
    original = load(options["model"], device="cpu", precision="fp32")
    pixels = torch.stack([original.preprocess_val(images.read(i)) for i in range(len(images))])
    moved = {}
    for name, more in {"plain": {}, "distilled": {"distill": 10.0, "mixtures": 1.0}}.items():
        result = pymcip.train(**{**options, "out": options["out"] + name, "epochs": 6}, **more)
        tuned = pymcip.load(str(result.out), device="cpu", precision="fp32")
        moved[name] = float(
            1 - (tuned.encode_images(pixels) * original.encode_images(pixels)).sum(1).mean()
        )
    assert moved["plain"] > 0.01
    assert moved["distilled"] < 0.5 * moved["plain"], moved


def test_both_stages_with_distillation(options: dict[str, Any]) -> None:
    changes = {"method": "mcip+", "mixtures": 0.25, "lambda_class": 0.25, "lambda_caption": 0.75}
    changes |= {"distill": 0.5, "rea_epochs": 1, "rea_batch_size": 4, "alignment_budget": 0.999}
    result = pymcip.train(**{**options, **changes})
    steps = [line for line in lines_of(result.out) if "loss" in line]
    stages = [line["stage"] for line in steps]
    assert stages == ["image"] * 6 + ["text"] * 3
    for line in steps[:6]:
        terms = 0.25 * line["arc_margin"] + 0.75 * line["caption_margin"]
        terms += 0.5 * (line["distill"] + line["distill_mixtures"])
        assert line["loss"] == pytest.approx(terms, rel=1e-5)
    assert result.alignment is not None
    assert len(result.alignment["kept_by_epoch"]) == 3


def assert_same_run(first: Path, second: Path) -> None:
    weights = [torch.load(p / "exported" / "state_dict.pt") for p in (first, second)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    heads = [load_checkpoint(checkpoint_files(p / "checkpoints")[-2]) for p in (first, second)]
    assert heads[0]["heads"].keys() == heads[1]["heads"].keys()
    for name, value in heads[0]["heads"].items():
        assert torch.equal(value, heads[1]["heads"][name])
    assert computed_of(first) == computed_of(second)


def whole_and_resumed(options: dict[str, Any], cwd: Path) -> tuple[pymcip.TrainResult, ...]:
    """A run, and the same one killed in its fourth step and resumed."""
    killed = {**options, "out": str(cwd / "killed")}
    child = start_killed(4, killed, cwd)
    whole = pymcip.train(**options)
    train_until_killed(child)
    return whole, pymcip.train(**killed, resume="latest")


def test_resumed_after_sigkill_gives_the_same_bits(
    options: dict[str, Any], tiny_images: Callable[..., Path], tmp_path: Path
) -> None:
    """Mixtures with a teacher that must be the original's; a resumed run has tuned weights."""
    options = {
        **options,
        "distill": 1.0,
        "distill_captions": 20,
        "mixtures": 0.5,
    }
    whole, resumed = whole_and_resumed(options, tmp_path)
    terms = [line["distill_mixtures"] for line in lines_of(whole.out)]
    assert terms[0] < 1e-5  # before the first step both models are the original
    assert terms[-1] > 1e-4
    assert_same_run(whole.out, resumed.out)


def test_resumed_run_on_generic_images_gives_the_same_bits(
    options: dict[str, Any], tmp_path: Path
) -> None:
    options = {
        **options, "distill": 1.0, "distill_data": options["train_data"], "mixtures": 0.5,
    }  # fmt: skip
    whole, resumed = whole_and_resumed(options, tmp_path)
    assert all("distill_data" in line for line in lines_of(whole.out))
    assert_same_run(whole.out, resumed.out)


def test_workers_do_not_change_the_generic_images(
    options: dict[str, Any], tiny_images: Callable[..., Path]
) -> None:
    data = tiny_images("generic", classes=2, per_class=3)
    (data / "class0" / "broken.jpg").write_bytes(b"no picture")
    options = {
        **options,
        "method": "gpr",
        "distill": 1.0,
        "distill_data": str(data),
        "mixtures": 0.5,
    }
    runs = [
        pymcip.train(**{**options, "out": f"{options['out']}{n}", "workers": n}) for n in (0, 1)
    ]
    assert_same_run(runs[0].out, runs[1].out)
    first = lines_of(runs[0].out)[0]
    assert first["loss"] == pytest.approx(
        first["arc_margin"] + first["distill"] + first["distill_data"], rel=1e-5
    )


# --- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "gpr", "captions": None, "distill": 1.0}, "distill needs captions="),
        ({"method": "gpr", "projector": "discard", "distill": 1.0}, "exclude each other"),
        ({"distill_data": "x"}, "give distill too"),
        ({"mixtures": 0.5}, "give distill too"),
        ({"distill_captions": 1}, "must be >= 2"),
    ],
)
def test_options_that_do_not_go_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings_for(**changes)


# --- the captions of a run -----------------------------------------------------------------------


def test_a_miner_of_another_width_only_mines(
    options: dict[str, Any], hub_folder: Callable[..., Path]
) -> None:
    """The captions that are trained on are embedded by the model that is trained."""
    miner = hub_folder("miner", embed_dim=8)
    result = pymcip.train(
        **options, mine_model=f"local-dir:{miner}", mine_pretrained=None, distill=1.0, mixtures=0.25
    )
    assert result.steps == 6
    assert result.skipped_steps == 0
