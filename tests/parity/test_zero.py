"""ZeRO stages, precisions, micro-batches, recomputation and document masks: one model, however it is computed."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.parity.figures import Pool
from tests.parity.matrix import ENGINES, parity_config


@pytest.mark.sample(3)
@pytest.mark.parametrize("zero_stage", range(4))
@pytest.mark.parametrize("num_ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("engine", ENGINES)
def test_every_zero_stage_trains_the_same_in_fp32(engine: str, num_ranks: int, zero_stage: int, pool: Pool) -> None:
    config = parity_config(pool.data, "llama_tied", parallel={"engine": engine, "zero_stage": zero_stage})
    found, expected = pool.train(num_ranks, config), pool.alone("llama_tied")
    for ours, theirs in zip(found.losses, expected.losses, strict=True):
        assert math.isclose(ours, theirs, rel_tol=1e-4)
    for ours, theirs in zip(found.norms, expected.norms, strict=True):
        assert math.isclose(ours, theirs, rel_tol=1e-3)
    found.assert_equals(expected)


@pytest.mark.sample(4)
@pytest.mark.parametrize(
    ("engine", "precision", "num_ranks", "zero_stage"),
    [  # bf16 takes many times as long on a CPU without units for it: one of each of DeepSpeed's optimizers
        *(("deepspeed", "bf16", 2, stage) for stage in (1, 3)),
        ("deepspeed", "fp16", 2, 2),
        ("fsdp2", "bf16", 2, 1),
        *(pytest.param("deepspeed", "bf16", *case, marks=pytest.mark.slow) for case in ((1, 0), (2, 0), (2, 2))),
        pytest.param("deepspeed", "fp16", 2, 0, marks=pytest.mark.slow),
        *(pytest.param("fsdp2", "bf16", *case, marks=pytest.mark.slow) for case in ((1, 0), (2, 2), (2, 3))),
        *(pytest.param("fsdp2", "fp16", 2, stage, marks=pytest.mark.slow) for stage in (1, 2, 3)),
    ],
)
def test_half_precision_stays_close_under_every_stage(
    engine: str, precision: str, num_ranks: int, zero_stage: int, pool: Pool
) -> None:
    train = {"precision": precision, **({"initial_loss_scale_power": 8} if precision == "fp16" else {})}
    parallel = {"engine": engine, "zero_stage": zero_stage}
    config = parity_config(pool.data, "llama_tied", parallel=parallel, train=train)
    pool.train(num_ranks, config).assert_equals(pool.alone("llama_tied"), loss=0.02, norm=0.05, weight=None)


def test_micro_batch_size_does_not_matter(pool: Pool) -> None:
    found = [
        pool.train(1, parity_config(pool.data, "llama", train={"micro_batch_size": size}, parallel={"zero_stage": 1}))
        for size in (1, 4)
    ]
    found[0].assert_equals(found[1])
    found[0].assert_equals(pool.alone("llama"))


@pytest.mark.parametrize("model", ["llama_tied", "gpt2"])
def test_recomputation_changes_no_bit(model: str, pool: Pool) -> None:
    plain = parity_config(pool.data, model)
    plain["model"] |= {"hidden_dropout": 0.1, "attention_dropout": 0.1}
    num_steps = 3  # what differs in a bit does so at once
    found = pool.train(1, {**plain, "parallel": {"recompute": "none"}}, num_steps)
    for parallel in ({"recompute": "selective"}, {"recompute": "full"}, {"recompute": "full", "recompute_every": 2}):
        pool.train(1, {**plain, "parallel": parallel}, num_steps).assert_is(found)


def test_a_document_mask_trains_the_same_on_ranks(pool: Pool, short_documents: Path) -> None:
    masked, plain = (parity_config(pool.data, "llama") for _ in range(2))
    for config in (masked, plain):
        config["data"] |= {"train": [{"path": str(short_documents)}]}  # in each sample some documents begin
    masked["data"] |= {"document_mask": True}
    found = pool.train(2, masked, num_steps=6)
    found.assert_equals(pool.train(1, masked, num_steps=6))
    without = pool.train(1, plain, num_steps=6)
    assert found.losses != without.losses
    assert max(abs(a - b) for a, b in zip(found.losses, without.losses, strict=True)) < 0.1
