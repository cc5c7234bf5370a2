"""Recipes: named settings of `train`, in `pymcip/recipes/NAME.json`, with their sources."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pymcip.errors import ConfigError, did_you_mean

FOLDER = Path(__file__).parents[1] / "recipes"


def recipe_names() -> list[str]:
    """Return the names of all recipes."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def read_recipe(name: str) -> dict[str, Any]:
    """Read a recipe: "about", "source", "date", "settings" and "not reproduced" (by name, why).

    A recipe may name another one as "extends", whose settings and reasons it starts from.

    Raises:
        ConfigError: there is no recipe of this name.
    """
    names = recipe_names()
    if name not in names:
        hint = did_you_mean(str(name), names)
        raise ConfigError(f"recipe={name!r} is not known; allowed: {', '.join(names)}{hint}")
    values: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    if "extends" in values:
        base = read_recipe(values.pop("extends"))
        for part in ("settings", "not reproduced"):
            values[part] = {**base[part], **values[part]}
    return values


def describe_recipes() -> str:
    """Describe all recipes for people: where each is from, what it sets, and what it can't."""
    parts = []
    for name in recipe_names():
        recipe = read_recipe(name)
        settings = " ".join(f"{key}={value}" for key, value in recipe["settings"].items())
        lines = [
            f"{name}: {recipe['about']}",
            f"  from {recipe['source']} ({recipe['date']})",
            f"  sets {settings}",
        ]
        if missing := recipe["not reproduced"]:
            lines += ["  not reproduced:", *(f"    {key}: {why}" for key, why in missing.items())]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)
