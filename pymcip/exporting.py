"""Exports that need no pymcip: a plain state dict, a hub-style folder, a faiss index.

`open_clip` loads both forms of the model alone; see `write_export`.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from pymcip.configs import ExportConfig
from pymcip.embedding import EmbeddingFolder
from pymcip.errors import CheckpointError, DataError, StaleEmbeddingsError
from pymcip.files import atomic_path, write_json, write_text
from pymcip.model import AppendedClip, ClipModel, load_configured, plain_state
from pymcip.model.appended import APPENDED, write_appended
from pymcip.onnx import import_onnx, write_onnx
from pymcip.ops.arrays import MatrixParts, check_finite
from pymcip.ops.faiss_import import import_faiss
from pymcip.outputs import output_folder
from pymcip.transformers import check_transformers, import_transformers, write_transformers

STATE_DICT = "state_dict.pt"
HUB = "hub"
INDEX = "index.faiss"
ONNX = "onnx"
TRANSFORMERS = "transformers"
BLOCK = 65_536  # rows normalised at a time

_log = logging.getLogger("pymcip.exporting")


@dataclass(frozen=True)
class ExportResult:
    """The files that an export wrote; the last three are None unless they were asked for."""

    out: Path
    state_dict: Path
    hub: Path
    index: Path | None = None
    onnx: Path | None = None  # folder of image.onnx and text.onnx
    transformers: Path | None = None  # folder for CLIPModel and CLIPProcessor


def export(config: ExportConfig | None = None, /, **options: Any) -> ExportResult:
    """Write a model so that open_clip, and what else is asked for, can use it without pymcip.

    Takes the fields of `ExportConfig` as keywords, or a ready config. See `write_export` for the
    model's files, `write_index` for the index, `pymcip.onnx.write_onnx` for ONNX and
    `pymcip.transformers.write_transformers` for transformers.

    Raises:
        ConfigError: the options or the model's name are wrong, or transformers has no such model.
        CheckpointError: the model's weights can't be loaded, are not finite, or give other vectors in
            ONNX or transformers.
        OutputExistsError: `out` is not empty, and `overwrite` was not given.
        DataError: the embedding folder is missing or holds no images.
        StaleEmbeddingsError: the embedding folder was made with another model.
        MissingDependencyError: faiss, or what `onnx` or `transformers` needs, is not installed.
    """
    config = ExportConfig.make(config, options)
    if config.index is not None:
        import_faiss()  # before any work
    if config.onnx:
        import_onnx()
    if config.transformers:
        import_transformers()
    clip = load_configured(config)
    if config.transformers:
        check_transformers(clip)
    folder = None
    if config.index is not None:
        folder = EmbeddingFolder(config.index)
        _check_index(folder, clip)
    check_finite_weights(clip)
    with output_folder(config) as out:
        result = write_export(clip, out)
        if folder is not None:
            result = replace(result, index=write_index(folder, out / INDEX))
        if config.onnx:
            result = replace(result, onnx=write_onnx(clip, out / ONNX))
        if config.transformers:
            result = replace(result, transformers=write_transformers(clip, out / TRANSFORMERS))
        return result


def write_export(
    clip: ClipModel, out: str | os.PathLike[str], card: str | None = None
) -> ExportResult:
    """Write the two forms that open_clip reads, each complete or absent.

    - `out/state_dict.pt`: a plain dict of contiguous CPU tensors (floating-point ones in fp32),
      readable with `weights_only=True`, for `model.load_state_dict(..., strict=True)`. The
      architecture is not in it: for a QuickGELU model create open_clip's `...-quickgelu` one.
    - `out/hub/`: `open_clip_model.safetensors` and `open_clip_config.json` (`quick_gelu`,
      `custom_text`, a forced image size and the transform included), and the tokenizer's files
      where it is a Hugging Face one, and `appended.safetensors` where the model appends dimensions
      (`pymcip.load` reads it, open_clip leaves it alone); for
      `open_clip.create_model_and_transforms("local-dir:...")` and for uploading.

    Args:
        clip: the model.
        out: folder; made if missing, files of these names in it are replaced.
        card: a model card, which becomes `out/hub/README.md`.

    Returns:
        The paths, with `index=None`.

    Raises:
        CheckpointError: weights are not finite; nothing was written.
    """
    check_finite_weights(clip)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    state = plain_state(clip.model)
    with atomic_path(out / STATE_DICT) as temporary, temporary.open("wb") as handle:
        torch.save(state, handle)  # a file's name would be part of what it holds
    model_cfg = {**clip.model_cfg, "text_cfg": dict(clip.model_cfg["text_cfg"])}
    save_tokenizer = getattr(clip.tokenizer, "save_pretrained", None)
    if save_tokenizer is not None and not model_cfg["text_cfg"].get("hf_tokenizer_name"):
        # open_clip reads the tokenizer beside the weights only where a name, any name, is given
        model_cfg["text_cfg"]["hf_tokenizer_name"] = clip.name
    with atomic_path(out / HUB, owned=(APPENDED,)) as temporary:
        temporary.mkdir()
        safetensors.torch.save_file(
            state, temporary / "open_clip_model.safetensors", metadata={"format": "pt"}
        )
        write_json(
            temporary / "open_clip_config.json",
            {"model_cfg": model_cfg, "preprocess_cfg": clip.preprocess_cfg},
        )
        if isinstance(clip, AppendedClip):
            write_appended(clip, temporary)
        if save_tokenizer is not None:
            save_tokenizer(temporary)
        if card is not None:
            write_text(temporary / "README.md", card)
    _log.info("exported %s to %s", clip.name, out)
    return ExportResult(out=out, state_dict=out / STATE_DICT, hub=out / HUB)


def write_index(folder: EmbeddingFolder, path: str | os.PathLike[str]) -> Path:
    """Write an exact inner-product faiss index over an embedding folder's images.

    `IndexFlatIP` under an `IndexIDMap2`: the ids that a search returns are image numbers, as
    `EmbeddingFolder.rows("img")` gives them (undecodable images are left out). The rows are
    normalised in fp32, so that scores of unit queries are cosines.

    Returns:
        The path, as `Path`.

    Raises:
        DataError: the folder holds no image embeddings, or one that is not finite.
        MissingDependencyError: faiss is not installed.
    """
    faiss = import_faiss()
    bank = MatrixParts(folder.parts("img"))
    if not len(bank):
        raise DataError(
            f"{folder.path} holds no image embeddings; make them with pymcip embed --images"
        )
    rows = folder.rows("img")
    index = faiss.IndexIDMap2(faiss.IndexFlatIP(bank.shape[1]))
    for start, block in bank.blocks(BLOCK):
        check_finite("export", f"the images of {folder.path}", block, start)
        vectors = np.array(block, dtype=np.float32)
        faiss.normalize_L2(vectors)
        index.add_with_ids(vectors, rows[start : start + len(block)])
    with atomic_path(path) as temporary:
        faiss.write_index(index, str(temporary))
    return Path(path)


def check_finite_weights(clip: ClipModel) -> None:
    """Refuse a model with a weight that is no finite number.

    Raises:
        CheckpointError: see above.
    """
    state = clip.model.state_dict()
    if isinstance(clip, AppendedClip):
        tower = {} if clip.tower is None else clip.tower.state_dict()
        state = {
            **state,
            **{f"tower.{name}": value for name, value in tower.items()},
            **clip.tensors(),
        }
    for name, value in state.items():
        # open_clip's text towers hold -inf in the mask of their attention
        if value.is_floating_point() and "attn_mask" not in name and not value.isfinite().all():
            raise CheckpointError(
                f"the weights of {clip.name} are damaged: {name} holds NaN or infinity. Nothing was "
                "written; train again with a lower lr or precision='fp32', or export another model"
            )


def _check_index(folder: EmbeddingFolder, clip: ClipModel) -> None:
    """Refuse to put another model's embeddings beside this one; bf16 or fp32 does not matter."""
    width = folder.parts("img")[0].shape[1]
    made_from = folder.fingerprint("img")  # empty if another program wrote the folder
    precision = made_from.get("precision", clip.precision)
    same = replace(clip, precision=precision).fingerprint("image")
    if width != clip.embed_dim or made_from.get("model_fingerprint", same) != same:
        raise StaleEmbeddingsError(
            f"index={str(folder.path)!r} was embedded ({width} dimensions) with another model or "
            f"transform ({made_from.get('model', 'unknown')}) than {clip.name}; embed the images "
            "with this model"
        )
