"""The best interval between saves, and the goodput that is left, against a job that fails at random."""

from __future__ import annotations

import math
import random

import pytest

from megatrain.plan.goodput import Failures, best_interval, goodput

HOURLY = Failures(mtbf=3600.0, checkpoint=30.0, restart=200.0)
RARE = Failures(mtbf=30 * 86400.0, checkpoint=5.0, restart=600.0)
HARSH = Failures(mtbf=600.0, checkpoint=60.0, restart=120.0)


def simulate(failures: Failures, interval: float, num_cycles: int) -> float:
    """Goodput of a job that trains ``num_cycles`` intervals, each saved, whatever it takes."""
    draw = random.Random(1).expovariate
    wall, next_failure = 0.0, draw(1 / failures.mtbf)

    def lasts(seconds: float) -> bool:
        """Let the time pass; whether nothing failed."""
        nonlocal wall, next_failure
        if wall + seconds <= next_failure:
            wall += seconds
            return True
        wall = next_failure
        next_failure = wall + draw(1 / failures.mtbf)
        return False

    for _ in range(num_cycles):
        while not lasts(interval + failures.checkpoint):
            while not lasts(failures.restart):
                pass
    return num_cycles * interval / wall


@pytest.mark.parametrize("failures", [HOURLY, HARSH], ids=["hourly", "harsh"])
@pytest.mark.parametrize("stretch", [0.5, 1.0, 2.0])
def test_goodput_is_that_of_a_simulated_job(failures, stretch):
    interval = stretch * best_interval(failures)
    assert goodput(failures, interval) == pytest.approx(simulate(failures, interval, 40_000), rel=0.01)


@pytest.mark.parametrize("failures", [HOURLY, RARE, HARSH], ids=["hourly", "rare", "harsh"])
def test_no_other_interval_is_better(failures):
    best = best_interval(failures)
    others = [best * factor for factor in (0.1, 0.5, 0.9, 0.99, 1.01, 1.1, 2.0, 10.0)]
    assert all(goodput(failures, other) < goodput(failures, best) for other in others)


def test_rare_failures_give_the_interval_of_young():
    best, mtbf = best_interval(RARE), RARE.mtbf
    assert best == pytest.approx(math.sqrt(2 * RARE.checkpoint * mtbf), rel=0.01)
    lost = RARE.checkpoint / best + best / (2 * mtbf) + RARE.restart / mtbf
    assert 1 - goodput(RARE, best) == pytest.approx(lost, rel=0.01)


@pytest.mark.parametrize("failures", [HOURLY, HARSH], ids=["hourly", "harsh"])
def test_it_is_daly_s_higher_order_estimate(failures):
    """Good to where a save takes twice the time between failures."""
    cost, mtbf = failures.checkpoint, failures.mtbf
    root = math.sqrt(cost / (2 * mtbf))
    estimate = math.sqrt(2 * cost * mtbf) * (1 + root / 3 + cost / (18 * mtbf)) - cost
    assert best_interval(failures) == pytest.approx(estimate, rel=0.005)


def test_what_costs_nothing_is_done_all_the_time():
    free = Failures(mtbf=3600.0, checkpoint=0.0, restart=360.0)
    assert best_interval(free) == 0.0
    assert goodput(free, 0.0) == pytest.approx(math.exp(-0.1))
    assert goodput(Failures(3600.0, 0.0, 0.0), 0.0) == 1.0


@pytest.mark.parametrize("failures", [Failures(1.0, 1e5, 0.0), Failures(1e-3, 1.0, 1e6)], ids=["saves", "restarts"])
def test_a_hopeless_job_has_no_goodput(failures):
    interval = best_interval(failures)
    assert 0.0 < interval <= failures.mtbf
    assert goodput(failures, interval) == 0.0


def test_more_nodes_fail_more_often():
    few, many = (Failures.of_nodes(nodes, 6300.0, 5.0, 600.0) for nodes in (8, 512))
    assert (few.mtbf, many.mtbf) == (6300 * 3600 / 8, 6300 * 3600 / 512)
    assert best_interval(few) == pytest.approx(8 * best_interval(many), rel=0.01)
    assert goodput(few, best_interval(few)) > goodput(many, best_interval(many))
