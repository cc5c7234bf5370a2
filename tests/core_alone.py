"""Run by test_instruction_sets.py, maybe on an emulated processor: the extension without the package.

Takes the extension's path; prints the kernels that it finds, and what each of them answers. Only the
standard library is needed, as much of the rest would not run there.
"""

from __future__ import annotations

import array
import importlib.machinery
import importlib.util
import json
import random
import sys
from typing import Any


def answers(core: Any, kernel: str, rows: int, bank_rows: int, columns: int, k: int) -> list[Any]:
    generator = random.Random(columns)
    queries, bank = (
        array.array("f", (generator.gauss(0, 1) for _ in range(count * columns)))
        for count in (rows, bank_rows)
    )
    found = []
    for exact in (True, False):
        ids, scores = array.array("q", bytes(8 * rows * k)), array.array("f", bytes(4 * rows * k))
        unrankable = core.topk(
            (queries.buffer_info()[0], "float32", rows, columns, columns, 1),
            [((bank.buffer_info()[0], "float32", bank_rows, columns, columns, 1), None)],
            k,
            0.25,
            exact,
            2,
            kernel,
            ids.buffer_info()[0],
            scores.buffer_info()[0],
        )
        found.append([unrankable, ids.tolist(), scores.tobytes().hex()])
    return found


def main(path: str) -> None:
    loader = importlib.machinery.ExtensionFileLoader("_core", path)
    spec = importlib.util.spec_from_file_location("_core", path, loader=loader)
    assert spec is not None
    core = importlib.util.module_from_spec(spec)
    loader.exec_module(core)
    kernels = core.topk_kernels()
    print(
        json.dumps(
            {
                kernel: [
                    answers(core, kernel, *sizes)
                    for sizes in ((1, 1, 1, 1), (3, 70, 65, 4), (40, 500, 130, 3))
                ]
                for kernel in kernels
                if kernel != "amx_bf16"
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1])
