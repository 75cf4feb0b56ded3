"""The benchmarks that hold on to parts of the trainer still run; their figures are for docs/, not for tests."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.acceptance
def test_the_checkpoint_benchmark_saves_and_loads_every_way(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "checkpoint.py"
    ended = subprocess.run(
        [sys.executable, str(script), "--turns", "1", "--folder", str(tmp_path)], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    for figure in ("save megatrain stall", "save megatrain whole", "save dcp async whole", "load cold deepspeed whole"):
        assert f"\n{figure} " in ended.stdout


@pytest.mark.slow
def test_pipelines_wait_no_longer_than_their_bubble() -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "pipeline_bubble.py"
    command = [sys.executable, str(script), "--ranks", "2", "--chunks", "1", "2"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    rows = [line.split(": ")[1].split() for line in ended.stdout.splitlines()[1:]]
    assert [formula for _, formula, _ in rows] == ["0.125", "0.062"]
    assert max(float(more) for _, _, more in rows) <= 0.03


def test_planned_speed_is_near_published_runs() -> None:
    """Also where a plan knows neither the run nor its source."""
    script = Path(__file__).parents[1] / "benchmarks" / "plan_speed.py"
    ended = subprocess.run([sys.executable, str(script), "--left-out"], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    medians = re.findall(r"^(.+): median ([\d.]+)%, largest ([\d.]+)%, 37 runs$", ended.stdout, re.MULTILINE)
    assert [name for name, *_ in medians] == ["as planned", "without the run", "without its source"]
    for name, middle, largest in medians:
        assert float(middle) <= 12.0, name
        assert float(largest) <= 34.0, name
