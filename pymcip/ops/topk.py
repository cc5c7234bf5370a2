"""Exact top-k of inner products with a threshold, for banks of any size.

For each row q of `queries` [N, D] and all rows c_j of `bank` [M, D] the pairs (s(q, c_j), j) with
s >= threshold, ordered by score descending, then by j ascending; the first k of them. The score
s(q, c) is the inner product of the rows as they are (fp16 and bf16 are widened, not rounded), added
up in fp64 in an order that `pymcip.ops.canonical` defines, and rounded to fp32 once. It is the same
to the bit on every back end and device, and with it the whole result: neither threads nor blocks
change it. Unit rows make it the cosine. (One back end, "faiss", is not held to this: it ranks by
faiss's own fp32 sums, and `auto` prefers all others.)

Matrices reach a back end as they came, with any strides and at any address. It reads them by their
strides; where it needs dense or aligned rows, it looks, and copies (a block or a chunk at a time).

Back ends that compute in low precision screen the bank with it, and keep every row that could be
among the best by a bound on their error; the scores of these rows decide. With `exact=False` the
screen's own scores decide: a little faster, and nearly the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from pymcip.errors import ConfigError
from pymcip.ops.arrays import (
    Array,
    Progress,
    check_count,
    check_finite,
    check_matrix,
    check_pair,
    check_room,
    check_threads,
    device_of,
    dtype_name,
)
from pymcip.ops.canonical import joined_best
from pymcip.ops.dispatch import Backend, select
from pymcip.ops.packed_bank import PackedBank, plain_parts, plain_rows
from pymcip.ops.topk_cpu import KERNELS, probe

RESULT_BYTES = 12  # of a place: an int64 and a float32


def topk(
    queries: Array,
    bank: Array | PackedBank | Sequence[Array | PackedBank],
    k: int,
    threshold: float | None = None,
    exact: bool = True,
    backend: str = "auto",
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> tuple[Array, Array]:
    """Find the k best bank rows for each query: ids (int64) and scores (float32), both [N, k].

    queries, bank: NumPy arrays, memory maps or torch tensors, float32, float16 or bfloat16, with
        finite values, any strides and possibly no rows. The results are of the kind of `queries`
        and on its device. A bank in main memory is streamed to queries on a GPU, and a memory map
        from the disk. A bank may be a list of parts, whose rows are numbered on, and a
        `PackedBank`, which saves packing at every call where it was packed.
    k: places per query. Places that stay empty hold id -1 and score -inf.
    threshold: lowest score admitted (inclusive, compared in fp32); None admits all.
    exact: False takes the scores of a screen in 8 or 16 bits for the answer.
    backend: "auto" or a name from `pymcip.ops.backends("topk")`.
    threads: CPU threads; by default torch's number.
    progress: called with the scores computed and to compute, about ten times a second. What it
        raises ends the search.

    Raises:
        ConfigError: an argument is not allowed, or the result is larger than the free memory.
        DataError: a row holds NaN or infinity, or its squared norm overflows float32.
        BackendError: the back end asked for can't take these inputs here.
    """
    parts: list[Any] = list(bank) if isinstance(bank, (list, tuple)) else [bank]
    if not parts:
        raise ConfigError(
            "topk: the bank is an empty list; give at least one part, if without rows"
        )
    check_matrix("topk", "queries", queries)
    for part in parts:
        check_matrix("topk", "bank", plain_rows(part))
        check_pair("topk", queries, part)
    k = check_count("topk", "k", k)
    threads = check_threads("topk", threads)
    check_room("topk", device_of(queries), len(queries) * k * RESULT_BYTES, f"k={k}")
    floor = _floor(threshold)
    if progress is not None and not callable(progress):
        raise ConfigError(
            f"topk: progress={progress!r} is not allowed; allowed: None or a function"
        )
    device = device_of(queries)
    packed = {part.precision if isinstance(part, PackedBank) else None for part in parts}
    if (backend, device.type, packed) == ("auto", "cpu", {"bfloat16"}) and not probe("amx_bf16"):
        backend = "amx_bf16"  # the others would not use the codes
    row = select(
        "topk", backend, device=device.type, dtype=dtype_name(parts[0]), k=k, dim=queries.shape[1]
    )
    options = {"exact": bool(exact), "threads": threads, "progress": progress}
    with torch.no_grad():
        if row.name in KERNELS:
            ids, scores = row.load()(queries, parts, k, floor, **options)
        else:
            ids, scores = _over_parts(row, queries, parts, k, floor, options)
    if isinstance(queries, torch.Tensor):
        return torch.as_tensor(ids, device=device), torch.as_tensor(scores, device=device)
    return np.asarray(ids), np.asarray(scores)


def _over_parts(
    row: Backend,
    queries: Array,
    parts: Sequence[Array | PackedBank],
    k: int,
    threshold: float,
    options: dict[str, Any],
) -> tuple[Array, Array]:
    """The answer of a back end that takes one array at a time."""
    whole = plain_parts("topk", parts)
    checks_itself = row.name == "cuda"  # and takes packed banks as well
    banks = parts if checks_itself else whole.parts
    if not checks_itself or not len(queries):
        check_finite("topk", "queries", queries)
        for bank, first in zip(whole.parts, whole.starts, strict=False):
            check_finite("topk", "bank", bank, first)
    run = row.load()
    report = options["progress"]
    ids = scores = None
    for bank, first in zip(banks, whole.starts, strict=False):
        own = dict(options)
        if checks_itself:
            own["first_row"] = first
        if report is not None and len(banks) > 1:
            before, total = len(queries) * first, len(queries) * len(whole)
            own["progress"] = lambda done, _, b=before, t=total: report(b + done, t)
        part_ids, part_scores = map(torch.as_tensor, run(queries, bank, k, threshold, **own))
        part_ids = torch.where(part_ids < 0, part_ids, part_ids + first)
        if ids is None or scores is None:
            ids, scores = part_ids, part_scores
            continue
        ids, scores = joined_best(ids, scores, part_ids, part_scores)
    assert ids is not None
    assert scores is not None
    return ids, scores


def _floor(threshold: Any) -> float:
    if threshold is None:
        return -float("inf")
    try:
        floor = float(torch.tensor(float(threshold), dtype=torch.float32).item())
    except (TypeError, ValueError):
        floor = float("nan")
    if floor != floor:
        raise ConfigError(
            f"topk: threshold={threshold!r} is not allowed; allowed: a number or None"
        )
    return floor
