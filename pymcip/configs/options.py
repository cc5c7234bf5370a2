"""The base of all stage configs: options with help and bounds, checked when a config is made.

A config is checked as a whole when it is made: every problem is reported at once, before any work
starts. Only what needs no file and no torch is checked here; data and models are checked by the
stage that opens them, still before it does any work. `pymcip.cli` makes its flags from the fields.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from pymcip.errors import ConfigError

Source = str | os.PathLike[str]
Sources = Source | tuple[Source, ...]
ConfigType = TypeVar("ConfigType", bound="Config")


def option(
    default: Any, help: str, *, at_least: float | None = None, more_than: float | None = None
) -> Any:
    """A dataclass field with the one-line help that docs and command line show, and its bounds.

    Bounds hold for numbers; None and words such as "auto" are left alone.
    """
    metadata = {"help": help, "at_least": at_least, "more_than": more_than}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def required(help: str) -> Any:
    """A dataclass field without a default; `help` is the line that docs and command line show."""
    return field(metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base of the stage configs: construction checks everything and reports all problems."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        problems: list[str] = []
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if isinstance(value, list):
                value = tuple(value)
                object.__setattr__(self, item.name, value)
            problem = _type_problem(item.name, value, hints[item.name])
            if problem:
                problems.append(problem)
        if not problems:  # ranges are only meaningful for values of the right type
            for item in dataclasses.fields(self):
                problems += _range_problems(item, getattr(self, item.name))
            problems += self.problems()
        if problems:
            raise ConfigError(problems)

    def problems(self) -> list[str]:
        """Problems that a type or a single range can't express; stages extend it."""
        return []

    @classmethod
    def make(
        cls: type[ConfigType], config: ConfigType | None, options: dict[str, Any]
    ) -> ConfigType:
        """A config from either a ready one (changed by `options`) or from options alone."""
        known = [item.name for item in dataclasses.fields(cls)]
        problems = [
            f"unknown option {name!r}; allowed: {', '.join(sorted(known))}"
            for name in options
            if name not in known
        ]
        if config is None:
            problems += [
                f"{item.name} is required: {item.metadata['help']}"
                for item in dataclasses.fields(cls)
                if item.default is dataclasses.MISSING
                and item.default_factory is dataclasses.MISSING
                and item.name not in options
            ]
        if problems:
            raise ConfigError(problems)
        return dataclasses.replace(config, **options) if config is not None else cls(**options)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; paths become strings."""

        def plain(value: Any) -> Any:
            if isinstance(value, os.PathLike):
                return os.fspath(value)
            if isinstance(value, (tuple, list)):
                return [plain(item) for item in value]
            if isinstance(value, dict):
                return {key: plain(item) for key, item in value.items()}
            return value

        return {item.name: plain(getattr(self, item.name)) for item in dataclasses.fields(self)}


def read_options(path: Path, name: str) -> dict[str, Any]:
    """Read a JSON file of options, such as a run's config.json; `name` is what to call it in errors.

    Raises:
        ConfigError: it can't be read, or holds no JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{name} {path} can't be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{name} {path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{name} {path} holds {type(values).__name__}; needed: a JSON object")
    return values


def template_problems(name: str, templates: tuple[str, ...]) -> list[str]:
    """The problems of zero-shot prompts: each must have a place for the class name."""
    if templates and all("{}" in template for template in templates):
        return []
    return [f"{name}={templates!r}: each must hold {{}} for the class name"]


def threshold_problems(threshold: float | Literal["auto"]) -> list[str]:
    """The problems of a lowest cosine of pseudo-captions."""
    if threshold == "auto" or -1 <= threshold <= 1:
        return []
    return [f"threshold={threshold!r} is not a cosine; allowed: -1 to 1, or 'auto'"]


def resume_problems(overwrite: bool, resume: str | None) -> list[str]:
    """The problem of asking both to replace and to continue what is in `out`."""
    if overwrite and resume:
        return ["overwrite=True and resume='latest' exclude each other; give one"]
    return []


def _allowed_types(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(choice) for choice in get_args(hint))
    if get_args(hint) and get_origin(hint) is not tuple and get_origin(hint) is not dict:
        names = [_allowed_types(part) for part in get_args(hint)]
        return " or ".join(dict.fromkeys(names))
    if hint is type(None):
        return "None"
    if get_origin(hint) is tuple:
        return "a list of " + _allowed_types(get_args(hint)[0])
    origin = get_origin(hint) or hint
    return str(getattr(origin, "__name__", origin))


def _matches(value: Any, hint: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in arguments)
    if origin is tuple:
        return isinstance(value, tuple) and all(_matches(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict)
    if origin is os.PathLike:
        return isinstance(value, os.PathLike)
    if arguments:  # a union
        return any(_matches(value, part) for part in arguments)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _type_problem(name: str, value: Any, hint: Any) -> str | None:
    if _matches(value, hint):
        return None
    return f"{name}={value!r} is not allowed; allowed: {_allowed_types(hint)}"


def _range_problems(item: dataclasses.Field[Any], value: Any) -> list[str]:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return []  # None or a word such as "auto"
    at_least, more_than = item.metadata.get("at_least"), item.metadata.get("more_than")
    problems = []
    if at_least is not None and not value >= at_least:
        problems.append(f"{item.name}={value!r} is not allowed; it must be >= {at_least:g}")
    if more_than is not None and not value > more_than:
        problems.append(f"{item.name}={value!r} is not allowed; it must be > {more_than:g}")
    return problems
