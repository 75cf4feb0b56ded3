"""Pipelines of both engines train as one rank does: 1F1B and interleaved, under each ZeRO stage, whatever else is on.

Eight layers, so that two ranks can have four chunks each.
"""

from __future__ import annotations

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


def rows() -> list[Any]:
    quick = [pytest.param(*row, id=name) for name, row in QUICK.items()]
    return quick + [pytest.param(*row, id=name, marks=pytest.mark.slow) for name, row in SLOW.items()]


@pytest.mark.parametrize(("num_ranks", "parallel", "model", "sections"), rows())
def test_a_pipeline_trains_as_one_rank_does(
    num_ranks: int, parallel: dict[str, Any], model: str, sections: dict[str, dict[str, Any]], pool: Pool
) -> None:
    sections = {"model": LAYERS, "train": {"micro_batch_size": 1}, **sections}
    config = parity_config(pool.data, model, parallel=parallel, **sections)
    pool.train(num_ranks, config, NUM_STEPS).assert_equals(pool.alone(model, NUM_STEPS, **{**sections, "train": {}}))
