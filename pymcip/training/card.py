"""The model card of an exported model: README.md of `exported/hub/`, ready to be uploaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from pymcip.configs import TrainSettings
from pymcip.evaluation import comparison_table
from pymcip.markdown import markdown_table
from pymcip.training.inputs import Inputs
from pymcip.training.report import budget_in_words, settings_rows
from pymcip.training.result import RESUMABLE
from pymcip.training.validation import Validation

FRONT = """---
library_name: open_clip
pipeline_tag: zero-shot-image-classification
tags:
- clip
- image-retrieval
- pymcip
---
"""
USE = """
## Use

```python
import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("hf-hub:USER/NAME")
tokenizer = open_clip.get_tokenizer("hf-hub:USER/NAME")
```
"""
APPENDED = """
This is the model before fine-tuning, or the one within the budget. The dimensions for image search that were appended to
its embedding are in `appended.safetensors`; `pymcip.load("FOLDER")` reads both.
"""
LICENCE = """
## Licence

None is stated here: the licences of the base model's weights and of the data decide. Add `license:` at the top of
this file.
"""


def model_card(
    config: TrainSettings,
    reasons: Mapping[str, str],
    inputs: Inputs,
    validation: Validation | None,
    alignment: Mapping[str, Any] | None,
) -> str:
    """Write markdown that states data, method, settings, budget, and the figures before and after.

    Data and models are named by the last part of their paths alone. No licence is stated.

    Args:
        config: the settings of the run; `reasons` of those that were chosen for it.
        inputs: its data.
        validation: its evaluations; None: there were none.
        alignment: see `TrainResult`.
    """
    base = _name(config.model) + (f" ({_name(config.pretrained)})" if config.pretrained else "")
    text = FRONT + f"# {base}, fine-tuned for image search\n\n"
    text += (
        f"{base}, fine-tuned with pymcip by the method `{config.method}` of MCIP (arXiv 2409.01936) or its "
        "own, so that images find images of their class while texts still find images.\n"
    )
    text += USE + (APPENDED if config.extra_dims else "")
    text += "\n## Data\n\n" + markdown_table(
        ["", "name", "images or texts", "classes"], "llrr", _data(config, inputs)
    )
    if validation is not None and validation.before:
        what = "classes held out of training" if inputs.held_out else "the validation data"
        names = [name for name in validation.metrics if name in validation.before]
        figures = [
            {name: one[name] for name in names} for one in (validation.before, validation.metrics)
        ]
        text += f"\n## Before and after, on {what}\n\n"
        text += comparison_table(["before", "after"], figures)
    else:
        text += "\n## Before and after\n\nNot measured.\n"
    if alignment is not None:
        text += "\n## Budget of alignment\n\n" + "\n\n".join(budget_in_words(alignment)) + "\n"
    hidden = {item.name for item in fields(config) if "Source" in str(item.type)}
    hidden |= {"model", "pretrained", *RESUMABLE}
    rows = [
        [f"`{row['name']}`", _name(row["value"]), row["why"]]
        for row in settings_rows(config, reasons)[0][1]
        if row["name"] not in hidden
    ]
    if rows:
        text += "\n## Settings\n\nThose that are not pymcip's defaults:\n\n"
        text += markdown_table(["option", "value", ""], "lll", rows)
    return text + LICENCE


def _data(config: TrainSettings, inputs: Inputs) -> list[list[str]]:
    """What each source is for, its name, and how much of it there is."""
    held_out = "of the training images, held out" if inputs.held_out else config.val_data
    found: list[tuple[str, Any, Any]] = [
        ("training images", config.train_data, inputs.images),
        ("captions to mine from", config.captions, inputs.captions),
        ("images that measure the run", held_out, inputs.validation),
        ("images with captions for re-alignment", config.rea_data, inputs.pairs),
        ("images to distil on", config.distill_data, inputs.generic),
    ]
    if inputs.probe is not None:
        found.append(("images of the budget's probe", config.probe_data, inputs.probe.images))
    return [
        [
            what,
            ", ".join(map(_name, source if isinstance(source, tuple) else (source,))),
            f"{len(part):,}",
            f"{part.num_classes:,}" if getattr(part, "num_classes", 0) else "",
        ]
        for what, source, part in found
        if source is not None and part is not None
    ]


def _name(source: str | os.PathLike[str] | None) -> str:
    """The last part of a path; another text as it is."""
    text = os.fspath(source or "").removeprefix("local-dir:")
    return Path(text).name if os.sep in text and not text.startswith("hf-hub:") else text
