"""Which rank am I? The only reader of the environment; imports no torch, so that it can be asked before anything costs.

Each launcher says it in its own words. They are read in the order of who wraps whom: `deepspeed` and `torchrun` set
RANK; `mpirun` (Open MPI, or PMI's for MPICH) and `srun` set theirs for each task they start.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatrain.errors import ConfigError

DEFAULT_MASTER_PORT = 29500
_SUPERVISOR = "MEGATRAIN_SUPERVISOR"
_LAUNCHED_AT = "MEGATRAIN_LAUNCHED_AT"
_FIRST_JOB_PORT, _NUM_JOB_PORTS = 20000, 10000  # below the ports that Linux gives out by itself


@dataclass(frozen=True)
class RankInfo:
    """This process among its peers, as its launcher tells it."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    launcher: str
    master_addr: str
    master_port: int


_DIALECTS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "deepspeed or torchrun"),
    (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        "mpirun",
    ),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", "mpirun"),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE", "srun"),
)


def read_rank(environ: Mapping[str, str] | None = None) -> RankInfo:
    """Find this process's rank under deepspeed, torchrun, mpirun or srun; alone, it is rank 0 of 1.

    Raises ConfigError where a launcher's variables contradict each other.
    """
    env = os.environ if environ is None else environ
    for rank_key, size_key, local_key, local_size_key, launcher in _DIALECTS:
        if rank_key not in env or size_key not in env:
            continue
        if launcher == "srun" and _is_batch_shell(env):
            continue
        rank, world_size = _whole(env, rank_key), _whole(env, size_key)
        local_rank = _whole(env, local_key) if local_key in env else 0
        local_world_size = _local_size(env, local_size_key, world_size)
        if not 0 <= rank < world_size:
            raise ConfigError(
                f"{rank_key}={rank} is outside of {size_key}={world_size}: the launcher's variables are broken."
            )
        if (
            world_size > 1
            and "MASTER_ADDR" not in env
            and "SLURM_NODELIST" not in env
            and local_world_size < world_size
        ):
            raise ConfigError(
                f"{world_size} ranks on several nodes ({launcher}), but MASTER_ADDR is not set: export it as the "
                "name of the first node, and MASTER_PORT if that port may be in use."
            )
        return RankInfo(rank, world_size, local_rank, local_world_size, launcher, _master_addr(env), _master_port(env))
    return RankInfo(0, 1, 0, 1, "none", _master_addr(env), _master_port(env))


def export_rank(info: RankInfo) -> None:
    """Say it again in the words that torch.distributed and DeepSpeed read, before they are loaded."""
    os.environ.update(
        RANK=str(info.rank),
        WORLD_SIZE=str(info.world_size),
        LOCAL_RANK=str(info.local_rank),
        LOCAL_WORLD_SIZE=str(info.local_world_size),
        MASTER_ADDR=info.master_addr,
        MASTER_PORT=str(info.master_port),
    )
    # Connections between ranks when they are first used: else each rank makes one to each other, in every group.
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    # Torch warns of each attempt to connect, with a stack of its own; what a user can act on is said by us.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def hosts_store(info: RankInfo) -> bool:
    """Whether the store at which the ranks meet is in this process: rank 0's, unless torchrun brings its own."""
    return info.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def start_attempt() -> int:
    """How often the launcher has started these ranks before, with one store: torchrun does."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def child_environment(num_ranks: int, *, has_gpu: bool, launched_at: float | None = None) -> dict[str, str]:
    """The environment to start ``num_ranks`` local ranks with: threads shared out, no spinning, a free port.

    ``launched_at``: when the command began, in seconds since 1970, for the ranks to count from.

    What the user has set wins. On a CPU, spinning OpenMP threads collapse when ranks share cores.
    """
    env = {**os.environ, _SUPERVISOR: f"{socket.gethostname()}:{os.getpid()}"}
    env.setdefault("MASTER_PORT", str(free_port()))
    if launched_at is not None:
        env[_LAUNCHED_AT] = str(launched_at)
    env.setdefault("OMP_NUM_THREADS", str(max(1, _usable_cores() // num_ranks)))
    if not has_gpu:
        env.setdefault("DS_ACCELERATOR", "cpu")
        env.setdefault("OMP_WAIT_POLICY", "passive")
    return env


def supervisor_pid(environ: Mapping[str, str] | None = None) -> int | None:
    """The process on this host that watches over this rank (`megatrain train`, a batch script); None without one."""
    host, _, pid = (os.environ if environ is None else environ).get(_SUPERVISOR, "").rpartition(":")
    return int(pid) if host == socket.gethostname() and pid.isdigit() else None


def launched_at() -> float | None:
    """When the command that started this rank began, in seconds since 1970; None where nobody on this host told."""
    text = os.environ.get(_LAUNCHED_AT, "")
    return float(text) if supervisor_pid() is not None and text.replace(".", "", 1).isdigit() else None


def extensions_dir() -> Path:
    """Where torch keeps the operators that it has compiled on this machine."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or caches / "torch_extensions")


def visible_gpus() -> list[str]:
    """GPUs that this process may use, without importing torch: as CUDA_VISIBLE_DEVICES says, or as the driver lists."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [device.strip() for device in visible.split(",") if device.strip() not in {"", "-1"}]
    return [str(number) for number in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]


def free_port() -> int:
    """A TCP port that is free on this host at this moment."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port


def job_port(job: int, start: int) -> int:
    """A TCP port for the ``start``-th start of a SLURM job to meet at, free on this host at this moment.

    Each start begins to look at another: ranks that an earlier one left behind meet nobody. Raises ConfigError where
    none is free.
    """
    for attempt in range(100):
        port = _FIRST_JOB_PORT + (job + 977 * start + 101 * attempt) % _NUM_JOB_PORTS
        if _is_free(port):
            return port
    raise ConfigError(
        f"none of 100 ports of {socket.gethostname()} is free to meet at: set MASTER_PORT to one that is."
    )


def job_identity() -> dict[str, str]:
    """What names this job to others: host, and the SLURM job where there is one."""
    job = {"host": socket.gethostname(), "pid": str(os.getpid())}
    for key, name in (("SLURM_JOB_ID", "slurm_job"), ("SLURM_RESTART_COUNT", "slurm_restarts")):
        if key in os.environ:
            job[name] = os.environ[key]
    return job


def start_name(environ: Mapping[str, str] | None = None) -> str:
    """What tells this start of a run from earlier ones of it: the same on all its ranks and their supervisor."""
    env = os.environ if environ is None else environ
    job = [env[key] for key in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT") if key in env]
    return "-".join([*job, str(_master_port(env))])


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True


def _is_batch_shell(env: Mapping[str, str]) -> bool:
    """A batch script (and what it starts without srun) sees SLURM_PROCID=0 too, but is no task of a step."""
    return "SLURM_STEP_ID" not in env or env.get("SLURM_STEP_ID") in {"4294967291", "-5", "batch"}


def _whole(env: Mapping[str, str], key: str) -> int:
    try:
        return int(env[key])
    except ValueError:
        raise ConfigError(f"the environment variable {key} is {env[key]!r}, not a whole number.") from None


def _local_size(env: Mapping[str, str], key: str, world_size: int) -> int:
    text = env.get(key, "")
    if not text and key == "LOCAL_WORLD_SIZE":
        text = env.get("LOCAL_SIZE", "")  # DeepSpeed's word for it
    if not text and "SLURM_TASKS_PER_NODE" in env:
        text = env["SLURM_TASKS_PER_NODE"].split("(")[0].split(",")[0]
    return int(text) if text.isdigit() and int(text) > 0 else world_size


def _master_addr(env: Mapping[str, str]) -> str:
    if "MASTER_ADDR" in env:
        return env["MASTER_ADDR"]
    nodes = env.get("SLURM_NODELIST", "")
    return _first_node(nodes) if nodes and "SLURM_PROCID" in env else "127.0.0.1"


def _first_node(nodelist: str) -> str:
    """The first host of a SLURM node list: ``gpu[003-010,12],login1`` gives ``gpu003``."""
    head = nodelist.split(",")[0]
    if "[" not in head:
        return head
    prefix, _, numbers = head.partition("[")
    return prefix + numbers.rstrip("]").split("-")[0]


def _master_port(env: Mapping[str, str]) -> int:
    if "MASTER_PORT" in env:
        return _whole(env, "MASTER_PORT")
    if "SLURM_JOB_ID" in env:  # the same for every task of a job, rarely for two jobs on a node
        return _FIRST_JOB_PORT + int(env["SLURM_JOB_ID"]) % _NUM_JOB_PORTS
    return DEFAULT_MASTER_PORT
