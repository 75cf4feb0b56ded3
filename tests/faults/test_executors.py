"""One command on every executor: the same bytes, whoever dies, in whatever stage, and without any file locks."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from megatrain.data.format import Manifest
from tests.faults.tokenize_inputs import (
    environment,
    folder_bytes,
    tokenize_command,
    write_inputs,
    write_tokenizer,
)
from tests.runs import wait_until

BIN = Path(sys.executable).parent
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
STAGES = {"encode": ".work/parts-*/*.arrow", "shards": ".work/of-*/shards-000/*.json"}
"""A few of which are there when the stage is on."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Has the input and, in `alone`, what one process made of it."""
    folder = tmp_path_factory.mktemp("executors")
    write_inputs(folder / "in", 3)
    write_tokenizer(folder / "tokenizer.json", folder / "in")
    assert run(tokenize_command(folder, "--out", "alone", "--workers", 1), folder).returncode == 0
    return folder


def run(command: list[str], folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=folder, env=environment(**AS_ROOT, **env), capture_output=True, text=True, check=False, timeout=240
    )


def start(command: list[str], folder: Path, **env: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment(**AS_ROOT, **env),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def mpirun(num_ranks: int, command: list[str]) -> list[str]:
    return [str(BIN / "mpirun"), "--oversubscribe", "-n", str(num_ranks), *command]


@contextlib.contextmanager
def dask_cluster(folder: Path, num_workers: int) -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """A scheduler and workers, whose working folder is another; the scheduler file, and the workers."""
    file = folder / "scheduler.json"
    file.unlink(missing_ok=True)
    module = [sys.executable, "-m", "distributed.cli"]
    options = ["--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(file)]
    scheduler = start([*module[:2], "distributed.cli.dask_scheduler", *options], Path("/tmp"))
    worker = [*module[:2], "distributed.cli.dask_worker", "--scheduler-file", str(file), "--nthreads", "1"]
    worker += ["--no-nanny", "--no-dashboard", "--local-directory", str(folder / "dask")]
    wait_until(file.exists)
    workers = [start(worker, Path("/tmp"), PYTHONPATH=str(Path.cwd())) for _ in range(num_workers)]
    try:
        yield str(file), workers
    finally:
        for process in [*workers, scheduler]:
            process.kill()
            process.wait()


def by_one(folder: Path, out: str) -> None:
    assert run(tokenize_command(folder, "--out", out, "--workers", 1), folder).returncode == 0


def by_workers(folder: Path, out: str) -> None:
    assert run(tokenize_command(folder, "--out", out, "--workers", 4), folder).returncode == 0


def by_shares(folder: Path, out: str) -> None:
    """As three machines do it that know nothing of each other; the last share of each stage begins late."""
    command = tokenize_command(folder, "--out", out, "--workers", 1)
    for _ in range(2):
        tasks = [start([*command, "--share", f"{number}/3"], folder) for number in (3, 1)]
        assert [task.wait(timeout=240) for task in tasks] == [0, 0]
        ended = run([*command, "--share", "2/3"], folder)
        assert ended.returncode == 0, ended.stderr
    assert run(command, folder).returncode == 0


def by_ranks(folder: Path, out: str) -> None:
    ended = run(mpirun(4, tokenize_command(folder, "--out", out)), folder)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("digest") == 1


def by_dask(folder: Path, out: str) -> None:
    with dask_cluster(folder, 3) as (file, _):
        ended = run(tokenize_command(folder, "--out", out, "--dask", file), folder)
        assert ended.returncode == 0, ended.stderr


EXECUTORS: dict[str, Callable[[Path, str], None]] = {
    "one process": by_one,
    "4 workers": by_workers,
    "shares": by_shares,
    "4 MPI ranks": by_ranks,
    "3 Dask workers": by_dask,
}


slow = pytest.mark.slow
sample = [pytest.param(name, marks=slow if name in ("shares", "3 Dask workers") else ()) for name in EXECUTORS]


@pytest.mark.parametrize("executor", sample)
def test_every_executor_gives_the_same_bytes(executor: str, folder: Path) -> None:
    out = executor.replace(" ", "-")
    EXECUTORS[executor](folder, out)
    assert folder_bytes(folder / out) == folder_bytes(folder / "alone")


NO_LOCKS = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

static int refuse(const char *name) {
    FILE *log = fopen(getenv("LOCK_LOG"), "a");
    if (log) { fprintf(log, "%s\\n", name); fclose(log); }
    errno = ENOSYS;
    return -1;
}
int flock(int fd, int operation) { return refuse("flock"); }
int lockf(int fd, int command, off_t length) { return refuse("lockf"); }
static int locks(int command) {
    return command == F_SETLK || command == F_SETLKW || command == F_OFD_SETLK || command == F_OFD_SETLKW;
}
#define WRAP(name) int name(int fd, int command, ...) { \\
    va_list list; va_start(list, command); void *argument = va_arg(list, void *); va_end(list); \\
    if (locks(command)) return refuse(#name); \\
    int (*real)(int, int, ...) = dlsym(RTLD_NEXT, #name); \\
    return real(fd, command, argument); }
WRAP(fcntl)
WRAP(fcntl64)
"""


@pytest.mark.slow
@pytest.mark.parametrize("executor", list(EXECUTORS)[1:])
def test_no_executor_needs_file_locks(executor: str, folder: Path) -> None:
    library = folder / "nolocks.so"
    if not library.exists():
        (folder / "nolocks.c").write_text(NO_LOCKS)
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, folder / "nolocks.c", "-ldl"], check=True)
    probe = "import fcntl; fcntl.flock(open('probe', 'w'), fcntl.LOCK_EX)"
    variables = {"LD_PRELOAD": str(library), "LOCK_LOG": str(folder / "locks.log")}
    assert "Function not implemented" in run([sys.executable, "-c", probe], folder, **variables).stderr
    (folder / "locks.log").unlink()
    out = f"no-locks-{executor.replace(' ', '-')}"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        EXECUTORS[executor](folder, out)
    assert folder_bytes(folder / out) == folder_bytes(folder / "alone")


def wait_for_stage(out: Path, stage: str, process: subprocess.Popen[bytes]) -> None:
    wait_until(lambda: len(list(out.glob(STAGES[stage]))) >= 2 or process.poll() is not None, 0.002)
    assert process.poll() is None, "it has ended before it could be killed"


def slowed(folder: Path, *options: object) -> list[str]:
    """The command with parts and shards so small that each stage lasts."""
    command = tokenize_command(folder, *options, part_bytes=4_000)
    command[command.index("--shard-tokens") + 1] = "1000"
    return command


@pytest.fixture(scope="module")
def small_parts(folder: Path) -> dict[str, bytes]:
    assert run(slowed(folder, "--out", "small", "--workers", 1), folder).returncode == 0
    return folder_bytes(folder / "small")


@slow
@pytest.mark.parametrize("stage", list(STAGES))
@pytest.mark.parametrize("victim", ["coordinator", "worker"])
def test_a_killed_process_loses_no_commit(victim: str, stage: str, folder: Path, small_parts: dict[str, bytes]) -> None:
    out = folder / f"killed-{victim}-{stage}"
    command = slowed(folder, "--out", out.name, "--workers", 2)
    process = start(command, folder)
    wait_for_stage(out, stage, process)
    family = psutil.Process(process.pid).children(recursive=True)
    workers = [child for child in family if "spawn_main" in " ".join(child.cmdline())]
    (process if victim == "coordinator" else workers[0]).send_signal(signal.SIGKILL)
    assert process.wait(timeout=30) == (-signal.SIGKILL if victim == "coordinator" else 5)
    _, alive = psutil.wait_procs(family, timeout=5)
    assert alive == []
    kept = {path: path.stat().st_mtime_ns for path in out.glob(STAGES[stage])}
    again = start(command, folder)
    wait_until(lambda: again.poll() is not None or len(list(out.glob(STAGES[stage]))) > len(kept), 0.002)
    there = {path: path.stat().st_mtime_ns for path in kept if path.exists()}
    assert there.items() <= kept.items()
    assert again.wait(timeout=120) == 0
    assert folder_bytes(out) == small_parts


@pytest.mark.slow
@pytest.mark.parametrize("stage", list(STAGES))
def test_a_killed_rank_ends_all_within_a_minute(stage: str, folder: Path, small_parts: dict[str, bytes]) -> None:
    out = folder / f"killed-rank-{stage}"
    command = mpirun(4, slowed(folder, "--out", out.name))
    process = start(command, folder)
    wait_for_stage(out, stage, process)
    ranks = [each for each in psutil.Process(process.pid).children(recursive=True) if "run.py" in str(each.cmdline())]
    ranks[2].send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) != 0
    assert not (out / "manifest.json").exists()
    ended = run(command, folder)
    assert ended.returncode == 0, ended.stderr
    assert folder_bytes(out) == small_parts


@pytest.mark.slow
@pytest.mark.parametrize("stage", list(STAGES))
def test_a_dead_dask_worker_changes_nothing(stage: str, folder: Path, small_parts: dict[str, bytes]) -> None:
    out = folder / f"killed-dask-{stage}"
    with dask_cluster(folder, 3) as (file, workers):
        process = start(slowed(folder, "--out", out.name, "--dask", file), folder)
        wait_for_stage(out, stage, process)
        kept = {path: path.stat().st_ino for path in out.glob(STAGES[stage])}
        workers[0].kill()
        while process.poll() is None:
            with contextlib.suppress(FileNotFoundError):
                assert all(path.stat().st_ino == inode for path, inode in kept.items() if path.exists())
            time.sleep(0.01)
        assert process.wait() == 0
    assert folder_bytes(out) == small_parts


@pytest.mark.slow
def test_broken_input_ends_all_ranks_with_one_message(folder: Path) -> None:
    broken = folder / "broken"
    shutil.copytree(folder / "in", broken / "in")
    shutil.copy(folder / "tokenizer.json", broken)
    (broken / "in" / "z.jsonl").write_bytes(b'{"text": "fine"}\n{"text": \n')
    done = run(mpirun(3, tokenize_command(broken, "--out", "out")), broken)
    assert done.returncode == 3
    assert done.stderr.count("z.jsonl, line 2: bad JSON") == 1
    assert "Traceback" not in done.stderr
    assert not (broken / "out" / "manifest.json").exists()
    wrong = run(mpirun(3, tokenize_command(broken, "--out", "in/out")), broken)  # rank 0 alone finds it
    assert wrong.returncode == 2
    assert wrong.stderr.count("lies in the input folder") == 1


# What a rank sees when another MPI's launcher started it: its variables, and a library that knows nothing of them.
FOREIGN_LAUNCHERS = [
    {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "3"},
    pytest.param({"PMI_RANK": "0", "PMI_SIZE": "2"}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("variables", FOREIGN_LAUNCHERS, ids=["Open MPI", "MPICH"])
def test_a_foreign_mpi_is_refused(variables: dict[str, str], folder: Path) -> None:
    done = run(tokenize_command(folder, "--out", "refused"), folder, **variables)
    assert done.returncode == 2, done.stderr
    assert "not the launcher's MPI" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "refused").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--share", "0/3"), "should be K/N"),
        (("--share", "1/3", "--restart"), "--restart by one of several tasks"),
        (("--dask", "nowhere.json"), "neither an address such as tls://"),
        (("--dask", "nowhere.json", "--workers", "2"), "leave out --workers and --share"),
        (("--dask-plain",), "nothing without --dask"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_options_that_do_not_fit_are_refused(options: tuple[str, ...], message: str, folder: Path) -> None:
    done = run(tokenize_command(folder, "--out", "refused", *options), folder)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (folder / "refused").exists()


@pytest.mark.slow
def test_workers_option_is_refused_under_mpi(folder: Path) -> None:
    done = run(mpirun(2, tokenize_command(folder, "--out", "refused", "--workers", 1)), folder)
    assert done.returncode == 2
    assert "--workers would do nothing under MPI" in done.stderr


@pytest.mark.slow
def test_a_late_task_finds_nothing_missing(folder: Path) -> None:
    """What SLURM tells an array's tasks; a resubmission of some has another count."""
    command = tokenize_command(folder, "--out", "array", "--workers", 1, "--stage", "encode")

    def task(number: int, job: str, count: int) -> dict[str, str]:
        array = {"SLURM_ARRAY_TASK_ID": str(number), "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_COUNT": str(count)}
        return {**array, "SLURM_ARRAY_JOB_ID": job, "SLURM_JOB_ID": f"{job}{number}"}

    for number in (2, 0):
        assert run(command, folder, **task(number, "7", 3)).returncode == 0
    early = run([*command[:-1], "plan"], folder)
    assert early.returncode == 75
    assert "units of the stage 'encode' are missing" in early.stderr
    for number in (1, 0):
        assert run(command, folder, **task(number, "8", 2)).returncode == 0
    assert run(command, folder, **task(1, "7", 3)).returncode == 0
    assert run(command[:-2], folder).returncode == 0
    assert folder_bytes(folder / "array") == folder_bytes(folder / "alone")


@pytest.mark.slow
def test_a_second_command_on_a_folder_is_refused(folder: Path) -> None:
    command = slowed(folder, "--out", "busy", "--workers", 1)
    process = start(command, folder)
    wait_for_stage(folder / "busy", "encode", process)
    process.send_signal(signal.SIGSTOP)
    try:
        ended = [run([*command, *more], folder) for more in ((), ("--restart",), ("--text-key", "body"))]
    finally:
        process.send_signal(signal.SIGCONT)
    assert [each.returncode for each in ended] == [2, 2, 2]
    assert all(f"process {process.pid} on {os.uname().nodename}" in each.stderr for each in ended)
    process.kill()
    process.wait()
    other = run([*command, "--text-key", "body"], folder)
    assert other.returncode == 2
    assert "begun by a command with other text_key" in other.stderr
    assert run(command, folder).returncode == 0
    assert Manifest.load(folder / "busy").digest == Manifest.load(folder / "alone").digest
