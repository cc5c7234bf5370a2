"""The flags of the command line, made from the fields of the configs."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import itertools
import os
from collections.abc import Callable, Sequence
from types import NoneType
from typing import Any, Literal, get_args, get_origin


def add_option(parser: argparse._ActionsContainer, item: dataclasses.Field[Any], hint: Any) -> None:
    """Add the flag of a config's field, whose type is `hint`."""
    flag = "--" + item.name.replace("_", "-")
    common: dict[str, Any] = {"default": argparse.SUPPRESS, "help": _help(item)}
    several = {**common, "action": Several, "nargs": "+"}
    parts = _parts(hint)
    lists = [get_args(part)[0] for part in parts if get_origin(part) is tuple]
    elements = [leaf for part in lists for leaf in _parts(part)]
    if bool in parts:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
    elif any(get_origin(part) is dict for part in parts):
        parser.add_argument(flag, type=_pair, finish=dict, metavar="KEY=VALUE", **several)
    elif lists:
        convert, metavar = _words(elements), _metavar(elements)
        parser.add_argument(flag, type=convert, finish=finish_of(hint), metavar=metavar, **several)
    else:
        flags = [flag, "-" + item.name] if len(item.name) == 1 else [flag]
        parser.add_argument(*flags, type=_converter(parts), metavar=_metavar(parts), **common)


class Several(argparse.Action):
    """Store what `finish` makes of the values of all words, each of which is a list of some."""

    def __init__(self, *arguments: Any, finish: Callable[[list[Any]], Any], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.finish = finish

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, self.finish(list(itertools.chain.from_iterable(values))))


def finish_of(hint: Any) -> Callable[[list[Any]], Any]:
    """Make the function that turns the words of an option into its value: of `Sources`, or a tuple."""
    return _one_or_all if str in _parts(hint) else tuple


def _one_or_all(values: list[Any]) -> Any:
    return tuple(values) if len(values) > 1 else values[0]


def _pair(word: str) -> list[tuple[str, Any]]:
    """Take `key=value` apart; the value is a Python literal or else text."""
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise argparse.ArgumentTypeError(f"{word!r} is not of the form key=value")
    try:
        return [(key, ast.literal_eval(text))]
    except (ValueError, SyntaxError):
        return [(key, text)]


def _words(elements: Sequence[Any]) -> Callable[[str], list[Any]]:
    """Make the function that converts a word of one value or of several with commas between them."""
    convert = _converter(elements)
    if str in elements:  # a text may hold commas of its own
        return lambda word: [convert(word)]
    return lambda words: [convert(word) for word in words.split(",") if word]


def _parts(hint: Any) -> list[Any]:
    """Take a union apart, and a Literal into its choices; other types stand for themselves."""
    origin = get_origin(hint)
    if origin is Literal:
        return list(get_args(hint))
    if origin in (tuple, dict, os.PathLike) or not get_args(hint):
        return [hint]
    return [leaf for part in get_args(hint) for leaf in _parts(part)]


def _converter(parts: Sequence[Any]) -> Callable[[str], Any]:
    """Make the function that turns a word into the first of the types that takes it."""

    def convert(word: str) -> Any:
        if word in parts:  # a choice of a Literal
            return word
        if NoneType in parts and str not in parts and word.lower() == "none":
            return None
        for kind in (int, float):
            if kind in parts:
                try:
                    return kind(word)
                except ValueError:
                    continue
        if str in parts:
            return word
        raise argparse.ArgumentTypeError(f"{word!r} is not allowed; allowed: {_metavar(parts)}")

    return convert


def _metavar(parts: Sequence[Any]) -> str:
    choices = [part for part in parts if isinstance(part, str)]
    kinds = [kind.__name__.upper() for kind in (int, float) if kind in parts]
    texts = ["TEXT"] if str in parts else []
    none = ["none"] if NoneType in parts and (kinds or choices) and str not in parts else []
    return "|".join([*choices, *kinds, *texts, *none])


def _help(item: dataclasses.Field[Any]) -> str:
    text = str(item.metadata["help"])
    if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
        text += " (required)"
    elif isinstance(item.default, tuple):
        if item.default:
            text += f" (default: {' '.join(repr(value) for value in item.default)})"
    elif item.default is not dataclasses.MISSING and not isinstance(item.default, (NoneType, bool)):
        text += f" (default: {item.default})"
    elif isinstance(item.default, bool):
        text += f" (default: {'yes' if item.default else 'no'})"
    return text.replace("%", "%%")
