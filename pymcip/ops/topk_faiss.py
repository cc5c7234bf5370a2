"""Top-k by faiss, to compare with: faiss's own fp32 ranking, not certified (`backend="faiss"`).

Blocks of the bank are searched by `faiss.knn`, or `faiss.knn_gpu` where the queries are on a GPU. A
score is faiss's sum of products in fp32, off by at most D 2^-24 |q| |c| from the inner product. Of
rows with equal sums, faiss chooses which to list; the listed ones are ordered by
score, then id. Needs the extra `[faiss]`, or `[faiss-gpu]`.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
import torch

from pymcip.ops.arrays import Array, Progress, as_numpy, device_of, to_fp32
from pymcip.ops.canonical import first_k
from pymcip.ops.faiss_import import faiss_threads, import_faiss

_BLOCK_BYTES = 16 << 20  # of bank rows in fp32
_MOST_K_ON_GPU = 2048


def limits_faiss(device: str, *, k: int = 1, **facts: Any) -> str | None:
    """Why the faiss installed here can't take such a problem; None if it can."""
    faiss = import_faiss()
    if device == "cuda" and not (hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus()):
        return (
            "the faiss installed here runs on CPUs only; run: pip uninstall faiss-cpu, then: pip "
            'install "pymcip[faiss-gpu]"; or move the queries to the CPU'
        )
    if device == "cuda" and k > _MOST_K_ON_GPU:
        return f"takes k <= {_MOST_K_ON_GPU} on a GPU, not {k}"
    return None


def topk_faiss(
    queries: Array,
    bank: Array,
    k: int,
    threshold: float,
    *,
    exact: bool,  # makes no difference
    threads: int,
    progress: Progress | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and faiss's fp32 scores [N, k] of one array's rows; see `pymcip.ops.topk`."""
    count, device = len(queries), device_of(queries)
    ids = np.full((count, k), -1, dtype=np.int64)
    scores = np.full((count, k), -np.inf, dtype=np.float32)
    search = _gpu_search(device) if device.type == "cuda" else import_faiss().knn
    nearest = partial(search, metric=import_faiss().METRIC_INNER_PRODUCT)
    height, step = max(1, min(4096, (1 << 19) // k)), max(1, _BLOCK_BYTES // (4 * bank.shape[1]))
    done = 0
    with faiss_threads(threads):
        for first in range(0, count, height):
            part = slice(first, first + height)
            rows = _fp32(queries[part], device)
            for start in range(0, len(bank), step):
                block = _fp32(bank[start : start + step], device)
                found = nearest(rows, block, min(k, len(block)))
                values, places = (as_numpy(x) for x in found)
                values = np.concatenate([scores[part], values + np.float32(0)], axis=1)
                places = np.concatenate([ids[part], places + start], axis=1)
                ids[part], scores[part] = first_k(places, values, k, threshold)
                done += len(rows) * len(block)
                if progress is not None:
                    progress(done, count * len(bank))
    return ids, scores


def _fp32(rows: Array, device: torch.device) -> Array:
    """A tensor on a GPU, an array in main memory; both dense."""
    if device.type == "cuda":
        return to_fp32(rows, device).contiguous()
    return np.require(as_numpy(rows), np.float32, ["C", "A"])


def _gpu_search(device: torch.device) -> Any:
    faiss = import_faiss()
    import_module("faiss.contrib.torch_utils")  # has knn_gpu take tensors, in torch's stream
    resources = faiss.StandardGpuResources()
    resources.setTempMemory(1 << 28)  # instead of 1.5 GiB
    return partial(faiss.knn_gpu, resources, device=device.index or 0)
