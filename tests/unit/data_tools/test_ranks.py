"""Which rank a process is, as each launcher says it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pytest

from data_tools.locks import WorkLocks
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


HOLDER = """
import sys
from pathlib import Path
from data_tools.locks import WorkLocks
locks = WorkLocks(Path(sys.argv[1]))
locks.join()
with locks.try_lock("a") as acquired, locks.try_lock("s", 2) as is_free:
    print(acquired, is_free, flush=True)
    sys.stdin.read()
"""


def test_a_lock_has_one_holder_until_its_death(tmp_path: Path) -> None:
    path = tmp_path / "claims"
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline().split() == ["True", "True"]
        locks = WorkLocks(path)
        assert locks.join()
        with locks.try_lock("a") as acquired, locks.try_lock("b") as other:
            assert (acquired, other) == (False, True)
        with locks.try_lock("s", 1) as first, locks.try_lock("s", 2) as second:
            assert (first, second) == (False, True)
        assert not locks.is_only_member()
        holder.kill()
        holder.wait()
        with locks.try_lock("a") as acquired:
            assert acquired
        assert locks.is_only_member()
        assert locks.leave()
        locks.close()


def test_a_folder_that_was_removed_cannot_be_joined(tmp_path: Path) -> None:
    locks = WorkLocks(tmp_path / "claims")
    assert locks.join()
    (tmp_path / "claims-000").unlink()
    assert not locks.join()
    assert locks.join()


def test_thousands_of_locks_are_spread_over_many_files(tmp_path: Path) -> None:
    locks = WorkLocks(tmp_path / "claims")
    with ExitStack() as stack:
        assert all(stack.enter_context(locks.try_lock(f"part {number}")) for number in range(1280))
        lines = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
        held = Counter(line[5] for line in lines if line[1] == "POSIX" and line[4] == str(os.getpid()))
    locks.close()
    inodes = {path.stat().st_ino for path in tmp_path.iterdir()}
    counts = [count for place, count in held.items() if int(place.rpartition(":")[2]) in inodes]
    assert sum(counts) == 1280
    assert max(counts) < 40
