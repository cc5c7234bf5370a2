"""Train the demo's base model: `python bench/studies/pretrain_demo.py [--out FOLDER]`.

A small CLIP in open_clip's own architecture (a ModifiedResNet and a text transformer) learns from
scenes that are drawn on the fly, of all emoji, each with a caption at the level of meaning
(`pymcip.demo.captions`). Its scenes come from a seed of their own; it never sees a scene of the
demo's training or test split. The result is a hub-style folder, which open_clip loads as
`local-dir:FOLDER`, and `pretrain.json` with settings and metrics.

Beside open_clip's contrastive loss, a linear layer that is thrown away names the main emoji
(without its skin tone) from the image's features and from the caption's; its weight falls to zero.
Half a million pairs are few for a language of 1,900 things; pilot runs without it learned their
names slowly (not measured with all else equal).

The weights are stored in fp16. The rows of the token table that no caption uses are zero:
open_clip's tokenizer has 49,408 tokens, the demo's language fewer than two thousand.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import open_clip
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from safetensors.torch import save_file

from pymcip.demo.captions import corpus, describe_all
from pymcip.demo.recipe import BASE_FOLDER
from pymcip.demo.scenes import IMAGE_SIZE, Scenes, compose, render
from pymcip.demo.sprites import load_sprites
from pymcip.demo.world import TEMPLATES, WorldConfig, write_world
from pymcip.evaluation import evaluate
from pymcip.files import atomic_path, write_json

log = logging.getLogger("pymcip.pretrain_demo")

MODEL_CONFIG: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": IMAGE_SIZE, "layers": [1, 1, 1, 1], "width": 16},
    "text_cfg": {
        "context_length": 28,
        "vocab_size": 49408,
        "width": 64,
        "heads": 4,
        "layers": 2,
    },
}
PREPROCESS: dict[str, Any] = {
    "size": [IMAGE_SIZE, IMAGE_SIZE],
    "mode": "RGB",
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
    "fill_color": 0,
}
# Seeds of the demo's worlds are small; pretraining draws from a stream that none of them shares.
_STREAM = 20_260_000


@dataclass(frozen=True)
class PretrainConfig:
    """Settings of a pretraining run.

    The learning rate falls along a cosine over `steps`, or over `minutes` if those are over first.
    `naming` is the first weight of the naming loss; `scenes` are drawn at a time and each is used
    `reuse` times, in other words.
    """

    out: Path = BASE_FOLDER
    steps: int = 12_000
    minutes: float = 40.0
    batch_size: int = 128
    lr: float = 3e-3
    wd: float = 0.1
    warmup: int = 200
    naming: float = 1.0
    scenes: int = 8192
    reuse: int = 2
    seed: int = 0


class Words:
    """open_clip's tokenizer with the tokens of every word kept: much faster on a small language."""

    def __init__(self, context_length: int) -> None:
        self._tokenizer = open_clip.SimpleTokenizer(context_length=context_length)
        self._context_length = context_length
        self._known: dict[str, list[int]] = {}

    def __call__(self, texts: list[str]) -> torch.Tensor:
        """Tokens as int64 (len(texts), context_length), equal to the tokenizer's."""
        out = np.zeros((len(texts), self._context_length), dtype=np.int64)
        for row, text in enumerate(texts):
            tokens = [self._tokenizer.sot_token_id]
            for word in text.lower().split():
                if word not in self._known:
                    self._known[word] = self._tokenizer.encode(word)
                tokens += self._known[word]
            tokens = [*tokens[: self._context_length - 1], self._tokenizer.eot_token_id]
            out[row, : len(tokens)] = tokens
        return torch.from_numpy(out)


def _pixels(images: npt.NDArray[np.uint8]) -> torch.Tensor:
    """uint8 (B, H, W, 3) to normalised float32 (B, 3, H, W), in channels-last memory."""
    mean, std = PREPROCESS["mean"][0], PREPROCESS["std"][0]
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255.0 - mean) / std


@lru_cache(maxsize=1)
def _weights() -> npt.NDArray[np.float64]:
    """Probabilities (N,) that make concepts of many skin tones and of none equally frequent."""
    concepts = [one.concept for one in load_sprites().emoji]
    count = Counter(concepts)
    weights = np.asarray([1.0 / count[concept] for concept in concepts])
    return weights / weights.sum()


def _draw(seed: int, count: int) -> tuple[Scenes, npt.NDArray[np.uint8]]:
    generator = np.random.default_rng([_STREAM, seed])
    everything = np.arange(len(load_sprites()))
    main = generator.choice(everything, count, p=_weights())
    scenes = compose(generator, main, everything)
    return scenes, render(scenes, _STREAM + seed)


Drawn = tuple[Scenes, npt.NDArray[np.uint8]]


def _join(drawn: list[Drawn]) -> Drawn:
    arrays = {
        field.name: np.concatenate([getattr(scenes, field.name) for scenes, _ in drawn])
        for field in fields(Scenes)
    }
    return Scenes(**arrays), np.concatenate([images for _, images in drawn])


def train(config: PretrainConfig) -> tuple[CLIP, dict[str, Any]]:
    """Train a model; return it with what happened (steps, seconds, last loss)."""
    torch.manual_seed(config.seed)
    emoji = load_sprites().emoji
    used = known_tokens()
    position = (
        torch.cumsum(used, dim=0) - 1
    )  # keeps the order, so that the end-of-text token stays the highest
    text_config = {**MODEL_CONFIG["text_cfg"], "vocab_size": int(used.sum())}
    model = CLIP(**{**MODEL_CONFIG, "text_cfg": text_config})
    model.visual.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    concepts = {name: row for row, name in enumerate(sorted({one.concept for one in emoji}))}
    concept_of = torch.tensor([concepts[one.concept] for one in emoji])
    naming = torch.nn.Linear(MODEL_CONFIG["embed_dim"], len(concepts))
    matrices.append(naming.weight)
    others.append(naming.bias)
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": config.wd}, {"params": others, "weight_decay": 0.0}],
        lr=config.lr,
        betas=(0.9, 0.98),
    )
    loss_function = open_clip.ClipLoss()
    tokenize = Words(MODEL_CONFIG["text_cfg"]["context_length"])
    generator = np.random.default_rng([_STREAM, config.seed, 1])
    start, step, chunk, done = time.monotonic(), 0, 0, 0.0
    losses: list[float] = []
    named_losses: list[float] = []
    model.train()

    def encode_text(tokens: torch.Tensor) -> torch.Tensor:
        return model.encode_text(position[tokens])

    # One core runs the image tower, the other the text tower and the drawing of the next scenes: on
    # a small model that is faster than two threads inside of every operation.
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as second:
        steps_per_chunk = config.reuse * -(-config.scenes // config.batch_size)
        share = -(-config.scenes // steps_per_chunk)
        ahead = [second.submit(_draw, 0, config.scenes)]
        while done < 1.0:
            scenes, images = _join([drawn.result() for drawn in ahead])
            ahead = []
            for turn in range(config.reuse):
                # The second turn has the same scenes in other words.
                captions = describe_all(scenes, _STREAM + chunk * config.reuse + turn, emoji)
                tokens = tokenize(captions)
                order = generator.permutation(len(scenes))
                for first in range(0, len(scenes), config.batch_size):
                    elapsed = (time.monotonic() - start) / (60 * config.minutes)
                    done = max(step / config.steps, elapsed)
                    if done >= 1.0:
                        break
                    rate = config.lr * min(1.0, (step + 1) / config.warmup)
                    for group in optimizer.param_groups:
                        group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * done))
                    rows = order[first : first + config.batch_size]
                    text_side = second.submit(encode_text, tokens[torch.from_numpy(rows)])
                    with torch.autocast("cpu", dtype=torch.bfloat16):
                        image_side = model.encode_image(_pixels(images[rows])).float()
                    image = image_side.detach().requires_grad_()
                    text = text_side.result().detach().requires_grad_()
                    optimizer.zero_grad()
                    loss = loss_function(
                        F.normalize(image, dim=-1),
                        F.normalize(text, dim=-1),
                        model.logit_scale.exp(),
                    )
                    target = concept_of[torch.from_numpy(scenes.main[rows])]
                    named = F.cross_entropy(naming(image), target)
                    named = named + F.cross_entropy(naming(text), target)
                    losses.append(loss.item())
                    named_losses.append(named.item() / 2)
                    (loss + config.naming * (1.0 - done) * named).backward()
                    text_done = second.submit(text_side.result().backward, text.grad)
                    image_side.backward(image.grad)
                    text_done.result()
                    drawing = (chunk + 1) * steps_per_chunk + len(ahead)
                    ahead.append(second.submit(_draw, drawing, share))
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    with torch.no_grad():
                        model.logit_scale.clamp_(0, math.log(100))
                    step += 1
            chunk += 1
            log.info(
                "step %d (%.0f %%), loss %.3f, naming %.3f, logit scale %.1f, %.0f pairs/s",
                step,
                100 * done,
                float(np.mean(losses[-32:])),
                float(np.mean(named_losses[-32:])),
                model.logit_scale.exp().item(),
                step * config.batch_size / (time.monotonic() - start),
            )
    seconds = time.monotonic() - start
    whole = CLIP(**MODEL_CONFIG)
    state = model.state_dict()
    table = torch.zeros_like(whole.token_embedding.weight)
    table[used] = state["token_embedding.weight"]
    whole.load_state_dict({**state, "token_embedding.weight": table})
    return whole.eval(), {
        "steps": step,
        "pairs": step * config.batch_size,
        "seconds": round(seconds),
        "loss": round(float(np.mean(losses[-64:])), 4),
    }


def known_tokens() -> torch.Tensor:
    """Which rows of the token table the demo's language can use: bool (49408,)."""
    tokenize = Words(77)
    phrases = [one.name for one in load_sprites().emoji]
    phrases += [one.concept for one in load_sprites().emoji]
    phrases += corpus(_STREAM, 20_000, load_sprites().emoji)
    phrases += [template.format("x") for template in TEMPLATES]
    used = torch.zeros(MODEL_CONFIG["text_cfg"]["vocab_size"], dtype=torch.bool)
    used[tokenize(phrases).flatten().unique()] = True
    return used


def save(model: CLIP, out: Path) -> None:
    """Write the hub-style folder."""
    out.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    halves = {
        name: (tensor.half() if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in state.items()
    }
    with atomic_path(out / "open_clip_model.safetensors") as temporary:
        save_file(halves, temporary, metadata={"format": "pt"})
        temporary.chmod(0o644)
    write_json(
        out / "open_clip_config.json", {"model_cfg": MODEL_CONFIG, "preprocess_cfg": PREPROCESS}
    )


def measure(folder: Path) -> dict[str, float]:
    """The demo's metrics on a test split of its own: scenes that no run of the demo has."""
    with tempfile.TemporaryDirectory() as temporary:
        config = WorldConfig(seed=_STREAM, train_classes=2, train_images=1)
        world = write_world(config, temporary)
        found = evaluate(model=f"local-dir:{folder}", device="cpu", **world.testing).metrics
    return {name: round(value, 2) for name, value in found.items()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    for name, value in asdict(PretrainConfig()).items():
        kind = Path if isinstance(value, Path) else type(value)
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=value)
    config = PretrainConfig(**vars(parser.parse_args()))
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    torch.set_num_threads(1)
    model, record = train(config)
    save(model, config.out)
    settings = {name: value for name, value in asdict(config).items() if name != "out"}
    content = {
        "command": "python bench/studies/pretrain_demo.py",
        "settings": settings,
        **record,
        "metrics": measure(config.out),
    }
    write_json(config.out / "pretrain.json", content)


if __name__ == "__main__":
    main()
