"""The data that a training run reads: opened and checked before any work is done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pymcip.configs import TrainConfig
from pymcip.data import Captions, ImageData, load_captions, load_images
from pymcip.data.class_names import ClassNames, ClassTexts, name_texts, read_class_names
from pymcip.errors import DataError
from pymcip.training.probe_sources import ProbeSources, load_probe_sources


@dataclass(frozen=True)
class Inputs:
    """What the options of a run name; None where they name nothing."""

    images: ImageData  # train_data, images that can't be decoded included
    captions: Captions | None  # the corpus
    validation: ImageData | None  # val_data
    validation_names: ClassNames | None  # of its classes
    pairs: ImageData | None  # rea_data, images with captions
    class_texts: ClassTexts | None  # names of the classes of `images`, for re-alignment
    generic: ImageData | None  # distill_data
    probe: ProbeSources | None  # what the alignment probe is made of; None without a budget


def open_inputs(config: TrainConfig) -> Inputs:
    """Open all sources of a run.

    Raises:
        DataError: one can't be read, or lacks what the run needs of it.
    """

    def optional(name: str, load: Any, **how: Any) -> Any:
        source = getattr(config, name)
        return None if source is None else load(source, **how)

    images = load_images(config.train_data)
    captions = optional("captions", load_captions)
    validation = optional("val_data", load_images)
    validation_names = optional("val_class_names", read_class_names)
    pairs = optional("rea_data", load_images, labelled=False)
    if config.realigns and pairs is not None and not any(map(pairs.titles, range(len(pairs)))):
        raise DataError(
            f"rea_data={config.rea_data!r} has images but no captions; give a title column, .txt "
            "members or json with a caption, or leave rea_data out to use pseudo-captions"
        )
    class_texts = None
    if config.realigns and config.rea_class_names is not None:
        class_texts = name_texts(images, read_class_names(config.rea_class_names))
    return Inputs(
        images=images,
        captions=captions,
        validation=validation,
        validation_names=validation_names,
        pairs=pairs,
        class_texts=class_texts,
        generic=optional("distill_data", load_images, labelled=False),
        probe=load_probe_sources(config, captions),
    )
