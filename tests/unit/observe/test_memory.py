import subprocess
import sys

import pytest

SCRIPT = """
import torch
from megatrain.observe.memory import peak_memory_bytes
before = peak_memory_bytes(torch.device("cpu"))
block = torch.ones(64 << 20, dtype=torch.uint8)
del block
print(peak_memory_bytes(torch.device("cpu")) - before, before)
"""


def child_peak() -> tuple[int, int]:
    """What a new process's peak grew by when it held 64 MiB more, and the peak before that."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    grown, before = map(int, done.stdout.split())
    return grown, before


@pytest.mark.slow
def test_the_peak_is_of_this_process_alone():
    # How much an import of torch maps differs from build to build, so it is measured, not assumed.
    grown, alone = child_peak()
    assert 60 << 20 < grown < 80 << 20
    ballast = bytearray(b"x") * (2 * alone)
    _, beside_ballast = child_peak()
    assert beside_ballast < 1.5 * alone < len(ballast)
