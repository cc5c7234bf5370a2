"""skipped.tsv: which images an embedding folder lacks, as they could not be decoded, and why."""

from __future__ import annotations

from pathlib import Path

from pymcip.data.loading import Skipped
from pymcip.files import write_text


def read_skipped(folder: Path) -> list[Skipped]:
    """The skipped images of all parts, by index."""
    path = folder / "skipped.tsv"
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    cells = (line.split("\t") for line in lines)
    return [Skipped(int(index), key, reason) for index, key, reason in cells]


def replace_skipped(folder: Path, first: int, last: int, skipped: list[Skipped]) -> None:
    """Replace the lines of images `first` to `last`; without any skipped image there is no file."""
    before = read_skipped(folder)
    others = [item for item in before if not first <= item.index <= last]
    if not skipped and len(others) == len(before):
        return
    lines = ["index\tkey\treason\n"]
    for item in sorted([*others, *skipped], key=lambda item: item.index):
        cells = (" ".join(text.split()) for text in (item.key, item.reason))
        lines.append("\t".join([str(item.index), *cells]) + "\n")
    write_text(folder / "skipped.tsv", "".join(lines))
