"""A hook of MkDocs: tables of the options of every command, from the configs that define them."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pymcip.cli import COMMANDS
from pymcip.configs import Config

MARK = re.compile(r"^\[options of (\w+)\]$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put a table in the place of each line `[options of COMMAND]`."""
    return MARK.sub(lambda found: options_of(COMMANDS[found[1]].config), markdown)


def options_of(config: type[Config]) -> str:
    """Make tables of a command's options, one for each group of its help."""
    hints = get_type_hints(config)
    items = {item.name: item for item in dataclasses.fields(config)}
    groups = {
        title: [items.pop(name) for name in names.split()] for title, names in config.GROUPS.items()
    }
    if items:
        groups[""] = list(items.values())
    parts = []
    for title, group in groups.items():
        rows = [
            f"| `{item.name}` | {_default(item)} | {_meaning(item, hints[item.name])} |"
            for item in group
        ]
        heading = [f"**{title[0].upper()}{title[1:]}**", ""] if title else []
        parts.append(
            "\n".join([*heading, "| option | default | what it is |", "|---|---|---|", *rows])
        )
    return "\n\n".join(parts)


def _default(item: dataclasses.Field[Any]) -> str:
    if item.default_factory is not dataclasses.MISSING:
        return ""
    if item.default is dataclasses.MISSING:
        return "required"
    if item.default in (None, ()):
        return ""
    words = item.default if isinstance(item.default, tuple) else (item.default,)
    return ", ".join(f"`{word}`" for word in words)


def _meaning(item: dataclasses.Field[Any], hint: Any) -> str:
    """Say what an option is, with the words that it allows where its help doesn't name them."""
    text = item.metadata["help"].replace("|", "\\|").replace("<", "&lt;")
    words = [
        word
        for part in (hint, *get_args(hint))
        if get_origin(part) is Literal
        for word in get_args(part)
    ]
    unnamed = [word for word in words if str(word) not in text and str(word) != "auto"]
    return f"{text} ({', '.join(words)})" if unnamed else text
