"""The nodes of a job: which SLURM gave, and on how many of them a config's layout is legal."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from megatrain.config import RunConfig
from megatrain.distributed.node_list import hostnames, tasks_per_node
from megatrain.errors import ConfigError
from megatrain.plan import rules

_SHARE = re.compile(r"\bNodes=(\S+) CPU_IDs=\S* Mem=\S* GRES=(\S*)")
_NUM_TASKS = re.compile(r"\bNumTasks=(\d+)")
_GPUS = re.compile(r"(?:^|,)gpu(?::[A-Za-z][\w.-]*)?(?::(\d+))?(?=[(,]|$)")


def job_nodes() -> list[str]:
    """The nodes of the SLURM job around us, in the order in which its ranks are numbered."""
    return hostnames(os.environ["SLURM_JOB_NODELIST"])


def job_slots() -> dict[str, int]:
    """The nodes of the SLURM job around us, and how many ranks each is for: its GPUs in the job, else its tasks.

    Of a shell that `salloc` has started this node says nothing: it may be one where people log in.
    """
    nodes = job_nodes()
    described = subprocess.run(
        ["scontrol", "show", "job", "-d", "-o", os.environ["SLURM_JOB_ID"]], capture_output=True, text=True, check=False
    )
    gpus = {
        node: sum(int(count or 1) for count in _GPUS.findall(gres))
        for names, gres in _SHARE.findall(described.stdout)
        for node in hostnames(names)
    }
    tasks = tasks_per_node(os.environ.get("SLURM_TASKS_PER_NODE", "1"))
    if "SLURM_STEP_ID" in os.environ or len(tasks) != len(nodes):  # in a step these are the step's
        total = int(found[1]) if (found := _NUM_TASKS.search(described.stdout)) else len(nodes)
        tasks = [max(1, (total + number) // len(nodes)) for number in reversed(range(len(nodes)))]
    return {node: gpus.get(node) or num for node, num in zip(nodes, tasks, strict=True)}


def legal_counts(config: RunConfig, ranks_per_node: int, most: int) -> list[int]:
    return [nodes for nodes in range(1, most + 1) if rules.is_legal(config, nodes * ranks_per_node)]


def check_elastic(config: RunConfig, ranks_per_node: int, least: int, most: int) -> None:
    """Raise ConfigError unless a job of ``least`` to ``most`` nodes can train on the fewest and on the most of them."""
    if least > most:
        raise ConfigError(f"--min-nodes {least} is more than --nodes {most}: give at most as many.")
    rules.check(config, most * ranks_per_node)
    legal = legal_counts(config, ranks_per_node, most)
    if least not in legal:
        raise ConfigError(
            f"--min-nodes {least}: the layout is not legal on {least} x {ranks_per_node} ranks. "
            f"Up to {most} nodes it is legal on {_listed(legal)}."
        )


def choose_nodes(config: RunConfig, ranks_per_node: int, least: int) -> int:
    """How many of the job's nodes this start uses: as many as the layout is legal on, at least ``least``; says which.

    Raises ConfigError where it is legal on none.
    """
    given = job_nodes()
    legal = [nodes for nodes in legal_counts(config, ranks_per_node, len(given)) if nodes >= least]
    if not legal:
        raise ConfigError(
            f"the layout is legal on no number of nodes from {least} to {len(given)}, with {ranks_per_node} rank(s) on "
            "each: was the config changed since the job was submitted? `megatrain check` says more."
        )
    used = legal[-1]
    idle = f" The layout is not legal on more of them; idle: {' '.join(given[used:])}." if given[used:] else ""
    sys.stderr.write(f"Elastic: trains on {used} of {len(given)} nodes, {used * ranks_per_node} rank(s).{idle}\n")
    return used


def _listed(counts: list[int]) -> str:
    return ", ".join(map(str, counts))
