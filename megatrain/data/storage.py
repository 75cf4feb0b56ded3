"""The files of a dataset, wherever they lie: what the reader asks of a place, and the plain folder that answers it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pyarrow as pa

from megatrain.data.format import Manifest, map_file
from megatrain.data.shard_table import BatchPlace
from megatrain.errors import DataError

MAPPED_SHARDS = 1024
"""Shards that a dataset in a folder keeps mapped. A process may map some 65,000 regions (vm.max_map_count)."""


class ShardReader(Protocol):
    """Reads the record batches of one shard."""

    def __call__(self, place: BatchPlace) -> pa.Buffer:
        """The bytes of a record batch. Raises DataError where they cannot be had."""


class Storage(Protocol):
    """The files of a dataset. All methods but ``manifest`` raise DataError where something cannot be had."""

    @property
    def path(self) -> str | Path:
        """Where they lie, as the user named it."""

    @property
    def num_open_shards(self) -> int:
        """Shards that may be kept open at a time."""

    @property
    def num_open_batches(self) -> int | None:
        """Record batches of each that may be; None: all of them."""

    def manifest(self) -> Manifest:
        """The manifest. Raises DataError, and ConfigError for an address of no known kind."""

    def content(self, name: str, checksum_hex: str) -> pa.Buffer:
        """The bytes of the file of this name and checksum."""

    def file(self, name: str, checksum_hex: str) -> Path:
        """A path on this machine of the file of this name and checksum."""

    def shard(self, name: str, num_bytes: int) -> ShardReader:
        """A reader of the shard's record batches."""

    def read(self, name: str, start: int, stop: int) -> pa.Buffer:
        """Bytes [start, stop) of a file as they are at this moment, or fewer where it is shorter."""


@dataclass(frozen=True)
class LocalFolder:
    """A folder of this machine, or one that it has mounted; its files are mapped."""

    path: Path
    num_open_shards: int = MAPPED_SHARDS
    num_open_batches: int | None = None

    def manifest(self) -> Manifest:
        """The folder's manifest."""
        return Manifest.load(self.path)

    def content(self, name: str, checksum_hex: str) -> pa.Buffer:
        """The file, mapped; whoever reads it compares the checksum."""
        return self._map(name)

    def file(self, name: str, checksum_hex: str) -> Path:
        """The file in its place; whoever reads it compares the checksum."""
        return self.path / name

    def shard(self, name: str, num_bytes: int) -> ShardReader:
        """Map a shard."""
        data = self._map(name)
        if data.size != num_bytes:
            raise DataError(
                f"{self.path / name} has {data.size} bytes where the dataset says {num_bytes}. Copy it again, or "
                "tokenize again; `megatrain-data verify` checks the whole dataset."
            )
        return lambda place: data[place.offset : place.offset + place.num_bytes]

    def read(self, name: str, start: int, stop: int) -> pa.Buffer:
        """Bytes [start, stop) of a file, mapped."""
        return self._map(name)[start:stop]

    def _map(self, name: str) -> pa.Buffer:
        try:
            return map_file(self.path / name)
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else error
            raise DataError(f"{self.path / name} cannot be read: {reason}. Copy it again, or tokenize again.") from None
