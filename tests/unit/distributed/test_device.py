"""Which GPU a rank takes, and when ranks refuse to train together. What CUDA would say is made up."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatrain.distributed import bootstrap
from megatrain.distributed.bootstrap import child_environment, gpu_request, visible_gpus
from megatrain.distributed.device import DeviceAssignment, assigned_device, find_conflict, local_device
from megatrain.errors import EXIT_RANK, EXIT_USAGE

WITH = DeviceAssignment("node1", "gpu-a", "", "SLURM_GPUS_ON_NODE=2")
WITHOUT = DeviceAssignment("node2", "", "torch 2.13.0+cpu is built without CUDA", "")


@pytest.mark.parametrize(
    ("visible", "local_rank", "index"), [(8, 3, 3), (1, 3, 0), (2, 3, 1)], ids=["all", "one a task", "two a task"]
)
def test_a_rank_takes_its_own_visible_gpu(
    visible: int, local_rank: int, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: taken[-1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: SimpleNamespace(uuid=f"gpu-{number}"))
    assert local_device(local_rank) == torch.device("cuda", index)
    assert (taken, assigned_device().gpu) == ([index], f"gpu-{index}")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert local_device(local_rank) == torch.device("cpu")


@pytest.mark.parametrize(
    "variables",
    [
        {"MEGATRAIN_DEVICE": "cuda"},
        {"SLURM_GPUS": "h100:8"},
        {"SLURM_GPUS": "a100:2,v100:0"},
        {"SLURM_GPUS_PER_TASK": "1"},
        {"SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": ""},
        {"SLURM_JOB_GPUS": "0"},
        {"CUDA_VISIBLE_DEVICES": "0,1"},
        {"ROCR_VISIBLE_DEVICES": "0"},
    ],
)
def test_a_job_says_that_it_is_for_gpus(variables: dict[str, str]) -> None:
    key = next(iter(variables))
    assert gpu_request(variables) == f"{key}={variables[key]}"
    assert gpu_request({**variables, "DS_ACCELERATOR": "cpu"}) is None


@pytest.mark.parametrize(
    "variables",
    [
        {"CUDA_VISIBLE_DEVICES": ""},
        {"CUDA_VISIBLE_DEVICES": "-1"},
        {"CUDA_VISIBLE_DEVICES": "NoDevFiles", "SLURM_GPUS": "0"},
        {"CUDA_VISIBLE_DEVICES": "", "SLURM_GPUS_PER_NODE": "h100:0"},
        {"CUDA_VISIBLE_DEVICES": "", "LOCAL_SIZE": "2"},
        {"CUDA_VISIBLE_DEVICES": "-1,0", "SLURM_GPUS_PER_NODE": "", "SLURM_JOB_GPUS": "(null)"},
    ],
)
def test_a_job_without_gpus_asks_for_none(variables: dict[str, str]) -> None:
    assert gpu_request(variables) is None
    assert visible_gpus(variables) == []


def test_what_deepspeed_sets_is_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its launcher numbers GPUs where there are none, too; `megatrain train` says what it has seen."""
    monkeypatch.setattr(bootstrap, "_driver_gpus", list)
    numbered = {"CUDA_VISIBLE_DEVICES": "0,1", "LOCAL_SIZE": "2"}
    assert gpu_request(numbered) is None
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    assert gpu_request({**child_environment(2, has_gpu=True), **numbered}) == "MEGATRAIN_DEVICE=cuda"
    monkeypatch.setattr(bootstrap, "_driver_gpus", lambda: ["0", "1"])
    assert gpu_request(numbered) == "/dev/nvidia0"


def test_gpu_jobs_refuse_to_train_on_cpus() -> None:
    conflict = find_conflict([WITHOUT._replace(requested_by="CUDA_VISIBLE_DEVICES=0")] * 2)
    assert conflict is not None
    assert conflict.exit_code == EXIT_USAGE
    assert "rank 0 on node2, rank 1 on node2: torch 2.13.0+cpu is built without CUDA" in conflict.text
    assert find_conflict([WITHOUT] * 2) is None


@pytest.mark.parametrize("asked", ["", "SLURM_GPUS_ON_NODE=2"])
def test_one_node_without_gpus_is_named(asked: str) -> None:
    """Without this its ranks would take gloo, the others NCCL, and all would wait for each other."""
    broken = DeviceAssignment("node7", "", "Found no NVIDIA driver on your system.", asked)
    conflict = find_conflict([WITH._replace(gpu=f"gpu-{rank}", requested_by=asked) for rank in range(6)] + [broken] * 2)
    assert conflict is not None
    assert (conflict.hosts, conflict.exit_code) == (("node7",), EXIT_RANK)
    assert "2 of 8 ranks have none. rank 6 on node7, rank 7 on node7: Found no NVIDIA driver" in conflict.text


def test_ranks_on_one_gpu_are_named() -> None:
    conflict = find_conflict([WITH, WITH, WITH._replace(gpu="gpu-b")])
    assert conflict is not None
    assert "share a GPU, which NCCL cannot do: rank 0 on node1, rank 1 on node1." in conflict.text
