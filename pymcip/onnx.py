"""ONNX files of both towers, for onnxruntime and other engines that run without torch."""

from __future__ import annotations

import copy
import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pymcip.errors import CheckpointError, MissingDependencyError
from pymcip.files import atomic_path
from pymcip.model import AppendedClip, ClipModel

IMAGE, TEXT = "image.onnx", "text.onnx"
SAME = 0.9999  # cosine to torch's vector, at least
TEXTS = "a photo of a cat", "red", "two dogs on a beach"

_log = logging.getLogger("pymcip.exporting")


def import_onnx() -> tuple[Any, Any]:
    """The modules onnxscript, with which torch writes ONNX, and onnxruntime.

    Raises:
        MissingDependencyError: one can't be imported.
    """
    try:
        import onnxruntime
        import onnxscript
    except ImportError as error:
        raise MissingDependencyError(
            f'{error.name} can\'t be imported ({error}); run: pip install "pymcip[onnx]"'
        ) from error
    return onnxscript, onnxruntime


def write_onnx(clip: ClipModel, folder: str | os.PathLike[str]) -> Path:
    """Write `image.onnx` and `text.onnx` into `folder`, complete or absent.

    - `image.onnx`: `pixels` float32 [B, 3, H, W], preprocessed -> `vectors` float32 [B, D].
    - `text.onnx`: `tokens` int64 [B, L], as the model's tokenizer gives them -> `vectors` float32 [B, D].

    B is free; vectors have norm 1. With appended dimensions they are D + r wide, and a text's last r are 0.
    Weights and arithmetic are fp32. Both files are run by onnxruntime and compared with torch before
    they are put in place.

    Args:
        clip: the model; it is not changed.
        folder: made if missing, replaced whole if there.

    Returns:
        The folder.

    Raises:
        MissingDependencyError: the extra `onnx` is not installed.
        CheckpointError: torch can't write this model as ONNX, or onnxruntime finds other vectors.
    """
    import_onnx()
    clip = _on_cpu(clip)
    towers: dict[str, tuple[str, Callable[[Tensor], Tensor], Tensor]] = {
        IMAGE: (
            "pixels",
            clip.image_features,
            torch.randn(
                3, 3, clip.image_size, clip.image_size, generator=torch.Generator().manual_seed(0)
            ),
        ),
        TEXT: ("tokens", clip.text_features, clip.tokenizer(list(TEXTS))),
    }
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        for file, (name, features, batch) in towers.items():
            try:
                _write(temporary / file, _Tower(clip, features).eval(), name, batch)
                cosine = _smallest_cosine(temporary / file, features, name, batch)
            except Exception as error:  # what torch and onnxruntime raise is not bounded by a list
                raise CheckpointError(
                    f"{clip.name} can't be written as {file}: {str(error).splitlines()[0]}. Nothing "
                    "was written; export without onnx, or try a newer torch"
                ) from error
            if not cosine > SAME:
                raise CheckpointError(
                    f"{clip.name}: onnxruntime's vectors of {file} differ from torch's (cosine "
                    f"{cosine:.6f}; allowed: above {SAME}). Nothing was written; export without onnx"
                )
            _log.info("%s: onnxruntime's vectors have a cosine of %.6f to torch's", file, cosine)
    return Path(folder)


class _Tower(nn.Module):
    """One encoder as a module, with the weights that it uses."""

    def __init__(self, clip: ClipModel, features: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.features = clip.model, features
        if isinstance(clip, AppendedClip):
            self.appended, self.head = clip.tower, clip.head

    def forward(self, batch: Tensor) -> Tensor:
        return self.features(batch)


def _on_cpu(clip: ClipModel) -> ClipModel:
    """A copy of the model that runs in fp32 on the CPU."""
    memo: dict[int, Any] = {}  # one for both towers: blocks that are shared stay so
    changed: dict[str, Any] = {"model": copy.deepcopy(clip.model, memo).float().cpu().eval()}
    if isinstance(clip, AppendedClip):
        changed["head"] = copy.deepcopy(clip.head).cpu()
        if clip.tower is not None:
            changed["tower"] = copy.deepcopy(clip.tower, memo).float().cpu().eval()
    return replace(clip, device=torch.device("cpu"), precision="fp32", **changed)


def _write(path: Path, tower: nn.Module, name: str, batch: Tensor) -> None:
    with warnings.catch_warnings():  # of torch's own parts
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            tower,
            (batch,),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            input_names=[name],
            output_names=["vectors"],
            verbose=False,
        )
        assert program is not None
        program.save(str(path))


@torch.no_grad()
def _smallest_cosine(
    path: Path, features: Callable[[Tensor], Tensor], name: str, batch: Tensor
) -> float:
    """Of onnxruntime's vectors to torch's, with the whole batch and with its first row alone."""
    _, onnxruntime = import_onnx()
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = []
    for rows in (batch, batch[:1]):
        (vectors,) = session.run(None, {name: rows.numpy()})
        found.append(nn.functional.cosine_similarity(torch.from_numpy(vectors), features(rows)))
    return float(torch.cat(found).min())
