"""The alignment budget of a run: measured after every epoch, and kept by what is exported."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict
from typing import Any

import torch

from pymcip.configs import TrainSettings
from pymcip.data import ImageData
from pymcip.embedding import EmbeddingFolder
from pymcip.files import write_json
from pymcip.model import ClipModel, plain_state
from pymcip.ops.arrays import MatrixParts
from pymcip.training.interpolation import interpolated, largest_coefficient
from pymcip.training.loop import Run, Stage
from pymcip.training.probe import AlignmentProbe, Kept
from pymcip.training.probe_sources import (
    MOST_CAPTIONS,
    ProbeSources,
    affordable,
    probe_pixels,
    probe_rows,
)

MOST_IMAGES, FEWEST_IMAGES = 1024, 32
FEWEST_GIVEN = 512  # of the user's images: draws of 256 differed by 3 to 9 % in what is kept
FEWEST_CAPTIONS = 256
EVALUATIONS_OF_SEARCH = 8

_log = logging.getLogger("pymcip.training")


class AlignmentBudget:
    """The original weights and the probe with the original's answers.

    Args:
        config: the options of a run with a budget below 1.
        sources: what the user gave for the probe.
        clip: the original: the model before training.
        data: the training images.
        captions: embeddings of the corpus by `clip`, if the run has them.

    Raises:
        DataError: the probe's images can't be decoded, or the original answers nothing right.
    """

    def __init__(
        self,
        config: TrainSettings,
        sources: ProbeSources,
        clip: ClipModel,
        data: ImageData,
        captions: EmbeddingFolder | None,
    ) -> None:
        clock = time.perf_counter()
        self.config, self.source = config, sources.description
        self.original = plain_state(clip.model)
        self.probe = _make_probe(config, sources, clip, data, captions)
        self.seconds = time.perf_counter() - clock  # of all probing so far

    def after_epoch(self, run: Run, stage: Stage) -> None:
        """Log what the model keeps after an epoch of `stage`."""
        clock = time.perf_counter()
        kept = self._measure(run.clip, texts=stage.name == "text")
        self.seconds += time.perf_counter() - clock
        run.log_epoch(stage, "alignment", asdict(kept))
        _log.info("epoch %d keeps %.4f of its alignment", run.position.epoch + 1, kept.alignment)

    def keep(self, run: Run) -> dict[str, Any]:
        """Draw the run's model back towards the original until it keeps the budget.

        Returns:
            What `TrainResult.alignment` describes; also written as `alignment.json`.
        """
        clock = time.perf_counter()
        config, model = self.config, run.clip.model
        assert config.budget is not None
        tuned = plain_state(model)
        measured: dict[float, Kept] = {}

        def kept(coefficient: float) -> float:
            model.load_state_dict(interpolated(self.original, tuned, coefficient))
            measured[coefficient] = self._measure(run.clip, texts=config.realigns)
            return measured[coefficient].alignment

        search = largest_coefficient(kept, 1 - config.budget, evaluations=EVALUATIONS_OF_SEARCH)
        model.load_state_dict(interpolated(self.original, tuned, search.coefficient))
        found = measured[search.coefficient] if search.coefficient > 0 else None
        if found is not None:
            _log.info(
                "coefficient %.4f keeps %.4f of its alignment, standard error %.4f (tuned: %.4f)",
                search.coefficient, search.kept, found.error, search.tried[0][1],
            )  # fmt: skip
        else:
            _log.warning(
                "%s: no model between the original and the tuned one keeps the "
                "alignment_budget of %g (tuned: %.4f kept; coefficient %.4f: %.4f). Lower lr, train "
                "fewer epochs, raise distill, or allow a larger budget",
                "the joint embedding stays as it was" if config.extra_dims else "nothing is exported",
                config.budget, search.tried[0][1], *search.tried[-1],
            )  # fmt: skip
        epochs = [record["alignment"] for record in run.log.records() if "alignment" in record]
        alignment = {
            "budget": config.budget,
            "respected": found is not None,
            "coefficient": search.coefficient,
            "kept": search.kept if found else None,
            "standard_error": found.error if found else None,
            "image_to_text": found.image_to_text if found else None,
            "text_to_image": found.text_to_image if found else None,
            "kept_tuned": search.tried[0][1],
            "kept_by_epoch": [Kept(**kept).alignment for kept in epochs],
            "probe": {
                "images": len(self.probe.pixels),
                "captions": len(self.probe.texts),
                "source": self.source,
            },
            "tried": [list(pair) for pair in search.tried],
            "seconds": self.seconds + time.perf_counter() - clock,
        }
        write_json(run.out / "alignment.json", alignment)
        return alignment

    def _measure(self, clip: ClipModel, *, texts: bool) -> Kept:
        return self.probe.measure(clip, images=self.config.trains_images, texts=texts)


def _make_probe(
    config: TrainSettings,
    sources: ProbeSources,
    clip: ClipModel,
    data: ImageData,
    captions: EmbeddingFolder | None,
) -> AlignmentProbe:
    """The probe of a run: as many images and texts as its work affords."""
    image_epochs = config.epochs * config.trains_images
    text_epochs = config.rea_epochs * config.realigns
    images = affordable(
        len(data) * (image_epochs or text_epochs),
        image_epochs + text_epochs + EVALUATIONS_OF_SEARCH,
        fewest=FEWEST_IMAGES if sources.images is None else FEWEST_GIVEN,
        most=MOST_IMAGES,
    )
    pixels, images_read = probe_pixels(
        clip, sources.images, data, images, config.seed, config.workers
    )
    if sources.truth is not None:
        texts, right = sources.answers(images_read)
        named = sources.names is not None
        return AlignmentProbe(clip, pixels, texts, seed=config.seed, names=named, right=right)
    if sources.names is not None:
        return AlignmentProbe(clip, pixels, sources.names, seed=config.seed, names=True)
    assert sources.captions is not None
    rows = probe_rows(len(sources.captions), config.seed, part=sources.from_corpus)
    vectors = None
    if sources.from_corpus and captions is not None and not config.realigns:
        # The text tower stays as it is, and has embedded the corpus already: all texts are free.
        vectors = torch.from_numpy(MatrixParts(captions.parts("text"))[rows])
    else:
        rows = rows[
            : affordable(
                len(data) * (text_epochs or image_epochs),
                text_epochs + EVALUATIONS_OF_SEARCH if config.realigns else 1,
                fewest=FEWEST_CAPTIONS,
                most=MOST_CAPTIONS,
            )
        ]
    texts = [sources.captions[row] for row in rows]
    return AlignmentProbe(clip, pixels, texts, seed=config.seed, vectors=vectors)
