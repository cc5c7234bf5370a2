"""Zero-shot, retrieval by captions and by class descriptions against plain oracles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pymcip import metrics
from pymcip.errors import ConfigError, DataError
from tests.metric_cases import (
    EXACT,
    Floats,
    Ints,
    chunked,  # noqa: F401
    exact_case,
    few_settings,
    oracle_ap,
    oracle_recall,
    random_case,
    ranking,
    unit,
)

# Zero-shot


class WordModel:
    """Stands in for a ClipModel: each prompt's vector is looked up, of any norm."""

    def __init__(self, vectors: dict[str, list[float]]) -> None:
        self.vectors = vectors
        self.calls: list[int] = []

    def encode_texts(self, texts: Sequence[str], batch_size: int = 256) -> torch.Tensor:
        self.calls.append(len(texts))
        return torch.tensor([self.vectors[text] for text in texts])


@pytest.mark.parametrize("batch_size", [1, 256])
def test_zero_shot_classifier_normalises_before_and_after_the_mean(batch_size: int) -> None:
    # Class "a": (3, 0) and (0, 5) count alike: (1, 1) / sqrt 2. Without the first normalisation
    # the second prompt would win.
    model: Any = WordModel(
        {"a": [3.0, 0.0], "the a": [0.0, 5.0], "b": [-2.0, 0.0], "the b": [-1.0, 0.0]}
    )
    classifier = metrics.zero_shot_classifier(
        model, ["a", "b"], ["{}", "the {}"], batch_size=batch_size
    )
    half = math.sqrt(0.5)
    np.testing.assert_allclose(classifier, np.array([[half, half], [-1, 0]]), atol=1e-6)
    assert classifier.dtype == torch.float32


def test_zero_shot_classifier_fills_in_names_that_hold_braces() -> None:
    model: Any = WordModel({"x a {b} {}": [1.0, 0.0]})
    assert metrics.zero_shot_classifier(model, ["a {b} {}"], ["x {}"]).tolist() == [[1, 0]]


@pytest.mark.parametrize(("names", "templates"), [([], ["{}"]), (["a"], []), (["a"], ["a photo"])])
def test_zero_shot_classifier_refuses(names: list[str], templates: list[str]) -> None:
    model: Any = WordModel({})
    with pytest.raises(ConfigError):
        metrics.zero_shot_classifier(model, names, templates)


def test_zero_shot_accuracy_by_hand() -> None:
    classifier = np.array([[1.0, 0], [0.8, 0.6], [0, 1]])
    images = np.array([[1.0, 0], [1, 0], [1, 0], [0, 2]])  # rank 0, 1, 2 for [1, 0]; 2, 1, 0
    got = metrics.zero_shot_accuracy(images, classifier, np.array([0, 1, 2, 2]), top=(1, 2, 5))
    assert got == {1: 50, 2: 75, 5: 100}


def test_zero_shot_accuracy_gives_equal_scores_to_the_lower_label() -> None:
    got = metrics.zero_shot_accuracy(np.ones((2, 2)), np.ones((3, 2)), np.array([0, 1]), (1, 2))
    assert got == {1: 50, 2: 100}


def test_zero_shot_accuracy_matches_the_oracle() -> None:
    images, labels = random_case(5)
    classifier = np.random.default_rng(0).normal(size=(7, 12))
    scores = unit(images) @ unit(classifier).T
    for k, got in metrics.zero_shot_accuracy(images, classifier, labels, (1, 3)).items():
        hits = [label in ranking(row)[:k] for row, label in zip(scores, labels, strict=True)]
        assert got == pytest.approx(100 * np.mean(hits), abs=1e-9)


def test_zero_shot_accuracy_refuses_labels_without_a_class() -> None:
    with pytest.raises(DataError, match="classifier has 2 rows"):
        metrics.zero_shot_accuracy(np.eye(2), np.eye(2), np.array([0, 2]))


# Cross-modal recall


def test_recall_by_hand() -> None:
    # Image 2 has no caption. Texts 0 and 1 belong to image 0, text 2 to image 1.
    images = np.array([[1.0, 0], [0, 1], [0.6, 0.8]])
    texts = np.array([[1.0, 0], [0.5, 0.9], [0.6, 0.8]])
    got = metrics.cross_modal_recall(images, texts, np.array([0, 0, 1]), (1, 2, 3))
    # T2I: text 0 finds image 0 first; text 1 ranks 2, 1, 0; text 2 ranks 2, 1.
    # I2T: image 0 finds text 0 first; image 1 ranks texts 1, 2.
    assert got == {
        "t2i_r1": pytest.approx(100 / 3),
        "t2i_r2": pytest.approx(200 / 3),
        "t2i_r3": 100,
        "i2t_r1": 50,
        "i2t_r2": 100,
        "i2t_r3": 100,
    }


def test_recall_matches_the_oracle() -> None:
    generator = np.random.default_rng(6)
    images = generator.normal(size=(20, 8)).astype(np.float32)
    owners = generator.integers(0, 17, 50)
    texts = (images[owners] + 1.5 * generator.normal(size=(50, 8))).astype(np.float32)
    got = metrics.cross_modal_recall(images, texts, owners, (1, 5, 100))
    for k in (1, 5, 100):
        wanted = pytest.approx(oracle_recall(images, texts, owners, k), abs=1e-9)
        assert (got[f"t2i_r{k}"], got[f"i2t_r{k}"]) == wanted


@given(exact_case, st.data())
@few_settings
def test_recall_with_ties(case: tuple[Floats, Ints], data: st.DataObject) -> None:
    images, _ = case
    picks = data.draw(st.lists(st.integers(0, len(EXACT) - 1), min_size=1, max_size=20))
    owners = np.array([data.draw(st.integers(0, len(images) - 1)) for _ in picks])
    got = metrics.cross_modal_recall(images, EXACT[picks], owners, (1, 3))
    for k in (1, 3):
        wanted = pytest.approx(oracle_recall(images, EXACT[picks], owners, k), abs=1e-9)
        assert (got[f"t2i_r{k}"], got[f"i2t_r{k}"]) == wanted


def test_recall_refuses_captions_of_no_image() -> None:
    with pytest.raises(DataError, match="image_emb has 2 rows"):
        metrics.cross_modal_recall(np.eye(2), np.eye(2), np.array([0, 2]))


# Class descriptions


def test_class_text_map_by_hand() -> None:
    # Text 0 ranks images 0, 1, 2; its class is {0, 2}: (1 + 2/3) / 2. Text 1 ranks 2, 1, 0; its
    # class is {1}: 1/2. Class 2 has no image and is left out.
    images = np.array([[1.0, 0], [0.8, 0.6], [0, 1]])
    texts = np.array([[1.0, 0], [0, 1], [1, 1]])
    got = metrics.class_text_map(images, np.array([0, 1, 0]), texts)
    assert got == pytest.approx(100 * (5 / 6 + 1 / 2) / 2)


@pytest.mark.usefixtures("chunked")
def test_class_text_map_matches_the_oracle() -> None:
    images, labels = random_case(8)
    texts = np.random.default_rng(1).normal(size=(9, 12))
    scores = unit(texts) @ unit(images).T
    wanted = np.mean([oracle_ap(scores[c], labels == c) for c in range(9) if c in labels])
    assert metrics.class_text_map(images, labels, texts) == pytest.approx(100 * wanted, abs=1e-9)
