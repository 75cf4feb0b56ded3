"""Training on answers: every layout computes what one rank does, whose loss is a mean over scored targets alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.parity.figures import Pool
from tests.parity.matrix import parity_config
from tests.parity.saves import assert_resumes_exactly

QUICK: list[tuple[int, dict[str, Any]]] = [
    (2, {"zero_stage": 2}),
    (2, {"tensor": 2, "sequence": True}),
    (2, {"pipeline": 2, "engine": "fsdp2"}),
]
LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    *QUICK,
    *((2, {"engine": engine, "zero_stage": stage}) for engine in ("deepspeed", "fsdp2") for stage in range(4)),
    *((2, {"engine": engine, "tensor": 2, "zero_stage": 1}) for engine in ("deepspeed", "fsdp2")),
    (2, {"pipeline": 2, "pipeline_chunks": 2}),
    (2, {"zero_stage": 1, "recompute": "full"}),
    (4, {"tensor": 2, "pipeline": 2, "sequence": True}),
    (4, {"tensor": 2, "engine": "fsdp2", "zero_stage": 3}),
    (4, {"pipeline": 2, "zero_stage": 1}),
]
LONGER = (pytest.mark.slow, pytest.mark.acceptance)


def sections(answers: Path, folder: Path, **parallel: Any) -> dict[str, dict[str, Any]]:
    return {
        "run": {"dir": str(folder)},
        "data": {"train": [str(answers)], "packing": "best_fit", "document_mask": True, "seq_len": 64},
        "parallel": parallel,
        "train": {"micro_batch_size": 2},
    }


@pytest.mark.parametrize(
    ("num_ranks", "parallel"), [pytest.param(*row, marks=() if row in QUICK else LONGER) for row in LAYOUTS], ids=str
)
def test_answers_train_alike_under_every_layout(
    num_ranks: int, parallel: dict[str, Any], pool: Pool, answers: Path, tmp_path: Path
) -> None:
    """Samples have 1 to 60 scored targets: means over micro-batches or ranks would be others."""
    found = pool.train(num_ranks, parity_config(pool.data, "llama_tied", **sections(answers, tmp_path, **parallel)), 4)
    alone = sections(answers, tmp_path)
    found.assert_equals(pool.alone("llama_tied", 4, run=alone["run"], data=alone["data"]))


@pytest.mark.parametrize(
    "parallel",
    [
        {"zero_stage": 1},
        pytest.param({"engine": "fsdp2", "zero_stage": 3}, marks=LONGER),
        pytest.param({"pipeline": 2}, marks=LONGER),
    ],
    ids=str,
)
def test_training_on_answers_resumes_to_the_last_bit(
    parallel: dict[str, Any], pool: Pool, answers: Path, tmp_path: Path
) -> None:
    config = parity_config(pool.data, "llama_tied", **sections(answers, tmp_path, **parallel))
    assert_resumes_exactly(pool, config, tmp_path / "half")
