"""What this machine computes with, without torch: the GPUs that its driver names, or the CPU, as it is measured."""

from __future__ import annotations

import re
import time
from pathlib import Path

from megatrain.plan.hardware import Device

CPU = "cpu"
_PRODUCT, _BUDGET_SECONDS = 1024, 1.0
_MEMORY_BYTES_PER_SECOND, _BETWEEN_RANKS_BYTES_PER_SECOND = 20e9, 5e9  # assumed: arithmetic takes far longer


def device_here(root: Path = Path("/")) -> str:
    """The name of what a run would compute on here: a GPU's as its driver gives it, or `cpu`."""
    for path in sorted(root.glob("proc/driver/nvidia/gpus/*/information")):
        if model := re.search(r"^Model:\s*(.+)$", path.read_text(), re.MULTILINE):
            return model[1].strip()
    return CPU


def cpu_computes_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this machine's CPU has units for bf16, as Linux reports them; assumed where it does not."""
    try:
        flags = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE)
    except OSError:
        return True
    return flags is None or not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags[1].split())


def measured_cpu(ranks_per_node: int) -> Device:
    """The share of this machine's CPU that each of its ranks has, from products in fp32 that take a second."""
    import numpy as np  # only here: other plans answer at once
    import psutil

    x = np.full((_PRODUCT, _PRODUCT), 1.0 / _PRODUCT, dtype=np.float32)
    x @ x  # the first one pays for starting the threads
    best, deadline = 0.0, time.perf_counter() + _BUDGET_SECONDS
    while (began := time.perf_counter()) < deadline:
        x @ x
        best = max(best, 2 * _PRODUCT**3 / (time.perf_counter() - began))
    flops, memory = best / ranks_per_node, psutil.virtual_memory().total / ranks_per_node
    return Device(
        name=CPU,
        pattern=CPU,
        half_flops=flops,
        single_flops=flops,
        memory_bytes=memory,
        bytes_per_second=_MEMORY_BYTES_PER_SECOND / ranks_per_node,
        link_bytes_per_second=_BETWEEN_RANKS_BYTES_PER_SECOND,
        has_bf16=cpu_computes_bf16(),
    )
