"""LoRA: every layout trains the adapters that one rank does, and leaves all other weights as they were."""

from __future__ import annotations

from typing import Any

import pytest

from tests.parity.figures import Pool
from tests.parity.matrix import ENGINES, ZERO_STAGES, parity_config

slow = [pytest.mark.slow, pytest.mark.acceptance]
LORA = {"rank": 4, "alpha": 24.0, "dropout": 0.25}
SECTIONS: dict[str, Any] = {"lora": LORA, "run": {"init_from": "unused"}, "optimizer": {"lr": 1.0e-2}}
NUM_STEPS = 5
QUICK = [
    ("llama_tied", 2, {"tensor": 2, "sequence": True, "zero_stage": 0}),
    ("gpt2", 2, {"tensor": 2, "zero_stage": 2}),
    ("llama_tied", 2, {"pipeline": 2, "recompute": "full"}),
    ("llama", 2, {"zero_stage": 3}),
    ("gpt2_tied", 2, {"pipeline": 2, "engine": "fsdp2", "zero_stage": 3}),
]
SHARDINGS = [{"engine": engine, "zero_stage": stage} for engine in ENGINES for stage in ZERO_STAGES]
SPLIT = {"tensor": 2, "recompute": "full"}
LONG = [
    *(("llama_tied", 2, sharding) for sharding in SHARDINGS),
    *(("llama_mqa", 4, {**SPLIT, "sequence": True, **sharding}) for sharding in SHARDINGS),
    *(("gpt2", 4, {**SPLIT, **sharding}) for sharding in SHARDINGS),
    ("gpt2", 2, {"zero_stage": 2, "offload": "optimizer"}),
    ("llama_tied", 2, {"zero_stage": 3, "offload": "all"}),
    ("llama_mqa", 4, {"tensor": 4, "sequence": True, "recompute": "selective"}),
    ("qwen3", 4, {"tensor": 2, "pipeline": 2, "sequence": True}),
    ("gpt2_tied", 4, {"tensor": 2, "pipeline": 2, "pipeline_chunks": 2, "engine": "fsdp2"}),
    ("llama_tied", 8, {"tensor": 2, "pipeline": 2, "sequence": True, "recompute": "full"}),
]


@pytest.mark.parametrize(
    ("model", "num_ranks", "parallel"), [*QUICK, *(pytest.param(*case, marks=slow) for case in LONG)]
)
def test_a_layout_trains_the_same_adapters(model: str, num_ranks: int, parallel: dict[str, Any], pool: Pool) -> None:
    config = parity_config(pool.data, model, **SECTIONS, parallel=parallel)
    found, alone = pool.train(num_ranks, config, NUM_STEPS), pool.alone(model, NUM_STEPS, **SECTIONS)
    found.assert_equals(alone)
    assert all(".lora_" in name for name in found.weights)
    assert all(weight.any() for weight in found.weights.values())  # B is zero at first
