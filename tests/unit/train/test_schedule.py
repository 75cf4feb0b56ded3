from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_inverse_sqrt_schedule

from megatrain.config import ScheduleConfig
from megatrain.train.schedule import learning_rate

PEAK = 2.0
TYPES = ("cosine", "wsd", "linear", "constant")
ALL_TYPES = (*TYPES, "inverse_sqrt")


def rates(num_steps: int, **keys: Any) -> list[float]:
    schedule = ScheduleConfig(**keys)
    return [learning_rate(schedule, PEAK, step, num_steps) for step in range(num_steps)]


@pytest.mark.parametrize("kind", ALL_TYPES)
def test_warm_up_rises_evenly_to_the_peak(kind: str) -> None:
    assert rates(20, type=kind, warmup_steps=4)[:4] == [0.5, 1.0, 1.5, 2.0]


@pytest.mark.parametrize("kind", TYPES)
def test_without_warm_up_training_begins_at_the_peak(kind: str) -> None:
    assert rates(20, type=kind, warmup_steps=0)[0] == PEAK


@pytest.mark.parametrize(("kind", "last"), [("cosine", 0.2), ("wsd", 0.2), ("linear", 0.2), ("constant", 2.0)])
@pytest.mark.parametrize("warmup", [0, 4])
def test_the_last_step_has_the_least_rate(kind: str, last: float, warmup: int) -> None:
    assert rates(20, type=kind, warmup_steps=warmup, min_lr_ratio=0.1)[-1] == pytest.approx(last, abs=1e-12)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("warmup", [0, 1])
def test_a_run_of_one_step_has_the_peak(kind: str, warmup: int) -> None:
    assert rates(1, type=kind, warmup_steps=warmup) == [PEAK]


@pytest.mark.parametrize("kind", ALL_TYPES)
def test_a_warm_up_of_full_length_only_rises(kind: str) -> None:
    assert rates(4, type=kind, warmup_steps=4) == [0.5, 1.0, 1.5, 2.0]


def test_cosine_is_half_way_down_in_the_middle() -> None:
    found = rates(13, type="cosine", warmup_steps=2, min_lr_ratio=0.5)
    assert found[2] == PEAK
    assert found[7] == pytest.approx(1.5)
    assert found[4] == pytest.approx(1.0 + 0.5 * (1 + math.cos(math.pi * 2 / 10)))


def test_linear_falls_by_the_same_amount_each_step() -> None:
    found = rates(12, type="linear", warmup_steps=1, min_lr_ratio=0.0)
    assert [a - b for a, b in pairwise(found[1:])] == pytest.approx([0.2] * 10)


def test_wsd_stays_at_the_peak_until_its_decay() -> None:
    found = rates(20, type="wsd", warmup_steps=2, decay_steps=5, min_lr_ratio=0.0)
    assert found[1:15] == [PEAK] * 14
    assert found[15:] == pytest.approx([1.6, 1.2, 0.8, 0.4, 0.0])


def test_wsd_decays_over_a_fifth_by_default() -> None:
    found = rates(20, type="wsd", warmup_steps=0, min_lr_ratio=0.5)
    assert found[:16] == [PEAK] * 16
    assert found[16:] == pytest.approx([1.75, 1.5, 1.25, 1.0])


@pytest.mark.parametrize("warmup", [1, 7, 40])
def test_inverse_square_root_is_that_of_transformers(warmup: int) -> None:
    """Its steps count from 0 and its warm-up begins at a rate of 0: our first step is its second."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    theirs = get_inverse_sqrt_schedule(optimizer, num_warmup_steps=warmup)
    found = []
    for _ in range(200):
        optimizer.step()
        theirs.step()
        found += theirs.get_last_lr()
    assert rates(200, type="inverse_sqrt", warmup_steps=warmup) == pytest.approx(found, rel=1e-12)


def test_inverse_square_root_is_that_of_the_papers() -> None:
    vaswani = [64**-0.5 * min(n**-0.5, n * 25**-1.5) for n in range(1, 201)]
    scale = PEAK / (64**-0.5 * 25**-0.5)
    found = rates(200, type="inverse_sqrt", warmup_steps=25)
    assert found == pytest.approx([scale * rate for rate in vaswani], rel=1e-12)
    t5 = [PEAK * 100**0.5 / math.sqrt(max(n, 100)) for n in range(1, 401)]
    assert rates(400, type="inverse_sqrt", warmup_steps=0, stable_steps=100) == pytest.approx(t5, rel=1e-12)


def test_inverse_square_root_knows_no_last_step() -> None:
    keys: dict[str, Any] = {"type": "inverse_sqrt", "warmup_steps": 4, "stable_steps": 9}
    assert rates(50, **keys) == rates(500, **keys)[:50]
    assert rates(36, **keys)[3:9] == [PEAK] * 6
    assert rates(36, **keys)[-1] == pytest.approx(PEAK / 2)


@given(
    kind=st.sampled_from(TYPES),
    num_steps=st.integers(1, 300),
    warmup=st.integers(0, 300),
    ratio=st.floats(0.0, 1.0),
)
def test_after_warm_up_it_only_falls_within_bounds(kind: str, num_steps: int, warmup: int, ratio: float) -> None:
    warmup = min(warmup, num_steps)
    found = rates(num_steps, type=kind, warmup_steps=warmup, min_lr_ratio=ratio)
    after = found[max(warmup - 1, 0) :]
    assert after[0] == PEAK
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(after))
    assert min(after) >= PEAK * ratio - 1e-12
    assert all(rate > 0 for rate in found[:warmup])
