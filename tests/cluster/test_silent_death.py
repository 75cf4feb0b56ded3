"""A node that loses power, or is cut off: no packet tells of it, and yet all ranks of the others end in half a minute.

Nobody looks after these ranks: they are started by hand, one on each node.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.cluster.conftest import ROOT
from tests.cluster.lab import Lab
from tests.runs import Metrics, TinyData, tiny_config, wait_until, write_config

pytestmark = [pytest.mark.slow, pytest.mark.cluster]
acceptance = pytest.mark.acceptance
MOST_SECONDS = 30.0


class RanksOnNodes:
    """A rank on each of nodes 1 and 2, which train for very long."""

    def __init__(self, lab: Lab, data: TinyData, folder: Path) -> None:
        self.lab, self.run_dir = lab, folder / "run"
        train = {"steps": 1_000_000, "hang_timeout_seconds": 600.0}
        config = tiny_config(data, self.run_dir, train=train, checkpoint={"every_steps": 1_000_000})
        write_config(folder / "run.yaml", config)
        self.processes = [self._start(rank, folder) for rank in range(2)]

    def wait_for_step(self, step: int) -> None:
        """Until it has been logged."""
        wait_until(lambda: step in Metrics.read(self.run_dir).steps)

    def seconds_to_the_end_of(self, rank: int) -> float:
        """How long it still runs."""
        began = time.monotonic()
        self.processes[rank].wait(timeout=120)
        return time.monotonic() - began

    def said(self, rank: int) -> str:
        """What a rank has printed."""
        return (self.run_dir.parent / f"rank-{rank}.txt").read_text()

    def _start(self, rank: int, folder: Path) -> subprocess.Popen[bytes]:
        place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "node1"}
        words = [f"{name}={value}" for name, value in place.items()]
        words += ["MASTER_PORT=23456", "DS_ACCELERATOR=cpu", "OMP_NUM_THREADS=1"]
        command = ["env", *words, sys.executable, "-m", "megatrain.train", str(folder / "run.yaml")]
        with (folder / f"rank-{rank}.txt").open("wb") as output:
            inside = self.lab.inside(rank + 1, *command)
            return subprocess.Popen(inside, cwd=ROOT, env=self.lab.environment, stdout=output, stderr=output)


@pytest.fixture
def ranks(lab: Lab, tiny_data: TinyData, tmp_path: Path) -> Iterator[RanksOnNodes]:
    ranks = RanksOnNodes(lab, tiny_data, tmp_path)
    yield ranks
    for process in ranks.processes:
        for child in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []:
            child.kill()
        process.kill()
        process.wait()


@pytest.mark.parametrize("node", [2, pytest.param(1, marks=acceptance)])
def test_a_cut_off_node_ends_ranks_everywhere(node: int, lab: Lab, ranks: RanksOnNodes) -> None:
    ranks.wait_for_step(5)
    lab.cut(node)
    try:
        assert sum(ranks.seconds_to_the_end_of(rank) for rank in (0, 1)) < MOST_SECONDS
    finally:
        lab.heal(node)
    assert [process.returncode for process in ranks.processes] == [5, 5]
    said = ranks.said(0) + ranks.said(1)
    assert "no answer any more (Connection timed out): the node or its network has failed" in said
    assert "Traceback" not in said


@acceptance
@pytest.mark.parametrize("node", [1, 2])
def test_the_others_end_when_a_node_loses_power(node: int, lab: Lab, ranks: RanksOnNodes) -> None:
    ranks.wait_for_step(5)
    lab.cut(node)  # first: its kernel, which is ours and lives on, would tell the others
    lab.crash(node)
    left = 2 - node
    try:
        assert ranks.seconds_to_the_end_of(left) < MOST_SECONDS
    finally:
        lab.heal(node)
        lab.boot(node)
        lab.wait_until_idle()
    assert ranks.processes[left].returncode == 5
    assert f"Rank {node - 1} on node{node}: no answer any more" in ranks.said(left)
