"""What top-k is compared with: one function per rival.

A rival's function takes the `Problem`, does beforehand whatever a user would do once per bank (an
index, packing, rounding), and returns what is timed: a call that gives (ids, scores) [N, k], on the
host or on the device. A rival raises `MissingRivalError` where it can't take part; that is listed, and no
error. None of them has a threshold beside k, so the bench drops what lies below one afterwards.

Each is used the way it is fastest here: faiss's BLAS for many queries, chunks that fit the caches
for torch, all threads.
"""

from __future__ import annotations

import importlib
import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

Result = tuple[Any, Any]
Call = Callable[[], Result]


class MissingRivalError(Exception):
    """Why a rival doesn't take part."""


@dataclass(frozen=True)
class Problem:
    """The k best of `bank` [M, D] for each of `queries` [N, D], torch tensors on one device."""

    queries: torch.Tensor
    bank: torch.Tensor
    k: int
    threads: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.queries), len(self.bank), self.bank.shape[1]


@dataclass(frozen=True)
class Contender:
    """A rival by name; `make` gives what is to be timed."""

    name: str
    make: Callable[[Problem], Call]
    device: str = "cpu"


def _need(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingRivalError(f"{error}; pip install {package}") from error


# --------------------------------------------------------------------------------------------------
# torch, on either device


def chunked(problem: Problem, dtype: torch.dtype, rows: int) -> Call:
    """mm + topk over chunks of the bank, merged."""
    queries, bank = problem.queries.to(dtype), problem.bank.to(dtype)

    def run() -> Result:
        best = Merge(problem.k)
        for start in range(0, len(bank), rows):
            best.add(queries @ bank[start : start + rows].T, start)
        return best.ids, best.scores

    return run


class Merge:
    """The best k of blocks of scores, by torch's topk."""

    def __init__(self, k: int) -> None:
        self.k = k
        self.scores = self.ids = torch.empty(0)

    def add(self, block: torch.Tensor, start: int) -> None:
        scores, ids = block.topk(min(self.k, block.shape[1]), dim=1)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        ids = ids + start
        if start:
            scores = torch.cat([self.scores, scores], dim=1)
            ids = torch.cat([self.ids, ids], dim=1)
            scores, order = scores.topk(min(self.k, scores.shape[1]), dim=1)
            ids = ids.gather(1, order)
        self.scores, self.ids = scores, ids


def product_alone(problem: Problem, dtype: torch.dtype, rows: int) -> Callable[[], None]:
    """The matrix products by themselves, into memory that is used again: the limit without fusing."""
    queries, bank = problem.queries.to(dtype), problem.bank.to(dtype)
    out = torch.empty(len(queries) * min(rows, len(bank)), dtype=dtype, device=bank.device)

    def run() -> None:
        for start in range(0, len(bank), rows):
            part = bank[start : start + rows]
            torch.mm(queries, part.T, out=out[: len(queries) * len(part)].view(-1, len(part)))

    return run


# --------------------------------------------------------------------------------------------------
# faiss


def faiss_flat(problem: Problem) -> Call:
    faiss = _need("faiss", "faiss-cpu")
    faiss.omp_set_num_threads(problem.threads)
    index = faiss.IndexFlatIP(problem.bank.shape[1])
    index.add(problem.bank.float().numpy())
    queries = problem.queries.float().cpu().numpy()

    def run() -> Result:
        scores, ids = index.search(queries, problem.k)
        return ids, scores

    return run


def faiss_gpu(problem: Problem, dtype: torch.dtype) -> Call:
    faiss = _need("faiss", "faiss-gpu")
    if not hasattr(faiss, "StandardGpuResources") or not faiss.get_num_gpus():
        raise MissingRivalError(
            "the faiss installed here has no GPU support; pip install faiss-gpu"
        )
    _need("faiss.contrib.torch_utils", "faiss-gpu")  # has knn_gpu take tensors
    resources = faiss.StandardGpuResources()
    queries, bank = problem.queries.to(dtype), problem.bank.to(dtype)

    def run() -> Result:
        scores, ids = faiss.knn_gpu(
            resources, queries, bank, problem.k, metric=faiss.METRIC_INNER_PRODUCT
        )
        return ids, scores

    return run


# --------------------------------------------------------------------------------------------------
# NumKong, cuVS


def numkong(problem: Problem, kind: str) -> Call:
    """Its packed products (AMX where the CPU has it), rows shared out to threads; torch's topk."""
    kernels = _need("numkong", "numkong")
    rows = 20_000
    count = len(problem.queries)
    queries, bank = problem.queries.float().numpy(), problem.bank.float().numpy()
    if kind == "int8":
        scale = 127 / max(float(np.abs(queries).max()), float(np.abs(bank).max()))
        asked: Any = np.round(queries * scale).astype(np.int8)
        dtype, unit = "int32", scale**2
    else:
        asked, dtype, unit = kernels.Tensor(queries).astype("bf16"), "f32", 1.0
    packed: list[tuple[int, Any, Any]] = []
    outs: dict[int, Any] = {}
    for start in range(0, len(bank), rows):
        part = bank[start : start + rows]
        if len(part) not in outs:
            outs[len(part)] = kernels.zeros((count, len(part)), dtype=dtype)
        if kind == "int8":
            block = kernels.dots_pack(np.round(part * scale).astype(np.int8))
        else:
            block = kernels.dots_pack(kernels.Tensor(part).astype("bf16"), dtype="bf16")
        packed.append((start, block, outs[len(part)]))
    bounds = np.linspace(0, count, min(problem.threads, count) + 1).astype(int).tolist()

    def run() -> Result:
        best = Merge(problem.k)
        for start, block, out in packed:

            def share(first: int, last: int, block: Any = block, out: Any = out) -> None:
                kernels.dots_packed(asked, block, out=out, start_row=first, end_row=last)

            own, *others = itertools.pairwise(bounds)
            workers = [threading.Thread(target=share, args=pair) for pair in others]
            for worker in workers:
                worker.start()
            share(*own)
            for worker in workers:
                worker.join()
            best.add(torch.from_numpy(np.asarray(out)), start)
        return best.ids, best.scores / unit

    return run


def cuvs(problem: Problem, dtype: torch.dtype) -> Call:
    brute_force = _need("cuvs.neighbors.brute_force", "cuvs-cu12 or cuvs-cu13")
    queries = problem.queries.to(dtype).contiguous()
    index = brute_force.build(problem.bank.to(dtype).contiguous(), metric="inner_product")

    def run() -> Result:
        scores, ids = brute_force.search(index, queries, problem.k)
        return torch.as_tensor(ids, device="cuda"), torch.as_tensor(scores, device="cuda")

    return run


CONTENDERS = (
    Contender("faiss IndexFlatIP", faiss_flat),
    Contender("torch fp32 mm+topk", lambda problem: chunked(problem, torch.float32, 20_000)),
    Contender("torch bf16 mm+topk, 4k", lambda problem: chunked(problem, torch.bfloat16, 4000)),
    Contender("numkong bf16 packed+topk", lambda problem: numkong(problem, "bf16")),
    Contender("numkong int8 packed+topk", lambda problem: numkong(problem, "int8")),
    Contender("faiss-gpu fp32", lambda problem: faiss_gpu(problem, torch.float32), "cuda"),
    Contender("faiss-gpu fp16", lambda problem: faiss_gpu(problem, torch.float16), "cuda"),
    Contender("cuVS brute force fp32", lambda problem: cuvs(problem, torch.float32), "cuda"),
    Contender("cuVS brute force fp16", lambda problem: cuvs(problem, torch.float16), "cuda"),
    Contender(
        "torch fp32 mm+topk", lambda problem: chunked(problem, torch.float32, 65_536), "cuda"
    ),
    Contender(
        "torch bf16 mm+topk", lambda problem: chunked(problem, torch.bfloat16, 65_536), "cuda"
    ),
)
