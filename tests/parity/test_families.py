"""Families beside llama and gpt2: qwen3, whose norms of queries and keys see a part of the heads, and others."""

from __future__ import annotations

from typing import Any

import pytest

from tests.parity.figures import Pool

slow = pytest.mark.slow
NUM_STEPS = 5


@pytest.mark.parametrize(
    ("model", "num_ranks", "parallel"),
    [
        ("qwen2", 2, {"tensor": 2, "sequence": True}),
        pytest.param("qwen2", 2, {"pipeline": 2}, marks=slow),
        pytest.param("qwen2", 4, {"tensor": 4, "zero_stage": 3}, marks=slow),
        pytest.param("qwen2", 4, {"tensor": 2, "pipeline": 2, "recompute": "full"}, marks=slow),
        ("qwen3", 2, {"tensor": 2}),
        ("qwen3", 2, {"pipeline": 2}),
        ("bert", 2, {"tensor": 2, "sequence": True, "recompute": "full"}),
        ("bert", 2, {"pipeline": 2}),
        pytest.param("bert", 2, {"zero_stage": 3}, marks=slow),
        pytest.param("bert", 2, {"zero_stage": 2, "recompute": "selective"}, marks=slow),
        pytest.param("bert", 2, {"engine": "fsdp2", "pipeline": 2, "pipeline_chunks": 2}, marks=slow),
        pytest.param("bert", 4, {"tensor": 2, "pipeline": 2, "sequence": True}, marks=slow),
        pytest.param("bert", 4, {"tensor": 4, "zero_stage": 3}, marks=slow),
        pytest.param("bert", 4, {"engine": "fsdp2", "tensor": 2, "zero_stage": 3, "sequence": True}, marks=slow),
        pytest.param("bert_untied", 4, {"tensor": 2, "pipeline": 2}, marks=slow),
        pytest.param("bert_untied", 2, {"engine": "fsdp2", "zero_stage": 3}, marks=slow),
        ("mistral", 2, {"tensor": 2, "sequence": True}),
        pytest.param("mistral", 2, {"pipeline": 2}, marks=slow),
        pytest.param("mistral", 4, {"tensor": 2, "pipeline": 2, "recompute": "selective"}, marks=slow),
        pytest.param("qwen3", 2, {"tensor": 2, "sequence": True, "recompute": "full"}, marks=slow),
        pytest.param("qwen3", 2, {"zero_stage": 3}, marks=slow),
        pytest.param("qwen3_mqa", 4, {"tensor": 4, "zero_stage": 2}, marks=slow),
        pytest.param("qwen3_mqa", 4, {"tensor": 2, "zero_stage": 3, "recompute": "selective"}, marks=slow),
        pytest.param("qwen3", 4, {"tensor": 2, "pipeline": 2, "sequence": True}, marks=slow),
        pytest.param("qwen3", 4, {"tensor": 4, "sequence": True}, marks=slow),
    ],
)
def test_a_layout_trains_as_one_rank_does(model: str, num_ranks: int, parallel: dict[str, Any], pool: Pool) -> None:
    config = pool.config(model, parallel=parallel)
    pool.train(num_ranks, config, NUM_STEPS).assert_equals(pool.alone(model, NUM_STEPS))
