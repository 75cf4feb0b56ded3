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
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = (line.split() for line in _limits("cpu.max"))
    allowed = [math.ceil(int(quota) / int(period)) for quota, period in quotas if quota != "max"]
    return max(1, min([bound, (os.cpu_count() or 1) // num_processes, *allowed]))


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
