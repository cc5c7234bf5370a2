"""Searches as the page makes them (`Gallery.search`, 24 results), exact and approximate, without the model.

The vectors resemble a model's (`mining_data.py`), in clusters of 100 rows: of 24 results some come
from other clusters, and lie in other lists of an approximate index. Queries are rows of the index (a click on a picture),
pictures that are not in it, and texts; their vectors are there before, so what is timed is all but the
model. Wall-clock time and CPU time stand side by side, because others may want the cores.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from harness import Report, common_arguments, peak_above, resident
from mining_data import Spectrum
from torch import nn

from pymcip.embedding import EmbeddingFolder
from pymcip.files import write_json
from pymcip.model import ClipModel
from pymcip.search.approximate import FOLDER, prepare_approximate
from pymcip.search.gallery import Gallery
from pymcip.search.index import ABOUT, Index

FULL = {"rows": 1_000_000, "dim": 448, "queries": 200, "cluster": 100, "part_rows": 100_000}
SMOKE = {"rows": 12_000, "dim": 32, "queries": 8, "cluster": 100, "part_rows": 5_000}
RESULTS = 24  # of a page
KINDS = "rows", "pictures", "texts"
DRAWN = {"pictures": ("img", 1 << 20), "texts": ("text", 0)}  # kind of row, number of the block

Found = dict[str, list[set[int]]]  # the rows that queries found, by kind


@dataclass
class Prepared(ClipModel):
    """A model whose texts are names of vectors: "text 7" and "picture 7"."""

    vectors: dict[str, torch.Tensor]

    def encode_texts(self, texts: Any, batch_size: int = 256) -> torch.Tensor:
        words = [text.split() for text in texts]
        found = [self.vectors[f"{kind}s"][int(number)] for kind, number in words]
        return torch.stack(found) if found else torch.empty(0, self.embed_dim)


def prepared(dim: int, spectrum: Spectrum) -> Prepared:
    vectors = {
        name: torch.from_numpy(spectrum.rows(kind, block, 4096)).float()
        for name, (kind, block) in DRAWN.items()
    }
    config = {"embed_dim": dim, "vision_cfg": {}, "text_cfg": {}}
    return Prepared(
        "drawn", nn.Module(), nn.Identity(), nn.Identity(), config, {}, torch.device("cpu"), "fp32",
        vectors,
    )  # fmt: skip


def write_index(folder: Path, clip: Prepared, spectrum: Spectrum, options: Any) -> None:
    """An index of drawn vectors, searched exactly."""
    embeddings = folder / "embeddings-drawn"
    for name in ("img_emb", "metadata"):
        (embeddings / name).mkdir(parents=True)
    for part, first in enumerate(range(0, options.rows, options.part_rows)):
        count = min(options.part_rows, options.rows - first)
        np.save(embeddings / f"img_emb/img_emb_{part}.npy", spectrum.rows("img", part, count))
        rows = range(first, first + count)
        table = {
            "image_path": [f"/photographs/{row % 1000:03}/picture-{row:08}.jpg" for row in rows],
            "label": [f"text {row % 4096}" for row in rows],
            "caption": pa.nulls(count, pa.string()),
            "captions": [[f"what is said of picture {row}"] for row in rows],
            "content": [f"{row:064x}" for row in rows],
            "index": rows,
        }
        pa.parquet.write_table(pa.table(table), embeddings / f"metadata/metadata_{part}.parquet")
    write_json(
        folder / ABOUT,
        {
            "images": [], "model": clip.name, "pretrained": None, "image_size": None,
            "precision": "fp32", "model_fingerprint": clip.fingerprint(),
            "embeddings": embeddings.name, "approximate": None,
        },
    )  # fmt: skip


def asked(kind: str, number: int, rows: int) -> dict[str, Any]:
    """The arguments of `Gallery.search` for a query."""
    if kind == "rows":
        return {"row": number * 7919 % rows}
    return {"text": f"{kind[:-1]} {number + 2048}"}  # those before choose the effort


def measure(gallery: Gallery, options: Any) -> tuple[dict[str, Any], Found]:
    """Milliseconds of searches by kind of query, and the rows that each found."""
    times: dict[str, Any] = {}
    found: Found = {}
    for kind in KINDS:
        wall, cpu, found[kind] = [], [], []
        for number in range(options.queries):
            query = asked(kind, number, options.rows)
            start = time.perf_counter(), time.process_time()
            answer = gallery.search(**query, limit=RESULTS)
            wall.append(time.perf_counter() - start[0])
            cpu.append(time.process_time() - start[1])
            found[kind].append({hit["row"] for hit in answer["hits"]})
        times[kind] = {
            f"{name}_p{share}": round(float(np.percentile(values, share)) * 1e3, 2)
            for name, values in (("wall", wall), ("cpu", cpu))
            for share in (50, 99)
        }
    return times, found


def main() -> None:
    parser = common_arguments(__doc__.split("\n")[0] if __doc__ else None)
    for name, value in FULL.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--recall", type=float, default=0.95)
    parser.add_argument("--folder", type=Path, help="keep the index here, and use it again")
    parser.add_argument("--smoke", action="store_true", help="a tiny case")
    options = parser.parse_args()
    if options.smoke:
        vars(options).update(SMOKE)
    torch.set_num_threads(options.threads)
    report = Report(
        "search", device="cpu", dtype="float16", packages=["faiss-cpu"], store=options.store
    )
    folder = options.folder or Path(tempfile.mkdtemp())
    try:
        run(folder, options, report)
    finally:
        if options.folder is None:
            shutil.rmtree(folder)
    report.finish(summary={"bench": "search", "rows": [row["ms"] for row in report.rows]})


def run(folder: Path, options: Any, report: Report) -> None:
    spectrum = Spectrum(options.dim, max(1, options.rows // options.cluster))
    clip = prepared(options.dim, spectrum)
    if not (folder / ABOUT).is_file():
        write_index(folder, clip, spectrum, options)
    about = {**json.loads((folder / ABOUT).read_text()), "approximate": None}
    write_json(folder / ABOUT, about)
    due = searched(folder, clip, options, report, {}, {})
    kept = folder / about["embeddings"] / FOLDER
    there = kept.is_dir()
    wall, cpu = time.perf_counter(), time.process_time()
    effort = prepare_approximate(EmbeddingFolder(kept.parent), clip, options.recall)
    build = {
        "build_seconds": round(time.perf_counter() - wall, 1),
        "build_cpu_seconds": round(time.process_time() - cpu, 1),
    }
    write_json(folder / ABOUT, {**about, "approximate": effort})
    notes = {
        "effort": effort,
        "index_bytes": sum(file.stat().st_size for file in kept.iterdir()),
        **({} if there else build),
    }
    searched(folder, clip, options, report, due, notes)


def searched(
    folder: Path, clip: Prepared, options: Any, report: Report, due: Found, notes: dict[str, Any]
) -> Found:
    """Open the index, search it and record a row; `due` is what the exact search has found."""
    before = resident()
    start = time.perf_counter()
    gallery = Gallery(Index(folder, clip=clip))
    opened = time.perf_counter() - start
    times, found = measure(gallery, options)
    shares = {
        kind: [
            len(own & all_) / len(all_) for own, all_ in zip(found[kind], due[kind], strict=True)
        ]
        for kind in due
    }
    row = {
        "case": {
            "rows": options.rows,
            "dim": options.dim,
            "cluster": options.cluster,
            "results": RESULTS,
        },
        "rival": "approximate" if due else "exact",
        "ms": times,
        "recall": {kind: round(float(np.mean(share)), 4) for kind, share in shares.items()},
        "queries": options.queries,
        "open_seconds": round(opened, 2),
        "peak_bytes": peak_above(before),
        "load": round(os.getloadavg()[0], 1),
        **notes,
    }
    print(json.dumps(row), flush=True)
    report.record(row)
    return found


if __name__ == "__main__":
    main()
