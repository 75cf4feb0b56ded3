"""The k-th sample of a run: which sample of which dataset, for any k, from a few integers. No state, no torch.

Three pure steps. A run's steps fall into segments (one, unless the batch size, the weights or the sequence length were
changed at a resume, or batches were left out); a segment's mixture says which dataset the j-th sample comes from and
how many of that dataset came before; and a shuffle of each epoch says which of the dataset's samples that is. Nothing
here grows with the corpus.

Within an epoch of a dataset no sample is seen twice or skipped, whatever the segments: each goes on where the one
before stopped, but for batches that are left out on purpose. Where samples become shorter in the middle of an epoch,
those not yet seen are cut up and shuffled anew.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatrain.config.batch_size import BatchSize, Phase, num_samples_until, phase_at, phases
from megatrain.data.mixture import Mixture
from megatrain.data.permutation import shuffle, shuffle_keys

Indices = NDArray[np.int64]

SAVED_NAMES = {"settings": "terms", "cursors": "places", "num_samples": "num_windows"}
"""Fields of a segment that have other names in the manifests of checkpoints."""

_mixture = lru_cache(maxsize=8)(Mixture)


@dataclass(frozen=True)
class SamplingSettings:
    """What a segment is read under. For each dataset its weight, its samples of ``seq_len`` and its packing plan.

    ``plans``: names of the packing plans; empty where documents are not packed. ``num_new_epochs``: how often the run
    has been told to leave the rest of its epochs and begin the next ones.
    """

    global_batch_size: BatchSize
    weights: tuple[float, ...]
    seq_len: int
    num_samples: tuple[int, ...]
    plans: tuple[str, ...] = ()
    num_new_epochs: int = 0


@dataclass(frozen=True)
class EpochCut:
    """Of an epoch of ``num_samples``, ``used`` had been seen; each of the others became ``factor`` shorter ones."""

    num_samples: int
    used: int
    factor: int

    @property
    def num_shorter(self) -> int:
        return (self.num_samples - self.used) * self.factor


@dataclass(frozen=True)
class DatasetCursor:
    """How far a dataset has been read: ``position`` samples of its epoch, since the last of the epoch's ``cuts``.

    ``num_samples``, in the methods: those of an epoch that is not cut.
    """

    epoch: int = 0
    position: int = 0
    cuts: tuple[EpochCut, ...] = ()

    def num_left(self, num_samples: int) -> int:
        """Samples of the epoch still to come."""
        return self._size(num_samples) - self.position

    def advanced(self, count: int, num_samples: int) -> DatasetCursor:
        """The cursor ``count`` samples on."""
        beyond = count - self.num_left(num_samples)
        if beyond < 0:
            return replace(self, position=self.position + count)
        whole_epochs, position = divmod(beyond, num_samples)
        return DatasetCursor(self.epoch + 1 + whole_epochs, position)

    def cut(self, factor: int, num_samples: int) -> DatasetCursor:
        """What is left of the epoch in samples of 1/factor the length. An epoch not yet begun is not in need of it."""
        if self._is_new:
            return self
        return DatasetCursor(self.epoch, 0, (*self.cuts, EpochCut(self._size(num_samples), self.position, factor)))

    def at_new_epoch(self) -> DatasetCursor:
        """The beginning of the next epoch; this one, if nothing of it has been seen."""
        return self if self._is_new else DatasetCursor(self.epoch + 1)

    @property
    def _is_new(self) -> bool:
        return self.position == 0 and not self.cuts

    def _size(self, num_samples: int) -> int:
        return self.cuts[-1].num_shorter if self.cuts else num_samples


@dataclass(frozen=True)
class Segment:
    """Steps from ``first_step`` on, until the next segment's: the settings that hold there, and where reading begins.

    ``cursors``: of each dataset. ``samples_before``: how many samples the run had used of all. ``tokens_before``: what
    it had trained on, which says where on a ramp of the batch size it was; samples left out on purpose do not count.
    """

    first_step: int
    settings: SamplingSettings
    cursors: tuple[DatasetCursor, ...]
    samples_before: int = 0
    tokens_before: int = 0

    def to_state(self) -> dict[str, Any]:
        state: dict[str, Any] = _renamed(asdict(self), SAVED_NAMES)
        return state

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Segment:
        """The inverse of ``to_state``, after JSON has made tuples lists."""
        fields = _renamed(state, {saved: name for name, saved in SAVED_NAMES.items()})
        cursors = tuple(
            DatasetCursor(cursor["epoch"], cursor["position"], tuple(EpochCut(**cut) for cut in cursor["cuts"]))
            for cursor in fields["cursors"]
        )
        settings, num_samples = SamplingSettings(**fields["settings"]), fields["samples_before"]
        num_tokens = fields.get("tokens_before", num_samples * settings.seq_len)  # not in the first manifests
        return cls(fields["first_step"], settings, cursors, num_samples, num_tokens)

    @property
    def mixture(self) -> Mixture:
        return _mixture(self.settings.weights)

    @cached_property
    def phases(self) -> list[Phase]:
        """Its steps by their batch size."""
        settings = self.settings
        return phases(settings.global_batch_size, settings.seq_len, self.first_step, self.tokens_before)

    @cached_property
    def num_samples(self) -> Indices:
        """Of each dataset, as an array."""
        return np.asarray(self.settings.num_samples, dtype=np.int64)

    @cached_property
    def num_left(self) -> Indices:
        """Samples that were left of each dataset's epoch when the segment began."""
        pairs = zip(self.cursors, self.settings.num_samples, strict=True)
        return np.asarray([cursor.num_left(count) for cursor, count in pairs], dtype=np.int64)

    @cached_property
    def next_epoch(self) -> Indices:
        """The epoch of each dataset that comes when nothing is left of the one it was in."""
        return np.asarray([cursor.epoch + 1 for cursor in self.cursors], dtype=np.int64)

    @cached_property
    def cut_datasets(self) -> list[int]:
        """Datasets whose epoch had been cut when the segment began."""
        return [number for number, cursor in enumerate(self.cursors) if cursor.cuts]


@dataclass(frozen=True)
class Samples:
    """Where each of n samples lies. Arrays of n: dataset's number, epoch and index in it, number in the run."""

    dataset: Indices
    epoch: Indices
    index: Indices
    number: Indices

    def __len__(self) -> int:
        return len(self.number)

    def __iter__(self) -> Iterator[tuple[int, int, int, int]]:
        """Dataset, epoch, index and number of each."""
        columns = (self.dataset, self.epoch, self.index, self.number)
        return zip(*(column.tolist() for column in columns), strict=True)

    def rows(self, rows: slice | NDArray[np.bool_]) -> Samples:
        return Samples(self.dataset[rows], self.epoch[rows], self.index[rows], self.number[rows])


@dataclass(frozen=True)
class DataOrder:
    """The global order of a run."""

    seed: int
    segments: tuple[Segment, ...]

    @classmethod
    def begin(cls, seed: int, settings: SamplingSettings) -> DataOrder:
        if min(settings.num_samples) < 1:
            raise ValueError("every dataset needs at least one sample")
        return cls(seed, (Segment(0, settings, (DatasetCursor(),) * len(settings.num_samples)),))

    def change(self, step: int, settings: SamplingSettings) -> DataOrder:
        """The same order up to ``step``, then under other settings (no change: the same order).

        New epochs begin where ``num_new_epochs`` has grown. Else a new ``seq_len`` must divide the former one.
        """
        former, cursors = self.settings(step), self._cursors(step)
        if settings == former:
            return self
        factor, rest = divmod(former.seq_len, settings.seq_len)
        if settings.num_new_epochs > former.num_new_epochs:
            cursors = [cursor.at_new_epoch() for cursor in cursors]
        elif rest:
            raise ValueError(f"within an epoch, {settings.seq_len} must divide {former.seq_len}")
        elif factor > 1:
            cursors = [cursor.cut(factor, count) for cursor, count in zip(cursors, former.num_samples, strict=True)]
        return self._with_segment(step, settings, cursors, self.num_samples_before(step))

    def before(self, step: int) -> DataOrder:
        """The order without what was changed at ``step``."""
        kept = tuple(segment for segment in self.segments if segment.first_step < max(step, 1))
        return replace(self, segments=kept)

    def leave_out(self, step: int, until: int) -> DataOrder:
        """The same order up to ``step``, from where each dataset is read on as step ``until`` would have begun to."""
        return self._with_segment(step, self.settings(until), self._cursors(until), self.num_samples_before(until))

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> Samples:
        """Samples [start, stop) of the global batch of ``step`` (steps count from 0); all of it by default."""
        segment = self._segment(step)
        stop = self.batch_size(step) if stop is None else stop
        offset = num_samples_until(segment.phases, step)
        numbers = np.arange(offset + start, offset + stop, dtype=np.int64)
        dataset, count = segment.mixture.lookup(numbers)
        beyond = count - segment.num_left[dataset]  # samples after the epoch that the segment began in; within it < 0
        num_samples = segment.num_samples[dataset]
        whole_epochs, position = np.divmod(beyond, num_samples)
        epoch = segment.next_epoch[dataset] + whole_epochs
        index = shuffle(position, num_samples, shuffle_keys(self.seed, dataset, epoch))
        for cut_dataset in segment.cut_datasets:
            chosen = np.flatnonzero((dataset == cut_dataset) & (beyond < 0))
            index[chosen] = self._index_in_cut_epoch(cut_dataset, segment.cursors[cut_dataset], count[chosen])
        return Samples(dataset, epoch, index, numbers + segment.samples_before)

    def num_samples_before(self, step: int) -> int:
        segment = self._segment(step)
        return segment.samples_before + num_samples_until(segment.phases, step)

    def batch_size(self, step: int) -> int:
        """Samples of the global batch of ``step``."""
        return phase_at(self._segment(step).phases, step).batch_size

    def num_epochs(self, step: int) -> list[float]:
        """How often each dataset has been seen before ``step``; what was left out on purpose counts as seen."""
        pairs = zip(self._cursors(step), self.settings(step).num_samples, strict=True)
        return [cursor.epoch + 1 - cursor.num_left(size) / size for cursor, size in pairs]

    def first_step_after_epochs(self, epochs: float) -> int:
        """The first step before which the first dataset has been seen so often."""
        bound = 1
        while self.num_epochs(bound)[0] < epochs:
            bound *= 2
        return bisect_left(range(bound), epochs, key=lambda step: self.num_epochs(step)[0])

    def settings(self, step: int) -> SamplingSettings:
        return self._segment(step).settings

    def _index_in_cut_epoch(self, dataset: int, cursor: DatasetCursor, count: Indices) -> Indices:
        """The samples at ``count`` further on in an epoch that was cut: from the last cut's shuffle back to the first.

        Each cut shuffles the shorter samples that it made. Each lies in a longer one, whose position in the shuffle
        before is known.
        """
        position, offsets = cursor.position + count, []
        for depth in range(len(cursor.cuts), 0, -1):
            cut = cursor.cuts[depth - 1]
            longer, offset = np.divmod(
                self._shuffled(position, cut.num_shorter, dataset, cursor.epoch, depth), cut.factor
            )
            offsets.append((cut.factor, offset))
            position = cut.used + longer
        index = self._shuffled(position, cursor.cuts[0].num_samples, dataset, cursor.epoch)
        for factor, offset in reversed(offsets):
            index = index * factor + offset
        return index

    def _shuffled(self, index: Indices, size: int, *numbers: int) -> Indices:
        """By the shuffle of a dataset's epoch, or of one of its cuts (``numbers``: dataset, epoch, cut from 1)."""
        key = shuffle_keys(self.seed, *(np.full_like(index, number) for number in numbers))
        return shuffle(index, np.full_like(index, size), key)

    def _cursors(self, step: int) -> list[DatasetCursor]:
        last = self._segment(step)
        counts = last.mixture.counts_before(num_samples_until(last.phases, step)).tolist()
        triples = zip(last.cursors, counts, last.settings.num_samples, strict=True)
        return [cursor.advanced(count, num_samples) for cursor, count, num_samples in triples]

    def _with_segment(
        self, step: int, settings: SamplingSettings, cursors: Sequence[DatasetCursor], samples_before: int
    ) -> DataOrder:
        """With a segment from ``step`` on instead of all that was planned from there on."""
        last = self._segment(step)
        num_tokens = last.tokens_before + num_samples_until(last.phases, step) * last.settings.seq_len
        kept = tuple(former for former in self.segments if former.first_step < step)
        return replace(self, segments=(*kept, Segment(step, settings, tuple(cursors), samples_before, num_tokens)))

    def _segment(self, step: int) -> Segment:
        return next(segment for segment in reversed(self.segments) if segment.first_step <= step)


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    """A value of JSON with other keys, lists as tuples."""
    if isinstance(value, Mapping):
        return {names.get(key, key): _renamed(item, names) for key, item in value.items()}
    return tuple(_renamed(item, names) for item in value) if isinstance(value, list | tuple) else value
