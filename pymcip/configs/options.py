"""The base of all stage configs: options with help and bounds, checked when a config is made.

A config is checked as a whole when it is made: every problem is reported at once, before any work
starts. Only what needs no file and no torch is checked here; data and models are checked by the
stage that opens them, still before it does any work. `pymcip.flags` makes flags from the fields.
"""

from __future__ import annotations

import dataclasses
import json
import math
import operator
import os
import re
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

from pymcip.errors import ConfigError, MissingDependencyError, did_you_mean

Source = str | os.PathLike[str]
Sources = Source | tuple[Source, ...]
ROLES = ("filepath", "label", "caption")  # of the columns of a table
Workers = int | Literal["auto"]
ConfigType = TypeVar("ConfigType", bound="Config")
WORKERS = "decoding processes; 0 decodes in the main one; auto: the cores by processes of torchrun, at most 16"
BOUNDS = {
    "at_least": (">=", operator.ge),
    "more_than": (">", operator.gt),
    "at_most": ("<=", operator.le),
    "below": ("<", operator.lt),
}


def option(default: Any, help: str, **bounds: float) -> Any:
    """A dataclass field with the one-line help that docs and command line show, and its bounds.

    Bounds are those of `BOUNDS`, for numbers and each of several; None and strings are not checked.
    """
    assert bounds.keys() <= BOUNDS.keys(), bounds
    metadata = {"help": help, **bounds}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def required(help: str) -> Any:
    """A dataclass field without a default; `help` is the line that docs and command line show."""
    return field(metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base of the stage configs: construction checks everything and reports all problems.

    Attributes:
        GROUPS: where there are many options, their names by the titles under which help lists them.
    """

    GROUPS: ClassVar[dict[str, str]] = {}

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        problems: list[str] = []
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if isinstance(value, list):
                value = tuple(value)
                object.__setattr__(self, item.name, value)
            if not _is_finite(value):
                problems.append(f"{item.name}={value!r} is not allowed; numbers must be finite")
            elif not _matches(value, hints[item.name]):
                allowed = _allowed_types(hints[item.name])
                problems.append(f"{item.name}={value!r} is not allowed; allowed: {allowed}")
        if not problems:  # ranges are only meaningful for values of the right type
            for item in dataclasses.fields(self):
                problems += _range_problems(item, getattr(self, item.name))
            problems += self.problems()
        if problems:
            raise ConfigError(problems)

    def problems(self) -> list[str]:
        """Problems that a type or a single range can't express; stages extend it."""
        problems = []
        shard = getattr(self, "shard", None)
        number, _, count = (shard or "0/1").partition("/")
        digits = number.isdecimal() and count.isdecimal() and len(number + count) < 20
        if not digits or int(number) >= int(count):
            problems.append(f"shard={shard!r} is not allowed; allowed: i/n, with i from 0 to n - 1")
        if getattr(self, "overwrite", False) and getattr(self, "resume", None):
            problems.append("overwrite=True and resume='latest' exclude each other; give one")
        for name, value in vars(self).items():
            if name.endswith("templates") and not (value and all("{}" in text for text in value)):
                problems.append(f"{name}={value!r}: each must hold {{}} for the class name")
        return problems

    @classmethod
    def make(
        cls: type[ConfigType], config: ConfigType | None, options: dict[str, Any]
    ) -> ConfigType:
        """A config from either a ready one (changed by `options`) or from options alone."""
        known = [item.name for item in dataclasses.fields(cls)]
        problems = [
            f"unknown option {name!r}; allowed: {', '.join(sorted(known))}{did_you_mean(name, known)}"
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
        values: dict[str, Any] = json.loads(json.dumps(vars(self), default=os.fspath))
        return values


@dataclass(frozen=True, kw_only=True)
class DataOptions(Config):
    """How the data of a stage are read. Shared by every stage that reads images or captions."""

    columns: dict[str, Any] = option(
        {},
        "names of the tables' columns where they aren't recognised: filepath=NAME label=NAME caption=NAME",
    )

    def problems(self) -> list[str]:
        problems = super().problems()
        for role, name in self.columns.items():
            if role not in ROLES:
                allowed = f"allowed: {', '.join(ROLES)}{did_you_mean(role, ROLES)}"
                problems.append(f"columns: {role!r} is nothing that a column can be; {allowed}")
            if not isinstance(name, (str, int)) or isinstance(name, bool):
                problems.append(
                    f"columns: {role}={name!r} is not allowed; allowed: a column's name"
                )
        if len(set(map(str, self.columns.values()))) < len(self.columns):
            problems.append(f"columns={self.columns}: one column can't be two things")
        return problems


def read_options(path: Path, name: str) -> dict[str, Any]:
    """Read a file of options, such as a run's config.json; `name` is what to call it in errors.

    It is YAML if its name ends in .yaml or .yml, else JSON.

    Raises:
        ConfigError: it can't be read, or holds no options.
        MissingDependencyError: it is YAML, and PyYAML is not installed.
    """
    kind = "YAML" if path.suffix.lower() in (".yaml", ".yml") else "JSON"
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if kind == "JSON" else _parse_yaml(text)
    except OSError as error:
        raise ConfigError(f"{name} {path} can't be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{name} {path} is not {kind}: {error}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        needed = "a JSON object" if kind == "JSON" else "lines of the form option: value"
        raise ConfigError(f"{name} {path} holds {type(values).__name__}; needed: {needed}")
    return values


def _parse_yaml(text: str) -> Any:
    """Parse YAML, where 1e-5 is a number too, as in YAML 1.2; raises ValueError."""
    try:
        yaml = import_module("yaml")
    except ImportError as error:
        raise MissingDependencyError(
            "a YAML file needs PyYAML: pip install pyyaml; or write the options as JSON"
        ) from error
    loader = type("Loader", (yaml.SafeLoader,), {})
    number = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
    loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))  # type: ignore[attr-defined]
    try:
        return yaml.load(text, loader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


def _is_finite(value: Any) -> bool:
    """Whether an option's value holds neither infinity nor NaN, however deep."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, dict):
        value = tuple(value.values())
    return not isinstance(value, (tuple, list)) or all(map(_is_finite, value))


def _allowed_types(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(repr(choice) for choice in arguments)
    if origin is tuple:
        return "a list of " + _allowed_types(arguments[0])
    if arguments and origin is not dict:
        return " or ".join(dict.fromkeys(_allowed_types(part) for part in arguments))
    return "None" if hint is NoneType else str((origin or hint).__name__)


def _matches(value: Any, hint: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in arguments)
    if origin is tuple:
        return isinstance(value, tuple) and all(_matches(item, arguments[0]) for item in value)
    if origin in (dict, os.PathLike):
        return isinstance(value, origin)
    if arguments:  # a union
        return any(_matches(value, part) for part in arguments)
    kinds = (int, float) if hint is float else hint
    return isinstance(value, kinds) and (hint is bool or not isinstance(value, bool))


def _range_problems(item: dataclasses.Field[Any], value: Any) -> list[str]:
    return [
        f"{item.name}={one!r} is not allowed; it must be {sign} {item.metadata[name]:g}"
        for one in (value if isinstance(value, tuple) else (value,))
        for name, (sign, holds) in BOUNDS.items()
        if name in item.metadata
        and isinstance(one, (int, float))
        and not holds(one, item.metadata[name])
    ]
