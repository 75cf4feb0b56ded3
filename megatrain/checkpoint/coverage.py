"""Which elements of each tensor a checkpoint's shards hold: every one exactly once."""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Iterator
from dataclasses import dataclass, field

from megatrain.distributed.fragment import FlatShard, TensorSlice, intersect


class Coverage:
    """What the shards seen so far hold, by name and kind. One layout wrote all of them, so their tensor slices are the
    same or share nothing."""

    def __init__(self) -> None:
        self._tensors: dict[tuple[str, str], _Tensor] = {}

    def add(self, shard: FlatShard, kind: str) -> None:
        """Count a shard in. Raises ValueError where another one holds some of it, or says the tensor has another
        shape."""
        tensor = self._tensors.setdefault((shard.name, kind), _Tensor(shard.global_shape))
        if shard.global_shape != tensor.shape:
            raise ValueError(f"{shard.name} ({kind}) has shape {shard.global_shape} there, elsewhere {tensor.shape}")
        if not tensor.add(shard):
            raise ValueError(f"it holds elements of {shard.name} ({kind}) that another shard holds too")

    def incomplete(self) -> Iterator[str]:
        """The tensors of which elements are missing, in words."""
        for (name, kind), tensor in self._tensors.items():
            if tensor.num_held != tensor.num_elements:
                yield f"{name} ({kind}) has {tensor.num_held:,} elements on disk instead of {tensor.num_elements:,}"

    def num_elements(self, kind: str) -> int:
        """Of all tensors of a kind together, whole."""
        return sum(tensor.num_elements for (_, its), tensor in self._tensors.items() if its == kind)


@dataclass
class _Tensor:
    """``held``: for each tensor_slice the ranges of it that are there, sorted."""

    shape: tuple[int, ...]
    held: dict[TensorSlice, list[tuple[int, int]]] = field(default_factory=dict)
    num_held: int = 0

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    def add(self, shard: FlatShard) -> bool:
        """False where some of the shard is held already."""
        if shard.tensor_slice not in self.held:
            if any(intersect(shard.tensor_slice, other) for other in self.held):
                return False
            self.held[shard.tensor_slice] = []
        ranges = self.held[shard.tensor_slice]
        at = bisect(ranges, (shard.start, shard.stop))
        if (at and ranges[at - 1][1] > shard.start) or (at < len(ranges) and ranges[at][0] < shard.stop):
            return False
        ranges.insert(at, (shard.start, shard.stop))
        self.num_held += shard.length
        return True
