"""Copies of a save lie side by side in one piece of memory, and each save uses it again."""

from __future__ import annotations

import mmap
from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatrain.checkpoint.arena import ALIGNMENT, Arena, Place

DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.uint8)
TENSORS = st.lists(
    st.tuples(st.lists(st.integers(0, 40), max_size=3), st.sampled_from(DTYPES)).map(
        lambda given: torch.randint(0, 100, tuple(given[0])).to(given[1])
    ),
    max_size=12,
)


def places(tensors: list[Tensor]) -> list[Place]:
    return [Place(number, x.shape, x.dtype) for number, x in enumerate(tensors)]


@given(TENSORS)
def test_copies_are_whole_aligned_and_apart(tensors):
    arena = Arena()
    arena.reserve(places(tensors), pin=False)
    copies = [arena.copy(number, x) for number, x in enumerate(tensors)]  # all of them before any is looked at
    for x, copy in zip(tensors, copies, strict=True):
        assert copy.shape == x.shape
        assert torch.equal(copy, x)
        assert copy.numel() == 0 or copy.data_ptr() % ALIGNMENT == 0
    needed = sum(x.nbytes for x in tensors)
    assert needed <= arena.num_bytes < needed + ALIGNMENT * len(tensors) + mmap.PAGESIZE


@given(TENSORS)
def test_each_save_uses_the_same_memory(tensors):
    arena = Arena()
    arena.reserve(places(tensors), pin=False)
    size = arena.num_bytes
    first = [arena.copy(number, x).data_ptr() for number, x in enumerate(tensors)]
    arena.reserve(places(tensors), pin=False)
    assert [arena.copy(number, x + 1).data_ptr() for number, x in enumerate(tensors)] == first
    assert arena.num_bytes == size


def test_growth_leaves_earlier_copies_alone():
    """As they may be on their way to a file."""
    arena, old = Arena(), torch.arange(5000)
    kept = arena.copy("old", old)
    before = arena.num_bytes
    arena.reserve([Place("old", old.shape, old.dtype), Place("new", torch.Size([3000]), torch.float32)], pin=False)
    new = arena.copy("new", torch.ones(3000))
    assert torch.equal(kept, old)
    assert new.sum() == 3000
    assert arena.num_bytes - before == 3 * mmap.PAGESIZE
    old_memory = range(kept.data_ptr(), kept.data_ptr() + kept.nbytes)
    assert new.data_ptr() not in old_memory


def test_memory_is_there_before_the_first_save():
    """Resident, that is: a page that was never written to costs time when it is."""
    with Path("/proc/self/statm").open(encoding="ascii") as statm:
        arena, size = Arena(), 64 << 20
        before = int(statm.read().split()[1])
        arena.reserve([Place("weight", torch.Size([size]), torch.uint8)], pin=False)
        statm.seek(0)
        assert (int(statm.read().split()[1]) - before) * mmap.PAGESIZE > 0.9 * size
