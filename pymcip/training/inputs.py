"""The data that a training run reads: opened and checked before any work is done."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pymcip.configs import TrainConfig
from pymcip.contents import digest_of_files
from pymcip.data import Captions, ImageData, load_captions, load_images
from pymcip.data.class_names import ClassNames, ClassTexts, name_texts, read_class_names
from pymcip.data.column_names import columns_named
from pymcip.errors import DataError
from pymcip.files import fingerprint
from pymcip.mining import GivenTable
from pymcip.training.probe_sources import ProbeSources, load_probe_sources
from pymcip.training.sampling import Indices, Stream, random_generator

FEWEST_CLASSES = 8  # of data that spare two of them
MOST_HELD_OUT = 5000  # images

_log = logging.getLogger("pymcip.training")


@dataclass(frozen=True)
class Inputs:
    """What the options of a run name; None where they name nothing."""

    images: ImageData  # of train_data what is trained on, images that can't be decoded included
    captions: Captions | None  # the corpus
    table: GivenTable | None  # caption_table
    validation: ImageData | None  # val_data, or classes of train_data that are held out
    validation_names: ClassNames | None  # of its classes
    held_out: bool  # whether validation is of train_data
    pairs: ImageData | None  # rea_data, images with captions
    class_texts: ClassTexts | None  # names of the classes of `images`, for re-alignment
    generic: ImageData | None  # distill_data
    probe: ProbeSources | None  # what the alignment probe is made of; None without a budget

    def log_what_is_measured(self, holdout: float) -> None:
        """Log which images measure the run; warn if there are none, and of classes with one image."""
        alone = int((np.bincount(self.images.labels) == 1).sum())
        if alone:
            _log.warning(
                "%d of %d classes have one image: nothing shows the model what is common to such a "
                "class. Give more images of them, or join classes that look alike",
                alone, self.images.num_classes,
            )  # fmt: skip
        if self.validation is None:
            _log.warning(
                "the run is not measured: there is no val_data, and of %d classes none is held out "
                "(holdout=%g). Give val_data, labelled images that are not trained on, to see whether "
                "search gets better",
                self.images.num_classes, holdout,
            )  # fmt: skip
        elif self.held_out:
            _log.info(
                "held out to measure the run: %d classes with %d images (holdout=%g); trained on: %d "
                "classes with %d images",
                self.validation.num_classes, len(self.validation), holdout,
                self.images.num_classes, len(self.images),
            )  # fmt: skip

    def files(self) -> Iterator[Path]:
        """Yield the files that hold images and a table of captions."""
        parts = [part for _, part in self._parts() if isinstance(part, (ImageData, GivenTable))]
        return (path for part in parts for path in part.files())

    def fingerprints(
        self, config: TrainConfig, weights: Mapping[str, str] | None = None
    ) -> dict[str, str]:
        """What identifies data and weights by their content, by names for messages.

        `weights`: digests of the model's before training; without them, its files stand for it.
        """
        found, models = {}, ["mine_model", "mine_pretrained"]
        if weights is not None:
            found["weights of model"] = fingerprint(weights)
        else:
            models += ["model", "pretrained"]
        for option in models:
            path = Path(str(getattr(config, option) or "").removeprefix("local-dir:"))
            if path != Path() and path.exists():
                files = sorted(path.rglob("*")) if path.is_dir() else [path]
                found[f"files of {option}"] = digest_of_files([f for f in files if f.is_file()])
        for option, part in self._parts():
            if isinstance(part, ImageData):
                stores = [store.fingerprint() for store in part.stores]
                places = [part.rows, part.source_ids]
                found[f"images of {option}"] = fingerprint([stores, places])
                found[f"labels of {option}"] = fingerprint([part.class_names, part.labels])
            elif isinstance(part, (Captions, GivenTable)):
                found[option] = part.fingerprint()
            elif part is not None:
                values = vars(part).items()
                plain = {n: x.tolist() if isinstance(x, np.ndarray) else x for n, x in values}
                found[option] = fingerprint(plain)
        return found

    def _parts(self) -> list[tuple[str, Any]]:
        probe = self.probe or ProbeSources(None)
        names = None if probe.names is None else ClassNames(probe.names, probe.names)
        return [
            ("train_data", self.images),
            ("captions", self.captions),
            ("caption_table", self.table),
            ("held-out train_data" if self.held_out else "val_data", self.validation),
            ("val_class_names", self.validation_names),
            ("rea_data", self.pairs),
            ("rea_class_names", self.class_texts),
            ("distill_data", self.generic),
            ("probe_data", probe.images),
            ("probe_captions", None if probe.from_corpus else probe.captions),
            ("probe_class_names", names),
        ]


def open_inputs(config: TrainConfig) -> Inputs:
    """Open all sources of a run.

    Raises:
        DataError: one can't be read, or lacks what the run needs of it.
        StaleEmbeddingsError: `caption_table` was mined from other captions.
    """
    with columns_named(config.columns):
        return _opened(config)


def _opened(config: TrainConfig) -> Inputs:
    def optional(name: str, load: Any, **how: Any) -> Any:
        source = getattr(config, name)
        return None if source is None else load(source, **how)

    images = load_images(config.train_data)
    captions = optional("captions", load_captions)
    table = None
    if config.caption_table is not None and not config.needs_captions:
        _log.warning("caption_table is not used: method %r has no captions", config.method)
    elif config.caption_table is not None:
        assert captions is not None  # `TrainConfig.problems` sees to it
        table = GivenTable.open(config.caption_table, captions.fingerprint())
    validation = optional("val_data", load_images)
    validation_names = optional("val_class_names", read_class_names)
    held_out = validation is None and len(chosen := held_out_classes(images, config)) > 0
    if held_out:
        validation = images.of_classes(chosen)
        images = images.of_classes(np.setdiff1d(np.arange(images.num_classes), chosen))
        if validation_names is None:
            validation_names = optional("rea_class_names", read_class_names)
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
        table=table,
        validation=validation,
        validation_names=validation_names,
        held_out=held_out,
        pairs=pairs,
        class_texts=class_texts,
        generic=optional("distill_data", load_images, labelled=False),
        probe=load_probe_sources(config, captions),
    )


def held_out_classes(images: ImageData, config: TrainConfig) -> Indices:
    """Draw the classes that are kept out of training, int64 [K] in rising order; there may be none.

    They have two images or more each, and at least one class of every source stays.
    """
    wanted = max(2, round(config.holdout * images.num_classes))
    if config.holdout == 0:
        return np.empty(0, np.int64)
    order = random_generator(config.seed, Stream.HELD_OUT).permutation(images.num_classes)
    sizes = np.bincount(images.labels, minlength=images.num_classes)
    _, firsts = np.unique(images.class_sources[order], return_index=True)
    order = np.delete(order, firsts)
    order = order[sizes[order] > 1]
    order = order[np.cumsum(sizes[order]) <= MOST_HELD_OUT][:wanted]
    if images.num_classes < FEWEST_CLASSES or len(order) < 2:
        return np.empty(0, np.int64)
    return np.sort(order)
