"""Where each rank stands in the mesh of pipeline, data and tensor axes. Pure arithmetic: no process group, no torch.

The axes are ordered (pipeline, data, tensor) with tensor innermost, as DeepSpeed's PipeModelDataParallelTopology:
neighbouring ranks share a node and its fast links, and tensor parallelism speaks most.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Axis = Literal["pipeline", "data", "tensor"]
AXES: tuple[Axis, ...] = get_args(Axis)


@dataclass(frozen=True)
class Coordinate:
    """A rank's place on each axis."""

    pipeline: int
    data: int
    tensor: int


@dataclass(frozen=True)
class Topology:
    """The mesh of a run: its degree along each axis."""

    pipeline: int
    data: int
    tensor: int

    @classmethod
    def of(cls, world_size: int, tensor: int, pipeline: int) -> Topology:
        """The mesh of ``world_size`` ranks; ``tensor * pipeline`` must divide it (plan.rules has checked)."""
        data, rest = divmod(world_size, tensor * pipeline)
        if rest or data == 0:
            raise ValueError(f"{tensor=} times {pipeline=} does not divide {world_size=}")
        return cls(pipeline=pipeline, data=data, tensor=tensor)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.pipeline * self.data * self.tensor

    def coordinate(self, rank: int) -> Coordinate:
        """The place of ``rank``."""
        rest, tensor = divmod(rank, self.tensor)
        pipeline, data = divmod(rest, self.data)
        return Coordinate(pipeline=pipeline, data=data, tensor=tensor)

    def rank(self, coordinate: Coordinate) -> int:
        """The rank at a place: the inverse of ``coordinate``."""
        return (coordinate.pipeline * self.data + coordinate.data) * self.tensor + coordinate.tensor

    def group(self, rank: int, *axes: Axis) -> list[int]:
        """The ranks that differ from ``rank`` along ``axes`` alone, itself included, in rank order."""
        here = self.coordinate(rank)
        ranges = {axis: range(getattr(self, axis)) if axis in axes else (getattr(here, axis),) for axis in AXES}
        return [
            self.rank(Coordinate(p, d, t)) for p in ranges["pipeline"] for d in ranges["data"] for t in ranges["tensor"]
        ]

    def groups(self, *axes: Axis) -> list[list[int]]:
        """Every group along ``axes``: a partition of all ranks, in the order of each group's first rank."""
        return [ranks for rank in range(self.world_size) if (ranks := self.group(rank, *axes))[0] == rank]
