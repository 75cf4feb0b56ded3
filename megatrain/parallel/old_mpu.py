"""The mesh under the names by which DeepSpeed asks for it, by arithmetic and from groups that exist.

DeepSpeed's own grid makes every group of the mesh on every rank, each in step with all ranks: messages and time grow
with the square of their number. And it searches a list of all ranks for each message between stages.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.distributed as dist
from deepspeed.runtime.pipe import module as pipe_module
from deepspeed.runtime.pipe.topology import PipelineParallelGrid, PipeModelDataParallelTopology

from megatrain.distributed.groups import Groups


class DeepSpeedMPU(PipelineParallelGrid):  # type: ignore[misc]
    """What DeepSpeed's engines take as ``mpu``, and its pipelines as their grid, of the groups of a run."""

    def __init__(self, groups: Groups) -> None:
        mesh, self._here = groups.topology, groups.coordinate
        self._mesh = mesh
        self._topo = PipeModelDataParallelTopology(num_pp=mesh.pipeline, num_mp=mesh.tensor, num_dp=mesh.data)
        self.global_rank, self.world_size = groups.rank, mesh.world_size
        self.stage_id, self.data_parallel_id = self._here.pipeline, self._here.data
        self.pipe_parallel_size, self.data_parallel_size = mesh.pipeline, mesh.data
        self.model_parallel_size = self.slice_parallel_size = mesh.tensor
        self.is_first_stage, self.is_last_stage = self.stage_id == 0, self.stage_id == mesh.pipeline - 1
        self.ds_model_proc_group = groups.model_parallel_group
        self.ds_model_world_size = dist.get_world_size(groups.model_parallel_group)
        self.ds_model_rank = dist.get_rank(groups.model_parallel_group)
        self.dp_group, self.dp_proc_group = (
            dist.get_process_group_ranks(groups.gradient.get_group()),
            groups.gradient.get_group(),
        )
        self.pp_group, self.pp_proc_group = dist.get_process_group_ranks(groups.pipeline), groups.pipeline
        self.slice_group, self.slice_proc_group = dist.get_process_group_ranks(groups.tensor), groups.tensor

    def get_stage_id(self) -> int:
        return self.stage_id

    def get_slice_parallel_rank(self) -> int:
        return self._here.tensor

    def stage_to_global(self, stage_id: int) -> int:
        return self._mesh.rank(self._here._replace(pipeline=stage_id))


@contextlib.contextmanager
def use_as_grid(mpu: DeepSpeedMPU) -> Iterator[None]:
    """A pipeline module made inside takes ``mpu`` in place of a grid of its own."""
    own = pipe_module.PipelineParallelGrid
    pipe_module.PipelineParallelGrid = lambda topology, process_group: mpu
    try:
        yield
    finally:
        pipe_module.PipelineParallelGrid = own
