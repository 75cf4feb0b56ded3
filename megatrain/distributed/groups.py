"""The process groups of a run: made once from the topology, handed to whoever communicates."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatrain.distributed.topology import Axis, Coordinate, Topology

T = TypeVar("T")

POLL_SECONDS = 0.2
"""How often the ranks that wait for the first one hear from it; when it is done, at once."""


@dataclass(frozen=True)
class Groups:
    """This rank's place, and its group along each axis (a group of one has a process group too)."""

    topology: Topology
    rank: int
    device: torch.device
    data: dist.ProcessGroup
    tensor: dist.ProcessGroup
    pipeline: dist.ProcessGroup
    model: dist.ProcessGroup  # along pipeline and tensor: the ranks that together hold one copy of the model
    ends: dist.ProcessGroup  # on the first and last stage: the two of them; elsewhere this rank by itself
    alone: dist.ProcessGroup  # this rank by itself

    @property
    def coordinate(self) -> Coordinate:
        """This rank's place in the mesh."""
        return self.topology.coordinate(self.rank)

    def sum(self, values: list[float]) -> list[float]:
        """Each value summed over all ranks, in double precision. Every rank must call it at the same point."""
        totals = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(totals)
        summed: list[float] = totals.tolist()
        return summed

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in rank order, for what happens once a run. Every rank must call it at the same point."""
        values: list[Any] = [None] * self.topology.world_size
        dist.all_gather_object(values, value)
        return values

    def on_first_rank(self, work: Callable[[], T]) -> T:
        """What ``work`` gives on rank 0, on every rank; also the exception it raises. Collective.

        However long it takes: the ranks stay in touch, so that no timeout takes the wait for a hang.
        """
        outcome: tuple[Any, Exception | None] = (None, None)
        with ThreadPoolExecutor(1, thread_name_prefix="first-rank") as pool:
            future = pool.submit(work) if self.rank == 0 else None
            while self.sum([float(future is not None and not wait([future], POLL_SECONDS).done)])[0]:
                pass
            if future is not None:
                try:
                    outcome = future.result(), None
                except Exception as error:  # noqa: BLE001 - it is raised on all ranks
                    outcome = None, error
        result, problem = self.gather(outcome)[0]
        if problem is not None:
            raise problem
        first: T = result
        return first

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.sum([0.0])


def release(groups: Iterable[object]) -> None:
    """Free process groups (each has its own threads and connections); what is none, or is the whole world, is left."""
    for group in {id(group): group for group in groups}.values():
        if isinstance(group, dist.ProcessGroup) and group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def local_device(local_rank: int) -> torch.device:
    """The device of a rank: its GPU by its rank on the node, or the CPU where there is none."""
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


def make_groups(topology: Topology, rank: int, device: torch.device, timeout_seconds: float) -> Groups:
    """Make this rank's groups; collective over all ranks. The default process group must exist.

    Each group is made by its members alone, so that the cost does not grow with the number of groups. Torch names such
    a group by its ranks and by how many groups there are: every rank must make equally many, and none may be freed.
    """
    timeout = timedelta(seconds=timeout_seconds)

    def along(*axes: Axis) -> dist.ProcessGroup:
        ranks = topology.group(rank, *axes)
        group: dist.ProcessGroup = dist.new_group(ranks, timeout=timeout, use_local_synchronization=True)
        return group

    here = topology.coordinate(rank)
    stages = (0, topology.pipeline - 1) if here.pipeline in (0, topology.pipeline - 1) else (here.pipeline,)
    ends = sorted({topology.rank(Coordinate(stage, here.data, here.tensor)) for stage in stages})
    return Groups(
        topology=topology,
        rank=rank,
        device=device,
        data=along("data"),
        tensor=along("tensor"),
        pipeline=along("pipeline"),
        model=along("pipeline", "tensor"),
        ends=dist.new_group(ends, timeout=timeout, use_local_synchronization=True),
        alone=along(),
    )
