"""The global order: each epoch a permutation, whatever changes, whoever asks, and from whichever step."""

from __future__ import annotations

import itertools
from dataclasses import replace
from itertools import pairwise
from random import Random
from typing import NamedTuple

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.config.batch_size import BatchSize
from megatrain.data.order import DataOrder, Samples, SamplingSettings, Segment

SEQ_LENS = (16, 8, 4, 2)  # each divides those before it


class Part(NamedTuple):
    """Some steps under the same settings."""

    num_steps: int
    global_batch_size: BatchSize
    weights: list[float]
    seq_len: int
    new_epoch: bool


def ramp(entries: list[tuple[int, int]]) -> BatchSize:
    """Of pairs (tokens more than at the entry before, sequences)."""
    starts = itertools.accumulate((tokens for tokens, _ in entries[1:]), initial=0)
    return tuple((start, size) for start, (_, size) in zip(starts, entries, strict=True))


batch_sizes = st.integers(1, 12) | st.lists(
    st.tuples(st.integers(1, 1000), st.integers(1, 12)), min_size=1, max_size=4
).map(ramp)


def parts_of(shrinks: bool, restarts: bool) -> st.SearchStrategy[list[Part]]:
    part = st.builds(
        Part,
        st.integers(1, 12),
        batch_sizes,
        st.lists(st.floats(0.1, 10.0), min_size=3, max_size=3),
        st.sampled_from(SEQ_LENS) if shrinks else st.just(SEQ_LENS[0]),
        st.booleans() if restarts else st.just(False),
    )
    return st.lists(part, min_size=1, max_size=5)


tokens = st.lists(st.integers(SEQ_LENS[0] + 1, 1000), min_size=1, max_size=3)  # of each dataset
seeds = st.integers(0, 2**32)


def legal(parts: list[Part]) -> list[Part]:
    """The parts with samples that only become shorter, but where a new epoch begins."""
    seq_len, found = parts[0].seq_len, []
    for part in parts:
        seq_len = part.seq_len if part.new_epoch else min(part.seq_len, seq_len)
        found.append(part._replace(seq_len=seq_len))
    return found


def settings_of(part: Part, num_tokens: list[int], num_new_epochs: int = 0) -> SamplingSettings:
    return SamplingSettings(
        part.global_batch_size,
        tuple(part.weights[: len(num_tokens)]),
        part.seq_len,
        tuple((count - 1) // part.seq_len for count in num_tokens),
        num_new_epochs=num_new_epochs,
    )


def run(seed: int, num_tokens: list[int], parts: list[Part]) -> tuple[DataOrder, list[int]]:
    """The order of a run with these parts; the first step of each, and the last one's end."""
    order, steps, asked = DataOrder.begin(seed, settings_of(parts[0], num_tokens)), [0], 0
    for part in parts:
        asked += part.new_epoch
        order = order.change(steps[-1], settings_of(part, num_tokens, asked))
        steps.append(steps[-1] + part.num_steps)
    return order, steps


def seen(order: DataOrder, num_steps: int, source: int) -> list[tuple[int, int, int]]:
    """Epoch, and tokens [begin, end), of each sample of one dataset, in order."""
    found = []
    for step in range(num_steps):
        batch, length = order.batch(step), order.settings(step).seq_len
        mine = batch.dataset == source
        pairs = zip(batch.epoch[mine].tolist(), batch.index[mine].tolist(), strict=True)
        found += [(epoch, index * length, (index + 1) * length) for epoch, index in pairs]
    return found


@settings(deadline=None)
@given(seeds, tokens, parts_of(shrinks=False, restarts=False))
def test_changed_batches_and_weights_repeat_no_sample(seed: int, num_tokens: list[int], parts: list[Part]) -> None:
    order, steps = run(seed, num_tokens, parts)
    batches = [order.batch(step) for step in range(steps[-1])]
    for source, count in enumerate(num_tokens):
        size = (count - 1) // SEQ_LENS[0]
        epochs = np.concatenate([batch.epoch[batch.dataset == source] for batch in batches])
        indices = np.concatenate([batch.index[batch.dataset == source] for batch in batches])
        assert np.array_equal(epochs, np.arange(len(epochs)) // size)  # one epoch after the other, each full
        for epoch in range(int(epochs.max(initial=-1)) + 1):
            once = indices[epochs == epoch]
            assert len(np.unique(once)) == len(once)
            assert once.max() < size


@settings(deadline=None)
@given(seeds, tokens, parts_of(shrinks=True, restarts=False))
def test_shorter_samples_repeat_and_lose_no_token(seed: int, num_tokens: list[int], parts: list[Part]) -> None:
    parts = legal(parts)
    order, steps = run(seed, num_tokens, parts)
    assert_each_token_once_an_epoch(order, steps[-1], num_tokens)


def assert_each_token_once_an_epoch(order: DataOrder, num_steps: int, num_tokens: list[int]) -> None:
    for source, count in enumerate(num_tokens):
        samples = seen(order, num_steps, source)
        epochs = [epoch for epoch, _, _ in samples]
        assert epochs == sorted(epochs)
        for epoch in range(max(epochs, default=-1) + 1):
            spans = sorted((begin, end) for number, begin, end in samples if number == epoch)
            assert all(end <= begin for (_, end), (begin, _) in pairwise(spans)), "seen twice"
            assert spans[-1][1] < count
            if epoch < epochs[-1]:  # it is over: nothing but an end too short for one of its first samples is left
                assert spans[0][0] == 0
                assert all(end == begin for (_, end), (begin, _) in pairwise(spans)), "left out"
                assert count - 1 - spans[-1][1] < SEQ_LENS[0]


def test_an_epoch_cut_twice_is_seen_once() -> None:
    for seed in range(5):
        parts = [Part(4, 3, [1.0], 16, False), Part(5, 3, [1.0], 8, False), Part(5, 6, [1.0], 4, False)]
        order, steps = run(seed, [1000], [*parts, Part(110, 4, [1.0], 2, False)])
        assert [cursor.epoch for cursor in order.segments[-1].cursors] == [0]
        assert len(order.segments[-1].cursors[0].cuts) == 3
        assert order.batch(steps[-1] - 1).epoch[0] == 1
        assert_each_token_once_an_epoch(order, steps[-1], [1000])


@settings(deadline=None)
@given(seeds, tokens, parts_of(shrinks=True, restarts=True))
def test_a_new_epoch_drops_the_rest_without_repetition(seed: int, num_tokens: list[int], parts: list[Part]) -> None:
    order, steps = run(seed, num_tokens, legal(parts))
    for source in range(len(num_tokens)):
        samples = seen(order, steps[-1], source)
        assert [epoch for epoch, _, _ in samples] == sorted(epoch for epoch, _, _ in samples)
        for epoch in {epoch for epoch, _, _ in samples}:
            spans = sorted((begin, end) for number, begin, end in samples if number == epoch)
            assert all(end <= begin for (_, end), (begin, _) in pairwise(spans)), "seen twice"
    for first, part in zip(steps, parts, strict=False):
        after = order.batch(first)
        for source in np.unique(after.dataset).tolist():
            used = seen(order, first, source)
            if part.new_epoch and used:
                assert after.epoch[after.dataset == source][0] > used[-1][0]


@settings(deadline=None)
@given(seeds, tokens, parts_of(shrinks=True, restarts=True), st.randoms(use_true_random=False))
def test_random_access_equals_sequential_order(
    seed: int, num_tokens: list[int], parts: list[Part], random: Random
) -> None:
    parts = legal(parts)
    order, steps = run(seed, num_tokens, parts)
    batches = [order.batch(step) for step in range(steps[-1])]
    numbers = np.concatenate([batch.number for batch in batches])
    assert np.array_equal(numbers, np.arange(sum(order.batch_size(step) for step in range(steps[-1]))))
    assert order.num_samples_before(steps[-1]) == len(numbers)
    again = DataOrder(seed, order.segments)
    shuffled = list(range(steps[-1]))
    random.shuffle(shuffled)
    for step in shuffled[:20]:
        row = step % len(batches[step])
        assert_same(again.batch(step), batches[step])
        assert_same(again.batch(step, row, row + 1), batches[step].rows(slice(row, row + 1)))


@settings(deadline=None)
@given(seeds, tokens, batch_sizes, st.integers(0, 40), batch_sizes, st.integers(0, 40))
def test_a_ramp_takes_the_next_samples_each_step(
    seed: int, num_tokens: list[int], first: BatchSize, change_step: int, second: BatchSize, more_steps: int
) -> None:
    """As a loop over steps does that counts trained tokens, whatever is changed on the way."""
    one = settings_of(Part(1, 1, [1.0, 2.0, 0.5], 16, False), num_tokens)
    order = DataOrder.begin(seed, replace(one, global_batch_size=first))
    order = order.change(change_step, replace(one, global_batch_size=second))
    naive, num_samples = DataOrder.begin(seed, one), 0
    for step in range(change_step + more_steps):
        given = first if step < change_step else second
        entries = ((0, given),) if isinstance(given, int) else given
        size = [size for tokens, size in entries if tokens <= num_samples * 16][-1]
        batch = order.batch(step)
        assert len(batch) == order.batch_size(step) == size
        if not change_step or change_step > step:  # a change begins the mixture's block anew
            for row in range(size):
                assert_same(batch.rows(slice(row, row + 1)), naive.batch(num_samples + row))
        num_samples += size
    assert order.num_samples_before(change_step + more_steps) == num_samples


def test_batches_left_out_do_not_advance_a_ramp() -> None:
    order = DataOrder.begin(1, replace(SETTINGS, global_batch_size=((0, 4), (640, 8))))
    assert [order.batch_size(step) for step in (9, 10)] == [4, 8]
    left_out = order.leave_out(4, 8)
    assert [left_out.batch_size(step) for step in (9, 10)] == [4, 8]
    assert left_out.num_samples_before(4) == order.num_samples_before(8)


def test_a_ramp_of_a_segment_survives_a_manifest() -> None:
    order = DataOrder.begin(1, replace(SETTINGS, global_batch_size=((0, 4), (640, 8))))
    for segment in order.change(12, replace(SETTINGS, global_batch_size=((0, 4), (2000, 16)))).segments:
        assert Segment.from_state(orjson.loads(orjson.dumps(segment.to_state()))) == segment
    former = order.change(12, SETTINGS).segments[-1]
    state = {key: value for key, value in former.to_state().items() if key != "tokens_before"}
    assert Segment.from_state(state) == former  # of a manifest from before ramps


def assert_same(one: Samples, other: Samples) -> None:
    for name in ("dataset", "epoch", "index", "number"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name


@settings(deadline=None)
@given(seeds, tokens, st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(0, 10_000))
def test_shares_of_ranks_make_the_global_batch(seed: int, num_tokens: list[int], num_ranks: int, step: int) -> None:
    order = DataOrder.begin(seed, settings_of(Part(1, 12, [1.0] * 3, 16, False), num_tokens))
    whole, share = order.batch(step), 12 // num_ranks
    parts = [order.batch(step, rank * share, (rank + 1) * share) for rank in range(num_ranks)]
    for field in ("dataset", "epoch", "index", "number"):
        assert np.array_equal(np.concatenate([getattr(part, field) for part in parts]), getattr(whole, field))


SETTINGS = SamplingSettings(4, (1.0, 2.0), 16, (100, 200))


def test_parts_of_a_cut_sample_are_spread_out() -> None:
    order = DataOrder.begin(1, replace(SETTINGS, weights=(1.0, 0.0)))
    order = order.change(5, replace(SETTINGS, weights=(1.0, 0.0), seq_len=4, num_samples=(400, 800)))
    indices = np.concatenate([order.batch(step).index for step in range(5, 85)]) // 4
    assert (indices[1:] == indices[:-1]).mean() < 0.05


def test_an_unstarted_epoch_is_cut_anew() -> None:
    order = DataOrder.begin(1, replace(SETTINGS, weights=(1.0, 0.0)))
    shorter = order.change(5, replace(SETTINGS, seq_len=8, num_samples=(201, 401)))
    assert [len(cursor.cuts) for cursor in shorter.segments[1].cursors] == [1, 0]


def test_longer_samples_are_refused_within_an_epoch() -> None:
    for seq_len in (32, 12, 5):
        with pytest.raises(ValueError, match="must divide 16"):
            DataOrder.begin(1, SETTINGS).change(5, replace(SETTINGS, seq_len=seq_len))


def test_a_change_to_what_holds_already_is_none() -> None:
    order = DataOrder.begin(1, SETTINGS)
    assert order.change(5, replace(SETTINGS)) is order


def test_a_change_leaves_earlier_steps_alone() -> None:
    order = DataOrder.begin(1, SETTINGS)
    changed = order.change(5, replace(SETTINGS, global_batch_size=8, seq_len=8, num_samples=(200, 400)))
    for step in range(5):
        assert_same(changed.batch(step), order.batch(step))
    assert [changed.settings(step).global_batch_size for step in (4, 5)] == [4, 8]


def test_a_second_change_replaces_later_ones() -> None:
    order = DataOrder.begin(1, SETTINGS).change(10, replace(SETTINGS, global_batch_size=8))
    again = order.change(6, replace(SETTINGS, global_batch_size=2))
    assert [segment.first_step for segment in again.segments] == [0, 6]


def test_no_dataset_may_be_empty() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        DataOrder.begin(1, replace(SETTINGS, num_samples=(3, 0)))


def test_ordering_a_trillion_tokens_takes_no_memory() -> None:
    order = DataOrder.begin(1, SamplingSettings(1024, (3.0, 1.0), 2048, (488_281_250, 100_000_000)))
    order = order.change(10**5, SamplingSettings(1024, (3.0, 1.0), 1024, (976_562_500, 200_000_000)))
    batch = order.batch(10**6)
    assert len(np.unique(np.stack([batch.dataset, batch.epoch, batch.index]), axis=1).T) == 1024
    arrays = [value for segment in order.segments for value in vars(segment).values() if isinstance(value, np.ndarray)]
    assert sum(array.nbytes for array in arrays) < 1000


@given(seeds, tokens, parts_of(shrinks=True, restarts=True), st.data())
@settings(max_examples=60, deadline=None)
def test_only_the_named_batches_are_left_out(
    seed: int, num_tokens: list[int], drawn: list[Part], data: st.DataObject
) -> None:
    order, steps = run(seed, num_tokens, legal(drawn))
    first = data.draw(st.integers(0, steps[-1] - 1))
    until = steps[-1] + data.draw(st.integers(0, 5))
    shorter = order.leave_out(first, until)
    for step in range(first):
        assert_same(shorter.batch(step), order.batch(step))
    assert shorter.num_samples_before(first) == order.num_samples_before(until)
    for source in range(len(num_tokens)):
        behind = [read(order, range(start, start + 8), source) for order, start in ((order, until), (shorter, first))]
        shared = min(map(len, behind))
        assert behind[0][:shared] == behind[1][:shared]


def read(order: DataOrder, steps: range, source: int) -> list[tuple[int, int]]:
    """Epoch and index of each sample of one dataset in these steps."""
    samples = (sample for step in steps for sample in order.batch(step))
    return [(epoch, index) for dataset, epoch, index, _ in samples if dataset == source]
