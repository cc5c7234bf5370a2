"""Options of the stage that finds every image's nearest captions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pymcip.configs.options import Config, Source, option, required, threshold_problems


@dataclass(frozen=True, kw_only=True)
class MineConfig(Config):
    """Options of `pymcip.mine_captions`: an embedding folder into a caption table."""

    images: Source = required("embedding folder that holds img_emb/ (from `pymcip.embed`)")
    captions: Source | None = option(
        None, "embedding folder that holds text_emb/; default: the same as `images`"
    )
    out: Source = required("folder to write: caption_table.npz, .parquet, sample.tsv, report.json")
    k: int = option(10, "captions per image, at most", at_least=1)
    threshold: float | Literal["auto"] = option(
        0.27, "lowest cosine of a pseudo-caption (0.27: OpenAI's CLIP), or auto"
    )
    recall: float = option(
        1.0,
        "share of the pairs to find; 1: all of them. Less, such as 0.95, lets an approximate index "
        "(faiss) miss some, for corpora beyond 10^8 captions; the recall is measured and reported",
    )
    index: Source | None = option(
        None, "folder of the approximate index, to build or to use; default: one for this run"
    )
    backend: str = option("auto", "back end of the top-k op; see pymcip.ops.explain('topk')")
    threads: int | None = option(None, "CPU threads; default: all", at_least=1)
    seed: int = option(0, "seed of all samples, and of the approximate index")
    overwrite: bool = option(False, "replace what is in `out`")

    def problems(self) -> list[str]:
        problems = threshold_problems(self.threshold)
        if not 0 < self.recall <= 1:
            problems.append(f"recall={self.recall!r} is not a share; allowed: above 0, at most 1")
        if self.index is not None and self.recall == 1:
            problems.append("index is for approximate search: give recall too, such as 0.95")
        return problems
