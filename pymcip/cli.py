"""The command line: one command per stage, its flags made from the stage's config dataclass."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import NoneType
from typing import Any, get_type_hints

import pymcip
from pymcip.configs import (
    CheckConfig,
    Config,
    DemoConfig,
    EmbedConfig,
    EvaluateConfig,
    ExportConfig,
    IndexConfig,
    MineConfig,
    RunsConfig,
    SearchConfig,
    ServeConfig,
    SweepConfig,
    TrainConfig,
    read_options,
)
from pymcip.configs.recipes import describe_recipes
from pymcip.distributed import is_first, world
from pymcip.errors import ConfigError, PymcipError, ResourceError, did_you_mean, reason_of
from pymcip.flags import Several, add_option, finish_of


@dataclass(frozen=True)
class Command:
    """A stage: the config that its flags come from, and `module:function` to call with it.
    `listing`: another `module:function`; `--list` prints its text, made from the flags in `listed`.
    `positional`: the options that may also be given without their flags; the last takes all words
    that are left. `several`: whether torchrun may start several processes of it.
    """

    config: type[Config]
    target: str
    summary: str
    listing: str | None = None
    listed: tuple[str, ...] = ()
    positional: tuple[str, ...] = ()
    several: bool = False


COMMANDS = {
    "check": Command(
        CheckConfig,
        "pymcip.checking:check",
        "what pymcip sees in data, before anything is made of them",
        positional=("data",),
    ),
    "embed": Command(
        EmbedConfig, "pymcip.embedding:embed", "images and captions into a folder", several=True
    ),
    "mine": Command(
        MineConfig, "pymcip.mining:mine_captions", "nearest captions of each image", several=True
    ),
    "train": Command(TrainConfig, "pymcip.training:train", "fine-tune a model", several=True),
    "runs": Command(
        RunsConfig,
        "pymcip.training.runs:compare_runs",
        "the runs below a folder in one table: settings, figures before and after, time",
        positional=("folder",),
    ),
    "evaluate": Command(
        EvaluateConfig,
        "pymcip.evaluation:evaluate",
        "image and text search, before and after; the paper's benchmarks",
        listing="pymcip.benchmarks:listing",
        listed=("data_root", "data_paths"),
        several=True,
    ),
    "export": Command(
        ExportConfig, "pymcip.exporting:export", "weights for open_clip, an index for faiss"
    ),
    "index": Command(
        IndexConfig,
        "pymcip.search:build_index",
        "images into an index to search in, or one brought up to date",
        positional=("images",),
    ),
    "search": Command(
        SearchConfig,
        "pymcip.search.show:search_and_show",
        "images of an index by texts, pictures or both",
        positional=("index", "text"),
    ),
    "serve": Command(
        ServeConfig,
        "pymcip.search.serve:serve",
        "a page in the browser to search an index with",
        positional=("index",),
    ),
    "demo": Command(
        DemoConfig, "pymcip.demo:run_demo", "the whole way on a small world of pictures"
    ),
    "sweep": Command(
        SweepConfig, "pymcip.studies:sweep", "image search against text search over settings"
    ),
}
STATUSES: dict[type[BaseException], int] = {  # of what ends a command with one message
    ResourceError: 1,  # memory, shared memory, a worker that was ended
    PymcipError: 2,
    OSError: 1,  # a full disk, a folder that may not be written
    KeyboardInterrupt: 128 + signal.SIGINT,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status.

    0: done; 2: an error that pymcip raises on purpose; 1: one of the system (a full disk); both are
    reported in one message on stderr, or with `--debug` or PYMCIP_DEBUG=1 as a traceback. 130 or
    143: interrupted by SIGINT or SIGTERM. What a stage prints on stdout ends with one line of JSON
    (`search` prints its results alone).
    """
    options = _parsed(build_parser(), arguments)
    command = options.pop("command")
    debug = options.pop("debug", False) or os.environ.get("PYMCIP_DEBUG", "0") not in ("", "0")
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    try:
        logging.getLogger("pymcip").setLevel(logging.INFO if is_first() else logging.ERROR)
        if command == "env":
            return _show_environment()
        if command == "recipes":
            print(describe_recipes(), end="", flush=True)
            return 0
        if world() > 1 and not COMMANDS[command].several:
            raise ConfigError(
                f"it runs in one process, and torchrun started {world()}; start it without torchrun. "
                f"Commands for several: {', '.join(n for n, c in COMMANDS.items() if c.several)}"
            )
        return _run(COMMANDS[command], options)
    except BrokenPipeError:  # `pymcip env | head` has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except tuple(STATUSES) as error:
        if debug:
            raise
        message = "interrupted" if isinstance(error, KeyboardInterrupt) else error
        print(f"pymcip {command}: {message}", file=sys.stderr)
        return next(status for kind, status in STATUSES.items() if isinstance(error, kind))
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, MemoryError) or "out of memory" in str(error)
        if debug or not (known or "allocate memory" in str(error)):
            raise
        print(
            f"pymcip {command}: out of memory; use a smaller batch_size (or accum_freq, "
            f"grad_checkpointing=True, fewer workers). {reason_of(error)}",
            file=sys.stderr,
        )
        return 1


def build_parser() -> argparse.ArgumentParser:
    """Make the parser of all commands; nothing but the configs is imported for it."""
    parser = argparse.ArgumentParser(
        prog="pymcip",
        description="Fine-tune CLIP models for image search without breaking text search.",
        epilog="pymcip COMMAND --help lists a command's options.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"pymcip {pymcip.__version__}")
    parser.add_argument(
        "--print-completion",
        action=_PrintCompletion,
        choices=("bash", "zsh"),
        default=argparse.SUPPRESS,
        help="print a script that completes commands and options in this shell, and stop",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, help_text in (
        ("env", "what a bug report needs"), ("recipes", "named settings of train")
    ):  # fmt: skip
        _add_debug(commands.add_parser(name, help=help_text, allow_abbrev=False))
    for name, command in COMMANDS.items():
        stage = commands.add_parser(
            name,
            usage=f"pymcip {name}"
            + "".join(f" {option.upper()}" for option in command.positional)
            + (" … [options]" if command.positional else " [options]"),
            help=command.summary,
            description=f"{command.summary[0].upper()}{command.summary[1:]}.",
            allow_abbrev=False,
        )
        stage.add_argument(
            "--config",
            type=Path,
            default=argparse.SUPPRESS,
            metavar="FILE",
            help="JSON or YAML file of options, such as a run's config.json; flags override it",
        )
        _add_debug(stage)
        if command.config is TrainConfig:
            stage.add_argument(
                "--recipe",
                default=argparse.SUPPRESS,
                metavar="NAME",
                help="settings to start from, which other flags override; see pymcip recipes",
            )
        if command.listing:
            stage.add_argument(
                "--list",
                action="store_true",
                default=argparse.SUPPRESS,
                help="list the benchmarks, what they need and where to get it, and stop",
            )
        hints = get_type_hints(command.config)
        for option in command.positional:
            how: dict[str, Any] = {"nargs": "?"}
            if option == command.positional[-1]:
                how = {"nargs": "*", "type": lambda word: [word], "action": Several}
                how["finish"] = finish_of(hints[option])
            stage.add_argument(
                option,
                default=argparse.SUPPRESS,
                metavar=option.upper(),
                help="the same as --" + option,
                **how,
            )
        items = {item.name: item for item in dataclasses.fields(command.config)}
        for title, names in command.config.GROUPS.items():
            group = stage.add_argument_group(title)
            for field in names.split():
                add_option(group, items.pop(field), hints[field])
        for field, item in items.items():
            add_option(stage, item, hints[field])
    return parser


def _parsed(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> dict[str, Any]:
    """Parse the command line; an unknown flag ends it with the one that may be meant."""
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        command = COMMANDS.get(options.command)
        names = dataclasses.fields(command.config) if command else ()
        flags = ["--" + item.name.replace("_", "-") for item in names]
        hints = (did_you_mean(word.partition("=")[0], flags) for word in unknown)
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{''.join(hints)}")
    return vars(options)


def make_config(kind: type[Config], options: dict[str, Any]) -> Config:
    """Make a stage's config from parsed flags; `config` among them names a file of them."""
    path = options.pop("config", None)
    return kind.make(
        None, {**read_options(path, "--config"), **options} if path is not None else options
    )


def _run(command: Command, options: dict[str, Any]) -> int:
    if command.listing and options.pop("list", False):
        given = {name: options[name] for name in command.listed if name in options}
        print(_function(command.listing)(**given), end="", flush=True)
        return 0
    config = make_config(command.config, options)
    result = _function(command.target)(config)
    if isinstance(result, str):  # a text for people or programs, and nothing else
        print(result, end="", flush=True)
        return 0
    if is_first():
        table = getattr(result, "markdown", None) or getattr(result, "table", None)
        if isinstance(table, str) and table:
            print(table)
        print(json.dumps(summary(result), ensure_ascii=False), flush=True)
    interrupted = getattr(result, "interrupted", None)
    return 0 if interrupted is None else 128 + signal.Signals[interrupted]


def _function(target: str) -> Callable[..., Any]:
    module, name = target.split(":")
    function: Callable[..., Any] = getattr(import_module(module), name)
    return function


def summary(result: Any) -> dict[str, Any]:
    """Take what fits on a line of JSON from a stage's result: paths, numbers, texts and dicts.

    Fields that its `repr` leaves out are long, and left out here too.
    """
    shown = ("markdown",) if hasattr(result, "markdown") else ("table",)  # printed above it
    if dataclasses.is_dataclass(result):
        values = {
            item.name: getattr(result, item.name)
            for item in dataclasses.fields(result)
            if item.repr and item.name not in shown
        }
    else:  # an embedding folder
        values = {"out": result.path, "skipped": len(result.skipped)}
        for kind, name in (("img", "images"), ("text", "captions")):
            if result.has(kind):
                complete, parts = result.part_counts(kind)  # other shards may be to come
                whole = complete == parts and sum(map(len, result.parts(kind)))
                values[name] = whole or f"{complete} of {parts} parts"
    plain = (str, int, float, bool, dict, list, tuple, NoneType)
    return {
        name: str(value) if isinstance(value, os.PathLike) else value
        for name, value in values.items()
        if isinstance(value, (os.PathLike, *plain))
    }


class _PrintCompletion(argparse.Action):
    """Print shtab's completion of the parser, and exit."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        try:
            shtab = import_module("shtab")
        except ImportError:
            parser.error(f"{option_string} needs a package: pip install 'pymcip[completion]'")
        print(shtab.complete(parser, values))
        parser.exit()


def _show_environment() -> int:
    environment = import_module("pymcip.environment")
    print(environment.format_report(environment.environment_report()), flush=True)
    return 0


def _add_debug(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks of errors"
    )


if __name__ == "__main__":
    sys.exit(main())
