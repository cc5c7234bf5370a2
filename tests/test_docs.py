"""README and pages: their snippets run, their commands and options are real, their links lead somewhere.

A block below a comment `<!-- not run: REASON -->` is not run, but checked as far as that can be done
without running it.
"""

from __future__ import annotations

import ast
import dataclasses
import logging
import pkgutil
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import pytest

from pymcip.cli import COMMANDS, build_parser, main, make_config
from tests.conftest import CAPTIONS, COLOURS, picture

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"```(\w*)$")
NOT_RUN = re.compile(r"<!-- not run: \S.* -->$")
FILE = re.compile(r"(?:bench|csrc|docs|pymcip|tests|triton_kernels)/[a-z\d_./*-]+")
LANGUAGES = {"", "text", "python", "bash"}
CLASSES = ("fruit", "vegetable", "bread", "milk")
OTHER_PROGRAMS = {"cd", "curl", "export", "git"}
OTHER_FLAGS = {"--max-restarts"}  # of torchrun
PARSER = build_parser()
MODEL = "local-dir:tiny"  # in the place of what would be downloaded
IN_PYTHON = {
    '"ViT-B-32"': f'"{MODEL}"',
    '"openai"': "None",
    'method="mcip+"': 'method="mcip+", threshold=-1.0',  # its weights are random: any caption is near
}
CONFIGS = {command.target.split(":")[1]: command.config for command in COMMANDS.values()}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: its language, where its text starts (from 1), and whether it runs."""

    page: Path
    line: int
    language: str
    text: str
    runs: bool

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def commands(self) -> list[list[str]]:
        """The words of each shell command, without comments and environment variables."""
        lines = self.text.replace("\\\n", " ").splitlines()
        split = [shlex.split(line, comments=True) for line in lines]
        return [
            words[sum("=" in word.split("/")[0] for word in words[:1]) :]
            for words in split
            if words
        ]


def take_apart(page: Path) -> tuple[list[Block], str]:
    """Give the blocks of a page, and the page's text without them."""
    blocks: list[Block] = []
    prose: list[str] = []
    inside: list[str] | None = None
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fence = FENCE.match(line)
        if inside is None and fence:
            before = next((text for text in reversed(prose) if text), "")
            inside, language, start = [], fence[1], number + 1
            runs = NOT_RUN.match(before) is None
        elif inside is not None and fence:
            blocks.append(Block(page, start, language, "\n".join(inside) + "\n", runs))
            inside = None
            prose.append("(block)")  # a comment above this block is not above the next one, too
        else:
            (prose if inside is None else inside).append(line)
    assert inside is None, f"{page}: a block does not end"
    return blocks, "\n".join(prose)


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


BLOCKS = [block for page in PAGES for block in take_apart(page)[0]]
each_page = pytest.mark.parametrize("page", PAGES, ids=named)


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path
) -> Iterator[Callable[[Path], None]]:
    """Run a page's snippets in a folder with all files that the pages name, after those of the README."""
    folder = tmp_path_factory.mktemp("docs")
    for place, name in enumerate(("shop/train", "shop/val", "shop/test", "photos", "archive")):
        for label, colour in zip(CLASSES, COLOURS, strict=False):
            (folder / name / label).mkdir(parents=True)
            for index in range(3):
                picture(10 * place + index, colour).save(folder / name / label / f"{index}.jpg")
    picture(7).save(folder / "photo.jpg")
    (folder / "archive/Royal-Gala").mkdir()
    picture(8).save(folder / "archive/Royal-Gala/Royal-Gala_001.jpg")
    (folder / "names.tsv").write_text("".join(f"{label}\t{label}\n" for label in CLASSES))
    lines = [f"https://example.org/{i}.jpg\t{text}\n" for i, text in enumerate(CAPTIONS)]
    (folder / "cc12m.tsv").write_text("".join(lines))
    (folder / "tiny").symlink_to(tiny_model_dir)

    def run_page(page: Path) -> None:
        names: dict[str, Any] = {}
        for block in take_apart(page)[0]:
            if not block.runs:
                continue
            if block.language == "python":
                text = reduce(lambda t, pair: t.replace(*pair), IN_PYTHON.items(), block.text)
                exec(compile("\n" * (block.line - 1) + text, named(page), "exec"), names)
            if block.language == "bash":
                for words in block.commands():
                    if words[0] == "pymcip":
                        line = shlex.join(words[1:])
                        line = re.sub(r"ViT-B-32 --(baseline-)?pretrained openai", MODEL, line)
                        assert main(shlex.split(line)) == 0, f"{block}: {shlex.join(words)}"

    level = logging.getLogger("pymcip").level
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("pymcip.training.settings.MOST_EPOCHS", 3)
        run_page(README)
        yield run_page
    logging.getLogger("pymcip").setLevel(level)


@each_page
def test_snippets_run(page: Path, run: Callable[[Path], None]) -> None:
    if page != README:
        run(page)


def parsed(words: list[str]) -> dict[str, Any]:
    """Parse a command of pymcip; of one that asks for help nothing but `help`."""
    if words[1:] in (["--help"], ["--help-all"]):
        return {"command": words[0], "help": True}
    try:
        return vars(PARSER.parse_args(words))
    except SystemExit:
        pytest.fail(f"pymcip {shlex.join(words)} can't be parsed")


def extras() -> set[str]:
    lines = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1]
    return set(re.findall(r"^([\w-]+) = \[", lines.split("\n[")[0], re.MULTILINE))


def check_command(words: list[str]) -> None:
    if "-m" in words:  # torchrun -m pymcip
        words = words[words.index("-m") + 1 :]
    program, *rest = [word.replace("$SLURM_ARRAY_TASK_ID", "0") for word in words]
    if program == "pymcip":
        options = parsed(rest)
        command = COMMANDS.get(options.pop("command"))
        if command and not options.keys() & {"help", "list"}:
            make_config(command.config, options)
    elif program == "make":
        targets = (ROOT / "Makefile").read_text().split(".PHONY:")[1].splitlines()[0].split()
        assert {word for word in rest if "=" not in word} <= set(targets)
    elif program == "pip":
        inside = "".join(re.findall(r"\[(.*)\]", " ".join(rest)))
        assert set(re.findall(r"[\w-]+", inside)) <= extras()
    elif program == "python":
        assert (ROOT / rest[0]).is_file()
    else:
        assert program in OTHER_PROGRAMS


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_block_is_of_a_known_kind_and_its_options_are_real(block: Block) -> None:
    assert block.language in LANGUAGES
    if block.language == "bash":
        for words in block.commands():
            check_command(words)
    if block.language == "python":
        for call in ast.walk(ast.parse(block.text)):
            if not (isinstance(call, ast.Call) and ast.unparse(call.func).startswith("pymcip.")):
                continue
            config = CONFIGS.get(ast.unparse(call.func).removeprefix("pymcip."))
            if config is not None:
                known = {item.name for item in dataclasses.fields(config)} | {"recipe", "callbacks"}
                assert {keyword.arg for keyword in call.keywords} <= known


def flags() -> set[str]:
    """Give every option of every command."""
    commands = next(action for action in PARSER._actions if isinstance(action.choices, dict))
    assert isinstance(commands.choices, dict)
    return {
        name
        for command in (PARSER, *commands.choices.values())
        for action in command._actions
        for name in action.option_strings
    }


@each_page
def test_commands_options_names_and_files_in_the_text_are_real(page: Path) -> None:
    known = flags()
    for code in re.findall(r"`([^`]+)`", take_apart(page)[1]):
        words = code.replace("…", "").split()
        if words[:1] == ["pymcip"] and len(words) > 1 and not words[1].isupper():
            parsed(shlex.split(" ".join(words[1:])))
        elif code.startswith("--"):
            assert words[0].split("=")[0] in known | OTHER_FLAGS, code
        elif name := re.match(r"pymcip(\.\w+)+", code):
            pkgutil.resolve_name(name[0])
        elif FILE.fullmatch(code):
            assert any(ROOT.glob(code)), f"there is no {code}"


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", take_apart(page)[1], re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", title.lower()) for title in titles]
    return {title.strip().replace(" ", "-") for title in plain}


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    text = take_apart(page)[1]
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.is_file(), f"{link} leads to no file"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{link} leads to no heading"
    defined = set(re.findall(r"^\[([^\]]+)\]: \S+$", text, re.MULTILINE))
    used = set(re.findall(r"(?<!`)\[([^\]`]+)\](?![(:\w`])", re.sub(r"`[^`]*`", "", text)))
    assert {name for name in used if name in defined} == defined, "a link is defined and not used"
