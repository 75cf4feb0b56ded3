"""Samples to micro-batches: the share of one data rank in the k-th global batch, and in an evaluation.

B: sequences, T: tokens in a sequence, M: targets of a sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatrain.batch import Batch, document_starts
from megatrain.data.order import DataOrder, Indices, Samples
from megatrain.data.sample import Sample, Source
from megatrain.distributed.activity import Activity
from megatrain.errors import DataError


class BatchMaker:
    """Micro-batches from samples of several sources, all of one length and kind.

    ``activity``: counts the samples. ``pin``: batches lie in pinned memory, for a GPU.
    """

    def __init__(
        self, sources: Sequence[Source], micro_batch_size: int, activity: Activity | None = None, *, pin: bool = False
    ) -> None:
        self._activity, self._pin = activity or Activity(), pin
        self.sources = tuple(sources)
        self.micro_batch_size = micro_batch_size
        self._all_scored = all(source.all_scored for source in sources)

    def num_targets(self, samples: Samples) -> int:
        """Scored targets of these samples together."""
        present = np.unique(samples.dataset).tolist()
        return sum(self.sources[k].num_targets(samples.rows(samples.dataset == k)) for k in present)

    def make(self, samples: Samples, num_scored: int | None = None) -> list[Batch]:
        """The samples in micro-batches. ``num_scored``: how many of them count, the rest is filling (None: all)."""
        batches = []
        for first in range(0, len(samples), self.micro_batch_size):
            chosen = samples.rows(slice(first, first + self.micro_batch_size))
            is_scored = None if num_scored is None else first + np.arange(len(chosen)) < num_scored
            rows = [self._sample(*place) for place in chosen]
            batches.append(self._stacked(rows, chosen.number, is_scored).packed(pin=self._pin))
        return batches

    def _sample(self, dataset: int, epoch: int, index: int, number: int) -> Sample:
        self._activity.batch()
        return self.sources[dataset].sample(index, epoch, number)

    def _stacked(self, rows: Sequence[Sample], numbers: Indices, is_scored: NDArray[np.bool_] | None) -> Batch:
        """``is_scored``: of each row; None: all are."""
        document_ids_BT = _stack([row.document_ids_T for row in rows])
        loss_mask_BM = None
        if not (self._all_scored and is_scored is None):
            masks = [np.ones(len(r.targets_M), np.bool_) if r.loss_mask_M is None else r.loss_mask_M for r in rows]
            loss_mask_BM = torch.from_numpy(np.stack(masks))
            if is_scored is not None:
                loss_mask_BM *= torch.from_numpy(is_scored).unsqueeze(1)
        return Batch(
            tokens_BT=torch.from_numpy(np.stack([row.tokens_T for row in rows])),
            targets_BM=torch.from_numpy(np.stack([row.targets_M for row in rows])),
            loss_mask_BM=loss_mask_BM,
            positions_BT=torch.from_numpy(np.stack([row.positions_T for row in rows])),
            document_ids_BT=document_ids_BT,
            sample_ids_B=torch.from_numpy(numbers),
            document_starts=None if document_ids_BT is None else document_starts(document_ids_BT),
            target_places_BM=_stack([row.target_places_M for row in rows]),
            source_tokens_BS=_stack([row.source_tokens_S for row in rows]),
            source_positions_BS=_stack([row.source_positions_S for row in rows]),
            source_document_ids_BS=_stack([row.source_document_ids_S for row in rows]),
            pixels_BCHW=_stack([row.pixels_CHW for row in rows]),
            segments_BT=_stack([row.segments_T for row in rows]),
        )


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
        self._maker, self.sources = maker, maker.sources
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
        columns = (mine.dataset, mine.epoch, mine.index, mine.number)
        self._samples = Samples(*(np.append(column, filling) for column in columns))

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


def _evenly_spaced(count: int, limit: int | None) -> NDArray[np.int64]:
    """``limit`` of ``count`` samples at even distances; all where there are no more."""
    if limit is None or limit >= count:
        return np.arange(count)
    return np.arange(limit) * count // limit


def _stack(rows: Sequence[NDArray[Any] | None]) -> torch.Tensor | None:
    """Rows of one field, which all have or none has."""
    present = [row for row in rows if row is not None]
    return torch.from_numpy(np.stack(present)) if present else None
