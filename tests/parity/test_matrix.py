"""Every layout trains the same model: each loss, each gradient norm and the final weights are those of one rank.

`make test` trains the quick cases, `-m slow` what else a pairwise cover needs, and MEGATRAIN_ACCEPTANCE=1 all.
"""

from __future__ import annotations

import pytest

from tests.parity.figures import Pool
from tests.parity.matrix import Case, all_cases, cover_cases, quick_cases
from tests.runs import ACCEPTANCE


def _selected() -> list[object]:
    quick = set(quick_cases())
    chosen = all_cases() if ACCEPTANCE else cover_cases()
    return [pytest.param(case, id=str(case), marks=() if case in quick else pytest.mark.slow) for case in chosen]


@pytest.mark.parametrize("case", _selected())
def test_a_layout_trains_as_one_rank_does(case: Case, pool: Pool) -> None:
    pool.train(case.world_size, case.config(pool.data)).assert_equals(pool.alone(case.model))
