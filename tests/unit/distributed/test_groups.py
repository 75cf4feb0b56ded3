"""The groups of a mesh; ranks that wait for the first one."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatrain.distributed.bootstrap import free_port
from megatrain.distributed.groups import Groups, make_groups
from megatrain.distributed.topology import Topology

RANK = """
    import sys, time
    from datetime import timedelta
    import torch, torch.distributed as dist
    from megatrain.distributed.groups import make_groups
    from megatrain.distributed.topology import Topology
    from megatrain.errors import DataError

    rank, port, timeout, long = (int(text) for text in sys.argv[1:])
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", address, timedelta(seconds=timeout), world_size=2, rank=rank)
    groups = make_groups(Topology.of(2, 1, 1), rank, torch.device("cpu"), timeout)

    def work():
        time.sleep(long)
        return rank, "planned"

    def fail():
        raise DataError("the disk is full")

    assert groups.run_on_rank0(work) == (0, "planned")
    try:
        groups.run_on_rank0(fail)
    except DataError as error:
        print(error)
"""


MESHES = [(2, 2, 2), (4, 1, 2), (4, 2, 1), (3, 2, 2), (1, 4, 2), (1, 8, 1), (2, 1, 4)]  # pipeline, data, tensor


@pytest.fixture
def fake_rank() -> Iterator[Callable[[Topology, int], Groups]]:
    """Makes the groups of one rank of many, over a process group that sends nothing."""

    def make(topology: Topology, rank: int, kv_heads: int | None = None) -> Groups:
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=topology.world_size)
        return make_groups(topology, rank, torch.device("cpu"), 60.0, kv_heads, shared_by(topology))

    yield make
    dist.destroy_process_group()


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_groups_hold_the_ranks_of_their_axes(sizes: tuple[int, int, int], fake_rank: Any) -> None:
    topology = Topology(*sizes)
    for rank in range(topology.world_size):
        groups = fake_rank(topology, rank, 2)
        assert groups.mesh.mesh_dim_names == ("pipeline", "data", "tensor")
        assert (
            ranks_of(groups.gradient.get_group()) == ranks_of(groups.batch.get_group()) == topology.group(rank, "data")
        )
        assert ranks_of(groups.tensor) == topology.group(rank, "tensor")
        assert ranks_of(groups.pipeline) == topology.group(rank, "pipeline")
        assert ranks_of(groups.model_parallel_group) == topology.group(rank, "pipeline", "tensor")
        assert ranks_of(groups.self_group) == [rank]
        stage, along_pipeline = groups.coordinate.pipeline, topology.group(rank, "pipeline")
        holders = {stages: [along_pipeline[each] for each in stages] for stages in shared_by(topology)}
        found = {stages: ranks_of(group) for stages, group in groups.stages.items()}
        assert found == {stages: ranks for stages, ranks in holders.items() if stage in stages}
        first = rank - groups.coordinate.tensor % 2
        assert ranks_of(groups.kv_replica_group) == ([first, first + 1] if topology.tensor == 4 else [rank])
        assert groups.batch_share == (groups.coordinate.data, topology.data)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_every_rank_makes_equally_many_groups(
    sizes: tuple[int, int, int], fake_rank: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch names a group that its members alone make by how many there are: else two ranks would call one by two
    names, and wait for each other."""
    new_group, calls = dist.new_group, Counter[int]()
    topology = Topology(*sizes)
    for rank in range(topology.world_size):

        def counted(*args: Any, rank: int = rank, **kwargs: Any) -> Any:
            calls[rank] += 1
            return new_group(*args, **kwargs)

        monkeypatch.setattr(dist, "new_group", counted)
        fake_rank(topology, rank, 2)
    assert len(set(calls.values())) <= 1


def shared_by(topology: Topology) -> set[tuple[int, ...]]:
    """Pipeline ranks that hold the same weights: the first and the last, and all but the first."""
    last = topology.pipeline - 1
    return {stages for stages in ((0, last), tuple(range(1, last + 1))) if len({*stages}) > 1}


def ranks_of(group: dist.ProcessGroup) -> list[int]:
    return dist.get_process_group_ranks(group)


def run_two_ranks(timeout_seconds: int, work_seconds: int) -> list[str]:
    port, code = str(free_port()), textwrap.dedent(RANK)
    arguments = [port, str(timeout_seconds), str(work_seconds)]
    command = [sys.executable, "-c", code]
    ranks = [
        subprocess.Popen([*command, str(rank), *arguments], stdout=subprocess.PIPE, text=True) for rank in range(2)
    ]
    # The last line: older gloo prints some of its own.
    return [rank.communicate(timeout=120)[0].splitlines()[-1] for rank in ranks]


def test_all_ranks_learn_what_the_first_did() -> None:
    assert run_two_ranks(timeout_seconds=60, work_seconds=0) == ["the disk is full"] * 2


@pytest.mark.slow
@pytest.mark.acceptance
def test_first_rank_work_may_exceed_the_hang_timeout() -> None:
    assert run_two_ranks(timeout_seconds=10, work_seconds=15) == ["the disk is full"] * 2
