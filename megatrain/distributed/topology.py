"""Where each rank stands in the mesh of pipeline, data and tensor axes. Pure arithmetic: no process group, no torch.

The axes are ordered (pipeline, data, tensor) with tensor innermost, as DeepSpeed's PipeModelDataParallelTopology:
neighboring ranks share a node and its fast links, and tensor parallelism communicates most.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

Axis = Literal["pipeline", "data", "tensor"]
AXES: tuple[Axis, ...] = get_args(Axis)
"""Outermost first: the ranks along the last one are neighbors."""


class Coordinate(NamedTuple):
    """A rank's index along each of AXES."""

    pipeline: int
    data: int
    tensor: int


@dataclass(frozen=True)
class Topology:
    """The mesh of a run: its degree along each of AXES."""

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
        return self.pipeline * self.data * self.tensor

    def coordinate(self, rank: int) -> Coordinate:
        rest, tensor = divmod(rank, self.tensor)
        pipeline, data = divmod(rest, self.data)
        return Coordinate(pipeline, data, tensor)

    def rank(self, coordinate: Coordinate) -> int:
        """The inverse of ``coordinate``."""
        return (coordinate.pipeline * self.data + coordinate.data) * self.tensor + coordinate.tensor

    def group(self, rank: int, *axes: Axis) -> list[int]:
        """The ranks that differ from ``rank`` along ``axes`` alone, itself included, in rank order."""
        here = self.coordinate(rank)
        places = (range(getattr(self, axis)) if axis in axes else (getattr(here, axis),) for axis in AXES)
        return [self.rank(Coordinate(*place)) for place in itertools.product(*places)]
