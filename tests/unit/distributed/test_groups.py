"""Ranks that wait for the first one."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from megatrain.distributed.bootstrap import free_port

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
def test_first_rank_work_may_exceed_the_hang_timeout() -> None:
    assert run_two_ranks(timeout_seconds=10, work_seconds=15) == ["the disk is full"] * 2
