"""Exact top-k in CUDA: csrc/topk_cuda.cu, bound to torch's tensors, memory and streams."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
import torch

from pymcip.errors import ConfigError
from pymcip.ops.arrays import Array, matrix_pointer, raise_unrankable
from pymcip.ops.canonical import canonical_topk
from pymcip.ops.packed_bank import PackedBank

SCREENS = {"int8": "int8", "bfloat16": "bf16"}  # of a packed bank's precision
MOST_K = 2048
MOST_D = 4096


def topk_cuda(
    queries: torch.Tensor,
    bank: Array | PackedBank,
    k: int,
    threshold: float,
    *,
    exact: bool = True,
    threads: int = 1,
    progress: Callable[[int, int], object] | None = None,
    screen: str | None = None,
    path: str | None = None,
    limits: Mapping[str, int] | None = None,
    first_row: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The contract of `pymcip.ops.topk`, for queries on a GPU and validated arguments.

    Rows that can't be ranked (not finite, or with a squared norm that overflows float32) needn't be
    looked for before: they are found on the way, and named by the `DataError` that is raised at
    the end.

    bank: on the queries' device, or in main memory (NumPy, memory map, tensor on the CPU), from
        where it is streamed by chunks, copies overlapping with products. Of a packed bank that is
        not on the device, the rows.
    exact: False takes the screen's own scores for the answer.
    threads: that copy a bank in main memory to where the GPU can fetch it.
    screen: products in "int8" or "bf16". By default INT8 for exact results, since it runs at twice
        the rate and its certificate is tighter, and bf16, which ranks better, for the others. A
        bank that was packed on the device has its own.
    path: one of `pymcip._core.topk_cuda_paths(device)`, by default the first.
    limits: memory to use, see CudaTopkLimits in csrc/topk_cuda.hpp.
    first_row: number of the bank's first row in messages about rows, which packing finds.

    Beside the results it takes at most 2.1 GiB of the device (1 GiB for packed queries, which are
    taken in turns beyond; 64 MiB of candidates; two chunks of the bank of 256 MiB, none of a bank
    that is packed, and twice that for a bank in main memory), or an eighth of that where there
    isn't as much, and 32 MiB of pinned memory. It returns when the work is done.
    """
    core = _core()
    packed = 0
    if isinstance(bank, PackedBank):
        if bank.device == queries.device:
            screen = SCREENS[bank.precision]
            (packed,) = bank.addresses
        bank = bank.rows
    screen = screen or ("int8" if exact else "bf16")
    if screen not in SCREENS.values():
        allowed = ", ".join(SCREENS.values())
        raise ConfigError(f"topk: screen={screen!r} is not known; allowed: {allowed}")
    count, columns = queries.shape
    if reason := limits_cuda("cuda", k=k, dim=columns):
        raise ConfigError(f"topk: the cuda back end {reason}. Choose backend='torch'")
    device = queries.device
    paths = core.topk_cuda_paths(device.index)
    path = path or next(iter(paths), "none")
    if path not in paths:
        raise ConfigError(f"topk: path={path!r} can't run on {device}; allowed: {paths}")
    bank_on_host = not (isinstance(bank, torch.Tensor) and bank.is_cuda)
    query_pointer, queries = matrix_pointer(queries)
    bank_pointer, bank = matrix_pointer(bank)
    with torch.cuda.device(device):
        ids = torch.empty((count, k), dtype=torch.int64, device=device)
        scores = torch.empty((count, k), dtype=torch.float32, device=device)
        matrices = {
            "queries": query_pointer,
            "bank": bank_pointer,
            "bank_on_host": bank_on_host,
            "packed": packed,
            "k": k,
            "exact": exact,
            "screen": screen,
        }
        workspace, pinned, limits = _memory(core, matrices, dict(limits or {}), device)
        bad_query, bad_row = core.topk_cuda(
            **matrices,
            limits=limits,
            threshold=threshold,
            path=path,
            device=device.index,
            stream=torch.cuda.current_stream(device).cuda_stream,
            threads=threads,
            ids=ids.data_ptr(),
            scores=scores.data_ptr(),
            workspace=workspace.data_ptr(),
            pinned=pinned.data_ptr(),
            progress=progress,
        )
    if bad_query >= 0:
        raise_unrankable("topk", "queries", bad_query, queries[bad_query])
    if bad_row >= 0:
        raise_unrankable("topk", "bank", first_row + bad_row, bank[bad_row])
    return ids, scores


def pack_cuda(
    rows: torch.Tensor, precision: str | None, **options: Any
) -> tuple[dict[str, torch.Tensor], str]:
    """The packed form of rows on a GPU, uint8, and its precision (int8 by default).

    For `PackedBank.pack`. Its work is done when it returns; threads and progress don't matter.

    Raises:
        DataError: a row can't be ranked.
    """
    core = _core()
    pointer, _ = matrix_pointer(rows)
    precision = precision or "int8"
    screen = SCREENS[precision]
    with torch.cuda.device(rows.device):
        packed = torch.empty(
            core.topk_cuda_packed_bytes(bank=pointer, screen=screen),
            dtype=torch.uint8,
            device=rows.device,
        )
        bad_row = core.topk_cuda_pack(
            bank=pointer,
            screen=screen,
            device=rows.device.index,
            stream=torch.cuda.current_stream().cuda_stream,
            packed=packed.data_ptr(),
        )
    if bad_row >= 0:
        raise_unrankable("PackedBank", "bank", bad_row, rows[bad_row])
    return {"packed": packed}, precision


def _memory(
    core: Any, matrices: dict[str, Any], limits: dict[str, int], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, dict[str, int]]:
    """Workspace, pinned memory and limits: the wanted ones, or an eighth where memory is short."""
    small = {"packed_bytes": 32 << 20, "raw_bytes": 32 << 20, "query_bytes": 128 << 20}
    small["candidate_bytes"] = 8 << 20
    for attempt in (limits, {**small, **limits}):
        workspace_bytes, pinned_bytes = core.topk_cuda_memory(**matrices, limits=attempt)
        try:
            workspace = torch.empty(workspace_bytes, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError:
            if attempt is not limits:
                raise
        else:
            return workspace, torch.empty(pinned_bytes, dtype=torch.uint8, pin_memory=True), attempt
    raise AssertionError


def limits_cuda(device: str, *, k: int = 1, dim: int = 1, **facts: Any) -> str | None:
    """Why the back end can't take such a problem; None if it can."""
    if k > MOST_K or dim > MOST_D:
        return f"takes k <= {MOST_K} and D <= {MOST_D}, not k={k} and D={dim}"
    return None


def probe_cuda() -> str | None:
    """Why the back end can't run on torch's current device; None if it can.

    Once per process and device it ranks a small problem with each screen and compares.
    """
    try:
        core = _core()
    except ImportError as error:
        return f"the compiled core can't be imported ({error}); reinstall pymcip"
    if not hasattr(core, "topk_cuda"):
        return "pymcip was built without a CUDA compiler; build it where nvcc works"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return _device_problem(torch.cuda.current_device())


@cache
def _device_problem(device: int) -> str | None:
    try:
        if not _core().topk_cuda_paths(device):
            return "it needs a GPU of compute capability 8.0 or later; this is " + ".".join(
                map(str, torch.cuda.get_device_capability(device))
            )
        return _self_check(torch.device("cuda", device))
    except RuntimeError as error:  # CUDA's own errors
        return f"its self-check failed: {error}"


def _self_check(device: torch.device) -> str | None:
    """Rank a small problem with each screen; say what is wrong, or None.

    It is ragged in every dimension, of several chunks and tiles, and has a query with many near rows.
    """
    generator = torch.Generator().manual_seed(20)
    queries = torch.randn(140, 200, generator=generator).to(device)
    bank = torch.randn(2900, 200, generator=generator).to(device)
    bank[::9] = queries[7] + 0.02 * bank[::9]
    wanted_ids, wanted_scores = canonical_topk(queries, bank, 30)
    # Each factor is off by less than 2 % of its norm.
    off = 0.04 * queries.norm(dim=1, keepdim=True) * bank.norm(dim=1).amax()
    for screen in SCREENS:
        ids, scores = topk_cuda(queries, bank, 30, -float("inf"), screen=screen)
        if not (
            np.array_equal(ids.cpu().numpy(), wanted_ids)
            and np.array_equal(scores.cpu().numpy(), wanted_scores)
        ):
            return f"its self-check failed: the {screen} screen ranks other rows than fp64 does"
        _, rough = topk_cuda(queries, bank, 30, -float("inf"), exact=False, screen=screen)
        if not bool(((rough - scores).abs() <= off).all()):
            return f"its self-check failed: the {screen} screen's scores are wrong"
    return None


def _core() -> Any:
    # Not typed: it has these functions only where a CUDA compiler was present.
    return import_module("pymcip._core")
