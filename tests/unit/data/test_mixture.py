from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatrain.data.mixture import BLOCK, Mixture

weights = st.lists(st.floats(0.001, 1000.0), min_size=1, max_size=6)
far_apart = st.lists(
    st.one_of(st.floats(0.0, allow_nan=False, allow_infinity=False), st.sampled_from([1e-300, 1.0, 1e6, 5e12])),
    min_size=1,
    max_size=50,
).filter(any)


@settings(deadline=None)
@given(weights)
def test_a_block_holds_each_dataset_by_its_weight(given_weights: list[float]) -> None:
    mixture = Mixture(given_weights)
    share = np.asarray(given_weights) / sum(given_weights)
    assert mixture.quotas.sum() == BLOCK
    assert np.abs(mixture.quotas - share * BLOCK).max() <= len(given_weights)
    assert mixture.quotas.min() >= 1


@settings(deadline=None)
@given(weights, st.integers(0, 3 * BLOCK), st.integers(1, 500))
def test_a_sample_number_counts_those_before_it(given_weights: list[float], first: int, length: int) -> None:
    mixture = Mixture(given_weights)
    dataset, count = mixture.lookup(np.arange(first, first + length))
    seen = mixture.counts_before(first).copy()
    for source, nth in zip(dataset, count, strict=True):
        assert nth == seen[source]
        seen[source] += 1
    assert np.array_equal(seen, mixture.counts_before(first + length))


@settings(deadline=None)
@given(weights, st.integers(0, 2 * BLOCK), st.integers(1, 2000))
def test_any_stretch_keeps_the_mixture_weights(given_weights: list[float], first: int, length: int) -> None:
    mixture = Mixture(given_weights)
    seen = mixture.counts_before(first + length) - mixture.counts_before(first)
    assert np.abs(seen - length * mixture.quotas / BLOCK).max() <= len(given_weights) + 1


@settings(deadline=None, max_examples=300)
@given(far_apart)
@example([5e12, 1e12, 1e6, 1e6, 1e6, 1e6])
@example([1e308, 1e308, 5e-324])
@example([sys.float_info.max] * 3)
def test_every_positive_weight_is_drawn_however_small(given_weights: list[float]) -> None:
    quotas = Mixture(given_weights).quotas
    assert quotas.sum() == BLOCK
    assert [quota > 0 for quota in quotas] == [weight > 0 for weight in given_weights]
    order = np.argsort(given_weights, kind="stable")
    assert (np.diff(quotas[order]) >= -1).all(), "a larger weight is drawn as often or more, but for rounding"


def test_small_weights_take_from_others_in_proportion() -> None:
    quotas = Mixture([60_000.0, 5_000.0, *[1e-9] * 500]).quotas
    assert quotas[2:].tolist() == [1] * 500
    assert quotas[0] / quotas[1] == pytest.approx(12.0, abs=0.01)


def test_more_datasets_than_a_block_holds_are_refused() -> None:
    assert Mixture([1.0] * BLOCK).quotas.tolist() == [1] * BLOCK
    assert Mixture([5.0, *[0.1] * (BLOCK - 1)]).quotas.tolist() == [1] * BLOCK
    with pytest.raises(ValueError, match="at most 65,536 datasets"):
        Mixture([1.0] * (BLOCK + 1))


def test_a_weight_of_zero_is_never_drawn() -> None:
    dataset, _ = Mixture([1.0, 0.0, 3.0]).lookup(np.arange(BLOCK))
    assert np.bincount(dataset, minlength=3).tolist() == [BLOCK // 4, 0, 3 * BLOCK // 4]


@pytest.mark.parametrize("wrong", [[], [0.0], [0.0, 0.0], [-1.0, 2.0], [float("nan")], [float("inf"), 1.0]])
def test_weights_that_make_no_mixture_are_refused(wrong: list[float]) -> None:
    with pytest.raises(ValueError, match="weights"):
        Mixture(wrong)
