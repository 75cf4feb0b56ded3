"""torchrun with an agent a node: a rank is killed, an agent is killed and replaced by another, and the run goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megatrain.distributed.bootstrap import free_port
from tests.runs import Metrics, TinyData, last_step, tiny_config, wait_until, write_config

pytestmark = pytest.mark.slow
TORCHRUN = Path(sys.executable).with_name("torchrun")


class Agents:
    """torchrun's agents of one run of two ranks, each as on a node of its own. The first hosts their rendezvous."""

    def __init__(self, config: Path) -> None:
        self._config, self._port, self._log = config, free_port(), config.with_suffix(".log")
        self.running: list[subprocess.Popen[bytes]] = []

    def start(self) -> subprocess.Popen[bytes]:
        """One more."""
        rdzv = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{self._port}", "--rdzv-id=run"]
        is_host = 0 if self.running else 1
        rdzv += [f"--rdzv-conf=is_host={is_host},last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=3"]
        command = [str(TORCHRUN), "--nnodes=2", "--nproc-per-node=1", "--max-restarts=5", "--local-addr=127.0.0.1"]
        command += [*rdzv, "-m", "megatrain.train", str(self._config)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        with self._log.open("ab") as log:
            self.running.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        return self.running[-1]

    def ranks(self) -> list[psutil.Process]:
        """The ranks that are up, whoever started them."""
        line = ["-m", "megatrain.train", str(self._config)]
        processes = psutil.process_iter(["cmdline"])
        return [p for p in processes if (p.info["cmdline"] or [])[-3:] == line and "torchrun" not in p.info["cmdline"][1]]

    def rank_of(self, agent: subprocess.Popen[bytes]) -> psutil.Process:
        """The rank that an agent has started."""
        return next(rank for rank in self.ranks() if rank.ppid() == agent.pid)

    def output(self) -> str:
        """What all of them have printed."""
        return self._log.read_text(errors="replace")

    def kill_all(self) -> None:
        """Leave nothing behind."""
        for process in [*self.running, *self.ranks()]:
            process.send_signal(signal.SIGKILL)


@pytest.fixture
def agents(tiny_data: TinyData, tmp_path: Path) -> Iterator[Agents]:
    sections = {"train": {"steps": 100_000}, "checkpoint": {"every_steps": 5}}
    agents = Agents(write_config(tmp_path / "run.yaml", tiny_config(tiny_data, tmp_path / "run", **sections)))
    yield agents
    agents.kill_all()


def _wait_for_steps(agents: Agents, run_dir: Path) -> None:
    """Until the run has gone on from here."""
    now, before = time.time(), last_step(run_dir) or 0
    wait_until(lambda: (last_step(run_dir, now) or 0) > before + 5, 0.1)


@pytest.mark.parametrize("replaced", [0, 1], ids=["the first node", "the second"])
def test_a_run_outlives_a_rank_and_an_agent(replaced: int, agents: Agents, tmp_path: Path) -> None:
    """Whichever agent is replaced: the others hold the store of earlier starts, or it is gone."""
    first = agents.start()
    time.sleep(1.0)
    second = agents.start()
    run_dir = tmp_path / "run"
    try:
        wait_until(lambda: (last_step(run_dir) or 0) >= 10, 0.1)
        agents.rank_of(second).send_signal(signal.SIGKILL)
        time.sleep(1.0)
        _wait_for_steps(agents, run_dir)
        rank_0 = next(rank for rank in agents.ranks() if rank.environ()["RANK"] == "0")
        print("rank 0 under", rank_0.ppid(), "first", first.pid)
        second.send_signal(signal.SIGKILL)
        second.wait()
        agents.start()
        time.sleep(1.0)
        _wait_for_steps(agents, run_dir)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{agents.output()}") from None
    events = [event["event"] for event in Metrics.read(run_dir).events]
    assert events.count("resume") >= 2
    assert len(agents.ranks()) == 2, "ranks of the agent that was killed are left"
