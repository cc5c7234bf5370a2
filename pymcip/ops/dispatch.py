"""Which implementation of an op runs: the table of all back ends, and how one is chosen.

A public op validates its inputs, asks `select` for a back end and calls it. `auto` takes the first
row of the table that fits the device and the dtype and whose probe finds no obstacle. A back end
asked for by name is used or refused, never replaced. `explain` says what `auto` would take here
and why the other rows lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

from pymcip.errors import BackendError, ConfigError

ANY_DEVICE = ("any",)


@dataclass(frozen=True)
class Backend:
    """One way to run an op.

    Functions are named `module:function` or `module:function:first argument`, and imported when
    first used.
    """

    op: str
    name: str
    devices: tuple[str, ...]  # torch device types, or ANY_DEVICE
    dtypes: tuple[str, ...]  # of the inputs, torch's names without "torch."
    function: str  # or just "module", where a back end is several functions
    probe: str | None = None  # () -> None, or the reason why this back end can't run here
    limits: str | None = None  # (device, **facts) -> None, or why it can't take such a problem
    pack: str | None = None  # (rows, precision, **options) -> arrays, precision: of a `PackedBank`
    note: str | None = None  # for `explain`: where it falls short of the op's contract

    def load(self) -> Any:
        """The function, or the module."""
        return _resolve(self.function)

    def load_pack(self) -> Any:
        """The function that packs a bank for this back end; None if it searches none."""
        return None if self.pack is None else _resolve(self.pack)

    def unavailable(self) -> str | None:
        """Why this back end can't run on this machine; None if it can."""
        if self.probe is None:
            return None
        reason: str | None = _resolve(self.probe)()
        return reason

    def obstacle(self, device: str, dtype: str, **facts: Any) -> str | None:
        """Why this back end can't take these inputs here; None if it can.

        `facts`: further facts about the problem, such as its width, for `limits`.
        """
        if self.devices != ANY_DEVICE and device not in self.devices:
            return f"runs on {' or '.join(self.devices)}, not on {device}"
        if dtype not in self.dtypes:
            return f"takes {', '.join(self.dtypes)}, not {dtype}"
        reason = self.unavailable()
        if reason is None and self.limits is not None and facts:
            reason = _resolve(self.limits)(device, **facts)
        return reason


FLOATS = ("float32", "float16", "bfloat16")

# In order of preference within an op; measured, see bench/bench_<op>.py.
BACKENDS: tuple[Backend, ...] = (
    Backend(
        "topk", "cuda", ("cuda",), FLOATS, "pymcip.ops.topk_cuda:topk_cuda",
        probe="pymcip.ops.topk_cuda:probe_cuda", limits="pymcip.ops.topk_cuda:limits_cuda",
        pack="pymcip.ops.topk_cuda:pack_cuda",
    ),
    *(
        Backend(
            "topk", kernel, ("cpu",), FLOATS, f"pymcip.ops.topk_cpu:topk_cpu:{kernel}",
            probe=f"pymcip.ops.topk_cpu:probe:{kernel}", limits="pymcip.ops.topk_cpu:limits",
            pack="pymcip.ops.topk_cpu:pack_cpu",
        )
        for kernel in ("amx", "avx512_vnni", "avx2", "portable", "amx_bf16")
    ),
    Backend(
        "topk", "triton", ("cuda",), FLOATS, "pymcip.ops.topk_triton:topk_triton",
        probe="pymcip.ops.topk_triton:probe_triton_topk",
    ),
    Backend("topk", "torch", ANY_DEVICE, FLOATS, "pymcip.ops.topk_torch:topk_torch"),
    Backend(
        "topk", "faiss", ("cpu", "cuda"), FLOATS, "pymcip.ops.topk_faiss:topk_faiss",
        probe="pymcip.ops.faiss_import:probe_faiss", limits="pymcip.ops.topk_faiss:limits_faiss",
        note="faiss's own fp32 ranking, not certified",
    ),
    Backend(
        "ranks", "cpu", ("cpu",), FLOATS, "pymcip.ops.ranks_cpu:ranks_cpu",
        probe="pymcip.ops.topk_cpu:probe:portable", limits="pymcip.ops.topk_cpu:limits",
    ),
    Backend("ranks", "torch", ANY_DEVICE, FLOATS, "pymcip.ops.ranks_torch:ranks_torch"),
    Backend(
        "margin_softmax", "cpu", ("cpu",), ("float32", "bfloat16"),
        "pymcip.ops.margin_softmax_cpu",
    ),
    Backend(  # on the CPU under Triton's interpreter
        "margin_softmax", "triton", ("cuda", "cpu"), ("bfloat16", "float16"),
        "pymcip.triton_kernels.margin_softmax",
        probe="pymcip.ops.margin_softmax:probe_triton",
        limits="pymcip.triton_kernels.margin_softmax:limits",
    ),
    Backend(
        "margin_softmax", "torch", ANY_DEVICE, ("float64", *FLOATS),
        "pymcip.ops.margin_softmax_torch",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Explanation:
    """The back end that `select` takes for these inputs, and what became of the others."""

    op: str
    device: str
    dtype: str
    backend: str
    chosen: str | None
    verdicts: tuple[tuple[str, str], ...]  # (back end, what became of it), in order of preference

    def __str__(self) -> str:
        chosen = self.chosen or "no back end"
        head = f"{self.op} on {self.device} with {self.dtype}, backend={self.backend!r}: {chosen}"
        return "\n".join([head, *(f"  {name}: {verdict}" for name, verdict in self.verdicts)])


def ops() -> tuple[str, ...]:
    """Return the names of the ops that have back ends."""
    return tuple(dict.fromkeys(row.op for row in BACKENDS))


def backends(op: str) -> tuple[Backend, ...]:
    """Return the back ends of one op, in order of preference.

    Raises:
        ConfigError: there is no such op.
    """
    rows = tuple(row for row in BACKENDS if row.op == op)
    if not rows:
        raise ConfigError(f"op={op!r} is not known; allowed: {', '.join(ops())}")
    return rows


def select(
    op: str, backend: str = "auto", *, device: str = "cpu", dtype: str, **facts: Any
) -> Backend:
    """Choose the back end to run.

    Args:
        op: name of the op.
        backend: "auto", or the name of a back end, which is then used or refused.
        device: where the inputs are, a torch device or its name.
        dtype: of the inputs, a torch dtype or its name.
        facts: see `Backend.obstacle`.

    Raises:
        BackendError: the back end asked for can't run here, or none can.
        ConfigError: there is no such op or back end.
    """
    device, dtype = _device_kind(device), _dtype_name(dtype)
    rows = _candidates(op, backend)
    obstacles = []
    for row in rows:
        obstacle = row.obstacle(device, dtype, **facts)
        if obstacle is None:
            return row
        obstacles.append((row.name, obstacle))
    reasons = "; ".join(f"{name} {obstacle}" for name, obstacle in obstacles)
    if backend == "auto":
        raise BackendError(
            f"{op}: no back end takes device={device}, dtype={dtype}: {reasons}. "
            "Move the inputs to another device or convert them to float32"
        )
    working = [row.name for row in backends(op) if row.obstacle(device, dtype, **facts) is None]
    raise BackendError(
        f"{op}: backend={backend!r} was asked for and can't run with device={device}, "
        f"dtype={dtype}: {reasons}. Allowed for these inputs: {', '.join(['auto', *working])}. "
        "'pymcip env' lists the back ends of this machine"
    )


def explain(
    op: str, device: str = "cpu", dtype: str = "float32", backend: str = "auto", **facts: Any
) -> Explanation:
    """Say which back end `select` takes for these inputs, and why the others lost.

    `facts`: what the op's back ends may ask beside device and dtype; margin_softmax: dim=D (its
    dtype is that of the products, see `MarginOptions.compute`).
    """
    device, dtype = _device_kind(device), _dtype_name(dtype)
    candidates = _candidates(op, backend)
    chosen: str | None = None
    verdicts = []
    for row in backends(op):
        obstacle = row.obstacle(device, dtype, **facts)
        if obstacle is not None:
            verdict = obstacle
        elif row not in candidates:
            verdict = f"not asked for (backend={backend!r})"
        elif chosen is None:
            chosen, verdict = row.name, "chosen"
        else:
            verdict = f"would work, but {chosen} is preferred"
        if obstacle is None and row.note:
            verdict += f" ({row.note})"
        verdicts.append((row.name, verdict))
    return Explanation(op, device, dtype, backend, chosen, tuple(verdicts))


def _candidates(op: str, backend: str) -> tuple[Backend, ...]:
    rows = backends(op)
    if backend == "auto":
        return rows
    named = tuple(row for row in rows if row.name == backend)
    if not named:
        allowed = ", ".join(["auto", *(row.name for row in rows)])
        raise ConfigError(f"{op}: backend={backend!r} is not known; allowed: {allowed}")
    return named


def _device_kind(device: Any) -> str:
    return str(device).split(":", maxsplit=1)[0]


def _dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _resolve(where: str) -> Any:
    module, *names = where.split(":")
    found: Any = import_module(module)
    if names:
        found = getattr(found, names[0])
    return partial(found, *names[1:]) if names[1:] else found
