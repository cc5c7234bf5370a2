"""The command line: flags made from the configs, one clean message per error, exit statuses."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import pymcip
from pymcip import cli
from pymcip.cli import COMMANDS, build_parser, main, make_config
from pymcip.configs import Config, EvaluateConfig, TrainConfig
from pymcip.errors import ConfigError, DataError, MissingDependencyError, PymcipError

TRAIN = ["train", "--model", "m", "--train-data", "d", "--out", "o", "--captions", "c"]


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep one test's environment and log level from the next."""
    for name in ("PYMCIP_DEBUG", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    level = logging.getLogger("pymcip").level
    yield
    logging.getLogger("pymcip").setLevel(level)


def parse(*words: str) -> Any:
    options = vars(build_parser().parse_args(words))
    return make_config(COMMANDS[options.pop("command")].config, options)


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Put a stand-in in the place of `pymcip train`; `.result` is what it returns or raises."""
    double = SimpleNamespace(result=None, configs=[])

    def run(config: Config) -> Any:
        double.configs.append(config)
        if isinstance(double.result, BaseException):
            raise double.result
        return double.result

    double.run = run
    monkeypatch.setitem(sys.modules, "stand_in", double)
    command = dataclasses.replace(COMMANDS["train"], target="stand_in:run")
    monkeypatch.setitem(COMMANDS, "train", command)
    return double


# Flags


@pytest.mark.parametrize("name", COMMANDS)
def test_every_field_is_a_flag_with_its_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main([name, "--help"])
    assert raised.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    squeezed = shown.replace(" ", "")  # help is wrapped at hyphens too
    for item in dataclasses.fields(COMMANDS[name].config):
        assert f" --{item.name.replace('_', '-')}" in shown
        assert item.metadata["help"].replace(" ", "") in squeezed


def test_help_shows_choices_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for text in (
        "--method appended|gpr|2sft|mcip|mcip+rea|rea|mcip+",
        "--threshold auto|FLOAT",
        "--negatives mined|batch|bank|INT",
        "--overwrite, --no-overwrite",
        "--lr auto|FLOAT peak learning rate of the image tower (default: auto)",
        "run folder to write (required)",
        "--aug-cfg KEY=VALUE",
    ):
        assert text in shown


def test_help_of_train_is_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    titles = list(TrainConfig.GROUPS)
    names = " ".join(TrainConfig.GROUPS.values()).split()
    assert sorted(names) == sorted(item.name for item in dataclasses.fields(TrainConfig))
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = capsys.readouterr().out
    places = [shown.index(f"\n{title}:\n") for title in titles]
    assert places == sorted(places)
    first, last = shown[places[0] : places[1]], shown[places[-1] :]
    assert first.count("\n  --") == 10
    assert "--train-data" in first
    assert "--precision" in last


def test_flags_that_are_not_given_keep_their_defaults() -> None:
    assert parse(*TRAIN) == TrainConfig(model="m", train_data="d", out="o", captions="c")


def test_flags_of_every_kind() -> None:
    got = parse(
        *TRAIN,
        *[
            "--train-data",
            "a",
            "b",
            "c",
            "--train-weights",
            "1",
            "2",
            "0.5",
            "--lr",
            "1e-4",
            "--epochs",
            "7",
            "--overwrite",
        ],
        *[
            "--grad-clip-norm",
            "none",
            "--threshold",
            "auto",
            "--negatives",
            "500",
            "--method",
            "gpr",
        ],
        *["--report-to", "wandb", "--no-class-balanced", "--image-size", "336", "--seed", "3"],
        *["--aug-cfg", "scale=(0.5,1.0)", "use_timm=True", "color_jitter=0.2", "mode=fast"],
    )
    assert got.train_data == ("a", "b", "c")
    assert got.train_weights == (1.0, 2.0, 0.5)
    assert (got.lr, got.epochs, got.seed, got.image_size) == (1e-4, 7, 3, 336)
    assert got.overwrite is True
    assert got.class_balanced is False
    assert got.grad_clip_norm is None
    assert (got.threshold, got.negatives, got.method) == ("auto", 500, "gpr")
    assert got.report_to == ("wandb",)
    assert got.aug_cfg == {
        "scale": (0.5, 1.0), "use_timm": True, "color_jitter": 0.2, "mode": "fast",
    }  # fmt: skip


def test_numbers_and_words_in_one_flag() -> None:
    assert parse(*TRAIN, "--threshold", "-0.1").threshold == -0.1
    assert parse(*TRAIN, "--negatives", "bank").negatives == "bank"
    assert type(parse(*TRAIN, "--lr", "1").lr) is float
    assert parse("evaluate", "--model", "m", "--data", "d", "--recall-at", "3").recall_at == (3,)
    assert parse("evaluate", "--model", "none", "--data", "d").model == "none"
    assert parse("demo").out == Path("runs/demo")
    got = parse("evaluate", "--model", "m", "--data", "d", "--templates", "{}", "a {}")
    assert got.templates == ("{}", "a {}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--epochs", "two"], "argument --epochs: 'two' is not allowed; allowed: auto|INT"),
        (["--epochs", "1.5"], "'1.5' is not allowed; allowed: auto|INT"),
        (["--method", "magic"], "allowed: appended|gpr|2sft|mcip|mcip+rea|rea|mcip+"),
        (["--threshold", "low"], "allowed: auto|FLOAT"),
        (["--aug-cfg", "scale"], "'scale' is not of the form key=value"),
        (["--epoch", "3"], "unrecognized arguments: --epoch 3; did you mean '--epochs'?"),
        (["--report-to", "paper"], "allowed: tensorboard|wandb|trackio"),
    ],
)
def test_words_that_are_wrong(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        main([*TRAIN, *words])
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


# --config


def test_config_file_with_flags_over_it(tmp_path: Path) -> None:
    written = TrainConfig(model="m", train_data=("a", "b"), out="o", captions="c", lr=3e-4, k=5)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(written.to_dict()))
    assert parse("train", "--config", str(path)) == written
    got = parse("train", "--config", str(path), "--lr", "1e-6", "--train-data", "x")
    assert got == dataclasses.replace(written, lr=1e-6, train_data="x")


def test_a_yaml_file_of_options(tmp_path: Path) -> None:
    path = tmp_path / "options.yml"
    path.write_text(
        "model: m\n"
        "train_data: [a, b]\n"
        "out: o\n"
        "captions: c  # a corpus\n"
        "lr: 1e-5\n"  # a text in YAML 1.1
        "wd: -0\n"
        "eps: 2.5e-8\n"
        "grad_clip_norm: null\n"
        "wd_exempt: no\n"
        "aug_cfg: {scale: [0.5, 1], color_jitter: 2E-1}\n"
    )
    assert parse("train", "--config", str(path), "--k", "5") == TrainConfig(
        model="m", train_data=("a", "b"), out="o", captions="c", lr=1e-5, wd=0, eps=2.5e-8,
        grad_clip_norm=None, wd_exempt=False, aug_cfg={"scale": [0.5, 1], "color_jitter": 0.2}, k=5,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", "is not YAML: while parsing"),
        ("- a", "holds list; needed: lines of the form option: value"),
        ("1: a", "needed: lines of the form option: value"),
        ("!!python/object/apply:os.getcwd []", "is not YAML: could not determine a constructor"),
    ],
)
def test_yaml_files_that_are_wrong(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "options.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        parse("train", "--config", str(path))


def test_yaml_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "options.yaml"
    path.write_text("model: m")
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(MissingDependencyError, match="pip install pyyaml; or write"):
        parse("train", "--config", str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("{", "is not JSON"),
        ("[1]", "holds list; needed: a JSON object"),
        ('{"learning_rate": 1}', "unknown option 'learning_rate'"),
        ("{}", "model is required"),
        ('{"model": "m", "data": "d", "knn_k": 0}', "knn_k=0"),
    ],
)
def test_config_files_that_are_wrong(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        parse("evaluate", "--config", str(path))


# --print-completion


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_the_options(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit) as raised:
        main(["--print-completion", shell])
    assert raised.value.code == 0
    script = capsys.readouterr().out
    assert all(name in script for name in COMMANDS)
    assert "--caption-table" in script


def test_completion_says_what_it_needs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit) as raised:
        main(["--print-completion", "bash"])
    assert raised.value.code == 2
    assert "pip install 'pymcip[completion]'" in capsys.readouterr().err


# Errors and exit statuses


def test_errors_are_one_clean_message(
    stage: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    stage.result = DataError("there is nothing at x; give an existing file")
    assert main(TRAIN) == 2
    shown = capsys.readouterr()
    assert shown.err == "pymcip train: there is nothing at x; give an existing file\n"
    assert shown.out == ""


def test_all_missing_options_are_named_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--lr", "1e-5"]) == 2
    shown = capsys.readouterr().err
    for name in ("model", "train_data", "out"):
        assert f"- {name} is required" in shown


def test_debug_shows_the_traceback(stage: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.result = DataError("nothing there")
    with pytest.raises(DataError):
        main([*TRAIN, "--debug"])
    monkeypatch.setenv("PYMCIP_DEBUG", "1")
    with pytest.raises(DataError):
        main(TRAIN)
    monkeypatch.setenv("PYMCIP_DEBUG", "0")
    assert main(TRAIN) == 2


def test_errors_of_the_system_are_one_message_too(
    stage: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    stage.result = OSError(28, "No space left on device", "runs/x/checkpoints/1.pt")
    assert main(TRAIN) == 1
    wanted = "pymcip train: [Errno 28] No space left on device: 'runs/x/checkpoints/1.pt'\n"
    assert capsys.readouterr().err == wanted


def test_errors_that_are_bugs_are_not_hidden(stage: SimpleNamespace) -> None:
    stage.result = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        main(TRAIN)


def test_interrupted_from_the_keyboard(
    stage: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    stage.result = KeyboardInterrupt()
    assert main(TRAIN) == 130
    assert capsys.readouterr().err == "pymcip train: interrupted\n"


@dataclass(frozen=True)
class Trained:
    out: Path
    metrics: dict[str, float]
    before: dict[str, float]
    interrupted: str | None
    hub: Path | None = None
    markdown = "| table |"


@pytest.mark.parametrize(("name", "status"), [(None, 0), ("SIGINT", 130), ("SIGTERM", 143)])
def test_status_of_a_training(
    stage: SimpleNamespace,
    name: str | None,
    status: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stage.result = Trained(Path("runs/x"), {"i2i_map": 40.0}, {"i2i_map": 36.5}, name)
    assert main(TRAIN) == status
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1]) == {
        "out": "runs/x",
        "metrics": {"i2i_map": 40.0},
        "before": {"i2i_map": 36.5},
        "interrupted": name,
        "hub": None,
    }
    assert "| table |" in lines
    assert stage.configs[0].lr == "auto"


def test_only_the_first_process_speaks(
    stage: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    stage.result = Trained(Path("runs/x"), {}, {}, None)
    assert main(TRAIN) == 0
    assert capsys.readouterr().out == ""


# The stages themselves


def last_line(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_embed_mine_evaluate_export(
    tiny_model_dir: Path,
    tiny_images: Callable[..., Path],
    captions_file: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    images, captions, emb = tiny_images(), captions_file(), tmp_path / "emb"
    model = ["--model", str(tiny_model_dir), "--device", "cpu"]
    sources = ["--images", str(images), "--captions", str(captions)]
    assert main(["embed", *model, *sources, "--out", str(emb)]) == 0
    assert last_line(capsys) == {"out": str(emb), "skipped": 0, "images": 12, "captions": 8}
    mined = ["mine", "--images", str(emb), "--out", str(tmp_path / "mined")]
    assert main([*mined, "--threshold", "-1", "--k", "2"]) == 0
    *table, line = capsys.readouterr().out.splitlines()
    assert json.loads(line) == {"out": str(tmp_path / "mined"), "threshold": -1, "missing": 0}
    for row in (
        "| images with captions | 12 (100%) |",
        "| captions of each of these, mean | 2.0 |",
        "| captions of the corpus | 8 |",
        "| lowest cosine allowed | -1.000 (given) |",
    ):
        assert row in table
    assert main([*mined, "--k", "3"]) == 2
    assert "overwrite" in capsys.readouterr().err
    evaluated = ["evaluate", *model, "--data", str(images), "--baseline", str(tiny_model_dir)]
    assert main([*evaluated, "--out", str(tmp_path / "eval")]) == 0
    shown_text = capsys.readouterr().out
    shown = json.loads(shown_text.splitlines()[-1])
    assert shown["metrics"] == shown["baseline"]
    assert "| image-to-image mAP |" in shown_text
    written = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert written["metrics"] == shown["metrics"]
    exported = ["export", *model, "--out", str(tmp_path / "export"), "--index", str(emb)]
    assert main(exported) == 0
    shown = last_line(capsys)
    for name in ("state_dict", "hub", "index"):
        assert Path(shown[name]).exists()


def test_environment(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    shown = capsys.readouterr().out
    for word in ("python", "torch", "open_clip"):
        assert word in shown


# As a program


def test_help_and_version_are_quick_and_need_no_torch() -> None:
    code = (
        "import sys\n"
        "from pymcip.cli import main\n"
        "try:\n"
        "    main(sys.argv[1:])\n"
        "except SystemExit as done:\n"
        "    assert done.code == 0\n"
        "assert not {'torch', 'numpy', 'open_clip'} & set(sys.modules)\n"
    )
    for word in ("--help", "--version"):
        done = subprocess.run(
            [sys.executable, "-c", code, word], capture_output=True, text=True, check=True
        )
        assert "pymcip" in done.stdout
    assert done.stdout == f"pymcip {pymcip.__version__}\n"


def test_module_runs_as_a_program(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pymcip", "evaluate", "--model", "m"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("pymcip evaluate: give data= ")
    assert "Traceback" not in done.stderr


def test_no_command_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main([])
    assert raised.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_every_stage_has_a_command() -> None:
    names = {"check", "embed", "mine", "train", "evaluate", "export", "demo", "sweep", "index"}
    assert set(COMMANDS) == names | {"search", "serve", "runs"}
    for command in COMMANDS.values():
        assert issubclass(command.config, Config)
    assert isinstance(build_parser(), argparse.ArgumentParser)
    assert cli.STATUSES[PymcipError] == 2
    assert EvaluateConfig is COMMANDS["evaluate"].config
