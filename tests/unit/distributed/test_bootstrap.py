from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from data_tools.ranks import Ranks, find_ranks
from megatrain.distributed.bootstrap import (
    child_environment,
    free_port,
    read_rank,
    supervisor_pid,
    visible_gpus,
)
from megatrain.errors import ConfigError

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
TORCHRUN |= {"MASTER_ADDR": "node0", "MASTER_PORT": "29400"}
DEEPSPEED = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29501",
}
OPENMPI = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"}
OPENMPI |= {"OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "MASTER_ADDR": "node0"}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
PALS = {"PMI_RANK": "5", "PMI_SIZE": "8", "PMI_LOCAL_RANK": "1", "PALS_LOCAL_RANKID": "1", "PMI_LOCAL_SIZE": "4"}
PALS |= {"MASTER_ADDR": "node0"}
# The words of SLURM 22.05, as `env` shows them in a task.
JOB = {"SLURM_JOB_ID": "123456", "SLURM_NTASKS": "16", "SLURM_JOB_NODELIST": "gpu[001-004]", "SLURM_PROCID": "0"}
JOB |= {"SLURM_NODELIST": "gpu[001-004]", "SLURM_TASKS_PER_NODE": "4(x4)", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
SRUN = {**JOB, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "7", "SLURM_PROCID": "5", "SLURM_LOCALID": "1"}
SRUN |= {"SLURM_NTASKS": "7", "SLURM_STEP_NODELIST": "gpu[003-004]", "SLURM_STEP_TASKS_PER_NODE": "4,3"}
SRUN |= {"SLURM_NODEID": "1"}
PMI2 = {**SRUN, "PMI_RANK": "5", "PMI_SIZE": "7"}
BY_HAND = {**SRUN, "RANK": "5", "WORLD_SIZE": "7", "LOCAL_RANK": "0"}
INTERACTIVE = {**JOB, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NODELIST": "gpu001"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"MASTER_PORT": "29600"}, (0, 1, 0, 1, "127.0.0.1", 29600)),
        (TORCHRUN, (5, 8, 1, 4, "node0", 29400)),
        (DEEPSPEED, (1, 2, 1, 2, "127.0.0.1", 29501)),
        ({**DEEPSPEED, "RANK": "4", "WORLD_SIZE": "6"}, (4, 6, 1, 2, "127.0.0.1", 29501)),
        (OPENMPI, (3, 4, 1, 2, "node0", 29500)),
        (MPICH, (1, 2, 1, 2, "127.0.0.1", 29500)),
        (PALS, (5, 8, 1, 4, "node0", 29500)),
        ({**OPENMPI, **JOB, "MASTER_ADDR": ""}, (3, 4, 1, 2, "gpu001", 23456)),
        (SRUN, (5, 7, 1, 3, "gpu003", 23456)),
        (PMI2, (5, 7, 1, 3, "gpu003", 23456)),
        (BY_HAND, (5, 7, 1, 3, "gpu003", 23456)),
        ({**SRUN, "SLURM_NODEID": "0", "SLURM_LOCALID": "3"}, (5, 7, 3, 4, "gpu003", 23456)),
        ({**SRUN, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}, (5, 7, 1, 3, "10.0.0.1", 1234)),
        ({**SRUN, "SLURM_STEP_NODELIST": "a1"}, (5, 7, 1, 3, "a1", 23456)),
        ({**SRUN, "SLURM_STEP_NODELIST": "rack[7,9-12]-ib"}, (5, 7, 1, 3, "rack7-ib", 23456)),
    ],
    ids=[
        "alone",
        "torchrun",
        "deepspeed",
        "deepspeed on several nodes",
        "openmpi",
        "mpich",
        "pals",
        "openmpi in an allocation",
        "srun",
        "srun with pmi2",
        "srun with a script's own exports",
        "srun on uneven nodes",
        "srun with an address",
        "one node",
        "a suffix",
    ],
)
def test_each_launchers_variables_give_the_rank(
    environment: dict[str, str], expected: tuple[int, int, int, int, str, int]
) -> None:
    info = read_rank(environment)
    found = (info.rank, info.world_size, info.local_rank, info.local_world_size, info.master_addr, info.master_port)
    assert found == expected


def test_ranks_that_are_alone_share_no_port() -> None:
    with socket.create_server(("127.0.0.1", read_rank({}).master_port)) as other:
        assert read_rank({}).master_port != other.getsockname()[1]


def test_what_deepspeed_sets_inside_of_srun_wins() -> None:
    assert read_rank({**SRUN, **DEEPSPEED}).rank == 1


def test_mpirun_ranks_in_a_step_keep_mpi_variables() -> None:
    """MPICH starts its ranks through one task of SLURM a node, whose variables they inherit."""
    hydra = {**JOB, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "gpu[001-004]"}
    info = read_rank({**hydra, "PMI_RANK": "3", "PMI_SIZE": "16", "MPI_LOCALRANKID": "3", "MPI_LOCALNRANKS": "4"})
    assert (info.local_rank, info.local_world_size, info.master_addr) == (3, 4, "gpu001")


@pytest.mark.parametrize(
    "environment", [JOB, {**JOB, "SLURM_STEP_ID": "0"}, INTERACTIVE], ids=["batch", "ssh", "shell"]
)
def test_outside_of_a_step_a_process_is_alone(environment: dict[str, str]) -> None:
    info = read_rank(environment)
    assert (info.rank, info.world_size, info.local_rank, info.local_world_size) == (0, 1, 0, 1)
    assert find_ranks(environment) == Ranks(0, 1)


def test_a_hostfile_says_where_rank_0_is(tmp_path: Path) -> None:
    """Under --distribution=arbitrary the step's list is sorted all the same."""
    hostfile = tmp_path / "hosts"
    hostfile.write_text("# rank 0 first\ngpu004*3 # here\ngpu003\n")
    arbitrary = {**SRUN, "SLURM_DISTRIBUTION": "arbitrary"}
    assert read_rank({**arbitrary, "SLURM_HOSTFILE": str(hostfile)}).master_addr == "gpu004"
    hostfile.write_text("gpu001\n")  # since rewritten, for another step
    for told in ({}, {"SLURM_HOSTFILE": str(hostfile)}, {"SLURM_HOSTFILE": "/no/such/file"}):
        with pytest.raises(ConfigError, match="export MASTER_ADDR"):
            read_rank({**arbitrary, **told})


def test_a_step_without_node_list_needs_an_address() -> None:
    with pytest.raises(ConfigError, match="export MASTER_ADDR"):
        read_rank({**SRUN, "SLURM_STEP_NODELIST": ""})


@pytest.mark.parametrize(
    "environment",
    [{"PMI_RANK": "1", "PMI_SIZE": "2"}, {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node0"}],
)
def test_several_ranks_without_a_local_rank_are_refused(environment: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="export LOCAL_RANK"):
        read_rank(environment)
    assert read_rank({**environment, "LOCAL_RANK": "0"}).local_rank == 0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"RANK": "8"}, "RANK=8 is outside of WORLD_SIZE=8"),
        ({"RANK": "-1"}, "RANK=-1"),
        ({"RANK": "one"}, "RANK is 'one'"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is ''"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK is 'x'"),
        ({"LOCAL_RANK": "4"}, "rank 4 of 4 on its node"),
        ({"LOCAL_RANK": "-1"}, "rank -1 of 4 on its node"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT is 0"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT is 99999"),
    ],
)
def test_broken_variables_are_named(change: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read_rank({**TORCHRUN, **change})
    assert named in str(refused.value)


@pytest.mark.parametrize("change", [{"SLURM_PROCID": "7"}, {"SLURM_LOCALID": "3"}])
def test_a_task_beyond_its_step_is_refused(change: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="contradict each other"):
        read_rank({**SRUN, **change})


@pytest.mark.parametrize("rank", ["RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK"])
def test_a_rank_of_no_number_is_not_alone(rank: str) -> None:
    with pytest.raises(ConfigError, match=f"{rank}=3 is set, but .*SIZE is not"):
        read_rank({rank: "3"})
    assert read_rank({**SRUN, rank: "3"}).rank == 5


def test_several_nodes_without_an_address_are_refused() -> None:
    environment = {key: value for key, value in OPENMPI.items() if key != "MASTER_ADDR"}
    with pytest.raises(ConfigError, match="MASTER_ADDR is not set"):
        read_rank(environment)


def test_cpu_ranks_share_threads_and_know_their_supervisor(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("OMP_NUM_THREADS", "MASTER_PORT", "DS_ACCELERATOR"):
        monkeypatch.delenv(key, raising=False)
    cores = len(os.sched_getaffinity(0))
    environment = child_environment(cores, has_gpu=False)
    assert environment["OMP_NUM_THREADS"] == child_environment(cores, has_gpu=True)["OMP_NUM_THREADS"] == "1"
    assert environment["DS_ACCELERATOR"] == "cpu"
    assert 1024 <= int(environment["MASTER_PORT"]) < 65536
    assert supervisor_pid(environment) == os.getpid()
    assert supervisor_pid({}) is None


def test_a_supervisor_on_another_host_is_ignored() -> None:
    """The batch script's variables reach all nodes: the same process id would be somebody else's there."""
    assert supervisor_pid({"MEGATRAIN_SUPERVISOR": f"elsewhere:{os.getpid()}"}) is None


def test_what_the_user_has_set_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("MASTER_PORT", "4000")
    environment = child_environment(2, has_gpu=False)
    assert (environment["OMP_NUM_THREADS"], environment["MASTER_PORT"]) == ("7", "4000")


@pytest.mark.parametrize(("visible", "count"), [("", 0), ("0", 1), ("0,1,3", 3), ("-1", 0), ("GPU-5f,GPU-6a", 2)])
def test_visible_gpus_are_counted(visible: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert len(visible_gpus()) == count


def test_free_ports_can_be_bound() -> None:
    assert free_port() > 1023
