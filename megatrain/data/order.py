"""The k-th sample of a run: which window of which dataset, for any k, from a few integers. No state, no torch.

Three pure steps. A run's steps fall into segments (one, unless the batch size, the weights or the sequence length were
changed at a resume, or batches were left out); a segment's mixture says which dataset the j-th sample comes from and
how many of that dataset came before; and a shuffle of each epoch says which window that is. Nothing here grows with the
corpus.

Within an epoch of a dataset no window is seen twice or skipped, whatever the segments: each goes on where the one
before stopped, but for batches that are left out on purpose. Where windows become shorter in the middle of an epoch,
those not yet seen are cut up and shuffled anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from megatrain.data.mixture import Mixture
from megatrain.data.permutation import shuffle, shuffle_keys

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class SamplingSettings:
    """What a segment is read under. For each dataset its weight, its windows of ``seq_len`` and its packing plan.

    ``plans``: names of the packing plans; empty where documents are not packed. ``num_new_epochs``: how often the run
    has been told to leave the rest of its epochs and begin the next ones.
    """

    global_batch_size: int
    weights: tuple[float, ...]
    seq_len: int
    num_windows: tuple[int, ...]
    plans: tuple[str, ...] = ()
    num_new_epochs: int = 0


@dataclass(frozen=True)
class EpochCut:
    """Of an epoch of ``num_windows``, ``used`` had been seen; each of the others became ``factor`` windows."""

    num_windows: int
    used: int
    factor: int

    @property
    def num_pieces(self) -> int:
        """Windows that the cut made."""
        return (self.num_windows - self.used) * self.factor


@dataclass(frozen=True)
class DatasetCursor:
    """How far a dataset has been read: ``position`` windows of its epoch, since the last of the epoch's ``cuts``."""

    epoch: int = 0
    position: int = 0
    cuts: tuple[EpochCut, ...] = ()

    def num_left(self, num_windows: int) -> int:
        """Windows of the epoch still to come, where an uncut one has ``num_windows``."""
        return self._size(num_windows) - self.position

    def advanced(self, count: int, num_windows: int) -> DatasetCursor:
        """The place ``count`` windows on."""
        beyond = count - self.num_left(num_windows)
        if beyond < 0:
            return replace(self, position=self.position + count)
        lap, position = divmod(beyond, num_windows)
        return DatasetCursor(self.epoch + 1 + lap, position)

    def cut(self, factor: int, num_windows: int) -> DatasetCursor:
        """What is left of the epoch in windows of 1/factor the length. An epoch not yet begun is not in need of it."""
        if self._is_new:
            return self
        return DatasetCursor(self.epoch, 0, (*self.cuts, EpochCut(self._size(num_windows), self.position, factor)))

    def at_new_epoch(self) -> DatasetCursor:
        """The beginning of the next epoch; this one, if nothing of it has been seen."""
        return self if self._is_new else DatasetCursor(self.epoch + 1)

    @property
    def _is_new(self) -> bool:
        return self.position == 0 and not self.cuts

    def _size(self, num_windows: int) -> int:
        return self.cuts[-1].num_pieces if self.cuts else num_windows


@dataclass(frozen=True)
class Segment:
    """Steps from ``first_step`` on, until the next segment's: the terms that hold there, and where reading begins.

    ``places``: of each dataset. ``samples_before``: how many samples the run had used of all.
    """

    first_step: int
    terms: SamplingSettings
    places: tuple[DatasetCursor, ...]
    samples_before: int = 0

    @cached_property
    def num_windows(self) -> Indices:
        """Of each dataset, as an array."""
        return np.asarray(self.terms.num_windows, dtype=np.int64)

    @cached_property
    def num_left(self) -> Indices:
        """Windows that were left of each dataset's epoch when the segment began."""
        pairs = zip(self.places, self.terms.num_windows, strict=True)
        return np.asarray([place.num_left(count) for place, count in pairs], dtype=np.int64)

    @cached_property
    def next_epoch(self) -> Indices:
        """The epoch of each dataset that comes when nothing is left of the one it was in."""
        return np.asarray([place.epoch + 1 for place in self.places], dtype=np.int64)

    @cached_property
    def cut_sources(self) -> list[int]:
        """Datasets whose epoch had been cut when the segment began."""
        return [number for number, place in enumerate(self.places) if place.cuts]


@dataclass(frozen=True)
class Samples:
    """Where each of n samples lies. Arrays of n: dataset's number, epoch of it, window in it, number in the run."""

    dataset: Indices
    epoch: Indices
    window: Indices
    number: Indices

    def __len__(self) -> int:
        return len(self.number)

    def places(self) -> Iterator[tuple[int, int, int]]:
        """Dataset, epoch and window of each."""
        return zip(self.dataset.tolist(), self.epoch.tolist(), self.window.tolist(), strict=True)

    def rows(self, rows: slice) -> Samples:
        """Some of them."""
        return Samples(self.dataset[rows], self.epoch[rows], self.window[rows], self.number[rows])


@dataclass(frozen=True)
class DataOrder:
    """The global order of a run."""

    seed: int
    segments: tuple[Segment, ...]
    _mixtures: dict[tuple[float, ...], Mixture] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def begin(cls, seed: int, terms: SamplingSettings) -> DataOrder:
        """The order of a run that starts at step 0."""
        if min(terms.num_windows) < 1:
            raise ValueError("every dataset needs at least one window")
        return cls(seed, (Segment(0, terms, (DatasetCursor(),) * len(terms.num_windows)),))

    def change(self, step: int, terms: SamplingSettings) -> DataOrder:
        """The same order up to ``step``, then under other terms (no change: the same order).

        New epochs begin where ``num_new_epochs`` has grown. Else a new ``seq_len`` must divide the former one.
        """
        last = self._segment(step)
        if terms == last.terms:
            return self
        windows, places = last.terms.num_windows, self._places(step)
        if terms.num_new_epochs > last.terms.num_new_epochs:
            places = [place.at_new_epoch() for place in places]
        elif last.terms.seq_len % terms.seq_len:
            raise ValueError(f"within an epoch, {terms.seq_len} must divide {last.terms.seq_len}")
        elif (factor := last.terms.seq_len // terms.seq_len) > 1:
            places = [place.cut(factor, size) for place, size in zip(places, windows, strict=True)]
        return self._with_segment(Segment(step, terms, tuple(places), self.num_samples_before(step)))

    def leave_out(self, step: int, until: int) -> DataOrder:
        """The same order up to ``step``, from where each dataset is read on as step ``until`` would have begun to."""
        used = self.num_samples_before(until)
        return self._with_segment(Segment(step, self.terms(until), tuple(self._places(until)), used))

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> Samples:
        """Samples [start, stop) of the global batch of ``step`` (steps count from 0); all of it by default."""
        segment = self._segment(step)
        stop = segment.terms.global_batch_size if stop is None else stop
        offset = (step - segment.first_step) * segment.terms.global_batch_size
        numbers = np.arange(offset + start, offset + stop, dtype=np.int64)
        dataset, count = self._mixture(segment.terms.weights).lookup(numbers)
        beyond = count - segment.num_left[dataset]  # windows after the epoch that the segment began in; within it < 0
        num_windows = segment.num_windows[dataset]
        lap, position = np.divmod(beyond, num_windows)
        epoch = segment.next_epoch[dataset] + lap
        window = shuffle(position, num_windows, shuffle_keys(self.seed, dataset, epoch))
        for source in segment.cut_sources:
            chosen = np.flatnonzero((dataset == source) & (beyond < 0))
            window[chosen] = self._cut_window(source, segment.places[source], count[chosen])
        return Samples(dataset, epoch, window, numbers + segment.samples_before)

    def num_samples_before(self, step: int) -> int:
        """How many samples the steps before ``step`` use."""
        segment = self._segment(step)
        return segment.samples_before + (step - segment.first_step) * segment.terms.global_batch_size

    def num_epochs(self, step: int) -> list[float]:
        """How often each dataset has been seen before ``step``; what was left out on purpose counts as seen."""
        pairs = zip(self._places(step), self.terms(step).num_windows, strict=True)
        return [place.epoch + 1 - place.num_left(size) / size for place, size in pairs]

    def terms(self, step: int) -> SamplingSettings:
        """What holds at ``step``."""
        return self._segment(step).terms

    def _cut_window(self, source: int, place: DatasetCursor, count: Indices) -> Indices:
        """The windows at ``count`` further on in an epoch that was cut: from the last cut's shuffle back to the first.

        Each cut's pieces are shuffled. A piece lies in a window that was left over: its place in the shuffle before.
        """
        position, pieces = place.position + count, []
        for depth in range(len(place.cuts), 0, -1):
            cut = place.cuts[depth - 1]
            piece = self._shuffled(position, cut.num_pieces, source, place.epoch, depth)
            pieces.append((cut.factor, piece % cut.factor))
            position = cut.used + piece // cut.factor
        window = self._shuffled(position, place.cuts[0].num_windows, source, place.epoch, 0)
        for factor, within in reversed(pieces):
            window = window * factor + within
        return window

    def _shuffled(self, index: Indices, size: int, source: int, epoch: int, depth: int) -> Indices:
        """``depth``: of how many cuts; the shuffle of an epoch is that of depth 0."""
        numbers = (source, epoch, depth) if depth else (source, epoch)
        key = shuffle_keys(self.seed, *(np.full_like(index, number) for number in numbers))
        return shuffle(index, np.full_like(index, size), key)

    def _places(self, step: int) -> list[DatasetCursor]:
        """Where each dataset is read at the beginning of ``step``."""
        last = self._segment(step)
        used = (step - last.first_step) * last.terms.global_batch_size
        counts = self._mixture(last.terms.weights).counts_before(used).tolist()
        windows = last.terms.num_windows
        return [place.advanced(*each) for place, *each in zip(last.places, counts, windows, strict=True)]

    def _with_segment(self, segment: Segment) -> DataOrder:
        """With ``segment`` instead of all that was planned from its first step on."""
        kept = tuple(former for former in self.segments if former.first_step < segment.first_step)
        return replace(self, segments=(*kept, segment))

    def _segment(self, step: int) -> Segment:
        return next(segment for segment in reversed(self.segments) if segment.first_step <= step)

    def _mixture(self, weights: tuple[float, ...]) -> Mixture:
        if weights not in self._mixtures:
            self._mixtures[weights] = Mixture(weights)
        return self._mixtures[weights]
