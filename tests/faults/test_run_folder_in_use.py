"""Two jobs, one run folder: the second ends at once and says who has it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatrain.checkpoint.lock import locked
from megatrain.distributed.bootstrap import job_identity
from tests.runs import TinyData, tiny_config, write_config


def test_a_second_start_is_refused_before_torch_loads(tiny_data: TinyData, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    config = write_config(tmp_path / "run.yaml", tiny_config(tiny_data, run_dir))
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "torch.py").write_text("raise SystemExit('torch was imported')")
    command = [sys.executable, "-m", "megatrain", "train", str(config)]
    with locked(run_dir, job_identity()):
        began = time.monotonic()
        ended = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(blocked)}, timeout=60
        )
        seconds = time.monotonic() - began
    assert ended.returncode == 4, ended.stderr
    assert f"host {socket.gethostname()}, pid {os.getpid()}" in ended.stderr
    assert str(run_dir) in ended.stderr
    assert "Traceback" not in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1
    assert seconds < 10  # 1 on an idle machine


def test_a_refused_rank_leaves_the_other_records_alone(tiny_data: TinyData, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    config = write_config(tmp_path / "run.yaml", tiny_config(tiny_data, run_dir))
    with locked(run_dir, job_identity()):
        ended = subprocess.run(
            [sys.executable, "-m", "megatrain.train", str(config)], capture_output=True, text=True, timeout=60
        )
        assert sorted(path.name for path in run_dir.iterdir()) == [".lock", ".lock-change"]
    assert ended.returncode == 4
    assert "in use by" in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_two_runs_never_share_a_place_for_checkpoints(tiny_data: TinyData, tmp_path: Path) -> None:
    place = tmp_path / "checkpoints-of-both"
    sections = {"checkpoint": {"dir": str(place)}}
    config = write_config(tmp_path / "run.yaml", tiny_config(tiny_data, tmp_path / "second", **sections))
    for module, command in (("megatrain", ["train"]), ("megatrain.train", [])):
        with locked(place, job_identity()):  # as by the first run, whose own folder is another
            ended = subprocess.run(
                [sys.executable, "-m", module, *command, str(config)], capture_output=True, text=True, timeout=60
            )
        assert ended.returncode == 4
        assert f"{place} is in use by host {socket.gethostname()}, pid {os.getpid()}" in ended.stderr
        assert len(ended.stderr.strip().splitlines()) == 1
