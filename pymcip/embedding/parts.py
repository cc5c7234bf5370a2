"""Writing the parts of an embedding folder that are missing, all from the same model and data.

A part is complete or absent: its metadata file is renamed into place last. An interrupted run is
continued with the parts that are missing; a folder of another model, transform or data is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet

from pymcip.data.loading import Skipped
from pymcip.embedding.folder import METADATA, WHAT, EmbeddingFolder, Kind, Matrix, replace_skipped
from pymcip.errors import StaleEmbeddingsError
from pymcip.files import atomic_path, read_json, write_json
from pymcip.progress import progress


@dataclass(frozen=True)
class Part:
    """What one part consists of, before it is written.

    Attributes:
        vectors: float16 [n, D], unit rows.
        metadata: a table of n rows.
        skipped: images of the part that have no row.
    """

    vectors: Matrix
    metadata: pa.Table
    skipped: list[Skipped]


# From the indices of a part (int64, ascending) and a callback for the number of items done.
MakePart: TypeAlias = Callable[[npt.NDArray[np.int64], Callable[[int], Any]], Part]


def write_parts(
    folder: Path,
    kind: Kind,
    made_from: dict[str, Any],
    total: int,
    part_size: int,
    make_part: MakePart,
) -> EmbeddingFolder:
    """Make and write the parts that are missing: indices p * part_size and up form part p.

    Args:
        folder: the embedding folder; made if missing.
        kind: "img" or "text".
        made_from: what decides the embeddings, as plain values: model, transform, data.
        total: how many images or captions there are.
        part_size: how many of them a part holds, skipped ones counted.
        make_part: embeds the items of a part.

    Raises:
        StaleEmbeddingsError: the folder was made from something else.
    """
    parts = -(-total // part_size)
    made_from = {**made_from, "part_size": part_size, "rows": total, "parts": parts}
    _check_fresh(folder, kind, made_from)
    width = len(str(parts - 1))
    with ExitStack() as stack:
        bar = None
        for number in range(parts):
            name = f"{number:0{width}}"
            vectors_file = folder / f"{kind}_emb" / f"{kind}_emb_{name}.npy"
            metadata_file = folder / METADATA[kind] / f"metadata_{name}.parquet"
            indices = np.arange(number * part_size, min(total, (number + 1) * part_size))
            if vectors_file.is_file() and metadata_file.is_file():
                continue
            if bar is None:
                bar = stack.enter_context(
                    progress(
                        total=total,
                        initial=int(indices[0]),
                        description=f"embedding {WHAT[kind]}",
                        unit=WHAT[kind][:-1],
                    )
                )
            part = make_part(indices, bar.update)
            with atomic_path(vectors_file) as temporary, temporary.open("wb") as handle:
                np.save(handle, part.vectors)
            if kind == "img":
                replace_skipped(folder, int(indices[0]), int(indices[-1]), part.skipped)
            with atomic_path(metadata_file) as temporary:
                pa.parquet.write_table(part.metadata, temporary)
    return EmbeddingFolder(folder)


def _check_fresh(folder: Path, kind: Kind, made_from: dict[str, Any]) -> None:
    """Write the fingerprint of a new folder; compare it with the one that is there."""
    path = folder / f"{kind}_fingerprint.json"
    if not path.is_file():
        if any((folder / f"{kind}_emb").glob("*.npy")):
            raise StaleEmbeddingsError(
                f"{folder}/{kind}_emb holds embeddings without {path.name}: what they were made "
                "from is not known. Embed into another folder, or give overwrite=True"
            )
        write_json(path, made_from)
        return
    stored = read_json(path)
    names = {
        "model_fingerprint": "model",
        "precision": "precision",
        "transform": "transform" if kind == "img" else "tokenizer",
        "data": WHAT[kind],
        "part_size": "part_size",
    }
    differing = [name for name in names if stored.get(name) != made_from[name]]
    same_name = stored.get("model") == made_from["model"]
    if same_name and ("transform" in differing or "precision" in differing):
        differing.remove("model_fingerprint")  # it covers transform and precision, which differ
    if differing:
        shown = "; ".join(
            f"{names[name]}: {_shown(stored, name)}, now {_shown(made_from, name)}"
            for name in differing
        )
        raise StaleEmbeddingsError(
            f"{folder}/{kind}_emb was made with another {', '.join(names[n] for n in differing)} "
            f"({shown}). Embed into another folder, or give overwrite=True to replace this one"
        )


def _shown(made_from: dict[str, Any], name: str) -> str:
    value = str(made_from.get(name))
    if name == "model_fingerprint":
        return f"{made_from.get('model')} [{value[:8]}]"
    if name == "data":
        return f"{made_from.get('rows')} rows [{value[:8]}]"
    return " ".join(value.split())
