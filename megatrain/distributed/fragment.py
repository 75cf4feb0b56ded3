"""Where a shard of a parameter lies in the whole: rectangular slices of a global tensor, and flat ranges within them.

A layout (tensor parallelism, ZeRO) decides which shards a rank holds. Initial weights and checkpoints only see shards,
so neither depends on the layout. Pure arithmetic: no torch, no process group.
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

WEIGHT = "weight"
AVERAGE = "ema"


@dataclass(frozen=True)
class TensorSlice:
    """A rectangle of a global tensor: ``offset`` and ``extent`` in each dimension."""

    offset: tuple[int, ...]
    extent: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.extent)


@dataclass(frozen=True)
class ShardSpec:
    """Which part of the tensor ``name`` a rank's parameter holds.

    The local parameter is ``slices`` concatenated along dimension ``dim`` (a fused query-key-value weight
    split over tensor ranks needs three). ``global_shape`` is the canonical, unpadded shape; ``padding`` counts the rows
    along ``dim`` that follow the slices in the local parameter and belong to no canonical tensor (vocabulary padding).

    ``num_replicas`` tensor ranks hold the same part, this one as number ``replica``; ``is_partial_grad``: each of them
    computes a part of its gradient. ``is_copy``: another pipeline stage holds the same tied weight, and saves it.
    """

    name: str
    global_shape: tuple[int, ...]
    slices: tuple[TensorSlice, ...]
    dim: int = 0
    padding: int = 0
    num_replicas: int = 1
    replica: int = 0
    is_partial_grad: bool = False
    is_copy: bool = False

    @classmethod
    def whole(cls, name: str, shape: Sequence[int]) -> ShardSpec:
        """The spec of a tensor that no layout splits."""
        return cls(name, tuple(shape), (TensorSlice((0,) * len(shape), tuple(shape)),))

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Of the rank's parameter, padding included."""
        if not self.global_shape:
            return ()
        shape = list(self.slices[0].extent) if self.slices else list(self.global_shape)
        shape[self.dim] = sum(part.extent[self.dim] for part in self.slices) + self.padding
        return tuple(shape)

    @property
    def local_numel(self) -> int:
        return math.prod(self.local_shape)


@dataclass(frozen=True)
class FlatShard:
    """A flat range ``[start, start + length)`` (row-major) within ``tensor_slice`` of the global tensor ``name``."""

    name: str
    global_shape: tuple[int, ...]
    tensor_slice: TensorSlice
    start: int
    length: int

    @property
    def stop(self) -> int:
        return self.start + self.length


class Fragment(NamedTuple):
    """One shard of a parameter's state on this rank.

    ``kind``: WEIGHT (the fp32 master, or the weight itself), AVERAGE (of the weights over the updates), or the name of
    another optimizer state ("exp_avg", ...).
    ``data``: 1-D tensor of ``shard.length`` elements, a view of the engine's memory where it is contiguous there.
    """

    shard: FlatShard
    kind: str
    data: Tensor


class ShardView(NamedTuple):
    """A shard, and where its elements lie in a flat range of the local parameter: a slice, or an array of indices."""

    shard: FlatShard
    where: slice | NDArray[np.int64]


def shard_views(spec: ShardSpec, start: int, stop: int) -> Iterator[ShardView]:
    """Cut the range [start, stop) of the flattened local parameter into shards of the global tensor.

    One shard for each slice: the elements of a row-major range that fall into a slice are a flat range of that slice.
    Padding falls into none. Indices count from ``start``.
    """
    if not spec.global_shape:
        yield ShardView(FlatShard(spec.name, (), TensorSlice((), ()), 0, 1), slice(0, 1))
        return
    local = spec.local_shape
    inner = math.prod(local[spec.dim + 1 :])
    row = local[spec.dim] * inner  # elements from one step of the dimensions before ``dim`` to the next
    offset = 0
    for tensor_slice in spec.slices:
        width = tensor_slice.extent[spec.dim] * inner
        first, last = _count_before(start, row, offset, width), _count_before(stop, row, offset, width)
        if last > first:
            shard = FlatShard(spec.name, spec.global_shape, tensor_slice, first, last - first)
            if width == row or tensor_slice.numel == width:  # the slice is contiguous in the local parameter
                begin = (first // width) * row + offset + first % width - start
                yield ShardView(shard, slice(begin, begin + shard.length))
            else:
                outer, within = np.divmod(np.arange(first, last, dtype=np.int64), width)
                yield ShardView(shard, outer * row + offset + within - start)
        offset += width


def _count_before(position: int, row: int, offset: int, width: int) -> int:
    """How many elements of a slice (``width`` of each ``row``, from ``offset`` on) lie before a flat position."""
    full, rest = divmod(position, row)
    return full * width + min(max(rest - offset, 0), width)


def copy_overlap(target: NDArray[Any], wanted: FlatShard, source: NDArray[Any], held: FlatShard) -> int:
    """Copy what ``held`` (in ``source``) and ``wanted`` (in ``target``) share; the number of elements copied.

    Both arrays are 1-D, one element for each of their shard. The slices may differ: each layout has its own.
    """
    if wanted.tensor_slice == held.tensor_slice:
        low, high = max(wanted.start, held.start), min(wanted.stop, held.stop)
        if low >= high:
            return 0
        target[low - wanted.start : high - wanted.start] = source[low - held.start : high - held.start]
        return high - low
    shared = intersect(wanted.tensor_slice, held.tensor_slice)
    if shared is None:
        return 0
    # Trailing dimensions that all three slices span alike, and one more, make a run that is contiguous in both.
    split = len(shared.extent) - 1
    while split > 0 and shared.extent[split] == wanted.tensor_slice.extent[split] == held.tensor_slice.extent[split]:
        split -= 1
    run = math.prod(shared.extent[split:])
    in_target = _run_starts(shared, wanted.tensor_slice, split) - wanted.start
    in_source = _run_starts(shared, held.tensor_slice, split) - held.start
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
    if wanted.tensor_slice == held.tensor_slice:
        low, high = wanted.start, wanted.stop
    elif (shared := intersect(wanted.tensor_slice, held.tensor_slice)) is None:
        return 0, 0
    else:
        low, high = 0, 1
        for dim, extent in enumerate(shared.extent):
            stride = math.prod(held.tensor_slice.extent[dim + 1 :])
            first = shared.offset[dim] - held.tensor_slice.offset[dim]
            low, high = low + first * stride, high + (first + extent - 1) * stride
    low, high = max(low, held.start), min(high, held.stop)
    return (low - held.start, high - held.start) if low < high else (0, 0)


def intersect(a: TensorSlice, b: TensorSlice) -> TensorSlice | None:
    """The intersection of two slices of one tensor; None where they share nothing."""
    offset = tuple(max(x, y) for x, y in zip(a.offset, b.offset, strict=True))
    ends = (min(x + n, y + m) for x, n, y, m in zip(a.offset, a.extent, b.offset, b.extent, strict=True))
    extent = tuple(end - begin for end, begin in zip(ends, offset, strict=True))
    return TensorSlice(offset, extent) if min(extent, default=1) > 0 else None


def _run_starts(shared: TensorSlice, tensor_slice: TensorSlice, split: int) -> NDArray[np.int64]:
    """The flat index in ``tensor_slice`` at which each run of ``shared`` begins, in row-major order of the runs."""
    strides = [math.prod(tensor_slice.extent[dim + 1 :]) for dim in range(len(tensor_slice.extent))]
    origin = sum((s - b) * stride for s, b, stride in zip(shared.offset, tensor_slice.offset, strides, strict=True))
    starts = np.array([origin], dtype=np.int64)
    for extent, stride in zip(shared.extent[:split], strides[:split], strict=True):
        starts = (starts[:, None] + np.arange(extent, dtype=np.int64) * stride).reshape(-1)
    return starts
