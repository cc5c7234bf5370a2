"""Compile the kernels of margin_softmax ahead of time and print their resources as JSON lines.

A script of its own, as Triton decides at import whether kernels are interpreted or compiled:

    python tests/compile_margin_softmax.py 80 90 [--all]
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pymcip.triton_kernels import margin_softmax as kernels
from pymcip.triton_kernels.tuning import Config

D = 768
GEOMETRY = {"BLOCK_ROWS": kernels.CELL_ROWS, "CELL": kernels.CELL_COLUMNS}
HALVES = ("bf16", "fp16")
INSTRUCTIONS = {
    "wgmma": r"wgmma\.mma_async",
    "tcgen05": r"tcgen05\.mma",
    "mma": r"\bmma\.sync",
    "tma": r"cp\.async\.bulk\.tensor",
    "atomics": r"\b(?:atom|red)\.",
    "flushes": r"\.ftz\b",
}
WAYS = {
    "exponentials": ("sums", "online", "one pass", "kept", "anew", "filter"),
    "rows": ("exact", "filter"),
    "columns": ("exact", "filter"),
}


def main() -> None:
    targets = [int(word) for word in sys.argv[1:] if word.isdigit()]
    for capability in targets:
        for case in cases(capability, every="--all" in sys.argv):
            print(json.dumps(compile_case(capability, **case)), flush=True)


def cases(capability: int, *, every: bool) -> Iterator[dict[str, Any]]:
    """What runs without timing in the ways that training takes; or every tile size and half.

    The tiles for few rows are the same on every GPU, and compiled for one kind.
    """
    major = capability // 10
    for half in HALVES if every else ("bf16",):
        for kernel, ways in WAYS.items():
            for way in ways:
                chosen, few = (kernels.candidates(major, rows) for rows in (4096, 64))
                first = (chosen[0], few[0]) if capability == 90 else chosen[:1]
                for config in chosen + few if every else first:
                    yield {"kernel": kernel, "way": way, "half": half, "config": config}


def compile_case(
    capability: int, *, kernel: str, way: str, half: str, config: Config
) -> dict[str, Any]:
    function, signature, constants = _source(capability, kernel, way, half, config)
    compiled = triton.compile(
        ASTSource(function, signature, constants, _divisible(function, signature)),
        target=GPUTarget("cuda", capability, 32),
        options={
            "num_warps": config.warps,
            "num_stages": kernels.stages(
                config, listed=way == "filter" and kernel != "exponentials"
            ),
        },
    )
    return {
        "kernel": kernel,
        "way": way,
        "half": half,
        "config": vars(config),
        "capability": capability,
        **resources(compiled),
    }


def _source(
    capability: int, kernel: str, way: str, half: str, config: Config
) -> tuple[Any, dict[str, str], dict[str, Any]]:
    bm, bn, bk = config.bm, config.bn, config.bk

    def tile(rows: int, columns: int) -> str:
        return f"tensordesc<{half}[{rows},{columns}]>" if capability >= 90 else f"*{half}"

    tiles = {"BM": bm, "BN": bn, "BK": bk, "D": D, "FP32_DOT": False, **GEOMETRY}
    tiles["TMA"] = capability >= 90
    if kernel == "exponentials":
        flags = {
            "SUMS": way in ("sums", "online", "one pass", "kept"),
            "ONLINE": way == "online",
            "STORE": way in ("one pass", "kept", "anew", "filter"),
            "RAW": way == "one pass",
            "OFFSET": way in ("anew", "filter"),
            "FILTER": way == "filter",
            "WIDTH": kernels.GROUP,
        }
        types = {
            "x_tiles": tile(bm, bk), "w_tiles": tile(bn, bk), "e_tiles": tile(bm, bn // 2),
            "factor_ptr": "*fp32", "inverse_ptr": "*fp32", "offset_ptr": "*fp32", "sums_ptr": "*fp32",
            "maxima_ptr": "*fp32", "cell_start_ptr": "*i32", "entry_row_ptr": "*i32",
            "entry_column_ptr": "*i32", "active_ptr": "*i8",
        }  # fmt: skip
        function = kernels.exponentials_kernel
    elif kernel == "rows":
        flags = {"FILTER": way == "filter"}
        types = {
            "e_tiles": tile(bm, bk), "w_tiles": tile(bk, bn), "out_ptr": "*fp32",
            "list_ptr": "*i32", "count_ptr": "*i32",
        }  # fmt: skip
        function = kernels.rows_kernel
    else:
        flags = {"FILTER": way == "filter"}
        types = {
            "e_tiles": tile(bk, bm), "x_tiles": tile(bk, bn), "out_ptr": "*fp32",
            "list_ptr": "*i32", "count_ptr": "*i32",
        }  # fmt: skip
        function = kernels.columns_kernel
    constants = {
        name: value for name, value in {**tiles, **flags}.items() if name in function.arg_names
    }
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32")
        for name in function.arg_names
    }
    return function, signature, constants


def _divisible(function: Any, signature: dict[str, str]) -> dict[tuple[int], list[list[Any]]]:
    """What Triton's launcher would find out: pointers and rows of E are aligned to 16 bytes."""
    return {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(function.arg_names)
        if signature[name].startswith("*") or name == "e_stride"
    }


def resources(compiled: Any) -> dict[str, int]:
    """Instructions in PTX, shared memory, and by Triton's own cuobjdump registers and local memory."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        output = subprocess.run(
            [tool, "--dump-resource-usage", str(path)], capture_output=True, text=True, check=True
        ).stdout
    found = {name: int(value) for name, value in re.findall(r"\b(REG|LOCAL|STACK):(\d+)", output)}
    return {
        "shared": compiled.metadata.shared,
        "registers": found["REG"],
        "local": found["LOCAL"],
        "stack": found["STACK"],
        **{name: len(re.findall(text, compiled.asm["ptx"])) for name, text in INSTRUCTIONS.items()},
    }


if __name__ == "__main__":
    main()
