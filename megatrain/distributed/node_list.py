"""SLURM's lists of nodes, ``rack[1-2]node[03-04]-ib,login``, and of task counts, ``2(x3),1``. Imports no torch."""

from __future__ import annotations

import itertools
import re
import subprocess
from collections.abc import Iterator

from megatrain.errors import ConfigError

_TERM = re.compile(r"(?:[^\s,\[\]]|\[[^\[\]]*\])+")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?", re.ASCII)
_TASKS = re.compile(r"(\d+)(?:\(x(\d+)\))?", re.ASCII)
_SCONTROL_SECONDS = 10


def hostnames(node_list: str) -> list[str]:
    """The nodes of a list in its order: as ``scontrol`` says, else (it is not there, or knows no suffixes) by `expand`.

    Raises ConfigError for what neither can read.
    """
    if "[" not in node_list:
        return expand(node_list)
    try:
        command = ["scontrol", "show", "hostnames", node_list]
        said = subprocess.run(command, capture_output=True, text=True, timeout=_SCONTROL_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return expand(node_list)
    # "Invalid hostlist" goes to stderr and ends with 0.
    return said.stdout.split() if said.returncode == 0 and not said.stderr else expand(node_list)


def expand(node_list: str) -> list[str]:
    """The nodes of a list in its order: several brackets, leading zeros and suffixes. Raises ConfigError.

    Of several brackets in a name the last one varies first.
    """
    terms = _TERM.findall(node_list)
    if not terms or ",".join(terms) != node_list:
        raise _unreadable(node_list)
    return [name for term in terms for name in _names(term, node_list)]


def tasks_per_node(counts: str) -> list[int]:
    """``SLURM_TASKS_PER_NODE`` and its like, ``2(x3),1``, node by node. Raises ConfigError."""
    tasks: list[int] = []
    for part in counts.split(","):
        if (match := _TASKS.fullmatch(part)) is None:
            raise ConfigError(f"{counts!r} is no list of tasks per node, which SLURM writes as 2(x3),1.")
        tasks += [int(match[1])] * int(match[2] or 1)
    return tasks


def _names(term: str, node_list: str) -> Iterator[str]:
    parts = re.split(r"\[(.*?)\]", term)  # in turn: text, what stands in brackets
    choices = [list(_numbers(part, node_list)) if place % 2 else [part] for place, part in enumerate(parts)]
    return map("".join, itertools.product(*choices))


def _numbers(ranges: str, node_list: str) -> Iterator[str]:
    for part in ranges.split(","):
        match = _RANGE.fullmatch(part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise _unreadable(node_list)
        for number in range(int(match[1]), int(match[2] or match[1]) + 1):
            yield f"{number:0{len(match[1])}d}"


def _unreadable(node_list: str) -> ConfigError:
    return ConfigError(
        f"the node list {node_list!r} cannot be read: SLURM writes them as rack[1-2]node[03-04]-ib,login."
    )
