"""NaN on one rank: no rank updates, under any layout, and training goes on as if that step had not been."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
import pytest

from tests.parity.figures import Pool
from tests.parity.matrix import parity_config

POISONED, NUM_STEPS = 3, 6
LAYOUTS: dict[str, tuple[int, dict[str, Any], str]] = {
    **{f"ZeRO {stage} {p}": (2, {"zero_stage": stage}, p) for stage in range(4) for p in ("fp32", "bf16")},
    "offloaded": (2, {"zero_stage": 2, "offload": "optimizer"}, "fp32"),
    "tensor": (2, {"tensor": 2, "zero_stage": 1}, "fp32"),
    "tensor under ZeRO 3": (2, {"tensor": 2, "zero_stage": 3}, "fp32"),
    "pipeline": (2, {"pipeline": 2, "zero_stage": 1}, "fp32"),
    "pipeline without ZeRO": (2, {"pipeline": 2, "zero_stage": 0}, "bf16"),
}


def _figures(pool: Pool, num_ranks: int, parallel: dict[str, Any], precision: str) -> dict[str, Any]:
    config = parity_config(pool.data, "llama", parallel=parallel, train={"precision": precision})
    return pool.answer(num_ranks, {"config": config, "num_steps": NUM_STEPS, "poisoned_step": POISONED})


SAMPLE = ("ZeRO 0 bf16", "ZeRO 2 fp32", "ZeRO 3 bf16", "tensor under ZeRO 3", "pipeline")


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS if os.environ.get("MEGATRAIN_ACCEPTANCE") else SAMPLE)
def test_a_gradient_that_is_not_finite_on_one_rank_leaves_the_update_out_on_all(layout: str, pool: Pool) -> None:
    num_ranks, parallel, precision = LAYOUTS[layout]
    found = _figures(pool, num_ranks, parallel, precision)
    expected = _figures(pool, 1, {"zero_stage": 0}, "fp32")
    assert found["skipped"] == [step == POISONED for step in range(NUM_STEPS)]
    assert not math.isfinite(found["norms"][POISONED])
    others = [step for step in range(NUM_STEPS) if step != POISONED]
    near = 1e-4 if precision == "fp32" else 0.02
    assert np.abs(np.subtract(found["losses"], expected["losses"])[others]).max() < near
    assert abs(found["validation"] - expected["validation"]) < near
