"""Encoders with their decoders: every layout trains what one rank does, and a resumed run the same to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.parity.figures import Pool
from tests.parity.matrix import parity_config
from tests.parity.saves import write_manifest

LONGER = (pytest.mark.slow, pytest.mark.acceptance)
NUM_STEPS = 4
SPANS, PAIRS = "span_corruption", "sequence_to_sequence"
QUICK: list[tuple[str, str, int, dict[str, Any]]] = [
    ("t5", PAIRS, 2, {"tensor": 2, "sequence": True}),
    ("t5_tied", SPANS, 2, {"zero_stage": 3}),
    ("marian", PAIRS, 2, {"tensor": 2, "sequence": True, "recompute": "full"}),
]
LAYOUTS = [
    *QUICK,
    *(("t5", SPANS, 2, {"zero_stage": stage}) for stage in range(3)),
    ("t5", PAIRS, 2, {"zero_stage": 1, "recompute": "full"}),
    ("t5", PAIRS, 2, {"tensor": 2, "recompute": "selective"}),
    ("t5_tied", PAIRS, 4, {"tensor": 2, "zero_stage": 3}),
    ("t5_tied", PAIRS, 4, {"tensor": 4, "sequence": True, "recompute": "full"}),
    ("t5_tied", PAIRS, 4, {"tensor": 2, "zero_stage": 2}),
    *(("marian", PAIRS, 2, {"zero_stage": stage}) for stage in range(4)),
    ("marian", PAIRS, 2, {"tensor": 2, "recompute": "selective"}),
    ("marian", PAIRS, 4, {"tensor": 2, "zero_stage": 3}),
    ("marian_untied", PAIRS, 2, {"tensor": 2}),
    ("marian_untied", PAIRS, 4, {"tensor": 4, "sequence": True, "zero_stage": 2}),
]


def sections(objective: str, data: Path, folder: Path, model: str = "t5") -> dict[str, dict[str, Any]]:
    smoothing = {"label_smoothing": 0.1} if model == "marian" else {}
    return {
        "run": {"dir": str(folder)},
        "data": {"train": [str(data)], "validation": [], "seq_len": 44},
        "objective": {"type": objective, "target_len": 36 if objective == PAIRS else None, **smoothing},
    }


@pytest.fixture
def datasets(translations: Path, sentinel_data: Path) -> dict[str, Path]:
    return {PAIRS: translations, SPANS: sentinel_data}


@pytest.mark.parametrize(
    ("model", "objective", "num_ranks", "parallel"),
    [pytest.param(*row, marks=() if row in QUICK else LONGER) for row in LAYOUTS],
    ids=str,
)
def test_a_layout_trains_as_one_rank_does(
    model: str,
    objective: str,
    num_ranks: int,
    parallel: dict[str, Any],
    pool: Pool,
    datasets: dict[str, Path],
    tmp_path: Path,
) -> None:
    own = sections(objective, datasets[objective], tmp_path, model)
    train = {"micro_batch_size": 2}
    found = pool.train(num_ranks, parity_config(pool.data, model, **own, parallel=parallel, train=train), NUM_STEPS)
    found.assert_equals(pool.alone(model, NUM_STEPS, **own))


@pytest.mark.parametrize("objective", [SPANS, pytest.param(PAIRS, marks=LONGER)])
def test_a_resumed_pair_of_stacks_is_bit_equal(
    objective: str, pool: Pool, datasets: dict[str, Path], tmp_path: Path
) -> None:
    own = sections(objective, datasets[objective], tmp_path)
    dropping = {"attention_dropout": 0.1, "hidden_dropout": 0.1}
    config = parity_config(pool.data, "t5", **own, model=dropping, train={"micro_batch_size": 2})
    whole = pool.answer(2, {"config": config, "num_steps": 4, "save": str(tmp_path / "half"), "save_after": 2})
    assert len(set(whole["losses"])) == 4
    write_manifest(tmp_path / "half", config, 2)
    rest = {"first_step": 2, "num_steps": 2, "load": str(tmp_path / "half"), "num_updates": 2}
    found = pool.answer(2, {"config": config, **rest})
    assert found["losses"] == whole["losses"][2:]
    assert found["norms"] == whole["norms"][2:]
