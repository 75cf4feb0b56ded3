"""The files of a dataset in a folder of this machine. `remote.RemoteFolder` answers the same for an address."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from megatrain.data.format import MANIFEST_FILE, map_file, read_manifest
from megatrain.data.shard_table import BatchMetadata
from megatrain.errors import DataError

MAPPED_SHARDS = 1024
"""Shards that a dataset in a folder keeps mapped. A process may map some 65,000 regions (vm.max_map_count)."""

BatchReader = Callable[[BatchMetadata], pa.Buffer]
"""Gives the bytes of a shard's record batch. Raises DataError where they cannot be had."""


@dataclass(frozen=True)
class LocalFolder:
    """A folder of this machine, or one that it has mounted; its files are mapped.

    ``num_open_shards`` may be kept open at a time, and ``num_open_batches`` of each (None: all). The methods raise
    DataError where something cannot be had.
    """

    path: Path
    num_open_shards: int = MAPPED_SHARDS
    num_open_batches: int | None = None

    def manifest(self) -> tuple[str, bytes]:
        """The path of manifest.json, and its bytes."""
        return str(self.path / MANIFEST_FILE), read_manifest(self.path)

    def content(self, name: str, checksum_hex: str) -> pa.Buffer:
        """The bytes of the file of this name and checksum. Here whoever reads it compares the checksum."""
        return self._map(name)

    def file(self, name: str, checksum_hex: str) -> Path:
        """A path on this machine of the file of this name and checksum. Here whoever reads it compares the checksum."""
        return self.path / name

    def shard(self, name: str, num_bytes: int) -> BatchReader:
        """A reader of the shard's record batches."""
        data = self._map(name)
        if data.size != num_bytes:
            raise DataError(
                f"{self.path / name} has {data.size} bytes where the dataset says {num_bytes}. Copy it again, or "
                "tokenize again; `megatrain-data verify` checks the whole dataset."
            )
        return lambda batch: data[batch.offset : batch.end]

    def read(self, name: str, start: int, stop: int) -> pa.Buffer:
        """Bytes [start, stop) of a file as they are at this moment, or fewer where it is shorter."""
        return self._map(name)[start:stop]

    def _map(self, name: str) -> pa.Buffer:
        try:
            return map_file(self.path / name)
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else error
            raise DataError(f"{self.path / name} cannot be read: {reason}. Copy it again, or tokenize again.") from None
