"""The most memory this rank has held."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

import torch


def peak_memory_bytes(device: torch.device) -> int:
    """The most bytes allocated at once: on the GPU where ``device`` is one, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Preferred over getrusage, which counts from before exec and so includes the process that started this one.
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found:
        return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
