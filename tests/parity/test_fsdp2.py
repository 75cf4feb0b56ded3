"""What torch's FSDP2 could get wrong without a word: rows that ranks do not divide, skipped steps, drifting copies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity.figures import Pool, gather_state
from tests.parity.matrix import parity_config

slow = pytest.mark.slow
NARROW = {"hidden_size": 6, "intermediate_size": 10, "num_attention_heads": 3, "num_key_value_heads": 3}
"""Of four ranks the last has no row of a norm's weight, and one of an MLP's."""


def config_of(pool: Pool, model: str, /, parallel: dict[str, Any], **sections: dict[str, Any]) -> dict[str, Any]:
    return parity_config(pool.data, model, parallel={"engine": "fsdp2", **parallel}, **sections)


@pytest.mark.parametrize("zero_stage", [1, pytest.param(3, marks=slow)])
def test_every_row_of_an_indivisible_vocabulary_moves(zero_stage: int, pool: Pool) -> None:
    config = config_of(pool, "llama_tied", {"zero_stage": zero_stage}, train={"micro_batch_size": 1})
    before, after = (pool.train(4, config, num_steps).weights["model.embed_tokens.weight"] for num_steps in (0, 1))
    assert (before != after).view(config["model"]["vocab_size"], -1).any(1).all()


@pytest.mark.sample(2)
@slow
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
@pytest.mark.parametrize("model", ["llama", "llama_tied"])
def test_ranks_without_rows_train_as_one_rank(model: str, zero_stage: int, pool: Pool) -> None:
    config = config_of(pool, model, {"zero_stage": zero_stage}, model=NARROW, train={"micro_batch_size": 1})
    pool.train(4, config, 5).assert_equals(pool.alone(model, 5, model=NARROW))


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=slow), pytest.param("fp16", marks=slow)])
def test_a_skipped_update_leaves_every_bit(precision: str, pool: Pool, tmp_path: Path) -> None:
    train = {"precision": precision, **({"initial_loss_scale_power": 8} if precision == "fp16" else {})}
    config = config_of(pool, "llama", {"zero_stage": 1}, train=train)
    states = []
    for num_steps in (2, 3):
        folder = tmp_path / str(num_steps)
        answer = pool.answer(2, {"config": config, "num_steps": num_steps, "save": str(folder), "poisoned_step": 2})
        assert answer["skipped"] == [step == 2 for step in range(num_steps)]
        assert answer["saved"]["num_updates"] == 2
        states.append(gather_state(folder))
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.sample(2)
@slow
@pytest.mark.parametrize("parallel", [{"tensor": 2, "sequence": True}, {"tensor": 4}], ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_tensor_ranks_hold_the_same_after_twenty_steps(parallel: dict[str, Any], precision: str, pool: Pool) -> None:
    """The worker compares checksums in the end. Of one key-value head each of four ranks has a copy."""
    train = {"steps": 20, "micro_batch_size": 2, "precision": precision}
    config = config_of(pool, "llama_mqa", {"zero_stage": 1, **parallel}, train=train)
    assert pool.answer(4, {"config": config, "num_steps": 20})["difference"] is None
