"""Every recipe loads, is legal on the hardware that its name says, and is what `plan` would choose for it."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import sys
from typing import Any

import pytest

from megatrain import cli
from megatrain.config import RunConfig, dump, load, recipes
from megatrain.plan import rules
from megatrain.plan.cluster import Cluster
from megatrain.plan.run_plan import Interruptions, make_plan

RECIPES = recipes.names()
PLANNED = [name for name in RECIPES if not name.startswith("tiny_")]
ROOM = 0.9
"""Of a GPU's memory: the rest is for CUDA, NCCL and fragmentation, which plan does not count."""


def named_world_size(recipe: str) -> int:
    devices = re.search(r"_(\d+)x(?:gpu|h100)$", recipe)
    return int(devices[1]) if devices else 1


def command_of(recipe: str) -> list[str]:
    """The `plan` of its header."""
    (line,) = re.findall(r"^# megatrain (plan .*)$", recipes.text(recipe), re.M)
    return shlex.split(line)


def cluster_of(recipe: str) -> Cluster:
    words = command_of(recipe)
    options = dict(zip(words[2::2], words[3::2], strict=True))
    nodes, gpus = int(options["--nodes"]), int(options["--gpus-per-node"])
    assert nodes * gpus == named_world_size(recipe)
    return Cluster.of(nodes, gpus, options.get("--device", "h100"), 400.0)


def plan_of(config: RunConfig, cluster: Cluster) -> dict[str, Any]:
    return make_plan(config, cluster, Interruptions(6300.0, 600.0, None)).to_json()


def fits(plan: dict[str, Any], cluster: Cluster) -> bool:
    return max(rank["peak_bytes"] for rank in plan["ranks"]) <= ROOM * cluster.device.memory_bytes


def test_recipes_range_from_laptop_to_cluster():
    assert {named_world_size(recipe) for recipe in RECIPES} == {1, 8, 32, 64, 256, 1024}
    configs = [load(recipe) for recipe in RECIPES]
    assert {config.model.family for config in configs} == {"llama", "gpt2", "qwen3", "marian", "bert"}
    assert {config.schedule.type for config in configs} == {"cosine", "wsd", "inverse_sqrt", "linear"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_summary_is_a_whole_sentence(recipe):
    """One that names a source, "et al. 2018", goes on behind it."""
    said = recipes.summary(recipe)
    assert said.count("(") == said.count(")")
    assert said.count('"') % 2 == 0
    assert ". " not in said.replace("et al. ", "")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_legal_at_its_size(recipe, tmp_path):
    config = load(recipe)
    rules.check(config, named_world_size(recipe))
    resolved = tmp_path / "config.yaml"
    resolved.write_text(dump(config), encoding="utf-8")
    assert load(resolved) == config


def test_the_laptop_recipe_runs_on_two_ranks_too():
    assert rules.problems(load("tiny_cpu"), 2) == []


@pytest.mark.parametrize("recipe", PLANNED)
def test_the_header_says_what_plan_says(recipe, monkeypatch, capsys):
    command = command_of(recipe)
    assert command[:2] == ["plan", recipe]
    monkeypatch.setattr(sys, "argv", ["megatrain", *command, "--json"])
    with pytest.raises(SystemExit):
        cli.main()
    plan = json.loads(capsys.readouterr().out)
    peak = max(rank["peak_bytes"] for rank in plan["ranks"]) / 1e9
    figures = (
        f"#   {peak:.1f} GB a GPU, {plan['tokens_per_second']:,.0f} tokens/s, MFU {plan['mfu']:.1%}, "
        f"{plan['days']:.1f} days, a save every {plan['checkpoint_every_steps']} steps"
    )
    assert figures in recipes.text(recipe).splitlines()
    assert plan["problems"] == []
    assert 0.8 <= load(recipe).checkpoint.every_steps / plan["checkpoint_every_steps"] <= 2.0


@pytest.mark.parametrize("recipe", PLANNED)
def test_nothing_is_recomputed_where_all_fits(recipe):
    config, cluster = load(recipe), cluster_of(recipe)
    levels = ("none", "selective", "full")
    for level in levels[: levels.index(config.parallel.recompute)]:
        lighter = config.model_copy(update={"parallel": config.parallel.model_copy(update={"recompute": level})})
        assert not fits(plan_of(lighter, cluster), cluster)
    assert fits(plan_of(config, cluster), cluster)


@pytest.mark.sample(1)
@pytest.mark.slow
@pytest.mark.parametrize("recipe", PLANNED)
def test_no_other_layout_is_much_faster(recipe):
    """By 5%, as plan sees it, under the same engine and with as many chunks."""
    config, cluster = load(recipe), cluster_of(recipe)
    speed = plan_of(config, cluster)["tokens_per_second"]
    degrees = itertools.product((1, 2, 4, 8), (1, 2, 4, 8, 16), (1, 2, 3), ("none", "selective", "full"))
    for tensor, pipeline, stage, recompute in degrees:
        layout = {"tensor": tensor, "pipeline": pipeline, "zero_stage": stage, "recompute": recompute}
        parallel = config.parallel.model_copy(update={**layout, "sequence": tensor > 1})
        other = config.model_copy(update={"parallel": parallel})
        if not rules.problems(other, named_world_size(recipe)):
            plan = plan_of(other, cluster)
            assert plan["tokens_per_second"] < 1.05 * speed or not fits(plan, cluster), layout
