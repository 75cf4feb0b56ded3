"""Classifiers of images train alike under every layout, augmented and mixed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.image_data import image_config
from tests.parity.figures import Figures, Pool
from tests.runs import TinyData

slow = pytest.mark.slow
NUM_STEPS = 5


def config_of(data: TinyData, parallel: dict[str, Any], **train: Any) -> dict[str, Any]:
    return image_config(data, Path("unused"), parallel=parallel, train={"micro_batch_size": 2, **train})


@pytest.fixture(scope="module")
def alone(pool: Pool, image_data: TinyData) -> Figures:
    return pool.train(1, config_of(image_data, {"zero_stage": 0}, micro_batch_size=8), NUM_STEPS)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("num_ranks", "parallel"),
    [
        (2, {"tensor": 2, "sequence": True, "recompute": "full"}),
        (2, {"zero_stage": 3}),
        pytest.param(2, {"zero_stage": 1}, marks=slow),
        pytest.param(2, {"zero_stage": 2, "recompute": "selective"}, marks=slow),
        pytest.param(2, {"pipeline": 2}, marks=slow),
        pytest.param(2, {"engine": "fsdp2", "zero_stage": 3}, marks=slow),
        pytest.param(4, {"tensor": 4, "zero_stage": 1}, marks=slow),
        pytest.param(4, {"tensor": 2, "pipeline": 2, "sequence": True}, marks=slow),
    ],
)
def test_images_train_as_on_one_rank(
    num_ranks: int, parallel: dict[str, Any], pool: Pool, image_data: TinyData, alone: Figures
) -> None:
    pool.train(num_ranks, config_of(image_data, parallel), NUM_STEPS).assert_equals(alone)
