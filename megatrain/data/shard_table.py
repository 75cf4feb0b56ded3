"""The table of shards: what each shard of a dataset holds, and where in it each record batch lies.

It is an Arrow file that is mapped, not loaded. Beside it stand two numbers a shard in memory (where its tokens and its
documents begin), 1.6 MB for 100,000 shards; what is said of record batches is read when their shard is first used.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from megatrain.data.format import SHARD_TABLE_SCHEMA, Manifest, as_numpy, checksum, map_file
from megatrain.data.image_format import ImageManifest
from megatrain.errors import DataError

Ints = npt.NDArray[np.int64]

ARROW_MAGIC_BYTES = 8


class BatchMetadata(NamedTuple):
    """A record batch in its shard's file, as in a row of the table. ``checksum``: xxh3 of its bytes there."""

    offset: int
    num_bytes: int
    num_documents: int
    num_tokens: int
    checksum: bytes

    @property
    def end(self) -> int:
        return self.offset + self.num_bytes


def shard_row(path: Path, num_documents: int, num_tokens: int, text_bytes: int) -> dict[str, Any]:
    """What the table says of a shard that has just been written; as JSON can hold it, checksums in hex."""
    data = map_file(path)
    reader = pa.BufferReader(data)
    reader.seek(ARROW_MAGIC_BYTES)
    messages = pa.ipc.MessageReader.open_stream(reader)
    schema = pa.ipc.read_schema(messages.read_next_message())
    batches = []
    start = reader.tell()
    for message in messages:
        batch = pa.ipc.read_record_batch(message, schema)
        stop = reader.tell()
        batches.append(
            {
                "offset": start,
                "bytes": stop - start,
                "documents": batch.num_rows,
                "tokens": len(batch.column(0).values),
                "checksum": checksum(data[start:stop]).hex(),
            }
        )
        start = stop
    counts = {"documents": num_documents, "tokens": num_tokens, "text_bytes": text_bytes}
    return {**counts, "bytes": data.size, "checksum": checksum(data).hex(), "batches": batches}


def write_shard_table(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write the rows that ``shard_row`` gave, in the order of the shards."""
    decoded = [
        {
            **row,
            "checksum": bytes.fromhex(row["checksum"]),
            "batches": [{**batch, "checksum": bytes.fromhex(batch["checksum"])} for batch in row["batches"]],
        }
        for row in rows
    ]
    # One record batch: a reader then has each column as one array of the map.
    batch = pa.RecordBatch.from_pylist(decoded, schema=SHARD_TABLE_SCHEMA)
    with pa.ipc.new_file(str(path), SHARD_TABLE_SCHEMA) as writer:
        writer.write_batch(batch)


@dataclass(frozen=True)
class ShardTable:
    """The mapped table, checked against the manifest."""

    path: str | Path
    """Names the table in messages."""
    rows: pa.RecordBatch

    @staticmethod
    def read(path: str | Path, data: pa.Buffer, manifest: Manifest | ImageManifest) -> ShardTable:
        """Check the bytes of shards.arrow: they are those that the manifest names, and its totals are theirs."""
        advice = "Copy the dataset again, or tokenize again."
        try:
            if checksum(data).hex() != manifest.shard_table_checksum:
                raise DataError(f"{path} is damaged: its checksum is not the one in the manifest. {advice}")
            reader = pa.ipc.open_file(data)
            if not reader.schema.equals(SHARD_TABLE_SCHEMA) or reader.num_record_batches != 1:
                raise DataError(f"{path} is no table of shards as this megatrain writes it: tokenize again.")
            rows = reader.get_batch(0)
            rows.validate(full=True)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path} cannot be read: {error}. {advice}") from None
        if rows.num_rows != manifest.num_shards:
            raise DataError(f"{path} is not the table of the manifest's {manifest.num_shards} shards. {advice}")
        totals = {"documents": manifest.num_documents, "tokens": manifest.num_tokens, "text_bytes": manifest.text_bytes}
        for name, total in totals.items():
            sums = np.cumsum(column := as_numpy(rows[name]))
            # A sum that leaves the range of int64 shows as a negative one on its way.
            if np.any(column < 0) or np.any(sums < 0) or (int(sums[-1]) if len(sums) else 0) != total:
                raise DataError(f"{path}: the {name} of the shards do not add up to the manifest's {total}. {advice}")
        return ShardTable(path, rows)

    @cached_property
    def token_starts(self) -> memoryview:
        """Where each shard's tokens begin in the dataset; one entry more than shards."""
        return _starts(as_numpy(self.rows["tokens"]))

    @cached_property
    def document_starts(self) -> memoryview:
        """The number of each shard's first document; one entry more than shards."""
        return _starts(as_numpy(self.rows["documents"]))

    @cached_property
    def batch_starts(self) -> Ints:
        """The number of each shard's first record batch among all of the dataset; one entry more than shards."""
        starts: Ints = as_numpy(self.rows["batches"].offsets)
        return starts

    def num_bytes(self, shard: int) -> int:
        value: int = self.rows["bytes"][shard].as_py()
        return value

    def checksum(self, shard: int) -> bytes:
        """xxh3 (128 bits) of a shard's file."""
        value: bytes = self.rows["checksum"][shard].as_py()
        return value

    def shard_of_batch(self, batch: int) -> tuple[int, int]:
        """The shard of the dataset's record batch ``batch``, and its number within the shard."""
        shard = int(np.searchsorted(self.batch_starts, batch, side="right")) - 1
        return shard, batch - int(self.batch_starts[shard])

    def batches(self, shard: int) -> list[BatchMetadata]:
        """Where the shard's record batches lie. Raises DataError where that cannot be."""
        columns = [column.to_pylist() for column in self.rows["batches"][shard].values.flatten()]
        batches = list(map(BatchMetadata, *columns))
        num_documents = self.document_starts[shard + 1] - self.document_starts[shard]
        num_tokens = self.token_starts[shard + 1] - self.token_starts[shard]
        end = ARROW_MAGIC_BYTES
        for batch in batches:
            if batch.offset < end or min(batch.num_bytes, batch.num_documents, batch.num_tokens) < 1:
                raise DataError(f"{self.path}: row {shard} has record batches that cannot be. Tokenize again.")
            end = batch.end
        counts = (sum(batch.num_documents for batch in batches), sum(batch.num_tokens for batch in batches))
        if end > self.num_bytes(shard) or counts != (num_documents, num_tokens):
            raise DataError(f"{self.path}: row {shard} is at odds with its record batches. Tokenize again.")
        return batches

    def shard_at(self, position: int) -> int:
        """The shard that holds the token at ``position``; the last one for the position behind all tokens."""
        return bisect_right(self.token_starts, position, 0, self.rows.num_rows) - 1


def _starts(counts: Ints) -> memoryview:
    """0 and the running sums, in a form that ``bisect`` reads quickly."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64).data
