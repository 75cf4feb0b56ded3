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
from megatrain.distributed import failures
from megatrain.distributed.activity import Activity
from megatrain.distributed.bootstrap import RankInfo, start_name
from megatrain.distributed.liveness import LivenessMonitor

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
    alive = [child for child in pdsh.children() if child.status() != psutil.STATUS_ZOMBIE]
    (node,) = [child for child in alive if host in child.cmdline()]
    node.kill()


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.slow
def test_waiting_ranks_learn_that_a_node_has_ended(
    host: str, launcher: psutil.Process, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _end_node(launcher, host)
    watch.watch_nodes(run_dir, launcher.pid, run_dir / "hostfile")
    failure = failures.read(run_dir, start_name())
    assert failure is not None
    assert failure.message.startswith(f"On {host} the ranks ended, or could not be started")
    assert (failure.rank, failure.exit_code) == (None, 5)
    assert failure.message in capsys.readouterr().err
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
    assert failures.read(run_dir, start_name()) is None


def test_variables_are_removed_once_ranks_have_met(launcher: psutil.Process, run_dir: Path) -> None:
    """And from then on the ranks look after each other."""
    variables = run_dir / "environment.sh"
    variables.touch()
    watching = threading.Thread(target=watch.watch_nodes, args=(run_dir, launcher.pid, run_dir / "hostfile"))
    watching.start()
    time.sleep(1.2)
    assert variables.exists()
    with LivenessMonitor(RankInfo(0, 2, 0, 1, "test", "127.0.0.1", 1), run_dir, start_name(), lambda _: None) as rank_0:
        rank_0.watch(Activity(), 600.0, run_dir / "rank.log")
        watching.join(10)
    assert not watching.is_alive()
    assert not variables.exists()
    assert launcher.is_running()
