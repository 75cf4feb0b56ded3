"""Many processes tokenize one input: under mpirun, srun or as an array; the same bytes from any number of them."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
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

MPIRUN = Path(sys.executable).parent / "mpirun"
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Has the input and, in `alone`, what one process made of it."""
    folder = tmp_path_factory.mktemp("ranks")
    write_inputs(folder / "in", 3)
    write_tokenizer(folder / "tokenizer.json", folder / "in")
    command = tokenize_command(folder, "--out", "alone", "--workers", 1)
    subprocess.run(command, cwd=folder, env=environment(), check=True)
    return folder


def mpirun(folder: Path, num_ranks: int, *options: object) -> list[str]:
    return [str(MPIRUN), "--oversubscribe", "-n", str(num_ranks), *tokenize_command(folder, *options)]


def run(command: list[str], folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=folder, env=environment(**env), capture_output=True, text=True, check=False, timeout=240
    )


def test_mpirun_gives_the_same_bytes_and_one_report(folder: Path) -> None:
    done = run(mpirun(folder, 3, "--out", "mpi", "--workers", 1), folder, **AS_ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("digest") == 1
    assert folder_bytes(folder / "mpi") == folder_bytes(folder / "alone")
    again = run(mpirun(folder, 2, "--out", "mpi"), folder, **AS_ROOT)
    assert again.returncode == 0
    assert folder_bytes(folder / "mpi") == folder_bytes(folder / "alone")


@pytest.mark.slow
def test_a_killed_rank_ends_all_and_tokenizing_resumes(folder: Path) -> None:
    out = folder / "killed"
    command = mpirun(folder, 3, "--out", out.name, "--workers", 1)
    process = subprocess.Popen(command, cwd=folder, env=environment(**AS_ROOT), stderr=subprocess.PIPE)
    while process.poll() is None and len(list(out.glob(".work/*.arrow"))) < 3:
        time.sleep(0.01)
    ranks = [
        child for child in psutil.Process(process.pid).children(recursive=True) if "run.py" in str(child.cmdline())
    ]
    ranks[1].send_signal(signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0
    assert not (out / "manifest.json").exists()
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob(".work/*.arrow")}
    assert len(kept) >= 3
    assert run(command, folder, **AS_ROOT).returncode == 0
    assert folder_bytes(out) == folder_bytes(folder / "alone")


def test_broken_input_ends_all_ranks_with_one_message(folder: Path) -> None:
    broken = folder / "broken"
    shutil.copytree(folder / "in", broken / "in")
    shutil.copy(folder / "tokenizer.json", broken)
    (broken / "in" / "z.jsonl").write_bytes(b'{"text": "fine"}\n{"text": \n')
    done = run(mpirun(broken, 3, "--out", "out", "--workers", 1), broken, **AS_ROOT)
    assert done.returncode == 3
    assert "z.jsonl, line 2: bad JSON" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (broken / "out" / "manifest.json").exists()


# What a rank sees when another MPI's launcher started it: its variables, and a library that knows nothing of them.
FOREIGN_LAUNCHERS = [
    {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "3"},
    pytest.param({"PMI_RANK": "0", "PMI_SIZE": "2"}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("variables", FOREIGN_LAUNCHERS, ids=["Open MPI", "MPICH"])
def test_a_foreign_mpi_is_refused(variables: dict[str, str], folder: Path) -> None:
    done = run(tokenize_command(folder, "--out", "refused"), folder, **variables, **AS_ROOT)
    assert done.returncode == 2, done.stderr
    assert "not the launcher's MPI" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "refused").exists()


@pytest.mark.parametrize(
    "launcher", ["array", pytest.param("srun", marks=pytest.mark.slow), pytest.param("nothing", marks=pytest.mark.slow)]
)
def test_independent_tasks_share_the_work(launcher: str, folder: Path) -> None:
    out = folder / launcher
    command = tokenize_command(folder, "--out", launcher, "--workers", 1)
    variables = [
        {
            "array": {
                "SLURM_ARRAY_TASK_ID": str(5 + 2 * task),
                "SLURM_ARRAY_TASK_MIN": "5",
                "SLURM_ARRAY_TASK_STEP": "2",
                "SLURM_ARRAY_TASK_COUNT": "3",
            },
            "srun": {  # with a PMI that no MPI here speaks
                "PMIX_RANK": str(task),
                "SLURM_PROCID": str(task),
                "SLURM_STEP_NUM_TASKS": "3",
                "SLURM_STEP_ID": "0",
            },
            "nothing": {},
        }[launcher]
        for task in range(3)
    ]
    random.Random(launcher).shuffle(variables)
    tasks = [subprocess.Popen(command, cwd=folder, env=environment(**each)) for each in variables]
    assert [task.wait(timeout=240) for task in tasks] == [0, 0, 0]
    assert folder_bytes(out) == folder_bytes(folder / "alone")


@pytest.mark.slow
def test_one_array_task_can_do_all_the_work(folder: Path) -> None:
    variables = {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_COUNT": "3"}
    assert run(tokenize_command(folder, "--out", "last", "--workers", 1), folder, **variables).returncode == 0
    assert folder_bytes(folder / "last") == folder_bytes(folder / "alone")
    refused = run(tokenize_command(folder, "--out", "last", "--restart"), folder, **variables)
    assert refused.returncode == 2
    assert "--restart by several tasks" in refused.stderr


@pytest.mark.slow
def test_a_concurrent_command_is_kept_out(folder: Path) -> None:
    command = tokenize_command(folder, "--out", "busy", "--workers", 1, part_bytes=4_000)
    process = subprocess.Popen(command, cwd=folder, env=environment())
    while process.poll() is None and not list((folder / "busy").glob(".work/*.arrow")):
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)
    try:
        other = run([*command, "--text-key", "body"], folder)
        restarted = run([*command, "--restart"], folder)
    finally:
        process.send_signal(signal.SIGCONT)
    assert other.returncode == 2
    assert "begun by a command with other text_key" in other.stderr
    assert restarted.returncode == 2
    assert "at work" in restarted.stderr
    assert process.wait(timeout=240) == 0
    assert Manifest.load(folder / "busy").digest == Manifest.load(folder / "alone").digest
