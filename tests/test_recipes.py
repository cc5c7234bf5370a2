"""Recipes: named settings of train that options override."""

from __future__ import annotations

import pytest

from pymcip.cli import COMMANDS, build_parser, main, make_config
from pymcip.configs import TrainConfig
from pymcip.configs.recipes import read_recipe, recipe_names
from pymcip.errors import ConfigError

GIVEN = {"model": "m", "train_data": "d", "captions": "c", "out": "o"}


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_is_what_train_takes(name: str) -> None:
    recipe = read_recipe(name)
    config = TrainConfig.make(None, {**GIVEN, "recipe": name})
    assert {key: getattr(config, key) for key in recipe["settings"]} == recipe["settings"]
    assert recipe.keys() == {"about", "source", "date", "settings", "not reproduced"}
    assert all(recipe["not reproduced"].values())


def test_options_override_a_recipe() -> None:
    config = TrainConfig.make(None, {**GIVEN, "recipe": "authors-siglip", "k": 3})
    assert (config.k, config.positives) == (3, "compete")
    options = vars(build_parser().parse_args(["train", "--recipe", "paper", "--margin", "0.5"]))
    command = COMMANDS[options.pop("command")]
    config = make_config(command.config, {**GIVEN, **options})  # type: ignore[assignment]
    assert (config.method, config.margin) == ("mcip+rea", 0.5)


def test_a_recipe_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="authors-siglip, paper, pymcip; did you mean 'paper'"):
        TrainConfig.make(None, {**GIVEN, "recipe": "papers"})


def test_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    shown = capsys.readouterr().out
    for name in recipe_names():
        assert f"{name}: {read_recipe(name)['about']}\n" in shown
    assert "positives=compete" in shown
    assert "repel=0.1" in shown
    assert "choice of weights: evaluated 200 times" in shown


def test_a_recipe_that_extends_another() -> None:
    base, own = read_recipe("authors-siglip"), read_recipe("authors-openai")
    differing = {"lambda_class": 0.5, "lambda_caption": 0.5, "patch_dropout": 0.0}
    assert own["settings"] == {**base["settings"], **differing}
    assert base["not reproduced"].keys() < own["not reproduced"].keys()
