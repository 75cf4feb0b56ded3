"""Pipelines of both engines train as one rank does: 1F1B and interleaved, under each ZeRO stage, whatever else is on.

Eight layers, so that two ranks can have four chunks each.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.parity.figures import NUM_STEPS, Pool
from tests.parity.matrix import parity_config

LAYERS = {"num_hidden_layers": 8}
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.2}
# Ranks, what `parallel` says, the model, and further sections.
Row = tuple[int, dict[str, Any], str, dict[str, dict[str, Any]]]
QUICK: dict[str, Row] = {
    "zero 2, interleaved, tied": (4, {"pipeline": 2, "pipeline_chunks": 2, "zero_stage": 2}, "llama_tied", {}),
    "fsdp2, zero 3, interleaved, tied": (
        4,
        {"engine": "fsdp2", "pipeline": 2, "pipeline_chunks": 2, "zero_stage": 3, "recompute": "full"},
        "gpt2_tied",
        {},
    ),
}
V2 = {"pipeline": 2, "pipeline_chunks": 2}
SEQUENCE = {"tensor": 2, "sequence": True}
SLOW: dict[str, Row] = {
    f"{engine}, zero {stage}, p {p}, v {v}, {model}": (
        4,
        {"engine": engine, "pipeline": p, "pipeline_chunks": v, "zero_stage": stage},
        model,
        {},
    )
    for engine, stages in (("deepspeed", (0, 1, 2)), ("fsdp2", (0, 1, 2, 3)))
    for stage in stages
    for p, v, model in ((2, 4, "llama_tied"), (4, 2, "gpt2"), (4, 1, "gpt2_tied"))
}
for engine in ("deepspeed", "fsdp2"):
    SLOW |= {
        f"{engine}, dropout, recomputed": (
            4,
            {**V2, **SEQUENCE, "engine": engine, "zero_stage": 2, "recompute": "full"},
            "gpt2_tied",
            {"model": DROPOUT},
        ),
        f"{engine}, selective": (4, {**V2, **SEQUENCE, "engine": engine, "recompute": "selective"}, "llama_mqa", {}),
        f"{engine}, fewer micro-batches than ranks": (
            4,
            {"engine": engine, "pipeline": 4, "pipeline_chunks": 2, "zero_stage": 2},
            "llama_tied",
            {"train": {"micro_batch_size": 4}},
        ),
        f"{engine}, uneven rounds and stages": (
            2,
            {**V2, "engine": engine},
            "gpt2_tied",
            {"model": {"num_hidden_layers": 7}, "train": {"micro_batch_size": 1, "global_batch_size": 5}},
        ),
    }


def rows() -> list[Any]:
    quick = [pytest.param(*row, id=name) for name, row in QUICK.items()]
    return quick + [pytest.param(*row, id=name, marks=pytest.mark.slow) for name, row in SLOW.items()]


@pytest.mark.sample(10)
@pytest.mark.parametrize(("num_ranks", "parallel", "model", "sections"), rows())
def test_a_pipeline_trains_as_one_rank_does(
    num_ranks: int, parallel: dict[str, Any], model: str, sections: dict[str, dict[str, Any]], pool: Pool
) -> None:
    size = {**LAYERS, **sections.get("model", {})}
    train = {"micro_batch_size": 1, **sections.get("train", {})}
    config = parity_config(pool.data, model, model=size, train=train, parallel=parallel)
    whole = {**train, "micro_batch_size": train.get("global_batch_size", 8)}
    alone = pool.alone(model, NUM_STEPS, model=size, train=whole)
    pool.train(num_ranks, config, NUM_STEPS).assert_equals(alone)


@pytest.mark.sample(1)
@pytest.mark.slow
@pytest.mark.parametrize("engine", ["deepspeed", "fsdp2"])
def test_interleaved_stages_keep_documents_apart(engine: str, pool: Pool, short_documents: Path) -> None:
    """Document ids do not travel: each stage reads them from its batch."""
    sections: dict[str, Any] = {
        "model": {**LAYERS, **DROPOUT},
        "data": {"train": [{"path": str(short_documents)}], "document_mask": True},
    }
    config = parity_config(
        pool.data, "llama_tied", **sections, train={"micro_batch_size": 1}, parallel={**V2, "engine": engine}
    )
    pool.train(2, config, NUM_STEPS).assert_equals(pool.alone("llama_tied", NUM_STEPS, **sections))


@pytest.mark.sample(4)
@pytest.mark.slow
@pytest.mark.parametrize("engine", ["deepspeed", "fsdp2"])
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_pipelines_train_like_one_rank(engine: str, stage: int, precision: str, pool: Pool) -> None:
    train = {"precision": precision, **({"initial_loss_scale_power": 8} if precision == "fp16" else {})}
    parallel = {**V2, "engine": engine, "zero_stage": stage}
    config = parity_config(pool.data, "llama_tied", train={**train, "micro_batch_size": 1}, parallel=parallel)
    alone = pool.alone("llama_tied", 4, train=train)
    pool.train(4, config, 4).assert_equals(alone, loss=2e-3, norm=2e-2, weight=None)
