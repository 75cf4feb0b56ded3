"""Runs through `megatrain train`, killed or asked to stop: what was trained is not lost, and nothing differs."""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from megatrain.checkpoint.inspection import verify
from megatrain.checkpoint.stores import find_store
from tests.runs import ACCEPTANCE, Metrics, TinyData, TrainProcess, tiny_config, wait_until, write_config

NUM_STEPS = 20


class Stretch(NamedTuple):
    """One start of a run: how it ended, and what it left."""

    code: int
    output: str
    saved: list[int]
    metrics: Metrics
    num_orphans: int


class Starts:
    """Starts a config again and again, each time interrupted as told."""

    def __init__(self, data: TinyData, folder: Path, num_steps: int = NUM_STEPS) -> None:
        slow_enough_to_be_met = {"global_batch_size": 64, "hang_timeout_seconds": 20.0}
        sections = {"train": {"steps": num_steps, **slow_enough_to_be_met}}
        self.config = write_config(folder / "run.yaml", tiny_config(data, folder / "run", **sections))
        self.run_dir = folder / "run"

    def start(
        self, interrupt: Callable[[TrainProcess], None] = lambda train: None, *overrides: str, num_ranks: int = 2
    ) -> Stretch:
        """Two ranks, until they have ended."""
        train = TrainProcess(self.config, num_ranks, *overrides)
        try:
            interrupt(train)
            code, output = train.wait()
            wait_until(lambda: train.process.returncode != -signal.SIGKILL or not train.ranks())
            num_orphans = len(train.ranks())
        finally:
            train.kill_all()
        saved = [checkpoint.step for checkpoint in find_store(self.run_dir).list() if checkpoint.good]
        return Stretch(code, output, saved, Metrics.read(self.run_dir), num_orphans)


def _signal_rank(rank: int, number: int, step: int) -> Callable[[TrainProcess], None]:
    def interrupt(train: TrainProcess) -> None:
        train.wait_for_step(step)
        train.ranks()[rank].send_signal(number)

    return interrupt


def _signal_command(number: int, step: int) -> Callable[[TrainProcess], None]:
    def interrupt(train: TrainProcess) -> None:
        train.wait_for_step(step)
        train.process.send_signal(number)

    return interrupt


@pytest.fixture(scope="module")
def straight(tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Stretch:
    stretch = Starts(tiny_data, tmp_path_factory.mktemp("straight")).start()
    assert stretch.code == 0, stretch.output
    return stretch


def _check_same(metrics: Metrics, straight: Stretch) -> None:
    assert metrics.steps == list(range(1, NUM_STEPS + 1))
    assert metrics.losses == straight.metrics.losses
    assert metrics.norms == straight.metrics.norms


@pytest.fixture(scope="module")
def killed(tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Stretch]]:
    """Rank 1 is killed once step 11 is done; then the run is started again."""
    starts = Starts(tiny_data, tmp_path_factory.mktemp("killed"))
    yield [starts.start(_signal_rank(1, signal.SIGKILL, 11)), starts.start()]


@pytest.mark.slow
def test_a_killed_rank_exits_5(killed: list[Stretch]) -> None:
    assert killed[0].code == 5, killed[0].output
    assert "Traceback" not in killed[0].output
    assert "Start the run again" in killed[0].output
    assert killed[0].num_orphans == 0


@pytest.mark.slow
def test_a_kill_changes_no_loss_or_norm(killed: list[Stretch], straight: Stretch) -> None:
    assert killed[1].code == 0, killed[1].output
    assert killed[0].saved[-1] >= 5
    resumed_at = [event["step"] for event in killed[1].metrics.events if event["event"] == "resume"]
    assert resumed_at == [killed[0].saved[-1]]
    _check_same(killed[1].metrics, straight)


@pytest.fixture(scope="module")
def stopped(tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> list[Stretch]:
    """Ctrl-C to the command; TERM to rank 1; then to the end."""
    starts = Starts(tiny_data, tmp_path_factory.mktemp("stopped"))
    interruptions = [_signal_command(signal.SIGINT, 3), _signal_rank(1, signal.SIGTERM, 8), lambda train: None]
    return [starts.start(interrupt) for interrupt in interruptions]


@pytest.mark.slow
def test_a_signal_saves_on_all_ranks_exits_75(stopped: list[Stretch]) -> None:
    for stretch, name in zip(stopped[:2], ("SIGINT", "SIGTERM"), strict=True):
        assert stretch.code == 75, stretch.output
        assert f"stopped early on request ({name})" in stretch.output
        assert stretch.saved[-1] == stretch.metrics.steps[-1]
        assert "start it again" in stretch.output
        assert "Traceback" not in stretch.output
        assert stretch.num_orphans == 0
    assert stopped[0].metrics.steps[-1] < stopped[1].metrics.steps[-1] < NUM_STEPS


@pytest.mark.slow
def test_requests_to_stop_change_no_loss_or_norm(stopped: list[Stretch], straight: Stretch) -> None:
    assert stopped[2].code == 0, stopped[2].output
    _check_same(stopped[2].metrics, straight)


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [1, 3])
@pytest.mark.acceptance
def test_kills_and_stops_change_no_bit_under_fsdp2(zero_stage: int, tiny_data: TinyData, tmp_path: Path) -> None:
    """Rank 1 is killed; then the run is asked to save and end; then it goes on to its end."""
    under = ("parallel.engine=fsdp2", f"parallel.zero_stage={zero_stage}")
    undisturbed = Starts(tiny_data, tmp_path / "straight").start(lambda train: None, *under)
    starts = Starts(tiny_data, tmp_path / "disturbed")
    killed = starts.start(_signal_rank(1, signal.SIGKILL, 7), *under)
    stopped = starts.start(_signal_command(signal.SIGUSR1, 12), *under)
    again = starts.start(lambda train: None, *under)
    assert [each.code for each in (undisturbed, killed, stopped, again)] == [0, 5, 75, 0], again.output
    assert stopped.saved[-1] == stopped.metrics.steps[-1]
    _check_same(again.metrics, undisturbed)


@pytest.mark.slow
def test_a_stop_request_during_start_is_kept(tiny_data: TinyData, tmp_path: Path) -> None:
    def interrupt(train: TrainProcess) -> None:
        wait_until(lambda: len(psutil.Process(train.process.pid).children(recursive=True)) > 0)
        train.process.send_signal(signal.SIGUSR1)

    stretch = Starts(tiny_data, tmp_path).start(interrupt)
    assert stretch.code == 75, stretch.output
    assert stretch.saved == [1]


@pytest.mark.slow
def test_killing_the_command_makes_ranks_save_and_end(tiny_data: TinyData, tmp_path: Path) -> None:
    stretch = Starts(tiny_data, tmp_path, num_steps=1000).start(_signal_command(signal.SIGKILL, 3))
    assert (stretch.code, stretch.num_orphans) == (-signal.SIGKILL, 0)
    assert 3 < stretch.metrics.steps[-1] < 1000
    assert stretch.saved[-1] == stretch.metrics.steps[-1]


@pytest.mark.slow
def test_a_start_superseded_by_requeue_commits_nothing(tiny_data: TinyData, straight: Stretch, tmp_path: Path) -> None:
    starts = Starts(tiny_data, tmp_path)
    left_behind = TrainProcess(starts.config, 2, environment={"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "0"})
    requeued = None
    try:
        left_behind.wait_for_step(8)
        left_behind.send_all(signal.SIGSTOP)
        requeued = TrainProcess(starts.config, 2, environment={"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "1"})
        requeued.wait_for_step(9)
        left_behind.send_all(signal.SIGCONT)
        zombie_code, zombie_output = left_behind.wait()
        code, output = requeued.wait()
    finally:
        left_behind.kill_all()
        if requeued is not None:
            requeued.kill_all()
    assert code == 0, output
    assert zombie_code == 4, zombie_output
    assert "taken over" in zombie_output
    _check_same(Metrics.read(starts.run_dir), straight)
    assert verify(starts.run_dir)[0] == []


SYSTEM_CALLS = [(0, "rename", 1)] + [
    (rank, call, count)
    for rank, call, count in [
        (0, "mkdir", 1), (0, "fsync", 1), (0, "fsync", 2), (0, "fsync", 3), (0, "fsync", 4), (1, "mkdir", 1),
        (1, "write", 3), (0, "rename", 2), (1, "fsync", 1),
    ]
    if ACCEPTANCE
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="there is no strace (apt-get install strace)")
@pytest.mark.parametrize(("rank", "call", "count"), SYSTEM_CALLS)
def test_a_kill_during_saving_resumes_identically(
    rank: int, call: str, count: int, tiny_data: TinyData, straight: Stretch, tmp_path: Path
) -> None:
    starts = Starts(tiny_data, tmp_path)

    def interrupt(train: TrainProcess) -> None:
        train.wait_for_step(6)
        folder = next((starts.run_dir / "checkpoints").glob(".generation-*"))
        inject = f"inject={call}:signal=SIGKILL:when={count}"
        below = [
            f"-P{folder}/step-{step:08d}{name}"
            for step in (10, 15)
            for name in ("", f"/rank-{rank:05d}.safetensors", "/tokenizer.json", "/manifest.json")
        ]
        pid = train.ranks()[rank].pid
        subprocess.run(["strace", "-f", "-p", str(pid), "-o", "/dev/null", "-e", f"trace={call}", *below, "-e", inject])

    killed = starts.start(interrupt)
    assert killed.code == 5, killed.output
    assert killed.saved[-1] >= 5
    again = starts.start()
    assert again.code == 0, again.output
    _check_same(again.metrics, straight)
    assert verify(starts.run_dir)[0] == []


@pytest.mark.slow
@pytest.mark.acceptance
def test_object_store_checkpoints_resume_by_run_folder(
    tiny_data: TinyData, straight: Stretch, bucket: str, tmp_path: Path
) -> None:
    starts = Starts(tiny_data, tmp_path)
    place = f"checkpoint.dir={bucket}/{tmp_path.name}"
    killed = starts.start(_signal_rank(1, signal.SIGKILL, 11), place)
    assert killed.code == 5, killed.output
    assert killed.saved[-1] in (5, 10)
    again = starts.start(lambda train: None, place)
    assert again.code == 0, again.output
    assert again.saved == [10, 15, 20]
    _check_same(again.metrics, straight)
    assert verify(starts.run_dir) == ([], 9, verify(starts.run_dir)[2])
    assert not (starts.run_dir / "checkpoints").exists()
