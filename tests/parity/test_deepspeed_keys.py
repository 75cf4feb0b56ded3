"""Every key of DeepSpeed's that passes through: the training of one rank, and a checkpoint that any layout loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatrain.config.deepspeed_keys import ZERO_PASSED_THROUGH
from tests.parity.figures import Figures, Pool, gather_state
from tests.parity.matrix import parity_config
from tests.parity.saves import write_manifest

NUM_STEPS = 4
ROWS: list[tuple[str, Any, tuple[int, ...]]] = [  # key, another value than what it is without, stages that read it
    ("allgather_bucket_size", 1000, (1, 2)),
    ("allgather_partitions", False, (1, 2)),
    ("contiguous_gradients", False, (1, 2, 3)),
    ("memory_efficient_linear", False, (3,)),
    ("overlap_comm", True, (2,)),
    ("overlap_comm", False, (3,)),
    ("parameter_alignment", True, (1, 2)),
    ("reduce_bucket_size", 3000, (1, 2, 3)),
    ("reduce_scatter", False, (1, 2, 3)),
    ("stage3_allgather_sequential", True, (3,)),
    ("stage3_max_live_parameters", 0, (3,)),
    ("stage3_max_reuse_distance", 0, (3,)),
    ("stage3_prefetch_bucket_size", 0, (3,)),
    ("stage3_use_all_reduce_for_fetch_params", True, (3,)),
    ("sub_group_size", 5000, (3,)),
    ("use_multi_rank_bucket_allreduce", True, (1, 2)),
]
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "data": (2, {}),
    "offloaded": (2, {"offload": "optimizer"}),
    "tensor": (4, {"tensor": 2}),
}


def test_every_key_that_passes_has_a_row() -> None:
    assert {key for key, _, _ in ROWS} == ZERO_PASSED_THROUGH


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_passed_keys_together_change_neither_training_nor_state(stage: int, pool: Pool, tmp_path: Path) -> None:
    check(pool, tmp_path, "data", stage, {key: value for key, value, stages in ROWS if stage in stages})


@pytest.mark.sample(5)
@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", ["data", *(pytest.param(name, marks=pytest.mark.acceptance) for name in ("offloaded", "tensor"))]
)
@pytest.mark.parametrize(
    ("key", "value", "stage"), [(key, value, stage) for key, value, stages in ROWS for stage in stages]
)
def test_a_passed_key_changes_neither_training_nor_state(
    key: str, value: Any, stage: int, layout: str, pool: Pool, tmp_path: Path
) -> None:
    check(pool, tmp_path, layout, stage, {key: value})


def check(pool: Pool, folder: Path, layout: str, stage: int, keys: dict[str, Any]) -> None:
    """Train with a checkpoint in the middle, and from there again: both are what one rank does without the keys."""
    num_ranks, parallel = LAYOUTS[layout]
    alone = pool.alone("llama_tied", NUM_STEPS)
    config = parity_config(pool.data, "llama_tied", parallel={"zero_stage": stage, **parallel})
    config["deepspeed"] = {"zero_optimization": keys}
    middle, end = folder / "middle", folder / "end"
    case = {"config": config, "num_steps": NUM_STEPS, "save": str(middle), "save_after": 2}
    straight = pool.answer(num_ranks, case)
    write_manifest(middle, config, 2)
    case = {"config": config, "first_step": 2, "load": str(middle), "num_updates": 2, "num_steps": 2, "save": str(end)}
    resumed = pool.answer(num_ranks, case)
    weights = {name: weight for (name, kind), weight in gather_state(end).items() if kind == "weight"}
    assert resumed["losses"] == straight["losses"][2:]
    Figures(straight["losses"], straight["norms"], resumed["validation"], weights).assert_equals(alone)
