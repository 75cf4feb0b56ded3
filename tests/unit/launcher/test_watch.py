from __future__ import annotations

import contextlib
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
# As pdsh: a process for each host, whose words name it, and which waits for all of them.
LAUNCHER = """
import subprocess, sys
nodes = [subprocess.Popen(["sh", "-c", "sleep 60; :", "-x", host, "a command"]) for host in sys.argv[1:]]
print("started", flush=True)
for node in nodes:
    node.wait()
"""


@pytest.fixture
def launcher() -> Iterator[psutil.Process]:
    command = [sys.executable, "-c", LAUNCHER, *HOSTS]
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
    (node,) = [child for child in launcher.children() if host in child.cmdline()]
    node.kill()


def test_a_node_whose_ranks_have_ended_is_told_to_those_that_wait(launcher: psutil.Process, run_dir: Path) -> None:
    _end_node(launcher, "node2")
    watch.watch_nodes(run_dir, launcher.pid, run_dir / "hostfile")
    told = why_given_up(run_dir, start_name())
    assert told is not None
    assert told.startswith("On node2 the ranks ended, or could not be started")
    assert launcher.is_running()


def test_a_run_that_ends_within_a_moment_on_all_nodes_is_not_given_up(launcher: psutil.Process, run_dir: Path) -> None:
    watching = threading.Thread(target=watch.watch_nodes, args=(run_dir, launcher.pid, run_dir / "hostfile"))
    watching.start()
    time.sleep(1.0)
    for host in HOSTS:
        _end_node(launcher, host)
    launcher.wait(10)
    watching.join(10)
    assert not watching.is_alive()
    assert why_given_up(run_dir, start_name()) is None
