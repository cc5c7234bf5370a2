"""Ranks that given bank rows have in the ranking of a whole bank, found without ranking the bank.

For each row q of `queries` [N, D] all M rows c_j of `bank` are ordered by (s(q, c_j) descending, j
ascending), s being the score of `pymcip.ops.topk`: the inner product in fp64 in a fixed order,
rounded to fp32 once (`pymcip.ops.canonical`). The rank of row j is the number of rows before it, so
that the best has rank 0. It is the same on every back end and device, with any number of threads.

What metrics need of a ranking are the ranks of the few relevant rows. fp32 products, which may
differ between machines, decide about all rows whose product is further from such a row's score than
a bound on their error; the others are scored. See `pymcip.ops.ranks_torch` for the bound, and for
what is done where it leaves many rows to be scored. If `bank` is `queries`, half of the products suffice.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pymcip.errors import ConfigError
from pymcip.ops.arrays import (
    Array,
    check_finite,
    check_matrix,
    check_pair,
    check_threads,
    device_of,
    dtype_name,
)
from pymcip.ops.dispatch import select


def ranks(
    queries: Array,
    bank: Array,
    indptr: Any,
    indices: Any,
    *,
    backend: str = "auto",
    threads: int | None = None,
) -> Array:
    """Ranks (int64 [P], 0 for the best of all M) of the bank rows asked for.

    queries [N, D], bank [M, D]: NumPy arrays, memory maps or torch tensors, float32, float16 or
        bfloat16, with finite values and any strides. The result is of the kind of `queries` and on
        its device; the bank is there, too, or in main memory.
    indptr, indices: integers [N + 1] and [P]; asked for are the rows indices[indptr[n] :
        indptr[n + 1]] for query n, in any order, repeated or none at all.
    backend: "auto" or a name from `pymcip.ops.backends("ranks")`.
    threads: CPU threads; by default torch's number.

    Memory beside the inputs: at most about 150 MB and 100 bytes per rank.

    Raises:
        ConfigError: an argument is not allowed, or a row asked for doesn't exist.
        DataError: a row holds NaN or infinity, or its squared norm overflows float32.
        BackendError: the back end asked for can't take these inputs here.
    """
    check_matrix("ranks", "queries", queries)
    check_matrix("ranks", "bank", bank)
    check_pair("ranks", queries, bank)
    threads, device = check_threads("ranks", threads), device_of(queries)
    starts = _integers("indptr", indptr)
    wanted = _integers("indices", indices)
    rising = len(starts) == len(queries) + 1 and int(starts[0]) == 0
    if not rising or int(starts[-1]) != len(wanted) or bool((starts.diff() < 0).any()):
        raise ConfigError(
            f"ranks: indptr is {starts[:8].tolist()}{'…' if len(starts) > 8 else ''} with "
            f"{len(starts)} entries; needed: {len(queries) + 1} that rise from 0 to the "
            f"{len(wanted)} indices, one more than queries"
        )
    if len(wanted) and not 0 <= int(wanted.min()) <= int(wanted.max()) < len(bank):
        raise ConfigError(
            f"ranks: indices go from {int(wanted.min())} to {int(wanted.max())}; allowed: rows of "
            f"the bank, 0 to {len(bank) - 1}"
        )
    row = select(
        "ranks", backend, device=device.type, dtype=dtype_name(queries), dim=queries.shape[1]
    )
    with torch.no_grad():
        check_finite("ranks", "queries", queries)
        longest = check_finite("ranks", "bank", bank)
        found = row.load()(
            queries, bank, starts.to(device), wanted.to(device), longest, threads=threads
        )
    return found if isinstance(queries, torch.Tensor) else found.numpy()


def _integers(name: str, values: Any) -> torch.Tensor:
    """The values as int64 [n], on the device they are on."""
    if not isinstance(values, torch.Tensor):
        array = np.asarray(values)
        if array.size == 0:
            array = array.astype(np.int64)  # NumPy makes floats of an empty list
        if array.dtype.kind not in "iu":
            raise ConfigError(f"ranks: {name} holds {array.dtype}; allowed: integers")
        values = torch.from_numpy(np.array(array, dtype=np.int64))
    if values.dtype.is_floating_point or values.dtype.is_complex or values.dtype == torch.bool:
        raise ConfigError(f"ranks: {name} holds {values.dtype}; allowed: integers")
    if values.ndim != 1 or (name == "indptr" and len(values) == 0):
        raise ConfigError(f"ranks: {name} has shape {tuple(values.shape)}; allowed: one dimension")
    return values.detach().to(torch.int64)
