"""Where a piece of a parameter lies in the whole: boxes of a global tensor, and flat ranges within them.

A layout (tensor parallelism, ZeRO) decides which pieces a rank holds; initial weights and checkpoints only speak of
pieces, so that neither knows a layout. Pure arithmetic: no torch, no process group.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TensorSlice:
    """A rectangle of a global tensor: ``offset`` and ``extent`` in each dimension."""

    offset: tuple[int, ...]
    extent: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements in the box."""
        return math.prod(self.extent)


@dataclass(frozen=True)
class ShardSpec:
    """Which part of the tensor ``name`` a rank's parameter holds.

    The local parameter is ``boxes`` laid one behind the other along dimension ``dim`` (a fused query-key-value weight
    split over tensor ranks needs three). ``global_shape`` is the canonical, unpadded shape; ``padding`` counts the rows
    along ``dim`` that follow the boxes in the local parameter and belong to no canonical tensor (vocabulary padding).
    """

    name: str
    global_shape: tuple[int, ...]
    boxes: tuple[TensorSlice, ...]
    dim: int = 0
    padding: int = 0

    @classmethod
    def whole(cls, name: str, shape: Sequence[int]) -> ShardSpec:
        """The placement of a tensor that no layout splits."""
        return cls(name, tuple(shape), (TensorSlice((0,) * len(shape), tuple(shape)),))

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the rank's parameter, padding included."""
        if not self.global_shape:
            return ()
        shape = list(self.boxes[0].extent) if self.boxes else list(self.global_shape)
        shape[self.dim] = sum(box.extent[self.dim] for box in self.boxes) + self.padding
        return tuple(shape)

    @property
    def local_numel(self) -> int:
        """Elements of the rank's parameter, padding included."""
        return math.prod(self.local_shape)


@dataclass(frozen=True)
class FlatShard:
    """A flat range ``[start, start + length)`` (row-major) within ``box`` of the global tensor ``name``."""

    name: str
    global_shape: tuple[int, ...]
    box: TensorSlice
    start: int
    length: int

    @property
    def stop(self) -> int:
        """End of the range within the box."""
        return self.start + self.length


class Fragment(NamedTuple):
    """One piece of a parameter's state on this rank.

    ``kind``: "weight" (the fp32 master, or the weight itself), or the name of an optimizer state ("exp_avg", ...).
    ``data``: 1-D tensor of ``piece.length`` elements, a view of the engine's memory where it is contiguous there.
    """

    piece: FlatShard
    kind: str
    data: Tensor


class ShardView(NamedTuple):
    """A piece, and where its elements lie in a flat range of the local parameter: a slice, or an array of indices."""

    piece: FlatShard
    where: slice | NDArray[np.int64]


def shard_views(placement: ShardSpec, start: int, stop: int) -> Iterator[ShardView]:
    """Cut the range [start, stop) of the flattened local parameter into pieces of the global tensor.

    One piece a box: the elements of a row-major range that fall into a box are a flat range of that box. Padding falls
    into none. Indices count from ``start``.
    """
    if not placement.global_shape:
        yield ShardView(FlatShard(placement.name, (), TensorSlice((), ()), 0, 1), slice(0, 1))
        return
    local = placement.local_shape
    inner = math.prod(local[placement.dim + 1 :])
    row = local[placement.dim] * inner  # elements from one step of the dimensions before ``dim`` to the next
    offset = 0
    for box in placement.boxes:
        width = box.extent[placement.dim] * inner
        first, last = _count_before(start, row, offset, width), _count_before(stop, row, offset, width)
        if last > first:
            piece = FlatShard(placement.name, placement.global_shape, box, first, last - first)
            if width == row or box.numel == width:  # nothing lies between the box's elements
                begin = (first // width) * row + offset + first % width - start
                yield ShardView(piece, slice(begin, begin + piece.length))
            else:
                outer, within = np.divmod(np.arange(first, last, dtype=np.int64), width)
                yield ShardView(piece, outer * row + offset + within - start)
        offset += width


def _count_before(position: int, row: int, offset: int, width: int) -> int:
    """How many elements of a box (``width`` of each ``row``, from ``offset`` on) lie before a flat position."""
    full, rest = divmod(position, row)
    return full * width + min(max(rest - offset, 0), width)


def copy_overlap(target: NDArray[Any], wanted: FlatShard, source: NDArray[Any], held: FlatShard) -> int:
    """Copy what ``held`` (in ``source``) and ``wanted`` (in ``target``) share; the number of elements copied.

    Both arrays are 1-D, one element for each of their piece. The boxes may differ: layouts cut differently.
    """
    if wanted.box == held.box:
        low, high = max(wanted.start, held.start), min(wanted.stop, held.stop)
        if low >= high:
            return 0
        target[low - wanted.start : high - wanted.start] = source[low - held.start : high - held.start]
        return high - low
    shared = intersect(wanted.box, held.box)
    if shared is None:
        return 0
    # Trailing dimensions that all three boxes span alike, and one more, make a run that is contiguous in both.
    split = len(shared.extent) - 1
    while split > 0 and shared.extent[split] == wanted.box.extent[split] == held.box.extent[split]:
        split -= 1
    run = math.prod(shared.extent[split:])
    in_target = _run_starts(shared, wanted.box, split) - wanted.start
    in_source = _run_starts(shared, held.box, split) - held.start
    lows = np.maximum(0, np.maximum(-in_target, -in_source))
    highs = np.minimum(run, np.minimum(wanted.length - in_target, held.length - in_source))
    copied = 0
    for to, start, first, last in zip(
        in_target.tolist(), in_source.tolist(), lows.tolist(), highs.tolist(), strict=True
    ):
        if first < last:
            target[to + first : to + last] = source[start + first : start + last]
            copied += last - first
    return copied


def shared_range(wanted: FlatShard, held: FlatShard) -> tuple[int, int]:
    """The smallest range of ``held``'s elements, counted from its first, outside of which nothing of ``wanted`` lies;
    (0, 0) where they share nothing."""
    if wanted.box == held.box:
        low, high = wanted.start, wanted.stop
    elif (shared := intersect(wanted.box, held.box)) is None:
        return 0, 0
    else:
        low, high = 0, 1
        for dim, extent in enumerate(shared.extent):
            stride = math.prod(held.box.extent[dim + 1 :])
            first = shared.offset[dim] - held.box.offset[dim]
            low, high = low + first * stride, high + (first + extent - 1) * stride
    low, high = max(low, held.start), min(high, held.stop)
    return (low - held.start, high - held.start) if low < high else (0, 0)


def intersect(a: TensorSlice, b: TensorSlice) -> TensorSlice | None:
    """What two boxes of one tensor share; None where they share nothing."""
    offset = tuple(max(x, y) for x, y in zip(a.offset, b.offset, strict=True))
    ends = (min(x + n, y + m) for x, n, y, m in zip(a.offset, a.extent, b.offset, b.extent, strict=True))
    extent = tuple(end - begin for end, begin in zip(ends, offset, strict=True))
    return TensorSlice(offset, extent) if min(extent, default=1) > 0 else None


def _run_starts(shared: TensorSlice, box: TensorSlice, split: int) -> NDArray[np.int64]:
    """The flat index in ``box`` at which each run of ``shared`` begins, in row-major order of the runs."""
    strides = [math.prod(box.extent[dim + 1 :]) for dim in range(len(box.extent))]
    origin = sum((s - b) * stride for s, b, stride in zip(shared.offset, box.offset, strides, strict=True))
    starts = np.array([origin], dtype=np.int64)
    for extent, stride in zip(shared.extent[:split], strides[:split], strict=True):
        starts = (starts[:, None] + np.arange(extent, dtype=np.int64) * stride).reshape(-1)
    return starts
