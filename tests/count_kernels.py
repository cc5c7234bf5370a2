"""Print what Triton would compile for the GPU tests, a JSON line for each kernel specialised.

A script of its own, as Triton decides at import whether kernels are interpreted; nothing is
launched and no GPU is needed:

    python tests/count_kernels.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

sys.path.insert(0, str(Path(__file__).resolve().parent))

from margin_softmax_cases import ON_GPU, Case, Way
from test_topk_triton import DTYPES, HARD, LARGE

from pymcip.ops.topk_triton import topk_triton
from pymcip.triton_kernels import margin_softmax, topk, tuning

seen: dict[str, dict[str, Any]] = {}


def record(self: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
    """Stands for a launch."""
    values = dict(zip(self.arg_names, arguments, strict=False)) | named
    key = {param.name: specialised(param, values[param.name]) for param in self.params}
    key |= {name: named.get(name) for name in ("num_warps", "num_stages")}
    row = {"kernel": self.__name__, **key}
    seen[json.dumps(row)] = row


def specialised(param: Any, value: Any) -> Any:
    """What a kernel is compiled for, of an argument."""
    if param.is_constexpr:
        return value
    if isinstance(value, TensorDescriptor):
        return f"{value.base.dtype}{list(value.block_shape)}"
    if isinstance(value, torch.Tensor):
        kind, number = str(value.dtype), value.data_ptr()
    elif isinstance(value, int):
        kind, number = "i32" if -(2**31) <= value < 2**31 else "i64", value
    else:
        return type(value).__name__
    if param.do_not_specialize:
        return kind
    one = isinstance(value, int) and value == 1
    return f"{kind}, 1" if one else f"{kind}, by 16" if number % 16 == 0 else kind


def launch(kernel: str, shape_class: Any, candidates: Any, run: Any, *, timed: bool = True) -> None:
    run(candidates[0])  # as with PYMCIP_TUNE=0


def margin(case: Case, way: Way) -> None:
    """Inputs hold anything, as nothing is computed from them."""
    x = torch.empty(case.rows, case.dim, requires_grad=True)
    w = torch.empty(case.columns, case.dim, requires_grad=way.need_w)
    count = case.columns if case.positives < 0 else case.positives
    indptr = torch.arange(case.rows + 1) * count
    indices = torch.arange(case.rows * count) % case.columns
    way.loss("triton", case, x, w, indptr, indices).sum().backward()


def main() -> None:
    JITFunction.run = record
    for module in (margin_softmax, topk):
        module.launch = launch
    tuning.probe = lambda: None
    margin_softmax.limits = lambda device, dim: None
    tuning.capability = margin_softmax.capability = topk.capability = lambda device=None: 9
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=132)
    for case, way in ON_GPU:
        margin(case, way)
    plain: dict[str, Any] = {"exact": True, "threads": 1, "progress": None}
    for (rows, bank_rows, columns, k), dtype in [
        *((case, dtype) for case in LARGE for dtype in DTYPES),
        *((case, torch.float32) for case in HARD),
    ]:
        queries, bank = (torch.empty(n, columns, dtype=dtype) for n in (rows, bank_rows))
        topk_triton(queries, bank, k, 0.0, **plain)
    for row in seen.values():
        print(json.dumps(row))


if __name__ == "__main__":
    main()
