"""Train one method on real photographs (groceries), and measure what it forgets (clothing).

    python bench/studies/photographs.py --method mcip --data ../shared --out runs/photographs --store

`--data` is a folder with `grocery/grocery-{train,test}-*.tar`, `grocery/classes.tsv`,
`clothing/*.tar`, `clothing/classes.tsv` and `captions/*.txt.gz` under `data/`, and the base model
under `models/lite0`. `base` evaluates the untrained model. `appended` is the default of
`pymcip.train`, with the model, the images and the seed given and nothing else. The base, the seed and
the schedule (3 epochs, 160 px, lr 3e-4) are the same for every other method. `2sft` and `mcip+rea` re-align the text
tower of the runs `gpr` and `mcip` in `--out` (trained first if they are not there): what
`pymcip.train` does for these methods in one go; `mcip+` re-aligns with the products' names too.
Training is at 160 px, evaluation at 224 px. Clothing is measured with the test split alone, so that
nothing is chosen by it. The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

import pymcip

sys.path.insert(0, str(Path(__file__).parents[1]))  # the harness is in bench/
from harness import Report, training_dtype

SCHEDULE: dict[str, Any] = {
    "image_size": 160,
    "train_size": 160,
    "epochs": 3,
    "batch_size": 32,
    "lr": 3e-4,
    "lr_classes": 3e-3,
    "warmup": 30,
    "scale": 30.0,
    "margin": 0.3,
    "freeze_bn_stats": True,
    "holdout": 0.0,
    "threshold": 0.27,
    "k": 10,
    "rea_epochs": 2,
    "rea_batch_size": 128,
    "rea_lr": 2e-5,
    "rea_warmup": 20,
}
STAGES = {
    "base": [],
    "appended": ["appended"],
    "gpr": ["gpr"],
    "2sft": ["gpr", "rea"],
    "mcip": ["mcip"],
    "mcip+rea": ["mcip", "rea"],
    "mcip+": ["mcip+"],
}
IMAGE_SIZE = 224  # of the evaluation, the base model's own
# Grocery names alone as prompts: what the base does best with.
TEMPLATES = {"grocery": ["{}"], "clothing": ["a photo of a {}", "{}"]}
COLUMNS = {
    "I2I mAP": ("grocery", "i2i_map"),
    "R@1": ("grocery", "i2i_r1"),
    "zero-shot": ("grocery", "zero_shot"),
    "T2I mAP": ("grocery", "t2i_map"),
    "clothing zero-shot": ("clothing", "zero_shot"),
    "clothing I2I mAP": ("clothing", "i2i_map"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=STAGES, required=True)
    parser.add_argument("--data", type=Path, default=Path("../shared"))
    parser.add_argument("--out", type=Path, default=Path("runs/photographs"))
    parser.add_argument("--split", choices=["val", "test"], default="test")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=JSON", help="change an option"
    )
    parser.add_argument("--store", action="store_true", help="add the row to bench/results")
    arguments = parser.parse_args()
    options: dict[str, Any] = {} if arguments.method == "appended" else {**SCHEDULE}
    options |= {name: json.loads(value) for name, value in (x.split("=", 1) for x in arguments.set)}
    data = arguments.data / "data"
    base = f"local-dir:{arguments.data / 'models' / 'lite0'}"
    sources: dict[str, Any] = {
        "train_data": str(data / "grocery" / "grocery-train-*.tar"),
        "captions": [str(path) for path in sorted((data / "captions").glob("*.txt.gz"))],
    }
    if arguments.method == "mcip+":
        options.setdefault("rea_class_names", str(data / "grocery" / "classes.tsv"))
    model, train_seconds, alignment = base, 0.0, None
    for stage in STAGES[arguments.method]:
        result = pymcip.train(
            model=model,
            mine_model=base if stage == "rea" else None,
            **sources,
            method=stage,
            out=arguments.out / f"{arguments.method if stage == 'rea' else stage}-{arguments.seed}",
            cache=arguments.out / "embeddings",
            seed=arguments.seed,
            resume="latest",  # a finished run with these options is used as it is
            **options,
        )
        train_seconds += result.seconds
        model = str(result.out) if result.hub else base  # nothing is exported: the base stays
        alignment = result.alignment
    row = {
        "method": arguments.method,
        "split": arguments.split,
        "seed": arguments.seed,
        **measure(model, data, arguments.split),
        "options": options if arguments.method != "base" else {},
        "alignment": alignment,
        "train_seconds": round(train_seconds, 1),
    }
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = training_dtype(device)
    report = Report("photographs", device=device, dtype=dtype, store=arguments.store)
    report.record(row)
    report.finish(summary=row)


def measure(model: str, data: Path, split: str) -> dict[str, float]:
    """The columns of the table for one model."""
    found = {}
    for name in ("grocery", "clothing") if split == "test" else ("grocery",):
        shards = f"grocery-{split}-*.tar" if name == "grocery" else "*.tar"
        found[name] = pymcip.evaluate(
            model=model,
            data=str(data / name / shards),
            class_names=data / name / "classes.tsv",
            image_size=IMAGE_SIZE,
            templates=TEMPLATES[name],
        ).metrics
    return {
        title: round(found[part][name], 2)
        for title, (part, name) in COLUMNS.items()
        if part in found
    }


if __name__ == "__main__":
    main()
