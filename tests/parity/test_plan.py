"""What `megatrain plan` names is what real ranks hold; pipelines too, which a lone rank cannot step."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.layouts import Layout, measure
from megatrain.config import RunConfig
from megatrain.plan.activations import activations
from megatrain.plan.memory import rank_memory
from megatrain.plan.stage_model import stage_models

LAYOUTS = [
    Layout(2, "bf16", {"zero_stage": 0, "pipeline": 2}),
    Layout(2, "bf16", {"zero_stage": 0, "recompute": "full"}),
    Layout(2, "bf16", {"zero_stage": 0, "tensor": 2, "sequence": True, "recompute": "selective"}),
    Layout(2, "bf16", {"zero_stage": 3}),
    Layout(2, "bf16", {"zero_stage": 1, "pipeline": 2, "pipeline_chunks": 2}),
    Layout(2, "bf16", {"zero_stage": 1, "engine": "fsdp2"}),
    Layout(2, "bf16", {"zero_stage": 2, "engine": "fsdp2", "pipeline": 2}),
]


@pytest.fixture(scope="module")
def measured() -> dict[str, list[dict[str, Any]]]:
    return dict(zip((layout.name for layout in LAYOUTS), measure(LAYOUTS), strict=True))


@pytest.mark.sample(1)
@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_each_stage_holds_what_the_plan_says(layout: Layout, measured: dict[str, list[dict[str, Any]]]) -> None:
    config = RunConfig.model_validate(layout.config)
    for part in stage_models(config, layout.num_ranks):
        memory = rank_memory(part)
        real = next(figures for figures in measured[layout.name] if figures["stage"] == part.stage)
        state = (memory.weights_bytes, memory.gradients_bytes, memory.optimizer_bytes)
        assert state == (real["parameters"], real["gradients"], real["optimizer"])
        assert activations(part, on_cpu=True) == pytest.approx(real["activations"], rel=0.02)
