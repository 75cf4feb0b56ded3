"""The pipeline's runtime by itself, on four ranks of gloo with chunks of one matrix."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatrain.distributed.bootstrap import free_port
from megatrain.parallel.pipeline import seeded
from megatrain.plan.pipeline_schedule import most_held

NUM_RANKS = 4


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank of pipeline_rank.py has seen, by case: ranks of the pipeline, chunks, micro-batches."""
    folder, port = tmp_path_factory.mktemp("pipeline"), str(free_port())
    paths = [folder / f"{rank}.json" for rank in range(NUM_RANKS)]
    command = [sys.executable, "-m", "tests.unit.parallel.pipeline_rank"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [*command, str(rank), port, str(path)],
            env=environment,
            stderr=subprocess.PIPE,
            cwd=Path(__file__).parents[3],
        )
        for rank, path in enumerate(paths)
    ]
    errors = [rank.communicate(timeout=200)[1].decode() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * NUM_RANKS, "\n".join(errors)
    return [json.loads(path.read_text()) for path in paths]


def test_gradients_are_those_without_a_pipeline(seen: list[dict[str, Any]]) -> None:
    errors = {case: figures["error"] for rank in seen for case, figures in rank.items() if "error" in figures}
    assert len(errors) == 1 + 2 * 3 * 5 + 4
    assert max(errors.values()) < 1e-6


@pytest.mark.parametrize(("p", "v"), [(2, 1), (2, 2), (4, 1), (4, 2)])
def test_more_micro_batches_take_no_more_memory(seen: list[dict[str, Any]], p: int, v: int) -> None:
    for rank, figures in enumerate(seen):
        short, long = figures[f"{p}-{v}-8"], figures[f"{p}-{v}-long"]
        assert long["most_inputs"] <= short["most_inputs"]
        assert long["most_inputs"] <= max(most_held(p, v, m, rank % p, [1] * v) for m in (31, 32))
        assert long["most_outputs"] <= 1  # what was sent is not kept for the backward pass


@pytest.mark.parametrize(("p", "v"), [(2, 1), (2, 2), (4, 1), (4, 2)])
def test_evaluation_streams_its_micro_batches(seen: list[dict[str, Any]], p: int, v: int) -> None:
    for figures in seen:
        case = figures[f"{p}-{v}-evaluation"]
        assert case["ahead"] <= p and case["most_inputs"] <= 1 and case["most_outputs"] <= 1


def test_a_seeded_scalar_passes_gradients_on() -> None:
    x = torch.ones(3, requires_grad=True)
    gradients: list[torch.Tensor] = []
    scalar = seeded([2 * x, x.sum()], gradients)
    gradients += [torch.tensor([1.0, 2.0, 3.0]), torch.tensor(10.0)]
    torch.autograd.backward(8.0 * scalar)
    assert x.grad is not None and x.grad.tolist() == [12.0, 14.0, 16.0]
