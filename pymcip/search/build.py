"""Make an index of images, or bring one up to date: only what is new is embedded."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pymcip.configs import IndexConfig, Source
from pymcip.data import load_images
from pymcip.data.column_names import columns_named
from pymcip.data.sources import as_list
from pymcip.embedding import EmbeddingFolder, embed_images
from pymcip.errors import StaleEmbeddingsError
from pymcip.files import fingerprint, write_json
from pymcip.model import load_configured
from pymcip.ops.faiss_import import import_faiss
from pymcip.outputs import output_folder
from pymcip.search.approximate import prepare_approximate
from pymcip.search.index import ABOUT, read_about


@dataclass(frozen=True)
class IndexResult:
    """What `build_index` did.

    Attributes:
        out: the folder.
        embeddings: the embedding folder in it.
        images: rows of the index.
        new: those of them whose content was not in the index before.
        removed: rows that were in it before and whose content is gone.
        skipped: images that can't be decoded, listed in `embeddings`/skipped.tsv.
        left_out: what else was left out, listed there too.
        recall: of approximate search, measured by pictures and by texts; None: search is exact.
    """

    out: Path
    embeddings: Path
    images: int
    new: int
    removed: int
    skipped: int
    left_out: int
    recall: dict[str, float] | None = None


def build_index(config: IndexConfig | None = None, /, **options: Any) -> IndexResult:
    """Make an index of images in a folder, or bring the one that is there up to date.

    Images are recognised by their content: what was renamed, or has another label or caption, is
    described anew and not embedded again; what is gone is removed. The index that is there stays as
    it is until the new one is complete. A killed call is continued by the next one.

    Raises:
        ConfigError: an option is wrong, or the model is not known.
        DataError: a source is missing, empty or unsafe; or not one image could be decoded.
        StaleEmbeddingsError: the index in `out` was made by another model.
        OutputExistsError: `out` holds something else.
        FolderInUseError: another process writes to `out`.
        MissingDependencyError: `recall` is below 1, and faiss is not installed.
    """
    config = IndexConfig.make(config, options)
    if config.recall < 1:
        import_faiss()
    out = Path(config.out)
    sources: list[Source] = [_absolute(source) for source in as_list(config.images)]
    with columns_named(config.columns):
        data = load_images(sources, labelled=False)
    clip = load_configured(config)
    model, pretrained = config.model.removeprefix("local-dir:"), config.pretrained
    about: dict[str, Any] = {
        "images": sources,
        "model": _absolute(model) if Path(model).is_dir() else config.model,
        "pretrained": _absolute(pretrained)
        if pretrained and Path(pretrained).is_file()
        else pretrained,
        "image_size": config.image_size,
        "precision": clip.precision,
        "model_fingerprint": clip.fingerprint(),
        "embeddings": None,
        "approximate": None,
    }
    ours = (out / ABOUT).is_file() and not config.overwrite
    with output_folder(config, resume=ours, read=data.files()):
        before: list[str] = []  # the content of each row
        if ours:
            stored = read_about(out)
            _check_model(out, stored, about)
            if stored["embeddings"] and (out / stored["embeddings"]).is_dir():
                about["embeddings"], about["approximate"] = (
                    stored["embeddings"],
                    stored["approximate"],
                )
                before = EmbeddingFolder(out / stored["embeddings"]).contents()
        write_json(out / ABOUT, about)
        made_from = fingerprint([data.fingerprint(), sources, config.part_size])
        folder = out / f"embeddings-{made_from[:16]}"
        others = [path for path in out.glob("embeddings-*") if path != folder]
        embedded = embed_images(
            clip, data, folder,
            batch_size=config.batch_size, part_size=config.part_size, workers=config.workers,
            known=[EmbeddingFolder(path) for path in others if (path / "img_emb").is_dir()],
        )  # fmt: skip
        approximate = None
        if config.recall < 1:
            approximate = prepare_approximate(embedded, clip, config.recall)
        write_json(out / ABOUT, {**about, "embeddings": folder.name, "approximate": approximate})
        for path in others:
            shutil.rmtree(path)
    now = embedded.contents()
    known, there = set(before), set(now)
    return IndexResult(
        out, folder,
        images=len(now),
        new=sum(content not in known for content in now),
        removed=sum(content not in there for content in before),
        skipped=len(embedded.skipped),
        left_out=len(data.left_out),
        recall=None if approximate is None else approximate["recall"],
    )  # fmt: skip


def _absolute(source: Source) -> str:
    """A source that means the same from every working folder."""
    text = os.fspath(source)
    if "://" in text or text.startswith("pipe:"):  # which `load_images` refuses
        return text
    return os.path.abspath(os.path.expanduser(text))  # noqa: PTH100, PTH111 (patterns too)


def _check_model(out: Path, stored: dict[str, Any], about: dict[str, Any]) -> None:
    if stored["model_fingerprint"] == about["model_fingerprint"]:
        return
    was, now = (
        f"{item['model']} in {item['precision']} [{item['model_fingerprint'][:8]}]"
        for item in (stored, about)
    )
    raise StaleEmbeddingsError(
        f"{out} was made by {was}, now it is {now}. Give another folder, or overwrite=True to replace "
        "the index"
    )
