"""An open_clip model with what belongs to it: transforms, tokenizer, config and fingerprint."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pymcip.files import fingerprint

MAX_LOGIT_SCALE = 100.0

_log = logging.getLogger("pymcip.model")


@dataclass
class ClipModel:
    """An open_clip model and everything needed to run, fingerprint and export it.

    `model` is open_clip's own module (fp32 weights); `model_cfg` and `preprocess_cfg` are what its
    hub-style `open_clip_config.json` would hold, `quick_gelu` and a forced image size included.
    """

    name: str
    model: nn.Module
    preprocess_val: Callable[[Any], Tensor]
    tokenizer: Callable[[list[str]], Tensor]
    model_cfg: dict[str, Any]
    preprocess_cfg: dict[str, Any]
    device: torch.device
    precision: str

    @property
    def embed_dim(self) -> int:
        """Width of the vectors: D, and what is appended (see `model.appended`)."""
        return self.joint_dim

    @property
    def joint_dim(self) -> int:
        """Width D of the embeddings that images and texts share; more may be appended to it."""
        return int(self.model_cfg["embed_dim"])

    def joint(self) -> ClipModel:
        """The joint model alone: this one, where nothing is appended (see `model.appended`)."""
        return self

    def as_queries(self, vectors: Tensor, strength: float | None = None) -> Tensor:
        """Vectors to search with, of stored ones [N, D]: these, where nothing is appended."""
        return vectors

    @property
    def image_size(self) -> int:
        """Pixels of a side of the images that the model takes."""
        size = self.preprocess_cfg["size"]
        return int(size[0] if isinstance(size, (tuple, list)) else size)

    @property
    def transform(self) -> str:
        """The evaluation transform in words, the same in every process (no memory addresses)."""
        return re.sub(r" at 0x[0-9a-f]+", "", repr(self.preprocess_val))

    @property
    def logit_scale(self) -> float:
        """CLIP's scale s = exp(logit_scale) of cosines, the inverse temperature, at most 100.

        CLIP (arXiv 2103.00020, section 2.5) and open_clip clip it in training; every loss and
        measurement of pymcip's training takes it from here. The weights are exported as stored.
        """
        stored = float(self.model.logit_scale.detach())  # type: ignore[union-attr,operator,arg-type]
        return min(MAX_LOGIT_SCALE, math.exp(stored))

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Context of a forward pass: bf16 autocast if the precision is "amp_bf16"."""
        if self.precision == "amp_bf16":
            return torch.autocast(device_type=self.device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def image_features(self, images: Tensor) -> Tensor:
        """Unit fp32 embeddings [B, D] of preprocessed images [B, 3, H, W]; keeps the graph."""
        return self._unit(self.model.encode_image, images)

    def text_features(self, tokens: Tensor) -> Tensor:
        """Unit fp32 embeddings [B, D] of token ids [B, L]; keeps the graph."""
        return self._unit(self.model.encode_text, tokens)

    def _unit(self, encode: Any, batch: Tensor) -> Tensor:
        with self.autocast():
            features = encode(batch)
        return nn.functional.normalize(features.float(), dim=-1)

    @torch.inference_mode()
    def encode_images(self, images: Tensor) -> Tensor:
        """Unit fp32 embeddings [B, D] on the CPU of preprocessed images [B, 3, H, W]."""
        with evaluation_mode(self.model):
            images = images.to(self.device, non_blocking=True)
            if is_convolutional(self.model):
                images = images.contiguous(memory_format=torch.channels_last)
            return self.image_features(images).cpu()

    def encode_texts(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """Unit fp32 embeddings [len(texts), D] on the CPU; warns if texts are cut at the context."""
        parts, cut = [], 0
        for start in range(0, len(texts), batch_size):
            features, were_cut = self.encode_and_count(texts[start : start + batch_size])
            parts.append(features)
            cut += int(were_cut.sum())
        warn_of_cut(cut, len(texts), self.context_length)
        return torch.cat(parts) if parts else torch.empty(0, self.embed_dim)

    @torch.inference_mode()
    def encode_and_count(self, texts: Sequence[str]) -> tuple[Tensor, npt.NDArray[np.bool_]]:
        """Unit fp32 embeddings [n, D] on the CPU of one batch, and which texts were cut, bool [n].

        What is cut are tokens beyond the context of the text tower.
        """
        tokens = self.tokenizer(list(texts))
        with evaluation_mode(self.model):
            features = self.text_features(tokens.to(self.device)).cpu()
        return features, self._cut(texts, tokens)

    @property
    def context_length(self) -> int:
        """How many tokens of a text the model sees, those that the tokenizer adds included."""
        return int(getattr(self.tokenizer, "context_length", 0) or 0)

    def _cut(self, texts: Sequence[str], tokens: Tensor) -> npt.NDArray[np.bool_]:
        """Which texts have more tokens than the context: those that get more in a longer one."""
        cut = np.zeros(len(texts), bool)
        length = tokens.shape[1]
        if self.context_length != length:  # a tokenizer that is not open_clip's
            return cut
        inner = getattr(self.tokenizer, "tokenizer", None)
        pad = getattr(inner, "pad_token_id", None) or 0
        counts = (tokens != pad).sum(dim=1)
        full = (
            torch.nonzero(counts >= length - 1).flatten().tolist()
        )  # an end may be spelt as padding
        if full:
            longer = self.tokenizer([texts[row] for row in full], context_length=length + 1)  # type: ignore[call-arg]
            cut[full] = ((longer != pad).sum(dim=1) > counts[full]).numpy()
        return cut

    def weights(self, part: str = "model") -> str:
        """SHA-256 of the weights of "image" (the image tower), "text" (all else) or "model"."""
        state = self.model.state_dict()
        if part != "model":
            of_image = part == "image"
            state = {n: value for n, value in state.items() if n.startswith("visual.") == of_image}
        return weights_fingerprint(state)

    def fingerprint(self, part: str = "model", weights: str | None = None) -> str:
        """SHA-256 of weights and of what decides an embedding beside them.

        `part`: "image" (image tower + transform), "text" (text tower + tokenizer) or "model".
        `weights`: what the method of this name gives, if the caller has it already.
        """
        described: dict[str, Any] = {
            "weights": weights or self.weights(part),
            "precision": self.precision,
            "quick_gelu": bool(self.model_cfg.get("quick_gelu", False)),
        }
        if part != "text":
            described["vision"] = self.model_cfg["vision_cfg"]
            described["transform"] = self.transform
        if part != "image":
            described["text"] = self.model_cfg["text_cfg"]
        return fingerprint(json.loads(json.dumps(described, default=str)))


def warn_of_cut(cut: int, texts: int, context_length: int) -> None:
    """Log that texts were cut, if any were."""
    if cut:
        _log.warning(
            "%d of %d texts are longer than the model's context of %d tokens; what is behind it is cut "
            "off and changes nothing",
            cut, texts, context_length,
        )  # fmt: skip


@contextlib.contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Put the module into eval mode and give every submodule its own mode back afterwards."""
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for child, mode in modes:
            child.training = mode


def weights_fingerprint(state: dict[str, Tensor]) -> str:
    """SHA-256 (hex) of a state dict's names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def is_convolutional(model: nn.Module) -> bool:
    """Whether the image tower is convolutional, and so faster with channels-last memory."""
    visual = model.visual
    return sum(isinstance(layer, nn.Conv2d) for layer in visual.modules()) > 4  # type: ignore[union-attr]


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """Copy a module's state: contiguous CPU tensors, floating-point ones in fp32, none shared."""
    state = {}
    for name, value in model.state_dict().items():
        dtype = torch.float32 if value.is_floating_point() else value.dtype
        state[name] = torch.empty(value.shape, dtype=dtype).copy_(value)
    return state
