"""Tables in markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_RULES = {"l": "---|", "r": "---:|", "c": ":---:|"}


def markdown_table(heads: Sequence[str], align: str, rows: Iterable[Sequence[str]]) -> str:
    """Format a table; a `|` in a cell is escaped.

    Args:
        heads: of the columns.
        align: a letter per column: "l" left, "r" right, "c" centred.
        rows: each with a cell per column.

    Returns:
        The lines, the last one with a newline at its end.
    """
    lines = [list(heads), *map(list, rows)]
    text = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    text.insert(1, "|" + "".join(_RULES[letter] for letter in align))
    return "\n".join(text) + "\n"
