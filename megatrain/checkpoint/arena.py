"""Memory for the copies that a save makes: one piece, laid out once and used again by each save.

Pinned where the state is on a GPU. torch's own allocator of pinned memory rounds each block up to a power of two, and
never gives it back; this takes what is needed, to the page, and registers it with CUDA.
"""

from __future__ import annotations

import logging
import mmap
from collections.abc import Hashable, Iterable
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

ALIGNMENT = 64
"""Of each copy's first byte: a line of the cache."""
_PORTABLE = 1  # cudaHostRegisterPortable


class Place(NamedTuple):
    """What a copy needs. ``key``: what it is found by."""

    key: Hashable
    shape: torch.Size
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    @property
    def room(self) -> int:
        """Bytes from its beginning to the next copy's."""
        return -(-self.num_bytes // ALIGNMENT) * ALIGNMENT


class Arena:
    """Grows by another piece where a copy has no place yet; what has one stays where it is."""

    def __init__(self) -> None:
        self._copies: dict[Hashable, Tensor] = {}
        self._pinned: list[Tensor] = []
        self.num_bytes = 0
        """Of all its pieces, in whole pages."""

    def reserve(self, places: Iterable[Place], *, pin: bool) -> None:
        """Make memory for those that have none, in one piece, and write to it, so that the first save need not wait for
        it: memory that was never written to takes five times as long to copy into. ``pin``: for copies from a GPU."""
        new = [place for place in places if place.key not in self._copies]
        ends = [*accumulate(place.room for place in new)]
        if not ends or not ends[-1]:
            self._copies.update({place.key: torch.empty(place.shape, dtype=place.dtype) for place in new})
            return
        size = -(-ends[-1] // mmap.PAGESIZE) * mmap.PAGESIZE
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # no child process shares it
        memory = torch.frombuffer(mmap.mmap(-1, size, flags=private), dtype=torch.uint8).zero_()
        self.num_bytes += size
        if pin:
            self._pin(memory)
        for place, begin in zip(new, [0, *ends], strict=False):
            self._copies[place.key] = memory[begin : begin + place.num_bytes].view(place.dtype).view(place.shape)

    def copy(self, key: Hashable, data: Tensor) -> Tensor:
        """A copy of ``data`` in the memory of ``key``. One from a GPU is on its way: whoever reads it waits first."""
        if key not in self._copies:
            self.reserve([Place(key, data.shape, data.dtype)], pin=data.is_cuda)
        return self._copies[key].copy_(data, non_blocking=data.is_cuda)

    def close(self) -> None:
        """Give it back, once no copy is needed."""
        self._copies.clear()
        for memory in self._pinned:
            torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())  # type: ignore[no-untyped-call]
        self._pinned.clear()

    def _pin(self, memory: Tensor) -> None:
        cuda = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        failed = int(cuda.cudaHostRegister(memory.data_ptr(), memory.nbytes, _PORTABLE))
        if failed:
            logger.warning(
                "memory for the copies of a save cannot be pinned (CUDA's error %d; `ulimit -l` may be too low): saves "
                "stop training for longer.",
                failed,
            )
        else:
            self._pinned.append(memory)
