"""Exact top-k on a GPU in Triton, for builds without a CUDA compiler (contract: `pymcip.ops.topk`).

The bank is taken in chunks. Of each, a product in 16 bits on the tensor cores screens all pairs in
registers; a pair is admitted if its certified upper bound reaches the cut of its query, the higher
one of the threshold and the k-th best score so far. The admitted are scored canonically, merged
into the best so far, and the cut rises. The first chunk is as long as a query's list of admitted
pairs, so that all of them fit; the next ones grow as fast as the lists allow while the bank is in
no particular order. A list that overflows is void: the queries it happened to have the chunk
screened again in eight parts, one after the other, with the cut rising in between, and so on down
to parts that fit by their length. Nothing that could belong to the result is ever dropped.

The certificate. With x' the row x in 16 bits (bfloat16; float16 if all inputs are),

    |<q,c> - <q',c'>| <= |q - q'| |c'| + |q| |c - c'|

with norms of the data at hand. A tensor core takes exact products, aligns some of them with the
running sum to the largest exponent and cuts off what is below 24 bits: at most 2^-23 of the largest
of the 17 or fewer for each of them, so at most (17 / 16) D 2^-23 |q'| |c'| = 2.2 D 2^-24 |q'| |c'|
in all; the sum in fp64 and the final rounding of the canonical score, the sum and the differences
of cut and bound, in fp32, add less than 8 2^-24 |q| |c|. `slack` = 4 (D + 16) 2^-24 |q| |c| is
about twice that, for GPUs that align fewer bits. Norms are computed in fp32 and inflated by 0.1 %,
more than the 2^-12 that they may be off; 2^-50 added to each of them is more than what underflows,
flushed to 0 or not: at most sqrt(D) 2^-63 in a norm, and D 2^-126 in a product.

exact=False ranks the rows as rounded to 16 bits, by their canonical scores: the same answer on every
GPU, without the residuals, so that few pairs are admitted that are not in it.

Extra memory on the GPU, beyond inputs and outputs: at most 256 MiB for rounded queries, their lists
and their best so far, at most 256 MiB for a rounded chunk, and for a bank in main memory two
chunks of at most 64 MiB in each of the GPU's memory and pinned memory. A bank that is on the GPU,
in 16 bits as the screen wants it and of D % 8 = 0 columns isn't copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pymcip.ops.arrays import Array, Progress, device_of
from pymcip.ops.canonical import joined_best

QUERIES = 16384  # at a time, at most
_QUERY_BYTES = 1 << 28
CHUNK = 1 << 20  # rows of the bank at a time, at most
_CHUNK_BYTES = 1 << 28  # of them in 16 bits
_STAGED_BYTES = 1 << 26  # of a chunk that comes from main memory
_PARTS = 8
SEGMENT = 1 << 31  # rows whose ids fit into a key, with room to spare


def probe_triton_topk() -> str | None:
    """Why the Triton kernels can't run on this machine; None if they can."""
    try:
        from pymcip.triton_kernels.topk import obstacle
    except ImportError as error:
        return f"Triton is missing or too old ({error}); pip install 'triton>=3.4'"
    return obstacle()


def topk_triton(
    queries: Array,
    bank: Array,
    k: int,
    threshold: float,
    *,
    exact: bool,
    threads: int,  # unused
    progress: Progress | None,
) -> tuple[Array, Array]:
    """See `pymcip.ops.topk`; queries on a CUDA device, or anywhere for Triton's interpreter."""
    device = device_of(queries)
    ids = torch.full((len(queries), k), -1, dtype=torch.int64, device=device)
    scores = torch.full((len(queries), k), -torch.inf, dtype=torch.float32, device=device)
    columns = queries.shape[1]
    # A row in 16 bits, a list, its keys and the best, twice that and their places while they are sorted.
    per_query = 2 * columns + 4 * list_length(k) + 40 * (k + list_length(k))
    step = max(1, min(QUERIES, _QUERY_BYTES // per_query))
    done, total = 0, len(queries) * len(bank)
    with ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        for first in range(0, len(queries) if len(bank) else 0, step):
            block = _as_tensor(queries[first : first + step]).to(device)
            for start in range(0, len(bank), SEGMENT):
                segment = bank[start : start + SEGMENT]
                search = Search(block, segment, k, threshold, exact)
                for rows in search.run():
                    done += len(block) * rows
                    if progress is not None:
                        progress(done, total)
                found_ids, found_scores = search.result()
                found_ids += start * (found_ids >= 0)
                part = slice(first, first + step)
                if start:
                    found = joined_best(ids[part], scores[part], found_ids, found_scores)
                    found_ids, found_scores = found
                ids[part], scores[part] = found_ids, found_scores
    return (ids, scores) if isinstance(queries, Tensor) else (ids.numpy(), scores.numpy())


def list_length(k: int) -> int:
    """How many pairs a query's list holds: whole programs of refine_kernel."""
    return -(-(2 * k + 192) // 64) * 64


class Search:
    """A block of queries against a bank whose ids fit into keys."""

    def __init__(self, queries: Tensor, bank: Array, k: int, threshold: float, exact: bool) -> None:
        from pymcip.triton_kernels import topk as kernels

        self.kernels = kernels
        self.bank, self.exact, self.device = bank, exact, queries.device
        count, columns = queries.shape
        names = {str(matrix.dtype).removeprefix("torch.") for matrix in (queries, bank)}
        self.dtype = torch.float16 if names == {"float16"} else torch.bfloat16
        self.slack = 4 * (columns + 16) * 2.0**-24
        self.queries = self._prepare(queries, 0.0)
        self.state = kernels.new_state(count, k, threshold, list_length(k), self.device)

    def run(self) -> Iterator[int]:
        """Work through the bank; yields how many more of its rows are done."""
        everyone = torch.ones(len(self.state.counts), dtype=torch.bool, device=self.device)
        for first, chunk in _chunks(self.bank, self._schedule(), self.device):
            # Not kept in a variable, for then there would be two of them at the next chunk.
            self.take(self._prepare(chunk, self.slack), 0, len(chunk), first, everyone)
            yield len(chunk)

    def result(self) -> tuple[Tensor, Tensor]:
        """Ids and scores [n, k] of the best so far."""
        ids, scores = self.kernels.decode(self.state.keys[:, : self.state.k])
        return ids, scores

    def _schedule(self) -> list[tuple[int, int]]:
        """Where chunks start and end."""
        count, columns = self.bank.shape
        k, capacity = self.state.k, self.state.lists.shape[1]
        on_host = isinstance(self.bank, np.ndarray) or self.bank.device != self.device
        most = min(CHUNK, _CHUNK_BYTES // (2 * columns))
        if on_host:
            most = min(most, _STAGED_BYTES // (columns * self.bank.dtype.itemsize))
        schedule, first = [], 0
        while first < count:
            # k S / T of S rows reach the k-th best of T before them: they fill a third of the lists.
            rows = max(capacity, first * capacity // (3 * k))
            last = min(count, first + max(1, min(most, rows)))
            schedule.append((first, last))
            first = last
        return schedule

    def _prepare(self, raw: Tensor, slack: float) -> Any:
        if not self.exact:
            raw = raw.to(self.dtype)
        return self.kernels.prepare(raw, self.dtype, slack)

    def take(self, rows: Any, first: int, last: int, offset: int, active: Tensor) -> None:
        """Merge rows first … last of a chunk, which starts at id `offset`, for active queries."""
        self.kernels.screen(self.queries, rows, first, last, self.state, active)
        self.kernels.refine(self.queries.raw, rows.raw, offset, self.state)
        capacity = self.state.lists.shape[1]
        if last - first <= capacity:
            return
        overflowed = self.state.counts > capacity
        if not overflowed.any():
            return
        step = max(capacity, -(-(last - first) // _PARTS))
        for start in range(first, last, step):
            self.take(rows, start, min(start + step, last), offset, overflowed)


def _chunks(
    bank: Array, schedule: list[tuple[int, int]], device: torch.device
) -> Iterator[tuple[int, Tensor]]:
    """The bank's chunks on the device, with the ids of their first rows."""
    if isinstance(bank, Tensor) and bank.device == device:
        yield from ((first, bank[first:last]) for first, last in schedule)
    elif device.type != "cuda":
        yield from ((first, _as_tensor(bank[first:last]).to(device)) for first, last in schedule)
    else:
        yield from _staged(bank, schedule, device)


def _staged(
    bank: Array, schedule: list[tuple[int, int]], device: torch.device
) -> Iterator[tuple[int, Tensor]]:
    """Chunks from main memory: a thread copies the next one while the GPU works on this one."""
    sample = _as_tensor(bank[:1])
    longest = max(last - first for first, last in schedule)
    shape = (2, longest, bank.shape[1])
    pinned = torch.empty(shape, dtype=sample.dtype, pin_memory=True)
    staged = torch.empty(shape, dtype=sample.dtype, device=device)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))  # whatever had this memory before
    staged.record_stream(stream)
    copied = [torch.cuda.Event() for _ in range(2)]
    used = [torch.cuda.Event() for _ in range(2)]

    def stage(turn: int) -> Tensor:
        slot, (first, last) = turn % 2, schedule[turn]
        copied[slot].synchronize()  # the copy that last left this pinned buffer
        source, target = pinned[slot, : last - first], staged[slot, : last - first]
        if isinstance(bank, Tensor):
            source.copy_(bank[first:last])
        elif sample.dtype.itemsize == bank.dtype.itemsize:
            np.copyto(source.numpy(), bank[first:last])
        else:  # NumPy's bfloat16, which torch doesn't know, comes as fp32
            np.copyto(source.numpy(), bank[first:last].astype(np.float32))
        with torch.cuda.stream(stream):
            stream.wait_event(used[slot])
            target.copy_(source, non_blocking=True)
            copied[slot].record(stream)
        return target

    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(stage, 0)
        for turn, (first, _) in enumerate(schedule):
            chunk = coming.result()
            if turn + 1 < len(schedule):
                coming = pool.submit(stage, turn + 1)
            torch.cuda.current_stream(device).wait_event(copied[turn % 2])
            yield first, chunk
            used[turn % 2].record(torch.cuda.current_stream(device))


def _as_tensor(block: Array) -> Tensor:
    """The block as a tensor: itself, or a copy of a NumPy block, in fp32 if torch lacks its dtype."""
    if isinstance(block, Tensor):
        return block
    dtype = block.dtype if block.dtype in (np.float16, np.float32) else np.float32
    # A copy: torch warns about read-only arrays, such as memory maps, that it would share.
    return torch.from_numpy(np.array(block, dtype=dtype, order="C"))
