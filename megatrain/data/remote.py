"""A dataset at an address that fsspec knows (s3://, gs://, http://, ...), read through a local cache.

A file in the cache is named after the checksum of its content: it is never out of date, and it is checked each time it
is mapped, so nothing needs to be synced to disk. Of shards, single record batches are fetched by their range of bytes,
for the samples of a run lie all over a dataset. All processes of a machine may share a cache.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from megatrain.atomic import commit_bytes
from megatrain.data.format import MANIFEST_FILE, is_content, map_file
from megatrain.data.storage import BatchReader
from megatrain.errors import ConfigError, DataError

if TYPE_CHECKING:
    from filelock import FileLock

CACHE_FOLDER = "~/.cache/megatrain"
CACHE_BYTES = 64 * 2**30
RETRY_SECONDS = 30.0

OPEN_SHARDS, OPEN_BATCHES = 64, 4
"""Shards kept open, and record batches of each. What is mapped takes space on disk even after the cache evicts it."""


def is_address(path: str | Path) -> bool:
    """Whether a path is an address for fsspec, and no folder of this machine."""
    return "://" in str(path)


@dataclass(frozen=True)
class Cache:
    """Files named after their checksums in a local folder; the least recently used are evicted.

    ``max_bytes`` bounds them: some 1/16 of it is free whenever nothing is being fetched. ``retry_seconds``: how long to
    retry where a server does not answer.
    """

    folder: Path = field(default_factory=lambda: Path(CACHE_FOLDER).expanduser())
    max_bytes: int = CACHE_BYTES
    retry_seconds: float = RETRY_SECONDS

    def path(self, checksum_hex: str) -> Path:
        return self.folder / "objects" / checksum_hex[:2] / checksum_hex

    def _lock(self, name: str) -> FileLock:
        from filelock import FileLock  # here: it takes 30 ms, which only an address needs

        return FileLock(self.folder / "locks" / name)

    def get(self, checksum_hex: str, fetch: Callable[[], bytes]) -> pa.Buffer:
        """The content of this checksum, mapped. Ranks of a machine that need the same wait for one to fetch it.

        Raises DataError where the disk does not take it.
        """
        content = self._find(checksum_hex)
        if content is not None:
            return content
        try:
            (self.folder / "locks").mkdir(parents=True, exist_ok=True)
            with self._lock(checksum_hex[:2]):
                content = self._find(checksum_hex)
                if content is None:
                    fetched = fetch()
                    self._add(checksum_hex, fetched)
                    content = self._find(checksum_hex) or pa.py_buffer(fetched)
                return content
        except OSError as error:
            raise DataError(
                f"The cache {self.folder} cannot be used: {error.strerror or error}. Make room or give write access "
                "there, or set data.cache_dir to a folder of a local disk, and data.cache_bytes to what it may hold."
            ) from None

    def _find(self, checksum_hex: str) -> pa.Buffer | None:
        """Content that is there, mapped and marked as used."""
        path = self.path(checksum_hex)
        try:
            data = map_file(path)
            if not is_content(data, checksum_hex):
                return None
            os.utime(path)
        except OSError:
            return None
        return data

    def _add(self, checksum_hex: str, data: bytes) -> None:
        path = self.path(checksum_hex)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._free_space(len(data))
        commit_bytes(path, data, durable=False)  # checked by its checksum when it is read

    def _free_space(self, num_new_bytes: int) -> None:
        """Evict each time that 1/16 of ``max_bytes`` was added; how much was added since is kept in a file."""
        tally = self.folder / "filled"
        with self._lock("room"):
            written = tally.read_text() if tally.exists() else ""
            filled = num_new_bytes + (int(written) if written.isdigit() else self.max_bytes)
            if filled > self.max_bytes // 16:
                self._evict(self.max_bytes * 7 // 8 - num_new_bytes)
                filled = 0
            tally.write_text(str(filled))

    def _evict(self, max_bytes: int) -> None:
        """Remove the least recently used, and what a killed process left half written, until ``max_bytes`` are left."""
        entries = []
        for path in (self.folder / "objects").glob("*/*"):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            entries.append((status.st_mtime_ns, status.st_size, path))
        excess = sum(size for _, size, _ in entries) - max_bytes
        for _, size, path in sorted(entries):
            if excess <= 0:
                break
            path.unlink(missing_ok=True)  # a process that has it mapped keeps it
            excess -= size


@dataclass(frozen=True)
class RemoteFolder:
    """A dataset's folder at an address: what `storage.LocalFolder` is for one of this machine."""

    path: str
    cache: Cache
    num_open_shards: int = OPEN_SHARDS
    num_open_batches: int | None = OPEN_BATCHES

    def manifest(self) -> tuple[str, bytes]:
        """The address of manifest.json, and its bytes as they are at this moment."""
        return f"{self.path}/{MANIFEST_FILE}", self._fetch(MANIFEST_FILE, None, None)

    def content(self, name: str, checksum_hex: str, start: int | None = None, stop: int | None = None) -> pa.Buffer:
        """A file or bytes [start, stop) of it, from the cache or else from its address."""

        def fetch() -> bytes:
            data = self._fetch(name, start, stop)
            if not is_content(data, checksum_hex):
                extent = "" if start is None else f", bytes {start} to {stop},"
                raise DataError(
                    f"{self.path}/{name}{extent} is not what the dataset says: it was changed or damaged there. Copy "
                    "the whole dataset to its address again."
                )
            return data

        return self.cache.get(checksum_hex, fetch)

    def file(self, name: str, checksum_hex: str) -> Path:
        self.content(name, checksum_hex)
        return self.cache.path(checksum_hex)

    def shard(self, name: str, num_bytes: int) -> BatchReader:
        return lambda batch: self.content(name, batch.checksum.hex(), batch.offset, batch.end)

    def read(self, name: str, start: int, stop: int) -> pa.Buffer:
        """Bytes [start, stop) of a file, past the cache."""
        # Stores take a range of no bytes for the whole object.
        return pa.py_buffer(self._fetch(name, start, stop) if start < stop else b"")

    def _fetch(self, name: str, start: int | None, stop: int | None) -> bytes:
        """Bytes of an object. Retries for ``retry_seconds`` where the network or the server fails."""
        from tenacity import Retrying, retry_if_not_exception_type, stop_after_delay, wait_random_exponential

        address = f"{self.path}/{name}"
        attempts = Retrying(
            stop=stop_after_delay(self.cache.retry_seconds),
            wait=wait_random_exponential(multiplier=0.2, max=8.0),
            retry=retry_if_not_exception_type((FileNotFoundError, PermissionError, ImportError, ValueError, DataError)),
            reraise=True,
        )
        try:
            return attempts(_read_object, address, start, stop)
        except DataError:
            raise
        except FileNotFoundError:
            raise DataError(
                f"There is no {address}. Give the address of a whole copy of what `megatrain-data tokenize` wrote."
            ) from None
        except (ImportError, ValueError) as error:
            raise ConfigError(f"{address} cannot be opened: {error}") from None
        except Exception as error:  # noqa: BLE001 (each store's driver has errors of its own)
            cause = str(error) or type(error).__name__
            raise DataError(
                f"{address} cannot be read: {cause}. Check the address, the network and your access, and start again."
            ) from None


def _read_object(address: str, start: int | None, stop: int | None) -> bytes:
    import fsspec

    filesystem, path = fsspec.core.url_to_fs(address)
    data: bytes = filesystem.cat_file(path, start=start, end=stop)
    if start is not None and stop is not None and len(data) > stop - start:
        raise DataError(
            f"{address} cannot be read in parts: its server gave {len(data)} bytes for the {stop - start} that were "
            "asked for. Use a server that answers ranges of bytes, or copy the dataset to this machine."
        )
    return data
