"""The recipes that come with the package: each of them trains; an unknown one is refused with the known ones."""

import re

import pytest
import yaml
from helpers.refusal import refused

from sparse_adv import recipes, runs
from sparse_adv.__main__ import main
from sparse_adv.config import TrainConfig

TINY = ("--arch", "digits_cnn", "--width", "4", "--limit", "96", "--validation", "32", "--epochs", "1")
QUICK = ("--batch-size", "32", "--evaluation-steps", "1", "--steps", "1")


@pytest.mark.parametrize("name", recipes.names())
def test_a_recipe_trains(name, tmp_path):
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    recipe = yaml.safe_load(recipes.path(name).read_text())
    assert main(["train", "--config", f"recipe:{name}", *TINY, *QUICK, "--out", str(tmp_path)]) == 0
    run = runs.read(tmp_path)
    assert run.info.train.objective == recipe["objective"]
    assert run.info.train.schedule == "onecycle" and run.info.train.ema_decay == 0.9995
    assert run.records[-1].robust_accuracy is not None


def test_a_search_takes_a_recipe(tmp_path):
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    assert main(["search", "--config=recipe:fastat-nu-at", *TINY, *QUICK, "--out", str(tmp_path)]) == 0
    assert runs.read(tmp_path).info.train.objective == "nu-at" and (tmp_path / runs.TICKET).exists()


@pytest.mark.parametrize("name", recipes.names())
def test_a_recipe_names_its_source_what_was_published_and_what_was_measured(name):
    text = recipes.path(name).read_text()
    assert re.search(
        r"^# Published, .*: clean [\d.]+ %, AutoAttack at 8/255 [\d.]+ %, [\d,]+ s of training\.$", text, re.M
    )
    assert re.search(r"^# Ours: ", text, re.M) and "arXiv 2604.22853" in text
    recipe = yaml.safe_load(text)
    defaults = TrainConfig(recipe["objective"])
    assert recipe.get("beta", defaults.second_weight) == defaults.second_weight


@pytest.mark.parametrize("command", ["train", "search"])
@pytest.mark.parametrize("flags", [("--config", "recipe:n-fgsm"), ("--config=recipe:n-fgsm",)])
def test_an_unknown_recipe_is_refused_with_the_known_ones(command, flags, tmp_path, capsys):
    said = refused(capsys, command, *flags, "--out", str(tmp_path))
    assert f"recipe must be one of {', '.join(recipes.names())}, got 'n-fgsm'" in said
    assert len(recipes.names()) == 6
