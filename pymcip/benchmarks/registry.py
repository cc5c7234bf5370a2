"""The list of all benchmarks with their data sets, and the settings of the suites.

`BENCHMARKS` has a row for each, in the order of the paper's columns (arXiv 2409.01936, Table 1). A
new benchmark is a `DataSet` with a reader, a protocol, and a row here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pymcip.benchmarks import paper, protocols
from pymcip.benchmarks.aircraft import AIRCRAFT_DATABASE, AIRCRAFT_TEST
from pymcip.benchmarks.captions import COCO, FLICKR30K
from pymcip.benchmarks.contract import AbsentError, Benchmark
from pymcip.benchmarks.cub200 import CUB200
from pymcip.benchmarks.gpr1200 import GPR1200
from pymcip.benchmarks.imagenet import IMAGENET_A, IMAGENET_SKETCH, IMAGENET_TRAIN, IMAGENET_VAL
from pymcip.benchmarks.instre import INSTRE
from pymcip.benchmarks.objectnet import OBJECTNET
from pymcip.benchmarks.revisited import ROXFORD5K, RPARIS6K

_REGISTRY = (
    Benchmark("gpr1200", "GPR", "I2I", "mAP", GPR1200, protocols.gpr1200),
    Benchmark("instre", "INS", "I2I", "mAP", INSTRE, protocols.instre),
    Benchmark("cub200", "CUB", "I2I", "R@1", CUB200, protocols.nearest_other),
    Benchmark("roxford5k", "ROx", "I2I", "mAP", ROXFORD5K, protocols.revisited),
    Benchmark("rparis6k", "RPar", "I2I", "mAP", RPARIS6K, protocols.revisited),
    Benchmark(
        "knn-imagenet1k", "IN-V", "k-NN", "top-1", IMAGENET_VAL, protocols.knn, IMAGENET_TRAIN
    ),
    Benchmark(
        "knn-imagenet-sketch", "IN-S", "k-NN", "top-1", IMAGENET_SKETCH, protocols.knn,
        IMAGENET_TRAIN,
    ),
    Benchmark("knn-imagenet-a", "IN-A", "k-NN", "top-1", IMAGENET_A, protocols.knn, IMAGENET_TRAIN),
    Benchmark(
        "knn-fgvc-aircraft", "FGVC", "k-NN", "top-1", AIRCRAFT_TEST, protocols.knn,
        AIRCRAFT_DATABASE,
    ),
    Benchmark(
        "zeroshot-imagenet1k", "IN-V", "zero-shot", "top-1", IMAGENET_VAL, protocols.zero_shot
    ),
    Benchmark(
        "zeroshot-imagenet-sketch", "IN-S", "zero-shot", "top-1", IMAGENET_SKETCH,
        protocols.zero_shot,
    ),
    Benchmark("zeroshot-imagenet-a", "IN-A", "zero-shot", "top-1", IMAGENET_A, protocols.zero_shot),
    Benchmark("zeroshot-objectnet", "ON", "zero-shot", "top-1", OBJECTNET, protocols.zero_shot),
    Benchmark("t2i-flickr30k", "F30k", "T2I", "R@5", FLICKR30K, protocols.text_to_image),
    Benchmark("t2i-coco", "COCO", "T2I", "R@5", COCO, protocols.text_to_image),
)  # fmt: skip
BENCHMARKS = {benchmark.name: benchmark for benchmark in _REGISTRY}
PAPER = tuple(name for name in BENCHMARKS if name in paper.BENCHMARKS)
DATA_SETS = {each.name: each for benchmark in _REGISTRY for each in benchmark.data_sets}

# Settings of a suite. "authors" follows the evaluation scripts that an early commit of the authors'
# repository (github.com/Visual-Computing/MCIP, 3f6bab2) held, where they differ from the
# benchmarks' own protocols.
SUITES: dict[str, dict[str, Any]] = {
    "paper": {},
    "authors": {
        "knn_temperature": 0.1,
        "aircraft_database": "train",
        "instre": "all",
        "revisited_crop": False,
    },
}


def listing(
    data_root: str | Path | None = None, data_paths: Mapping[str, str] | None = None
) -> str:
    """Describe every benchmark, and of each data set where it lies, or where to get it."""
    root = None if data_root is None else Path(data_root).expanduser()
    lines: list[str] = []
    for name, benchmark in BENCHMARKS.items():
        needs = " and ".join(each.name for each in benchmark.data_sets)
        lines.append(f"{name:<26}{benchmark.group} {benchmark.metric}, on {needs}")
    for each in DATA_SETS.values():
        lines += ["", f"{each.name}: {each.title}"]
        try:
            lines += [f"  in {folder}" for folder in each.find(root, data_paths or {})]
        except AbsentError:
            lines += [f"  {line}" for line in each.how_to_get().splitlines()]
    return "\n".join(lines) + "\n"
