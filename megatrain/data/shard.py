"""A shard: its record batches, found without reading the others, as views of the mapped file."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from megatrain.data.format import as_numpy
from megatrain.data.shard_table import BatchMetadata, Ints
from megatrain.data.storage import BatchReader
from megatrain.errors import DataError

Tokens = npt.NDArray[np.unsignedinteger[Any]]


class Views(NamedTuple):
    """The tokens of a record batch end to end, and where each document begins in them (one entry more; the first 0)."""

    tokens: Tokens
    offsets: Ints

    @staticmethod
    def of(batch: pa.RecordBatch) -> Views:
        column = batch.column(0)
        bounds = as_numpy(column.offsets)
        tokens = as_numpy(column.values)[bounds[0] : bounds[-1]]
        return Views(tokens, bounds - bounds[0] if bounds[0] else bounds)


class ScoredRuns(NamedTuple):
    """Which tokens of a record batch are scored as targets.

    ``bounds``: where runs of such tokens begin and end, alternating and ascending; ``counts``: how many of them lie
    before each bound.
    """

    bounds: Ints
    counts: Ints

    @staticmethod
    def of(batch: pa.RecordBatch) -> ScoredRuns:
        offsets, column = Views.of(batch).offsets, batch["scored"]
        # Of a document that says nothing all is one run.
        whole = pa.array(np.stack([np.zeros(len(column), np.int64), np.diff(offsets)], axis=1).tolist(), column.type)
        runs = pc.coalesce(column, whole)
        begins = np.repeat(offsets[:-1], as_numpy(pc.list_value_length(runs)))
        bounds = begins + as_numpy(runs.flatten())
        num_scored = np.where(np.arange(len(bounds)) % 2, np.diff(bounds, prepend=0), 0)
        return ScoredRuns(bounds, np.cumsum(num_scored))

    def mask(self, low: int, high: int) -> npt.NDArray[np.bool_]:
        """Whether each token of [low, high) is scored."""
        first, last = self.bounds.searchsorted([low, high])
        turns = np.bincount(self.bounds[first:last] - low, minlength=high - low)
        mask: npt.NDArray[np.bool_] = (first + np.cumsum(turns)) % 2 == 1
        return mask

    def num_scored(self, low: int, high: int) -> int:
        """Scored tokens of [low, high)."""
        first, last = self.count_before(np.array([low, high])).tolist()
        return int(last - first)

    def count_before(self, positions: Ints) -> Ints:
        """Scored tokens before each of these."""
        bound = self.bounds.searchsorted(positions, side="right")
        begun = np.where(bound % 2 == 1, positions - np.append(0, self.bounds)[bound], 0)
        return np.append(0, self.counts)[bound] + begun

    def is_inside(self, positions: Ints) -> npt.NDArray[np.bool_]:
        """Whether a run begins before and ends behind each of these."""
        bound = self.bounds.searchsorted(positions, side="right")
        inside: npt.NDArray[np.bool_] = (bound % 2 == 1) & (np.append(0, self.bounds)[bound] < positions)
        return inside


class Shard:
    """The record batches of a shard; each is looked at when it is needed.

    ``read(batch)`` gives the bytes of a record batch; they stay valid as long as the buffer or a view of it lives.
    ``max_views``: of how many record batches the views are kept (None: of all).
    """

    def __init__(
        self,
        name: str,
        batches: list[BatchMetadata],
        schema: pa.Schema,
        read: BatchReader,
        max_views: int | None,
    ) -> None:
        self.batches = batches
        self.token_starts = [0, *accumulate(batch.num_tokens for batch in batches)]
        """Where in the shard each batch's tokens begin; one entry more than batches."""
        self.document_starts = [0, *accumulate(batch.num_documents for batch in batches)]
        # Neither refers to the shard: it has to go, and its map with it, in the moment that nobody uses it any more.
        self.record_batch = partial(_record_batch, name, batches, schema, read)
        """Record batch `number` with all its columns. Raises DataError where it is not what the table promises."""
        self.views = lru_cache(max_views)(partial(_views, self.record_batch))
        """Tokens and document offsets of record batch `number`."""
        self.scored = lru_cache(max_views)(partial(_scored, self.record_batch))
        """The scored tokens of record batch `number`, of a dataset that says which they are."""
        self.labels = lru_cache(max_views)(partial(_labels, self.record_batch))
        """The names of the labels of record batch `number`, of a dataset that has them."""

    def batch_at(self, position: int) -> int:
        """The record batch that holds the shard's token ``position``; the last one for the position behind all."""
        return bisect_right(self.token_starts, position, 0, len(self.batches)) - 1

    def batch_of_document(self, row: int) -> int:
        return bisect_right(self.document_starts, row) - 1


def _views(record_batch: Callable[[int], pa.RecordBatch], number: int) -> Views:
    return Views.of(record_batch(number))


def _scored(record_batch: Callable[[int], pa.RecordBatch], number: int) -> ScoredRuns:
    return ScoredRuns.of(record_batch(number))


def _labels(record_batch: Callable[[int], pa.RecordBatch], number: int) -> pa.Array:
    return record_batch(number)["label"]


def _record_batch(
    name: str, batches: list[BatchMetadata], schema: pa.Schema, read: BatchReader, number: int
) -> pa.RecordBatch:
    expected = batches[number]
    try:
        batch = pa.ipc.read_record_batch(read(expected), schema)
        batch.validate()
        offsets = batch.column(0).offsets
        counts = batch.num_rows, offsets[-1].as_py() - offsets[0].as_py()
        problem = f"holds {counts} documents and tokens, not {expected[2:4]}" if counts != expected[2:4] else None
    except (OSError, EOFError, pa.ArrowException) as error:
        problem = f"cannot be read: {error}"
    if problem is not None:
        raise DataError(
            f"{name}, record batch {number}, {problem}. Copy the shard again, or tokenize again; "
            "`megatrain-data verify` checks the whole dataset."
        )
    return batch
