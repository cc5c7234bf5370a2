"""Captions of the demo's scenes: what people may say of a picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pymcip.demo.scenes import COLOURS, MAX_CLUTTER, PATTERNS, TINTS, Scenes, compose
from pymcip.demo.sprites import Emoji

_COLOUR_NAMES = tuple(COLOURS)


def _article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def _speak(one: Emoji, generator: np.random.Generator) -> str:
    """An emoji's name as a caption would use it: rarely exact, often only its kind."""
    draw = generator.random()
    if draw < 0.25:
        return one.name
    return one.concept if draw < 0.75 else one.noun


def describe(
    scenes: Scenes, row: int, generator: np.random.Generator, emoji: Sequence[Emoji]
) -> str:
    """One caption of one scene."""
    phrase = _speak(emoji[scenes.main[row]], generator)
    if scenes.tint[row] >= 0 and generator.random() < 0.5:
        phrase = f"{TINTS[scenes.tint[row]]}-tinted {phrase}"
    if generator.random() < 0.2:
        if scenes.size[row] < 39:
            phrase = f"small {phrase}"
        elif scenes.size[row] > 47:
            phrase = f"big {phrase}"
    phrase = _article(phrase)
    if abs(scenes.angle[row]) > 110 and generator.random() < 0.5:
        phrase += " upside down"
    order = [slot for slot in generator.permutation(MAX_CLUTTER) if scenes.other[row, slot] >= 0]
    for slot in order[: int(generator.choice(3, p=(0.5, 0.35, 0.15)))]:
        one = emoji[scenes.other[row, slot]]
        thing = _article(one.concept if generator.random() < 0.6 else one.noun)
        if slot == 0 and scenes.front[row]:
            phrase += f" behind {thing}"
            continue
        offset = scenes.other_centre[row, slot] - scenes.centre[row]
        if generator.random() < 0.6:
            phrase += (" next to ", " and ", " with ")[int(generator.integers(0, 3))] + thing
        elif abs(offset[0]) > abs(offset[1]):
            phrase += f" with {thing} on the {'right' if offset[0] > 0 else 'left'}"
        else:
            phrase += f" {'above' if offset[1] > 0 else 'below'} {thing}"
    if generator.random() < 0.4:
        colour = _COLOUR_NAMES[scenes.colour[row]]
        pattern = PATTERNS[scenes.pattern[row]]
        if pattern != "plain" and generator.random() < 0.4:
            colour += " " + pattern
        phrase += f" on {_article(colour)} background"
    if generator.random() < 0.2:
        phrase = "a picture of " + phrase
    return phrase


def describe_all(scenes: Scenes, seed: int, emoji: Sequence[Emoji]) -> list[str]:
    """One caption for each scene."""
    generator = np.random.default_rng([seed, 2])
    return [describe(scenes, row, generator, emoji) for row in range(len(scenes))]


def corpus(seed: int, count: int, emoji: Sequence[Emoji]) -> list[str]:
    """`count` captions of scenes that are never drawn: a text corpus aligned with no image."""
    generator = np.random.default_rng([seed, 3])
    everything = np.arange(len(emoji))
    scenes = compose(generator, generator.integers(0, len(emoji), count), everything)
    return describe_all(scenes, seed + 1, emoji)
