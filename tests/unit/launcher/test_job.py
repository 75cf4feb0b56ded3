from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launcher.job import begin_job, end_job, relay_signal
from megatrain.config import RunConfig, load
from megatrain.distributed import failures
from megatrain.distributed.bootstrap import job_port, start_name
from megatrain.errors import CheckpointError, ConfigError, RankError
from tests.unit.launcher.conftest import CONFIG

TRIES = 3


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """A run's config, inside job 4711."""
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("MASTER_PORT", "24711")
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"run": {"dir": str(tmp_path / "run")}, **CONFIG}))
    return load(path)


@pytest.fixture
def start(config: RunConfig, monkeypatch: pytest.MonkeyPatch):
    """One start of the job: begins, leaves a checkpoint or not, fails or not, ends with the launcher's status."""
    count = iter(range(100))

    def start(status: int, *, failure: int | None = None, checkpoint: int | None = None) -> tuple[str, int]:
        if (restarts := next(count)) > 0:
            monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
        begin_job(config, TRIES)
        if checkpoint is not None:
            folder = Path(config.run.dir) / "checkpoints" / f"step-{checkpoint:08d}"
            folder.mkdir(parents=True)
            (folder / "manifest.json").touch()
        if failure is not None:
            failures.claim(Path(config.run.dir), start_name(), failures.Failure(1, failure, "because"))
        return end_job(config, status, TRIES)

    return start


def test_initial_weights_are_checked_before_ranks_start(config: RunConfig, tmp_path: Path) -> None:
    run = config.run.model_copy(update={"init_from": str(tmp_path / "gone")})
    with pytest.raises(CheckpointError, match="gone does not exist"):
        begin_job(config.model_copy(update={"run": run}), TRIES)


@pytest.mark.parametrize(
    ("status", "failure", "answer", "code"),
    [
        (0, None, "stop", 0),
        (75, 75, "requeue", 75),
        (137, 75, "requeue", 75),  # srun has killed what was slow to end after the state was saved
        (1, 75, "requeue", 75),  # SLURM has ended the launcher, the ranks have saved
        (143, 5, "requeue", 5),
        (137, None, "requeue", 5),
        (247, None, "requeue", 5),  # DeepSpeed's way to say signal 9
        (5, 3, "stop", 3),
        (143, 1, "stop", 1),
        (2, None, "stop", 2),
        (1, None, "stop", 1),
    ],
)
def test_the_first_cause_decides(start, status: int, failure: int | None, answer: str, code: int) -> None:
    assert start(status, failure=failure) == (answer, code)


def test_repeated_starts_without_a_checkpoint_end_the_job(start, capsys: pytest.CaptureFixture[str]) -> None:
    assert [start(137)[0] for _ in range(TRIES)] == ["requeue", "requeue", "stop"]
    assert "given up" in capsys.readouterr().err


def test_a_new_checkpoint_begins_the_count_again(start) -> None:
    answers = [start(137), start(137), start(137, checkpoint=10), start(137), start(137), start(137)]
    assert [answer for answer, _ in answers] == ["requeue"] * 5 + ["stop"]


def test_ends_on_request_do_not_count(start) -> None:
    answers = [start(137), start(137), *(start(75, failure=75) for _ in range(5)), start(137), start(137)]
    assert [answer for answer, _ in answers] == ["requeue"] * 9


def test_starts_that_ended_unheard_count_too(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first node crashes each time: nobody is left to ask SLURM for another start, which comes all the same."""
    for restarts in range(TRIES):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
        begin_job(config, TRIES)
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(TRIES))
    with pytest.raises(RankError, match="given up"):
        begin_job(config, TRIES)


def test_a_resubmitted_job_counts_anew(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    for restarts in range(TRIES):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
        begin_job(config, TRIES)
    monkeypatch.setenv("SLURM_JOB_ID", "4712")
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    assert begin_job(config, TRIES) > 0


def test_a_run_folder_in_use_stops_the_job(config: RunConfig) -> None:
    holding = f"""
from pathlib import Path
from megatrain.checkpoint.lock import locked
with locked(Path({str(config.run.dir)!r}), {{"slurm_job": "17"}}):
    print("held", flush=True)
    input()
"""
    with subprocess.Popen([sys.executable, "-c", holding], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(CheckpointError, match="slurm job 17"):
            begin_job(config, TRIES)
        holder.communicate(b"\n")


def test_outside_of_a_job_nothing_begins(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID")
    with pytest.raises(ConfigError, match="SLURM_JOB_ID"):
        begin_job(config, TRIES)


def test_each_start_meets_at_its_own_free_port() -> None:
    first, second = job_port(4711, 0), job_port(4711, 1)
    assert first != second
    with socket.socket() as taken:
        taken.bind(("", first))
        assert job_port(4711, 0) not in (first, second)


RANK = """
import signal, sys, time
time.sleep(0.5)  # while Python and torch are being imported, a signal would kill
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
while True:
    time.sleep(0.05)
"""


@pytest.fixture
def rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A process like a rank of job 4711, whose commands are then called."""
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    package = tmp_path / "megatrain"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "train.py").write_text(RANK)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-m", "megatrain.train"], env=environment, cwd=tmp_path) as rank:
        yield rank
        rank.kill()


def test_a_signal_waits_for_a_rank_that_listens(rank: subprocess.Popen[bytes]) -> None:
    relay = [sys.executable, "-m", "launcher", "job", "relay", "USR1", "--script", str(os.getpid())]
    assert subprocess.run(relay, timeout=60).returncode == 0
    assert rank.wait(20) == 75


def test_sweep_ends_only_earlier_ranks_of_its_job(rank: subprocess.Popen[bytes]) -> None:
    sweep = [sys.executable, "-m", "launcher", "job", "sweep"]
    for other in ({"SLURM_JOB_ID": "4712", "SLURM_RESTART_COUNT": "1"}, {"SLURM_JOB_ID": "4711"}):
        subprocess.run(sweep, env={**os.environ, **other}, check=True, timeout=60)
        assert rank.poll() is None
    subprocess.run(sweep, env={**os.environ, "SLURM_RESTART_COUNT": "1"}, check=True, timeout=60)
    assert rank.wait(20) == -signal.SIGKILL


def test_an_orphaned_relay_disturbs_no_later_start(rank: subprocess.Popen[bytes]) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    relay = [sys.executable, "-m", "launcher", "job", "relay", "USR1", "--script", str(gone.pid)]
    assert subprocess.run(relay, timeout=60).returncode == 0
    assert rank.poll() is None


def test_a_name_that_no_signal_has_is_refused() -> None:
    with pytest.raises(ConfigError, match="USR9"):
        relay_signal("USR9", os.getpid())
