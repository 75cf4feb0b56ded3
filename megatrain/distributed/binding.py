"""Which of its node's GPUs and cores this rank uses. Settled once, at its start, before torch is loaded.

Cores go by the GPU that they are near (sysfs knows), and whole, with their hardware threads. Never by number: threads
are mostly numbered after all cores, so that the second half of the numbers are the cores of the first.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from megatrain.distributed.bootstrap import RankInfo, visible_gpus
from megatrain.distributed.node_list import expand

ASSIGNED_DEVICES = "MEGATRAIN_ASSIGNED_DEVICES"
"""What CUDA_VISIBLE_DEVICES was before DeepSpeed's launcher, which sets it to 0..n-1, replaced it."""
BIND_CORES = "MEGATRAIN_BIND_CORES"

Cpus = frozenset[int]
"""Hardware threads by the kernel's numbers."""


def bind(rank: RankInfo) -> None:
    """Take the GPUs that the job was given, and a share of the cores, where MEGATRAIN_BIND_CORES=1 asks for it.

    As many OpenMP threads as that share has cores, unless OMP_NUM_THREADS is set.
    """
    if (assigned := _assigned_devices(os.environ)) is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = assigned
    if os.environ.get(BIND_CORES) != "1" or not hasattr(os, "sched_setaffinity"):
        return
    allowed = frozenset(os.sched_getaffinity(0))
    cores = cores_of(allowed)
    share = share_of_cores(cores, near_each_rank(rank, allowed), rank.local_rank)
    os.sched_setaffinity(0, share)
    num_threads = min(sum(not share.isdisjoint(core) for core in cores), max(1, len(cores) // rank.local_world_size))
    os.environ.setdefault("OMP_NUM_THREADS", str(num_threads))


def _assigned_devices(env: Mapping[str, str]) -> str | None:
    """The GPUs that the job was given, where DeepSpeed's launcher has replaced them by as many from 0 up."""
    if ASSIGNED_DEVICES in env or "LOCAL_SIZE" not in env:  # DeepSpeed sets it
        return env.get(ASSIGNED_DEVICES)
    slurm = env.get("GPU_DEVICE_ORDINAL", "") if "SLURM_JOB_ID" in env else ""  # mostly set beside CUDA_VISIBLE_DEVICES
    from_0_up = ",".join(map(str, range(slurm.count(",") + 1)))
    return slurm if slurm and env.get("CUDA_VISIBLE_DEVICES") == from_0_up else None


def share_of_cores(cores: Sequence[Cpus], near: Sequence[Cpus], local_rank: int) -> Cpus:
    """What one of a node's ranks is bound to.

    ``cores``: each with its hardware threads, neighbours side by side; ``near``: where each local rank should be. Those
    that should be in the same place get equally many cores there, in the order of ranks; where there are fewer cores
    than ranks, equally many threads; where there are fewer of these too, all share all.
    """
    nearby = near[local_rank]
    peers = [rank for rank, cpus in enumerate(near) if cpus == nearby]
    there = [core & nearby for core in cores if core & nearby]
    if len(there) < len(peers):
        there = [frozenset({cpu}) for core in there for cpu in sorted(core)]
    if (num := len(there) // len(peers)) == 0:
        return nearby
    first = peers.index(local_rank) * num
    return frozenset().union(*there[first : first + num])


def near_each_rank(rank: RankInfo, allowed: Cpus, root: Path = Path("/")) -> list[Cpus]:
    """For each rank of this node the allowed threads that are near its GPU; all of them where that is not known.

    A rank that sees one GPU, while there are others, sees no one else's: what it is near to is not divided.
    """
    devices, gpus = visible_gpus(), _gpus(root)
    near = [_near(device, gpus, root) & allowed or allowed for device in devices]
    if len(near) == 1 < rank.local_world_size:
        return [near[0] if peer == rank.local_rank else frozenset() for peer in range(rank.local_world_size)]
    return (near + [allowed] * rank.local_world_size)[: rank.local_world_size]


def cores_of(allowed: Cpus, root: Path = Path("/")) -> list[Cpus]:
    """The allowed threads by core; cores of a NUMA node, and then of a socket, side by side."""
    system = root / "sys/devices/system"
    node_of = {
        cpu: int(folder.name.removeprefix("node"))
        for folder in system.glob("node/node[0-9]*")
        for cpu in _cpu_list(folder / "cpulist")
    }

    def place(core: Cpus) -> tuple[int, int, int]:
        first = min(core)
        package = _word(system / f"cpu/cpu{first}/topology/physical_package_id")
        return int(package or 0), node_of.get(first, 0), first

    siblings = {cpu: _cpu_list(system / f"cpu/cpu{cpu}/topology/thread_siblings_list") for cpu in allowed}
    return sorted({(threads & allowed) | {cpu} for cpu, threads in siblings.items()}, key=place)


def _gpus(root: Path) -> list[tuple[str, str]]:
    """Address on the PCI bus and UUID of the GPUs that this process may open, as CUDA numbers them by address.

    SLURM may hide devices from a job by its cgroup; those that are left are numbered from 0.
    """

    def found() -> Iterator[tuple[str, str]]:
        for folder in sorted((root / "proc/driver/nvidia/gpus").glob("*")):
            lines = (_word(folder / "information") or "").splitlines()
            fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
            if os.access(root / f"dev/nvidia{fields.get('Device Minor', '')}", os.R_OK | os.W_OK):
                yield folder.name.lower(), fields.get("GPU UUID", "")

    return list(found())


def _near(device: str, gpus: Sequence[tuple[str, str]], root: Path) -> Cpus:
    """The threads near a GPU, named as in CUDA_VISIBLE_DEVICES: by number, or by the beginning of its UUID."""
    if device.isdigit():
        addresses = [address for address, _ in gpus[int(device) :][:1]]
    else:
        uuid = device.removeprefix("MIG-").partition("/")[0]
        addresses = [address for address, name in gpus if name.startswith(uuid)]
    return _cpu_list(root / "sys/bus/pci/devices" / addresses[0] / "local_cpulist") if addresses else frozenset()


def _cpu_list(path: Path) -> Cpus:
    """The kernel's ``0-3,8-11``; empty where there is none."""
    text = _word(path)
    return frozenset(map(int, expand(f"[{text}]"))) if text else frozenset()


def _word(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
