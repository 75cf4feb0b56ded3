"""What is in the way of a start is told at the start, by the real command."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest

from tests.runs import TinyData, TrainProcess, tiny_config, write_config


@pytest.mark.slow
@pytest.mark.acceptance
def test_a_busy_port_is_named_stale_locks_removed(tiny_data: TinyData, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", tiny_config(tiny_data, tmp_path / "run", train={"steps": 2}))
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        code, output = TrainProcess(config, 2, environment={"MASTER_PORT": str(port)}).wait()
    assert code == 5, output
    assert f"Port {port} on {socket.gethostname()}" in output
    assert output.count("in use") == 1, output
    assert "Traceback" not in output

    lock = tmp_path / "extensions" / "some_operator" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (time.time() - 3600,) * 2)
    code, output = TrainProcess(config, 2, environment={"TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}).wait()
    assert code == 0, output
    assert f"{lock} was removed" in output
    assert not lock.exists()


@pytest.mark.slow
def test_out_of_memory_is_told_in_one_paragraph(tiny_data: TinyData, tmp_path: Path) -> None:
    """With what `megatrain plan` would change; the traceback is in the rank's log."""
    sizes = {"hidden_size": 16384, "intermediate_size": 65536, "num_hidden_layers": 64}
    config = write_config(tmp_path / "run.yaml", tiny_config(tiny_data, tmp_path / "run", model=sizes))
    code, output = TrainProcess(config, 1).wait()
    assert code == 2, output
    assert f"Rank 0 on {socket.gethostname()}: out of memory (" in output
    assert "`megatrain plan` counts " in output
    assert "Traceback" not in output
    assert "Traceback" in (tmp_path / "run/logs/rank-00000.log").read_text()
