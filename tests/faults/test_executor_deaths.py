"""SIGKILL of whoever runs a data job, in each of its stages: the same bytes, and no committed unit is run again."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from tests.faults.data_jobs import JobFolder, mpirun
from tests.runs import TIMEOUT_SECONDS, wait_until

Commits = dict[Path, int]
STAGES = {
    "tokenize": {"encode": "parts-*/**/*.arrow", "shards": "of-*/shards-000/*.json"},
    "minhash": {
        "read": "attributes/*/*.arrow",
        "sort": "of-*/runs/**/*-keys.arrow",
        "compare": "of-*/pairs/by-key-*/**/*.arrow",
        "join": "of-*/pairs/joined/**/*.arrow",
        "list": "of-*/tallies/**/*.json",
        "write": "of-*/files/**/*.zst",
    },
    "split": {"count": "of-*/counts/**/*.json", "write-train": "of-*/train/**/*.zst"},
}
"""By command and stage what its units commit, below .work."""


class Job(NamedTuple):
    folder: JobFolder
    command: list[str]
    out: Path
    pattern: str

    def commits(self) -> Commits:
        """The commits of the stage, and when each was made; none while the work is being removed."""
        with contextlib.suppress(FileNotFoundError):
            paths = [path for path in self.out.glob(f".work/{self.pattern}") if path.name[0] != "." and path.is_file()]
            return {path: path.stat().st_mtime_ns for path in paths}
        return {}

    def wait_for_stage(self, process: subprocess.Popen[bytes]) -> None:
        wait_until(lambda: len(self.commits()) >= 2 or process.poll() is not None, 0.002)
        assert process.poll() is None, "it has ended before it could be killed"

    def finish(self, processes: Iterable[subprocess.Popen[bytes]], kept: Commits) -> list[int]:
        """The exit codes, once all have ended, and no commit that was there has been made anew."""
        end = time.monotonic() + TIMEOUT_SECONDS
        while any(process.poll() is None for process in processes):
            now = self.commits()
            assert {path: now[path] for path in kept if path in now}.items() <= kept.items()
            assert time.monotonic() < end
            time.sleep(0.01)
        return [process.returncode for process in processes]

    def go_on(self, command: list[str]) -> None:
        assert self.finish([self.folder.start(command)], self.commits()) == [0]


def kill_one_of_this_machine(job: Job, victim: str) -> None:
    command = [*job.command, "--workers", "2"]
    process = job.folder.start(command)
    job.wait_for_stage(process)
    family = psutil.Process(process.pid).children(recursive=True)
    workers = [child for child in family if "spawn_main" in " ".join(child.cmdline())]
    (process if victim == "coordinator" else workers[0]).send_signal(signal.SIGKILL)
    assert process.wait(timeout=30) == (-signal.SIGKILL if victim == "coordinator" else 5)
    assert psutil.wait_procs(family, timeout=5)[1] == []
    job.go_on(command)


def kill_rank(job: Job, number: int) -> None:
    command = mpirun(4, job.command)
    process = job.folder.start(command)
    job.wait_for_stage(process)
    ranks = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        ranks[child.environ().get("OMPI_COMM_WORLD_RANK")] = child
    ranks[str(number)].kill()
    assert process.wait(timeout=60) != 0
    job.go_on(command)


def kill_dask_worker(job: Job) -> None:
    with job.folder.dask_cluster(3) as (file, _, workers):
        process = job.folder.start([*job.command, "--dask", file])
        job.wait_for_stage(process)
        kept = job.commits()
        workers[0].kill()
        assert job.finish([process], kept) == [0]


def kill_task(job: Job) -> None:
    """One of two tasks of each stage, as an array has them; then the same tasks again."""
    kept: Commits = {}
    was_killed = False
    while job.out.joinpath(".work").exists() or not kept:
        tasks = [job.folder.start([*job.command, "--workers", "1", "--share", f"{k}/2"]) for k in (1, 2)]
        while not was_killed and all(task.poll() is None for task in tasks):
            if job.commits():
                tasks[1].kill()
                was_killed = True
        codes = job.finish(tasks, kept)
        kept = kept or job.commits()
        assert set(codes) <= {0, 75, -signal.SIGKILL}
    assert was_killed


VICTIMS: dict[str, Callable[[Job], None]] = {
    "coordinator": lambda job: kill_one_of_this_machine(job, "coordinator"),
    "worker": lambda job: kill_one_of_this_machine(job, "worker"),
    "first MPI rank": lambda job: kill_rank(job, 0),
    "MPI rank": lambda job: kill_rank(job, 2),
    "Dask worker": kill_dask_worker,
    "task of an array": kill_task,
}
SAMPLED = {
    *(("coordinator", "encode"), ("worker", "compare"), ("MPI rank", "shards"), ("Dask worker", "read")),
    ("task of an array", "encode"),
}
CASES = [(victim, name, stage) for victim in VICTIMS for name, stages in STAGES.items() for stage in stages]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "name", "stage"),
    [pytest.param(*case, marks=() if case[::2] in SAMPLED else pytest.mark.acceptance) for case in CASES],
)
def test_a_death_in_any_stage_changes_no_byte(
    victim: str, name: str, stage: str, job_folder: JobFolder, alone: Callable[[str], dict[str, bytes]]
) -> None:
    out = f"{name} {stage} {victim}"
    job = Job(job_folder, job_folder.command(name, out), job_folder.path / out, STAGES[name][stage])
    VICTIMS[victim](job)
    assert job_folder.made(out) == alone(name)


@pytest.mark.slow
@pytest.mark.acceptance
def test_a_lost_dask_scheduler_is_told(job_folder: JobFolder, alone: Callable[[str], dict[str, bytes]]) -> None:
    command = job_folder.command("tokenize", "no scheduler")
    job = Job(job_folder, command, job_folder.path / "no scheduler", STAGES["tokenize"]["encode"])
    with job_folder.dask_cluster(2) as cluster:
        words, env = [*command, "--dask", cluster.scheduler_file], job_folder.environment()
        process = subprocess.Popen(words, cwd=job_folder.path, env=env, stderr=subprocess.PIPE, text=True)
        wait_until(lambda: len(job.commits()) >= 2, 0.002)
        cluster.scheduler.kill()
        assert process.stderr is not None
        errors = process.stderr.read()
        assert (process.wait(timeout=60), errors.count("The Dask scheduler is gone")) == (5, 1), errors
    assert "Traceback" not in errors
    job.go_on(command)
    assert job_folder.made("no scheduler") == alone("tokenize")


@pytest.mark.slow
def test_broken_input_ends_all_ranks_with_one_message(job_folder: JobFolder, tmp_path: Path) -> None:
    shutil.copytree(job_folder.path, tmp_path / "jobs", ignore=shutil.ignore_patterns("* *", "set"))
    broken = JobFolder(tmp_path / "jobs")
    (broken.path / "in" / "z.jsonl").write_bytes(b'{"text": "fine"}\n{"text": \n')
    done = broken.run(mpirun(3, broken.command("tokenize", "out")))
    assert done.returncode == 3
    assert done.stderr.count("z.jsonl, line 2: bad JSON") == 1
    assert "Traceback" not in done.stderr
    assert not (broken.path / "out" / "manifest.json").exists()
    wrong = broken.run(mpirun(3, broken.command("tokenize", "in/out")))  # rank 0 alone finds it
    assert wrong.returncode == 2
    assert wrong.stderr.count("lies in the input folder") == 1


@pytest.mark.slow
def test_a_second_command_on_a_folder_is_refused(job_folder: JobFolder) -> None:
    command = job_folder.command("tokenize", "busy", "--workers", "1")
    job = Job(job_folder, command, job_folder.path / "busy", STAGES["tokenize"]["encode"])
    process = job_folder.start(command, SLURM_JOB_ID="7")
    job.wait_for_stage(process)
    process.send_signal(signal.SIGSTOP)
    try:
        ended = [job_folder.run([*command, *more]) for more in ((), ("--restart",), ("--text-key", "body"))]
    finally:
        process.send_signal(signal.SIGCONT)
    assert [each.returncode for each in ended] == [2, 2, 2]
    assert all(f"process {process.pid} on {os.uname().nodename} (job 7)" in each.stderr for each in ended)
    process.kill()
    process.wait()
    other = job_folder.run([*command, "--text-key", "body"])
    assert other.returncode == 2
    assert "begun by a command with other text_key" in other.stderr
    job.go_on(command)
