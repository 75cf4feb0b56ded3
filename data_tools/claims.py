"""Who does what: claims on pieces of work, by processes on any number of machines that share a folder.

A claim is a lock on one byte of a file. When its holder ends, however it does, the kernel frees it, or on NFS, Lustre
and the like the lock manager of the file system: no claim is ever left behind. Claims save work, no more: results
are whole files that appear by one rename, and whoever makes one makes the same bytes. So on a file system that knows no
locks everybody gets every claim, and some work is done twice.
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
"""Locked by every process that is at work in the folder; lies in the first file."""
NUM_FILES = 128
"""Over which claims are spread: to take a lock, the kernel goes through all that are held on that file."""

_TAKEN = {errno.EACCES, errno.EAGAIN}


class Claims:
    """The claims of this process, in files `path`-NNN. POSIX locks belong to processes: have one object in each."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._files: dict[int, BinaryIO] = {}
        self.is_member = False
        """Whether this process is at work in the folder."""

    def __reduce__(self) -> tuple[type[Claims], tuple[Path]]:
        return Claims, (self._path,)

    @contextmanager
    def claim(self, name: str, num_slots: int = 1) -> Iterator[bool]:
        """Hold one of the `num_slots` claims `name` for a while: whether one was free."""
        slots = (_byte(f"{name} {number}") for number in range(num_slots))
        byte = next((byte for byte in slots if self._lock(fcntl.LOCK_EX | fcntl.LOCK_NB, byte)), None)
        try:
            yield byte is not None
        finally:
            if byte is not None:
                self._lock(fcntl.LOCK_UN, byte)

    @contextmanager
    def hold(self, name: str) -> Iterator[None]:
        """Hold the claim `name` for a while, and wait for it first."""
        byte = _byte(name)
        self._lock(fcntl.LOCK_EX, byte)
        try:
            yield
        finally:
            self._lock(fcntl.LOCK_UN, byte)

    def join(self) -> bool:
        """Be at work in the folder, until `leave`. False where the folder was removed just now: make it again."""
        self._lock(fcntl.LOCK_SH, MEMBERS_BYTE)
        try:
            self.is_member = os.path.samestat(os.fstat(self._files[0].fileno()), self._file_path(0).stat())
        except FileNotFoundError:
            self.is_member = False
        if not self.is_member:
            self.close()
        return self.is_member

    def is_alone(self) -> bool:
        """Whether nobody else is at work in the folder; if so, nobody can join before this process does again."""
        return self._lock(fcntl.LOCK_EX | fcntl.LOCK_NB, MEMBERS_BYTE)

    def leave(self) -> bool:
        """Be at work no longer. True for the last one, who alone may then remove the folder, and close."""
        # Two that asked for the exclusive lock while both hold the shared one would both be refused.
        self._lock(fcntl.LOCK_UN, MEMBERS_BYTE)
        self.is_member = False
        return self.is_alone()

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
    """A byte behind MEMBERS_BYTE for a claim's name."""
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
