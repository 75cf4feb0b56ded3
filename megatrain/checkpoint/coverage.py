"""Which elements of each tensor a checkpoint's pieces hold: every one exactly once."""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Iterator
from dataclasses import dataclass, field

from megatrain.distributed.fragment import FlatShard, TensorSlice, intersect


class Coverage:
    """What the pieces seen so far hold, by name and kind. Pieces of two boxes that overlap in part do not occur: one
    layout wrote all of them."""

    def __init__(self) -> None:
        self._tensors: dict[tuple[str, str], _Tensor] = {}

    def add(self, piece: FlatShard, kind: str) -> None:
        """Count a piece in. Raises ValueError where another one holds some of it, or says the tensor has another
        shape."""
        tensor = self._tensors.setdefault((piece.name, kind), _Tensor(piece.global_shape))
        if piece.global_shape != tensor.shape:
            raise ValueError(f"{piece.name} ({kind}) has shape {piece.global_shape} there, elsewhere {tensor.shape}")
        if not tensor.add(piece):
            raise ValueError(f"it holds elements of {piece.name} ({kind}) that another piece holds too")

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

    def add(self, piece: FlatShard) -> bool:
        """False where some of the piece is held already."""
        if piece.tensor_slice not in self.held:
            if any(intersect(piece.tensor_slice, other) for other in self.held):
                return False
            self.held[piece.tensor_slice] = []
        ranges = self.held[piece.tensor_slice]
        at = bisect(ranges, (piece.start, piece.stop))
        if (at and ranges[at - 1][1] > piece.start) or (at < len(ranges) and ranges[at][0] < piece.stop):
            return False
        ranges.insert(at, (piece.start, piece.stop))
        self.num_held += piece.length
        return True
