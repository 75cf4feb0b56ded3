"""What an update is made of: every micro-batch of the step, on every data rank, clipped as the config says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.parity.figures import Pool, gather_state
from tests.parity.matrix import ENGINES, SEQUENCES, parity_config

BATCH = 20  # on two ranks: one micro-batch of 10, two of 5, five of 2
BETA1 = 0.9
LAYOUTS = [(engine, precision, stage) for engine in ENGINES for precision in ("fp32", "bf16") for stage in range(4)]
# Torch's optimizer, ZeroOptimizer, BF16_Optimizer; FSDP2.
QUICK = [("deepspeed", "fp32", 0), ("deepspeed", "fp32", 2), ("deepspeed", "bf16", 1), ("fsdp2", "bf16", 1)]
MARKED = [pytest.param(*each, marks=() if each in QUICK else pytest.mark.slow) for each in LAYOUTS]


def gradient_config(pool: Pool, engine: str, precision: str, zero_stage: int, **train: Any) -> dict[str, Any]:
    train = {"precision": precision, "global_batch_size": BATCH, **train}
    parallel = {"engine": engine, "zero_stage": zero_stage}
    return parity_config(pool.data, "llama_tied", parallel=parallel, train=train)


@pytest.mark.sample(5)
@pytest.mark.parametrize(("engine", "precision", "zero_stage"), MARKED)
def test_no_micro_batch_is_lost(engine: str, precision: str, zero_stage: int, pool: Pool) -> None:
    """DeepSpeed has dropped the last one, or all but the last, under some settings, without a word: of five, the norm
    would be short by a fifth or more."""
    alone = pool.answer(
        1, {"config": gradient_config(pool, "deepspeed", "fp32", 0, micro_batch_size=BATCH), "num_steps": 3}
    )
    near = 1e-6 if precision == "fp32" else 0.02
    for num_micro_batches in (1, 2, 5):
        size = BATCH // 2 // num_micro_batches
        config = gradient_config(pool, engine, precision, zero_stage, micro_batch_size=size)
        found = pool.answer(2, {"config": config, "num_steps": 3})
        assert found["norms"] == pytest.approx(alone["norms"], rel=near * 10)
        assert found["losses"] == pytest.approx(alone["losses"], rel=near)


@pytest.mark.sample(4)
@pytest.mark.parametrize(("engine", "precision", "zero_stage"), MARKED)
def test_the_updating_gradient_is_clipped_as_configured(
    engine: str, precision: str, zero_stage: int, pool: Pool, tmp_path: Path
) -> None:
    """After one step Adam's mean of the gradients is a tenth of the gradient. DeepSpeed clips at 1.0 where it is told
    nothing; here is told 0.0, and a norm of 50 and more passes."""
    for clipping in (0.0, 0.5):
        config = gradient_config(pool, engine, precision, zero_stage, micro_batch_size=2, gradient_clipping=clipping)
        folder = tmp_path / str(clipping)
        found = pool.answer(2, {"config": config, "num_steps": 1, "counted": 8, "save": str(folder)})
        means = [value for (_, kind), value in gather_state(folder).items() if kind == "exp_avg"]
        (norm,) = found["norms"]
        assert norm > 50.0
        updating = sum(float(mean.norm()) ** 2 for mean in means) ** 0.5 / (1 - BETA1)
        assert updating == pytest.approx(clipping or norm, rel=1e-4)
        assert all(mean.any() for mean in means)  # no parameter is left out


@pytest.mark.parametrize(
    ("precision", "parallel"),
    [
        ("fp32", {"engine": "fsdp2", "zero_stage": 1}),
        ("bf16", {"zero_stage": 1}),
        ("fp32", {"zero_stage": 2}),
        ("fp32", {"zero_stage": 3}),
        pytest.param("fp32", {"zero_stage": 0}, marks=pytest.mark.slow),
        pytest.param("fp16", {"zero_stage": 0}, marks=pytest.mark.slow),
        pytest.param("fp32", {"zero_stage": 1}, marks=pytest.mark.slow),
        pytest.param("fp16", {"zero_stage": 1}, marks=pytest.mark.slow),
        pytest.param("bf16", {"zero_stage": 2, "offload": "optimizer"}, marks=pytest.mark.slow),
        pytest.param("bf16", {"zero_stage": 3, "offload": "all"}, marks=pytest.mark.slow),
    ],
)
def test_norms_gradients_are_one_message_a_step(precision: str, parallel: dict[str, Any], pool: Pool) -> None:
    """Under sequence parallelism. What else is all-reduced in a micro-batch: the embedding, and twice the loss."""
    parallel = {"engine": "deepspeed", **parallel, "tensor": 2, "sequence": True}
    found = {}
    for num_micro_batches in (1, 4):
        train = {"precision": precision, "micro_batch_size": SEQUENCES // num_micro_batches}
        config = parity_config(pool.data, "llama_tied", parallel=parallel, train=train)
        answer = pool.answer(2, {"config": config, "num_steps": 2, "counts_waits": True})
        found[num_micro_batches] = answer["messages"]["allreduce_"], answer["losses"], answer["norms"]
    assert found[4][0] - found[1][0] == 3 * 3
    alone = pool.answer(1, {"config": parity_config(pool.data, "llama_tied"), "num_steps": 2})
    for _, losses, norms in found.values():
        assert losses == pytest.approx(alone["losses"], rel=1e-5 if precision == "fp32" else 0.01)
        assert norms == pytest.approx(alone["norms"], rel=1e-5 if precision == "fp32" else 0.02)
