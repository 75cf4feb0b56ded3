"""What this process may use of its machine: the least of what the machine has and what its control groups allow."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")
MEMORY = Path("/proc/meminfo")


def num_cores(num_processes: int = 1) -> int:
    """Cores for this process, which shares the machine with so many of the same kind."""
    return _bounds(num_processes)[0][0]


def cores_bound(num_processes: int = 1) -> str:
    """What bounds these cores."""
    return _bounds(num_processes)[0][1]


def _bounds(num_processes: int) -> list[tuple[int, str]]:
    """Each bound on the cores, and what it is, the least first."""
    machine = os.cpu_count() or 1
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else machine
    share = f"a share of the machine's {machine}" if num_processes > 1 else f"the machine has {machine}"
    bounds = [(max(machine // num_processes, 1), share), (bound, "those that it is bound to, its affinity")]
    for quota, period in (line.split() for line in _limits("cpu.max")):
        if quota != "max":
            bounds.append((max(math.ceil(int(quota) / int(period)), 1), "cpu.max of a control group"))
    return sorted(bounds, key=lambda each: each[0])


def memory_bytes() -> int:
    """Memory that this process and those beside it may use together."""
    with MEMORY.open() as lines:
        total = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemTotal:"))
    return min([total, *(int(line) for line in _limits("memory.max") if line != "max")])


def _limits(name: str) -> Iterator[str]:
    """A limit of this process's control group (version 2), and of each above it."""
    try:
        found = next(line.rstrip("\n")[3:] for line in OWN_CGROUP.open() if line.startswith("0::"))
    except (OSError, StopIteration):
        return
    own = CGROUPS / found.lstrip("/")
    for group in [own, *(parent for parent in own.parents if parent.is_relative_to(CGROUPS))]:
        try:
            yield (group / name).read_text().strip()
        except OSError:  # the root group has no limits, and what is outside of a container is not to be seen
            continue
