"""Where a piece of a parameter lies in the whole: boxes of a global tensor, and flat ranges within them.

A layout (tensor parallelism, ZeRO) decides which pieces a rank holds; initial weights and checkpoints only speak of
pieces, so that neither knows a layout. Pure arithmetic: no torch, no process group.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Box:
    """A rectangle of a global tensor: ``offset`` and ``extent`` in each dimension."""

    offset: tuple[int, ...]
    extent: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements in the box."""
        return math.prod(self.extent)


@dataclass(frozen=True)
class Placement:
    """Which part of the tensor ``name`` a rank's parameter holds.

    The local parameter is ``boxes`` laid one behind the other along dimension ``dim`` (a fused query-key-value weight
    split over tensor ranks needs three). ``global_shape`` is the canonical, unpadded shape; ``padding`` counts the rows
    along ``dim`` that follow the boxes in the local parameter and belong to no canonical tensor (vocabulary padding).
    """

    name: str
    global_shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    dim: int = 0
    padding: int = 0

    @classmethod
    def whole(cls, name: str, shape: Sequence[int]) -> Placement:
        """The placement of a tensor that no layout splits."""
        return cls(name, tuple(shape), (Box((0,) * len(shape), tuple(shape)),))

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the rank's parameter, padding included."""
        if not self.global_shape:
            return ()
        shape = list(self.boxes[0].extent) if self.boxes else list(self.global_shape)
        shape[self.dim] = sum(box.extent[self.dim] for box in self.boxes) + self.padding
        return tuple(shape)


@dataclass(frozen=True)
class Piece:
    """A flat range ``[start, start + length)`` (row-major) within ``box`` of the global tensor ``name``."""

    name: str
    global_shape: tuple[int, ...]
    box: Box
    start: int
    length: int
