"""Train one method on real photographs (groceries), and measure what it forgets (clothing).

    python bench/studies/photographs.py --method mcip --data ../shared --out runs/photographs --store

`--data` is a folder with `grocery/grocery-{train,test}-*.tar`, `grocery/classes.tsv`,
`clothing/*.tar`, `clothing/classes.tsv` and `captions/*.txt.gz` under `data/`, and the base model
under `models/lite0`. `base` evaluates the untrained model. `appended` is the default of
`pymcip.train`, with the model, the images and the seed given and nothing else. The base, the seed and
the schedule (3 epochs, 160 px, lr 3e-4) are the same for every other method. `2sft` and `mcip+rea` re-align the text
tower of the runs `gpr` and `mcip` in `--out` (trained first if they are not there): what
`pymcip.train` does for these methods in one go; `mcip+` re-aligns with the products' names too.
Training is at 160 px, evaluation at 224 px. With `--coefficients` the tuned weights are measured at
these places on the line from the base (0) to them (1), whatever budget the run was held to. With
`--generic`, a folder of stamps (see `generic_images.py`), training also distils on generic images,
by the options `GENERIC`, and the probe are others of them with their captions. Clothing is measured
with the test split alone, so that nothing is chosen by it. `--cost N` instead times the image stage
of mcip+ against that of mcip, N interleaved epochs of each. The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pymcip
from pymcip.exporting import write_export
from pymcip.model import plain_state
from pymcip.training.checkpoints import checkpoint_files, load_checkpoint
from pymcip.training.interpolation import interpolated

sys.path.insert(0, str(Path(__file__).parents[1]))  # the harness is in bench/
from harness import Report, training_dtype

from studies.generic_images import write_generic_images

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
# Beside --generic, chosen on the validation split and the probe.
GENERIC: dict[str, Any] = {
    "lr": 9e-5,
    "lr_classes": 3e-2,
    "margin": 0.5,
    "lambda_class": 0.8,
    "lambda_caption": 0.2,
    "distill": 0.5,
    "mixtures": 0.1875,
    "rea_lr": 1e-5,
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
    parser.add_argument("--generic", type=Path, metavar="FOLDER", help="see above")
    parser.add_argument("--coefficients", type=float, nargs="+", default=[])
    parser.add_argument("--cost", type=int, metavar="N", help="see above")
    parser.add_argument("--store", action="store_true", help="add the row to bench/results")
    arguments = parser.parse_args()
    if arguments.cost is not None and arguments.method != "mcip+":
        parser.error("--cost compares mcip+ with mcip; give --method mcip+")
    if arguments.cost is not None and arguments.cost < 1:
        parser.error(f"--cost {arguments.cost}: give the number of epochs of each, 1 or more")
    if arguments.coefficients and not STAGES[arguments.method]:
        parser.error(
            "--coefficients are places between the base and tuned weights; give a --method"
        )
    changes = {name: json.loads(value) for name, value in (x.split("=", 1) for x in arguments.set)}
    options: dict[str, Any] = {} if arguments.method == "appended" else {**SCHEDULE}
    if arguments.generic:
        images, probe = write_generic_images(arguments.out / "generic", arguments.generic)
        options |= {**GENERIC, "distill_data": str(images), "probe_data": str(probe)}
    options |= changes
    data = arguments.data / "data"
    base = f"local-dir:{arguments.data / 'models' / 'lite0'}"
    sources: dict[str, Any] = {
        "train_data": str(data / "grocery" / "grocery-train-*.tar"),
        "captions": [str(path) for path in sorted((data / "captions").glob("*.txt.gz"))],
    }
    if arguments.cost is not None:
        options.pop("probe_data", None)  # no budget is kept
        rivals = {"mcip": {**SCHEDULE, **changes}, arguments.method: options}
        common = {"model": base, "cache": arguments.out / "embeddings", **sources}
        row = {"method": arguments.method, **cost(rivals, common, arguments.cost)}
        report = _report("photographs_cost", arguments)
        report.record(row)
        report.finish(summary=row)
        return
    if arguments.method == "mcip+":
        options.setdefault("rea_class_names", str(data / "grocery" / "classes.tsv"))
    model, run, train_seconds, alignment = base, None, 0.0, None
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
        run, train_seconds = result.out, train_seconds + result.seconds
        model = str(run) if result.hub else base  # nothing is exported: the base stays
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
    report = _report("photographs", arguments)
    report.record(row)
    for coefficient in arguments.coefficients:
        assert run is not None  # "base" has no coefficients
        drawn_back = draw_back(base, run, coefficient)
        found = measure(str(drawn_back), data, arguments.split)
        report.record({**row, **found, "coefficient": coefficient})
    report.finish(summary=row)


def _report(bench: str, arguments: argparse.Namespace) -> Report:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Report(bench, device=device, dtype=training_dtype(device), store=arguments.store)


def cost(
    rivals: dict[str, dict[str, Any]], common: dict[str, Any], repetitions: int
) -> dict[str, Any]:
    """Steps of an epoch of the image stage by each rival's options, taking turns.

    Gives the quantiles of training images per second, but for each epoch's first step, and, of their
    medians, how many times the first rival's time the last one's step takes.
    """
    steps: dict[str, list[float]] = {name: [] for name in rivals}
    for turn in range(repetitions):
        for name in list(rivals)[:: 1 if turn % 2 == 0 else -1]:
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "run"
                changed = {"method": "mcip", "epochs": 1, "log_steps": 1, "out": out}
                pymcip.train(**{**common, **rivals[name], **changed})
                lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
                steps[name] += [json.loads(line)["samples_per_second"] for line in lines[1:]]
    medians = [float(np.median(own)) for own in steps.values()]
    quantiles = {
        name: [round(float(np.quantile(own, share)), 1) for share in (0.2, 0.5, 0.8)]
        for name, own in steps.items()
    }
    return {
        "images per second, p20 p50 p80": quantiles,
        "steps": {name: len(own) for name, own in steps.items()},
        "times the first": round(medians[0] / medians[-1], 3),
        "options": rivals,
    }


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


def draw_back(base: str, run: Path, coefficient: float) -> Path:
    """Export the weights at this place between the base and the run's tuned weights."""
    clip = pymcip.load(base)
    tuned = load_checkpoint(checkpoint_files(run / "checkpoints")[-1])["model"]
    clip.model.load_state_dict(interpolated(plain_state(clip.model), tuned, coefficient))
    folder = run / f"drawn-back-{coefficient:g}"
    write_export(clip, folder)
    return folder / "hub"


if __name__ == "__main__":
    main()
