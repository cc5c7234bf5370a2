"""The training of the demo's base model: its tokenizer, and a run of a few steps."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from pymcip.demo.captions import corpus
from pymcip.demo.sprites import load_sprites
from tests.conftest import bench_module


@pytest.fixture(scope="module")
def pretrain_demo() -> Iterator[Any]:
    with bench_module("studies.pretrain_demo") as module:
        yield module


def test_words_are_tokenized_as_open_clip_does(pretrain_demo: Any) -> None:
    texts = corpus(0, 300, load_sprites().emoji)
    texts += [one.name for one in load_sprites().emoji[::10]]
    tokenizer = open_clip.SimpleTokenizer(context_length=28)
    assert torch.equal(pretrain_demo.Words(28)(texts), tokenizer(texts))
    used = pretrain_demo.known_tokens()
    unknown = ~used[pretrain_demo.Words(77)(texts)]
    assert not unknown.any()


def test_a_few_steps_give_a_model_that_loads(pretrain_demo: Any, tmp_path: Path) -> None:
    config = pretrain_demo.PretrainConfig(
        out=tmp_path / "base", steps=2, batch_size=8, scenes=16, reuse=1, warmup=1
    )
    model, record = pretrain_demo.train(config)
    assert (record["steps"], record["pairs"]) == (2, 16)
    pretrain_demo.save(model, config.out)
    loaded = open_clip.create_model(f"local-dir:{config.out}")
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name].half(), tensor.half()), name
    assert json.loads((config.out / "open_clip_config.json").read_text())["model_cfg"]
