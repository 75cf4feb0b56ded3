"""Which process does what: locks by processes on any number of machines that share a folder.

A lock is one on a byte of a file. When the process that holds it ends, for whatever reason, the kernel releases it, or
on NFS, Lustre and the like the file system's lock manager does: none is ever left behind. Locks only save work: results
are whole files that appear by one rename, and all processes make the same bytes. So on a file system without locks each
process gets every lock, and some work is done twice.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import orjson
import xxhash

from megatrain.atomic import commit_bytes
from megatrain.data.format import canonical_json
from megatrain.errors import ConfigError

MEMBERS_BYTE = 0
"""Locked, in the first file, by every process that works in the folder."""
NUM_FILES = 128
"""Locks are spread over so many files: to take one, the kernel goes through all that are held on its file."""

_TAKEN = {errno.EACCES, errno.EAGAIN}


class WorkLocks:
    """The locks of this process, in files `path`-NNN. POSIX locks belong to processes: have one object in each."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._files: dict[int, BinaryIO] = {}
        self.is_member = False
        """Whether this process works in the folder."""

    def __reduce__(self) -> tuple[type[WorkLocks], tuple[Path]]:
        return WorkLocks, (self._path,)

    @contextmanager
    def try_lock(self, name: str, num_slots: int = 1) -> Iterator[bool]:
        """Hold one of the `num_slots` locks called `name`; whether one was free."""
        slots = (_byte(f"{name} {number}") for number in range(num_slots))
        byte = next((byte for byte in slots if self._lock(fcntl.LOCK_EX | fcntl.LOCK_NB, byte)), None)
        try:
            yield byte is not None
        finally:
            if byte is not None:
                self._lock(fcntl.LOCK_UN, byte)

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Wait for the lock called `name`, and hold it."""
        byte = _byte(name)
        self._lock(fcntl.LOCK_EX, byte)
        try:
            yield
        finally:
            self._lock(fcntl.LOCK_UN, byte)

    def join(self) -> bool:
        """Become a member until `leave`. False where the folder was removed at this moment: make it again."""
        self._lock(fcntl.LOCK_SH, MEMBERS_BYTE)
        try:
            self.is_member = os.path.samestat(os.fstat(self._files[0].fileno()), self._file_path(0).stat())
        except FileNotFoundError:
            self.is_member = False
        if not self.is_member:
            self.close()
        return self.is_member

    def is_only_member(self) -> bool:
        """Whether there is no other member; if so, none can join before this process joins again."""
        return self._lock(fcntl.LOCK_EX | fcntl.LOCK_NB, MEMBERS_BYTE)

    def leave(self) -> bool:
        """End the membership. True for the last member, which alone may then remove the folder, and close."""
        # Two members that try for the exclusive lock while both hold the shared one would both be refused.
        self._lock(fcntl.LOCK_UN, MEMBERS_BYTE)
        self.is_member = False
        return self.is_only_member()

    def close(self) -> None:
        while self._files:
            self._files.popitem()[1].close()

    def _file_path(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}-{number:03d}")

    def _lock(self, operation: int, byte: int) -> bool:
        number = byte % NUM_FILES
        if number not in self._files:
            self._files[number] = self._file_path(number).open("a+b")
        try:
            fcntl.lockf(self._files[number], operation, 1, byte)
        except OSError as error:
            return error.errno not in _TAKEN
        return True


def _byte(name: str) -> int:
    return 1 + (xxhash.xxh3_64_intdigest(name.encode()) >> 2)


def join_command(out: Path, path: Path, command: Mapping[str, object], way_out: str) -> None:
    """Record at `path` which command the folder `out` belongs to, or check that it is this one.

    Raises ConfigError, with `way_out` as the last of its advice, where another command has begun it.
    """
    given = canonical_json(command)
    if not path.exists():
        commit_bytes(path, given)
        return
    begun = dict(_leaves(orjson.loads(path.read_bytes())))
    differing = [key for key, value in _leaves(orjson.loads(given)) if begun.get(key) != value]
    if differing:
        raise ConfigError(
            f"{out} is unfinished, and was begun by a command with other {', '.join(differing)}. "
            f"Run that command again to finish it, give another --out, or {way_out}."
        )


def _leaves(command: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    for key, value in command.items():
        yield from _leaves(value) if isinstance(value, dict) else [(key, value)]
