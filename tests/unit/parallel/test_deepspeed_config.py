"""RunConfig to DeepSpeed's JSON."""

from __future__ import annotations

from typing import Any

import pytest

from megatrain.config import RunConfig
from megatrain.parallel.deepspeed_config import deepspeed_config


def settings(deepspeed: dict[str, Any] | None = None, parallel: dict[str, Any] | None = None, **train: Any) -> Any:
    config = RunConfig.model_validate(
        {
            "run": {"dir": "unused"},
            "model": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512},
            "data": {"train": [{"path": "unused"}], "seq_len": 64},
            "train": {"steps": 10, "global_batch_size": 24, "micro_batch_size": 2, **train},
            "optimizer": {"lr": 1.0e-3},
            "parallel": parallel or {},
            "deepspeed": deepspeed or {},
        }
    )
    return deepspeed_config(config, data_size=4, num_parameters=100_000, num_updated=100_000)


@pytest.mark.parametrize("clipping", [0.0, 0.5, 1.0])
def test_clipping_is_always_written(clipping: float) -> None:
    """DeepSpeed clips at 1.0 where its config says nothing."""
    assert settings(gradient_clipping=clipping)["gradient_clipping"] == clipping


def test_a_step_ends_where_it_is_asked_for() -> None:
    """After any number of micro-batches: DeepSpeed counts none."""
    found = settings()
    assert found["managed_gradient_accumulation"] is False
    assert found["gradient_accumulation_steps"] == 1
    assert found["train_batch_size"] == 4 * found["train_micro_batch_size_per_gpu"] == 8


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_gradients_accumulate_in_fp32(precision: str) -> None:
    found = settings(precision=precision)
    assert found["data_types"]["grad_accum_dtype"] == "fp32"
    assert [name for name in ("bf16", "fp16") if found.get(name, {}).get("enabled")] == [precision] * (
        precision != "fp32"
    )


def test_the_users_leaves_are_laid_over_ours() -> None:
    found = settings({"zero_optimization": {"reduce_bucket_size": 5000}}, {"zero_stage": 2})
    assert found["zero_optimization"]["reduce_bucket_size"] == 5000
    assert found["zero_optimization"]["stage"] == 2
