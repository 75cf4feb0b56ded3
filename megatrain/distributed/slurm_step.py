"""The SLURM step that this process is a task of, as srun tells its tasks. Imports no torch.

A batch script, a shell of `salloc`, and whoever logs in to a node of the job see the job's variables, but are no task
of a step; the interactive step around such a shell has one task.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatrain.distributed.node_list import hostnames, tasks_per_node
from megatrain.errors import ConfigError

_NO_TASKS = {"4294967291", "-5", "batch", "4294967292", "-4", "extern"}


@dataclass(frozen=True)
class SlurmStep:
    """A step, seen by one of its tasks.

    ``local_size``: tasks on this node; None where SLURM does not say. ``nodes``: as SLURM writes them; "" likewise.
    """

    rank: int
    size: int
    local_size: int | None
    nodes: str
    distribution: str
    hostfile: str

    def first_host(self) -> str:
        """The node of task 0. Raises ConfigError where srun does not tell which one that is."""
        nodes = hostnames(self.nodes) if self.nodes else []
        if self.distribution.startswith("arbitrary") and len(nodes) != 1:  # the list is sorted, and task 0 anywhere
            first = _first_in(self.hostfile)
            nodes = [first] if first in nodes else []
        if not nodes:
            raise ConfigError(
                "srun does not tell on which node rank 0 is (SLURM_STEP_NODELIST is "
                f"{self.nodes!r}, the distribution {self.distribution or 'not known'}): export MASTER_ADDR as the name "
                "of that node before srun."
            )
        return nodes[0]


def find_step(env: Mapping[str, str]) -> SlurmStep | None:
    """The step whose task has this environment; None outside of one. Raises ConfigError for broken variables."""
    if "SLURM_STEP_NUM_TASKS" not in env or "SLURM_PROCID" not in env or env.get("SLURM_STEP_ID") in _NO_TASKS:
        return None
    size = read_int(env, "SLURM_STEP_NUM_TASKS")
    counts = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE")
    here = tasks_per_node(counts)[read_int(env, "SLURM_NODEID", 0) :] if counts else []
    return SlurmStep(
        rank=read_int(env, "SLURM_PROCID"),
        size=size,
        local_size=min(here[0], size) if here else None,
        nodes=env.get("SLURM_STEP_NODELIST", ""),
        distribution=env.get("SLURM_DISTRIBUTION", ""),
        hostfile=env.get("SLURM_HOSTFILE", ""),
    )


def read_int(env: Mapping[str, str], key: str, default: int | None = None) -> int:
    """A variable that holds a whole number. Raises ConfigError where it holds another text, or nothing by default."""
    text = env.get(key, "" if default is None else str(default))
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"the environment variable {key} is {text!r}, not a whole number.") from None


def _first_in(hostfile: str) -> str | None:
    """The first node that a hostfile of srun names; None where it cannot be read here."""
    try:
        lines = [line.partition("#")[0].split() for line in Path(hostfile).read_text(encoding="utf-8").splitlines()]
        return hostnames(next(words[0] for words in lines if words).partition("*")[0])[0]
    except (OSError, StopIteration, UnicodeDecodeError, ConfigError):
        return None
