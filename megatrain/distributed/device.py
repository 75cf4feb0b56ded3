"""What a rank computes on, and whether all ranks can: asked in one place, so that no two parts or ranks disagree."""

from __future__ import annotations

import socket
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import psutil
import torch

from megatrain.distributed.bootstrap import export_device, gpu_request, wants_cpu
from megatrain.distributed.naming import name_ranks
from megatrain.errors import EXIT_RANK, EXIT_USAGE

ON_CPUS = "To train on CPUs, export DS_ACCELERATOR=cpu."


class DeviceAssignment(NamedTuple):
    """What a rank computes on.

    ``gpu``: the unique id of its GPU; "" on a CPU, for the reason ``why``. ``requested_by``: what says that it was
    started for GPUs, if anything.
    """

    host: str
    gpu: str
    why: str
    requested_by: str


class Conflict(NamedTuple):
    """Why ranks cannot train together, the exit code that this is worth, and the hosts to leave out for it."""

    text: str
    exit_code: int
    hosts: tuple[str, ...]


def has_gpu() -> bool:
    """Whether this process computes on a GPU: there is one that torch can use, and nobody asked for CPUs."""
    return torch.cuda.is_available() and not wants_cpu()


def local_device(local_rank: int) -> torch.device:
    """The device of a rank: its GPU by its rank on the node, or the CPU where there is none.

    Where tasks see GPUs of their own alone, each counts them from 0.
    """
    if not has_gpu():
        return torch.device("cpu")
    index = local_rank % torch.cuda.device_count()
    export_device(index)
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def memory_bytes(local_world_size: int) -> float:
    if has_gpu():
        return float(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    return float(psutil.virtual_memory().total / local_world_size)


def assigned_device() -> DeviceAssignment:
    host, requested_by = socket.gethostname(), gpu_request() or ""
    if not has_gpu():
        return DeviceAssignment(host, "", _why_no_gpu(), requested_by)
    gpu = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    return DeviceAssignment(host, gpu, "", requested_by)


def find_conflict(devices: Sequence[DeviceAssignment]) -> Conflict | None:
    """Why ranks with these devices, in their order, cannot train together; None where all is well."""
    without = [rank for rank, device in enumerate(devices) if not device.gpu]
    requested_by = next((device.requested_by for device in devices if device.requested_by), None)
    if without and (requested_by or len(without) < len(devices)):
        return _no_gpu(devices, without, requested_by)
    holders: dict[str, list[int]] = defaultdict(list)
    for rank, device in enumerate(devices):
        holders[device.gpu].append(rank)
    shared = [ranks for gpu, ranks in holders.items() if gpu and len(ranks) > 1]
    return _shared_gpu(devices, shared) if shared else None


def _no_gpu(devices: Sequence[DeviceAssignment], without: Sequence[int], requested_by: str | None) -> Conflict:
    reasons: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for rank in without:
        reasons[devices[rank].why].append((rank, devices[rank].host))
    named = "; ".join(f"{name_ranks(ranks)}: {why}" for why, ranks in reasons.items())
    has_gpus = f"{len(devices) - len(without)} ranks have a GPU"
    for_gpus = f"The job was started for GPUs ({requested_by})" if requested_by else has_gpus
    text = (
        f"{for_gpus}, but {len(without)} of {len(devices)} ranks have none. {named}. Install a torch for the driver "
        f"that is there (make setup TORCH=cuda), or leave the node out. {ON_CPUS}"
    )
    if len(without) == len(devices):
        return Conflict(text, EXIT_USAGE, ())
    return Conflict(text, EXIT_RANK, tuple(dict.fromkeys(devices[rank].host for rank in without)))


def _shared_gpu(devices: Sequence[DeviceAssignment], shared: Sequence[Sequence[int]]) -> Conflict:
    named = "; ".join(name_ranks((rank, devices[rank].host) for rank in ranks) for ranks in shared)
    text = (
        f"Ranks share a GPU, which NCCL cannot do: {named}. Start as many ranks on a node as it has GPUs, and let each "
        "see all of them, or one of its own; LOCAL_RANK says which is whose."
    )
    return Conflict(text, EXIT_USAGE, tuple(dict.fromkeys(devices[ranks[0]].host for ranks in shared)))


def _why_no_gpu() -> str:
    if wants_cpu():
        return "DS_ACCELERATOR=cpu"
    if not torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
        return f"torch {torch.__version__} is built without CUDA"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        return str(error).splitlines()[0]
    return f"torch {torch.__version__} finds no GPU"
