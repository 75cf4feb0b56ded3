"""Gradients of half precision are scaled without a bias, and fp16's own scale grows and falls without one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity.figures import Pool, gather_state
from tests.parity.matrix import parity_config

slow = pytest.mark.slow
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {"zero_stage": 0}),
    "zero 1": (2, {"zero_stage": 1}),
    "zero 2": (2, {"zero_stage": 2}),
    "zero 3": (2, {"zero_stage": 3}),
    "tensor": (2, {"tensor": 2}),
    "pipeline": (2, {"pipeline": 2}),
    "optimizer offloaded": (2, {"zero_stage": 2, "offload": "optimizer"}),
    "fsdp2 zero 1": (2, {"engine": "fsdp2", "zero_stage": 1}),
    "fsdp2 zero 3": (2, {"engine": "fsdp2", "zero_stage": 3}),
    "fsdp2 tensor": (2, {"engine": "fsdp2", "tensor": 2}),
    "fsdp2 pipeline": (2, {"engine": "fsdp2", "pipeline": 2, "pipeline_chunks": 2}),
}

QUICK = ("one rank", "tensor", "zero 2")


def answer(pool: Pool, layout: str, train: dict[str, Any], **case: Any) -> dict[str, Any]:
    num_ranks, parallel = LAYOUTS[layout]
    config = parity_config(pool.data, "llama_tied", parallel=parallel, train=train)
    return pool.answer(num_ranks, {"config": config, **case})


@pytest.mark.sample(3)
@pytest.mark.parametrize("layout", [pytest.param(name, marks=() if name in QUICK else slow) for name in LAYOUTS])
def test_bf16_gradients_are_proportional_to_one_over_targets(layout: str, pool: Pool) -> None:
    """bf16 rounds 1/344 by 0.26%; 1/510 of any bf16 number is rounded up. 1/512 is exact."""
    norms = {
        count: answer(pool, layout, {"precision": "bf16"}, num_steps=1, counted=count)["norms"][0]
        for count in (344, 510, 512)
    }
    for count in (344, 510):
        assert norms[count] * count == pytest.approx(norms[512] * 512, rel=1e-6)


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "layout", ["zero 2", *(pytest.param(name, marks=slow) for name in LAYOUTS if name != "zero 2")]
)
def test_a_growing_loss_scale_leaves_gradients_alone(layout: str, pool: Pool, tmp_path: Path) -> None:
    """It doubles at every step but the first. DeepSpeed by itself halves the gradient of such a step."""
    moments = []
    for window in (1, 1000):
        train = {"precision": "fp16", "initial_loss_scale_power": 8, "loss_scale_window": window}
        folder = tmp_path / str(window)
        saved = answer(pool, layout, train, num_steps=3, save=str(folder))["saved"]
        assert saved["loss_scale"]["cur_scale"] == (2**10 if window == 1 else 2**8)
        moments.append(torch.cat([value for (_, kind), value in gather_state(folder).items() if kind == "exp_avg"]))
    assert (moments[0] - moments[1]).norm() < 0.01 * moments[1].norm()


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "layout", ["one rank", "zero 2", *(pytest.param(n, marks=slow) for n in ("zero 1", "zero 3", "fsdp2 zero 1"))]
)
def test_fp16_at_its_least_scale_leaves_updates_out(layout: str, pool: Pool) -> None:
    train = {"precision": "fp16", "initial_loss_scale_power": 0}
    found = answer(pool, layout, train, num_steps=5, poisoned_step=0, num_poisoned=4)
    assert found["skipped"] == [True] * 4 + [False]
    assert math.isfinite(found["norms"][4])
