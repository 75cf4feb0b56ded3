from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from megatrain.data.permutation import shuffle, shuffle_keys


def shuffled(size: int, *key: int, index: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
    index = np.arange(size) if index is None else index
    seed, *numbers = key
    keys = shuffle_keys(seed, *(np.full_like(index, number) for number in numbers))
    return shuffle(index, np.full_like(index, size), keys)


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**63 - 1), st.integers(0, 5))
def test_every_index_is_hit_once(size: int, seed: int, epoch: int) -> None:
    assert np.array_equal(np.sort(shuffled(size, seed, 0, epoch)), np.arange(size))


@settings(deadline=None)
@given(st.lists(st.integers(1, 10**13), min_size=1, max_size=8), st.integers(0, 2**63 - 1), st.data())
def test_vectorized_permutations_equal_single_ones(sizes: list[int], seed: int, data: st.DataObject) -> None:
    index = np.array([data.draw(st.integers(0, size - 1)) for size in sizes])
    numbers = np.arange(len(sizes))
    together = shuffle(index, np.array(sizes), shuffle_keys(seed, numbers))
    alone = [shuffled(size, seed, k, index=index[k : k + 1]).item() for k, size in enumerate(sizes)]
    assert together.tolist() == alone
    assert (together < sizes).all()


def test_the_shuffle_is_another_for_each_key() -> None:
    keys = [(1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1), (1, 0, 0, 1), (0, 1, 0)]
    orders = {tuple(shuffled(1000, *key)) for key in keys}
    assert len(orders) == len(keys)
    assert tuple(range(1000)) not in orders


def test_neighbours_do_not_stay_together() -> None:
    """Of a fair shuffle, one in 100,000 pairs of neighbours stays one; and the mean distance is a third of the size."""
    size = 100_000
    for seed in range(5):
        distance = np.abs(np.diff(shuffled(size, seed, 0, 0)))
        assert (distance == 1).sum() < 20
        assert abs(distance.mean() / size - 1 / 3) < 0.01


def test_where_an_index_lands_is_fair() -> None:
    """Chi-squared of the place of one index among 50, over 5,000 keys: 49 degrees of freedom, 5 deviations at most."""
    seeds, index = np.arange(5000), np.full(5000, 17)
    places = shuffle(index, np.full(5000, 50), shuffle_keys(3, seeds))
    counts = np.bincount(places, minlength=50)
    assert ((counts - 100) ** 2 / 100).sum() < 49 + 5 * np.sqrt(2 * 49)


def test_a_shuffle_of_a_trillion_evaluates_one_point() -> None:
    size = 10**12
    points = np.arange(size - 1000, size)
    found = shuffled(size, 1, 2, 3, index=points)
    assert len(np.unique(found)) == 1000
    assert found.max() < size
