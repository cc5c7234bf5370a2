"""Appended dimensions: text search as it was, the gate, shared blocks, files, bad input."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch

import pymcip
from pymcip.errors import CheckpointError, ConfigError, DataError
from pymcip.metrics import full_ranking_map, knn_classify, recall_at_k
from pymcip.model import AppendedClip, ClipModel
from pymcip.model.appended import Gate, appended_clip, linear_head, share_blocks
from pymcip.ops.arrays import MatrixParts
from pymcip.training.appended import class_covariances, fit_head
from tests.conftest import CAPTIONS, images

DIMS = 6


@pytest.fixture
def options(run_options: dict[str, Any]) -> dict[str, Any]:
    return {**run_options, "method": "gpr", "appended_dims": DIMS, "lr": 1e-3}


@pytest.fixture
def trained(options: dict[str, Any]) -> AppendedClip:
    clip = pymcip.load(str(pymcip.train(**options).out), precision="fp32")
    assert isinstance(clip, AppendedClip)
    return clip


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def through(clip: AppendedClip, features: np.ndarray) -> np.ndarray:
    weight, bias = (value.double().numpy() for value in (clip.head.weight, clip.head.bias))
    return features @ weight.T + bias


def test_vectors_are_as_documented(trained: AppendedClip, tiny_clip: ClipModel) -> None:
    pixels = images()
    joint = tiny_clip.encode_images(pixels).double().numpy()
    assert trained.tower is not None
    with torch.inference_mode():
        features = unit(trained.tower(pixels).double().numpy())
    appended = unit(through(trained, features))
    expected = np.hstack([joint, trained.weight * appended]) / np.hypot(1, trained.weight)
    found = trained.encode_images(pixels).numpy()
    assert trained.embed_dim == found.shape[1] == tiny_clip.embed_dim + DIMS
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    texts = trained.encode_texts(CAPTIONS).numpy()
    np.testing.assert_array_equal(texts[:, : tiny_clip.embed_dim], tiny_clip.encode_texts(CAPTIONS))
    assert not texts[:, tiny_clip.embed_dim :].any()


def test_a_head_alone_has_no_second_tower(options: dict[str, Any], tiny_clip: ClipModel) -> None:
    """`unlock_layers=0` trains no tower: the head is fitted to the joint embeddings themselves."""
    result = pymcip.train(**{**options, "method": "appended", "unlock_layers": 0})
    clip = pymcip.load(str(result.out), precision="fp32")
    assert isinstance(clip, AppendedClip)
    assert clip.tower is None
    assert result.steps == 0
    pixels = images()
    joint = tiny_clip.encode_images(pixels).double().numpy()
    appended = unit(through(clip, joint))
    expected = np.hstack([joint, clip.weight * appended]) / np.hypot(1, clip.weight)
    np.testing.assert_allclose(clip.encode_images(pixels).numpy(), expected, atol=1e-5)


def test_with_a_budget_the_joint_part_is_the_model_that_keeps_it(
    options: dict[str, Any], captions_file: Callable[..., Path], tmp_path: Path
) -> None:
    """The first D dimensions are those of a run without appended ones, drawn back by the same budget."""
    captions = [f"{word} number {i}" for i in range(20) for word in "abc"]
    both = {**options, "captions": str(captions_file(captions)), "alignment_budget": 0.05}
    both["lr"] = 1e-2
    plain = pymcip.train(**{**both, "appended_dims": 0, "out": str(tmp_path / "plain")})
    result = pymcip.train(**{**both, "appended_dims": DIMS})
    assert plain.alignment is not None
    assert result.alignment is not None
    assert result.alignment["coefficient"] == plain.alignment["coefficient"] < 1
    clip = pymcip.load(str(result.out), precision="fp32")
    drawn_back = pymcip.load(str(plain.out), precision="fp32")
    pixels = images()
    np.testing.assert_allclose(
        clip.joint().encode_images(pixels), drawn_back.encode_images(pixels), atol=1e-5
    )
    with torch.inference_mode():
        features = unit(clip.tower(pixels).double().numpy())  # type: ignore[attr-defined]
    assert not np.allclose(features, drawn_back.encode_images(pixels), atol=1e-3)


def test_nothing_within_a_budget_leaves_the_joint_part_as_it_was(
    options: dict[str, Any], captions_file: Callable[..., Path], tiny_clip: ClipModel
) -> None:
    captions = [f"{word} number {i}" for i in range(20) for word in "abc"]
    harsh = {"captions": str(captions_file(captions)), "alignment_budget": 0.0, "lr": 1.0}
    result = pymcip.train(**{**options, **harsh})
    assert result.alignment is not None
    assert not result.alignment["respected"]
    clip = pymcip.load(str(result.out), precision="fp32")
    pixels = images()
    np.testing.assert_array_equal(
        clip.joint().encode_images(pixels), tiny_clip.encode_images(pixels)
    )


def test_text_search_ranks_as_before(trained: AppendedClip, tiny_clip: ClipModel) -> None:
    """Scores are the joint model's times a constant, up to fp32's rounding."""
    pixels = images(8)
    before = tiny_clip.encode_texts(CAPTIONS) @ tiny_clip.encode_images(pixels).T
    after = trained.encode_texts(CAPTIONS) @ trained.encode_images(pixels).T
    torch.testing.assert_close(after * np.hypot(1, trained.weight), before, atol=1e-6, rtol=0)


def test_evaluation_finds_text_metrics_unchanged(
    options: dict[str, Any], tiny_model_dir: Path, ten_images: Path
) -> None:
    run = pymcip.train(**options).out
    result = pymcip.evaluate(
        model=str(run), baseline=str(tiny_model_dir), data=ten_images, precision="fp32"
    )
    assert result.baseline is not None
    names = [name for name in result.metrics if name.startswith(("zero_shot", "t2i", "i2t"))]
    assert names
    assert {n: result.metrics[n] for n in names} == {n: result.baseline[n] for n in names}


def test_what_open_clip_loads_is_the_original(
    options: dict[str, Any], tiny_model_dir: Path
) -> None:
    result = pymcip.train(**options)
    before = open_clip.create_model(f"local-dir:{tiny_model_dir}").state_dict()
    after = open_clip.create_model(f"local-dir:{result.hub}").state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_resumed_run_gives_the_same_dimensions(options: dict[str, Any]) -> None:
    out = pymcip.train(**options).out
    first = (out / "exported" / "hub" / "appended.safetensors").read_bytes()
    (out / "result.json").unlink()  # as if it was killed before its last step
    pymcip.train(**options, resume="latest")
    assert (out / "exported" / "hub" / "appended.safetensors").read_bytes() == first


def test_export_keeps_the_dimensions(options: dict[str, Any], tmp_path: Path) -> None:
    run = pymcip.train(**options).out
    hub = pymcip.export(model=str(run), out=tmp_path / "copy", precision="fp32").hub
    found, expected = (
        pymcip.load(str(folder), precision="fp32").encode_images(images()) for folder in (hub, run)
    )
    assert torch.equal(found, expected)


def test_the_gate(tiny_clip: ClipModel) -> None:
    prototypes = torch.eye(tiny_clip.embed_dim)[:2]
    head = linear_head(
        torch.randn(DIMS, tiny_clip.embed_dim, generator=torch.Generator().manual_seed(0)),
        torch.zeros(DIMS),
    )
    clip = appended_clip(tiny_clip, None, head, 1.5, Gate(prototypes, 0.5, 0.1))
    joint = torch.zeros(3, tiny_clip.embed_dim)
    joint[0, 0] = joint[2, 5] = 1  # a prototype; nothing like one
    joint[1, 1], joint[1, 5] = 0.6, 0.8
    vectors = torch.cat([joint, torch.ones(3, DIMS)], dim=1)
    expected = 1 / (1 + np.exp(-(np.array([1, 0.6, 0]) - 0.5) / 0.1))
    queries = clip.as_queries(vectors)
    assert torch.equal(queries[:, : tiny_clip.embed_dim], joint)
    np.testing.assert_allclose(queries[:, -DIMS:], expected[:, None].repeat(DIMS, 1), rtol=1e-5)
    assert not clip.as_queries(vectors, 0.0)[:, -DIMS:].any()
    assert torch.equal(clip.as_queries(vectors, 1.0), vectors)


@pytest.mark.parametrize("changed", [0, 1, None])
def test_blocks_in_common_run_once(tiny_clip: ClipModel, changed: int | None) -> None:
    """`changed`: the first block that differs; None: what comes before the blocks does."""
    visual: Any = tiny_clip.model.visual
    tuned = copy.deepcopy(visual).eval()
    blocks = tuned.transformer.resblocks
    with torch.no_grad():
        for block in [] if changed is None else blocks[changed:]:
            block.ln_1.weight += 0.5
        if changed is None:
            tuned.conv1.weight += 0.1
    alone = copy.deepcopy(tuned)
    shared = share_blocks(visual, tuned)
    assert shared == (changed or 0)
    calls: list[int] = []
    blocks[-1].register_forward_hook(lambda *_: calls.append(1))
    for pixels in (images(2), images(3)):
        with torch.inference_mode():
            visual(pixels)
            assert torch.equal(tuned(pixels), alone(pixels))


def test_queries_of_the_same_images_are_measured() -> None:
    generator = np.random.default_rng(0)
    bank, queries = unit(generator.normal(size=(12, 4))), unit(generator.normal(size=(12, 4)))
    labels = np.arange(12) % 3
    scores = queries @ bank.T
    relevant = labels[np.argsort(-scores, axis=1)] == labels[:, None]
    precision = relevant.cumsum(axis=1) / np.arange(1, 13)
    expected = 100 * np.mean((precision * relevant).sum(axis=1) / 4)
    assert full_ranking_map(bank, labels, queries=queries) == pytest.approx(expected, abs=1e-9)
    np.fill_diagonal(scores, -2)
    nearest = labels[scores.argmax(axis=1)]
    found = recall_at_k(bank, labels, (1,), queries=queries, leave_one_out=True)
    assert found[1] == pytest.approx(100 * np.mean(nearest == labels))
    answers = knn_classify(bank, labels, queries, 1, leave_one_out=True)
    np.testing.assert_array_equal(answers, nearest)
    with pytest.raises(DataError, match="queries has 11 rows"):
        full_ranking_map(bank, labels, queries=queries[:11])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "2sft"}, "appended_dims leaves the text side as it was"),
        ({"projector": "discard"}, "appended_dims is not allowed with projector='discard'"),
        (
            {"method": "rea", "alignment_budget": 0.02},
            "appended_dims leaves the text side as it was",
        ),
        ({"method": "appended", "appended_dims": 0}, "0 is method='gpr'"),
        ({"appended_dims": -1}, "appended_dims=-1 is not allowed"),
    ],
)
def test_options_that_dont_go_with_it(
    options: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        pymcip.train(**{**options, "captions": "captions.txt", **changes})


def test_such_embeddings_are_not_mined(
    options: dict[str, Any], captions_file: Callable[..., Path], tmp_path: Path
) -> None:
    run = pymcip.train(**options).out
    folder = tmp_path / "embedded"
    pymcip.embed(model=str(run), images=options["train_data"], captions=captions_file(), out=folder)
    with pytest.raises(DataError, match="appended dimensions, which captions don't have"):
        pymcip.mine_captions(images=folder, out=tmp_path / "mined")


@pytest.mark.parametrize("damage", ["cut", "other"])
def test_a_damaged_file_is_refused(
    options: dict[str, Any], damage: str, hub_folder: Callable[..., Path]
) -> None:
    run = pymcip.train(**options).out
    path = run / "exported" / "hub" / "appended.safetensors"
    content = path.read_bytes()
    assert b'version\\": 2' in content
    path.write_bytes(
        content[:100] if damage == "cut" else content.replace(b'version\\": 2', b'version\\": 9')
    )
    with pytest.raises(CheckpointError, match="can't be read as appended dimensions"):
        pymcip.load(str(run))


def test_the_head_separates_classes_best() -> None:
    """Against the definition: the generalised eigenvectors, in NumPy."""
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(9, 12))
    labels = np.repeat(np.arange(9), 1 + np.arange(9))
    rows = (centres[labels] + 0.5 * generator.normal(size=(len(labels), 12))).astype(np.float32)
    means = np.stack([rows[labels == c].mean(axis=0, dtype=np.float64) for c in range(9)])
    off, apart = rows - means[labels], means[labels] - rows.mean(axis=0, dtype=np.float64)
    within, between = off.T @ off / len(rows), apart.T @ apart / len(rows)
    found = class_covariances(MatrixParts([rows[:7], rows[7:]]), labels)
    for one, expected in zip(
        found, (within, between, rows.mean(axis=0, dtype=np.float64)), strict=True
    ):
        np.testing.assert_allclose(one, expected, atol=1e-12)
    head = fit_head(*found, 5, 0.1, 0.25)
    ridge = within + 0.1 * np.trace(within) / 12 * np.eye(12)
    ratios, directions = np.linalg.eig(np.linalg.solve(ridge, between + 0.1 * within))
    best = np.argsort(-ratios.real)[:5]
    lengths = np.sqrt(np.einsum("ij,ik,kj->j", directions.real, ridge, directions.real))
    expected = (directions.real / lengths * ratios.real**0.25)[:, best]
    centred = rows - rows.mean(axis=0, dtype=np.float64)
    likeness = unit(centred @ expected) @ unit(centred @ expected).T
    z = unit(head(torch.from_numpy(rows)).double().numpy())
    np.testing.assert_allclose(z @ z.T, likeness, atol=1e-4)


@pytest.mark.parametrize(
    "rows", [np.eye(8, dtype=np.float32)[:5], np.full((5, 8), 0.3, np.float32)]
)
def test_a_head_of_one_image_per_class_or_of_equal_ones(rows: np.ndarray) -> None:
    head = fit_head(*class_covariances(MatrixParts(rows), np.arange(5)), 6, 0.1, 0.0)
    assert bool(head.weight.isfinite().all())
    assert bool(head.bias.isfinite().all())


def test_more_dimensions_than_the_embedding_has(options: dict[str, Any]) -> None:
    with pytest.raises(
        ConfigError, match=r"appended_dims=4096 is not allowed with .* allowed: 1 to"
    ):
        pymcip.train(**{**options, "appended_dims": 4096})
