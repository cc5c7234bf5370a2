"""Compile the kernels of topk ahead of time and print their resources as JSON lines.

A script of its own, as Triton decides at import whether kernels are interpreted or compiled:

    python tests/compile_topk.py 80 90 [--all]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import triton
from compile_margin_softmax import resources
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pymcip.triton_kernels import topk as kernels
from pymcip.triton_kernels.margin_softmax import candidates
from pymcip.triton_kernels.tuning import Config


def main() -> None:
    every = "--all" in sys.argv
    for capability in (int(word) for word in sys.argv[1:] if word.isdigit()):
        for case in cases(capability, every=every):
            print(json.dumps(compile_case(capability, **case)), flush=True)


def cases(capability: int, *, every: bool) -> Iterator[dict[str, Any]]:
    """What runs without timing, or every tile size, dtype and width."""
    many, few = (candidates(capability // 10, rows) for rows in (4096, 64))
    plain = Config(0, 0, 0, 4, 3)
    for columns in (768, 64, 4096) if every else (768,):
        for half in ("bf16", "fp16") if every else ("bf16",):
            for config in many + few if every else (many[0], few[0]):
                yield {"kernel": "screen", "dtype": half, "columns": columns, "config": config}
        for dtype in ("fp32", "bf16", "fp16") if every else ("fp32",):
            for kernel in ("prepare", "refine"):
                yield {"kernel": kernel, "dtype": dtype, "columns": columns, "config": plain}


def compile_case(
    capability: int, *, kernel: str, dtype: str, columns: int, config: Config
) -> dict[str, Any]:
    tma = capability >= 90
    constants: dict[str, Any]
    if kernel == "screen":
        function = kernels.screen_kernel
        constants = {
            "WIDTH": columns, "BM": config.bm, "BN": config.bn, "BK": config.bk, "TMA": tma,
            "FP32_DOT": False,
        }  # fmt: skip
        types = {
            name: f"tensordesc<{dtype}[{height},{config.bk}]>" if tma else f"*{dtype}"
            for name, height in (("q_tiles", config.bm), ("c_tiles", config.bn))
        }
        types |= {
            "best_ptr": "*i64", "active_ptr": "*i1", "count_ptr": "*i32", "list_ptr": "*i32",
            "threshold": "fp32",
        }  # fmt: skip
    elif kernel == "prepare":
        function = kernels.prepare_kernel
        dims = triton.next_power_of_2(columns)
        constants = {
            "D": columns, "WIDTH": columns, "DIMS": dims, "ROWS": max(1, 4096 // dims),
            "STORE": True, "column_stride": 1,
        }  # fmt: skip
        types = {"in_ptr": f"*{dtype}", "out_ptr": "*bf16", "slack": "fp32"}
    else:
        function = kernels.refine_kernel
        constants = {
            "D": columns, "PAIRS": kernels.PAIRS, "q_column_stride": 1, "c_column_stride": 1,
        }  # fmt: skip
        types = {
            "q_ptr": f"*{dtype}", "c_ptr": f"*{dtype}", "list_ptr": "*i32", "count_ptr": "*i32",
            "key_ptr": "*i64", "threshold": "fp32",
        }  # fmt: skip
    signature = {
        name: "constexpr"
        if name in constants
        else types.get(name, "*fp32" if name.endswith("_ptr") else "i32")
        for name in function.arg_names
    }
    # What Triton's launcher would find out.
    divisible: dict[tuple[int], list[list[Any]]] = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(function.arg_names)
        if (signature[name].startswith("*") and name != "best_ptr") or name == "CAPACITY"
    }
    compiled = triton.compile(
        ASTSource(function, signature, constants, divisible),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": config.warps, "num_stages": config.stages},
    )
    return {
        "kernel": kernel,
        "dtype": dtype,
        "columns": columns,
        "config": vars(config),
        "capability": capability,
        **resources(compiled),
    }


if __name__ == "__main__":
    main()
