"""Which rank a process is, as each launcher says it."""

from __future__ import annotations

import os

import pytest

from data_tools.ranks import Ranks, find_ranks
from megatrain.errors import ConfigError

ARRAY = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_COUNT": "8", "SLURM_PROCID": "0"}
STEP = {"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_ID": "0"}


@pytest.mark.parametrize(
    ("environment", "rank", "size"),
    [
        ({}, 0, 1),
        (ARRAY, 4, 8),
        ({**ARRAY, "SLURM_ARRAY_TASK_STEP": "2"}, 2, 8),
        (STEP, 2, 4),
        ({**ARRAY, **STEP}, 18, 32),
        ({**STEP, "SLURM_STEP_ID": "4294967291"}, 0, 1),  # a batch script, not a task
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "PMIX_RANK": "0"}, 0, 1),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}, 0, 1),
    ],
)
def test_the_rank_is_found_without_mpi(environment: dict[str, str], rank: int, size: int) -> None:
    assert find_ranks(environment) == Ranks(rank, size)


def test_a_broken_variable_is_named() -> None:
    with pytest.raises(ConfigError, match="SLURM_STEP_NUM_TASKS is 'many'"):
        find_ranks({**STEP, "SLURM_STEP_NUM_TASKS": "many"})


def test_ranks_on_one_machine_share_its_cores() -> None:
    cores = os.cpu_count() or 1
    assert Ranks(num_local=cores).num_cores() == 1
    assert Ranks(num_local=10 * cores).num_cores() == 1
    assert Ranks().num_cores() <= cores
