"""NaN, an update left out, a flipped bit, under any layout: all ranks do the same, and who is wrong is named."""

from __future__ import annotations

import math
import socket
from typing import Any

import numpy as np
import pytest

from tests.parity.figures import Pool
from tests.parity.matrix import parity_config
from tests.runs import ACCEPTANCE

POISONED, NUM_STEPS = 3, 6
LAYOUTS: dict[str, tuple[int, dict[str, Any], str]] = {
    **{f"ZeRO {stage} {p}": (2, {"zero_stage": stage}, p) for stage in range(4) for p in ("fp32", "bf16")},
    **{
        f"FSDP2 ZeRO {s} {p}": (2, {"engine": "fsdp2", "zero_stage": s}, p) for s in (1, 2, 3) for p in ("fp32", "bf16")
    },
    "FSDP2 tensor": (2, {"engine": "fsdp2", "tensor": 2, "zero_stage": 1}, "fp32"),
    "FSDP2 pipeline": (2, {"engine": "fsdp2", "pipeline": 2, "pipeline_chunks": 2, "zero_stage": 2}, "bf16"),
    "offloaded": (2, {"zero_stage": 2, "offload": "optimizer"}, "fp32"),
    "tensor": (2, {"tensor": 2, "zero_stage": 1, "sequence": True}, "fp32"),
    "tensor under ZeRO 3": (2, {"tensor": 2, "zero_stage": 3, "sequence": True}, "fp32"),
    "pipeline": (2, {"pipeline": 2, "zero_stage": 1}, "fp32"),
    "pipeline without ZeRO": (2, {"pipeline": 2, "zero_stage": 0}, "bf16"),
}


def _figures(pool: Pool, num_ranks: int, parallel: dict[str, Any], precision: str, **case: Any) -> dict[str, Any]:
    config = parity_config(pool.data, "llama_tied", parallel=parallel, train={"precision": precision})
    return pool.answer(num_ranks, {"config": config, "num_steps": NUM_STEPS, **case})


SAMPLE = (
    "ZeRO 0 bf16",
    "ZeRO 2 fp32",
    "ZeRO 3 bf16",
    "tensor under ZeRO 3",
    "pipeline",
    "FSDP2 ZeRO 1 bf16",
    "FSDP2 ZeRO 3 fp32",
    "FSDP2 pipeline",
)


@pytest.mark.sample(3)
@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS if ACCEPTANCE else SAMPLE)
def test_one_non_finite_gradient_skips_the_update_everywhere(layout: str, pool: Pool) -> None:
    num_ranks, parallel, precision = LAYOUTS[layout]
    found = _figures(pool, num_ranks, parallel, precision, poisoned_step=POISONED)
    expected = _figures(pool, 1, {"zero_stage": 0}, "fp32", poisoned_step=POISONED)
    assert found["skipped"] == [step == POISONED for step in range(NUM_STEPS)]
    assert not math.isfinite(found["norms"][POISONED])
    others = [step for step in range(NUM_STEPS) if step != POISONED]
    near = 1e-4 if precision == "fp32" else 0.02
    assert np.abs(np.subtract(found["losses"], expected["losses"])[others]).max() < near
    assert abs(found["validation"] - expected["validation"]) < near


@pytest.mark.sample(3)
@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS if ACCEPTANCE else SAMPLE)
def test_an_update_refused_at_the_end_changes_nothing(layout: str, pool: Pool) -> None:
    num_ranks, parallel, precision = LAYOUTS[layout]
    found = _figures(pool, num_ranks, parallel, precision, refused_step=POISONED)
    expected = _figures(pool, 1, {"zero_stage": 0}, "fp32", refused_step=POISONED)
    without = _figures(pool, 1, {"zero_stage": 0}, "fp32", poisoned_step=POISONED)
    assert found["skipped"] == [step == POISONED for step in range(NUM_STEPS)]
    near = 1e-4 if precision == "fp32" else 0.02
    assert np.abs(np.subtract(found["losses"], expected["losses"])).max() < near
    assert np.abs(np.divide(found["norms"], expected["norms"]) - 1).max() < (1e-3 if precision == "fp32" else 0.05)
    assert expected["losses"][POISONED + 1 :] == without["losses"][POISONED + 1 :]


@pytest.mark.sample(3)
@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS if ACCEPTANCE else SAMPLE)
def test_an_engine_gone_back_repeats_its_steps(layout: str, pool: Pool) -> None:
    num_ranks, parallel, precision = LAYOUTS[layout]
    found = _figures(pool, num_ranks, parallel, precision, twice=True, refused_step=POISONED)
    assert found["again"] == found["losses"][: POISONED + 1]


FLIPPED = {  # layout: the parameter, and who is told to differ
    "ZeRO 0 bf16": ("model.norm.weight", "ranks 0 ({host}), 1 ({host}) differ in model.norm.weight"),
    "ZeRO 2 fp32": ("model.layers.0.mlp.up_proj.weight", "ranks 0 ({host}), 1 ({host}) differ in"),
    "tensor": ("model.norm.weight", "ranks 0 ({host}), 1 ({host}) differ in model.norm.weight"),
    "FSDP2 pipeline": ("lm_head.weight", "ranks 0 ({host}), 1 ({host}) differ in model.embed_tokens.weight"),
    "FSDP2 tensor": ("model.norm.weight", "ranks 0 ({host}), 1 ({host}) differ in model.norm.weight"),
    "tensor under ZeRO 3": ("model.norm.weight", "ranks 0 ({host}), 1 ({host}) differ in model.norm.weight"),
    "pipeline": ("lm_head.weight", "ranks 0 ({host}), 1 ({host}) differ in model.embed_tokens.weight"),
}


@pytest.mark.sample(3)
@pytest.mark.slow
@pytest.mark.parametrize("layout", FLIPPED)
def test_a_flipped_bit_in_replicas_is_found(layout: str, pool: Pool) -> None:
    num_ranks, parallel, precision = LAYOUTS[layout]
    name, words = FLIPPED[layout]
    found = _figures(pool, num_ranks, parallel, precision, flipped=name)
    assert words.format(host=socket.gethostname()) in found["difference"]


@pytest.mark.slow
def test_the_differing_one_of_four_ranks_is_named(pool: Pool) -> None:
    found = _figures(pool, 4, {"zero_stage": 1}, "fp32", flipped="model.norm.weight")
    assert found["difference"] == (
        f"rank 3 ({socket.gethostname()}) differs in model.norm.weight from 3 others that must hold the same"
    )


@pytest.mark.sample(2)
@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
def test_tensor_ranks_share_one_gradient_of_replicated_weights(stage: int, pool: Pool) -> None:
    """The ranks compare their weights in the end."""
    config = parity_config(pool.data, "llama_mqa", parallel={"tensor": 2, "zero_stage": stage})
    drifted = pool.answer(2, {"config": config, "num_steps": NUM_STEPS, "drifts": True})
    assert drifted["difference"] is None
    assert drifted["losses"] == pool.answer(2, {"config": config, "num_steps": NUM_STEPS})["losses"]
