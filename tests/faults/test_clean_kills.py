"""SIGKILL at any step of dedup and filter, or of one of several processes at the same work; then the same bytes."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.tokenize_inputs import environment, folder_bytes, write_inputs
from tests.runs import ACCEPTANCE

KILLS = """
import sys
from contextlib import nullcontext
from pathlib import Path
from data_tools.clean.dedup import DedupOptions, dedup
from data_tools.clean.filter import choose_filters, filter_documents
from data_tools.job import Effort
from data_tools.units import ReadOptions
from tests.faults.forked_kills import print_exit_codes
import rensa, fsspec, zstandard, pyarrow.parquet

_, command, out, *steps = sys.argv

def work():
    effort = Effort(1, lambda *_: nullcontext(lambda n: None), 40_000)
    read = ReadOptions(whole_records=True)
    if command == "filter":
        filter_documents(["in"], Path(out), read, choose_filters("length,gopher_repetition", None), effort, False)
    else:
        dedup(["in"], Path(out), DedupOptions(read, command, num_permutations=32), effort, False)

print_exit_codes(work, out, steps)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clean-kills")
    write_inputs(folder / "in", 1)
    return folder


def run(folder: Path, command: str, out: str, *steps: int) -> list[int]:
    """The exit codes of runs, each killed at its step; 0 for one that has fewer."""
    arguments = [sys.executable, "-c", KILLS, command, out, *map(str, steps)]
    done = subprocess.run(
        arguments, cwd=folder, env=environment(), stdout=subprocess.PIPE, check=True, text=True, timeout=280
    )
    return [int(line) for line in done.stdout.split()]


KILLS_IN_ALL = 200 if ACCEPTANCE else 12


@pytest.mark.parametrize(
    "command",
    ["minhash", pytest.param("exact", marks=pytest.mark.slow), pytest.param("filter", marks=pytest.mark.slow)],
)
def test_sigkill_at_any_step_changes_no_byte(command: str, folder: Path) -> None:
    assert run(folder, command, f"{command}-whole", 10**9) == [0]
    expected = folder_bytes(folder / f"{command}-whole")
    drawn = random.Random(command)
    steps = [drawn.randrange(1, 60) for _ in range(KILLS_IN_ALL)]
    codes = run(folder, command, f"{command}-killed", *steps, 10**9)
    assert codes.count(-signal.SIGKILL) >= 4
    assert codes[-1] == 0
    assert folder_bytes(folder / f"{command}-killed") == expected


def dedup_command(out: str, *options: str) -> list[str]:
    return [sys.executable, "-m", "data_tools", "dedup", "in", "--out", out, "--method", "minhash", *options]


def test_independent_processes_share_the_work(folder: Path) -> None:
    options = ("--num-permutations", "32", "--workers", "1")
    subprocess.run(dedup_command("alone", *options), cwd=folder, env=environment(), check=True, capture_output=True)
    tasks = [
        subprocess.Popen(
            dedup_command("shared", *options),
            cwd=folder,
            env=environment(SLURM_ARRAY_TASK_ID=str(k), SLURM_ARRAY_TASK_COUNT="3", SLURM_ARRAY_TASK_MIN="0"),
            stdout=subprocess.DEVNULL,
        )
        for k in range(3)
    ]
    assert [task.wait(timeout=200) for task in tasks] == [0, 0, 0]
    assert folder_bytes(folder / "shared") == folder_bytes(folder / "alone")


@pytest.mark.slow
def test_mpirun_changes_no_byte_and_reports_once(folder: Path) -> None:
    options = ("--num-permutations", "32", "--workers", "1")
    subprocess.run(dedup_command("one", *options), cwd=folder, env=environment(), check=True, capture_output=True)
    mpirun = [str(Path(sys.executable).parent / "mpirun"), "--oversubscribe", "-n", "3"]
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    done = subprocess.run(
        [*mpirun, *dedup_command("mpi", *options)],
        cwd=folder,
        env=environment(**as_root),
        capture_output=True,
        text=True,
        check=True,
        timeout=280,
    )
    assert done.stdout.count("Kept:") == 1
    assert folder_bytes(folder / "mpi") == folder_bytes(folder / "one")
    (folder / "bad.jsonl").write_bytes(b'{"text": "fine"}\n{"text": \n')
    command = ["bad.jsonl" if word == "in" else word for word in dedup_command("bad", *options)]
    failed = subprocess.run(
        [*mpirun, *command],
        cwd=folder,
        env=environment(**as_root),
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert failed.returncode == 3
    assert "bad.jsonl, line 2: bad JSON" in failed.stderr
