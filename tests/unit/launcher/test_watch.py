from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from launcher import watch
from megatrain.distributed.bootstrap import start_name
from megatrain.distributed.giving_up import why_given_up

HOSTS = ("node1", "node2", "node3")
# As pdsh, which names all hosts, has a process for each of them, whose words name it, and waits for all of these.
PDSH = """
import subprocess, sys
sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
nodes = [subprocess.Popen([*sleep, "-x", host, "a command"]) for host in sys.argv[1:]]
print("started", flush=True)
for node in nodes:
    node.wait()
"""
LAUNCHER = """
import subprocess, sys
subprocess.run([sys.executable, "-c", *sys.argv[1:]])
"""


@pytest.fixture
def launcher() -> Iterator[psutil.Process]:
    command = [sys.executable, "-c", LAUNCHER, PDSH, *HOSTS]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"started\n"
        seen = psutil.Process(process.pid)
        below = seen.children(recursive=True)
        yield seen
        for child in (seen, *below):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(watch, "_PATIENCE_SECONDS", 1.5)
    (tmp_path / "logs").mkdir()
    (tmp_path / "hostfile").write_text("".join(f"{host} slots=1\n" for host in HOSTS))
    return tmp_path


def _end_node(launcher: psutil.Process, host: str) -> None:
    (pdsh,) = launcher.children()
    (node,) = [child for child in pdsh.children() if host in child.cmdline()]
    node.kill()


@pytest.mark.parametrize("host", HOSTS)
def test_waiting_ranks_learn_that_a_node_has_ended(host: str, launcher: psutil.Process, run_dir: Path) -> None:
    _end_node(launcher, host)
    watch.watch_nodes(run_dir, launcher.pid, run_dir / "hostfile")
    told = why_given_up(run_dir, start_name())
    assert told is not None
    assert told.startswith(f"On {host} the ranks ended, or could not be started")
    assert launcher.is_running()


def test_a_simultaneous_end_everywhere_is_no_failure(launcher: psutil.Process, run_dir: Path) -> None:
    watching = threading.Thread(target=watch.watch_nodes, args=(run_dir, launcher.pid, run_dir / "hostfile"))
    watching.start()
    time.sleep(1.0)
    for host in HOSTS:
        _end_node(launcher, host)
    launcher.wait(10)
    watching.join(10)
    assert not watching.is_alive()
    assert why_given_up(run_dir, start_name()) is None


def test_variables_are_removed_once_ranks_have_met(launcher: psutil.Process, run_dir: Path) -> None:
    """And not by what an earlier start has logged."""
    variables, metrics = run_dir / "environment.sh", run_dir / "metrics.jsonl"
    variables.touch()
    metrics.touch()
    os.utime(metrics, (0, 0))
    watching = threading.Thread(target=watch.watch_nodes, args=(run_dir, launcher.pid, run_dir / "hostfile"))
    watching.start()
    time.sleep(1.2)
    assert variables.exists()
    later = (run_dir / "hostfile").stat().st_mtime + 1
    os.utime(metrics, (later, later))
    time.sleep(1.2)
    assert not variables.exists()
    launcher.kill()
    launcher.wait(10)
    watching.join(10)
    assert not watching.is_alive()
