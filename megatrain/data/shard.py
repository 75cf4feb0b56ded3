"""A shard: its record batches, found without reading the others, as views of the mapped file."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from megatrain.data.shard_table import BatchPlace
from megatrain.errors import DataError

Tokens = npt.NDArray[np.unsignedinteger[Any]]
Ints = npt.NDArray[np.int64]


class Views(NamedTuple):
    """The tokens of a record batch end to end, and where each document begins in them (one entry more; the first 0)."""

    tokens: Tokens
    offsets: Ints

    @staticmethod
    def of(batch: pa.RecordBatch) -> Views:
        """Views of a record batch that is in memory or mapped."""
        column = batch.column(0)
        bounds = column.offsets.to_numpy()
        tokens = column.values.to_numpy()[bounds[0] : bounds[-1]]
        return Views(tokens, bounds - bounds[0] if bounds[0] else bounds)


class Shard:
    """The record batches of a shard; each is looked at when it is needed.

    ``read(number)`` gives the bytes of a record batch; they stay valid as long as the buffer or a view of it lives.
    """

    def __init__(
        self,
        name: str,
        places: list[BatchPlace],
        schema: pa.Schema,
        read: Callable[[int], pa.Buffer],
        max_views: int | None,
    ) -> None:
        self.name = name
        self.places = places
        self.token_starts = [0, *accumulate(place.num_tokens for place in places)]
        """Where in the shard each batch's tokens begin; one entry more than batches."""
        self.document_starts = [0, *accumulate(place.num_documents for place in places)]
        self.views = lru_cache(max_views)(self._views)
        """Tokens and document borders of record batch `number`; so many are kept."""
        self._schema = schema
        self._read = read

    def record_batch(self, number: int) -> pa.RecordBatch:
        """Record batch ``number`` with all its columns. Raises DataError where it is not what the table promises."""
        place = self.places[number]
        try:
            batch = pa.ipc.read_record_batch(self._read(number), self._schema)
            batch.validate()
        except (OSError, EOFError, pa.ArrowException) as error:
            raise self._damage(number, f"cannot be read: {error}") from None
        offsets = batch.column(0).offsets
        if (batch.num_rows, offsets[-1].as_py() - offsets[0].as_py()) != (place.num_documents, place.num_tokens):
            raise self._damage(number, f"does not hold {place.num_documents} documents, {place.num_tokens} tokens")
        return batch

    def batch_at(self, position: int) -> int:
        """The record batch that holds the shard's token ``position``; the last one for the position behind all."""
        return bisect_right(self.token_starts, position, 0, len(self.places)) - 1

    def batch_of_document(self, row: int) -> int:
        """The record batch that holds the shard's document ``row``."""
        return bisect_right(self.document_starts, row) - 1

    def _views(self, number: int) -> Views:
        return Views.of(self.record_batch(number))

    def _damage(self, number: int, what: str) -> DataError:
        return DataError(
            f"{self.name}, record batch {number}, {what}. Copy the shard again, or tokenize again; "
            "`megatrain-data verify` checks the whole dataset."
        )
