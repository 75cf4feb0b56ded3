"""What datasets of text and of images have in common: rows in shards, found without reading the others."""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from megatrain.data.format import SHARD_TABLE_FILE, Manifest, shard_name
from megatrain.data.image_format import ImageManifest
from megatrain.data.remote import Cache, RemoteFolder, is_address
from megatrain.data.shard import Shard
from megatrain.data.shard_table import ShardTable
from megatrain.data.storage import MAPPED_SHARDS, LocalFolder


@dataclass(frozen=True)
class DocumentInfo:
    """What is stored of a row beside its content."""

    id: str
    hash: bytes
    source_file: str
    source_row: int
    text_bytes: int = 0
    """Of text alone."""


def open_storage(
    path: str | Path, cache: Cache | None = None, max_mapped_shards: int = MAPPED_SHARDS
) -> LocalFolder | RemoteFolder:
    """The files of a dataset, in a folder or at an address that fsspec knows; an address is read through ``cache``."""
    if is_address(path):
        return RemoteFolder(str(path).rstrip("/"), cache or Cache())
    return LocalFolder(Path(path), max_mapped_shards)


class ShardedDataset:
    """The rows of a dataset: documents, or images. In the names of the format an image is a document, too."""

    def __init__(
        self, storage: LocalFolder | RemoteFolder, manifest: Manifest | ImageManifest, schema: pa.Schema
    ) -> None:
        self.storage = storage
        self.path = storage.path
        """The folder or address, as the user gave it."""
        self.manifest = manifest
        self.schema = schema
        """Columns of a record batch."""
        self.shard = lru_cache(storage.num_open_shards)(partial(_open_shard, weakref.ref(self)))
        """Shard number `index`; those that were not used for longest are let go."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.storage,)

    def shard_opens(self) -> None:
        """Called before a shard is opened: another one may be let go, so that no view of it should be kept."""

    @cached_property
    def table(self) -> ShardTable:
        """What each shard holds. Raises DataError where that is damaged or cannot be had."""
        data = self.storage.content(SHARD_TABLE_FILE, self.manifest.shard_table_checksum)
        return ShardTable.read(f"{self.path}/{SHARD_TABLE_FILE}", data, self.manifest)

    @property
    def num_documents(self) -> int:
        """Rows: of text, documents (the empty ones not counted: they were left out); images."""
        return self.manifest.num_documents

    @property
    def digest(self) -> str:
        return self.manifest.digest

    @property
    def num_shards(self) -> int:
        return self.manifest.num_shards

    def shard_rows(self) -> list[dict[str, int]]:
        """For each shard its documents, tokens and bytes on disk."""
        rows: list[dict[str, int]] = self.table.rows.select(["documents", "tokens", "bytes"]).to_pylist()
        return rows

    def document_info(self, k: int) -> DocumentInfo:
        shard, batch, row = self._find_document(k)
        known = shard.record_batch(batch)
        named = [name for name in ("id", "hash", "source", "text_bytes") if name in known.schema.names]
        columns: dict[str, Any] = known.select(named).slice(row, 1).to_pylist()[0]
        source = columns.pop("source")
        return DocumentInfo(source_file=source["file"], source_row=source["row"], **columns)

    def hashes(self) -> Iterator[pa.Array]:
        """Of every row, a record batch at a time."""
        for index in range(self.num_shards):
            shard = self.shard(index)
            yield from (shard.record_batch(number)["hash"] for number in range(len(shard.batches)))

    def _find_document(self, k: int) -> tuple[Shard, int, int]:
        """The shard of document k, the record batch in it, and the row in that."""
        index, batch, row = self._place(k)
        return self.shard(index), batch, row

    def _place(self, k: int) -> tuple[int, int, int]:
        """The number of document k's shard, of the record batch in it, and of the row in that."""
        if not 0 <= k < self.num_documents:
            raise IndexError(f"There is no document {k} in {self.path}: it has {self.num_documents}, counted from 0.")
        index = bisect_right(self.table.document_starts, k) - 1
        shard, row = self.shard(index), k - self.table.document_starts[index]
        batch = shard.batch_of_document(row)
        return index, batch, row - shard.document_starts[batch]


def _open_shard(reference: weakref.ref[ShardedDataset], index: int) -> Shard:
    """Shard ``index`` of a dataset, which it does not refer to: maps go in the moment that nobody uses them."""
    dataset = reference()
    assert dataset is not None, "its own table of shards calls this"
    dataset.shard_opens()
    name, table, storage = shard_name(index), dataset.table, dataset.storage
    read = storage.shard(name, table.num_bytes(index))
    return Shard(f"{dataset.path}/{name}", table.batches(index), dataset.schema, read, storage.num_open_batches)
