"""The rank of this process among those that do the same work, from its launcher.

Under `mpirun`, and `srun` with an MPI, ranks use MPI. Tasks of a SLURM array, and of `srun` without a working MPI, see
on disk what the others have done. The only reader of the environment in data_tools.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.machine import memory_bytes, num_cores
from megatrain.distributed.slurm_step import find_step, read_int
from megatrain.errors import ConfigError


@dataclass(frozen=True)
class Ranks:
    """Rank `rank` of `size`."""

    rank: int = 0
    size: int = 1
    num_local: int = 1
    """Ranks on this machine."""
    comm: Any = None
    """mpi4py's communicator, where there is one."""
    job: str = ""
    """Names the tasks that were started together, where there is no MPI."""

    @property
    def uses_mpi(self) -> bool:
        """Whether ranks communicate, and not only see what is on disk."""
        return self.comm is not None

    def abort(self, exit_code: int) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self.comm.Abort(exit_code)

    def num_cores(self) -> int:
        """Cores for this process, one of those on this machine."""
        return num_cores(self.num_local)

    def memory_bytes(self) -> int:
        """Memory for this process and those that it starts: of the machine, its control group, or its SLURM job."""
        node, core = (read_int(os.environ, f"SLURM_MEM_PER_{each}", 0) << 20 for each in ("NODE", "CPU"))
        job = node or core * read_int(os.environ, "SLURM_CPUS_ON_NODE", 0)
        return min(memory_bytes(), job or memory_bytes()) // self.num_local


def find_ranks(environ: Mapping[str, str] | None = None) -> Ranks:
    """This process's rank, as mpirun, srun or a SLURM array says.

    Raises ConfigError where the launcher speaks of several ranks and MPI knows of another number: each would believe
    itself alone, and do everything.
    """
    env = os.environ if environ is None else environ
    step = find_step(env)
    for rank_key, size_key, launcher in (
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "mpirun"),
        ("PMI_RANK", "PMI_SIZE", "the launcher"),
        ("PMIX_RANK", "SLURM_STEP_NUM_TASKS", "srun"),
    ):
        size = read_int(env, size_key, 1)
        if rank_key in env and size > 1:
            rank = read_int(env, rank_key)
            try:
                return _speak_mpi(launcher, rank, size)
            except ConfigError:
                if step is None or (step.rank, step.size) != (rank, size):
                    raise
                break  # tasks of srun, which SLURM gave their ranks
    rank, size, num_local = (step.rank, step.size, step.local_size or 1) if step else (0, 1, 1)
    if "SLURM_ARRAY_TASK_ID" in env:
        task = read_int(env, "SLURM_ARRAY_TASK_ID", 0) - read_int(env, "SLURM_ARRAY_TASK_MIN", 0)
        num_tasks = max(read_int(env, "SLURM_ARRAY_TASK_COUNT", 1), 1)
        task = task // max(read_int(env, "SLURM_ARRAY_TASK_STEP", 1), 1) % num_tasks
        rank, size = task * size + rank, num_tasks * size
    job = env.get("SLURM_ARRAY_JOB_ID") or env.get("SLURM_JOB_ID", "")
    return Ranks(rank, size, num_local, job=f"{job}.{env.get('SLURM_STEP_ID', '')}" if job and size > 1 else "")


def batch_job() -> str:
    """SLURM's number of the job that this process is in; nothing outside of one."""
    return os.environ.get("SLURM_JOB_ID", "")


def _speak_mpi(launcher: str, rank: int, size: int) -> Ranks:
    advice = (
        f"Start it with the mpirun of the MPI that mpi4py loads (here {Path(sys.prefix) / 'bin' / 'mpirun'} if pip "
        "brought it), or name the launcher's library: export MPI4PY_LIBMPI=/path/to/libmpi.so. "
        "Without MPI, use a SLURM array or srun --mpi=none."
    )
    try:
        import mpi4py

        mpi4py.rc.thread_level = "serialized"
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ConfigError(
            f"{launcher} started {size} ranks, but MPI cannot be loaded here ({error}). {advice}"
        ) from None
    world = MPI.COMM_WORLD
    if world.Get_size() != size:
        library = MPI.Get_library_version().split(",")[0].split("\n")[0].strip()
        raise ConfigError(
            f"{launcher} started this as rank {rank} of {size}, but mpi4py's MPI ({library}) knows "
            f"of {world.Get_size()}: it is not the launcher's MPI, and every rank would believe itself alone. {advice}"
        )
    num_local = world.Split_type(MPI.COMM_TYPE_SHARED).Get_size()
    return Ranks(world.Get_rank(), size, num_local, world)
