"""Which rank am I? The only reader of the environment; imports no torch, so that it costs nothing to ask.

Each launcher sets variables of its own. They are read in the order of who wraps whom: `deepspeed` and `torchrun` set
RANK; `mpirun` (Open MPI, or PMI's for MPICH) and `srun` set theirs for each task they start.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from megatrain.distributed.node_list import hostnames
from megatrain.distributed.slurm_step import SlurmStep, find_step, read_int
from megatrain.errors import ConfigError

DEFAULT_MASTER_PORT = 29500
_THIS_HOST = "127.0.0.1"
_SUPERVISOR = "MEGATRAIN_SUPERVISOR"
_LAUNCHED_AT = "MEGATRAIN_LAUNCHED_AT"
_DEVICE = "MEGATRAIN_DEVICE"
"""`cuda` where who starts the ranks has seen GPUs, or asked SLURM for some: `megatrain train`, our batch scripts."""
_GPU_COUNTS = (
    "SLURM_GPUS",
    "SLURM_GPUS_PER_NODE",
    "SLURM_GPUS_PER_SOCKET",
    "SLURM_GPUS_PER_TASK",
    "SLURM_GPUS_ON_NODE",
)
_GPU_LISTS = (
    _DEVICE,
    "SLURM_JOB_GPUS",
    "SLURM_STEP_GPUS",
    "CUDA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
)
_NO_GPUS = {"", "-1", "NoDevFiles", "(null)", "none", "void", "cpu"}
_COUNT = re.compile(r"(?:^|[:=])0*[1-9]\d*$|^[^\W\d][^:=]*$")  # 8, h100:8, and h100 for one of them
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


class _Variables(NamedTuple):
    """Those by which a launcher tells a rank who it is. Of ``local_rank`` and ``local_size`` the first set counts."""

    rank: str
    size: str
    local_rank: tuple[str, ...]
    local_size: tuple[str, ...]
    launcher: str


_LAUNCHERS = (
    _Variables("RANK", "WORLD_SIZE", ("LOCAL_RANK",), ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"), "deepspeed or torchrun"),
    _Variables(
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        ("OMPI_COMM_WORLD_LOCAL_RANK",),
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
        "mpirun",
    ),
    _Variables(  # MPICH, Intel MPI, PALS, and srun --mpi=pmi2, which leaves the local rank to SLURM's own variables
        "PMI_RANK",
        "PMI_SIZE",
        ("MPI_LOCALRANKID", "PMI_LOCAL_RANK", "PALS_LOCAL_RANKID"),
        ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE", "PALS_LOCAL_SIZE"),
        "mpirun",
    ),
)


def read_rank(environ: Mapping[str, str] | None = None) -> RankInfo:
    """Find this process's rank under deepspeed, torchrun, mpirun or srun; alone, it is rank 0 of 1.

    Raises ConfigError where a launcher's variables contradict each other, or do not say which rank of its node this is,
    or where rank 0 is.
    """
    env = os.environ if environ is None else environ
    step = find_step(env)
    for names in _LAUNCHERS:
        if names.rank in env and names.size in env:
            return _checked(_from_launcher(env, names, step))
    if step is not None:
        return _checked(_from_step(env, step))
    if half := next((names for names in _LAUNCHERS if env.get(names.rank)), None):
        raise ConfigError(
            f"{half.rank}={env[half.rank]} is set, but {half.size} is not: of how many ranks this is one is not known. "
            f"Export both, or unset {half.rank} for a process that is alone."
        )
    # Alone it meets nobody: any port does, so that another such process on this machine is not in its way.
    port = _master_port(env) if "MASTER_PORT" in env else free_port()
    return RankInfo(0, 1, 0, 1, "none", env.get("MASTER_ADDR", _THIS_HOST), port)


def _from_launcher(env: Mapping[str, str], names: _Variables, step: SlurmStep | None) -> RankInfo:
    rank, size = read_int(env, names.rank), read_int(env, names.size)
    if not 0 <= rank < size:
        raise ConfigError(
            f"{names.rank}={rank} is outside of {names.size}={size}: the launcher's variables are broken."
        )
    if step is not None and size > 1 and (step.rank, step.size) == (rank, size):
        return _from_step(env, step)  # the ranks are the step's tasks, whoever else speaks of them
    local_keys = tuple(dict.fromkeys((*names.local_rank, "LOCAL_RANK")))
    local = next((key for key in local_keys if key in env), None)
    if local is None and size > 1:
        raise ConfigError(
            f"{names.launcher} started {size} ranks ({names.rank}, {names.size}), but none of {', '.join(local_keys)} "
            "says which of its node's ranks this one is, and so which GPU is its own: export LOCAL_RANK, 0 where each "
            "rank has a node to itself."
        )
    local_size = next((read_int(env, key) for key in (*names.local_size, "LOCAL_WORLD_SIZE") if env.get(key)), 0)
    local_size = local_size if local_size > 0 else size
    master = _master_addr(env, names.launcher, size, local_size)
    local_rank = read_int(env, local) if local else 0
    return RankInfo(rank, size, local_rank, local_size, names.launcher, master, _master_port(env))


def _checked(info: RankInfo) -> RankInfo:
    if 0 <= info.rank < info.world_size and 0 <= info.local_rank < info.local_world_size:
        return info
    raise ConfigError(
        f"{info.launcher} tells this process that it is rank {info.rank} of {info.world_size}, and rank "
        f"{info.local_rank} of {info.local_world_size} on its node: its variables contradict each other. Ranks count "
        "from 0, within one step and not over several (a heterogeneous job has several)."
    )


def _from_step(env: Mapping[str, str], step: SlurmStep) -> RankInfo:
    local_rank, local_size = read_int(env, "SLURM_LOCALID"), step.local_size or step.size
    master = env.get("MASTER_ADDR") or (step.first_host() if step.size > 1 else _THIS_HOST)
    return RankInfo(step.rank, step.size, local_rank, local_size, "srun", master, _master_port(env))


def export_rank(info: RankInfo) -> None:
    """Set the variables that torch.distributed and DeepSpeed read, before they are loaded."""
    os.environ.update(_variables(info))
    # Connections between ranks when they are first used: else each rank makes one to each other, in every group.
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    # Torch warns of each attempt to connect, with a stack of its own; what a user can act on is said by us.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch.profiler tells each time that it begins


def _variables(info: RankInfo) -> dict[str, str]:
    return {
        "RANK": str(info.rank),
        "WORLD_SIZE": str(info.world_size),
        "LOCAL_RANK": str(info.local_rank),
        "LOCAL_WORLD_SIZE": str(info.local_world_size),
        "MASTER_ADDR": info.master_addr,
        "MASTER_PORT": str(info.master_port),
    }


@contextlib.contextmanager
def rank_exported(info: RankInfo) -> Iterator[None]:
    """`export_rank` for a while: processes that this one starts afterwards are no ranks, and meet at no port of its."""
    before = {name: os.environ.get(name) for name in _variables(info)}
    export_rank(info)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def hosts_store(info: RankInfo) -> bool:
    """Whether the store at which the ranks meet is in this process: rank 0's, unless torchrun brings its own."""
    return info.rank == 0 and not agents_hold_store()


def agents_hold_store() -> bool:
    """Whether torchrun's agents hold the store at which the ranks meet, from one start of the ranks to the next."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


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
    if has_gpu:
        env.setdefault(_DEVICE, "cuda")
    else:
        env.setdefault("DS_ACCELERATOR", "cpu")
        env.setdefault("OMP_WAIT_POLICY", "passive")
    return env


def local_rank_variables(rank: int, num_ranks: int) -> dict[str, str]:
    """What a launcher sets for one of ``num_ranks`` ranks, all on this machine, beside ``child_environment``."""
    number, size = str(rank), str(num_ranks)
    variables = {"RANK": number, "WORLD_SIZE": size, "LOCAL_RANK": number, "LOCAL_WORLD_SIZE": size}
    return {**variables, "MASTER_ADDR": _THIS_HOST}


def supervisor_pid(environ: Mapping[str, str] | None = None) -> int | None:
    """The process on this host that watches over this rank (`megatrain train`, a batch script, torchrun's agent); None
    without one.
    """
    env = os.environ if environ is None else environ
    if "TORCHELASTIC_RUN_ID" in env:
        return os.getppid()
    host, _, pid = env.get(_SUPERVISOR, "").rpartition(":")
    return int(pid) if host == socket.gethostname() and pid.isdigit() else None


def launched_at() -> float | None:
    """When the command that started this rank began, in seconds since 1970; None where nobody on this host told."""
    text = os.environ.get(_LAUNCHED_AT, "")
    return float(text) if supervisor_pid() is not None and text.replace(".", "", 1).isdigit() else None


def extensions_dir() -> Path:
    """Where torch keeps the operators that it has compiled on this machine."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or caches / "torch_extensions")


def wants_cpu(environ: Mapping[str, str] | None = None) -> bool:
    """Whether somebody asked for CPUs, whatever GPUs there are: DS_ACCELERATOR=cpu, as DeepSpeed reads it."""
    return (os.environ if environ is None else environ).get("DS_ACCELERATOR") == "cpu"


def visible_gpus(environ: Mapping[str, str] | None = None) -> list[str]:
    """GPUs that this process may use, without importing torch: as CUDA_VISIBLE_DEVICES says, or as the driver lists."""
    env = os.environ if environ is None else environ
    if wants_cpu(env):
        return []
    if "CUDA_VISIBLE_DEVICES" in env:
        devices = map(str.strip, env["CUDA_VISIBLE_DEVICES"].split(","))
        return [*itertools.takewhile(lambda device: device not in _NO_GPUS, devices)]  # CUDA reads no further
    return _driver_gpus()


def gpu_request(environ: Mapping[str, str] | None = None) -> str | None:
    """What says that this process was started for GPUs, such as ``SLURM_GPUS_ON_NODE=8``; None where nothing does, or
    somebody asked for CPUs.
    """
    env = os.environ if environ is None else environ
    if wants_cpu(env):
        return None
    for key in _GPU_COUNTS:
        if any(_COUNT.search(count) for count in env.get(key, "").split(",")):
            return f"{key}={env[key]}"
    for key in _GPU_LISTS:
        is_deepspeeds = key == "CUDA_VISIBLE_DEVICES" and "LOCAL_SIZE" in env  # its launcher sets it without GPUs too
        if not is_deepspeeds and env.get(key, "").split(",")[0].strip() not in _NO_GPUS:
            return f"{key}={env[key]}"
    return "/dev/nvidia0" if _driver_gpus() and visible_gpus(env) else None


def _driver_gpus() -> list[str]:
    return [str(number) for number in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]


def export_device(index: int) -> None:
    """Tell DeepSpeed which of the GPUs that this process sees is its own: it takes the local rank for that number."""
    os.environ["LOCAL_RANK"] = str(index)
    if "OMPI_COMM_WORLD_LOCAL_RANK" in os.environ:  # DeepSpeed insists on that both are the same
        os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] = str(index)


def free_port() -> int:
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


def boot_id() -> str:
    """What tells this machine, since it was started, from all others; nothing where the kernel does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


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


def is_start_named() -> bool:
    """Whether no earlier start of the run can have had this one's name: `megatrain train` and our batch scripts, which
    start ranks over ssh, see to that.
    """
    return _SUPERVISOR in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True


def _master_addr(env: Mapping[str, str], launcher: str, size: int, local_size: int) -> str:
    """Where rank 0 is, of ranks that are not the tasks of a SLURM step."""
    if env.get("MASTER_ADDR"):
        return env["MASTER_ADDR"]
    if size == local_size:
        return _THIS_HOST
    if nodes := env.get("SLURM_JOB_NODELIST"):  # mpirun in an allocation begins on its first node
        return hostnames(nodes)[0]
    raise ConfigError(
        f"{size} ranks on several nodes ({launcher}), but MASTER_ADDR is not set: export it as the name of the first "
        "node, and MASTER_PORT if that port may be in use."
    )


def _master_port(env: Mapping[str, str]) -> int:
    if "MASTER_PORT" in env:
        port = read_int(env, "MASTER_PORT")
        if not 0 < port < 1 << 16:
            raise ConfigError(f"MASTER_PORT is {port}; a TCP port is from 1 to 65535.")
        return port
    if "SLURM_JOB_ID" in env:  # the same for every task of a job, rarely for two jobs on a node
        return _FIRST_JOB_PORT + read_int(env, "SLURM_JOB_ID") % _NUM_JOB_PORTS
    return DEFAULT_MASTER_PORT
