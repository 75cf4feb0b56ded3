"""The mesh under the names by which DeepSpeed's pipeline asks for it, by arithmetic and from groups that exist.

DeepSpeed's own grid makes every group of the mesh on every rank, each in step with all ranks: messages and time grow
with the square of their number. And its topology is a list of all ranks, searched for each message between stages.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch.distributed as dist
from deepspeed.runtime.pipe import module as pipe_module
from deepspeed.runtime.pipe.topology import PipelineParallelGrid, ProcessTopology

from megatrain.distributed.groups import Groups
from megatrain.distributed.topology import Coordinate, Topology


class _Place(NamedTuple):
    pipe: int
    data: int
    model: int


class MeshTopology(ProcessTopology):  # type: ignore[misc]
    """DeepSpeed's topology of a mesh."""

    def __init__(self, mesh: Topology) -> None:
        self._mesh = mesh
        self.axes, self.dims = list(_Place._fields), [mesh.pipeline, mesh.data, mesh.tensor]

    def get_rank(self, **place: int) -> int:
        """The rank at a place."""
        return self._mesh.rank(Coordinate(place["pipe"], place["data"], place["model"]))

    def get_coord(self, rank: int) -> Any:
        """The place of a rank."""
        here = self._mesh.coordinate(rank)
        return _Place(here.pipeline, here.data, here.tensor)

    def world_size(self) -> int:
        """Number of ranks."""
        return self._mesh.world_size


class MeshGrid(PipelineParallelGrid):  # type: ignore[misc]
    """DeepSpeed's grid, of the groups of a run."""

    def __init__(self, groups: Groups) -> None:
        mesh, here = groups.topology, groups.coordinate
        self._topo = MeshTopology(mesh)
        self.global_rank, self.world_size = groups.rank, mesh.world_size
        self.stage_id, self.data_parallel_id = here.pipeline, here.data
        self.pipe_parallel_size, self.data_parallel_size = mesh.pipeline, mesh.data
        self.model_parallel_size = self.slice_parallel_size = mesh.tensor
        self.is_first_stage, self.is_last_stage = here.pipeline == 0, here.pipeline == mesh.pipeline - 1
        self.ds_model_proc_group = groups.model_parallel_group
        self.ds_model_world_size, self.ds_model_rank = (
            dist.get_world_size(groups.model_parallel_group),
            dist.get_rank(groups.model_parallel_group),
        )
        self.dp_group, self.dp_proc_group = dist.get_process_group_ranks(groups.data), groups.data
        self.pp_group, self.pp_proc_group = dist.get_process_group_ranks(groups.pipeline), groups.pipeline
        self.slice_group, self.slice_proc_group = dist.get_process_group_ranks(groups.tensor), groups.tensor


@contextlib.contextmanager
def pipelines_use(grid: MeshGrid) -> Iterator[None]:
    """A pipeline module made inside takes this grid in place of one of DeepSpeed's own."""
    usual = pipe_module.PipelineParallelGrid
    pipe_module.PipelineParallelGrid = lambda topology, process_group: grid
    try:
        yield
    finally:
        pipe_module.PipelineParallelGrid = usual
