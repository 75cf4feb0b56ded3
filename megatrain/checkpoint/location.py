"""Where checkpoints lie: a folder of a POSIX file system, or a prefix of an object store that fsspec knows.

Both are paths with the same methods (``Path`` and fsspec's ``UPath``), so that what reads small files and lists folders
does not ask which it is. Here is what does differ: how a file comes to be, and how a part of a large one is read.
"""

from __future__ import annotations

import contextlib
import io
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from upath import UPath

from megatrain.atomic import committed_folder
from megatrain.config.schema import in_home
from megatrain.errors import CheckpointError, ConfigError, Unreachable

Location = Path | UPath
Bytes = NDArray[np.uint8]

_PART_BYTES = 32 << 20  # of an upload; S3 takes at most 10,000 of them


def locate(text: str | Path) -> Location:
    """What a user names: a path, or a URL such as ``s3://bucket/run``.

    Raises CheckpointError for a store that no installed package serves, or whose package cannot work here.
    """
    if "://" not in str(text):
        return Path(in_home(str(text)))
    try:
        path = UPath(str(text))
        _ = path.fs  # the store's package is imported here
    except (ImportError, ValueError) as error:
        raise CheckpointError(f"{text}: {error}. Install the fsspec package of that store.") from None
    except OSError as error:
        raise Unreachable(
            f"{text}: this machine does not get to that store ({error}). hdfs:// needs Java and Hadoop's libraries, by "
            "JAVA_HOME, HADOOP_HOME and CLASSPATH."
        ) from None
    return Path(path.path) if path.protocol in ("", "file", "local") else path


def address(place: Location) -> str:
    """What `locate` finds it by from any working folder."""
    return str(place.absolute() if isinstance(place, Path) else place)


@contextmanager
def store_errors(path: Location) -> Iterator[None]:
    """Raise what goes wrong there as a CheckpointError that names it: Unreachable for a store, whose own package may
    raise anything (no connection, no credentials). FileNotFoundError and FileExistsError are answers, and pass.
    """
    is_local = isinstance(path, Path)
    try:
        yield
    except (CheckpointError, FileNotFoundError, FileExistsError):
        raise
    except OSError as error:
        kind = CheckpointError if is_local else Unreachable
        raise kind(f"{error.filename or path}: {error.strerror or error}") from None
    except Exception as error:
        if is_local:
            raise
        raise Unreachable(f"{path}: {error}") from None


def list_folder(folder: Location) -> dict[str, int]:
    """Name and size in bytes of what lies in a folder, as it is now; one request for each thousand objects of a store.

    Raises FileNotFoundError where there is none, CheckpointError where it cannot be read.
    """
    with store_errors(folder):
        if isinstance(folder, Path):
            return {path.name: size for path in folder.iterdir() if (size := _size(path)) is not None}
        folder.fs.invalidate_cache()  # fsspec would remember an older listing
        listed = folder.fs.ls(folder.path, detail=True)
        return {entry["name"].rstrip("/").rsplit("/", 1)[-1]: int(entry["size"] or 0) for entry in listed}


def exists(path: Location) -> bool:
    """Whether there is such a file or object, as it is now. Raises CheckpointError where that cannot be found out."""
    with store_errors(path):
        return bool(path.exists())


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # it has gone meanwhile, or is a link to nowhere
        return None


class ByteSource(Protocol):
    """A file's bytes, read by ranges. ``is_mapped``: a range costs no copy, and is read when it is touched."""

    is_mapped: bool

    @property
    def size(self) -> int: ...

    def read(self, begin: int, end: int) -> Bytes:
        """Bytes [begin, end)."""
        ...

    def fetch(self, begin: int, end: int) -> Bytes:
        """Bytes [begin, end), read there and then. Raises OSError where they cannot be."""
        ...

    def release(self) -> None:
        """Let go of what holds the bytes that were read. Arrays stay good."""
        ...


class MappedFile:
    """A local file, mapped into memory from the first read on until it is forgotten.

    Python's maps hold a file descriptor each: a checkpoint may have more files than a process may open.
    """

    is_mapped = True

    def __init__(self, path: Path) -> None:
        self._path, self._size = path, path.stat().st_size
        self._bytes: Bytes | None = None
        self._buffer: Bytes = np.empty(0, dtype=np.uint8)

    @property
    def size(self) -> int:
        return self._size

    def read(self, begin: int, end: int) -> Bytes:
        """Bytes [begin, end), as a view of the map. Raises OSError where the file has become another."""
        if self._bytes is None:
            self._bytes = self._map()
        return self._bytes[begin:end]

    def fetch(self, begin: int, end: int) -> Bytes:
        """Bytes [begin, end), good until the next call. No map: one that is touched where the disk fails is SIGBUS."""
        if self._buffer.size < end - begin:
            self._buffer = np.empty(end - begin, dtype=np.uint8)
        left = self._buffer[: end - begin].data
        with self._path.open("rb", buffering=0) as file:
            file.seek(begin)
            while left:
                if not (count := file.readinto(left)):
                    raise OSError(None, "the file has become shorter", str(self._path))
                left = left[count:]
        return self._buffer[: end - begin]

    def release(self) -> None:
        """Let go of the map, and of the memory that holds what was read, with the last view of it."""
        self._bytes, self._buffer = None, np.empty(0, dtype=np.uint8)

    def _map(self) -> Bytes:
        with self._path.open("rb") as file:
            if os.fstat(file.fileno()).st_size != self._size:
                raise OSError(None, "its size has changed meanwhile", str(self._path))
            return np.frombuffer(mmap.mmap(file.fileno(), self._size, access=mmap.ACCESS_READ), dtype=np.uint8)


class RemoteFile:
    """An object of a store: each range is a request of its own."""

    is_mapped = False

    def __init__(self, path: UPath) -> None:
        with store_errors(path):
            self._path, self._size = path, path.stat().st_size

    @property
    def size(self) -> int:
        return int(self._size)

    def read(self, begin: int, end: int) -> Bytes:
        """Bytes [begin, end). Raises OSError where the store gives fewer."""
        with store_errors(self._path):
            data = self._path.fs.cat_file(self._path.path, start=begin, end=end)
        if len(data) != end - begin:
            raise OSError(None, f"the store gave {len(data):,} bytes instead of {end - begin:,}", str(self._path))
        return np.frombuffer(data, dtype=np.uint8)

    fetch = read

    def release(self) -> None:
        pass


def open_bytes(path: Location) -> ByteSource:
    """A file to be read by ranges. Raises OSError."""
    return MappedFile(path) if isinstance(path, Path) else RemoteFile(path)


@contextmanager
def create(path: Location) -> Iterator[IO[Any]]:
    """A new file to be written front to back; all of it is on disk, or in the store, when the block ends.

    Raises OSError, or CheckpointError for a store. A local file that could not be finished is left to the caller; in a
    store it never appears.
    """
    if isinstance(path, Path):
        with path.open("xb", buffering=0) as local:
            yield local
            os.fsync(local.fileno())
        return
    with store_errors(path):
        remote = path.fs.open(path.path, "wb", block_size=_PART_BYTES, autocommit=False)
        try:
            yield remote
        except BaseException:
            with contextlib.suppress(Exception):  # the failure under way is the one to be told
                remote.close()
                remote.discard()
            raise
        remote.close()
        remote.commit()


def write_all(file: IO[Any], data: memoryview) -> None:
    """Write all of ``data``: an unbuffered file may take less at a time."""
    while data:
        data = data[file.write(data) :]


def sync_so_far(file: IO[Any]) -> None:
    """Wait until the disk has what was written: the sync at the end of a large file would last for as long as all of it
    takes, and nobody could tell how far it is. A store takes its parts as they are written."""
    if isinstance(file, io.FileIO):
        os.fdatasync(file.fileno())


def write_file(path: Location, content: bytes) -> None:
    """A small new file, written and synced. Raises OSError."""
    with create(path) as file:
        write_all(file, memoryview(content))


def write_if_absent(path: UPath, content: bytes) -> None:
    """Write an object if none of its name exists: one conditional put. Raises FileExistsError where one does."""
    with store_errors(path):
        path.fs.pipe_file(path.path, content, mode="create")


def refuse_existing(out: Path) -> None:
    """Raise ConfigError where ``out`` exists."""
    if out.exists():
        raise ConfigError(f"{out} exists already: give --out a folder that does not, or remove that one.")


@contextmanager
def new_folder(out: Path, made: str) -> Iterator[Path]:
    """Yield an empty folder, which becomes ``out`` when it is whole. ``made``: what a failure prevents, in a word.

    Raises ConfigError where ``out`` exists, CheckpointError where it cannot be written.
    """
    refuse_existing(out)
    try:
        with committed_folder(out) as unfinished:
            yield unfinished
    except OSError as error:
        where = error.filename or out
        raise CheckpointError(f"{where} cannot be written ({error.strerror}): nothing was {made}.") from None
