"""Families beside llama and gpt2: qwen3, whose norms of queries and keys see a part of the heads, and others.

A vit's images are augmented and mixed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatrain.families import FAMILIES
from tests.parity.figures import Figures, Pool
from tests.parity.matrix import DATA_OF, parity_config
from tests.parity.test_encoder_decoder import sections as text_of

slow = pytest.mark.slow
longer = (pytest.mark.slow, pytest.mark.acceptance)
NUM_STEPS = 5


@pytest.mark.sample(8)
@pytest.mark.parametrize(
    ("model", "num_ranks", "parallel"),
    [
        ("qwen2", 2, {"tensor": 2, "sequence": True}),
        pytest.param("qwen2", 2, {"pipeline": 2}, marks=slow),
        pytest.param("qwen2", 4, {"tensor": 4, "zero_stage": 3}, marks=slow),
        pytest.param("qwen2", 4, {"tensor": 2, "pipeline": 2, "recompute": "full"}, marks=slow),
        ("qwen3", 2, {"tensor": 2}),
        ("qwen3", 2, {"pipeline": 2}),
        ("bert", 2, {"tensor": 2, "sequence": True, "recompute": "full"}),
        ("bert", 2, {"pipeline": 2}),
        pytest.param("bert", 2, {"zero_stage": 3}, marks=slow),
        pytest.param("bert", 2, {"zero_stage": 2, "recompute": "selective"}, marks=slow),
        pytest.param("bert", 2, {"engine": "fsdp2", "pipeline": 2, "pipeline_chunks": 2}, marks=slow),
        pytest.param("bert", 4, {"tensor": 2, "pipeline": 2, "sequence": True}, marks=slow),
        pytest.param("bert", 4, {"tensor": 4, "zero_stage": 3}, marks=slow),
        pytest.param("bert", 4, {"engine": "fsdp2", "tensor": 2, "zero_stage": 3, "sequence": True}, marks=slow),
        pytest.param("bert_untied", 4, {"tensor": 2, "pipeline": 2}, marks=slow),
        pytest.param("bert_untied", 2, {"engine": "fsdp2", "zero_stage": 3}, marks=slow),
        ("vit", 2, {"tensor": 2, "sequence": True, "recompute": "full"}),
        ("vit", 2, {"zero_stage": 3}),
        pytest.param("vit", 2, {"zero_stage": 1}, marks=slow),
        pytest.param("vit", 2, {"zero_stage": 2, "recompute": "selective"}, marks=slow),
        pytest.param("vit", 2, {"pipeline": 2}, marks=slow),
        pytest.param("vit", 2, {"engine": "fsdp2", "zero_stage": 3}, marks=slow),
        pytest.param("vit", 2, {"engine": "fsdp2", "pipeline": 2, "pipeline_chunks": 2}, marks=slow),
        pytest.param("vit", 4, {"tensor": 4, "zero_stage": 1}, marks=slow),
        pytest.param("vit", 4, {"tensor": 2, "pipeline": 2, "sequence": True}, marks=slow),
        ("bert_classifier", 2, {"tensor": 2, "sequence": True, "recompute": "full"}),
        pytest.param("bert_classifier", 2, {"pipeline": 2}, marks=slow),
        pytest.param("bert_classifier", 2, {"zero_stage": 1}, marks=slow),
        pytest.param("bert_classifier", 2, {"zero_stage": 2, "recompute": "selective"}, marks=slow),
        pytest.param("bert_classifier", 2, {"engine": "fsdp2", "zero_stage": 3}, marks=slow),
        pytest.param("bert_classifier", 4, {"tensor": 4, "zero_stage": 3}, marks=slow),
        pytest.param("bert_classifier", 4, {"tensor": 2, "pipeline": 2, "sequence": True}, marks=slow),
        ("mistral", 2, {"tensor": 2, "sequence": True}),
        pytest.param("mistral", 2, {"pipeline": 2}, marks=slow),
        pytest.param("mistral", 4, {"tensor": 2, "pipeline": 2, "recompute": "selective"}, marks=slow),
        pytest.param("qwen3", 2, {"tensor": 2, "sequence": True, "recompute": "full"}, marks=slow),
        pytest.param("qwen3", 2, {"zero_stage": 3}, marks=slow),
        pytest.param("qwen3_mqa", 4, {"tensor": 4, "zero_stage": 2}, marks=slow),
        pytest.param("qwen3_mqa", 4, {"tensor": 2, "zero_stage": 3, "recompute": "selective"}, marks=slow),
        pytest.param("qwen3", 4, {"tensor": 2, "pipeline": 2, "sequence": True}, marks=slow),
        pytest.param("qwen3", 4, {"tensor": 4, "sequence": True}, marks=slow),
    ],
)
def test_a_layout_trains_as_one_rank_does(model: str, num_ranks: int, parallel: dict[str, Any], pool: Pool) -> None:
    config = pool.config(model, parallel=parallel)
    pool.train(num_ranks, config, NUM_STEPS).assert_equals(pool.alone(model, NUM_STEPS))


@pytest.fixture
def config_of(pool: Pool, sentinel_data: Path, translations: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """The config of a family, on data of its kind."""

    def made(family: str, **sections: Any) -> dict[str, Any]:
        if family in DATA_OF:
            return pool.config(family, **sections)
        if family == "marian":
            own = text_of("sequence_to_sequence", translations, tmp_path, family)
        else:
            own = text_of("span_corruption", sentinel_data, tmp_path)
        return parity_config(pool.data, family, **own, **sections)

    return made


@pytest.mark.parametrize(
    "family", ["bert", *(pytest.param(name, marks=longer) for name in ("t5", "t5_tied", "marian", "vit"))]
)
@pytest.mark.slow
def test_tensor_ranks_hold_the_same_after_twenty_steps(
    family: str, config_of: Callable[..., dict[str, Any]], pool: Pool
) -> None:
    """Norms, positions, segments, what transforms a head's input, biases of rows: the worker compares all of them."""
    parallel = {"tensor": 2, "sequence": True, "zero_stage": 1}
    config = config_of(family, parallel=parallel, train={"steps": 20, "micro_batch_size": 2})
    assert pool.answer(2, {"config": config, "num_steps": 20})["difference"] is None


@slow
@pytest.mark.parametrize("family", ["bert", *(pytest.param(name, marks=longer) for name in ("t5", "marian", "vit"))])
def test_recomputation_repeats_what_was_dropped(
    family: str, config_of: Callable[..., dict[str, Any]], pool: Pool
) -> None:
    dropping = {"attention_dropout": 0.1, "hidden_dropout": 0.1}
    parallel = {"tensor": 2, "sequence": True, "zero_stage": 1}

    def train(recompute: str) -> Figures:
        sections = {"parallel": {**parallel, "recompute": recompute}, "train": {"micro_batch_size": 2}}
        return pool.train(2, config_of(family, model=dropping, **sections), 4)

    kept = train("none")
    train("selective").assert_is(kept)
    train("full").assert_is(kept)


@slow
@pytest.mark.sample(2)
@pytest.mark.parametrize("family", ["bert", "t5", "marian", "vit"])
def test_a_gpus_kernels_train_a_family_the_same(
    family: str, config_of: Callable[..., dict[str, Any]], pool: Pool
) -> None:
    """Fused attention (but under a relative bias) and norms, beside what a CPU computes by itself on one rank."""
    kernel = "auto" if family == "t5" else "flash"
    parallel = {"tensor": 2, "sequence": True}
    alone = pool.train(1, config_of(family, train={"micro_batch_size": 8}), NUM_STEPS)
    config = config_of(family, model={"attention": kernel}, parallel=parallel, train={"micro_batch_size": 4})
    pool.train(2, config, NUM_STEPS, gpu_kernels=True).assert_equals(alone)


@pytest.mark.parametrize("family", ["bert", *(pytest.param(name, marks=slow) for name in ("t5", "marian", "vit"))])
def test_norms_biases_and_positions_do_not_decay(
    family: str, config_of: Callable[..., dict[str, Any]], pool: Pool
) -> None:
    """In the first step decay takes its share of the initial weight; what the gradient does is not changed by it."""

    def weights(num_steps: int, decay: float) -> dict[str, torch.Tensor]:
        optimizer = {"lr": 1.0e-2, "weight_decay": decay}
        config = config_of(family, optimizer=optimizer, schedule={"warmup_steps": 0}, parallel={"zero_stage": 0})
        return pool.train(1, config, num_steps).weights

    before, plain, decayed = weights(0, 0.0), weights(1, 0.0), weights(1, 4.0)
    for name, weight in decayed.items():
        share = 0.0 if FAMILIES[family].kind_of(name) in ("norms", "biases", "positions") else 1.0e-2 * 4.0
        torch.testing.assert_close(plain[name] - weight, share * before[name], rtol=1e-3, atol=1e-6, msg=name)


SPLIT = {"tensor": 2, "sequence": True, "zero_stage": 3}
SCALED = [
    *((name, SPLIT) for name in ("t5", "bert", "vit")),
    ("t5_tied", {"pipeline": 2, "zero_stage": 1}),
    ("t5", {"engine": "fsdp2", "pipeline": 2, "zero_stage": 3}),
]


@pytest.mark.parametrize(("family", "parallel"), [pytest.param(*case, marks=longer) for case in SCALED], ids=str)
def test_scaled_steps_are_those_of_one_rank(
    family: str, parallel: dict[str, Any], config_of: Callable[..., dict[str, Any]], pool: Pool
) -> None:
    def trained(num_ranks: int, parallel: dict[str, Any], micro_batch_size: int) -> Figures:
        optimizer, train = {"lr": 1.0e-2, "scale_parameter": True}, {"micro_batch_size": micro_batch_size}
        return pool.train(num_ranks, config_of(family, optimizer=optimizer, parallel=parallel, train=train), 4)

    trained(2, parallel, 2).assert_equals(trained(1, {"zero_stage": 0}, 8))
