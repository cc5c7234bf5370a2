"""What the demo and `pymcip sweep` train: sizes and hyper-parameters."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pymcip.configs import TrainConfig
from pymcip.demo.world import World, WorldConfig

BASE_FOLDER = Path(__file__).parent / "base"  # the model of `bench/studies/pretrain_demo.py`
BASE = f"local-dir:{BASE_FOLDER}"


@dataclass(frozen=True)
class Recipe:
    """Sizes and hyper-parameters of a demo run; those of `train` have its names.

    `train` is for every method, `rea` for re-alignment; `appended` and `plus` (`mcip+`) override both for one
    method.
    """

    world: WorldConfig
    train: dict[str, Any]
    rea: dict[str, Any]
    appended: dict[str, Any]
    plus: dict[str, Any]

    def config(self, world: World, **options: Any) -> TrainConfig:
        """The training of every method on a world's scenes, without `changes`; `out` is empty."""
        fixed: dict[str, Any] = {
            "model": BASE,
            "out": "",
            "method": "mcip",
            "holdout": 0.0,
            "freeze_bn_stats": False,
            "save_steps": 1_000_000,  # runs are short: a checkpoint an epoch is enough
        }
        return TrainConfig(**fixed, **world.training, **self.train, **self.rea, **options)

    def changes(self, world: World) -> dict[str, dict[str, Any]]:
        """By method: options in place of those of `config`."""
        names = {"rea_class_names": str(world.names("train"))}
        return {"appended": self.appended, "mcip+": {**self.plus, **world.probing, **names}}


DEMO = Recipe(
    world=WorldConfig(),
    train={
        "epochs": 3,
        "batch_size": 128,
        "lr": 8e-4,
        "wd": 0.02,
        "lr_classes": 8e-3,
        "warmup": 14,
        "scale": 50.0,
        "margin": 0.6,
        "caption_scale": 16.0,
        "lambda_class": 0.4,
        "lambda_caption": 0.6,
        "k": 10,
        "threshold": 0.4,  # nearly every image has ten captions above it
    },
    rea={"rea_epochs": 4, "rea_lr": 1e-3, "rea_warmup": 20},
    appended={  # the defaults of `train`
        **dict.fromkeys(("epochs", "batch_size", "lr", "lr_classes", "warmup"), "auto"),
        "scale": 30.0,
        "margin": 0.3,
        "freeze_bn_stats": True,
        "holdout": 0.1,
    },
    plus={
        "margin": 0.9,
        "lambda_class": 0.52,
        "lambda_caption": 0.48,
        "k": 30,
        "rea_k": 10,
        "rea_epochs": 6,
        "rea_lr": 2e-4,
        "rea_warmup": 10,
        "rea_templates": ("a picture of a {}",),
    },
)
SMOKE = Recipe(
    world=WorldConfig(
        train_classes=8, train_images=4, test_classes=6, test_images=3, captions=200, shard_size=20
    ),
    train={
        "epochs": 1,
        "batch_size": 16,
        "lr": 1e-4,
        "lr_classes": 1e-3,
        "warmup": 1,
        "k": 3,
        "threshold": -1.0,
    },
    appended={},
    rea={"rea_epochs": 1, "rea_batch_size": 16, "rea_lr": 1e-4, "rea_warmup": 1},
    plus={"alignment_budget": 0.999},
)
