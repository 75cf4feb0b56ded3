"""The benchmarks that hold on to parts of the trainer still run; their figures are for docs/, not for tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_checkpoint_benchmark_saves_and_loads_every_way(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "checkpoint.py"
    ended = subprocess.run(
        [sys.executable, str(script), "--turns", "1", "--folder", str(tmp_path)], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    for figure in ("save megatrain stall", "save megatrain whole", "save dcp async whole", "load cold deepspeed whole"):
        assert f"\n{figure} " in ended.stdout
