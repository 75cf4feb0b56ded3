"""A rank that is killed, whenever that is: the others end within half a minute, with code 5, and nothing is left."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from megatrain.distributed.bootstrap import free_port
from tests.runs import ACCEPTANCE, Metrics, TinyData, TrainProcess, tiny_config, wait_until, write_config

pytestmark = pytest.mark.slow
acceptance = pytest.mark.acceptance
MOST_SECONDS = 30.0
LONG_HANG_SECONDS = 600.0  # what ends the others must not be that nothing moves any more


def _config(data: TinyData, folder: Path, **sections: dict[str, object]) -> Path:
    train = {"steps": 100_000, "global_batch_size": 8, "hang_timeout_seconds": LONG_HANG_SECONDS}
    sections = {"checkpoint": {"every_steps": 100_000}, **sections}
    sections["train"] = {**train, **sections.get("train", {})}
    return write_config(folder / "run.yaml", tiny_config(data, folder / "run", **sections))


# When a rank is killed: what is laid over the config, and what is waited for.
EVALUATES_MOST = {"train": {"eval_every_steps": 1, "eval_batches": None}}
SAVES_MOST = {"checkpoint": {"every_steps": 1, "background": False}}
MOMENTS: dict[str, tuple[dict[str, dict[str, object]], Callable[[TrainProcess], None]]] = {
    "its first moment": ({}, lambda train: None),
    "imports": ({}, lambda train: time.sleep(1.0)),
    "meeting": ({}, lambda train: wait_until((train.run_dir / "logs" / "rank-00001.log").exists)),
    "a step": ({}, lambda train: train.wait_for_step(5)),
    "a save": (SAVES_MOST, lambda train: train.wait_for_step(3)),
    "an evaluation": (EVALUATES_MOST, lambda train: train.wait_for_step(3)),
}
EARLY = ("its first moment", "imports")  # rank 0 may not know it yet: then TERM tells the others
SAMPLE = [("imports", 2, 1), ("a step", 4, 0)]
ALL = [(moment, num_ranks, rank) for moment in MOMENTS for num_ranks in (2, 4) for rank in (0, num_ranks - 1)]


@pytest.mark.parametrize(("moment", "num_ranks", "rank"), ALL if ACCEPTANCE else SAMPLE)
def test_a_killed_rank_ends_all_within_30_seconds(
    moment: str, num_ranks: int, rank: int, tiny_data: TinyData, tmp_path: Path
) -> None:
    sections, wait_for_it = MOMENTS[moment]
    train = TrainProcess(_config(tiny_data, tmp_path, **sections), num_ranks)
    try:
        wait_until(lambda: len(train.ranks()) == num_ranks, 0.01)
        wait_for_it(train)
        train.ranks()[rank].send_signal(signal.SIGKILL)
        killed_at = time.monotonic()
        code, output = train.wait()
        seconds = time.monotonic() - killed_at
        left = train.ranks()
    finally:
        train.kill_all()
    sys.stdout.write(f"rank {rank} of {num_ranks} killed in {moment}: all had ended after {seconds:.1f} s\n")
    assert code == 5, output
    assert seconds < MOST_SECONDS
    assert not left
    assert "Traceback" not in output
    if moment not in EARLY:
        assert f"Rank {rank} on {socket.gethostname()}: killed, or crashed" in output
        assert output.count("Start the run again") == 1, output


class RanksByHand:
    """Two ranks that no launcher looks after."""

    def __init__(self, config: Path) -> None:
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port())}
        self.processes = []
        for rank in range(2):
            place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2}
            environment |= {name: str(value) for name, value in place.items()}
            command = [sys.executable, "-m", "megatrain.train", str(config)]
            self.processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))


@pytest.fixture
def by_hand(tiny_data: TinyData, tmp_path: Path) -> Iterator[RanksByHand]:
    ranks = RanksByHand(_config(tiny_data, tmp_path))
    yield ranks
    for process in ranks.processes:
        process.kill()


@pytest.mark.sample(1)
@pytest.mark.parametrize("rank", [1, 0])
def test_a_death_during_imports_ends_the_other_rank(rank: int, by_hand: RanksByHand) -> None:
    wait_until(lambda: all(_is_importing(process.pid) for process in by_hand.processes), 0.01)
    by_hand.processes[rank].kill()
    killed_at = time.monotonic()
    _, errors = by_hand.processes[1 - rank].communicate(timeout=60)
    assert time.monotonic() - killed_at < MOST_SECONDS
    assert by_hand.processes[1 - rank].returncode == 5
    assert f"Rank {rank} on " in errors
    assert "killed, or crashed" in errors


def _is_importing(pid: int) -> bool:
    """Whether a rank has begun to load torch, and is known to rank 0."""
    process = psutil.Process(pid)
    is_known = any(connection.status == psutil.CONN_ESTABLISHED for connection in process.net_connections("tcp"))
    return is_known and any("libtorch" in region.path for region in process.memory_maps())


@acceptance
@pytest.mark.parametrize("stopped", [[0], [0, 1]], ids=["rank 0", "all"])
def test_ranks_stopped_for_long_are_not_presumed_dead(stopped: list[int], tiny_data: TinyData, tmp_path: Path) -> None:
    train = TrainProcess(_config(tiny_data, tmp_path), 2)
    try:
        train.wait_for_step(5)
        ranks = train.ranks()
        for rank in stopped:
            ranks[rank].send_signal(signal.SIGSTOP)
        time.sleep(25.0)
        before = Metrics.read(train.run_dir).steps[-1]
        for rank in stopped:
            ranks[rank].send_signal(signal.SIGCONT)
        train.wait_for_step(before + 100)
    finally:
        train.kill_all()
