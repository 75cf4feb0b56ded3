"""torchrun with an agent a node: a rank is killed, an agent is killed and replaced by another, and the run goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from torch.distributed import TCPStore

from megatrain.distributed.bootstrap import free_port
from tests.runs import Metrics, TinyData, last_step, tiny_config, wait_until, write_config

pytestmark = pytest.mark.slow
TORCHRUN = Path(sys.executable).with_name("torchrun")


class Agents:
    """torchrun's agents of one run of two ranks, each as on a node of its own.

    What they meet at is held by this process, or by the first of them (``static``).
    """

    def __init__(self, config: Path, static: bool, **environment: str) -> None:
        self._config, self._log = config, config.with_suffix(".log")
        self._environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **environment}
        if static:
            self._options = ["--master-addr=127.0.0.1", f"--master-port={free_port()}"]
        else:
            self._rendezvous = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            patience = "is_host=0,last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=3"
            self._options = ["--rdzv-backend=c10d", "--rdzv-id=run", f"--rdzv-conf={patience}"]
            self._options += [f"--rdzv-endpoint=127.0.0.1:{self._rendezvous.port}", "--local-addr=127.0.0.1"]
        self.running: list[subprocess.Popen[bytes]] = []

    def start(self, node: int) -> subprocess.Popen[bytes]:
        """One more."""
        command = [str(TORCHRUN), "--nnodes=2", "--nproc-per-node=1", "--max-restarts=5", f"--node-rank={node}"]
        command += [*self._options, "-m", "megatrain.train", str(self._config)]
        with self._log.open("ab") as log:
            self.running.append(subprocess.Popen(command, env=self._environment, stdout=log, stderr=log))
        return self.running[-1]

    def ranks(self) -> list[psutil.Process]:
        """The ranks that are up, whoever started them."""
        line = ["-m", "megatrain.train", str(self._config)]
        processes = psutil.process_iter(["cmdline"])
        return [
            p for p in processes if (p.info["cmdline"] or [])[-3:] == line and "torchrun" not in p.info["cmdline"][1]
        ]

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


def _wait_for_steps(run_dir: Path) -> None:
    """Until the run has gone on from here."""
    now, before = time.time(), last_step(run_dir) or 0
    wait_until(lambda: (last_step(run_dir, now) or 0) > before + 5, 0.1)


# What torchrun is started with; and which agent is replaced. Where agents share their store (c10d, torch 2.13), that of
# rank 0 never tells a new one where it is: no other can be replaced.
WAYS: dict[str, tuple[bool, dict[str, str], int]] = {
    "c10d, rank 0's node is replaced": (False, {}, 0),
    "c10d, the other node is replaced": (False, {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}, 1),
    "static, the other node is replaced": (True, {}, 1),
}


@pytest.mark.sample(1)
@pytest.mark.parametrize("way", WAYS)
def test_a_run_outlives_a_rank_and_an_agent(way: str, tiny_data: TinyData, tmp_path: Path) -> None:
    sections = {"train": {"steps": 100_000}, "checkpoint": {"every_steps": 5}}
    run_dir = tmp_path / "run"
    static, environment, replaced = WAYS[way]
    agents = Agents(
        write_config(tmp_path / "run.yaml", tiny_config(tiny_data, run_dir, **sections)), static, **environment
    )
    try:
        pair = [agents.start(0), agents.start(1)]
        wait_until(lambda: (last_step(run_dir) or 0) >= 10, 0.1)
        agents.rank_of(pair[1]).send_signal(signal.SIGKILL)
        time.sleep(1.0)
        _wait_for_steps(run_dir)
        pair[replaced].send_signal(signal.SIGKILL)
        pair[replaced].wait()
        agents.start(replaced)
        time.sleep(1.0)
        _wait_for_steps(run_dir)
        assert [event["event"] for event in Metrics.read(run_dir).events].count("resume") >= 2
        assert len(agents.ranks()) == 2, "ranks of the agent that was killed are left"
    except AssertionError as error:
        raise AssertionError(f"{error}\n{agents.output()}") from None
    finally:
        agents.kill_all()
