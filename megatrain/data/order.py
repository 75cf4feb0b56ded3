"""The k-th sample of a run: which window of which dataset, for any k, from a few integers. No state, no torch.

Three pure steps. A run's steps fall into segments (one, unless the batch size or the weights were changed at a resume);
a segment's mixture says which dataset the j-th sample comes from and how many of that dataset came before; and a
permutation of each epoch says which window that is. Within an epoch of a dataset no window is seen twice or skipped,
whatever the segments, because each segment goes on counting where the one before stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from megatrain.data.mixture import Mixture

Indices = NDArray[np.int64]

_NUM_ROUNDS = 6


@dataclass(frozen=True)
class Permutation:
    """A bijection of [0, size), chosen by ``key``: a Feistel network on the next even number of bits, walked along its
    cycle until it lands inside (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002)."""

    size: int
    key: tuple[int, ...]

    def __call__(self, index: Indices) -> Indices:
        """Map each index; all must lie in [0, size)."""
        value: NDArray[np.uint64] = self._encrypt(index.astype(np.uint64))
        outside = value >= self.size
        while outside.any():  # the domain is less than four times the size: few walks
            value[outside] = self._encrypt(value[outside])
            outside = value >= self.size
        return value.astype(np.int64)

    @cached_property
    def _half_bits(self) -> int:
        return max(1, (max(self.size - 1, 1).bit_length() + 1) // 2)

    @cached_property
    def _round_keys(self) -> NDArray[np.uint64]:
        return np.asarray(np.random.SeedSequence(self.key).generate_state(_NUM_ROUNDS, np.uint64), dtype=np.uint64)

    def _encrypt(self, value: NDArray[np.uint64]) -> NDArray[np.uint64]:
        bits = np.uint64(self._half_bits)
        mask = np.uint64((1 << self._half_bits) - 1)
        left, right = value >> bits, value & mask
        for key in self._round_keys:
            left, right = right, left ^ (_mix(right, key) & mask)
        return (left << bits) | right


def _mix(value: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    """The finalizer of SplitMix64 (Steele, Lea, Flood 2014), keyed: any bit of the input reaches every bit out."""
    mixed = value + key
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


@dataclass(frozen=True)
class Segment:
    """Steps from ``first_step`` on, until the next segment's: the batch size and weights that hold there.

    ``consumed``: how many samples of each dataset the run had used when the segment began. ``samples_before``: how many
    of all.
    """

    first_step: int
    global_batch_size: int
    weights: tuple[float, ...]
    consumed: tuple[int, ...]
    samples_before: int = 0


@dataclass(frozen=True)
class Samples:
    """Where each of n samples lies. Arrays of n: dataset's number, epoch of it, window in it, number in the run."""

    dataset: Indices
    epoch: Indices
    window: Indices
    number: Indices


@dataclass(frozen=True)
class DataOrder:
    """The global order of a run over datasets of ``num_windows`` windows each."""

    seed: int
    num_windows: tuple[int, ...]
    segments: tuple[Segment, ...]
    _mixtures: dict[tuple[float, ...], Mixture] = field(default_factory=dict, repr=False, compare=False)
    _shuffles: dict[int, Permutation] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def begin(
        cls, seed: int, num_windows: Sequence[int], weights: Sequence[float], global_batch_size: int
    ) -> DataOrder:
        """The order of a run that starts at step 0."""
        if min(num_windows) < 1:
            raise ValueError("every dataset needs at least one window")
        segment = Segment(0, global_batch_size, tuple(weights), (0,) * len(num_windows))
        return cls(seed, tuple(num_windows), (segment,))

    def change(self, step: int, weights: Sequence[float], global_batch_size: int) -> DataOrder:
        """The same order up to ``step``, then with another batch size or other weights (no change: the same order)."""
        last = self._segment(step)
        if (tuple(weights), global_batch_size) == (last.weights, last.global_batch_size):
            return self
        used = (step - last.first_step) * last.global_batch_size
        counts = self._mixture(last.weights).counts_before(used)
        consumed = tuple(before + int(count) for before, count in zip(last.consumed, counts, strict=True))
        fresh = Segment(step, global_batch_size, tuple(weights), consumed, last.samples_before + used)
        kept = tuple(segment for segment in self.segments if segment.first_step < step)
        return replace(self, segments=(*kept, fresh))

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> Samples:
        """Samples [start, stop) of the global batch of ``step`` (steps count from 0); all of it by default."""
        segment = self._segment(step)
        stop = segment.global_batch_size if stop is None else stop
        offset = (step - segment.first_step) * segment.global_batch_size
        numbers = np.arange(offset + start, offset + stop, dtype=np.int64)
        dataset, count = self._mixture(segment.weights).lookup(numbers)
        nth = count + np.asarray(segment.consumed, dtype=np.int64)[dataset]
        epoch, position = np.divmod(nth, np.asarray(self.num_windows, dtype=np.int64)[dataset])
        window = np.empty_like(position)
        for source, lap in np.unique(np.stack([dataset, epoch]), axis=1).T.tolist():
            chosen = (dataset == source) & (epoch == lap)
            window[chosen] = self._shuffle(source, lap)(position[chosen])
        return Samples(dataset, epoch, window, numbers + segment.samples_before)

    def num_samples_before(self, step: int) -> int:
        """How many samples the steps before ``step`` use."""
        segment = self._segment(step)
        return segment.samples_before + (step - segment.first_step) * segment.global_batch_size

    def global_batch_size(self, step: int) -> int:
        """Sequences in the global batch of ``step``."""
        return self._segment(step).global_batch_size

    def _segment(self, step: int) -> Segment:
        return next(segment for segment in reversed(self.segments) if segment.first_step <= step)

    def _shuffle(self, source: int, lap: int) -> Permutation:
        """The permutation of a dataset's epoch; the one used last is kept, for its keys take longer than its use."""
        shuffle = self._shuffles.get(source)
        if shuffle is None or shuffle.key[-1] != lap:
            shuffle = Permutation(self.num_windows[source], (self.seed, source, lap))
            self._shuffles[source] = shuffle
        return shuffle

    def _mixture(self, weights: tuple[float, ...]) -> Mixture:
        return self._mixtures.setdefault(weights, Mixture(weights))
