"""Every recipe loads, and is legal on the hardware that its name says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatrain.config import dump, load
from megatrain.plan import rules

RECIPES = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))


def named_world_size(recipe: Path) -> int:
    devices = re.search(r"_(\d+)x(?:gpu|h100)$", recipe.stem)
    return int(devices[1]) if devices else 1


def test_there_are_recipes_from_a_laptop_to_a_cluster():
    assert {named_world_size(recipe) for recipe in RECIPES} == {1, 8, 64, 256, 1024}
    assert "tiny_cpu" in {recipe.stem for recipe in RECIPES}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_is_legal_at_the_size_in_its_name(recipe, tmp_path):
    config = load(recipe)
    rules.check(config, named_world_size(recipe))
    resolved = tmp_path / "config.yaml"
    resolved.write_text(dump(config), encoding="utf-8")
    assert load(resolved) == config


def test_the_laptop_recipe_runs_on_two_ranks_too():
    assert rules.problems(load(next(recipe for recipe in RECIPES if recipe.stem == "tiny_cpu")), 2) == []
