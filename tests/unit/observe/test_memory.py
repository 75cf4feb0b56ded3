import subprocess
import sys

SCRIPT = """
import torch
from megatrain.observe.memory import peak_memory_bytes
before = peak_memory_bytes(torch.device("cpu"))
block = torch.ones(64 << 20, dtype=torch.uint8)
del block
print(peak_memory_bytes(torch.device("cpu")) - before, before)
"""


def test_the_peak_is_of_this_process_alone():
    ballast = bytearray(b"x") * (600 << 20)
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    grown, before = map(int, done.stdout.split())
    assert 60 << 20 < grown < 80 << 20
    assert before < len(ballast)
