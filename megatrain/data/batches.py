"""Datasets to micro-batches: the share of one data rank in the k-th global batch, and in an evaluation.

B: sequences, T: tokens in a sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from megatrain.batch import Batch, document_starts
from megatrain.data.augmentation import Augmentation, DocumentPart
from megatrain.data.dataset import Dataset
from megatrain.data.order import DataOrder, Samples
from megatrain.data.packing import PackedSource, make_plan
from megatrain.distributed.activity import Activity
from megatrain.errors import DataError


@dataclass(frozen=True)
class ConcatSource:
    """A dataset cut every ``seq_len`` tokens: sample k's inputs are tokens [kL, kL + L), its targets one token on.

    What is left at the end and fills no sample is not used. With ``document_mask``, a sample also says where documents
    begin in it, so that attention and positions can start anew there. Without ``score_after_eod``, a target that begins
    a document does not count: what stands before it is another document. Nor does one that the dataset does not score.
    """

    dataset: Dataset
    seq_len: int
    document_mask: bool = False
    score_after_eod: bool = True

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise DataError(
                f"{self.dataset.path} has {self.dataset.num_tokens:,} tokens, too few for one sample of data.seq_len="
                f"{self.seq_len} and its last target: tokenize more text, or set data.seq_len to less."
            )

    @property
    def num_samples(self) -> int:
        return max(self.dataset.num_tokens - 1, 0) // self.seq_len

    @property
    def all_scored(self) -> bool:
        """Whether every target of every sample counts."""
        return self.score_after_eod and not self.dataset.has_scored

    def num_targets(self, indices: NDArray[np.int64]) -> int:
        """Scored targets of these samples together."""
        if self.all_scored:
            return len(indices) * self.seq_len
        if self.dataset.has_scored:
            return sum(int(np.count_nonzero(self._scored(index))) for index in indices.tolist())
        return len(indices) * self.seq_len - sum(map(self._num_begun, *_runs(indices)))

    def num_bytes(self) -> int:
        """UTF-8 bytes of the text behind the scored targets of all samples."""
        count = self.num_samples * self.seq_len
        if self.dataset.has_scored:
            return sum(self.dataset.scored_bytes(k * self.seq_len + 1, self.seq_len) for k in range(self.num_samples))
        every = self.dataset.window_bytes(1, count)  # targets are the tokens after the first
        if self.score_after_eod:
            return every
        begins = 1 + self.dataset.document_starts(1, count)
        return every - sum(self.dataset.window_bytes(begin, 1) for begin in begins.tolist())

    def fill(
        self,
        index: int,
        tokens: NDArray[np.int64],
        document_ids: NDArray[np.int32] | None,
        scored: NDArray[np.bool_] | None,
    ) -> None:
        """Write a sample's seq_len + 1 tokens; the document's number of each input; which targets count."""
        start = index * self.seq_len
        if scored is not None:
            scored[:] = self._scored(index)
        tokens[:] = self.dataset.window(start, self.seq_len + 1)
        if document_ids is not None:
            begins = self.dataset.document_starts(start, self.seq_len)
            document_ids[:] = 0
            document_ids[begins[begins > 0]] = 1
            np.cumsum(document_ids, out=document_ids)

    def parts(self, index: int) -> Iterator[DocumentPart]:
        """The documents, or parts of them, in a sample's seq_len + 1 tokens, in their order."""
        start, length = index * self.seq_len, self.seq_len + 1
        document = self.dataset.document_at(start)
        offset = start - self.dataset.document_range(document)[0]
        begins = self.dataset.document_starts(start, length)
        for begin, end in pairwise([0, *begins[begins > 0].tolist(), length]):
            yield DocumentPart(document, offset, begin, end)
            document, offset = document + 1, 0

    def _scored(self, index: int) -> NDArray[np.bool_]:
        """Which targets of a sample count."""
        first = index * self.seq_len + 1
        scored = self.dataset.scored(first, self.seq_len)
        if not self.score_after_eod:
            scored[self.dataset.document_starts(first, self.seq_len)] = False
        return scored

    def _num_begun(self, first: int, last: int) -> int:
        """Documents that begin in the targets of samples ``first`` to ``last``."""
        at = self.dataset.document_at
        return at((last + 1) * self.seq_len) - at(first * self.seq_len)


SampleSource = ConcatSource | PackedSource
"""A dataset as samples of ``seq_len`` inputs and as many targets."""


def evaluation_source(dataset: Dataset, seq_len: int, document_mask: bool, score_after_eod: bool) -> SampleSource:
    """What is evaluated of a dataset: concat samples whatever the packing, in which every token counts.

    Where it says which tokens are scored, conversations packed whole, none of which sees another.
    """
    if dataset.has_scored:
        return PackedSource(dataset, make_plan(dataset, seq_len), seq_len, document_mask=True)
    return ConcatSource(dataset, seq_len, document_mask, score_after_eod)


class BatchMaker:
    """Micro-batches from samples of several sources, all of one length and kind.

    ``augmentations``: what is done to the documents of each source; left out, as for an evaluation: nothing.
    ``activity``: counts the samples. ``pin``: batches lie in pinned memory, for a GPU.
    """

    def __init__(
        self,
        sources: Sequence[SampleSource],
        micro_batch_size: int,
        augmentations: Sequence[Augmentation | None] | None = None,
        activity: Activity | None = None,
        *,
        pin: bool = False,
    ) -> None:
        self._activity, self._pin = activity or Activity(), pin
        self.sources = tuple(sources)
        self._augmentations = augmentations or [None] * len(sources)
        self.micro_batch_size = micro_batch_size
        self._seq_len = sources[0].seq_len
        self._document_mask = sources[0].document_mask
        self._all_scored = all(source.all_scored for source in sources)

    def num_targets(self, samples: Samples) -> int:
        """Scored targets of these samples together."""
        present = np.unique(samples.dataset).tolist()
        return sum(self.sources[k].num_targets(samples.index[samples.dataset == k]) for k in present)

    def make(self, samples: Samples, num_scored: int | None = None) -> list[Batch]:
        """The samples in micro-batches. ``num_scored``: how many of them count, the rest is filling (None: all)."""
        count, length = len(samples), self._seq_len
        tokens = np.empty((count, length + 1), dtype=np.int64)
        ids = np.empty((count, length), dtype=np.int32) if self._document_mask else None
        mask = None if self._all_scored and num_scored is None else np.empty((count, length), dtype=np.bool_)
        seen = np.empty_like(tokens) if any(self._augmentations) else tokens
        for row, (number, epoch, index) in enumerate(samples):
            source, augmentation = self.sources[number], self._augmentations[number]
            source.fill(index, tokens[row], None if ids is None else ids[row], None if mask is None else mask[row])
            if augmentation is not None:
                seen[row] = augmentation.apply(source.parts(index), epoch, tokens[row])
            elif seen is not tokens:
                seen[row] = tokens[row]
            self._activity.batch()
        if mask is not None and num_scored is not None:
            mask[num_scored:] = False
        positions = np.broadcast_to(np.arange(length), (count, length)) if ids is None else _positions(ids)
        batches = []
        for first in range(0, count, self.micro_batch_size):
            rows = slice(first, first + self.micro_batch_size)
            batch = Batch(
                tokens_BT=torch.from_numpy(seen[rows, :-1]),
                targets_BT=torch.from_numpy(tokens[rows, 1:]),
                loss_mask_BT=None if mask is None else torch.from_numpy(mask[rows]),
                positions_BT=torch.tensor(positions[rows]),
                document_ids_BT=None if ids is None else torch.from_numpy(ids[rows]),
                sample_ids_B=torch.from_numpy(samples.number[rows]),
                document_starts=None if ids is None else document_starts(torch.from_numpy(ids[rows])),
            )
            batches.append(batch.packed(pin=self._pin))
        return batches


class TrainingBatches:
    """The micro-batches of one data rank, step by step; the next step's are made while this one computes."""

    def __init__(self, maker: BatchMaker, order: DataOrder, data_rank: int, num_data_ranks: int) -> None:
        self.order = order
        self._maker = maker
        self._data_rank, self._num_data_ranks = data_rank, num_data_ranks
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._made: dict[int, Future[tuple[list[Batch], int]]] = {}

    def micro_batches(self, step: int) -> list[Batch]:
        """This rank's share of the global batch of ``step`` (counted from 0), in the order of the samples."""
        return self._get(step)[0]

    def num_targets(self, step: int) -> int:
        """Scored targets of the whole global batch of ``step``."""
        return self._get(step)[1]

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _get(self, step: int) -> tuple[list[Batch], int]:
        for wanted in (step, step + 1):
            if wanted not in self._made:
                self._made[wanted] = self._thread.submit(self._make, wanted)
        self._made = {wanted: self._made[wanted] for wanted in (step, step + 1)}
        return self._made[step].result()

    def _make(self, step: int) -> tuple[list[Batch], int]:
        every = self.order.batch(step)
        share = len(every) // self._num_data_ranks
        mine = slice(self._data_rank * share, (self._data_rank + 1) * share)
        return self._maker.make(every.rows(mine)), self._maker.num_targets(every)


class EvaluationBatches:
    """The samples of an evaluation, the same each time, shared out to the data ranks.

    ``limit``: the most samples to take; they are spread evenly over the sources and over each source. Every rank gets
    equally many micro-batches, the last ones filled up with samples that are not scored.
    """

    def __init__(self, maker: BatchMaker, data_rank: int, num_data_ranks: int, limit: int | None = None) -> None:
        self._maker = maker
        each = None if limit is None else -(-limit // len(maker.sources))
        chosen = [_evenly_spaced(source.num_samples, each) for source in maker.sources]
        dataset = np.repeat(np.arange(len(chosen)), [len(indices) for indices in chosen])
        every = _in_order(dataset, np.concatenate(chosen))
        self.num_targets = maker.num_targets(every)
        if self.num_targets == 0:
            raise DataError(
                f"Nothing is scored in the samples of {maker.sources[0].dataset.path} that are evaluated: take more of "
                "them (train.eval_batches), or another dataset."
            )
        per_round = maker.micro_batch_size * num_data_ranks
        share = -(-len(every) // per_round) * maker.micro_batch_size
        mine = every.rows(slice(data_rank * share, (data_rank + 1) * share))
        self._num_scored = len(mine)
        filling = np.zeros(share - len(mine), dtype=np.int64)
        self._samples = _in_order(np.append(mine.dataset, filling), np.append(mine.index, filling))

    def __len__(self) -> int:
        return -(-len(self._samples) // self._maker.micro_batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return _made_ahead(self._make())

    def _make(self) -> Iterator[Batch]:
        size = self._maker.micro_batch_size
        for first in range(0, len(self._samples), size):
            scored = min(max(self._num_scored - first, 0), size)
            rows = self._samples.rows(slice(first, first + size))
            yield from self._maker.make(rows, scored if scored < size else None)


def _made_ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same, each made in a thread while the one before is used."""
    with ThreadPoolExecutor(1, thread_name_prefix="evaluation") as thread:
        upcoming = thread.submit(next, batches, None)
        while (batch := upcoming.result()) is not None:
            upcoming = thread.submit(next, batches, None)
            yield batch


def _in_order(dataset: NDArray[np.int64], index: NDArray[np.int64]) -> Samples:
    """Samples of the first epoch, numbered as they come."""
    return Samples(dataset, np.zeros_like(dataset), index, np.arange(len(dataset)))


def _runs(numbers: NDArray[np.int64]) -> tuple[list[int], list[int]]:
    """Where runs of numbers that follow each other begin, and where they end."""
    ends = np.flatnonzero(np.diff(numbers, append=-1) != 1) if len(numbers) else np.empty(0, dtype=np.int64)
    return numbers[np.append(0, ends[:-1] + 1)[: len(ends)]].tolist(), numbers[ends].tolist()


def _evenly_spaced(count: int, limit: int | None) -> NDArray[np.int64]:
    """``limit`` of ``count`` samples at even distances; all where there are no more."""
    if limit is None or limit >= count:
        return np.arange(count)
    return np.arange(limit) * count // limit


def _positions(document_ids: NDArray[np.int32]) -> NDArray[np.int64]:
    """The position of each token in its document's part of the sample."""
    index = np.broadcast_to(np.arange(document_ids.shape[1]), document_ids.shape)
    begins = np.zeros(document_ids.shape, dtype=np.int64)
    changes = document_ids[:, 1:] != document_ids[:, :-1]
    begins[:, 1:] = np.where(changes, index[:, 1:], 0)
    return index - np.maximum.accumulate(begins, axis=1)
