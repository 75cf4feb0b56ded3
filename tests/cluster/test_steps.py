"""What ranks find out about themselves in real steps of SLURM: with PMI, on some nodes, uneven ones, in any order."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.conftest import ROOT
from tests.cluster.lab import Lab

pytestmark = [pytest.mark.slow, pytest.mark.cluster]
TELL = """
import json, socket
from data_tools.ranks import find_ranks
from megatrain.distributed.bootstrap import read_rank
from megatrain.errors import ConfigError
try:
    rank = read_rank()
except ConfigError as error:
    print(json.dumps([str(error)]))
else:
    told = [rank.rank, rank.world_size, socket.gethostname(), rank.local_rank, rank.local_world_size, rank.master_addr]
    print(json.dumps(told))
    found = find_ranks()
    assert (found.rank, found.size) == (rank.rank, rank.world_size), found
"""
ALLOCATION = ("salloc", "--quiet", "--nodes=3", "--ntasks=5", "--ntasks-per-node=2", "--nodelist=node[1-3]")


def told(lab: Lab, step: Sequence[str], **environment: str) -> list[list[Any]]:
    """What each process of a step within the allocation says, in the order of ranks."""
    command = [*ALLOCATION, *step, sys.executable, "-c", TELL]
    given = {**lab.environment, **environment}
    ended = subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, f"{shlex.join(step)}: {ended.stderr}"
    return sorted(json.loads(line) for line in ended.stdout.splitlines())


@pytest.mark.parametrize("mpi", ["none", "pmi2"])
def test_ranks_of_a_step_know_their_place(mpi: str, lab: Lab) -> None:
    """On node2 and node3 alone, with two tasks on the one and one on the other."""
    found = told(lab, ["srun", f"--mpi={mpi}", "--nodelist=node[2-3]", "--nodes=2", "--ntasks=3"])
    assert found == [
        [0, 3, "node2", 0, 2, "node2"],
        [1, 3, "node2", 1, 2, "node2"],
        [2, 3, "node3", 0, 1, "node2"],
    ]


def test_a_shell_of_an_allocation_is_one_process(lab: Lab) -> None:
    ((rank, world_size, _, local_rank, local_size, master),) = told(lab, [])
    assert (rank, world_size, local_rank, local_size, master) == (0, 1, 0, 1, "127.0.0.1")


def test_rank_0_is_found_under_any_node_order(lab: Lab, tmp_path: Path) -> None:
    """By the hostfile that asks for it; else the address has to be given."""
    (tmp_path / "hosts").write_text("node3\nnode1\nnode3\n")
    step = ["srun", "--ntasks=3", "--distribution=arbitrary"]
    found = told(lab, step, SLURM_HOSTFILE=str(tmp_path / "hosts"))
    assert [(host, local_rank, size, master) for _, _, host, local_rank, size, master in found] == [
        ("node3", 0, 2, "node3"),
        ("node1", 0, 1, "node3"),
        ("node3", 1, 2, "node3"),
    ]
    refused = told(lab, ["srun", "--ntasks=2", "--nodes=2", "--distribution=arbitrary", "--nodelist=node3,node1"])
    assert all("export MASTER_ADDR" in told for (told,) in refused)
