"""Every recipe for one GPU trains for some steps: as it is on a GPU, and scaled down on the CPU."""

from __future__ import annotations

import math
import pydoc_data.topics
import subprocess
import sys
from pathlib import Path

import pytest

from data_tools.supervised import SourceAndTarget
from megatrain.config import load, recipes
from tests.masked_data import make_masked_data
from tests.runs import Metrics, TinyData
from tests.served import ServedRanks
from tests.supervised import make_answers

RECIPES = [name for name in recipes.names() if name.endswith("_1xgpu")]
NUM_STEPS = 24
SCALED_DOWN = [
    "model.hidden_size=64",
    "model.intermediate_size=128",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=4",
    "model.num_key_value_heads=4",
    "model.max_position_embeddings=64",
    "model.vocab_size=512",
    "data.seq_len=64",
    "train.micro_batch_size=2",
    "train.global_batch_size=4",
]


OVERRIDES = [f"train.steps={NUM_STEPS}", "train.eval_batches=1", "schedule.warmup_steps=1"]


def check_that_it_learned(run_dir: Path) -> None:
    metrics = Metrics.read(run_dir)
    assert metrics.steps == list(range(1, NUM_STEPS + 1))
    assert all(map(math.isfinite, metrics.losses + metrics.norms))
    assert sum(metrics.losses[-5:]) / 5 < sum(metrics.losses[:5]) / 5 - 0.02  # single batches differ by as much


@pytest.fixture
def data(recipe: str, tiny_data: TinyData, tmp_path: Path) -> TinyData:
    """What the recipe's objective is trained on."""
    config = load(recipe)
    if config.objective.of(config.model) == "masked_lm":
        return make_masked_data(tmp_path)
    if config.objective.of(config.model) == "sequence_to_sequence":
        topics = [line for text in pydoc_data.topics.topics.values() for line in text.splitlines() if line.strip()]
        numbered = [(line, f"{len(line)} {line}") for line in topics[:400]]
        pairs = make_answers(tmp_path, numbered, tiny_data.tokenizer, SourceAndTarget("<|endoftext|>", None))
        return TinyData(pairs, pairs, pairs, tiny_data.tokenizer)
    return tiny_data


def places(data: TinyData, run_dir: Path) -> list[str]:
    return [f"run.dir={run_dir}", f"data.train.0.path={data.prose}", f"data.validation.0.path={data.held_out}"]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.slow
def test_a_recipe_scaled_down_learns_on_the_cpu(
    recipe: str, data: TinyData, one_rank: ServedRanks, tmp_path: Path
) -> None:
    one_rank.finish(Path(recipe), *OVERRIDES, *places(data, tmp_path / "run"), *SCALED_DOWN)
    check_that_it_learned(tmp_path / "run")


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_for_one_gpu_learns(recipe: str, data: TinyData, tmp_path: Path) -> None:
    # Two micro-batches are enough to see that they add up; the recipe's own batch is hundreds of sequences.
    batch = f"train.global_batch_size={2 * load(recipe).train.micro_batch_size}"
    overrides = [*OVERRIDES, *places(data, tmp_path / "run"), batch]
    command = [sys.executable, "-m", "megatrain", "train", recipe, *overrides, "--procs", "1"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    check_that_it_learned(tmp_path / "run")
