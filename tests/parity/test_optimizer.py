"""What an optimizer could do to the wrong weights without a word: decay."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatrain.families import FAMILIES
from megatrain.families.description import WeightKind
from tests.parity.figures import Figures, Pool
from tests.parity.matrix import parity_config

slow = [pytest.mark.slow, pytest.mark.acceptance]
LR, DECAY = 1.0e-2, 4.0
ONE_STEP = 1.0 - LR * DECAY
NONE_BUT_MATRICES: tuple[WeightKind, ...] = ("norms", "biases", "positions", "embeddings")


def first_step(pool: Pool, num_ranks: int, parallel: dict[str, Any], **optimizer: Any) -> Figures:
    sections: dict[str, Any] = {"optimizer": {"lr": LR, **optimizer}, "schedule": {"warmup_steps": 0}}
    return pool.train(num_ranks, parity_config(pool.data, "gpt2_tied", parallel=parallel, **sections), 1)


@pytest.mark.parametrize(
    ("num_ranks", "parallel"),
    [
        (1, {"zero_stage": 0}),
        (2, {"zero_stage": 1}),
        (2, {"zero_stage": 3}),
        (2, {"engine": "fsdp2", "zero_stage": 1}),
        (2, {"pipeline": 2, "zero_stage": 1}),
        pytest.param(2, {"zero_stage": 2}, marks=slow),
        pytest.param(2, {"zero_stage": 2, "offload": "optimizer"}, marks=slow),
        pytest.param(2, {"zero_stage": 0}, marks=slow),
        pytest.param(2, {"engine": "fsdp2", "zero_stage": 3}, marks=slow),
        pytest.param(4, {"tensor": 2, "pipeline": 2}, marks=slow),
        pytest.param(4, {"engine": "fsdp2", "tensor": 2, "sequence": True}, marks=slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("kept", [("norms", "biases", "positions"), NONE_BUT_MATRICES, ()], ids=str)
def test_only_the_kinds_that_should_decay(
    kept: tuple[WeightKind, ...], num_ranks: int, parallel: dict[str, Any], pool: Pool
) -> None:
    """In the first step decay takes its share of the initial weight; what the gradient does is not changed by it."""
    before = pool.alone("gpt2_tied", 0).weights
    plain = first_step(pool, num_ranks, parallel, weight_decay=0.0).weights
    decayed = first_step(pool, num_ranks, parallel, weight_decay=DECAY, no_weight_decay=list(kept)).weights
    assert decayed.keys() == plain.keys()
    for name, weight in decayed.items():
        if FAMILIES["gpt2"].kind_of(name) in kept:
            torch.testing.assert_close(weight, plain[name], rtol=0, atol=1e-6, msg=name)
        else:
            torch.testing.assert_close(weight - plain[name], (ONE_STEP - 1.0) * before[name], rtol=1e-3, atol=1e-6)
