"""What keeps alignment: each means against plain mcip, and how well the probe predicts the loss.

    python bench/studies/alignment.py ablation --seeds 3 --out runs/alignment --store
    python bench/studies/alignment.py probe --runs runs/alignment/seed*/runs/* --store

`ablation` trains every variant on the demo's worlds with the demo's recipe and the same epochs, and
gives its gains over the untrained model on the test scenes, whose emoji training never sees. All
variants but those with a budget of their own are measured by the probe without being held to it.

`probe` compares what the probe says a run has lost with what it has lost on data that neither of
them has seen: zero-shot accuracy on `--data` (by default the test scenes of each run's own world),
relative to the untrained model's. Every run is measured at each of `--coefficients` between the
untrained and the tuned weights. The probe is the default one, of mixtures; in the demo's worlds
also the one of scenes with class names that are in neither training nor test ("named"). The last
line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pymcip
from pymcip.configs import TrainConfig
from pymcip.data import ImageData, load_captions, load_images
from pymcip.demo.recipe import BASE, DEMO
from pymcip.demo.world import World, prepare_world
from pymcip.errors import DataError
from pymcip.evaluation import evaluate_model, read_class_names
from pymcip.files import read_json
from pymcip.model import ClipModel, load_configured, plain_state
from pymcip.training.checkpoints import checkpoint_files, load_checkpoint
from pymcip.training.interpolation import interpolated
from pymcip.training.probe import AlignmentProbe
from pymcip.training.probe_sources import load_probe_sources, probe_pixels, probe_rows

sys.path.insert(0, str(Path(__file__).parents[1]))  # the harness is in bench/
from harness import Report, training_dtype

UNBOUND = {"alignment_budget": 0.999}  # measured, and not held to anything
PLUS: dict[str, Any] = {"method": "mcip+", **DEMO.rea, **DEMO.plus}
VARIANTS: dict[str, dict[str, Any]] = {
    "gpr": {"method": "gpr", **UNBOUND},
    "mcip": {"method": "mcip", **UNBOUND},
    "mcip, whole bank as negatives": {"negatives": "bank", **UNBOUND},
    "mcip, distill 1": {"distill": 1.0, **UNBOUND},
    "mcip, distill 1, mixtures 1/8": {"distill": 1.0, "mixtures": 0.125, **UNBOUND},
    "mcip, budget 5 %": {"alignment_budget": 0.05},
    "gpr, distill 1": {"method": "gpr", "distill": 1.0, **UNBOUND},
    "mcip+, unbound": {**PLUS, **UNBOUND},
    "mcip+, distill 0.5, unbound": {**PLUS, "distill": 0.5, **UNBOUND},
    "mcip+": PLUS,
}
METRICS = ("i2i_map", "zero_shot", "t2i_r5")
IMAGES, NAMED_IMAGES = 512, 1024  # of the probes, for the correlation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    ablation = commands.add_parser("ablation")
    ablation.add_argument("--seeds", type=int, default=3)
    ablation.add_argument("--first-seed", type=int, default=0)
    ablation.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    ablation.add_argument("--out", type=Path, default=Path("runs/alignment"))
    probe = commands.add_parser("probe")
    probe.add_argument("--runs", type=Path, nargs="+", required=True)
    probe.add_argument("--coefficients", type=float, nargs="+", default=[0.25, 0.5, 0.75, 1.0])
    probe.add_argument("--data", help="images of a domain that training did not see")
    probe.add_argument("--class-names", type=Path)
    probe.add_argument("--templates", nargs="+", default=["a photo of a {}", "{}"])
    probe.add_argument("--image-size", type=int, help="of the evaluation")
    for command in (ablation, probe):
        command.add_argument("--store", action="store_true", help="add the rows to bench/results")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    report = Report("alignment", device=device, dtype=training_dtype(device), store=arguments.store)
    run = run_ablation if arguments.command == "ablation" else run_probe
    report.finish(summary=run(report, arguments))


# --- ablation -----------------------------------------------------------------------------


def run_ablation(report: Report, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train every variant in every world; a row per variant."""
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    worlds = {seed: _world(arguments.out / f"seed{seed}", seed) for seed in seeds}
    before = {
        seed: pymcip.evaluate(model=BASE, **world.testing).metrics for seed, world in worlds.items()
    }
    summary = {}
    for name in arguments.variants:
        found = [
            _variant(name, arguments.out / f"seed{seed}", seed, world)
            for seed, world in worlds.items()
        ]
        row: dict[str, Any] = {"command": "ablation", "variant": name, "options": VARIANTS[name]}
        row["seeds"] = list(seeds)
        for metric in METRICS:
            gains = np.array(
                [one[metric] - before[seed][metric] for seed, one in zip(seeds, found, strict=True)]
            )
            row[metric] = {
                "base": round(float(np.mean([before[seed][metric] for seed in seeds])), 2),
                "gain": round(float(gains.mean()), 2),
                "deviation": round(float(gains.std(ddof=1)), 2) if len(gains) > 1 else None,
            }
        for figure in ("kept", "coefficient", "seconds", "probe_seconds"):
            row[figure] = round(float(np.mean([one[figure] for one in found])), 4)
        report.record(row)
        summary[name] = {metric: row[metric]["gain"] for metric in METRICS}
    return summary


def _world(folder: Path, seed: int) -> World:
    return prepare_world(dataclasses.replace(DEMO.world, seed=seed), folder / "world")


def _variant(name: str, folder: Path, seed: int, world: World) -> dict[str, float]:
    options = {"method": "mcip", **DEMO.train, **VARIANTS[name]}
    if options["method"] == "mcip+":
        options["rea_class_names"] = str(world.names("train"))
    result = pymcip.train(
        model=BASE,
        **world.training,
        cache=folder / "embeddings",
        out=folder / "runs" / re.sub(r"[^a-z0-9+]+", "-", name.lower()),
        seed=seed,
        save_steps=1_000_000,
        resume="latest",  # a finished run with these options is used as it is
        **options,
    )
    assert result.alignment is not None
    metrics = pymcip.evaluate(model=str(result.out), **world.testing).metrics
    return {
        **metrics,
        "kept": result.alignment["kept"],
        "coefficient": result.alignment["coefficient"],
        "seconds": result.seconds,
        "probe_seconds": result.alignment["seconds"],
    }


# --- the probe against the truth ------------------------------------------------------------


def run_probe(report: Report, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure every run at every coefficient; a row with all points and their rank correlation."""
    points = []
    for folder in arguments.runs:
        started = time.perf_counter()
        found = _points(folder, arguments)
        points += found
        print(f"{folder}: {found} ({time.perf_counter() - started:.0f} s)", flush=True)
    summary: dict[str, Any] = {"command": "probe", "points": len(points)}
    for name in ("image_to_text", "text_to_image", "named"):
        if name in points[0]:
            losses = (np.array([point[key] for point in points]) for key in (name, "unseen"))
            summary[f"spearman_{name}"] = round(rank_correlation(*losses), 3)
    report.record({**summary, "data": arguments.data or "test scenes", "each": points})
    return summary


def _points(folder: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What the probe and the unseen data say of a run's tuned weights at each coefficient."""
    options = read_json(folder / "config.json")
    config = TrainConfig.make(None, {**options, "out": folder})
    clip = load_configured(config)
    original = {name: value.clone() for name, value in clip.model.state_dict().items()}
    training = load_images(config.train_data)
    captions = load_captions(config.captions or ())
    rows = probe_rows(len(captions), config.seed)
    pixels, _ = probe_pixels(clip, None, training, IMAGES, config.seed, config.workers)
    probe = AlignmentProbe(clip, pixels, [captions[int(i)] for i in rows], seed=config.seed)
    named = None
    evaluation = config.to_dict() | {"image_size": arguments.image_size or config.image_size}
    unseen = load_configured(TrainConfig.make(None, evaluation))
    if arguments.data is None:
        world = World(folder.parent.parent / "world")
        named = _named_probe(clip, config, training, world)
        data, names = world.testing["data"], world.names("test")
    else:
        data, names = arguments.data, arguments.class_names
    tested = load_images(data, labelled=False)
    class_names = read_class_names(names)

    def zero_shot() -> float:
        return evaluate_model(
            unseen, tested, class_names=class_names, templates=arguments.templates
        )["zero_shot"]

    before = zero_shot()
    tuned = tuned_state(folder)
    found = []
    for coefficient in arguments.coefficients:
        state = interpolated(original, tuned, coefficient)
        clip.model.load_state_dict(state)
        unseen.model.load_state_dict(state)
        kept = probe.measure(clip)
        point = {
            "run": folder.name,
            "coefficient": coefficient,
            "image_to_text": round(1 - kept.image_to_text, 4),
            "text_to_image": round(1 - kept.text_to_image, 4),
            "unseen": round(1 - zero_shot() / before, 4),
        }
        if named is not None:
            point["named"] = round(1 - named.measure(clip).image_to_text, 4)
        found.append(point)
    return found


def tuned_state(folder: Path) -> dict[str, torch.Tensor]:
    """The weights that a run was tuned to: a finished point of a sweep has but what it exported."""
    if files := checkpoint_files(folder / "checkpoints"):
        return load_checkpoint(files[-1])["model"]  # type: ignore[no-any-return]
    alignment = read_json(folder / "result.json")["alignment"]
    if alignment is not None and alignment["coefficient"] != 1:
        raise DataError(
            f"{folder} has no checkpoints, and its export was drawn back to "
            f"{alignment['coefficient']} of the way to the tuned weights; give runs that keep their "
            "checkpoints, or were not drawn back"
        )
    return plain_state(pymcip.load(str(folder)).model)


def _named_probe(
    clip: ClipModel, config: TrainConfig, training: ImageData, world: World
) -> AlignmentProbe:
    """The probe of a world's own scenes, with the untrained model's answers."""
    options = {**config.to_dict(), "alignment_budget": 0.02, **world.probing}
    sources = load_probe_sources(TrainConfig.make(None, options), None)
    assert sources is not None
    pixels, rows = probe_pixels(
        clip, sources.images, training, NAMED_IMAGES, config.seed, config.workers
    )
    texts, right = sources.answers(rows)
    return AlignmentProbe(clip, pixels, texts, seed=config.seed, names=True, right=right)


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's rank correlation; equal values share their mean rank."""

    def ranks(values: np.ndarray) -> np.ndarray:
        below = (values[None, :] < values[:, None]).sum(axis=1)
        equal = (values[None, :] == values[:, None]).sum(axis=1)
        return below + (equal - 1) / 2

    return float(np.corrcoef(ranks(first), ranks(second))[0, 1])


if __name__ == "__main__":
    main()
