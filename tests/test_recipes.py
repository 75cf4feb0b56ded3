"""Every recipe for one GPU trains for some steps: as it is on a GPU; scaled down, where there is none, on the CPU."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatrain.config import load
from tests.runs import Metrics, TinyData
from tests.served import ServedRanks

RECIPES = sorted((Path(__file__).parents[1] / "configs").glob("*_1xgpu.yaml"))
HAS_GPU = torch.cuda.is_available()
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


@pytest.mark.gpu
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
@pytest.mark.parametrize("place", ["on a GPU" if HAS_GPU else "scaled down on the CPU"])
def test_a_recipe_for_one_gpu_learns(
    place: str, recipe: Path, tiny_data: TinyData, one_rank: ServedRanks, tmp_path: Path
) -> None:
    overrides = [
        f"run.dir={tmp_path / 'run'}",
        f"data.train.0.path={tiny_data.prose}",
        f"data.validation.0.path={tiny_data.held_out}",
        f"train.steps={NUM_STEPS}",
        "train.eval_batches=1",
        "schedule.warmup_steps=1",
    ]
    if HAS_GPU:
        # Two micro-batches are enough to see that they add up; the recipe's own batch is hundreds of sequences.
        overrides.append(f"train.global_batch_size={2 * load(recipe).train.micro_batch_size}")
        command = [sys.executable, "-m", "megatrain", "train", str(recipe), *overrides, "--procs", "1"]
        ended = subprocess.run(command, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stdout + ended.stderr
    else:
        one_rank.finish(recipe, *overrides, *SCALED_DOWN)
    metrics = Metrics.read(tmp_path / "run")
    assert metrics.steps == list(range(1, NUM_STEPS + 1))
    assert all(map(math.isfinite, metrics.losses + metrics.norms))
    assert sum(metrics.losses[-5:]) / 5 < sum(metrics.losses[:5]) / 5 - 0.02  # single batches differ by as much


def test_there_are_recipes_for_one_gpu() -> None:
    assert len(RECIPES) >= 3
