"""How much memory a process may hold, `--max-memory`, and what follows from it: sizes of buffers, never a result."""

from __future__ import annotations

import ctypes
import re
from contextlib import suppress
from dataclasses import dataclass
from mmap import MADV_DONTNEED, PAGESIZE
from pathlib import Path

from megatrain.errors import ConfigError
from megatrain.units import format_bytes

LEAST_BYTES = 320 << 20
OWN_BYTES = 224 << 20
"""Of a process that reads a part: the interpreter, libraries, the part and its documents."""
SHARE = 0.8
"""Of the memory there is: a process that goes near all of it is killed."""
MAPPED_SHARE = 0.25
"""Of what is free, for mapped files; the rest is for arrays."""
PROCESS_STATUS, PROCESS_MAPS = Path("/proc/self/statm"), Path("/proc/self/maps")


@dataclass(frozen=True)
class Memory:
    """What a process may hold."""

    num_bytes: int

    @property
    def free_bytes(self) -> int:
        return self.num_bytes - OWN_BYTES

    def fitting(self, item_bytes: int, most: int) -> int:
        """How many items of so many bytes a process may hold: a power of two, or `most`."""
        number = max(int(self.free_bytes * (1 - MAPPED_SHARE)) // item_bytes, 1)
        return min(1 << number.bit_length() - 1, most)

    def release_mapped(self) -> None:
        """Let go of the pages of mapped files if they are too many. What is needed of them again is read again."""
        with suppress(OSError):
            resident = int(PROCESS_STATUS.read_text().split()[2]) * PAGESIZE  # of libraries too
            if resident > self.free_bytes * MAPPED_SHARE + OWN_BYTES / 4:
                _release_mapped()


NO_BOUND = Memory(1 << 50)
"""Buffers have their usual sizes."""


def _release_mapped() -> None:
    """Unmap the pages of mapped files: Arrow maps what it reads as private, NumPy as shared."""
    libc = ctypes.CDLL(None)
    for line in PROCESS_MAPS.read_text().splitlines():
        extent, permissions, *_ = line.split(maxsplit=2)
        if permissions[3] == "s" or (permissions == "r--p" and line.endswith(".arrow")):
            begin, end = (int(address, 16) for address in extent.split("-"))
            libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), MADV_DONTNEED)


def bound_memory(given: str | None, there: int, num_processes: int) -> Memory:
    """What each of so many processes may hold that share what there is. Raises ConfigError for a bad `--max-memory`."""
    most = int(there * SHARE)
    if given is None:
        return Memory(max(most // num_processes, LEAST_BYTES))
    size = _parse_size(given)
    if size < LEAST_BYTES:
        raise ConfigError(f"--max-memory {given} is too little: a process needs {LEAST_BYTES >> 20}M at least.")
    if size > most:
        raise ConfigError(
            f"--max-memory {given} is too much: it should be at most {SHARE:.0%} of the {format_bytes(there)} that "
            f"a process can have here, {most >> 20}M."
        )
    return Memory(size)


def _parse_size(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT])(?:i?B)?", text, re.IGNORECASE)
    if found is None:
        raise ConfigError(f"--max-memory {text} should be a number and a unit, such as 512M or 4G.")
    return int(float(found[1]) * 1024 ** ("KMGT".index(found[2].upper()) + 1))
