"""The process groups of a run: made once from the topology, handed to whoever communicates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megatrain.distributed.activity import Activity
from megatrain.distributed.topology import AXES, Coordinate, Topology

T = TypeVar("T")

POLL_SECONDS = 0.2
"""How often ranks that wait for one another hear of each other; when all are done, at once."""


@dataclass(frozen=True)
class Groups:
    """This rank's coordinate in the mesh, and the groups it is in (a group of one has a process group too).

    ``mesh``: its axes have the names of topology.AXES. Two questions have two answers, though both are the data axis by
    now: ``batch`` are the ranks that divide a batch among them, ``gradient`` those that sum the gradient of a weight.
    (Ranks that divided each sequence would sum gradients, and share a batch.) Some groups may be the same, or the
    default one. ``stages``: by some of the pipeline's ranks that hold the same weights, these, if this one is among
    them. ``activity``: what this rank gets done.
    """

    topology: Topology
    rank: int
    device: torch.device
    mesh: DeviceMesh
    batch: DeviceMesh
    gradient: DeviceMesh
    tensor: dist.ProcessGroup
    pipeline: dist.ProcessGroup
    model_parallel_group: dist.ProcessGroup  # along pipeline and tensor: one copy of the model
    self_group: dist.ProcessGroup  # this rank by itself
    kv_replica_group: dist.ProcessGroup  # tensor ranks with the same key-value heads as this one
    stages: Mapping[tuple[int, ...], dist.ProcessGroup] = field(default_factory=dict)
    activity: Activity = field(default_factory=Activity)

    @property
    def coordinate(self) -> Coordinate:
        return self.topology.coordinate(self.rank)

    @property
    def batch_share(self) -> tuple[int, int]:
        """Which of how many shares of a batch is this rank's."""
        return self.batch.get_local_rank(), self.batch.size()

    def all_reduce_sum(self, values: Sequence[float] | Tensor) -> list[float]:
        """Each value summed over all ranks, in double precision. Every rank must call it at the same point."""
        totals = torch.as_tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(totals)
        summed: list[float] = totals.tolist()
        return summed

    def all_reduce_max(self, values: list[float]) -> list[float]:
        """The greatest of each value over all ranks, in double precision. Every rank must call it at the same point."""
        most = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        greatest: list[float] = most.tolist()
        return greatest

    def all_gather_object(self, value: T) -> list[T]:
        """Every rank's value, in rank order, for what happens once a run. Every rank must call it at the same point."""
        values: list[Any] = [None] * self.topology.world_size
        dist.all_gather_object(values, value)
        return values

    def first_value(self, value: T | None) -> T | None:
        """The value of the first rank that has one; None where none has. Every rank must call it at the same point."""
        size = self.topology.world_size
        speaker = torch.tensor(size if value is None else self.rank, device=self.device)
        dist.all_reduce(speaker, dist.ReduceOp.MIN)
        return None if int(speaker) == size else self._broadcast_object(value, int(speaker))

    def run_on_rank0(self, work: Callable[[], T]) -> T:
        """What ``work`` gives on rank 0, on every rank, or what it raises. Collective: see wait_for_all_ranks."""
        outcome: tuple[Any, BaseException | None] = (None, None)
        if self.rank == 0:
            ended = self._ended(work)
            problem = ended.exception()
            outcome = (None if problem else ended.result()), problem
        else:
            self.wait_for_all_ranks(None)
        result, problem = self._broadcast_object(outcome, 0)
        if problem is not None:
            raise problem
        first: T = result
        return first

    def run_on_all_ranks(self, work: Callable[[], T]) -> T:
        """What ``work`` gives or raises on this rank, once all ranks are through with theirs. Collective, see
        wait_for_all_ranks."""
        return self._ended(work).result()

    def wait_for_all_ranks(self, future: Future[Any] | None) -> None:
        """Wait until this ``future`` and those of all other ranks have ended, however they did. Collective.

        However long it takes: the ranks stay in touch, so that no collective runs into its timeout, and what any of
        them gets done meanwhile is activity on all.
        """
        seen = self.activity.count
        at_work = 1.0
        while at_work:
            mine = future is not None and not wait([future], POLL_SECONDS).done
            before, seen = seen, self.activity.count
            at_work, moved = self.all_reduce_sum([float(mine), float(seen > before)])
            if moved:
                self.activity.elsewhere()

    def _ended(self, work: Callable[[], T]) -> Future[T]:
        """``work`` done in a thread, while this one stays in touch with the other ranks."""

        def enter_thread() -> None:
            if self.device.type == "cuda":  # each thread has a current device of its own
                torch.cuda.set_device(self.device)

        with ThreadPoolExecutor(1, "work", enter_thread) as pool:
            future = pool.submit(work)
            self.wait_for_all_ranks(future)
        return future

    def _broadcast_object(self, value: T, speaker: int) -> T:
        """The value of one rank, on all."""
        told: list[Any] = [value]
        dist.broadcast_object_list(told, speaker, device=self.device)
        first: T = told[0]
        return first

    def barrier(self) -> None:
        self.all_reduce_sum([0.0])


def release(groups: Iterable[object]) -> None:
    """Free process groups (each has its own threads and connections); what is none, or is the whole world, is left."""
    for group in {id(group): group for group in groups}.values():
        if isinstance(group, dist.ProcessGroup) and group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def make_groups(
    topology: Topology,
    rank: int,
    device: torch.device,
    timeout_seconds: float,
    kv_heads: int | None = None,
    stages: Iterable[tuple[int, ...]] = (),
) -> Groups:
    """Make this rank's groups; every rank must call it at the same point. The default process group must exist.

    ``kv_heads``: how many key-value heads the tensor ranks share out; with fewer heads than ranks, some hold the same.
    ``stages``: the sets of pipeline ranks that hold the same weights (`megatrain.plan.stages.shared_weights`).

    Every rank makes the mesh's groups along each axis, in the same order; those it is not in cost it a name alone
    (1,568 of them on 4,096 ranks of tensor 8 x pipeline 4: 14 ms, no message). An axis that is the whole world is the
    default group. The groups that are no axis are made by their members alone: torch names such a group by its ranks
    and by how many groups there are, so that every rank must make equally many, and none may be freed.
    """
    timeout = timedelta(seconds=timeout_seconds)
    sizes = tuple(getattr(topology, axis) for axis in AXES)
    mesh = init_device_mesh(device.type, sizes, mesh_dim_names=AXES)
    along_axis = {axis: mesh.get_group(axis) for axis in AXES}
    made: list[dist.ProcessGroup] = list(along_axis.values())
    world = dist.group.WORLD
    assert world is not None
    for group in made:
        if group is not world and dist.get_backend(group) != "fake":  # which never waits, and refuses a timeout
            group.set_timeout(timeout)

    def group_of(ranks: list[int], *, is_new: bool = False) -> dist.ProcessGroup:
        """One that there is by now, unless it ``is_new``."""
        for group in () if is_new else (world, *made):
            if dist.get_process_group_ranks(group) == ranks:
                return group
        new: dist.ProcessGroup = dist.new_group(ranks, timeout=timeout, use_local_synchronization=True)
        made.append(new)
        return new

    here = topology.coordinate(rank)
    self_group = group_of([rank])
    model_parallel_group = group_of(topology.group(rank, "pipeline", "tensor"))
    kv_replica_group = self_group
    if kv_heads is not None and topology.tensor > kv_heads:
        num_replicas = topology.tensor // kv_heads
        first = here.tensor // num_replicas * num_replicas
        kv_replica_group = group_of(topology.group(rank, "tensor")[first : first + num_replicas])
    made_of = {}
    for holders in sorted({*stages}):
        mine = holders if here.pipeline in holders else (here.pipeline,)
        ranks = [topology.rank(here._replace(pipeline=stage)) for stage in mine]
        made_of[holders] = group_of(ranks, is_new=len(holders) < topology.pipeline)
    return Groups(
        topology=topology,
        rank=rank,
        device=device,
        mesh=mesh,
        batch=mesh["data"],
        gradient=mesh["data"],
        tensor=along_axis["tensor"],
        pipeline=along_axis["pipeline"],
        model_parallel_group=model_parallel_group,
        self_group=self_group,
        kv_replica_group=kv_replica_group,
        stages={holders: group for holders, group in made_of.items() if here.pipeline in holders},
    )
