from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatrain.distributed.binding import Cpus, bind, cores_of, near_each_rank, share_of_cores
from megatrain.distributed.bootstrap import RankInfo

ALL = frozenset(range(16))
FIRST_SOCKET, SECOND_SOCKET = {*range(4), *range(8, 12)}, {*range(4, 8), *range(12, 16)}


def local_rank(number: int, num_ranks: int) -> RankInfo:
    return RankInfo(number, num_ranks, number, num_ranks, "srun", "node0", 29500)


@pytest.fixture(autouse=True)
def no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "OMP_NUM_THREADS", "MEGATRAIN_BIND_CORES", "LOCAL_SIZE"):
        monkeypatch.delenv(key, raising=False)


@pytest.fixture
def node(tmp_path: Path) -> Path:
    """A node of two sockets with four cores of two threads, numbered after the cores; GPUs 0 and 1 are on the second
    socket, 2 and 3 on the first. The driver numbers them backwards.
    """
    system = tmp_path / "sys/devices/system"
    for cpu in ALL:
        topology = system / f"cpu/cpu{cpu}/topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{cpu % 8},{cpu % 8 + 8}\n")
        (topology / "physical_package_id").write_text(f"{cpu % 8 // 4}\n")
    for number, cpus in enumerate(("0-3,8-11", "4-7,12-15")):
        (system / f"node/node{number}").mkdir(parents=True)
        (system / f"node/node{number}/cpulist").write_text(f"{cpus}\n")
    for gpu, address in enumerate(("0000:1a:00.0", "0000:3b:00.0", "0000:8a:00.0", "0000:bb:00.0")):
        (tmp_path / "proc/driver/nvidia/gpus" / address).mkdir(parents=True)
        told = f"Model: \t NVIDIA H100\nGPU UUID: \t GPU-{gpu}aaa\nDevice Minor: \t {3 - gpu}\n"
        (tmp_path / "proc/driver/nvidia/gpus" / address / "information").write_text(told)
        (tmp_path / "sys/bus/pci/devices" / address).mkdir(parents=True)
        (tmp_path / "sys/bus/pci/devices" / address / "local_cpulist").write_text(
            "4-7,12-15\n" if gpu < 2 else "0-3,8-11\n"
        )
    (tmp_path / "dev").mkdir()
    for minor in range(4):
        (tmp_path / f"dev/nvidia{minor}").touch()
    return tmp_path


def shares(node: Path, num_ranks: int, allowed: Cpus = ALL) -> list[set[int]]:
    cores = cores_of(allowed, node)
    ranks = [local_rank(number, num_ranks) for number in range(num_ranks)]
    return [set(share_of_cores(cores, near_each_rank(rank, allowed, node), rank.local_rank)) for rank in ranks]


def test_gpu_ranks_get_whole_cores_near_their_gpu(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    assert shares(node, 4) == [{4, 5, 12, 13}, {6, 7, 14, 15}, {0, 1, 8, 9}, {2, 3, 10, 11}]


@pytest.mark.parametrize("visible", ["1,3", "GPU-1aaa,GPU-3", "MIG-GPU-1aaa/1/0,GPU-3aaa"])
def test_a_job_with_some_gpus_is_near_those(visible: str, node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert shares(node, 2) == [SECOND_SOCKET, FIRST_SOCKET]


def test_gpus_closed_to_the_job_are_not_numbered(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where SLURM constrains devices by cgroup: there it numbers those that are left."""
    for minor in (3, 2):  # GPUs 0 and 1
        (node / f"dev/nvidia{minor}").unlink()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert shares(node, 2) == [{0, 1, 8, 9}, {2, 3, 10, 11}]


def test_a_rank_binds_near_its_only_gpu(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert shares(node, 2) == [FIRST_SOCKET, FIRST_SOCKET]


def test_ranks_stay_within_the_cores_they_were_given(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    assert shares(node, 4, frozenset({2, 3, 4, 5, 12})) == [{4, 12}, {5}, {2}, {3}]
    assert shares(node, 4, frozenset({0, 1})) == [{0, 1}] * 4


def test_without_gpus_no_two_ranks_share_a_core(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert shares(node, 8) == [{core, core + 8} for core in range(8)]
    assert shares(node, 3) == [{0, 1, 8, 9}, {2, 3, 10, 11}, {4, 5, 12, 13}]
    assert [len(share) for share in shares(node, 16)] == [1] * 16
    assert shares(node, 17) == [set(ALL)] * 17


def test_this_machine_is_shared_out_with_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = os.sched_getaffinity(0)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    taken: set[int] = set()
    try:
        for number in range(len(allowed)):
            bind(local_rank(number, len(allowed)))
            assert os.sched_getaffinity(0) == allowed  # nobody asked
            monkeypatch.setenv("MEGATRAIN_BIND_CORES", "1")
            bind(local_rank(number, len(allowed)))
            taken |= os.sched_getaffinity(0)
            assert os.environ.pop("OMP_NUM_THREADS") == "1"
            monkeypatch.delenv("MEGATRAIN_BIND_CORES")
            os.sched_setaffinity(0, allowed)
    finally:
        os.sched_setaffinity(0, allowed)
    assert taken == allowed


def test_threads_that_the_user_set_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = os.sched_getaffinity(0)
    monkeypatch.setenv("MEGATRAIN_BIND_CORES", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    try:
        bind(local_rank(0, 1))
    finally:
        os.sched_setaffinity(0, allowed)
    assert os.environ["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize(
    ("environment", "devices"),
    [
        ({"MEGATRAIN_ASSIGNED_DEVICES": "4,6"}, "4,6"),
        ({"MEGATRAIN_ASSIGNED_DEVICES": ""}, ""),  # none, not all
        ({"GPU_DEVICE_ORDINAL": "4,6", "SLURM_JOB_ID": "7", "LOCAL_SIZE": "2"}, "4,6"),
        ({"GPU_DEVICE_ORDINAL": "4", "SLURM_JOB_ID": "7", "LOCAL_SIZE": "2"}, "0,1"),
        ({"GPU_DEVICE_ORDINAL": "4,6", "SLURM_JOB_ID": "7"}, "0,1"),  # of another launcher, which replaces nothing
        ({"GPU_DEVICE_ORDINAL": "4,6", "LOCAL_SIZE": "2"}, "0,1"),
    ],
)
def test_devices_that_deepspeed_replaced_are_taken_back(
    environment: dict[str, str], devices: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"CUDA_VISIBLE_DEVICES": "0,1", **environment}.items():
        monkeypatch.setenv(name, value)
    bind(local_rank(0, 2))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == devices
