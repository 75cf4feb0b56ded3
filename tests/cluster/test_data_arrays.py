"""Arrays of a real SLURM that lose a task: the jobs behind tell, and the same array goes on to the same bytes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.lab import Lab
from tests.faults.tokenize_inputs import folder_bytes
from tests.runs import TinyData, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(900)]


def submit_array(lab: Lab, folder: Path, words: list[str]) -> list[str]:
    options = ["array", "--tasks", "4", "--cpus-per-task", "1", "--submit", "--", *words]
    command = [sys.executable, "-m", "launcher", *options]
    ended = subprocess.run(command, cwd=folder, env=lab.environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.split()


def wait_for_jobs(lab: Lab, jobs: list[str]) -> None:
    for number in jobs:
        wait_until(lambda: lab.call("squeue", "-h", "-j", number) == "", 0.5)  # noqa: B023 (called at once)


@pytest.mark.acceptance
def test_a_lost_array_task_is_made_up_for(lab: Lab, tiny_data: TinyData, tmp_path: Path) -> None:
    words = ["tokenize", str(tiny_data.prose.parent / "*.jsonl"), "--tokenizer", str(tiny_data.tokenizer), "--out"]
    with lab.drained(lab.nodes):
        jobs = submit_array(lab, tmp_path, [*words, "set"])
        lab.call("scancel", f"{jobs[0]}_1")
    wait_for_jobs(lab, jobs)
    assert {lab.job(number)["ExitCode"] for number in jobs[1:]} == {"75:0"}
    output = "".join(path.read_text() for path in tmp_path.rglob("slurm-*.out"))
    assert "units of the stage 'encode' are missing" in output
    assert "Traceback" not in output
    wait_for_jobs(lab, submit_array(lab, tmp_path, [*words, "set"]))
    subprocess.run([sys.executable, "-m", "data_tools", *words, "alone"], cwd=tmp_path, check=True, env=lab.environment)
    assert folder_bytes(tmp_path / "set") == folder_bytes(tmp_path / "alone")
