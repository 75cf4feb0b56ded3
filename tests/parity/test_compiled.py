"""Compiled layers train the model that eager ones train, under every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.parity.figures import Pool
from tests.parity.matrix import parity_config

NUM_STEPS = 4
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.2}
ROWS: dict[str, tuple[int, str, dict[str, Any], dict[str, Any]]] = {
    "one rank": (1, "llama_tied", {}, {}),
    "zero 2, selective": (2, "gpt2", {"zero_stage": 2, "recompute": "selective"}, {}),
    "tensor, full, dropout": (2, "llama_tied", {"tensor": 2, "recompute": "full"}, DROPOUT),
    "sequence, selective, dropout": (
        2,
        "gpt2_tied",
        {"tensor": 2, "sequence": True, "recompute": "selective"},
        DROPOUT,
    ),
    "pipeline in chunks, every second": (
        2,
        "llama_mqa",
        {"pipeline": 2, "pipeline_chunks": 2, "recompute": "full", "recompute_every": 2},
        {},
    ),
    "fsdp2 zero 1": (2, "llama_tied", {"engine": "fsdp2"}, {}),
    "fsdp2 zero 3, full": (2, "gpt2", {"engine": "fsdp2", "zero_stage": 3, "recompute": "full"}, DROPOUT),
    "fsdp2 all axes": (
        4,
        "llama_tied",
        {"engine": "fsdp2", "tensor": 2, "pipeline": 2, "sequence": True, "zero_stage": 3},
        {},
    ),
    "bert": (2, "bert", {"tensor": 2, "sequence": True, "recompute": "selective"}, DROPOUT),
    "a classifier of texts": (2, "bert_classifier", {"zero_stage": 1}, {}),
    "vit": (2, "vit", {"engine": "fsdp2", "zero_stage": 3, "recompute": "full"}, DROPOUT),
}
COMPILED = {"compile": "on"}


TRACED = "aot_eager_decomp_partition"
"""What inductor is given, the forward and the backward graph in its primitive operations, run one by one."""


@pytest.mark.slow
@pytest.mark.parametrize("model", ["llama_tied", "vit"])
def test_traced_layers_train_as_eager_ones_do(model: str, pool: Pool) -> None:
    """The sample for CI: all but the generation of code, which takes a C++ compiler most of a minute."""
    config = pool.config(model, parallel={"tensor": 2, "sequence": True}, train=COMPILED)
    pool.train(2, config, NUM_STEPS, backend=TRACED).assert_equals(pool.alone(model, NUM_STEPS))


@pytest.mark.slow
@pytest.mark.acceptance
@pytest.mark.parametrize("row", ROWS)
def test_compiled_layers_train_as_eager_ones_do(row: str, pool: Pool) -> None:
    num_ranks, model, parallel, dropout = ROWS[row]
    config = pool.config(model, parallel=parallel, model=dropout, train=COMPILED)
    alone = pool.alone(model, NUM_STEPS, model=dropout)
    pool.train(num_ranks, config, NUM_STEPS).assert_equals(alone)


@pytest.mark.slow
@pytest.mark.acceptance
@pytest.mark.parametrize("row", ["one rank", "fsdp2 zero 3, full"])
def test_compiled_layers_keep_documents_apart(row: str, pool: Pool, short_documents: Path) -> None:
    num_ranks, model, parallel, _ = ROWS[row]
    data: dict[str, Any] = {"train": [{"path": str(short_documents)}], "document_mask": True}
    config = parity_config(pool.data, model, data=data, parallel=parallel, train=COMPILED)
    pool.train(num_ranks, config, NUM_STEPS).assert_equals(pool.alone(model, NUM_STEPS, data=data))


@pytest.mark.slow
@pytest.mark.acceptance
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_compiled_layers_train_in_half_precision(precision: str, pool: Pool) -> None:
    train: dict[str, Any] = {"precision": precision} | ({"initial_loss_scale_power": 8} if precision == "fp16" else {})
    config = parity_config(pool.data, "llama_tied", train={**train, **COMPILED})
    alone = pool.alone("llama_tied", NUM_STEPS, train=train)
    pool.train(1, config, NUM_STEPS).assert_equals(alone, loss=2e-3, norm=1e-2, weight=None)
