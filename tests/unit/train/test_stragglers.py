"""Which rank is slow, by the seconds of all of them."""

from __future__ import annotations

import pytest

from megatrain.observe.metrics import Spread
from megatrain.train.stragglers import ARITHMETIC, PARTS, Straggler, find_slow, spread_of

STEADY = {part: Spread(0.1, 0.1, 0.1, 0) for part in (*PARTS, ARITHMETIC)}


def test_the_rank_that_took_most_is_the_slowest() -> None:
    assert spread_of([1.0, 5.0, 2.0]) == Spread(1.0, 2.0, 5.0, 1)
    assert spread_of([1.0, 3.0]) == Spread(1.0, 1.0, 3.0, 1)


def test_ranks_alike_have_no_straggler() -> None:
    assert find_slow(STEADY) == []


def test_waiting_for_a_slow_rank_is_not_slowness() -> None:
    assert find_slow({**STEADY, "forward_backward": Spread(0.1, 0.1, 9.0, 3)}) == []


@pytest.mark.parametrize(("part", "slowest"), [(ARITHMETIC, 2), ("data", 5)])
def test_a_slow_rank_is_named_with_its_part(part: str, slowest: int) -> None:
    assert find_slow({**STEADY, part: Spread(0.1, 0.1, 0.3, slowest)}) == [Straggler(slowest, part)]


def test_negligible_parts_of_a_step_are_not_named() -> None:
    assert find_slow({**STEADY, "data": Spread(0.0001, 0.0001, 0.01, 1)}) == []
