from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.data.order import DataOrder, Permutation

sizes = st.lists(st.integers(1, 60), min_size=1, max_size=3)
# What holds from some step on: steps it lasts, batch size, weights of up to three datasets.
changes = st.lists(
    st.tuples(st.integers(1, 20), st.integers(1, 16), st.lists(st.floats(0.1, 10.0), min_size=3, max_size=3)),
    min_size=1,
    max_size=4,
)


def _run(seed: int, num_windows: list[int], parts: list[tuple[int, int, list[float]]]) -> tuple[DataOrder, int]:
    count = len(num_windows)
    order = DataOrder.begin(seed, num_windows, parts[0][2][:count], parts[0][1])
    step = 0
    for length, batch_size, given_weights in parts:
        order = order.change(step, given_weights[:count], batch_size)
        step += length
    return order, step


@given(st.integers(1, 3000), st.integers(0, 2**63 - 1), st.integers(0, 5))
def test_every_index_is_hit_once(size: int, seed: int, epoch: int) -> None:
    shuffled = Permutation(size, (seed, 0, epoch))(np.arange(size))
    assert np.array_equal(np.sort(shuffled), np.arange(size))


def test_the_order_is_shuffled_anew_for_each_seed_dataset_and_epoch() -> None:
    orders = {tuple(Permutation(1000, key)(np.arange(1000))) for key in [(1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1)]}
    assert len(orders) == 4
    assert tuple(range(1000)) not in orders


def test_neighbours_do_not_stay_together() -> None:
    """Of a fair shuffle, one in 100,000 pairs of neighbours stays one; and the mean distance is a third of the size."""
    size = 100_000
    shuffled = Permutation(size, (7, 0, 0))(np.arange(size))
    distance = np.abs(np.diff(shuffled))
    assert (distance == 1).sum() < 20
    assert abs(distance.mean() / size - 1 / 3) < 0.01


def test_a_permutation_of_a_trillion_is_evaluated_at_a_point() -> None:
    size = 10**12
    points = np.arange(size - 1000, size)
    assert len(np.unique(Permutation(size, (1, 2, 3))(points))) == 1000


@settings(deadline=None)
@given(st.integers(0, 2**32), sizes, changes)
def test_no_window_repeats_or_is_left_out_within_an_epoch_whatever_changes(
    seed: int, num_windows: list[int], parts: list[tuple[int, int, list[float]]]
) -> None:
    order, num_steps = _run(seed, num_windows, parts)
    batches = [order.batch(step) for step in range(num_steps)]
    for source, size in enumerate(num_windows):
        epochs = np.concatenate([batch.epoch[batch.dataset == source] for batch in batches])
        windows = np.concatenate([batch.window[batch.dataset == source] for batch in batches])
        assert np.array_equal(epochs, np.arange(len(epochs)) // size)  # one epoch after the other, each full
        for epoch in range(int(epochs.max(initial=-1)) + 1):
            seen = windows[epochs == epoch]
            assert len(np.unique(seen)) == len(seen)
            assert seen.max() < size


@settings(deadline=None)
@given(st.integers(0, 2**32), sizes, changes)
def test_samples_are_numbered_one_after_the_other_whatever_changes(
    seed: int, num_windows: list[int], parts: list[tuple[int, int, list[float]]]
) -> None:
    order, num_steps = _run(seed, num_windows, parts)
    numbers = np.concatenate([order.batch(step).number for step in range(num_steps)])
    assert np.array_equal(numbers, np.arange(sum(length * size for length, size, _ in parts)))
    assert order.num_samples_before(num_steps) == len(numbers)


@settings(deadline=None)
@given(st.integers(0, 2**32), sizes, st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(0, 10_000))
def test_the_shares_of_the_ranks_are_the_global_batch(
    seed: int, num_windows: list[int], num_ranks: int, step: int
) -> None:
    order = DataOrder.begin(seed, num_windows, [1.0] * len(num_windows), 12)
    whole, share = order.batch(step), 12 // num_ranks
    parts = [order.batch(step, rank * share, (rank + 1) * share) for rank in range(num_ranks)]
    for field in ("dataset", "epoch", "window", "number"):
        assert np.array_equal(np.concatenate([getattr(part, field) for part in parts]), getattr(whole, field))


def test_a_change_to_what_holds_already_is_none() -> None:
    order = DataOrder.begin(1, [10, 20], [1.0, 2.0], 4)
    assert order.change(5, [1.0, 2.0], 4) is order


def test_a_change_does_not_touch_the_steps_before_it() -> None:
    order = DataOrder.begin(1, [100, 200], [1.0, 2.0], 4)
    changed = order.change(5, [1.0, 1.0], 8)
    for step in range(5):
        assert np.array_equal(changed.batch(step).window, order.batch(step).window)
    assert changed.global_batch_size(4) == 4
    assert changed.global_batch_size(5) == 8


def test_going_back_and_changing_again_forgets_what_came_after() -> None:
    order = DataOrder.begin(1, [100], [1.0], 4).change(10, [1.0], 8)
    again = order.change(6, [1.0], 2)
    assert [segment.first_step for segment in again.segments] == [0, 6]
