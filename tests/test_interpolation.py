"""Weights between two models, and the search for the farthest that keeps a bound."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from pymcip.training.interpolation import interpolated, largest_coefficient


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
